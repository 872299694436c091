"""What surrounds sampling: noise, the network and its judge, what is printed, where samples go."""
import io
import zipfile
from pathlib import Path

import numpy as np
import torch

from cfg_min import NULL
from support import checkpoint, mnist, picture
from support.checkpoint import LATENT_SHAPE, PIXELS_SHAPE
from support.command import BadInput, number, try_place, write_whole


class Noise:
    """randn(like) -> at each call the next noise (B, *shape). The argument is not used.

    Each sample has its own stream: that of sample i is seeded with (seed, i).
    """

    def __init__(self, seed, ids, latent=False, device="cpu"):
        self.generators = [np.random.default_rng([seed, i]) for i in ids]
        self.shape = LATENT_SHAPE if latent else PIXELS_SHAPE
        self.device = device

    def __call__(self, like=None):
        noise = [g.standard_normal(self.shape, np.float32) for g in self.generators]
        return torch.from_numpy(np.stack(noise)).to(self.device)


def label(string):
    """An argparse type: a label 0 ... 9, or null."""
    return NULL if string == "null" else number(int, 0, 9)(string)


def choose_labels(label, n, is_picture):
    """The labels y (N,): all the same, or 0, 1, ..., 9 in turn. A whole picture ends with ten
    samples without a label."""
    if label is not None:
        return torch.full((n or 100,), label)
    y = torch.arange(n or 100) % 10
    if n is None and is_picture:
        y = torch.cat([y, torch.full((10,), NULL)])
    return y


# ---------------------------------------------------------------- the networks

def load_model(file, device):
    """net(x, t, y) -> u, its config, and the autoencoder of a latent model, else None."""
    if file is None:
        file = "runs/unet.pt" if Path("runs/unet.pt").is_file() else "weights/unet.pt"
    net, config = checkpoint.load(file, device)
    if config["arch"] not in checkpoint.GENERATORS:
        raise BadInput(f"{file}: no generator, but a {config['arch']}")
    print(f"sampling from {file}: {config['arch']}, step {config['step']} of {config['steps']}")
    vae = checkpoint.load_autoencoder(file, device) if config["latent"] else None
    return net, config, vae


def find_classifier(guides, config, device):
    """A classifier trained on the model's data (and path, if it guides), and its file.

    None, None if none is found and none is needed. Raises BadInput.
    """
    if guides and config["latent"]:
        raise BadInput("a latent model takes --guidance cfg only: the classifier sees pixels")
    for file in ("runs/classifier.pt", "weights/classifier.pt"):
        try:
            classifier, its = checkpoint.load(file, device)
        except BadInput:                        # not there, or damaged
            continue
        fits = its["arch"] == "classifier" and its["data"] == config["data"]
        if its["step"] < its["steps"]:
            file += f" (step {its['step']} of {its['steps']})"
        if fits and (its["path"] == config["path"] or not guides):
            return classifier, file
    if guides:
        raise BadInput("no classifier has seen the data and path of this model: train one with "
                       "python -m chapters.classifier, the same --data and --path")
    print("no label accuracy: no classifier has seen these data (python -m chapters.classifier "
          "trains one)")
    return None, None


# ---------------------------------------------------------------- what is said and shown

def say_what_is_untrained(config, options, y):
    """Print a line for each field that samples of the labels y need, but training never showed."""
    guides = options.guidance != "cfg"          # the unconditional field, by a classifier
    asked = {*y.tolist(), options.away_from} - {NULL}
    lacking = asked - {*config.get("labels", asked)}
    needs_null = NULL in y or guides or (options.away_from == NULL and {*options.w} != {1})
    needs_labels = asked and not guides and any(options.w)
    if lacking:
        print(f"the data of this network have no label {', '.join(map(str, sorted(lacking)))}: "
              "its samples mean nothing")
    if config.get("eta") == 0 and needs_null:
        print("this network was trained with --eta 0, never without a label: only w = 1 is learned")
    if config.get("eta") == 1 and needs_labels:
        print("this network was trained with --eta 1, never with a label: only w = 0 is learned")


def report(w, images, y, classifier, file, real_diversity):
    """Print the share of samples that the classifier labels as y, and their diversity."""
    labelled = y != NULL
    if classifier is None or not labelled.any():
        return
    images = images[labelled]
    y = y[labelled]
    share = mnist.accuracy(classifier, images[:, None], y)
    line = f"w = {w:g}: label accuracy {100 * share:.1f} % by {file}"
    diversity = mnist.diversity(images, y)
    if diversity > 0 and real_diversity > 0:    # nan where no class has two samples
        line += f", diversity {diversity / real_diversity:.2f} of that of real digits"
    print(line)


def arrange(images, y):
    """Images (N, 32, 32) as a grid (R, C, 32, 32): sample i stands in row i % 10.

    Samples without a label, if there are others, have a row of their own, the last.
    """
    without = y == NULL
    if without.any() and not without.all():
        grid = arrange(images[~without], y[~without])
        return torch.cat([grid, images[without][None]])
    R = min(10, len(images))
    missing = -len(images) % R
    images = torch.cat([images, images.new_zeros(missing, 32, 32)])
    return images.view(-1, R, 32, 32).transpose(0, 1)


def write(out, panels, images, y):
    """The figure of all panels, or an .npz of images (N, 32, 32) uint8 and labels (N,) int64."""
    if out.endswith(".png"):
        write_whole(out, picture.png(np.hstack(panels)))
        return
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images.cpu().numpy(), labels=y.cpu().numpy())
    write_whole(out, buffer.getvalue())


def check_out(out):
    """Raise BadInput where --out cannot be written, or holds anything that this does not write."""
    try_place(out)
    if not Path(out).exists():
        return
    ours = Path(out).read_bytes()[:8] == picture.SIGNATURE
    if out.endswith(".npz"):
        try:
            with zipfile.ZipFile(out) as parts:
                ours = sorted(parts.namelist()) == ["images.npy", "labels.npy"]
        except zipfile.BadZipFile:
            ours = False
    if not ours:
        raise BadInput(f"--out {out} holds something else than samples: choose another name")
