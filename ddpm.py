"""The DDPM view: networks that predict noise, their loss, and the samplers of DDIM and DDPM.

DDPM lecture, the notes on guidance for diffusion models. In our letters alpha = sqrt(abar),
beta = sqrt(1 - abar) and t = 1 - t_DDPM / T; gamma is w. The lecture has two guided samplings. The
first moves the mean of each step: push, below. The second corrects eps by
-w beta_t grad log p_t(y|x): that is classifier.classifier_guided_field, since
u = a_t x + b_t score and score = -eps / beta_t.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from cfg_min import (NULL, drop_labels, require, require_label_each, require_same_shape, times,
                     value_at)
from paths import one_per_sample


def cfg_dsm_loss(net, path, z, y, eta=0.1, t=None, null=NULL):
    """L_simple = E || eps_theta(x|y) - eps ||^2, mean over pixels, y dropped with probability eta.

    net(x, t, y) -> eps. t: (B,), or None for t ~ U[0, 1). As score = -eps / beta_t, an error of eps
    is beta_t times that of the score: this is L_DSM^CFG of Lecture 4, each t weighted by beta_t^2.
    DDPM lecture, "Training".
    """
    require_label_each(y, z)
    y = drop_labels(y, eta, null)
    if t is None:
        t = torch.rand(len(z), device=z.device)
    eps = torch.randn_like(z)
    x = path.sample(z, eps, t)
    eps_theta = net(x, t, y)
    require_same_shape(eps_theta, x)
    return F.mse_loss(eps_theta, eps)


class EpsField(nn.Module):
    """A network that predicts eps, as a vector field: eps gives z, and z, clamped, gives u.

    net(x, t, y) -> eps. Where alpha is small, a small error of eps is a large one of z, so z is
    clamped to [-bound, bound]; Ho et al. 2020. The formulas clamp t to [first_t, last_t]; net
    gets the true t.
    """

    def __init__(self, net, path, bound=1.0, first_t=0.001, last_t=0.999):
        super().__init__()
        self.net = net
        self.path = path
        self.bound = bound
        self.first_t = first_t
        self.last_t = last_t

    def forward(self, x, t, y):
        eps = self.net(x, t, y)
        t = one_per_sample(t, x).clamp(self.first_t, self.last_t)
        z = self.path.eps_to_data(eps, x, t).clamp(-self.bound, self.bound)
        return self.path.data_to_u(z, x, t)


def ddim(field, x, steps, path, noise=0.0, push=None, t0=0.0, randn=torch.randn_like):
    """X_s = mean + sigma xi, mean = alpha_s z + sqrt(beta_s^2 - sigma^2) eps, xi ~ N(0, I).

    z and eps are those that the field implies at (x, t). noise in [0, 1] scales sigma:
    0 is DDIM: no new noise, and on CondOT exactly Euler;
    1 is DDPM's ancestral sampler, whose sigma^2 is beta~, the variance of q(x_s|x_t, z).
    Song, Meng & Ermon 2021, arXiv 2010.02502, whose eta is noise.

    push(mean, s) -> w grad log p_s(y|mean) guides each step by a classifier: sigma^2 push is added
    to the mean (nothing for noise = 0). DDPM lecture, the first "Guided sampling", which prints
    sigma for sigma^2.
    """
    require(0 <= noise <= 1, f"noise = {noise} is not in [0, 1]")
    for t, s in times(steps, t0):
        alpha, alpha_s = value_at(path.alpha, t), value_at(path.alpha, s)
        beta, beta_s = value_at(path.beta, t), value_at(path.beta, s)
        u = field(x, t)
        z = path.u_to_data(u, x, t)
        eps = path.u_to_eps(u, x, t)
        # towards noise, x_t = (alpha / alpha_s) x_s + new noise, of this variance:
        added = beta**2 - (alpha / alpha_s * beta_s)**2
        variance = (beta_s / beta)**2 * added               # beta~ = Var(x_s|x_t, z)
        sigma = noise * math.sqrt(max(variance, 0))         # rounding may leave less than 0
        x = alpha_s * z + math.sqrt(max(beta_s**2 - sigma**2, 0)) * eps
        if push is not None:
            x = x + sigma**2 * push(x, s)
        if noise:
            x = x + sigma * randn(x)
    return x
