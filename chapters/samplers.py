"""Samplers beyond the notes: Heun's method, and two that keep the diversity which guidance costs.

As in cfg_min.py: field(x, t) -> u has its y and w filled in; x (B, ...) goes from t0 to t = 1.
"""
import math

import torch

from cfg_min import euler, times, value_at
from paths import require_same_shape


def heun(field, x, steps, t0=0.0):
    """Euler's step, redone with the mean of u at both ends: order 2, 2 * steps - 1 calls.

    The last step stays Euler's, as u may be infinite at t = 1; Karras et al. 2022.
    """
    for t, s in times(steps, t0):
        u = field(x, t)
        require_same_shape(u, x)
        if s < 1:
            u_end = field(x + (s - t) * u, s)
            u = (u + u_end) / 2
        x = x + (s - t) * u
    return x


def langevin(field, x, t, path, steps, randn=torch.randn_like):
    """x <- x + h score + sqrt(2 h) xi, repeated steps times, at a fixed t < 1.

    With many small steps x would follow the distribution that has this score. h = beta_t^2 / 10, so
    h score = (alpha_t E[z|x] - x) / 10: no step is large, though near t = 1 the score itself is.
    """
    h = value_at(path.beta, t)**2 / 10
    for _ in range(steps):
        score = path.u_to_score(field(x, t), x, t)
        x = x + h * score + math.sqrt(2 * h) * randn(x)
    return x


def predictor_corrector(field, x, steps, path, corrector, corrections=1, t0=0.0,
                        randn=torch.randn_like):
    """Euler's step on field, then Langevin steps with the score of corrector at the new time.

    Both are fields (x, t) -> u. For guidance, field is u_t(x|y) and corrector the guided field. At
    each t the guided field has the score of the tilted distribution p_t(x|y)^w p_t(x)^(1-w), but
    its flow does not carry the one at t into the one at s (docs/guidance.md). Langevin steps at s
    bring x nearer to it, the nearer the more of them. For w >= 1: else field starts too far off.
    Bradley & Nakkiran 2024, arXiv 2408.09000; Song et al. 2021, arXiv 2011.13456.
    """
    for t, s in times(steps, t0):
        u = field(x, t)
        require_same_shape(u, x)
        x = x + (s - t) * u
        if s < 1:                               # at t = 1 the score is infinite
            x = langevin(corrector, x, s, path, corrections, randn)
    return x


def gibbs(field, x, steps, path, corrector, middle=0.5, rounds=1, t0=0.0, randn=torch.randn_like):
    """Draw with field; then, in each round, noise the draw to t = middle and denoise it again.

    Both are fields (x, t) -> u. For guidance, field is u_t(x|y) and corrector, which denoises, the
    guided field. So guidance acts only after t = middle, on draws from p_t(x|y), and never aims too
    far while x is nearly noise (docs/guidance.md). Three fifths of the steps draw, and each round
    takes two fifths, so more rounds than one take more than steps.
    Moufad et al. 2025, arXiv 2505.21101; like Gibbs sampling, it alternates noise and denoising.
    """
    again = round(0.4 * steps)
    x = euler(field, x, steps - again, t0)
    for _ in range(rounds):
        eps = randn(x)
        x = path.sample(x, eps, middle)
        x = euler(corrector, x, again, middle)
    return x
