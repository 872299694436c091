"""Published rules of guidance, each in a few lines and in our letters.

A rule makes one vector field of two. All are used alike, rule(cond, uncond, x, t, w) -> u:
cond is u_t(x|y), uncond is u_t(x|null), t is one number (0 noise, 1 data), and w is the scale, in
our count. w > 1 guides. w = 1 does not, but for CFG++, whose w is a mean, and CFG-Zero*, which is 0
at first. The path is CondOT, x = t z + (1 - t) eps, so that
u = z - eps, z = x + (1 - t) u, eps = x - t u. Where a paper differs in time, scale or space, the
translation stands beside its formula. `python -m experiments.guides` measures all but autoguidance,
whose second field is that of a weaker network.

Shapes: cond, uncond, x and u are (B, ...), all alike.
"""
import torch

from cfg_min import guide
from paths import CondOT

PATH = CondOT()
TINY = 1e-12     # the least divisor: where a field is 0, a rule is 0 too, not 0/0


def dot(a, b):
    """<a, b> of each sample, (B, 1, ..., 1)."""
    return (a * b).sum(dim=tuple(range(1, a.ndim)), keepdim=True)


def std(a):
    """The standard deviation of each sample over its pixels, (B, 1, ..., 1)."""
    return a.std(dim=tuple(range(1, a.ndim)), keepdim=True)


def cfg(cond, uncond, x, t, w):
    """(1 - w) u_t(x|null) + w u_t(x|y).

    Ho & Salimans 2022, arXiv 2207.12598: in eps, which is the same; their w is ours minus 1.
    """
    return guide(cond, uncond, w)


def interval(cond, uncond, x, t, w, low=0.26, high=0.78):
    """w for t in [low, high], 1 outside; Kynkaanniemi et al. 2024, arXiv 2404.07724.

    Theirs is one of noise levels beta / alpha = (1 - t) / t. The best by FID, (0.28, 2.9] for
    EDM2-S on ImageNet at 512 pixels, is t in [0.256, 0.781), here in two decimals.
    """
    inside = low - 1e-9 < t < high + 1e-9       # t is rounded
    scale = w if inside else 1.0
    return guide(cond, uncond, scale)


def rising(cond, uncond, x, t, w):
    """w(t) = 1 + 2 (w - 1) t, of mean w; the linear one of Wang et al. 2024, arXiv 2404.13040.

    Their time falls from T to 0. Ours starts from 1, the conditional model.
    """
    scale = 1 + 2 * (w - 1) * t
    return guide(cond, uncond, scale)


def cfg_plus_plus(cond, uncond, x, t, lam, h):
    """w(t) = lam s (1 - t) / h for a step from t to s = t + h; Chung et al. 2024, arXiv 2406.08070.

    Theirs is a step of DDIM: z from the guided field of scale lam in [0, 1], but noised again with
    the unconditional eps. On CondOT, with d = cond - uncond, that is

        s (x + (1 - t) (uncond + lam d)) + (1 - s) (x - t uncond) = x + h uncond + lam s (1 - t) d,

    which is Euler's step with this w(t): lam at both ends, about lam / (4 h) in the middle.
    """
    scale = lam * (t + h) * (1 - t) / h
    return guide(cond, uncond, scale)


def lam_of(w, h):
    """lam = 6 h w / ((1 + h) (1 + 2 h)): CFG++'s w(t) then has the mean w over its 1/h steps.

    w(t) is about 6 w t (1 - t), whatever h is: a soft interval. Their largest lam, 1, is w = 8.8 in
    50 steps and 4.7 in 25: there w = 8 goes beyond what they allow.
    """
    return 6 * h * w / ((1 + h) * (1 + 2 * h))


def rescale(cond, uncond, x, t, w, phi=0.7):
    """phi u std(cond) / std(u) + (1 - phi) u, u guided: phi = 1 has the spread of cond's pixels.

    Lin et al. 2023, arXiv 2305.08891, on what their network predicts,
    v = alpha eps - beta z: -v is a velocity on their path, as u is on CondOT.
    """
    u = guide(cond, uncond, w)
    like_cond = u * std(cond) / std(u).clamp(min=TINY)
    return phi * like_cond + (1 - phi) * u


def apg(cond, uncond, x, t, w, eta=0.0, radius=2.5):
    """z + (w - 1) (d_orthogonal + eta d_parallel), as u; t < 1.

    Sadat et al. 2024, arXiv 2410.02416. z is E[z|x, y], d its difference to E[z|x],
    cut to a length of at most radius and then split along z. Their radius is 2.5 to 15, in other
    spaces; the d of digits is about 7 long at t = 0, and mostly under 2.5 after t = 0.35. Their
    reverse momentum is left out, as a field has no memory: they subtract from d half or three
    quarters of a running sum of past steps.
    """
    z = PATH.u_to_data(cond, x, t)
    d = z - PATH.u_to_data(uncond, x, t)
    d = d * (radius / dot(d, d).clamp(min=TINY).sqrt()).clamp(max=1)
    parallel = dot(d, z) / dot(z, z).clamp(min=TINY) * z
    z = z + (w - 1) * (d - parallel + eta * parallel)
    return PATH.data_to_u(z, x, t)


def cfg_zero_star(cond, uncond, x, t, w, start=0.04):
    """(1 - w) s u_t(x|null) + w u_t(x|y), s = <cond, uncond> / |uncond|^2; 0 for t < start.

    Fan et al. 2025, arXiv 2503.18886: s minimises |cond - s uncond|. As in the authors' code, x
    stands still in the first 4 % of the steps, while t goes on.
    """
    if t < start - 1e-9:                        # t is rounded
        return torch.zeros_like(cond)
    s = dot(cond, uncond) / dot(uncond, uncond).clamp(min=TINY)
    return guide(cond, s * uncond, w)


def autoguidance(cond, weak, x, t, w):
    """(1 - w) u_t(x|y) of a weaker network + w u_t(x|y), both with the label.

    Karras et al. 2024, arXiv 2406.02507. Their weak network is smaller as well; for EDM2-S it had
    seen a sixteenth of the images, and w was 2.1. They guide z, which is the same thing.
    """
    return guide(cond, weak, w)
