"""Exact fields of real digits: what guidance costs, counted without a network.

`python -m chapters.exact` draws digits with these fields in several ways, and counts what is left.

A network learns E[z|x], the mean of all data that could have become x. Where the data are N images
z_i, each with a label, that needs no network. Given i, x = alpha z_i + beta eps is Gaussian, so by
Bayes' rule p_t(i|x, y) is a softmax over the images, and the mean is a sum:

    p_t(i|x, y) = softmax_i [ (alpha x.z_i - alpha^2 |z_i|^2 / 2) / beta^2 + log p(y|i) ]
    E[z|x, y] = sum_i p_t(i|x, y) z_i

Without a label p(y|i) is 1. Then u follows from z (paths.py). Two things may be smoother:

- Each image may be the middle of a Gaussian of standard deviation s, the width, so that the data
  have a density. Then beta^2 above becomes var = alpha^2 s^2 + beta^2, and z given i moves with x:
  E[z|x, i] = z_i + (alpha s^2 / var) (x - alpha z_i).
- Labels may be unsure: p(y|i) between 0 and 1.

Where labels are sure, p(y|z) is 1 for the images of class y and 0 for others. So the tilted
distribution p(z|y) p(y|z)^(w-1) is p(z|y) itself, for every w. Guidance should change nothing, and
whatever it changes is the price of the way to sample. It can be counted: with width 0 each sample
is one of the images, and if two samples of a class are the same one with probability q, then the
class has effectively 1/q images. Chidambaram et al. 2024, arXiv 2409.13074, prove the like for
mixtures: guided samples miss the tilted distribution and gather at the edge of the class.
"""
import math
import sys
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from cfg_min import NULL, euler, euler_maruyama
from chapters.samplers import gibbs, predictor_corrector
from chapters.ways import interval_field
from paths import CondOT, per_sample
from support import mnist
from support.command import BadInput, Parser, Progress, execute, file_name, number

PATH = CondOT()


class ExactNet(nn.Module):
    """net(x, t, y) -> u_t(x|y), for t < 1: what a perfect network of these images returns.

    images (N, ...); labels (N,) of 0..9, or p(y|i) as (N, 10); width: s >= 0.
    x (B, ...), each like an image; t (B,) or a number; y (B,) int64, NULL for any label.
    """

    def __init__(self, images, labels, path=PATH, width=0.0):
        super().__init__()
        if labels.ndim == 1:
            labels = F.one_hot(labels, NULL)
        self.path = path
        self.width = width
        self.register_buffer("images", images.flatten(1))                       # (N, D)
        self.register_buffer("p", F.pad(labels.to(images), (0, 1), value=1))    # p(y|i), (N, 11)

    def alpha_and_var(self, x, t):
        """alpha and var, (B, 1), for x (B, D)."""
        t = per_sample(t, x)
        alpha, beta = self.path.alpha(t), self.path.beta(t)
        return alpha, alpha**2 * self.width**2 + beta**2

    def weights(self, x, t, y):
        """p_t(i|x, y), (B, N), for x (B, D)."""
        alpha, var = self.alpha_and_var(x, t)
        lengths = self.images.square().sum(dim=1)               # |z_i|^2
        log_p = (alpha * (x @ self.images.T) - alpha**2 * lengths / 2) / var
        return (log_p + self.p.log().T[y]).softmax(dim=1)

    def posterior(self, x, t):
        """p_t(y|x) of the labels 0..9, (B, 10)."""
        anything = torch.full((len(x),), NULL)
        return self.weights(x.flatten(1), t, anything) @ self.p[:, :NULL]

    def forward(self, x, t, y):
        flat = x.flatten(1)                                     # (B, D)
        alpha, var = self.alpha_and_var(flat, t)
        z = self.weights(flat, t, y) @ self.images              # the mean of z_i
        z = z + alpha * self.width**2 / var * (flat - alpha * z)
        return self.path.data_to_u(z.view_as(x), x, t)


# ---------------------------------------------------------------- counting

def find_nearest(images, samples):
    """The place of the image nearest to each sample, (n,)."""
    parts = samples.flatten(1).split(500)
    return torch.cat([torch.cdist(part, images.flatten(1)).argmin(dim=1) for part in parts])


def effective_number(images, samples, labels):
    """1 / (the probability that two samples of a label are the same image), and its standard error.

    images (N, ...), samples (n, ...), labels (n,) of the samples.
    """
    return count_images(find_nearest(images, samples), labels)


def count_images(found, labels):
    """The same, from the image that each sample is, found (n,).

    Pairs of all labels count together, so a label of which few images are left weighs most. The
    error is the jackknife's: it asks how far the number moves when one sample is left out.
    """
    _, pair, times = torch.stack([found, labels]).unique(dim=1, return_inverse=True,
                                                         return_counts=True)
    same = (times[pair] - 1).double()               # others that are the same image, for each
    others = (labels.bincount()[labels] - 1).double()           # others of its label
    without = (others.sum() - 2 * others) / (same.sum() - 2 * same)         # each one left out
    error = (without.var(correction=0) * (len(labels) - 1)).sqrt()
    return (others.sum() / same.sum()).item(), error.item()


# ---------------------------------------------------------------- ways to sample

def ways_of(net, x, y, w, steps=25):
    """{name: how to draw samples (n, ...) of the labels y from the noise x, a function}."""
    def field(w, **interval):
        return partial(interval_field, net, y=y, w=w, **interval)

    def wide(t):
        return math.sqrt(8 * (1 - t))

    mends = dict(path=PATH, corrector=field(w))
    return {
        "no guidance, w = 1": partial(euler, field(1), x, steps),
        "Algorithm 8, w = 1.5": partial(euler, field(1.5), x, steps),
        f"Algorithm 8, w = {w:g}": partial(euler, field(w), x, steps),
        "Algorithm 8, w = 8": partial(euler, field(8), x, steps),
        "guided SDE, sigma^2 = 2 beta": partial(euler_maruyama, field(w), x, steps, path=PATH),
        "guided SDE, sigma^2 = 8 beta, twice the steps": partial(
            euler_maruyama, field(w), x, 2 * steps, path=PATH, sigma=wide),
        "predictor-corrector": partial(predictor_corrector, field(1), x, steps, **mends),
        "Gibbs-like, noised to t = .5": partial(gibbs, field(1), x, steps, middle=0.5, **mends),
        "interval [.26, .78]": partial(euler, field(w, low=0.26, high=0.78), x, steps),
    }


def starts_of(net, x, y, w, steps=25):
    """The same for guidance from t on: {t: how to draw}, t = 0, .04, ... .36."""
    starts = [k / 25 for k in range(10)]
    fields = [partial(interval_field, net, y=y, w=w, low=t) for t in starts]
    return {t: partial(euler, field, x, steps) for t, field in zip(starts, fields)}


# ---------------------------------------------------------------- tables

def choose_digits(images, labels, n):
    """The first n images of each label, (N, D) in [-1, 1], and their labels. Raises BadInput."""
    places = [(labels == y).nonzero()[:n, 0] for y in labels.unique()]
    fewest = min(len(part) for part in places)
    if fewest < n:
        raise BadInput(f"{n} digits of each label: of one these data have {fewest}")
    places = torch.cat(places)
    return mnist.to_unit(images[places]).flatten(1), labels[places]


def print_counts(ways, images, labels, y):
    """A row for each way to draw samples of the labels y; their effective numbers and errors."""
    print(f"{'images left of a label':48s}{'all':>7s}{'error':>7s}{'from':>7s}{'to':>7s}"
          f"{'right label':>13s}")
    counts = []
    progress = Progress(len(ways), unit="row")
    for name, draw in ways.items():
        found = find_nearest(images, draw())
        counts.append(count_images(found, y))
        each = [count_images(found[y == label], y[y == label])[0] for label in y.unique()]
        right = 100 * (labels[found] == y).double().mean()
        row = "".join(f"{value:7.0f}" for value in (*counts[-1], min(each), max(each)))
        progress.wipe()
        print(f"{name!s:48s}{row}{right:11.1f} %", flush=True)
        if progress.is_due():
            progress.show(len(counts))
    progress.wipe()
    return counts


def print_first_free(ts, counts, unguided, setting):
    """The first t from which guidance costs nothing that these samples show, and the setting."""
    number, error = unguided
    free = [t for t, count in zip(ts, counts) if count[0] > number - 2 * error]
    print(f"guidance costs nothing from t = {min(free, default=1):.2f} on ({setting}): the first "
          f"count within two errors, {200 * error / number:.0f} %, of the unguided one")


def print_decided(net, z, y):
    """The mean of p_t(y|x) over images z (n, D) of the labels y, noised to t."""
    print("t and the mean of p_t(y|x) on held-out digits:", end="")
    for k in range(1, 13):
        x = PATH.sample(z, torch.randn_like(z), k / 25)
        p = net.posterior(x, k / 25)[torch.arange(len(y)), y]
        print(f"  {k / 25:.2f} {p.mean():.3f}", end="", flush=True)
    print()


@torch.no_grad()
def main(argv=None):
    p = Parser(prog="python -m chapters.exact",
               description="What guidance costs on exact fields of real digits, counted.")
    p.add_argument("--data", type=file_name, default=mnist.FILE, metavar="FILE|DIR",
                   help="the digits (MNIST)")
    p.add_argument("--w", type=number(float, -1e3, 1e3), default=3.0, help="guidance scale (3)")
    many = number(int, 2, 1e6)
    p.add_argument("--digits", type=many, default=200, help="training digits of a label (200)")
    p.add_argument("--samples", type=many, default=200, help="samples of a label (200)")
    options = p.parse_args(argv)
    torch.manual_seed(0)
    torch.set_flush_denormal(True)              # weights below 1e-38 are slow, and 0 here
    x_train, y_train, x_test, y_test = mnist.load(options.data)
    images, labels = choose_digits(x_train, y_train, options.digits)
    seen = images.std(dim=0) > 0                # other pixels are the same in all digits
    net = ExactNet(images[:, seen], labels)
    y = labels.unique().repeat_interleave(options.samples)
    x = torch.randn(len(y), net.images.shape[1])
    unguided, *_ = print_counts(ways_of(net, x, y, options.w), net.images, labels, y)
    setting = f"w = {options.w:g}, 25 steps, {options.digits} digits a label"
    print(f"guided from t on: {setting}")
    starts = starts_of(net, x, y, options.w)
    counts = print_counts(starts, net.images, labels, y)
    print_first_free(starts, counts, unguided, setting)
    print_decided(net, mnist.to_unit(x_test[:1000]).flatten(1)[:, seen], y_test[:1000])


if __name__ == "__main__":
    sys.exit(execute(main))
