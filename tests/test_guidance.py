"""What guidance samples, beyond the derivation of test_cfg.py."""
from functools import partial

import pytest
import torch
from conftest import line
from test_cfg import (ALL_PATHS, MANY, MIX, TIMES, close, divergence, guided_quantiles, labels,
                      net_of)

from cfg_min import NULL, guide, guided_field
from chapters.oracle import TWO, Mixture, tilted


def test_guidance_below_1_gathers_samples_between_the_classes():
    """For 0 < w < 1 the factor w (w - 1) is negative: more of X_1 in |x| < .4 than tilted."""
    z = line(-6, 6, 24001)
    for w, guided, right in ((0.0, 0.114, 0.113), (0.5, 0.217, 0.138), (1.0, 0.112, 0.112)):
        x, _ = guided_quantiles(w, steps=400)
        p = tilted(TWO, 1, w, z[:, None])
        assert abs((x.abs() < 0.4).double().mean() - guided) < 0.006
        assert abs(p[z.abs() < 0.4].sum() - right) < 0.002


def test_guidance_repairs_labels_of_which_three_in_ten_are_wrong():
    """The exact field of such labels gives 70 % right at w = 1, nearly all at w = 3."""
    noisy = Mixture(mu=[[1.0], [-1.0], [-1.0], [1.0]], std=[0.3] * 4,
                    weight=[0.35, 0.15, 0.35, 0.15], label=[1, 1, 0, 0])
    right = {}
    for w in (1, 3):
        x, _ = guided_quantiles(w, mixture=noisy)
        right[w] = (x > 0).double().mean()
    assert abs(right[1] - 0.7) < 0.01
    assert right[3] > 0.9


@ALL_PATHS
@pytest.mark.parametrize("sigma", [0.3, 2.5])
def test_the_guided_sde_is_the_conditional_ode_with_langevin_steps(path, sigma, x):
    """u_w + sigma^2/2 s_w = u(x|y) + sigma^2/2 s_w', w' = w + 2 (w - 1) b_t / sigma^2.

    So its X_1 depends on sigma. At sigma^2 = 2 b_t, w' = 2 w - 1.
    """
    w = 3.0
    for t in TIMES:
        score = MIX.score(path, x, t, labels(NULL, x))
        score_y = MIX.score(path, x, t, MANY)
        _, b = path.a_b(t, x)
        other_w = w + 2 * (w - 1) * b / sigma**2
        sde = guided_field(net_of(path), x, t, MANY, w) + sigma**2 / 2 * guide(score_y, score, w)
        langevin = MIX.u(path, x, t, MANY) + sigma**2 / 2 * guide(score_y, score, other_w[:, 0])
        close(sde, langevin)


@ALL_PATHS
@pytest.mark.parametrize("w", [0.5, 3.0])
def test_what_the_guided_ode_leaves_out_is_where_the_scores_disagree(path, w, x):
    """d log(p(.|y)^w p^(1-w) / density) = b_t w (w - 1) |s(x|y) - s(x)|^2 dt along the ODE.

    The density of the samples falls by div u_w dt. The integrals are midpoint sums.
    """
    null = labels(NULL, x)
    guided = partial(guided_field, net_of(path), y=MANY, w=w)

    def log_tilted(x, t):
        return guide(MIX.log_p(path, x, t, MANY), MIX.log_p(path, x, t, null), w)

    start, h, steps = 0.1, 0.012, 50
    gained = -log_tilted(x, start)
    left_out = torch.zeros(6).double()
    for k in range(steps):
        t = start + (k + 0.5) * h
        middle = x + h / 2 * guided(x, t - h / 2)
        difference = MIX.score(path, middle, t, MANY) - MIX.score(path, middle, t, null)
        _, b = path.a_b(t, x)
        left_out += h * w * (w - 1) * (b * difference**2).sum(dim=1)
        gained += h * divergence(partial(guided, t=t), middle)
        x = x + h * guided(middle, t)
    gained += log_tilted(x, start + steps * h)
    assert left_out.abs().max() > 0.1
    close(gained, left_out, 2e-3)
