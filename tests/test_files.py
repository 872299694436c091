"""Files: checkpoints, data, pictures; damaged, forged and odd ones."""
import copy
import gzip
import pickle
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import error_line, run_line, signal_in

from cfg_min import NULL, euler
from support import checkpoint, command, mnist, picture

SAMPLE = "sample.py --w 1 --n 2 --steps 1"

# ---------------------------------------------------------------- checkpoints

def test_a_loaded_network_can_be_copied_and_pickled(unet):
    net, _ = checkpoint.load(unet)
    x = torch.randn(2, 1, 32, 32)
    y = torch.tensor([1, 2])
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x, 0.4, y), net(x, 0.4, y))


@torch.no_grad()
def test_the_last_of_200_steps_of_a_loaded_network_ends_at_its_z(unet):
    """The loss bounds 1 / (1 - t) from t = 0.98 on; sampling must not, or noise is left."""
    net, _ = checkpoint.load(unet)
    x = torch.randn(2, 1, 32, 32)
    y = torch.tensor([1, 2])
    end = euler(lambda x, t: net(x, t, y), x, 1, t0=0.995)
    assert (end - net.net(x, 0.995, y)).abs().max() < 1e-3


def test_a_network_of_eps_starts_from_x(run):
    """net(x, t, y) = x + what its layers give, which is 0 before training; in its file too."""
    assert run("train.py --arch unet --predict eps --steps 1 --batch 2 --lr 1e-9 --out a.pt") == 0
    net, _ = checkpoint.load("a.pt")
    x = torch.randn(2, 1, 32, 32)
    assert (net.net(x, 0.5, torch.tensor([1, 2])) - x).abs().max() < 1e-4


@pytest.mark.parametrize("name, load", [("unet", checkpoint.read), ("few", mnist.load)])
def test_flipped_bits_are_noticed(request, tmp_path, name, load):
    """In the headers of a zip file's parts, in its directory, in the data: refused or harmless."""
    whole = request.getfixturevalue(name)
    checksum = checkpoint.checksum_of(load(whole))
    raw = whole.read_bytes()
    places = [*range(0, len(raw), len(raw) // 20), *range(len(raw) - 400, len(raw), 17)]
    # a mark after which torch leaves a tensor as it finds it
    marks = [entry.start() + 38 for entry in re.finditer(b"PK\1\2", raw)][::5]
    refused = 0
    for place in places + marks:
        flipped = bytearray(raw)
        flipped[place] ^= 1 << 4
        (tmp_path / "flipped").write_bytes(flipped)
        try:
            assert checkpoint.checksum_of(load(tmp_path / "flipped")) == checksum
        except command.BadInput:
            refused += 1
    assert refused > len(places) / 2


LINE = "train.py --arch unet --predict z --steps 9 --batch 8"
RESUME = f"{LINE} --resume --out forged.pt"
INIT = f"{LINE} --init forged.pt --out new.pt"
SHOW = f"{SAMPLE} --ckpt forged.pt"


@pytest.fixture(scope="module")
def halfway(tmp_path_factory, few):
    """The unfinished checkpoint of a run of 9 steps, at step 4."""
    file = tmp_path_factory.mktemp("halfway") / "a.pt"
    with signal_in(4):
        assert run_line(f"{LINE} --out {file}", few) == 130
    return file


def forge(file, change):
    """A checkpoint with a right checksum, changed."""
    saved = checkpoint.read(file)
    change(saved)
    Path("forged.pt").write_bytes(checkpoint.pack(saved))


@pytest.mark.parametrize("line, says, change", [
    (SHOW, "not this code's", lambda s: s["weights"].popitem()),
    (SHOW, "path is 'x'", lambda s: s["config"].update(path="x")),
    (SHOW, "NULL = 26", lambda s: s["config"].update(classes=26)),
    (INIT, "net", lambda s: s["config"]["net"].update(layers=1)),
    (INIT, "not this code's", lambda s: s["weights"].popitem()),
    (RESUME, "not this code's", lambda s: s["weights"].popitem()),
])
def test_a_checkpoint_of_other_code_is_one_line_that_names_what_differs(run, halfway, capsys, line,
                                                                        says, change):
    """A clone may be changed after a training."""
    forge(halfway, change)
    before = Path("forged.pt").read_bytes()
    assert run(line) == 2
    assert says in error_line(capsys)
    assert Path("forged.pt").read_bytes() == before


def test_a_checkpoint_may_lack_what_older_ones_lack(run, halfway):
    """The labels, eta, number of classes: it samples, starts a run and goes on."""
    forge(halfway, lambda s: [s["config"].pop(key) for key in ("labels", "eta", "classes")])
    for line in (SHOW, INIT, RESUME):
        assert run(line) == 0


class Malice:
    def __reduce__(self):
        return Path("ran").touch, ()


def test_a_pickle_never_runs(run, unet):
    torch.save(dict(checkpoint.read(unet), more=Malice()), "evil.pt")
    assert run(f"{SAMPLE} --ckpt evil.pt") == 2
    assert not Path("ran").exists()


# ---------------------------------------------------------------- data

@pytest.mark.parametrize("zipped", [False, True])
def test_idx_folders_are_read_as_the_npz_is_and_refused_where_a_file_is_cut_short(tmp_path, few,
                                                                                  zipped):
    """The files may lie one folder below, as torchvision puts them."""
    arrays = np.load(few)
    below = tmp_path / "raw"
    below.mkdir()
    for name, key in zip(mnist.IDX_FILES, mnist.KEYS):
        shape = arrays[key].shape
        raw = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
        raw += arrays[key].astype(np.uint8).tobytes()
        file = below / (f"{name}.gz" if zipped else name)
        file.write_bytes(gzip.compress(raw) if zipped else raw)
    for folder in (tmp_path, below):
        for a, b in zip(mnist.load(folder), mnist.load(few)):
            assert torch.equal(a, b)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(command.BadInput, match="--data wants"):
        mnist.load(tmp_path)


def test_digits_are_padded_and_bytes_and_pixels_are_one_thing(few):
    x, _, _, _ = mnist.load(few)
    with np.load(few) as npz:
        assert np.array_equal(x[:, 0, 2:-2, 2:-2], npz["x_train"])
    assert x.sum() == x[:, :, 2:-2, 2:-2].sum()
    assert torch.equal(mnist.to_bytes(mnist.to_unit(x)), x)
    assert mnist.to_unit(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1, 1]
    assert mnist.to_bytes(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def change_data(few, file, key, function):
    with np.load(few) as npz:
        arrays = dict(npz)
    arrays[key] = function(arrays[key])
    np.savez(file, **arrays)


@pytest.mark.parametrize("key, function", [
    ("x_train", lambda x: np.asfortranarray(x.astype(np.int64))),
    ("y_train", lambda y: np.arange(300) % 3),
    ("x_test", lambda x: 0 * x + 200),
])
def test_odd_but_valid_data_train_and_sample(run, few, key, function):
    change_data(few, "odd.npz", key, function)
    assert run("train.py --arch unet --steps 2 --batch 8 --data odd.npz --out a.pt") == 0
    assert run("sample.py --w 3 --n 10 --steps 1 --ckpt a.pt") == 0


@pytest.mark.parametrize("key, function", [
    ("x_train", lambda x: x.astype(float)),
    ("x_train", lambda x: x[:, :20]),
    ("x_train", lambda x: x // 128),            # 0 and 1, or 0 to 127: pictures nearly black
    ("x_train", lambda x: (x // 2).astype(np.int8)),
    ("x_test", lambda x: x[:0]),
    ("y_train", lambda y: y[:5]),
    ("y_train", lambda y: y + NULL - 9),
])
def test_other_arrays_are_bad_input(tmp_path, few, key, function):
    change_data(few, tmp_path / "bad.npz", key, function)
    with pytest.raises(command.BadInput, match="--data wants"):
        mnist.load(tmp_path / "bad.npz")


def test_diversity_is_the_mean_distance_of_two_images_of_a_class():
    images = torch.zeros(4, 32, 32, dtype=torch.uint8)
    images[1, 0, 0] = 3
    images[3, 0, :2] = torch.tensor([6, 8])
    assert mnist.diversity(images, torch.tensor([0, 0, 1, 1])) == pytest.approx((3 + 10) / 2)


# ---------------------------------------------------------------- pictures

def test_a_png_decodes_to_what_was_written():
    """Three chunks, each with its length and checksum; anything but bytes is refused."""
    grey = (np.arange(60).reshape(5, 12) * 4).astype(np.uint8)
    raw = picture.png(grey)
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    for kind, chunk in ((b"IHDR", raw[8:33]), (b"IDAT", raw[33:-12]), (b"IEND", raw[-12:])):
        assert chunk[4:8] == kind
        assert int.from_bytes(chunk[:4], "big") == len(chunk) - 12
        assert int.from_bytes(chunk[-4:], "big") == zlib.crc32(chunk[4:-4])
    rows = np.frombuffer(zlib.decompress(raw[41:-16]), np.uint8).reshape(5, 13)
    assert np.array_equal(rows[:, 1:], grey)
    with pytest.raises(ValueError):
        picture.png(np.zeros((4, 4)))


def test_a_panel_shows_its_images_in_rows_under_its_title():
    grid = np.arange(6, dtype=np.uint8).reshape(2, 3, 1, 1).repeat(32, axis=2).repeat(32, axis=3)
    panel = picture.panel(grid, "w = 3")
    assert panel.shape == (16 + 64 + 8, 96 + 8)
    inside = panel[4 + 16:-4, 4:-4]
    assert inside[::32, ::32].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert panel[4:20].max() == 255             # the title
