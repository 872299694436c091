"""What a perfect network would return: exact fields of a labelled mixture of Gaussians.

`python -m chapters.oracle` guides with these fields and prints what w does, without training.

The data are K Gaussians, component k with probability weight_k and label label_k:

    z ~ N(mu_k, std_k^2 I).

On a path, x = alpha z + beta eps is Gaussian for each k too, of mean alpha mu_k and variance

    var_k = alpha^2 std_k^2 + beta^2.

Given k and x, the score and the means of z and eps are linear in offset_k = x - alpha mu_k. Without
k they are averaged over the components, with the weights p_t(k|x, y) of Bayes' rule.

Shapes: x (B, D); t (B,) or a number; y (B,) int64, NULL for "any label"; paths as in paths.py.
"""
import math
import sys
from functools import partial

import torch
import torch.nn.functional as F

from cfg_min import (NULL, euler, euler_maruyama, euler_maruyama_step, guide, guided_field, times,
                     value_at)
from chapters.samplers import gibbs, predictor_corrector
from paths import CondOT, per_sample
from support.command import Parser, execute


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
        t = per_sample(t, x)                                    # (B, 1)
        offset = x - path.alpha(t) * self.mu.to(x)[:, None]
        var = path.alpha(t)**2 * self.std.to(x)[:, None, None]**2 + path.beta(t)**2
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
        """p_t(k|x, y), (K, B, 1): the weights of means over components. log_p is not its log."""
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
        std = self.std.to(x)[:, None, None]                     # (K, 1, 1)
        t = per_sample(t, x)
        data = self.mu.to(x)[:, None] + path.alpha(t) * std**2 / var * offset
        eps = path.beta(t) / var * offset
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

    def log_posterior(self, path, x, t):
        """log p_t(y|x), (B, 10): the logits of the perfect noisy classifier."""
        return self.posterior(path, x, t).clamp(min=torch.finfo(x.dtype).tiny).log()

    def draw(self, n, y=NULL):
        """n points of class y, or of the whole mixture, (n, D)."""
        weight = self.log_weight[:, y].exp()
        k = torch.multinomial(weight, n, replacement=True)
        return self.mu[k] + self.std[k, None] * torch.randn(n, self.mu.shape[1])


# ---------------------------------------------------------------- what w does, in numbers

TWO = Mixture(mu=[[-1.0], [1.0]], std=[0.5, 0.5], weight=[0.5, 0.5], label=[0, 1])
TRIANGLE = Mixture(mu=[[0.0, 1.0], [-0.87, -0.5], [0.87, -0.5]], std=[0.5] * 3, weight=[1 / 3] * 3,
                   label=[0, 1, 2])
PATH = CondOT()


def tilted(mixture, y, w, grid, t=1.0):
    """The tilted distribution p_t(.|y)^w p_t^(1-w) on the points of a grid (N, D), of sum 1: (N,).
    """
    given = torch.full((len(grid),), y)
    anything = torch.full((len(grid),), NULL)
    log_p_y = mixture.log_p(PATH, grid.double(), t, given)
    log_p = mixture.log_p(PATH, grid.double(), t, anything)
    log_tilted = guide(log_p_y, log_p, w)       # w log p_t(.|y) + (1 - w) log p_t
    return log_tilted.softmax(dim=0)            # exp, divided by its sum


def tilted_moments(mixture, y, w, t=1.0):
    """Mean and standard deviation of the tilted distribution of a mixture on the line.

    At t = 1 it tilts the data. At an earlier t it tilts the noised data: the mean over alpha_t is
    then what the guided field aims at. The tilt can move the mean outwards, so the grid reaches
    1 + |w| times as far as the means of the components and 8 of their standard deviations.
    """
    offset, var = mixture.offset_and_var(PATH, torch.zeros(1, 1).double(), t)
    means, stds = -offset.flatten(), var.sqrt().flatten()   # (K,) each, at t
    low, high = means.min().item(), means.max().item()
    beyond = (1 + abs(w)) * (high - low + 8 * stds.max().item())
    step = stds.min().item() / (4 + 4 * abs(w)**0.5)
    grid = torch.arange(low - beyond, high + beyond, step, dtype=torch.float64)
    p = tilted(mixture, y, w, grid[:, None], t)
    if p[0] + p[-1] > 1e-9:
        raise ValueError(f"p(.|y)^w p^(1-w) has no finite integral at w = {w}")
    mean = (p * grid).sum()
    var = (p * (grid - mean)**2).sum()
    return mean.item(), var.sqrt().item()


def resample(x, log_weight):
    """n draws, with repetition, of the n samples x, in proportion to their weights (n,).

    One uniform number serves all, which adds little noise (systematic resampling).
    """
    ends = log_weight.softmax(dim=0).cumsum(dim=0)
    places = (torch.arange(len(x)) + torch.rand(1)) / len(x)
    return x[torch.searchsorted(ends, places.to(ends)).clamp(max=len(x) - 1)]


def wide_noise(t, path=PATH):
    """sigma_t = sqrt(8 beta_t), for the SDE: four times the variance of the default."""
    return math.sqrt(8 * value_at(path.beta, t))


def repaired_sde(net, x, y, w, steps, path=PATH, sigma=wide_noise):
    """Guided samples that follow the tilted distribution: sequential Monte Carlo on the guided SDE.

    The guided SDE alone does not give the tilted distribution. So each sample gets a weight, whose
    logarithm grows by

        w (w - 1) (u_t(x|y) - u_t(x)) . (s_t(x|y) - s_t(x)) dt
            = b_t w (w - 1) |s_t(x|y) - s_t(x)|^2 dt.

    Where the effective sample size falls below half, and at the end, samples are resampled by their
    weights. Samples are those of one label.
    Skreta et al. 2025, arXiv 2503.02819.
    """
    log_weight = torch.zeros(len(x)).to(x)
    for t, s in times(steps):
        cond = guided_field(net, x, t, y, 1)
        uncond = guided_field(net, x, t, y, 0)
        scores = path.u_to_score(cond, x, t) - path.u_to_score(uncond, x, t)
        rate = w * (w - 1) * ((cond - uncond) * scores).flatten(1).sum(dim=1)
        log_weight = log_weight + (s - t) * rate
        u = guide(cond, uncond, w)
        x = euler_maruyama_step(lambda x, t: u, x, t, s, path, sigma)
        weight = log_weight.softmax(dim=0)
        effective = 1 / (weight**2).sum()
        if effective < len(x) / 2 or s == 1:
            x = resample(x, log_weight)
            log_weight = torch.zeros_like(log_weight)
    return x


def guided_after(net, x, t, y, w, start):
    """The guided field from t = start on, and w = 1 before."""
    return guided_field(net, x, t, y, w if t > start - 1e-9 else 1.0)


def guided_samples(mixture, label, w, n, steps, dimensions):
    """{name: samples (n, D)} of one label, by eight ways to guide."""
    net = partial(mixture.u, PATH)              # the perfect network, net(x, t, y) -> u
    y = torch.full((n,), label)
    conditional = partial(net, y=y)             # u_t(x|y)
    guided = partial(guided_field, net, y=y, w=w)
    late = partial(guided_after, net, y=y, w=w, start=0.7)
    noise = torch.randn(8, n, dimensions)
    return {
        "guided ODE": euler(guided, noise[0], steps),
        "guided SDE, sigma^2 = 2 beta": euler_maruyama(guided, noise[1], steps, PATH),
        "guided SDE, sigma^2 = 8 beta": euler_maruyama(guided, noise[2], steps, PATH, wide_noise),
        "repaired SDE": repaired_sde(net, noise[3], y, w, steps),
        "predictor-corrector, 25 steps, 1 correction": predictor_corrector(
            conditional, noise[4], 25, PATH, guided),
        "predictor-corrector, 4 corrections": predictor_corrector(
            conditional, noise[5], steps, PATH, guided, corrections=4),
        "Gibbs-like, noised to t = 0.7": gibbs(
            conditional, noise[6], steps, PATH, guided, middle=0.7),
        "guidance for t > 0.7 alone": euler(late, noise[7], steps),
    }


def print_table(scales=(1, 1.5, 3, 8), n=4000, steps=400):
    """Mean and standard deviation of guided samples of TWO, and of the tilted distribution."""
    torch.manual_seed(0)
    print(f"Two Gaussians at -1 and +1, std 0.5. {n} samples of y = +1, {steps} steps unless told: "
          "mean and standard deviation")
    columns = [guided_samples(TWO, 1, w, n, steps, dimensions=1) for w in scales]
    print(" " * 46 + "".join(f"w = {w:<10g}" for w in scales))
    for name in columns[0]:
        cells = [f"{column[name].mean():.2f} {column[name].std():.2f}     " for column in columns]
        print(f"{name:46s}" + "".join(cells))
    moments = [tilted_moments(TWO, 1, w) for w in scales]
    cells = [f"{mean:.2f} {std:.2f}     " for mean, std in moments]
    print(f"{'tilted distribution, p(.|y)^w p^(1-w)':46s}" + "".join(cells))


def print_aim(w=3, ts=(0.01, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0), n=400, steps=400):
    """Where the guided field of TWO aims at each t, and where the samples of Algorithm 8 are."""
    print(f"\nw = {w}. Means over alpha_t")
    print(f"{'t':46s}" + "".join(f"{t:<8g}" for t in ts))
    aims = [tilted_moments(TWO, 1, w, t)[0] / t for t in ts]
    print(f"{'aim of the guided field':46s}" + "".join(f"{aim:<8.2f}" for aim in aims))
    net = partial(TWO.u, PATH)
    y = torch.ones(n, dtype=torch.int64)
    noise = torch.special.ndtri((torch.arange(n).double() + 0.5) / n)[:, None]      # quantiles
    means = follow_mean(partial(guided_field, net, y=y, w=w), noise, steps)
    print(f"{'mean of guided samples / alpha_t':46s}"
          + "".join(f"{means[round(t * steps)]:<8.2f}" for t in ts))
    print(f"{'needed for the tilted distribution':46s}" + f"{aims[-1]:<8.2f}" * len(ts))


def follow_mean(field, x, steps):
    """The mean of x over alpha_t at t = 0, 1/steps, ..., 1 of Euler's method; at t = 0 it is nan.
    """
    means = [math.nan]
    for t, s in times(steps):
        x = x + (s - t) * field(x, t)
        means.append((x.mean() / value_at(PATH.alpha, s)).item())
    return means


def main(argv=None):
    Parser(prog="python -m chapters.oracle",
           description="What guidance with scale w does, exactly.").parse_args(argv)
    print_table()
    print_aim()


if __name__ == "__main__":
    sys.exit(execute(main))
