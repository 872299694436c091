"""The digits: reading them, drawing batches, and measuring samples against them."""
import gzip
import math
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from cfg_min import NULL
from support.command import HERE, BadInput, find

FILE = HERE / "data/mnist.npz"
KEYS = "x_train", "y_train", "x_test", "y_test"
IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte",
             "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
LARGEST = 2**31         # bytes of an unpacked IDX file


def bad_data(path, reason):
    """The BadInput of --data: what is wrong, and what is wanted."""
    return BadInput(f"{path}: {reason}; --data wants an .npz of x_train, y_train, x_test, y_test, "
                    "or a folder of MNIST's four IDX files: images (N, 28, 28) of 0 (black) to 255 "
                    f"(white), labels (N,) of 0..{NULL - 1}, N > 0")


def read_idx(file):
    """An IDX file of bytes, or its .gz: 0, 0, 8, the rank, big-endian sizes, data."""
    packed = Path(f"{file}.gz")
    if not file.is_file() and not packed.is_file():
        raise bad_data(file, "not a file")
    try:
        with gzip.open(packed) if packed.exists() and not file.exists() else open(file, "rb") as f:
            raw = f.read(LARGEST)
    except (OSError, EOFError, zlib.error) as error:
        raise bad_data(file, error) from None
    rank = int.from_bytes(raw[3:4], "big")
    start = 4 + 4 * rank
    shape = [int.from_bytes(raw[k:k + 4], "big") for k in range(4, start, 4)]
    if raw[:3] != b"\0\0\x08" or rank > 3 or len(raw) != start + math.prod(shape):
        raise bad_data(file, "no IDX file of bytes, or cut short")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_npz(file):
    """The arrays of KEYS in an .npz."""
    if not file.is_file():                      # a device or a pipe would be read without end
        raise bad_data(file, "not a file")
    try:
        with zipfile.ZipFile(file) as parts:
            if parts.testzip():                 # numpy does not read every checksum
                raise zipfile.BadZipFile("a checksum is wrong")
        with np.load(file, allow_pickle=False) as npz:
            return [npz[key] for key in KEYS]
    except MemoryError:
        raise
    except Exception as error:                  # numpy, zipfile, zlib: each raises its own
        raise bad_data(file, str(error) or type(error).__name__) from None


def find_fault(images, labels):
    """What keeps these from being images (N, 28, 28) and labels (N,), or None."""
    if images.dtype.kind not in "iu" or images.shape[1:] != (28, 28):
        return f"images {images.dtype} {images.shape}"
    if labels.dtype.kind not in "iu" or labels.ndim != 1:
        return f"labels {labels.dtype} {labels.shape}"
    if len(images) != len(labels):
        return f"{len(images)} images, but {len(labels)} labels"
    if len(images) == 0:
        return "no images"
    if images.min() < 0 or not 128 <= images.max() <= 255:  # of another range: nearly black
        return f"pixels from {images.min()} to {images.max()}"
    if labels.min() < 0 or labels.max() >= NULL:
        return f"labels from {labels.min()} to {labels.max()}"
    return None


def load(path=FILE):
    """x_train, y_train, x_test, y_test: (N, 1, 32, 32) uint8, padded from 28x28; (N,) int64, 0..9.

    From an .npz of arrays so named, or a folder of MNIST's four IDX files, which may lie one folder
    below. Raises BadInput.
    """
    path = find(path)
    if path.is_dir():
        below = [file.parent for file in path.glob(f"*/{IDX_FILES[0]}*")]
        arrays = [read_idx((below or [path])[0] / name) for name in IDX_FILES]
    else:
        arrays = read_npz(path)
    out = []
    for part, images, labels in (("training", *arrays[:2]), ("test", *arrays[2:])):
        fault = find_fault(images, labels)
        if fault:
            raise bad_data(path, f"its {part} part has {fault}")
        padded = np.pad(images.astype(np.uint8), ((0, 0), (2, 2), (2, 2)))
        padded = np.ascontiguousarray(padded)               # (N, 32, 32)
        out.append(torch.from_numpy(padded)[:, None])       # (N, 1, 32, 32)
        out.append(torch.from_numpy(labels.astype(np.int64)))
    return out


def to_unit(images):
    """uint8 0 ... 255 -> float32 -1 ... 1."""
    return images.float() / 127.5 - 1


def to_bytes(x):
    """float -1 ... 1 -> uint8 0 ... 255; what lies outside is clipped."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()


def draw_batch(images, labels, n):
    """n data points z and their labels y: (z, y) ~ p_data.

    images: uint8 pixels, which become z in [-1, 1]; or latents, which are z.
    """
    i = torch.randint(len(images), (n,), device=images.device)
    z = images[i]
    if z.dtype == torch.uint8:
        z = to_unit(z)
    return z, labels[i]


# ---------------------------------------------------------------- measures

@torch.no_grad()
def accuracy(classifier, images, labels):
    """The share of images (N, 1, 32, 32) uint8 to which a noisy classifier, at t = 1, gives their
    label."""
    guesses = [classifier(to_unit(x), 1.0).argmax(1) for x in images.split(500)]
    return (torch.cat(guesses) == labels).float().mean().item()


def diversity(images, labels):
    """Mean distance of two images of a class (of its first 1000), averaged over classes.

    nan where no class has two images.
    """
    means = []
    for label in labels.unique():
        flat = images[labels == label][:1000].flatten(1).float()
        means.append(torch.pdist(flat.cpu()).mean())        # MPS has no pdist
    return torch.stack(means).nanmean().item()
