"""The derivations of the notes, executed; then the networks; then both commands end to end.

The oracle is a labelled Gaussian mixture, where p_t(x), p_t(x|y), p_t(y|x), score, u and E[z|x] are closed-form for every
path: each equation of the notes is checked with no network and no training, in float64.
"""
import gzip
import math
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import jacobian
from torch.distributions import Independent, Normal, kl_divergence

import cfg_min
import dit
import paths
import sample
import train
import vae
from cfg_min import NULL, guide, guided_field
from unet import NoisyClassifier, UNet

ALL_PATHS = pytest.mark.parametrize("path", paths.PATHS.values(), ids=paths.PATHS.keys())
TIMES = (0.1, 0.45, 0.8, 0.97)
SCALES = (-1.0, 0.0, 0.5, 1.0, 3.0, 8.0)


def close(a, b, tol=1e-9): torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=tol, atol=tol)


class Mixture:
    """sum_k weight_k N(z; mu_k, std_k^2 I), component k with label label_k. y None is the marginal law."""

    def __init__(self, mu, std, weight, label):
        self.mu, self.std, self.weight = (torch.tensor(v, dtype=torch.float64) for v in (mu, std, weight))
        self.label = torch.tensor(label)

    def parts(self, path, x, t, y=None):
        """For x (B, D): log(weight_k p_t(x|k)) (B, K), where not of class y -inf; x - mean_k (B, K, D); var_k (K, 1)."""
        t = torch.as_tensor(t, dtype=torch.float64)
        alpha, beta = path.alpha(t), path.beta(t)
        off, var = x[:, None] - alpha * self.mu, (alpha**2 * self.std**2 + beta**2)[:, None]
        log_p = self.weight.log() - (off**2 / var + (2 * math.pi * var).log()).sum(2) / 2
        if y is not None: log_p = log_p - self.weight[self.label == y].sum().log()
        return log_p.masked_fill(self.label != y, -math.inf) if y is not None else log_p, off, var

    def log_p(self, path, x, t, y=None): return self.parts(path, x, t, y)[0].logsumexp(1)

    def average(self, path, x, t, y, of):
        """sum_k p_t(k|x, y) of(off_k, var_k): (B, D)."""
        log_p, off, var = self.parts(path, x, t, y)
        return (log_p.softmax(1)[..., None] * of(off, var)).sum(1)

    def score(self, path, x, t, y=None): return self.average(path, x, t, y, lambda off, var: -off / var)

    def u(self, path, x, t, y=None):
        t_ = torch.as_tensor(t, dtype=torch.float64)
        a, b, da, db = path.alpha(t_), path.beta(t_), path.d_alpha(t_), path.d_beta(t_)
        slope = (a * da * self.std**2 + b * db)[:, None]
        return self.average(path, x, t, y, lambda off, var: da * self.mu + slope / var * off)

    def data(self, path, x, t, y=None):
        """E[z | x_t = x]."""
        alpha = path.alpha(torch.as_tensor(t, dtype=torch.float64))
        return self.average(path, x, t, y, lambda off, var: self.mu + alpha * self.std[:, None]**2 / var * off)

    def classifier(self, path):
        """(x, t) -> log p_t(y|x) for y = 0, 1, ... (B, 10): shares of the components' posterior."""
        one_hot = F.one_hot(self.label, 10).double()
        return lambda x, t: (self.parts(path, x, t[0])[0].softmax(1) @ one_hot).clamp(min=1e-300).log()

    def net(self, path):
        """u as a network net(x, t, y), with y NULL for the marginal law."""
        def net(x, t, y):
            rows = [self.u(path, x[y == c], t[0], None if c == NULL else c) for c in y.unique().tolist()]
            return torch.cat(rows)[torch.argsort(torch.argsort(y, stable=True), stable=True)]
        return net

    def draw(self, n, y=None):
        weight = self.weight if y is None else self.weight * (self.label == y)
        k = torch.multinomial(weight, n, replacement=True)
        return self.mu[k] + self.std[k, None] * torch.randn(n, self.mu.shape[1], dtype=torch.float64)


MIX = Mixture([[-1.5, 0.5], [1.0, 1.2], [0.3, -1.4], [1.8, -0.2]], [0.3, 0.6, 0.4, 0.2], [0.3, 0.3, 0.25, 0.15], [0, 0, 1, 2])
LINE = Mixture([[-1.0], [1.0]], [0.5, 0.5], [0.5, 0.5], [0, 1])                         # the two Gaussians of cfg_min.py


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(6, 2, dtype=torch.float64)


def divergence(f, x): return torch.stack([jacobian(lambda v: f(v[None])[0], v).trace() for v in x])


def time_derivative(f, t):
    t = torch.tensor(t, dtype=torch.float64)
    return jacobian(f, t)


# ------------------------------------------------------------------------------------------- the oracle itself

@ALL_PATHS
@pytest.mark.parametrize("y", [None, 0, 2])
def test_oracle_against_autograd_and_quadrature(path, y, x):
    t = 0.6
    alpha, beta = (f(torch.tensor(t, dtype=torch.float64)) for f in (path.alpha, path.beta))
    close(MIX.score(path, x, t, y), jacobian(lambda v: MIX.log_p(path, v, t, y).sum(), x))
    line = torch.linspace(-6, 6, 241, dtype=torch.float64)
    z, cell = torch.cartesian_prod(line, line), (line[1] - line[0])**2
    close(MIX.log_p(path, z, t, y).exp().sum() * cell, 1.0, 1e-6)                       # p_t is a density
    p_z = MIX.log_p(paths.CondOT(), z, 1.0, y).exp()                                    # p_1 is the data
    p_x_z = Normal(alpha * z, beta).log_prob(x[:, None]).sum(2).exp() * p_z             # (B, grid) p_t(x|z) p(z)
    close(p_x_z.sum(1) * cell, MIX.log_p(path, x, t, y).exp(), 1e-6)                    # p_t = int p_t(x|z) p(z) dz
    posterior = p_x_z / p_x_z.sum(1, keepdim=True)
    close(posterior @ z, MIX.data(path, x, t, y), 1e-6)
    eps = (x[:, None] - alpha * z) / beta                                               # (B, grid, D): x = alpha z + beta eps
    u_x_z = path.target(z.expand_as(eps), eps, t)
    close((posterior[..., None] * u_x_z).sum(1), MIX.u(path, x, t, y), 1e-5)            # marginal field: posterior average


# ----------------------------------------------------------------------------------- paths and conversions

@ALL_PATHS
def test_path_boundaries_and_derivatives(path):
    t = torch.linspace(0.001, 0.999, 50, dtype=torch.float64)
    close(path.d_alpha(t), jacobian(lambda s: path.alpha(s).sum(), t), 1e-8)
    close(path.d_beta(t), jacobian(lambda s: path.beta(s).sum(), t), 1e-8)
    ends = torch.tensor([0.0, 1.0])
    close(path.alpha(ends), torch.tensor([0.0, 1.0]), 0.007 if path is paths.PATHS["ddpm"] else 1e-7)
    close(path.beta(ends), torch.tensor([1.0, 0.0]), 1e-4 if path is paths.PATHS["ddpm"] else 1e-7)
    assert (path.d_alpha(t) > 0).all() and (path.d_beta(t) < 0).all()


def test_ddpm_path_is_the_discrete_chain_of_ho_et_al():
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    t = 1 - torch.arange(1, 1001, dtype=torch.float64) / 1000
    close(paths.DDPM().alpha(t), abar.sqrt(), 2e-3)
    close(paths.DDPM().alpha(t)**2 + paths.DDPM().beta(t)**2, torch.ones(1000, dtype=torch.float64))


@ALL_PATHS
def test_conditional_field_moves_the_conditional_path(path, x):
    eps = torch.randn_like(x)
    for t in TIMES: close(path.target(x, eps, t), time_derivative(lambda s: path.sample(x, eps, s), t), 1e-8)
    assert path.target(x, eps, 1.0).isfinite().all()


@ALL_PATHS
def test_conversions_against_the_points_they_came_from(path, x):
    z, eps = x, torch.randn_like(x)
    for t in (0.0, *TIMES):
        x_t, u = path.sample(z, eps, t), path.target(z, eps, t)
        close(path.u_to_data(u, x_t, t), z), close(path.u_to_eps(u, x_t, t), eps)
        alpha, beta = path.at(t, z)[:2]
        score = jacobian(lambda v: Normal(alpha * z, beta.expand_as(z)).log_prob(v).sum(), x_t)  # grad log p_t(x|z)
        close(path.u_to_score(u, x_t, t), score)
        if t: close(path.score_to_u(score, x_t, t), u, 1e-8), close(path.eps_to_u(eps, x_t, t), u, 1e-8)
    close(path.u_to_data(path.target(z, eps, 1.0), z, 1.0), z), close(path.u_to_eps(path.target(z, eps, 1.0), z, 1.0), eps)


@ALL_PATHS
def test_lecture_FACT_u_is_a_x_plus_b_score(path, x):
    """And the two misprints of it: b_t without its second beta_t, and a_t and b_t exchanged."""
    for t in TIMES:
        u, score = MIX.u(path, x, t, 0), MIX.score(path, x, t, 0)
        a, b = path.a_b(t, x)
        close(path.score_to_u(score, x, t), u), close(a * x + b * score, u), close(path.u_to_score(u, x, t), score)
        alpha, beta, d_alpha, d_beta = path.at(t, x)
        printed = (d_alpha * beta**2 - d_beta * alpha) / alpha
        assert (a * x + printed * score - u).abs().max() > 1e-3
        exchanged = (b * x + a * score - u).abs().max()
        assert exchanged > 1e-2 if isinstance(path, paths.CondOT) else exchanged < 1e-9 # a = b where alpha^2 + beta^2 = 1


@ALL_PATHS
def test_time_is_expanded_over_the_batch_never_the_width(path):
    z, eps, t = torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4), torch.rand(4)
    for i in range(4):
        close(path.sample(z, eps, t)[i], path.alpha(t[i]) * z[i] + path.beta(t[i]) * eps[i], 1e-6)
        close(path.u_to_eps(z, eps, t)[i], path.u_to_eps(z[i:i + 1], eps[i:i + 1], t[i])[0], 1e-5)


# ------------------------------------------------------------------------------------ the marginal dynamics

@ALL_PATHS
@pytest.mark.parametrize("y", [None, 1])
def test_continuity_equation(path, y, x):
    """d/dt p_t = -div(p_t u_t), divided by p_t."""
    for t in TIMES:
        u, score = MIX.u(path, x, t, y), MIX.score(path, x, t, y)
        d_log_p = time_derivative(lambda s: MIX.log_p(path, x, s, y), t)
        close(d_log_p + divergence(lambda v: MIX.u(path, v, t, y), x) + (u * score).sum(1), torch.zeros(6).double(), 1e-8)


@ALL_PATHS
@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0])
def test_fokker_planck_equation(path, sigma, x):
    """d/dt p = -div(p v) + sigma^2/2 laplace p holds for v = u + sigma^2/2 score, not for v = u (as in `001`)."""
    t = 0.6
    score, d_log_p = MIX.score(path, x, t, 0), time_derivative(lambda s: MIX.log_p(path, x, s, 0), t)
    laplace = divergence(lambda v: MIX.score(path, v, t, 0), x) + (score**2).sum(1)     # (laplace p) / p
    for with_score in (True, False):
        v = lambda v: MIX.u(path, v, t, 0) + with_score * sigma**2 / 2 * MIX.score(path, v, t, 0)
        error = (d_log_p + divergence(v, x) + (v(x) * score).sum(1) - sigma**2 / 2 * laplace).abs().max()
        assert error < 1e-8 if with_score else error > 1e-2


# ------------------------------------------------------------------------------------------------- guidance

@ALL_PATHS
def test_bayes_rule_in_score_form(path, x):
    """grad log p_t(x|y) = grad log p_t(x) + grad log p_t(y|x): grad log p_t(y) = 0. `002` calls p_t(x|y) the classifier."""
    for t in TIMES:
        grad = jacobian(lambda v: MIX.classifier(path)(v, torch.tensor([t]))[:, 1].sum(), x)
        close(MIX.score(path, x, t, 1), MIX.score(path, x, t) + grad, 1e-8)
        wrong = jacobian(lambda v: MIX.log_p(path, v, t, 1).sum(), x)
        assert (MIX.score(path, x, t) + wrong - MIX.score(path, x, t, 1)).abs().max() > 1e-2


@ALL_PATHS
@pytest.mark.parametrize("w", SCALES)
def test_classifier_guidance_is_cfg_in_u_score_eps_and_z(path, w, x):
    """u + w b_t grad log p(y|x) = (1 - w) u(x|null) + w u(x|y): gamma of Lecture 12 is w; every conversion commutes."""
    for t in TIMES:
        y, t_ = torch.ones(6, dtype=torch.int64), torch.full((6,), t, dtype=torch.float64)
        cfg = guided_field(MIX.net(path), x, t, y, w)
        close(cfg_min.classifier_guided_field(MIX.net(path), MIX.classifier(path), path, x, t, y, w), cfg, 1e-7)
        close(cfg, (1 - w) * MIX.u(path, x, t) + w * MIX.u(path, x, t, 1), 1e-8)
        grad = jacobian(lambda v: MIX.classifier(path)(v, t_)[:, 1].sum(), x)
        beta = path.beta(t_)[:, None]
        close(path.u_to_score(cfg, x, t), MIX.score(path, x, t) + w * grad, 1e-7)
        eps = -beta * MIX.score(path, x, t)                                             # s = -eps / sqrt(1 - abar)
        close(path.u_to_eps(cfg, x, t), eps - w * beta * grad, 1e-7)                    # classifier-corrected eps
        close(path.u_to_data(cfg, x, t), guide(MIX.data(path, x, t, 1), MIX.data(path, x, t), w), 1e-7)


def test_null_labels_are_not_classifier_guided(x):
    path, null = paths.CondOT(), torch.full((6,), NULL)
    close(cfg_min.classifier_guided_field(MIX.net(path), MIX.classifier(path), path, x, 0.5, null, 3.0), MIX.u(path, x, 0.5))


@pytest.mark.parametrize("w", SCALES)
def test_guided_field_calls_and_bits(w):
    calls = []

    def net(x, t, y):
        calls.append(len(x))
        assert t.shape == y.shape == (len(x),)
        return x * t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1).float().sin()

    x, y, null = torch.randn(4, 4, 4, 4), torch.tensor([0, 3, NULL, 9]), torch.full((4,), NULL)
    for t in (0.3, torch.tensor(0.3), torch.rand(4)):
        calls.clear()
        out = guided_field(net, x, t, y, w)
        assert calls == [4 if w in (0, 1) else 8]
        t = torch.as_tensor(t).expand(4)
        if w in (0, 1): assert torch.equal(out, net(x, t, y if w else null))
        close(out, (1 - w) * net(x, t, null) + w * net(x, t, y), 1e-5)                  # all channels alike
    assert y.tolist() == [0, 3, NULL, 9]


def test_labels_are_dropped_for_each_sample_and_never_in_place():
    torch.manual_seed(0)
    y = torch.arange(10).repeat(2000)
    kept = y.clone()
    dropped = cfg_min.drop_labels(y, 0.1)
    assert torch.equal(y, kept) and torch.equal(dropped[dropped != NULL], y[dropped != NULL])
    rates = (dropped == NULL).view(-1, 10).double().mean(0)
    assert (rates - 0.1).abs().max() < 0.025 and dropped.dtype == y.dtype
    assert torch.equal(cfg_min.drop_labels(y, 0.0), y) and (cfg_min.drop_labels(y, 1.0) == NULL).all()


# ------------------------------------------------------------------------------------------------ the losses

@ALL_PATHS
def test_conditional_and_marginal_losses_have_one_gradient(path):
    """CFM against marginal flow matching, and denoising against plain score matching: grad_theta is the same."""
    z, weight, t = torch.tensor([-1.2, 0.3, 1.1]).double(), torch.tensor([0.5, 0.2, 0.3]).double(), 0.4
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    alpha, beta = (f(torch.tensor(t).double()) for f in (path.alpha, path.beta))
    p_xz = weight * Normal(alpha * z, beta).log_prob(x[:, None]).exp() * (x[1] - x[0])  # (grid, 3)
    eps = (x[:, None] - alpha * z) / beta
    theta = torch.tensor([0.3, -0.7, 0.2], dtype=torch.float64, requires_grad=True)
    model = theta[0] + theta[1] * x + theta[2] * torch.sin(3 * x)
    for target in (path.target(z.expand_as(eps).T, eps.T, t).T, -eps / beta):           # u_t(x|z), grad log p_t(x|z)
        marginal = (p_xz * target).sum(1) / p_xz.sum(1).clamp(min=1e-300)
        conditional_loss = (p_xz * (model[:, None] - target)**2).sum()
        marginal_loss = (p_xz.sum(1) * (model - marginal)**2).sum()
        assert conditional_loss > marginal_loss + 1e-3
        close(*(torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in (conditional_loss, marginal_loss)))


def tiny(x, t, y): return 0.3 * x + t.view(-1, 1, 1, 1) * 0.2 + y.view(-1, 1, 1, 1) / 20


@ALL_PATHS
def test_losses_one_sample_at_a_time(path):
    """CFG-CFM as the lecture's expectation; CFG-DSM, which is L_simple, as beta_t^2 || s_theta - grad log p_t(x|z) ||^2."""
    z, y = torch.randn(64, 1, 4, 4, dtype=torch.float64), torch.arange(64) % 10
    cfm = dsm = 0
    torch.manual_seed(3)
    x, t, y_, z_, eps = cfg_min.draw(path, z, y, 0.3)
    assert torch.equal(z_, z) and 0 < (y_ == NULL).sum() < 64 and t.min() >= 0 and t.max() < 1 and abs(t.mean() - 0.5) < 0.15
    for i in range(64):
        alpha, beta, d_alpha, d_beta = (f(t[i]) for f in (path.alpha, path.beta, path.d_alpha, path.d_beta))
        close(x[i], alpha * z[i] + beta * eps[i], 1e-6)
        out = tiny(x[i:i + 1], t[i:i + 1], y_[i:i + 1])[0]
        cfm += ((out - d_alpha * z[i] - d_beta * eps[i])**2).mean() / 64
        score = jacobian(lambda v: Normal(alpha * z[i], beta).log_prob(v).sum(), x[i])
        dsm += beta**2 * ((-out / beta - score)**2).mean() / 64                         # s_theta = -eps_theta / beta
    for loss, want in ((cfg_min.cfg_cfm_loss, cfm), (cfg_min.cfg_dsm_loss, dsm)):
        torch.manual_seed(3)
        close(loss(tiny, path, z, y, 0.3), want, 1e-5)


def test_shares_of_a_batch_add_up_to_the_batch():
    z, y, losses = torch.randn(8, 1, 4, 4), torch.arange(8), []
    for share in (slice(None), slice(0, 4), slice(4, 8)):
        torch.manual_seed(0)
        losses.append(cfg_min.cfg_cfm_loss(tiny, paths.CondOT(), z, y, 0.5, share=share))
    close(losses[0], (losses[1] + losses[2]) / 2, 1e-6)


def test_classifier_loss_is_minimal_at_the_exact_posterior():
    torch.manual_seed(0)
    z, y, path = LINE.draw(4000), None, paths.CondOT()
    y = (torch.rand(4000, dtype=torch.float64) < LINE.classifier(path)(z, torch.ones(1))[:, 1].exp()).long()
    exact = lambda x, t: torch.cat([LINE.classifier(path)(x[i:i + 1], t[i:i + 1]) for i in range(len(x))])
    losses = []
    for sharpen in (0.5, 1.0, 2.0):
        torch.manual_seed(1)
        losses.append(cfg_min.classifier_loss(lambda x, t: sharpen * exact(x, t)[:, :2], path, z, y))
    assert losses[1] < min(losses[0], losses[2])


# --------------------------------------------------------------------------------------------- DDPM (Lecture 12)

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)                           # Ho et al. 2020
ABAR = torch.cumprod(1 - BETAS, 0)


def chain(t):
    """alpha_t, abar_t, abar_{t-1} and beta~_t of the discrete chain."""
    return 1 - BETAS[t], ABAR[t], ABAR[t - 1], BETAS[t] * (1 - ABAR[t - 1]) / (1 - ABAR[t])


def mu_of(x, eps, a, abar): return x / a.sqrt() - (1 - a) / (a * (1 - abar)).sqrt() * eps


class Chain(paths.GaussianPath):
    """Two steps of the discrete chain as a path: t = 0 is step k, t = 1/2 step k - 1."""

    def __init__(self, k): self.k = k
    def alpha(self, t): return torch.where(t < 0.25, ABAR[self.k], ABAR[self.k - 1]).sqrt()
    def beta(self, t): return torch.where(t < 0.25, 1 - ABAR[self.k], 1 - ABAR[self.k - 1]).sqrt()
    def d_alpha(self, t): return torch.ones_like(t)
    def d_beta(self, t): return -torch.ones_like(t)


@pytest.mark.parametrize("t", [2, 50, 500, 999])
def test_posterior_mean_in_three_forms_and_ddim_with_noise_1_is_ddpm(t, x):
    a, abar, prev, var = chain(t)
    x0, eps = x, torch.randn_like(x)
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    # q(x_{t-1}|x_t, x_0) by Bayes: N(x_{t-1}; sqrt(prev) x0, 1 - prev) N(x_t; sqrt(a) x_{t-1}, 1 - a)
    precision = 1 / (1 - prev) + a / (1 - a)
    mean = (prev.sqrt() * x0 / (1 - prev) + a.sqrt() * x_t / (1 - a)) / precision
    close(1 / precision, var)
    close(prev.sqrt() * (1 - a) / (1 - abar) * x0 + a.sqrt() * (1 - prev) / (1 - abar) * x_t, mean)
    close(mu_of(x_t, eps, a, abar), mean)
    close((x_t + (1 - a) * -eps / (1 - abar).sqrt()) / a.sqrt(), mean)
    # one step of our sampler, told the exact u: its mean, and its standard deviation
    path, times = Chain(t), cfg_min.times
    field = lambda v, s: path.target(x0, eps, s)
    for noise, xi in ((1.0, 0.0), (1.0, 1.0), (0.0, 1.0)):
        try:
            cfg_min.times = lambda *_: [(0.0, 0.5)]
            out = cfg_min.ddim(field, x_t, 1, path, noise, randn=lambda v: xi + torch.zeros_like(v))
        finally:
            cfg_min.times = times
        if noise: close(out, mean + xi * var.sqrt(), 1e-8)                              # x = mu + sqrt(beta~) xi
        else: close(out, prev.sqrt() * x0 + (1 - prev).sqrt() * eps, 1e-8)              # Song et al. 2021, eq. 12


@pytest.mark.parametrize("t", [2, 50, 500, 999])
def test_elbo_term_is_the_weighted_eps_error(t, x):
    """KL(q(x_{t-1}|x_t, x_0) || p(x_{t-1}|x_t)) = (1 - a)^2 / (2 beta~ a (1 - abar)) || eps - eps_theta ||^2."""
    a, abar, _, var = chain(t)
    eps, eps_theta, std = torch.randn_like(x), torch.randn_like(x), var.sqrt().expand_as(x)
    q, p = (Independent(Normal(mu_of(x, e, a, abar), std), 1) for e in (eps, eps_theta))
    close(kl_divergence(q, p), (1 - a)**2 / (2 * var * a * (1 - abar)) * ((eps - eps_theta)**2).sum(1), 1e-8)


def test_guided_gaussian_is_shifted_by_the_variance_times_g():
    """log p(x) + x g for p = N(mu, s^2) is N(mu + s^2 g, s^2), not N(mu + s g, s^2): so mu + beta~ g, not mu + sqrt(beta~) g."""
    mu, s, g, grid = 0.3, 0.4, 1.7, torch.linspace(-5, 6, 20001, dtype=torch.float64)
    p = (Normal(mu, s).log_prob(grid) + grid * g).softmax(0)
    close((p * grid).sum(), mu + s**2 * g, 1e-6)
    assert abs((p * grid).sum() - (mu + s * g)) > 0.1


def test_the_two_guided_samplings_agree_as_beta_vanishes(x):
    """Lecture 12: mu + beta~ grad log p(y|mu) against mu of the corrected eps, on the mixture."""
    path, errors = paths.DDPM(), []
    for h in (0.1, 0.01, 0.001):
        t, s = torch.tensor(0.6 - h, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
        a, abar, prev = (path.alpha(t) / path.alpha(s))**2, path.alpha(t)**2, path.alpha(s)**2
        g = lambda v, t: jacobian(lambda v: MIX.classifier(path)(v, t[None])[:, 1].sum(), v)
        eps = -(1 - abar).sqrt() * MIX.score(path, x, t)
        mu = mu_of(x, eps, a, abar)
        by_mean = (1 - a) * (1 - prev) / (1 - abar) * g(mu, s)
        by_eps = mu_of(x, eps - (1 - abar).sqrt() * g(x, t), a, abar) - mu
        errors.append(((by_mean - by_eps).norm() / by_eps.norm()).item())
    assert errors[0] > 0.1 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3


def test_the_normaliser_of_p_y_x_to_the_gamma(x):
    """p(y|x)^gamma p(x) / Z is a law for the constant Z; the Z with a gradient in x is sum_y p(y|x)^gamma."""
    path, gamma, t = paths.CondOT(), 3.0, torch.tensor([0.7])
    z_of_x = lambda v: (gamma * MIX.classifier(path)(v, t)[:, :3]).exp().sum(1).log().sum()
    assert jacobian(z_of_x, x).abs().max() > 0.1
    w_score = guide(MIX.score(path, x, 0.7, 1), MIX.score(path, x, 0.7), gamma)          # grad log (p(y|x)^gamma p(x) / Z)
    close(w_score, jacobian(lambda v: (gamma * MIX.classifier(path)(v, t)[:, 1] + MIX.log_p(path, v, 0.7)).sum(), x), 1e-7)


# ------------------------------------------------------------------------------------------------ the samplers

def simulate(sampler, mixture, w, y, path=paths.CondOT(), n=4000, steps=100, **options):
    torch.manual_seed(0)
    labels = torch.full((n,), y)
    field = lambda x, t: guided_field(mixture.net(path), x, t, labels, w)
    return sampler(field, torch.randn(n, mixture.mu.shape[1], dtype=torch.float64), steps, **options)


RUNS = {"euler": (cfg_min.euler, {}), "heun": (cfg_min.heun, {}), "ddim": (cfg_min.ddim, dict(noise=0.0)),
        "ddim noise 0.5": (cfg_min.ddim, dict(noise=0.5)), "ddpm": (cfg_min.ddim, dict(noise=1.0)),
        "em": (cfg_min.euler_maruyama, {}), "em 0.5": (cfg_min.euler_maruyama, dict(sigma=0.5)),
        "em 1": (cfg_min.euler_maruyama, dict(sigma=1.0)), "em 2": (cfg_min.euler_maruyama, dict(sigma=2.0))}


@ALL_PATHS
@pytest.mark.parametrize("run", RUNS)
def test_samplers_end_in_the_data_law(run, path):
    """w = 1 samples p(.|y), w = 0 samples p: mean, covariance, and distance of the two laws' empirical sorts."""
    sampler, options = RUNS[run]
    if "euler" not in run and run != "heun": options = dict(options, path=path)
    for w, y in ((1, 0), (0, 0)):
        got, want = simulate(sampler, MIX, w, 0, path, steps=150, **options), MIX.draw(40000, 0 if w else None)
        assert (got.mean(0) - want.mean(0)).abs().max() < 0.09, (run, w)
        assert (got.T.cov() - want.T.cov()).abs().max() < 0.12, (run, w)
        quantiles = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
        assert (got.quantile(quantiles, 0) - want.quantile(quantiles, 0)).abs().mean() < 0.08, (run, w)


def test_sde_without_its_score_term_ends_elsewhere():
    """`001` writes dX = u dt + sigma dW; with sigma = 1 that adds a variance of about 1/3 on CondOT's last stretch."""
    torch.manual_seed(0)
    x, h = torch.randn(4000, 1, dtype=torch.float64), 0.01
    for k in range(100): x = x + h * LINE.u(paths.CondOT(), x, k * h, 1) + h**0.5 * torch.randn_like(x)
    assert x.std() > 0.6 and abs(simulate(cfg_min.euler_maruyama, LINE, 1, 1, sigma=1.0).std() - 0.5) < 0.04


@pytest.mark.parametrize("sampler, order", [(cfg_min.euler, 1), (cfg_min.heun, 2)])
@ALL_PATHS
def test_order_of_the_samplers(sampler, order, path):
    if isinstance(path, paths.DDPM): pytest.skip("its field is infinite at t = 1: no order in the step there")
    exact = simulate(cfg_min.heun, MIX, 3, 0, path, n=20, steps=4000)
    errors = [(simulate(sampler, MIX, 3, 0, path, n=20, steps=k) - exact).norm() for k in (200, 400)]
    assert 2**order * 0.75 < errors[0] / errors[1] < 2**order * 1.3


def test_ddim_on_condot_is_euler():
    close(simulate(cfg_min.ddim, MIX, 3, 0, steps=20), simulate(cfg_min.euler, MIX, 3, 0, steps=20), 1e-9)


def test_samplers_call_the_field_at_every_time_from_noise_to_the_last_step():
    """T steps call it at t_DDPM = T, ..., 1: so training draws t from U{1, T}, not from Lecture 12's U{2, T}."""
    for sampler, _ in RUNS.values():
        times = []
        sampler(lambda x, t: times.append(round(10 * (1 - t), 6)) or torch.zeros_like(x), torch.zeros(1, 1), 10)
        assert sorted(set(times), reverse=True) == list(range(10, 0, -1))


def test_what_w_does_to_two_gaussians():
    """`002` says a mixture; others say p(.|y)^w p^(1-w); and that ODE and SDE agree. Not at w = 3."""
    mean = {(name, w): simulate(s, LINE, w, 1, n=4000, steps=200, **o).mean().item() for w in (0, 1, 3)
            for name, s, o in (("ode", cfg_min.euler, {}), ("sde", cfg_min.euler_maruyama, {}))}
    for w in (0, 1): assert abs(mean["ode", w] - w) < 0.06 and abs(mean["sde", w] - w) < 0.06
    assert 1.45 < mean["ode", 3] < 1.6                  # a mixture's mean lies in [0, 1], the tilted law's is 1.05
    assert 1.1 < mean["sde", 3] < mean["ode", 3] - 0.1
    net, x = cfg_min.two_gaussians(), torch.linspace(-3, 3, 13)[:, None]
    for t in TIMES:                                     # the exact net of `python cfg_min.py` is right, too
        for y in (0, 1, NULL):
            want = LINE.u(paths.CondOT(), x.double(), t, None if y == NULL else y)
            close(net(x, torch.full((13,), t), torch.full((13,), y)), want.float(), 1e-4)


# ------------------------------------------------------------------------------------------------ the networks

NETS = {"unet": (UNet, {}, (1, 32, 32)), "unet, latent": (UNet, train.LATENT["unet"], (4, 8, 8)),
        "dit": (dit.DiT, {}, (1, 32, 32)), "dit, latent": (dit.DiT, train.LATENT["dit"], (4, 8, 8))}


@pytest.mark.parametrize("name", NETS)
def test_networks(name):
    """The output is 0 at first and has x's shape; every parameter gets a gradient once; classes are exchangeable."""
    make, options, shape = NETS[name]
    torch.manual_seed(0)
    net, x, t, y = make(**options), torch.randn(3, *shape), torch.rand(3), torch.tensor([0, 7, NULL])
    assert net(x, t, y).shape == x.shape and (net(x, t, y) == 0).all()
    with torch.no_grad():
        for p in net.parameters(): p.add_(0.02 * torch.randn_like(p))                   # off the zero initialisation
    torch.manual_seed(1)
    cfg_min.cfg_cfm_loss(net, paths.CondOT(), x, y, 0.5).backward()
    for n, p in net.named_parameters(): assert p.grad is not None and p.grad.abs().sum() > 0, n
    order = torch.tensor([3, 4, 5, 6, 7, 8, 9, 10, 0, 1, 2])
    with torch.no_grad():
        out = net(x, t, y)
        assert (net(x, t, y.flip(0)) - out).abs().max() > 1e-4 and (net(x, 1 - t, y) - out).abs().max() > 1e-4
        net.label.weight[:] = net.label.weight[order].clone()
        close(net(x, t, torch.argsort(order)[y]), out, 1e-4)


def test_the_lecture_s_unet():
    net = UNet(channels=(32, 64, 128), layers=2)
    assert 1.2e6 < sum(p.numel() for p in net.parameters()) < 1.45e6
    ends = net.encoder(torch.randn(2, 1, 32, 32), torch.randn(2, 128))
    assert [tuple(h.shape[1:]) for h in ends] == [(32, 16, 16), (64, 8, 8), (128, 4, 4)]


def test_noisy_classifier():
    net, x, t = NoisyClassifier(), torch.randn(2, 1, 32, 32), torch.rand(2)
    assert net(x, t).shape == (2, 10)
    net(x, t).square().sum().backward()


def test_patchify_against_unfold_and_a_strided_convolution():
    x, p = torch.randn(2, 3, 8, 12), 4
    tokens = dit.patchify(x, p)
    assert torch.equal(tokens, F.unfold(x, p, stride=p).transpose(1, 2))                # (B, N, C p p)
    assert torch.equal(dit.unpatchify(tokens, p, x.shape), x)
    linear = torch.nn.Linear(3 * p * p, 5)
    convolved = F.conv2d(x, linear.weight.view(5, 3, p, p), linear.bias, stride=p)      # (B, 5, H/p, W/p)
    close(linear(tokens), convolved.flatten(2).transpose(1, 2), 1e-5)


def test_adaln_zero_after_construction_and_attention_sees_all_patches():
    net, h, c = dit.DiT(), torch.randn(2, 64, 192), torch.randn(2, 192)
    for block in net.blocks: assert torch.equal(block(h, c), h)
    place = dit.positions(4, 32)
    assert place.shape == (16, 32) and torch.pdist(place).min() > 0.1
    with torch.no_grad():
        for p in net.parameters(): p.add_(0.05 * torch.randn_like(p))
        x = torch.randn(1, 1, 32, 32)
        moved = x.clone()
        moved[0, 0, :4, :4] += 1                        # one patch
        change = dit.patchify(net(moved, torch.ones(1), torch.ones(1).long()) - net(x, torch.ones(1), torch.ones(1).long()), 4)
    assert (change.abs().amax(2) > 1e-6).all()          # reaches every other


def test_vae_shapes_and_elbo():
    net, x = vae.VAE(), torch.rand(3, 1, 32, 32) * 2 - 1
    assert net.encode(x).shape == (3, 4, 8, 8) and net.decode(net.encode(x)).shape == x.shape
    mean, log_var = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    q, p = Independent(Normal(mean, (log_var / 2).exp()), 3), Independent(Normal(torch.zeros_like(mean), 1.0), 3)
    close(vae.kl_to_normal(mean, log_var), kl_divergence(q, p), 1e-4)
    torch.manual_seed(0)
    loss = vae.vae_loss(net, x, std=0.2)
    torch.manual_seed(0)
    recon, mean, log_var = net(x, torch.randn(3, 4, 8, 8))
    log_p = Independent(Normal(recon, 0.2), 3).log_prob(x) + 512 * math.log(2 * math.pi * 0.04)
    close(loss, (-log_p + vae.kl_to_normal(mean, log_var)).mean() * 2 * 0.04 / 1024, 1e-4)
    loss.backward()
    for n, p in net.named_parameters(): assert p.grad is not None and p.grad.abs().sum() > 0, n


# ------------------------------------------------------------------------------------------ the two commands

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A few hundred real digits."""
    x_train, y_train, x_test, y_test = train.load_data(HERE / "data/mnist.npz")
    crop = lambda x: x[:, 0, 2:-2, 2:-2].numpy()
    file = tmp_path_factory.mktemp("data") / "few.npz"
    np.savez(file, x_train=crop(x_train[:300]), y_train=y_train[:300].numpy(), x_test=crop(x_test[:100]), y_test=y_test[:100].numpy())
    return file


@pytest.fixture
def here(tmp_path, monkeypatch, data):
    """An empty working folder; run(script, arguments) runs a command in it as a user would, data set given."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(line, capsys=None, data=None):
    """A command line in this process: its status."""
    script, *argv = line.split()
    module = {"train.py": train, "sample.py": sample}[script]
    if data and script == "train.py": argv += ["--data", str(data)]
    handler = signal.getsignal(signal.SIGINT)
    try:
        return train.command(lambda: module.main(argv)) or 0
    finally:
        signal.signal(signal.SIGINT, handler)


SMALL = "--steps 6 --batch 8"


def weights(file): return torch.load(file, weights_only=True)["weights"]


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def read_png(file):
    """The grey picture in a PNG without filters, each chunk's checksum verified."""
    raw, at, chunks = Path(file).read_bytes(), 8, {}
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    while at < len(raw):
        size, kind = struct.unpack(">I4s", raw[at:at + 8])
        chunks[kind] = raw[at + 8:at + 8 + size]
        assert struct.unpack(">I", raw[at + 8 + size:at + 12 + size])[0] == zlib.crc32(kind + chunks[kind])
        at += 12 + size
    width, height, depth, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert (depth, colour) == (8, 0) and (rows[:, 0] == 0).all() and list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    return rows[:, 1:]


def test_png_decodes_to_what_was_written(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (37, 53), dtype=np.uint8)
    train.write_whole(tmp_path / "new" / "a.png", lambda f: sample.write_png(f, grey))
    assert (read_png(tmp_path / "new" / "a.png") == grey).all() and len(list((tmp_path / "new").iterdir())) == 1


def test_killed_run_resumes_to_the_same_bits_and_samples(here, data, capsys):
    """train; the same killed by SIGKILL after its first checkpoint and resumed; then sample.py on the result."""
    assert run(f"train.py --arch unet {SMALL} --out whole.pt", data=data) == 0
    command = [sys.executable, str(HERE / "train.py"), *f"--arch unet {SMALL} --save-every 1 --out cut.pt --data {data}".split()]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (here / "cut.pt").exists(): time.sleep(0.01)
    killed.send_signal(signal.SIGKILL), killed.wait()
    assert 1 <= torch.load("cut.pt", weights_only=True)["step"]
    assert run(f"train.py --arch unet {SMALL} --save-every 1 --out cut.pt --resume", data=data) == 0
    assert same(weights("whole.pt"), weights("cut.pt"))
    assert run(f"train.py --arch unet {SMALL} --out cut.pt --resume", data=data) == 0 and "finished" in capsys.readouterr().out
    assert run("train.py --arch unet --steps 7 --batch 8 --out cut.pt --resume", data=data) == 2
    assert "steps" in capsys.readouterr().err
    assert run(f"train.py --arch unet {SMALL} --seed 1 --out other.pt", data=data) == 0
    assert not same(weights("whole.pt"), weights("other.pt"))
    assert run("sample.py --w 3 --n 12 --steps 2 --ckpt cut.pt --out a.npz") == 0
    with np.load("a.npz") as a:
        assert a["images"].shape == (12, 32, 32) and a["images"].dtype == np.uint8
        assert a["labels"].tolist() == [*range(10), 0, 1] and a["labels"].dtype == np.int64
    (here / "runs").mkdir(), os.replace("cut.pt", "runs/unet.pt"), capsys.readouterr()
    assert run("sample.py --w 1 3 --steps 2") == 0       # the newest run is found
    out = capsys.readouterr().out
    assert "runs/unet.pt" in out and "220 samples" in out and "8 network calls" in out
    assert read_png("samples.png").shape == (20 + 32 * 11 + 8, 2 * (320 + 8))
    assert run("sample.py --w 3 --steps 5 --trajectory --out t.png") == 0
    assert read_png("t.png").shape == (34 + 32 * 11 + 8, 32 * 11 + 8)


def test_interrupt_writes_a_checkpoint_and_exits_130(here, data, monkeypatch):
    loss_of = train.loss_of
    monkeypatch.setattr(train, "loss_of", lambda *a: (signal.raise_signal(signal.SIGINT), loss_of(*a))[1])
    assert run(f"train.py --arch unet {SMALL} --out a.pt", data=data) == 130
    monkeypatch.undo()
    os.chdir(here)
    assert torch.load("a.pt", weights_only=True)["step"] == 1
    assert run(f"train.py --arch unet {SMALL} --out a.pt --resume", data=data) == 0
    assert run(f"train.py --arch unet {SMALL} --out b.pt", data=data) == 0 and same(weights("a.pt"), weights("b.pt"))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(here, data, monkeypatch, capsys):
    calls, loss_of = [], train.loss_of
    monkeypatch.setattr(train, "loss_of", lambda *a: loss_of(*a) * (math.nan if calls.append(0) or len(calls) > 3 else 1))
    assert run(f"train.py --arch unet {SMALL} --save-every 2 --out a.pt", data=data) == 2
    assert "not finite" in capsys.readouterr().err and torch.load("a.pt", weights_only=True)["step"] == 2
    assert all(v.isfinite().all() for v in weights("a.pt").values())


@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("predict", ["u", "eps"])
def test_every_sampler_serves_every_network(here, data, path, predict):
    assert run(f"train.py --arch unet --path {path} --predict {predict} {SMALL} --out a.pt", data=data) == 0
    pictures = []
    for options in ("euler", "heun", "em", "em --sigma 1", "ddim", "ddim --noise 1", "euler --interval 0.2 0.8"):
        assert run(f"sample.py --w 2 --ckpt a.pt --n 2 --steps 4 --out a.npz --sampler {options}") == 0, options
        pictures.append(np.load("a.npz")["images"].tobytes())
    assert len(set(pictures)) == 7 - (path == "condot" and pictures[0] == pictures[4])


def test_samples_depend_on_seed_and_index_alone(here, data, monkeypatch):
    assert run(f"train.py --arch unet {SMALL} --out a.pt", data=data) == 0
    images = []
    for options, chunk in (("--n 7", 100), ("--n 12", 100), ("--n 12", 5), ("--n 12 --seed 1", 100)):
        monkeypatch.setattr(sample, "CHUNK", chunk)
        assert run(f"sample.py --w 3 --sampler em --ckpt a.pt --steps 3 --out a.npz {options}") == 0
        images.append(np.load("a.npz")["images"].astype(int))
    assert abs(images[0] - images[1][:7]).max() <= 1 and abs(images[1] - images[2]).max() <= 1     # float rounding
    assert abs(images[1] - images[3]).max() > 9


def test_classifier_trains_guides_and_judges(here, data, capsys):
    assert run(f"train.py --arch unet {SMALL}", data=data) == 0
    assert run("sample.py --w 3 --steps 2 --n 4 --guidance classifier") == 2             # none for this data yet
    assert "train.py --arch classifier" in capsys.readouterr().err
    assert run("train.py --arch classifier --steps 40 --batch 32", data=data) == 0
    assert float(capsys.readouterr().out.split(" %")[0].split()[-1]) > 20               # ten percent is chance
    assert run("sample.py --w 3 --steps 2 --n 4 --guidance classifier --out a.npz") == 0
    assert "read as their label" in capsys.readouterr().out
    assert run("sample.py --w 0 --steps 2 --n 4 --guidance classifier --out b.npz") == 0
    assert run("sample.py --w 0 --steps 2 --n 4 --interval 0 1 --out c.npz") == 0
    assert (np.load("a.npz")["images"] != np.load("b.npz")["images"]).any()


@pytest.mark.parametrize("arch", ["dit", "unet"])
def test_latent_round_trip(here, data, arch, capsys):
    assert run("train.py --arch vae --steps 20 --batch 16 --out vae.pt", data=data) == 0
    assert "reconstruction error" in capsys.readouterr().out
    assert run(f"train.py --arch {arch} --latent vae.pt {SMALL}", data=data) == 0
    net, config = train.load_checkpoint(f"runs/latent_{arch}.pt", "cpu")
    autoencoder, _ = train.load_checkpoint("vae.pt", "cpu")
    z = torch.cat([autoencoder.encode(train.to_unit(x)) for x in train.load_data(data)[0].split(100)])
    assert abs((z * config["latent"]["scale"]).std() - 1) < 0.02                        # unit variance
    assert run("sample.py --w 2 --n 4 --steps 2 --out a.npz") == 0
    assert np.load("a.npz")["images"].shape == (4, 32, 32)
    os.rename("vae.pt", "kept.pt")
    assert run("sample.py --w 2 --n 4 --steps 2") == 2 and "vae.pt" in capsys.readouterr().err
    assert run("train.py --arch vae --steps 2 --batch 16 --seed 1 --out vae.pt", data=data) == 0
    assert run("sample.py --w 2 --n 4 --steps 2") == 2 and "not the autoencoder" in capsys.readouterr().err
    assert run("train.py --arch dit --latent runs/latent_unet.pt") == 2 and run("sample.py --w 2 --ckpt kept.pt") == 2


def test_dit_trains_and_samples(here, data):
    assert run(f"train.py --arch dit {SMALL}", data=data) == 0 and run("sample.py --w 0 1 --n 3 --steps 2") == 0


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_folders_are_read_as_the_npz_is(here, data, zipped):
    with np.load(data) as npz:
        for part, name in (("train", "train"), ("test", "t10k")):
            for key, kind in (("x", "images-idx3"), ("y", "labels-idx1")):
                v = npz[f"{key}_{part}"].astype(np.uint8)
                raw = struct.pack(f">HBB{v.ndim}I", 0, 8, v.ndim, *v.shape) + v.tobytes()
                Path(f"{name}-{kind}-ubyte{'.gz' if zipped else ''}").write_bytes(gzip.compress(raw) if zipped else raw)
    for a, b in zip(train.load_data(here), train.load_data(data)): assert torch.equal(a, b)
    x = train.load_data(data)[0]
    assert x.shape == (300, 1, 32, 32) and x.dtype == torch.uint8 and train.to_unit(x).aminmax() == (-1, 1)


def test_bad_input_is_one_line_and_status_2(here, data, capsys):
    """And nothing that was there is lost."""
    assert run(f"train.py --arch unet {SMALL} --out good.pt", data=data) == 0
    assert run(f"train.py --arch vae {SMALL} --out vae.pt", data=data) == 0
    good = Path("good.pt").read_bytes()
    Path("cut.pt").write_bytes(good[:len(good) // 2]), Path("text.pt").write_text("hello"), Path("empty.pt").touch()
    torch.save({"config": {"arch": "unet", "net": {"channels": (8, 16)}}, "weights": {"a": torch.zeros(1)}}, "foreign.pt")
    torch.save(UNet(), "pickled.pt")
    Path("file").touch()
    with np.load(data) as npz: few = dict(npz)
    for name, change in (("float", dict(x_train=few["x_train"].astype(float))), ("shape", dict(x_test=few["x_test"][:, :20])),
                         ("length", dict(y_train=few["y_train"][:-1])), ("label", dict(y_test=few["y_test"] + 8)),
                         ("none", dict(x_train=few["x_train"][:0], y_train=few["y_train"][:0])),
                         ("object", dict(y_train=few["y_train"].astype(object)))):
        np.savez(f"{name}.npz", **{**few, **change})
    np.savez("keys.npz", x_train=few["x_train"])
    Path("cut.npz").write_bytes(Path(data).read_bytes()[:9999])
    unet, ok = "train.py --arch unet", f"sample.py --ckpt good.pt --steps 2 --n 2 --w 1"
    for line in ("train.py", "train.py --arch mlp", f"{unet} --steps 0", f"{unet} --steps x", f"{unet} --batch 0", f"{unet} --eta 1.5",
                 f"{unet} --eta nan", f"{unet} --lr 0", f"{unet} --lr inf", f"{unet} --ema 1", f"{unet} --save-every 0",
                 f"{unet} --seed -1", f"{unet} --device cuda:9", f"{unet} --device tpu", f"{unet} --frobnicate", f"{unet} --latent no.pt",
                 f"{unet} --latent good.pt", "train.py --arch vae --latent vae.pt", f"{unet} --out file/a.pt",
                 f"{unet} --data no.npz", f"{unet} --data file", f"{unet} --data .",
                 *(f"{unet} --data {n}.npz" for n in ("float", "shape", "length", "label", "none", "object", "keys", "cut")),
                 f"{unet} {SMALL} --lr 1 --resume --out good.pt --data {data}", f"{unet} --resume --out text.pt --data {data}",
                 "sample.py", f"{ok} nan", f"{ok} inf", f"{ok} x", f"{ok} 1e38", f"{ok} --label 10", f"{ok} --label -1", f"{ok} --n 0",
                 f"{ok} --steps 0", f"{ok} --sampler rk4", f"{ok} --sampler ddim --noise 1.1", f"{ok} --noise 0.5",
                 f"{ok} --sampler em --sigma -1", f"{ok} --sigma 1", f"{ok} --interval 0.8 0.2", f"{ok} --interval -1 2",
                 f"{ok} --out a.jpg", f"{ok} 3 --out a.npz", f"{ok} --out file/a.png", f"{ok} --seed -1", f"{ok} --trajectory --out a.npz",
                 f"{ok} --device cuda:9",
                 *(f"sample.py --w 1 --ckpt {n}.pt" for n in ("no", "cut", "text", "empty", "foreign", "pickled", "vae"))):
        line += f" --data {data}" * (line.startswith("train") and "--data" not in line)
        assert run(line) == 2, line
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and len(err) > 20 and "Traceback" not in err, (line, err)
    assert Path("good.pt").read_bytes() == good and not list(here.glob(".*"))


def test_two_processes_follow_the_loss_of_one(here, data):
    """torchrun with N = 2 on CPUs: DistributedDataParallel over shares of one global batch."""
    command = f"--arch unet {SMALL} --data {data}".split()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for launcher, out in (([], "one.pt"), (["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29517"], "two.pt")):
        subprocess.run([sys.executable, *launcher, str(HERE / "train.py"), *command, "--out", out], check=True, env=env)
    one, two = weights("one.pt"), weights("two.pt")
    for k in one: torch.testing.assert_close(one[k], two[k], rtol=1e-2, atol=2e-3)
