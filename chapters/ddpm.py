"""The DDPM view: the loss of networks that predict noise, and the samplers of DDIM and DDPM.

These are the notes of the DDPM lecture. In our letters alpha = sqrt(abar),
beta = sqrt(1 - abar) and t = 1 - t_DDPM / T; gamma is w. The lecture has two guided samplings. The
first moves the mean of each step: the argument push of ddim. The second corrects eps by
-w beta_t grad log p_t(y|x): that is classifier_guided_field of classifier.py, since
u = a_t x + b_t score and score = -eps / beta_t.
"""
import math

import torch
import torch.nn.functional as F

from cfg_min import NULL, call, draw_times, drop_labels, times, value_at


def cfg_dsm_loss(net, path, z, y, eta=0.1, t=None, null=NULL):
    """L_simple = E || eps_theta(x|y) - eps ||^2, mean over pixels, y dropped with probability eta.

    net(x, t, y) -> eps. t: (B,), or None for t ~ U[0, 1). As score = -eps / beta_t, an error of eps
    is beta_t times that of the score: this is L_DSM^CFG of Lecture 4, each t weighted by beta_t^2.
    DDPM lecture, "Training".
    """
    y = drop_labels(y, eta, null)
    t = draw_times(z, t)
    eps = torch.randn_like(z)
    x = path.sample(z, eps, t)
    return F.mse_loss(call(net, x, t, y), eps)


def ddim(field, x, steps, path, noise=0.0, push=None, t0=0.0, randn=torch.randn_like):
    """X_s = mean + sigma xi, mean = alpha_s z + sqrt(beta_s^2 - sigma^2) eps, xi ~ N(0, I).

    z and eps are those that the field implies at (x, t). noise in [0, 1] scales sigma:
    0 is DDIM: no new noise, and on CondOT exactly Euler;
    1 is DDPM's ancestral sampler, whose sigma^2 is beta~, the variance of q(x_s|x_t, z).
    Song, Meng & Ermon 2021, arXiv 2010.02502, whose eta is our noise.

    push(mean, s) -> w grad log p_s(y|mean) guides each step by a classifier: sigma^2 push is added
    to the mean (nothing for noise = 0). DDPM lecture, the first "Guided sampling", which prints
    sigma for sigma^2.
    """
    for t, s in times(steps, t0):
        alpha, alpha_s = value_at(path.alpha, t), value_at(path.alpha, s)
        beta, beta_s = value_at(path.beta, t), value_at(path.beta, s)
        u = field(x, t)
        z = path.u_to_data(u, x, t)
        eps = path.u_to_eps(u, x, t)
        # x_t is (alpha / alpha_s) x_s plus new noise, of this variance:
        added = beta**2 - (alpha / alpha_s * beta_s)**2
        variance = (beta_s / beta)**2 * added               # beta~ = Var(x_s|x_t, z)
        sigma = noise * math.sqrt(max(variance, 0))         # rounding may leave less than 0
        x = alpha_s * z + math.sqrt(max(beta_s**2 - sigma**2, 0)) * eps
        if push is not None:
            x = x + sigma**2 * push(x, s)
        if noise:
            x = x + sigma * randn(x)
    return x


def ancestral(field, x, steps, path, push=None, t0=0.0, randn=torch.randn_like):
    """DDPM's ancestral sampler: ddim with noise = 1. DDPM lecture, "Sampling"; Ho et al. 2020."""
    return ddim(field, x, steps, path, 1.0, push, t0, randn)
