"""Measures that see what an eye sees: `python benchmarks/measures.py FILE.npz ...` of sample.py.

read      % of the samples that a judge, a network for clean digits, reads as their label
Frechet   distance to the test digits in the judge's last hidden layer
grey      total variation, in %, between the histograms of grey levels of samples and test digits
black     % of exactly black pixels
border    mean grey level, of 255, of the outer four pixels
diversity mean distance of two samples of a class, over that of real digits
apart     % of the cases in which a small network that is trained on half of the samples and as
          many real digits tells the other half apart: 50 is chance, and perfect
shape     the same, when grey levels under 32 are made black and over 223 white

A row of real training digits of the same labels shows what each measure says of perfect samples.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import mnist                                                    # noqa: E402
from command import BadInput, run                               # noqa: E402

JUDGE = HERE / "judge.pt"       # kept after the first run


# ---------------------------------------------------------------- two small networks

def half_size(c, d):
    """(B, c, H, W) -> (B, d, H/2, W/2)."""
    convolution = nn.Conv2d(c, d, 3, stride=2, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(d), nn.ReLU())


def make_reader(classes, c=16):
    """A plain convolutional classifier, (B, 1, 32, 32) -> (B, classes)."""
    return nn.Sequential(
        nn.Conv2d(1, c, 3, padding=1),
        nn.ReLU(),
        half_size(c, 2 * c),                    # (B, 2 c, 16, 16)
        half_size(2 * c, 4 * c),                # (B, 4 c, 8, 8)
        half_size(4 * c, 4 * c),                # (B, 4 c, 4, 4)
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),                           # (B, 4 c)
        nn.Linear(4 * c, classes))


@torch.enable_grad()
def fit(net, images, labels, epochs, batch=100):
    """Train a reader: AdamW, a rate that rises to 4e-3 and falls to 0 (Smith & Topin 2018)."""
    net.train()
    optimizer = torch.optim.AdamW(net.parameters())
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for k in range(len(images) // batch):
            i = order[k * batch:(k + 1) * batch]
            loss = F.cross_entropy(net(mnist.to_unit(images[i])), labels[i])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def outputs(net, images):
    """net's answers to images (N, 1, 32, 32) uint8, (N, ...)."""
    return torch.cat([net(mnist.to_unit(x)) for x in images.split(500)])


def load_judge(x_train, y_train):
    """The judge, which has seen real digits only: trained for a minute once, then kept in JUDGE.

    It is taken from there whatever x_train is: for other data, remove that file first.
    """
    torch.manual_seed(0)
    net = make_reader(10)
    if JUDGE.exists():
        net.load_state_dict(torch.load(JUDGE, weights_only=True))
        return net.eval()
    fit(net, x_train, y_train, epochs=4, batch=128)
    torch.save(net.state_dict(), JUDGE)
    return net


# ---------------------------------------------------------------- the measures

def frechet(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), a squared distance; Heusel et al.
    2017, eq. 6.

    a, b: features (N, D), (M, D).
    """
    a = a.double()
    b = b.double()
    cov_a = a.T.cov()
    cov_b = b.T.cov()
    # the trace of a square root is the sum of the eigenvalues' roots; these are real and >= 0
    eigenvalues = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0)
    means = (a.mean(0) - b.mean(0)).square().sum()
    return (means + cov_a.trace() + cov_b.trace() - 2 * eigenvalues.sqrt().sum()).item()


def histogram(images):
    """The shares of the 256 grey levels, (256,)."""
    return torch.bincount(images.flatten().int(), minlength=256) / images.numel()


def border_grey(images):
    """Mean grey level of the outer four pixels of images (N, 1, 32, 32)."""
    inner = images[:, :, 4:-4, 4:-4]
    total = images.sum().item() - inner.sum().item()
    return total / (images.numel() - inner.numel())


def shapes(images):
    """Grey levels under 32 made black, over 223 white: shapes stay, faint grain is gone."""
    images = torch.where(images < 32, 0, images)
    return torch.where(images > 223, 255, images)


def told_apart(samples, real, steps=500, batch=100):
    """% told apart by a network that is trained on one half and tested on the other; Lopez-Paz &
    Oquab 2017, here both ways. It makes about as many steps whatever N is, 10 epochs at least.

    samples, real: (N, 1, 32, 32) uint8, as many of each, of the same labels in the same order.
    """
    images = torch.stack([samples, real], dim=1).flatten(0, 1)  # in turn, so halves are balanced
    is_real = torch.arange(len(images)) % 2
    half = len(images) // 4 * 2                 # even, so that no pair is torn apart
    first = slice(0, half)
    second = slice(half, 2 * half)
    batch = min(batch, half)
    epochs = max(10, steps * batch // half)
    right = []
    for seen, unseen in ((first, second), (second, first)):
        torch.manual_seed(0)
        net = fit(make_reader(2), images[seen], is_real[seen], epochs, batch)
        answers = outputs(net, images[unseen]).argmax(1)
        right.append(answers == is_real[unseen])
    return 100 * torch.cat(right).double().mean().item()


def real_like(labels, x, y, skip=0):
    """Real digits of these labels (N,), from x of labels y; the first skip of each left out.

    Raises BadInput.
    """
    images = torch.empty(len(labels), *x.shape[1:], dtype=x.dtype)
    for label in labels.unique():
        places = (labels == label).nonzero()[:, 0]
        chosen = x[y == label][skip:skip + len(places)]
        if len(chosen) < len(places):
            raise BadInput(f"too few real digits {label}: measure fewer samples")
        images[places] = chosen
    return images


class Measures:
    """All measures against one data set: measures(images, labels) -> {name: number}."""

    def __init__(self, data=mnist.FILE):
        self.x, self.y, self.test, self.y_test = mnist.load(data)
        self.judge = load_judge(self.x, self.y)
        self.hidden = self.judge[:-1]
        self.test_features = outputs(self.hidden, self.test)
        self.test_histogram = histogram(self.test)
        self.test_diversity = mnist.diversity(self.test, self.y_test)

    def __call__(self, images, labels, apart=True, shape=False):
        """images (N, 1, 32, 32) uint8, labels (N,). apart and shape are slow: each trains networks.

        Raises BadInput.
        """
        features = outputs(self.hidden, images)
        reads = self.judge[-1](features).argmax(1)
        greys = histogram(images)
        out = {
            "read": 100 * (reads == labels).double().mean().item(),
            "Frechet": frechet(features, self.test_features),
            "grey": 50 * (greys - self.test_histogram).abs().sum().item(),
            "black": 100 * greys[0].item(),
            "border": border_grey(images),
            "diversity": mnist.diversity(images, labels) / self.test_diversity,
        }
        if apart or shape:
            # other digits than those of real_digits, which takes the first of each label
            most = labels.bincount().max().item()
            real = real_like(labels, self.x, self.y, skip=most)
        if apart:
            out["apart"] = told_apart(images, real)
        if shape:
            out["shape"] = told_apart(shapes(images), shapes(real))
        return out

    def real_digits(self, labels):
        """As many training digits of these labels: samples that are perfect."""
        return real_like(labels, self.x, self.y)


def read_samples(file):
    """images (N, 1, 32, 32) uint8 and labels (N,) of a file of `sample.py --out FILE.npz`."""
    with np.load(file, allow_pickle=False) as npz:
        return torch.from_numpy(npz["images"])[:, None], torch.from_numpy(npz["labels"])


# decimals of each measure, and of what quality.py adds
DECIMALS = {"read": 1, "Frechet": 3, "grey": 2, "black": 1, "border": 2, "diversity": 2, "apart": 1,
            "shape": 1, "w=3 read": 1, "loss": 4, "seconds": 0}


def show(name, row):
    """Print a row of measures."""
    cells = "".join(f"{value:10.{DECIMALS[key]}f}" for key, value in row.items())
    print(f"{name[-30:]:30s}{cells}", flush=True)


def show_names(row):
    """Print the names of the measures, above the rows."""
    print(" " * 30 + "".join(f"{key:>10s}" for key in row), flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", metavar="FILE.npz")
    options = p.parse_args()
    measures = Measures()
    for k, file in enumerate(options.files):
        images, labels = read_samples(file)
        if k == 0:
            row = measures(measures.real_digits(labels), labels, shape=True)
            show_names(row)
            show(f"{len(labels)} real digits", row)
        show(file, measures(images, labels, shape=True))


if __name__ == "__main__":
    sys.exit(run(main))
