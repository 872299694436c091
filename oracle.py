"""What a perfect network would return: exact fields of a labelled mixture of Gaussians.

`python oracle.py` guides with these fields and prints what w does; no network, no training.
`python oracle.py --figures` draws it as well: figures/oracle_line.png and figures/oracle_plane.png.

The data are K Gaussians, component k with probability weight_k and label label_k:

    z ~ N(mu_k, std_k^2 I).

On a path, x = alpha z + beta eps is Gaussian for each k too, of mean alpha mu_k and variance

    var_k = alpha^2 std_k^2 + beta^2.

Given k and x, the score and the means of z and eps are linear in offset_k = x - alpha mu_k. Without
k they are averaged over the components, with the weights p_t(k|x, y) of Bayes' rule.

Shapes: x (B, D); t (B,) or a number; y (B,) int64, NULL for "any label"; paths as in paths.py.
"""
import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import picture
from cfg_min import NULL, euler, euler_maruyama, guide, guided_field, predictor_corrector
from paths import CondOT


class Mixture:
    """sum_k weight_k N(z; mu_k, std_k^2 I), component k of class label_k.

    mu (K, D), std (K,) > 0, weight (K,) with sum 1, label (K,) in 0..9. Computes in x's precision.
    """

    def __init__(self, mu, std, weight, label):
        self.mu = torch.as_tensor(mu, dtype=torch.float64)
        self.std = torch.as_tensor(std, dtype=torch.float64)
        self.weight = torch.as_tensor(weight, dtype=torch.float64)
        self.label = torch.as_tensor(label)
        y = torch.arange(NULL + 1)
        outside = (y != self.label[:, None]) & (y != NULL)
        weight = self.weight[:, None].masked_fill(outside, 0)           # (K, 11)
        # log p(k|y), and for NULL log p(k); -inf where k is of another class, nan in columns of
        # labels that no k has
        self.log_weight = (weight / weight.sum(dim=0)).log()            # (K, 11)

    def offset_and_var(self, path, x, t):
        """x - alpha mu_k (K, B, D), and var_k (K, B, 1)."""
        alpha, beta, _, _ = path.at(t, x)                       # (B, 1)
        offset = x - alpha * self.mu.to(x)[:, None]
        var = alpha**2 * self.std.to(x)[:, None, None]**2 + beta**2
        return offset, var

    def log_joint(self, offset, var, y):
        """log p_t(x, k|y) = log p(k|y) + log p_t(x|k), (K, B); -inf where k is of another class."""
        log_p_k = -(offset**2 / var + (2 * math.pi * var).log()) / 2    # (K, B, D)
        return self.log_weight.to(offset)[:, y] + log_p_k.sum(dim=2)

    def log_p(self, path, x, t, y):
        """log p_t(x|y), (B,)."""
        offset, var = self.offset_and_var(path, x, t)
        return self.log_joint(offset, var, y).logsumexp(dim=0)

    def p(self, offset, var, y):
        """p_t(k|x, y), (K, B, 1): the weights of all means over the components; log_p is of x."""
        return self.log_joint(offset, var, y).softmax(dim=0)[:, :, None]

    def score(self, path, x, t, y):
        """grad log p_t(x|y): the mean of the components' scores, -offset_k / var_k."""
        offset, var = self.offset_and_var(path, x, t)
        scores = -offset / var                                  # (K, B, D)
        return (self.p(offset, var, y) * scores).sum(dim=0)

    def data_and_eps(self, path, x, t, y):
        """E[z|x, y] and E[eps|x, y], each (B, D).

        Given k: mu_k + (alpha std_k^2 / var_k) offset_k, and (beta / var_k) offset_k.
        """
        offset, var = self.offset_and_var(path, x, t)
        alpha, beta, _, _ = path.at(t, x)                       # (B, 1)
        std = self.std.to(x)[:, None, None]                     # (K, 1, 1)
        data = self.mu.to(x)[:, None] + alpha * std**2 / var * offset
        eps = beta / var * offset
        p = self.p(offset, var, y)
        return (p * data).sum(dim=0), (p * eps).sum(dim=0)

    def u(self, path, x, t, y):
        """u_t(x|y) = alpha' E[z|x, y] + beta' E[eps|x, y]: the mean of all u_t(x|z)."""
        data, eps = self.data_and_eps(path, x, t, y)
        return path.target(data, eps, t)

    def posterior(self, path, x, t):
        """p_t(y|x) of the labels 0..9, (B, 10)."""
        anything = torch.full((len(x),), NULL)
        offset, var = self.offset_and_var(path, x, t)
        p = self.p(offset, var, anything)[:, :, 0]              # p_t(k|x), (K, B)
        of_class = F.one_hot(self.label, 10).to(x)              # (K, 10)
        return p.T @ of_class

    def net(self, path):
        """The perfect network of this path, net(x, t, y) -> u."""
        return lambda x, t, y: self.u(path, x, t, y)

    def classifier(self, path):
        """The perfect noisy classifier, (x, t) -> log p_t(y|x), (B, 10)."""
        return lambda x, t: self.posterior(path, x, t).clamp(min=torch.finfo(x.dtype).tiny).log()

    def draw(self, n, y=NULL):
        """n points of class y, or of the whole mixture, (n, D)."""
        weight = self.log_weight[:, y].exp()
        k = torch.multinomial(weight, n, replacement=True)
        return self.mu[k] + self.std[k, None] * torch.randn(n, self.mu.shape[1])


# ---------------------------------------------------------------- what w does, in numbers

TWO = Mixture(mu=[[-1.0], [1.0]], std=[0.5, 0.5], weight=[0.5, 0.5], label=[0, 1])
TRIANGLE = Mixture(mu=[[0.0, 1.0], [-0.87, -0.5], [0.87, -0.5]], std=[0.5] * 3, weight=[1 / 3] * 3,
                   label=[0, 1, 2])


def moments(x):
    """Mean and standard deviation of samples (n, 1)."""
    return x.mean().item(), x.std().item()


def tilted(mixture, y, w, grid):
    """The law p(.|y)^w p^(1-w) on the points of a grid (N, D), of sum 1: (N,) float64."""
    given = torch.full((len(grid),), y)
    anything = torch.full((len(grid),), NULL)
    # at t = 1 p_t is the law of the data
    log_p_y = mixture.log_p(CondOT(), grid.double(), 1.0, given)
    log_p = mixture.log_p(CondOT(), grid.double(), 1.0, anything)
    log_tilted = guide(log_p_y, log_p, w)       # w log p(.|y) + (1 - w) log p
    return log_tilted.softmax(dim=0)            # exp, divided by its sum


def tilted_moments(mixture, y, w):
    """Mean and standard deviation of the tilted law on the line."""
    grid = torch.linspace(-4, 8, 4001).double()
    p = tilted(mixture, y, w, grid[:, None])
    mean = (p * grid).sum()
    var = (p * (grid - mean)**2).sum()
    return mean.item(), var.sqrt().item()


def best_mixture_moments(mean):
    """Mean and std of the mixture of p(.|y), of mean 1, and p, of mean 0, that comes nearest to the
    given mean."""
    share = min(max(mean, 0), 1)                # of p(.|y), so it is the mixture's mean
    return share, math.sqrt(1.25 - share**2)    # both laws have E[x^2] = 1 + 0.5^2


def table(scales=(0, 1, 2, 3, 5, 8), n=4000, steps=100):
    """What w does, exactly: rows of w and (mean, std) of guided samples, by ODE, SDE and predictor-
    corrector, and of the laws that they are said to follow: the tilted law, and the mixture of
    002_49842480371d0be4.txt."""
    torch.manual_seed(0)
    path = CondOT()
    net = TWO.net(path)
    y = torch.ones(n, dtype=torch.int64)
    given_y = partial(net, y=y)                                         # u_t(x|y)
    rows = []
    for w in scales:
        guided = partial(guided_field, net, y=y, w=w)
        ode = euler(guided, torch.randn(n, 1), steps)
        sde = euler_maruyama(guided, torch.randn(n, 1), steps, path)
        pc = predictor_corrector(given_y, guided, torch.randn(n, 1), steps, path, corrections=4)
        mean, _ = moments(ode)
        rows.append((w, moments(ode), moments(sde), moments(pc),
                     tilted_moments(TWO, 1, w), best_mixture_moments(mean)))
    return rows


def print_table():
    print("two Gaussians at -1 and +1, std 0.5; y = +1; mean and standard deviation of\n"
          "   w    guided ODE    guided SDE    predictor-corrector   p(.|y)^w p^(1-w)   "
          "best mixture")
    for w, ode, sde, pc, law, mixture in table():
        print(f"{w:4d}  {ode[0]:6.2f} {ode[1]:5.2f}  {sde[0]:6.2f} {sde[1]:5.2f}   "
              f"{pc[0]:9.2f} {pc[1]:5.2f}     {law[0]:10.2f} {law[1]:5.2f}     "
              f"{mixture[0]:7.2f} {mixture[1]:5.2f}")


# ---------------------------------------------------------------- what w does, in pictures

BINS = 128          # of a histogram along an axis, from -REACH to REACH
REACH = 3.0


def grey(density):
    """A density (H, W) as uint8, its largest value white, two pixels a bin."""
    image = (255 * density / density.max()).byte().numpy()
    return image.repeat(2, axis=0).repeat(2, axis=1)


def over_time(w, n=20000):
    """p_t of the guided samples of TWO, y = +1: a column for each t, then, after a gap, the tilted
    law; the most of each column is white.

    The noise stands at the n quantiles of N(0, 1), so that the histograms have no grain.
    """
    columns = []

    def watch(t, x):
        column = torch.histc(x, BINS, -REACH, REACH)
        columns.append(column / column.max())
    guided = partial(guided_field, TWO.net(CondOT()), y=torch.ones(n, dtype=torch.int64), w=w)
    share = (torch.arange(n) + 0.5) / n
    noise = torch.special.ndtri(share)[:, None]                 # inverse of the normal cdf
    x = euler(guided, noise, BINS, watch=watch)                 # as many steps as bins: a square
    watch(1.0, x)
    line = torch.linspace(-REACH, REACH, BINS)[:, None]
    law = tilted(TWO, 1, w, line).float()
    columns += [0 * law] * 2                    # the gap
    columns += [law / law.max()] * 12
    return grey(torch.stack(columns, dim=1).flip(0))            # up is up


def plane():
    """A point in each cell of the plane, from left to right, then down, (BINS^2, 2)."""
    line = torch.linspace(-REACH, REACH, BINS)
    up, right = torch.meshgrid(line.flip(0), line, indexing="ij")
    return torch.stack([right.flatten(), up.flatten()], dim=1)


def histogram(x):
    """The share of the samples (n, 2) in each cell of the plane, (BINS, BINS)."""
    counts, _ = torch.histogramdd(x.double(), BINS, range=[-REACH, REACH] * 2)
    return counts.T.flip(0) / len(x)            # rows are the second axis, and up is up


def in_plane(w=3, n=4000, steps=100):
    """Four laws, of y the top class of TRIANGLE, (BINS, BINS): title -> share of each cell."""
    torch.manual_seed(0)
    path = CondOT()
    net = TRIANGLE.net(path)
    y = torch.zeros(n, dtype=torch.int64)
    given_y = partial(net, y=y)
    guided = partial(guided_field, net, y=y, w=w)
    ode = euler(guided, torch.randn(n, 2), steps)
    pc = predictor_corrector(given_y, guided, torch.randn(n, 2), steps, path, corrections=4)
    return {
        "data": histogram(TRIANGLE.draw(n, y=0)),
        f"ode  w = {w}": histogram(ode),
        f"pc  w = {w}": histogram(pc),
        f"tilted  w = {w}": tilted(TRIANGLE, 0, w, plane()).view(BINS, BINS),
    }


def write_pictures(folder):
    """oracle_line.png: p_t over time, w = 1, 3, 8. oracle_plane.png: four laws, p behind them."""
    panels = [picture.framed(over_time(w), f"w = {w}") for w in (1, 3, 8)]
    (folder / "oracle_line.png").write_bytes(picture.png(np.hstack(panels)))
    behind = tilted(TRIANGLE, NULL, 1, plane()).view(BINS, BINS)        # p itself
    behind = behind / behind.max() / 3
    panels = []
    for title, law in in_plane().items():
        law = law / law.max()
        panels.append(picture.framed(grey(law.maximum(behind)), title))
    (folder / "oracle_plane.png").write_bytes(picture.png(np.hstack(panels)))


def main(figures=False):
    print_table()
    if figures:
        folder = Path(__file__).parent / "figures"
        write_pictures(folder)
        print(f"wrote {folder}/oracle_line.png and oracle_plane.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What guidance with scale w does, exactly.")
    parser.add_argument("--figures", action="store_true", help="write figures/oracle_*.png as well")
    main(parser.parse_args().figures)
