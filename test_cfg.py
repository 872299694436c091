"""The derivations of the notes, executed; then the networks; then both commands, end to end.

The oracle is a labelled Gaussian mixture, float64, whose p_t(x), p_t(x|y), p_t(y|x), score, u and
E[z|x] are closed-form on every path: an equation of the notes is a test without net or training.
"""
import gzip, math, os, signal, struct, subprocess, sys, time, zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import jacobian
from torch.distributions import Independent, Normal, kl_divergence

import cfg_min
import dit
import sample
import train
import vae
from cfg_min import NULL, euler, euler_maruyama, ddim, guide, guided_field, heun
from paths import DDPM, PATHS, CondOT, GaussianPath
from unet import NoisyClassifier, UNet

ALL_PATHS = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
TIMES = (0.1, 0.45, 0.8, 0.97)
HERE = Path(__file__).parent

def double(v): return torch.as_tensor(v, dtype=torch.float64)

def close(a, b, tol=1e-8):
    torch.testing.assert_close(double(a), double(b), rtol=tol, atol=tol)

class Mixture:
    """sum_k weight_k N(z; mu_k, std_k^2 I), k of class label_k; y None means the marginal law."""

    def __init__(self, mu, std, weight, label):
        self.mu, self.std, self.weight = map(double, (mu, std, weight))
        self.label = torch.tensor(label)

    def parts(self, path, x, t, y=None):
        """log(weight_k p_t(x|k)) (B, K), -inf off class y; x - mean_k (B, K, D); var_k (K, 1)."""
        alpha, beta = path.alpha(double(t)), path.beta(double(t))
        off, var = x[:, None] - alpha * self.mu, (alpha**2 * self.std**2 + beta**2)[:, None]
        log_p = self.weight.log() - (off**2 / var + (2 * math.pi * var).log()).sum(2) / 2
        if y is None: return log_p, off, var
        log_p = log_p - self.weight[self.label == y].sum().log()
        return log_p.masked_fill(self.label != y, -math.inf), off, var

    def log_p(self, path, x, t, y=None): return self.parts(path, x, t, y)[0].logsumexp(1)

    def mean(self, path, x, t, y, of):
        """sum_k p_t(k|x, y) of(x - mean_k, var_k)."""
        log_p, off, var = self.parts(path, x, t, y)
        return (log_p.softmax(1)[..., None] * of(off, var)).sum(1)

    def score(self, path, x, t, y=None):
        return self.mean(path, x, t, y, lambda off, var: -off / var)

    def data(self, path, x, t, y=None):
        gain = path.alpha(double(t)) * self.std[:, None]**2
        return self.mean(path, x, t, y, lambda off, var: self.mu + gain / var * off)

    def u(self, path, x, t, y=None):
        alpha, beta, d_alpha, d_beta = path.at(t, self.std)
        gain = (alpha * d_alpha * self.std**2 + beta * d_beta)[:, None]
        push = d_alpha[:, None] * self.mu
        return self.mean(path, x, t, y, lambda off, var: push + gain / var * off)

    def classifier(self, path):
        """(x, t) -> log p_t(y|x), (B, 10), for one t."""
        classes, tiny = F.one_hot(self.label, 10).double(), 1e-300
        return lambda x, t: (self.parts(path, x, t[0])[0].softmax(1) @ classes + tiny).log()

    def net(self, path):
        """u as net(x, t, y), for one t; y NULL is the marginal field."""
        def net(x, t, y):
            u = torch.zeros_like(x)
            for c in y.unique().tolist():
                u[y == c] = self.u(path, x[y == c], t[0], None if c == NULL else c)
            return u
        return net

    def draw(self, n, y=None):
        weight = self.weight if y is None else self.weight * (self.label == y)
        k = torch.multinomial(weight, n, replacement=True)
        return self.mu[k] + self.std[k, None] * torch.randn(n, self.mu.shape[1]).double()

MIX = Mixture([[-1.5, 0.5], [1.0, 1.2], [0.3, -1.4], [1.8, -0.2]], [0.3, 0.6, 0.4, 0.2],
              [0.3, 0.3, 0.25, 0.15], [0, 0, 1, 2])
LINE = Mixture([[-1.0], [1.0]], [0.5, 0.5], [0.5, 0.5], [0, 1])     # the one of `python cfg_min.py`

@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(6, 2).double()

def gradient(f, x): return jacobian(lambda v: f(v).sum(), x)

def divergence(f, x): return torch.stack([jacobian(lambda v: f(v[None])[0], v).trace() for v in x])

@ALL_PATHS
@pytest.mark.parametrize("y", [None, 0, 2])
def test_oracle_against_autograd_and_quadrature(path, y, x):
    t = double(0.6)
    close(MIX.score(path, x, t, y), gradient(lambda v: MIX.log_p(path, v, t, y), x))
    line = torch.linspace(-6, 6, 241, dtype=torch.float64)
    z, area = torch.cartesian_prod(line, line), (line[1] - line[0])**2
    p_z = MIX.log_p(CondOT(), z, 1.0, y).exp()
    p_xz = Normal(path.alpha(t) * z, path.beta(t)).log_prob(x[:, None]).sum(2).exp() * p_z * area
    close(p_z.sum() * area, 1.0, 1e-6)
    close(p_xz.sum(1), MIX.log_p(path, x, t, y).exp(), 1e-6)        # p_t(x) = int p_t(x|z) p(z) dz
    posterior = p_xz / p_xz.sum(1, keepdim=True)
    close(posterior @ z, MIX.data(path, x, t, y), 1e-6)
    eps = (x[:, None] - path.alpha(t) * z) / path.beta(t)           # the noise that leads z to x
    u_x_z = path.target(z.expand_as(eps), eps, t)                   # u_t(x|z): u is its mean
    close((posterior[..., None] * u_x_z).sum(1), MIX.u(path, x, t, y), 1e-5)

# ---------------------------------------------------------------- paths and conversions

@ALL_PATHS
def test_path_boundaries_and_derivatives(path):
    t, ends = torch.linspace(0.001, 0.999, 50).double(), double([0.0, 1.0])
    ddpm = path is PATHS["ddpm"]
    close(path.d_alpha(t), gradient(path.alpha, t))
    close(path.d_beta(t), gradient(path.beta, t))
    close(path.alpha(ends), ends, 0.007 if ddpm else 1e-7)
    close(path.beta(ends), 1 - ends, 1e-4 if ddpm else 1e-7)
    if ddpm:                                                        # Ho et al.'s discrete chain
        close(path.alpha(1 - torch.arange(1, 1001).double() / 1000), ABAR.sqrt(), 2e-3)
        close(path.alpha(t)**2 + path.beta(t)**2, torch.ones(50).double())

@ALL_PATHS
def test_conditional_field_and_conversions(path, x):
    """u_t(x|z) moves the conditional path; each conversion returns what the point was made of."""
    z, eps = x, torch.randn_like(x)
    for t in (0.0, *TIMES, 1.0):
        x_t, u, (alpha, beta, _, _) = path.sample(z, eps, t), path.target(z, eps, t), path.at(t, z)
        close(path.u_to_data(u, x_t, t), z)
        close(path.u_to_eps(u, x_t, t), eps)
        if t == 1: continue
        score = gradient(Normal(alpha * z, beta.expand_as(z)).log_prob, x_t)    # grad log p_t(x|z)
        close(path.u_to_score(u, x_t, t), score)
        if t == 0: continue
        close(u, jacobian(lambda s: path.sample(z, eps, s), double(t)))
        close(path.score_to_u(score, x_t, t), u)
        close(path.eps_to_u(eps, x_t, t), u)

@ALL_PATHS
def test_lecture_FACT_and_its_misprints(path, x):
    """u = a x + b score; not with b's second beta missing, and not with a and b exchanged."""
    for t in TIMES:
        u, score, (a, b) = MIX.u(path, x, t, 0), MIX.score(path, x, t, 0), path.a_b(t, x)
        close(a * x + b * score, u)
        close(path.score_to_u(score, x, t), u)
        alpha, beta, d_alpha, d_beta = path.at(t, x)
        printed = (d_alpha * beta**2 - d_beta * alpha) / alpha
        assert t < 0.8 or (a * x + printed * score - u).abs().max() > 1e-3
        exchanged = (b * x + a * score - u).abs().max()             # a = b if alpha^2 + beta^2 = 1
        assert exchanged > 1e-2 if isinstance(path, CondOT) else exchanged < 1e-8

@ALL_PATHS
def test_time_goes_over_the_batch_never_the_width(path):
    z, eps, t = torch.randn(4, 4, 4, 4), torch.randn(4, 4, 4, 4), torch.rand(4)
    for i in range(4):
        close(path.sample(z, eps, t)[i], path.alpha(t[i]) * z[i] + path.beta(t[i]) * eps[i], 1e-6)
        close(path.u_to_eps(z, eps, t)[i], path.u_to_eps(z[i:i + 1], eps[i:i + 1], t[i])[0], 1e-5)

# ---------------------------------------------------------------- dynamics

@ALL_PATHS
@pytest.mark.parametrize("sigma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("y", [None, 1])
def test_continuity_and_fokker_planck_equations(path, sigma, y, x):
    """d/dt p = -div(p v) + sigma^2/2 laplace p for v = u + sigma^2/2 score; `001` has v = u."""
    for t in TIMES:
        score = MIX.score(path, x, t, y)
        d_log_p = jacobian(lambda s: MIX.log_p(path, x, s, y), double(t))
        laplace = divergence(lambda v: MIX.score(path, v, t, y), x) + (score**2).sum(1)     # over p
        for factor in (sigma**2 / 2, 0):
            v = lambda v: MIX.u(path, v, t, y) + factor * MIX.score(path, v, t, y)
            error = d_log_p + divergence(v, x) + (v(x) * score).sum(1) - sigma**2 / 2 * laplace
            assert error.abs().max() < 1e-7 if factor == sigma**2 / 2 else error.abs().max() > 1e-2

@ALL_PATHS
def test_conditional_and_marginal_losses_have_one_gradient(path):
    """CFM and flow matching, denoising and plain score matching: equal but for a constant."""
    z, weight, t = double([-1.2, 0.3, 1.1]), double([0.5, 0.2, 0.3]), double(0.4)
    x = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    p_xz = weight * Normal(path.alpha(t) * z, path.beta(t)).log_prob(x[:, None]).exp()
    eps = (x[:, None] - path.alpha(t) * z) / path.beta(t)           # (grid, 3)
    theta = double([0.3, -0.7, 0.2]).requires_grad_()
    model = theta[0] + theta[1] * x + theta[2] * torch.sin(3 * x)
    for target in (path.d_alpha(t) * z + path.d_beta(t) * eps, -eps / path.beta(t)):
        marginal = (p_xz * target).sum(1) / p_xz.sum(1)
        a = (p_xz * (model[:, None] - target)**2).sum()
        b = (p_xz.sum(1) * (model - marginal)**2).sum()
        assert a > b + 1e-3
        close(*(torch.autograd.grad(loss, theta, retain_graph=True)[0] for loss in (a, b)))

# ---------------------------------------------------------------- guidance

@ALL_PATHS
@pytest.mark.parametrize("w", [-1.0, 0.0, 1.0, 3.0, 8.0])
def test_bayes_and_classifier_guidance_is_cfg_in_u_score_eps_and_z(path, w, x):
    """u + w b_t grad log p(y|x) = (1 - w) u(x|null) + w u(x|y): Lecture 12's gamma is w.

    `002` calls log p_t(x|y) the classifier; `003` wants a gradient of the constant Z.
    """
    y, classifier = torch.ones(6).long(), MIX.classifier(path)
    for t in TIMES:
        cfg = guided_field(MIX.net(path), x, t, y, w)
        score, score_y, beta = MIX.score(path, x, t), MIX.score(path, x, t, 1), path.beta(double(t))
        close(cfg, (1 - w) * MIX.u(path, x, t) + w * MIX.u(path, x, t, 1))
        by_classifier = cfg_min.classifier_guided_field(MIX.net(path), classifier, path, x, t, y, w)
        close(by_classifier, cfg, 1e-6)
        grad = gradient(lambda v: classifier(v, [t])[:, 1], x)      # grad log p_t(y|x)
        close(score_y, score + grad, 1e-7)                          # since grad log p_t(y) = 0
        assert (score_y - grad).abs().max() > 1e-2                  # it is not grad log p_t(x|y)
        close(path.u_to_score(cfg, x, t), score + w * grad, 1e-6)
        tilted = lambda v: w * classifier(v, [t])[:, 1] + MIX.log_p(path, v, t)     # p(y|x)^w p(x),
        close(path.u_to_score(cfg, x, t), gradient(tilted, x), 1e-6)    # with a Z that is constant;
        z_of_x = lambda v: (w * classifier(v, [t])[:, :3]).exp().sum(1).log()   # sum_y p(y|x)^w,
        assert w in (0, 1) or gradient(z_of_x, x).abs().max() > 1e-3            # however, is not
        eps = -beta * score                                         # s = -eps / sqrt(1 - abar)
        close(path.u_to_eps(cfg, x, t), eps - w * beta * grad, 1e-6)    # the corrected eps
        z = guide(MIX.data(path, x, t, 1), MIX.data(path, x, t), w)
        close(path.u_to_data(cfg, x, t), z, 1e-6)
    null = torch.full((6,), NULL)
    field = cfg_min.classifier_guided_field(MIX.net(path), classifier, path, x, 0.5, null, w)
    close(field, MIX.u(path, x, 0.5))

@pytest.mark.parametrize("w", [-1.0, 0, 0.0, 1, 1.0, 3.0])
def test_guided_field_calls_bits_and_channels(w):
    calls = []

    def net(x, t, y):
        calls.append(len(x))
        assert t.shape == y.shape == (len(x),)
        return x * t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1).float().sin()

    x, y, null = torch.randn(4, 4, 4, 4), torch.tensor([0, 3, NULL, 9]), torch.full((4,), NULL)
    for t in (0.3, torch.tensor(0.3), torch.rand(4)):
        calls.clear()
        out, t = guided_field(net, x, t, y, w), torch.as_tensor(t).expand(4)
        assert calls == [4 if w in (0, 1) else 8]
        if w in (0, 1): assert torch.equal(out, net(x, t, y if w else null))
        close(out, (1 - w) * net(x, t, null) + w * net(x, t, y), 1e-5)
    assert y.tolist() == [0, 3, NULL, 9]

def test_labels_are_dropped_sample_by_sample_and_never_in_place():
    torch.manual_seed(0)
    y = torch.arange(10).repeat(2000)
    dropped = cfg_min.drop_labels(y, 0.1)
    assert torch.equal(y, torch.arange(10).repeat(2000)) and dropped.dtype == y.dtype
    assert torch.equal(dropped[dropped != NULL], y[dropped != NULL])
    assert ((dropped == NULL).view(-1, 10).double().mean(0) - 0.1).abs().max() < 0.025
    assert torch.equal(cfg_min.drop_labels(y, 0.0), y)
    assert (cfg_min.drop_labels(y, 1.0) == NULL).all()

def tiny(x, t, y): return 0.3 * x + 0.2 * t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1) / 20

@ALL_PATHS
def test_losses_sample_by_sample(path):
    """CFG-CFM; CFG-DSM, L_simple, as beta_t^2 || s_theta - grad log p_t(x|z) ||^2; their shares."""
    z, y, cfm, dsm = torch.randn(64, 1, 4, 4).double(), torch.arange(64) % 10, [], []
    torch.manual_seed(3)
    x, t, y_, _, eps = cfg_min.draw(path, z, y, 0.3)
    assert 0 < (y_ == NULL).sum() < 64 and 0 <= t.min() < 0.1 and 0.9 < t.max() < 1
    for i in range(64):
        alpha, beta, d_alpha, d_beta = (v[0] for v in path.at(t[i], z[i:i + 1]))
        close(x[i], alpha * z[i] + beta * eps[i], 1e-5)
        out = tiny(x[i:i + 1], t[i:i + 1], y_[i:i + 1])[0]
        cfm.append(((out - d_alpha * z[i] - d_beta * eps[i])**2).mean())
        score = gradient(Normal(alpha * z[i], beta.double()).log_prob, x[i])
        dsm.append(beta**2 * ((-out / beta - score)**2).mean())     # s_theta = -eps_theta / beta
    for loss, rows in ((cfg_min.cfg_cfm_loss, cfm), (cfg_min.cfg_dsm_loss, dsm)):
        for share in (slice(None), slice(0, 16), slice(16, 64)):
            torch.manual_seed(3)
            close(loss(tiny, path, z, y, 0.3, share=share), torch.stack(rows[share]).mean(), 1e-4)
    logit = cfg_min.logit_normal(40000).logit()
    assert abs(logit.mean() + 1) < 0.03 and abs(logit.std() - 1) < 0.03

def test_classifier_loss_is_least_at_the_exact_posterior():
    torch.manual_seed(0)
    log_p = LINE.classifier(CondOT())
    exact = lambda x, t: torch.cat([log_p(*xt) for xt in zip(x[:, None], t[:, None])])
    z = LINE.draw(2000)
    y = torch.bernoulli(exact(z, torch.ones(2000))[:, 1].exp()).long()
    losses = []
    for sharpness in (0.5, 1.0, 2.0):
        torch.manual_seed(1)
        classifier = lambda x, t: sharpness * exact(x, t)[:, :2]
        losses.append(cfg_min.classifier_loss(classifier, CondOT(), z, y))
    assert losses[1] < min(losses[0], losses[2])

# ---------------------------------------------------------------- DDPM (Lecture 12)

BETAS = torch.linspace(1e-4, 0.02, 1000).double()                   # Ho et al. 2020
ABAR = torch.cumprod(1 - BETAS, 0)

def mu_of(x, eps, a, abar): return x / a.sqrt() - (1 - a) / (a * (1 - abar)).sqrt() * eps

class Chain(GaussianPath):
    """Step k of the discrete chain at t = 0, step k - 1 at t = 1."""

    def __init__(self, k): self.k = k
    def abar(self, t): return torch.where(t < 0.5, ABAR[self.k], ABAR[self.k - 1])
    def alpha(self, t): return self.abar(t).sqrt()
    def beta(self, t): return (1 - self.abar(t)).sqrt()
    def d_alpha(self, t): return torch.ones_like(t)
    def d_beta(self, t): return -torch.ones_like(t)

@pytest.mark.parametrize("k", [2, 50, 500, 999])
def test_ddpm_posterior_elbo_and_ancestral_step(k, x):
    a, abar, prev = 1 - BETAS[k], ABAR[k], ABAR[k - 1]
    var = BETAS[k] * (1 - prev) / (1 - abar)                        # beta~
    x0, eps, other, xi = x, *torch.randn(3, 6, 2).double()
    x_t = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    # q(x_{t-1}|x_t, x_0) ~ N(x_{t-1}; sqrt(prev) x0, 1 - prev) N(x_t; sqrt(a) x_{t-1}, 1 - a)
    precision = 1 / (1 - prev) + a / (1 - a)
    mean = (prev.sqrt() * x0 / (1 - prev) + a.sqrt() * x_t / (1 - a)) / precision
    close(1 / precision, var)
    close(((1 - a) * prev.sqrt() * x0 + a.sqrt() * (1 - prev) * x_t) / (1 - abar), mean)
    close(mu_of(x_t, eps, a, abar), mean)
    close((x_t + (1 - a) * -eps / (1 - abar).sqrt()) / a.sqrt(), mean)          # by the score
    # the ELBO's L_t is the weighted error of eps
    q, p = (Independent(Normal(mu_of(x_t, e, a, abar), var.sqrt()), 1) for e in (eps, other))
    weight = (1 - a)**2 / (2 * var * a * (1 - abar))
    close(kl_divergence(q, p), weight * ((eps - other)**2).sum(1))
    # a step of ddim from k to k - 1: DDPM's with noise 1; DDIM's, Song et al. 2021, eq. 12, with 0
    field, path = lambda x, t: Chain(k).target(x0, eps, t), Chain(k)
    close(ddim(field, x_t, 1, path, 1.0, randn=lambda _: xi), mean + var.sqrt() * xi)
    close(ddim(field, x_t, 1, path, 0.0), prev.sqrt() * x0 + (1 - prev).sqrt() * eps)

def test_guided_gaussian_moves_by_its_variance_times_g():
    """N(mu, s^2) times exp(x g) is N(mu + s^2 g, s^2); `003` prints s g, and sqrt(beta~) g."""
    mu, s, g, grid = 0.3, 0.4, 1.7, torch.linspace(-5, 6, 20001, dtype=torch.float64)
    mean = ((Normal(mu, s).log_prob(grid) + grid * g).softmax(0) * grid).sum()
    close(mean, mu + s**2 * g, 1e-6)
    assert abs(mean - (mu + s * g)) > 0.1

def test_the_two_guided_samplings_of_ddpm_agree_only_as_beta_vanishes(x):
    """mu + beta~ grad log p(y|mu), against mu of the corrected eps."""
    path, errors = DDPM(), []
    for h in (0.1, 0.01, 0.001):
        t, s = double(0.6 - h), double(0.6)
        abar, prev = path.alpha(t)**2, path.alpha(s)**2
        a, classifier = abar / prev, MIX.classifier(path)
        grad = lambda v, t: gradient(lambda v: classifier(v, [t])[:, 1], v)
        eps = -path.beta(t) * MIX.score(path, x, t)
        mu = mu_of(x, eps, a, abar)
        by_mean = (1 - a) * (1 - prev) / (1 - abar) * grad(mu, s)
        by_eps = mu_of(x, eps - path.beta(t) * grad(x, t), a, abar) - mu
        errors.append(((by_mean - by_eps).norm() / by_eps.norm()).item())
    assert errors[0] > 0.03 and errors[1] < errors[0] / 3 and errors[2] < errors[1] / 3

# ---------------------------------------------------------------- samplers

def simulate(sampler, mixture, w, y, path, n=4000, steps=150, **options):
    torch.manual_seed(0)
    if sampler in (ddim, euler_maruyama): options["path"] = path
    field = lambda x, t: guided_field(mixture.net(path), x, t, torch.full((n,), y), w)
    return sampler(field, torch.randn(n, mixture.mu.shape[1]).double(), steps, **options)

RUNS = {"euler": (euler, {}), "heun": (heun, {}), "em": (euler_maruyama, {}),
        **{f"ddim {s}": (ddim, dict(noise=s)) for s in (0.0, 0.5, 1.0)},
        **{f"em {s}": (euler_maruyama, dict(sigma=s)) for s in (0.5, 1.0, 2.0)}}

@ALL_PATHS
@pytest.mark.parametrize("run", RUNS)
def test_samplers_end_in_the_data_law(run, path):
    """w = 1 ends in p(.|y), w = 0 in p: means, covariances and quantiles."""
    sampler, options = RUNS[run]
    for w in (0, 1):
        got, want = simulate(sampler, MIX, w, 0, path, **options), MIX.draw(40000, 0 if w else None)
        assert (got.mean(0) - want.mean(0)).abs().max() < 0.09
        assert (got.T.cov() - want.T.cov()).abs().max() < 0.12
        q = torch.linspace(0.05, 0.95, 19).double()
        assert (got.quantile(q, 0) - want.quantile(q, 0)).abs().mean() < 0.08

@ALL_PATHS
@pytest.mark.parametrize("sampler, order", [(euler, 1), (heun, 2)])
def test_order_of_the_samplers(sampler, order, path):
    if isinstance(path, DDPM): pytest.skip("its field is infinite at t = 1: no order in the step")
    exact, *results = (simulate(s, MIX, 3, 0, path, 20, k)
                       for s, k in ((heun, 4000), (sampler, 200), (sampler, 400)))
    ratio = (results[0] - exact).norm() / (results[1] - exact).norm()
    assert 0.75 * 2**order < ratio < 1.3 * 2**order

def test_ddim_on_condot_is_euler():
    close(*(simulate(s, MIX, 3, 0, CondOT(), 50, 20) for s in (ddim, euler)))

def test_samplers_call_the_field_from_noise_to_the_last_step():
    """At t_DDPM = T, ..., 1: training needs t ~ U{1, T}; `003` also prints U{2, T}."""
    for sampler, options in RUNS.values():
        ts = []
        field = lambda x, t: ts.append(round(10 - 10 * t)) or 0 * x
        sampler(field, torch.zeros(1, 1), 10, **options)
        assert sorted({*ts}) == [*range(1, 11)] and len(ts) == (19 if sampler is heun else 10)

def test_what_w_does_to_two_gaussians(capsys):
    """`002`: a mixture, by ODE and SDE alike; others: p(.|y)^w p^(1-w); `001`: no score term."""
    cfg_min.main(n=4000, steps=100)
    rows = [[float(v) for v in row.split()] for row in capsys.readouterr().out.splitlines()[2:]]
    for w, ode, _, sde, _, tilted, _, mixture, _ in rows[:2]:
        assert max(abs(v - w) for v in (ode, sde, tilted, mixture)) < 0.06
    _, ode, _, sde, _, tilted, std, *_ = rows[3]
    assert 1.45 < ode < 1.6 and 1.1 < sde < ode - 0.1
    assert abs(tilted - 1.05) < 0.01 and abs(std - 0.46) < 0.01
    grid, x = torch.linspace(-3, 3, 13)[:, None], torch.randn(4000, 1).double()
    for t in TIMES:
        for y in (0, 1, NULL):
            want = LINE.u(CondOT(), grid.double(), t, None if y == NULL else y).float()
            got = cfg_min.two_gaussians(grid, torch.full((13,), t), torch.full((13,), y))
            close(got, want, 1e-4)
    for k in range(100): x = x + 0.01 * LINE.u(CondOT(), x, k / 100, 1) + 0.1 * torch.randn_like(x)
    assert x.std() > 0.6                                            # sigma = 1, no score: not 0.5

# ---------------------------------------------------------------- networks

def shaken(net):
    """net with every weight off its zero initialisation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters(): p.add_(0.03 * torch.randn_like(p))
    return net

@pytest.mark.parametrize("make, options, shape", [
    (UNet, {}, (1, 32, 32)), (UNet, train.LATENT["unet"], (4, 8, 8)),
    (dit.DiT, {}, (1, 32, 32)), (dit.DiT, train.LATENT["dit"], (4, 8, 8))])
def test_networks_start_at_0_use_all_parameters_and_treat_classes_alike(make, options, shape):
    net, y = make(**options), torch.tensor([0, 7, NULL])
    x, t = torch.randn(3, *shape), torch.rand(3)
    assert net(x, t, y).shape == x.shape and (net(x, t, y) == 0).all()
    cfg_min.cfg_cfm_loss(shaken(net), CondOT(), x, y, 0.0).backward()
    for name, p in net.named_parameters(): assert p.grad.abs().sum() > 0, name
    with torch.no_grad():
        out, order = net(x, t, y), torch.randperm(11)
        assert (net(x, t, y.flip(0)) - out).abs().max() > 1e-4
        assert (net(x, 1 - t, y) - out).abs().max() > 1e-4
        net.label.weight[:] = net.label.weight[order].clone()
        close(net(x, t, order.argsort()[y]), out, 1e-4)

def test_lecture_size_unet_and_noisy_classifier():
    net, x = UNet(channels=(32, 64, 128), layers=2), torch.randn(2, 1, 32, 32)
    assert 1.2e6 < sum(p.numel() for p in net.parameters()) < 1.4e6
    shapes = [h.shape[1:] for h in net.encoder(x, torch.randn(2, 128))]
    assert shapes == [(32, 16, 16), (64, 8, 8), (128, 4, 4)]
    net = shaken(NoisyClassifier())
    assert net(x, torch.zeros(2)).shape == (2, 10)
    assert (net(x, torch.zeros(2)) - net(x, torch.ones(2))).abs().max() > 1e-4

def test_patchify_against_unfold_and_a_strided_convolution():
    x, p, linear = torch.randn(2, 3, 8, 12), 4, torch.nn.Linear(48, 5)
    tokens = dit.patchify(x, p)
    assert torch.equal(tokens, F.unfold(x, p, stride=p).transpose(1, 2))
    assert torch.equal(dit.unpatchify(tokens, p, x.shape), x)
    convolved = F.conv2d(x, linear.weight.view(5, 3, p, p), linear.bias, stride=p)
    close(linear(tokens), convolved.flatten(2).transpose(1, 2), 1e-5)

def test_adaln_zero_positions_and_attention():
    net, h, e, one = dit.DiT(), torch.randn(2, 64, 128), torch.randn(2, 128), torch.ones(1)
    for block in net.blocks: assert torch.equal(block(h, e), h)     # as constructed
    assert torch.pdist(dit.positions(8, 128)).min() > 0.1
    x, moved = torch.zeros(2, 1, 32, 32)
    moved[..., :4, :4] += 1                                         # one patch reaches all
    out = shaken(net)(torch.stack([x, moved]), one.expand(2), one.long().expand(2))
    assert (dit.patchify(out[:1] - out[1:], 4).abs().amax(2) > 1e-6).all()

def test_vae_shapes_and_elbo():
    net, x = vae.VAE(), torch.rand(3, 1, 32, 32) * 2 - 1
    assert net.encode(x).shape == (3, 4, 8, 8) and net.decode(net.encode(x)).shape == x.shape
    torch.manual_seed(0)
    loss = vae.vae_loss(net, x, std=0.2)
    torch.manual_seed(0)
    recon, mean, log_var = net(x, torch.randn(3, 4, 8, 8))
    laws = (mean, (log_var / 2).exp()), (0 * mean, 1 + 0 * mean)
    q, p = (Independent(Normal(*law), 3) for law in laws)
    close(vae.kl_to_normal(mean, log_var), kl_divergence(q, p), 1e-4)
    log_p = Independent(Normal(recon, 0.2), 3).log_prob(x) + 512 * math.log(2 * math.pi * 0.2**2)
    close(loss, -(log_p - kl_divergence(q, p)).mean() * 2 * 0.2**2 / 1024, 1e-4)
    loss.backward()
    for name, p in net.named_parameters(): assert p.grad.abs().sum() > 0, name

# ---------------------------------------------------------------- the two commands

@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A data set of a few hundred of the digits."""
    with np.load(HERE / "data/mnist.npz") as mnist: arrays = {k: mnist[k][:300] for k in mnist}
    np.savez(tmp_path_factory.mktemp("data") / "few.npz", **arrays)
    return tmp_path_factory.getbasetemp() / "data0" / "few.npz"

@pytest.fixture
def run(tmp_path, monkeypatch, few):
    """run(command line): its exit status, in an empty folder, on few.npz."""
    monkeypatch.chdir(tmp_path)
    handler = signal.getsignal(signal.SIGINT)

    def run(line):
        script, *argv = line.split()
        if script == "train.py" and "--data" not in argv: argv += ["--data", str(few)]
        main = {"train.py": train.main, "sample.py": sample.main}[script]
        try: return train.command(lambda: main(argv)) or 0
        except SystemExit as e: return e.code                       # argparse's way out
        finally: signal.signal(signal.SIGINT, handler)
    return run

UNET = "train.py --arch unet --steps 6 --batch 8"

def weights(file): return torch.load(file, weights_only=True)["weights"]

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

def read_png(file):
    raw, at, chunks = Path(file).read_bytes(), 8, {}
    while at < len(raw):
        size, kind = struct.unpack(">I4s", raw[at:at + 8])
        chunks[kind], crc = raw[at + 8:at + 8 + size], raw[at + 8 + size:at + 12 + size]
        assert struct.unpack(">I", crc)[0] == zlib.crc32(kind + chunks[kind])
        at += 12 + size
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, width + 1)
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and kind == [8, 0, 0, 0, 0] and (rows[:, 0] == 0).all()
    return rows[:, 1:]

def test_png_decodes_to_what_was_written(tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (37, 53), np.uint8)
    train.write_whole(tmp_path / "new" / "a.png", sample.png(grey))
    assert (read_png(tmp_path / "new" / "a.png") == grey).all()

def test_killed_run_resumes_to_the_same_bits_and_samples(run, few, capsys):
    assert run(f"{UNET} --out whole.pt") == run(f"{UNET} --seed 1 --out other.pt") == 0
    options = [*UNET.split()[1:], "--save-every", "1", "--data", few]
    command = [sys.executable, HERE / "train.py", *options]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not Path("runs/unet.pt").exists(): time.sleep(0.01)
    killed.kill(), killed.wait()
    assert run(f"{UNET} --resume") == 0
    assert same(weights("whole.pt"), weights("runs/unet.pt"))
    assert not same(weights("whole.pt"), weights("other.pt"))
    assert run(f"{UNET} --resume") == 0 and "finished" in capsys.readouterr().out
    assert run(f"{UNET} --resume --lr 1") == 2 and "another lr" in capsys.readouterr().err
    assert run("sample.py --w 1 3 --steps 2") == 0                  # the newest run
    out = capsys.readouterr().out
    assert "220 samples of runs/unet.pt" in out and "8 network calls" in out
    assert read_png("samples.png").shape == (16 + 32 * 11 + 8, 2 * (320 + 8))
    assert run("sample.py --w 3 --steps 5 --trajectory --out t.png") == 0
    assert read_png("t.png").shape == (32 + 32 * 11 + 8, 32 * 11 + 8)

def test_ctrl_c_and_a_loss_that_is_not_finite_keep_the_last_good_step(run, monkeypatch, capsys):
    loss_of, calls = train.loss_of, []
    interrupted = lambda *a: signal.raise_signal(signal.SIGINT) or loss_of(*a)
    monkeypatch.setattr(train, "loss_of", interrupted)
    assert run(f"{UNET} --out a.pt") == 130 and torch.load("a.pt", weights_only=True)["step"] == 1
    monkeypatch.setattr(train, "loss_of", loss_of)
    assert run(f"{UNET} --out a.pt --resume") == run(f"{UNET} --out b.pt") == 0
    assert same(weights("a.pt"), weights("b.pt"))
    nan = lambda *a: loss_of(*a) * (math.nan if calls.append(0) or len(calls) > 3 else 1)
    monkeypatch.setattr(train, "loss_of", nan)
    assert run(f"{UNET} --save-every 2 --out c.pt") == 2 and "not finite" in capsys.readouterr().err
    assert torch.load("c.pt", weights_only=True)["step"] == 2
    assert all(v.isfinite().all() for v in weights("c.pt").values())
    monkeypatch.setattr(train, "loss_of", loss_of), monkeypatch.setattr(sys, "stdout", None)
    assert run(f"{UNET} --out d.pt") == 0                           # python train.py >&-

@pytest.mark.parametrize("path, predict", [("condot", "u"), ("condot", "eps"), ("cosine", "eps"),
                                           ("ddpm", "u"), ("ddpm", "eps")])
def test_every_sampler_serves_every_network(run, path, predict):
    assert run(f"{UNET} --path {path} --predict {predict}") == 0
    pictures = set()
    for options in ("euler", "heun", "em", "em --sigma 1", "ddim --noise 1", "em --interval 0 0.4"):
        assert run(f"sample.py --w 2 --n 2 --steps 4 --out a.npz --sampler {options}") == 0
        pictures.add(np.load("a.npz")["images"].tobytes())
    assert len(pictures) >= 5

def test_samples_depend_on_seed_and_index_alone(run, monkeypatch):
    assert run(UNET) == 0
    images, labels = [], []
    for n, chunk, seed in ((7, 100, 0), (12, 100, 0), (12, 5, 0), (12, 100, 1)):
        monkeypatch.setattr(sample, "CHUNK", chunk)
        assert run(f"sample.py --w 3 --sampler em --steps 3 --out a.npz --n {n} --seed {seed}") == 0
        with np.load("a.npz") as a:
            images.append(a["images"].astype(int)), labels.append(a["labels"])
    assert labels[1].tolist() == [*range(10), 0, 1] and images[1].shape == (12, 32, 32)
    rounding = [abs(images[0] - images[1][:7]).max(), abs(images[1] - images[2]).max()]
    assert max(rounding) <= 2 < abs(images[1] - images[3]).max()

def test_classifier_trains_guides_and_judges(run, capsys):
    assert run(UNET) == 0
    assert run("sample.py --w 3 --steps 2 --n 4 --guidance classifier") == 2    # none is there yet
    assert "train.py --arch classifier" in capsys.readouterr().err
    assert run("train.py --arch classifier --steps 60 --batch 32") == 0
    assert float(capsys.readouterr().out.split(" % of the test")[0].split()[-1]) > 25
    images = []
    for w, guidance in ((3, "classifier"), (0, "classifier"), (0, "cfg")):
        assert run(f"sample.py --w {w} --steps 2 --n 4 --guidance {guidance} --out a.npz") == 0
        assert "read as their label by runs/classifier.pt" in capsys.readouterr().out
        images.append(np.load("a.npz")["images"].astype(int))
    assert abs(images[0] - images[1]).max() > 2

@pytest.mark.parametrize("arch", ["dit", "unet"])
def test_latent_round_trip(run, few, arch, capsys):
    assert run("train.py --arch vae --steps 20 --batch 16 --out vae.pt") == 0
    assert "mean squared error" in capsys.readouterr().out
    assert run(f"train.py --arch {arch} --latent vae.pt --steps 6 --batch 8") == 0
    _, config = train.load_checkpoint(f"runs/latent_{arch}.pt")
    autoencoder, _ = train.load_checkpoint("vae.pt")
    z = autoencoder.encode(train.to_unit(train.load_data(few)[0])) * config["latent"]["scale"]
    assert abs(z.std() - 1) < 0.02
    assert run("sample.py --w 2 --n 4 --steps 2 --trajectory") == 0
    os.rename("vae.pt", "kept.pt")
    again = "sample.py --w 2 --n 4 --steps 2"
    assert run(again) == 2 and "vae.pt" in capsys.readouterr().err
    assert run("train.py --arch vae --steps 2 --batch 16 --seed 1 --out vae.pt") == 0
    assert run(again) == 2 and "another VAE" in capsys.readouterr().err

def test_two_processes_follow_one(run, few):
    """torchrun with N = 2 on CPUs: DistributedDataParallel over shares of one global batch."""
    losses, moves = [], []
    torch.manual_seed(0)
    first = torch.cat([p.flatten() for p in UNet().state_dict().values()])
    two = "-m torch.distributed.run --standalone --nproc_per_node=2".split()
    for launch, out in (([], "one.pt"), (two, "two.pt")):
        command = [sys.executable, *launch, HERE / "train.py", *UNET.split()[1:], "--out", out]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, "--data", few], check=True, env=env, capture_output=True)
        losses.append(float(done.stdout.decode().split("loss ")[1].split()[0]))
        moves.append(torch.cat([p.flatten() for p in weights(out).values()]) - first)
    difference = ((moves[0] - moves[1]).norm() / moves[0].norm()).item()
    assert abs(losses[0] - losses[1]) < 2e-3 and difference < 0.2, (losses, difference)

@pytest.mark.parametrize("zipped", [False, True])
def test_idx_folders_are_read_as_the_npz_is(tmp_path, few, zipped):
    with np.load(few) as npz:
        for key, name in (("x_train", "train-images-idx3"), ("y_train", "train-labels-idx1"),
                          ("x_test", "t10k-images-idx3"), ("y_test", "t10k-labels-idx1")):
            v = npz[key]
            raw = struct.pack(f">HBB{v.ndim}I", 0, 8, v.ndim, *v.shape) + v.tobytes()
            file = tmp_path / f"{name}-ubyte{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(raw) if zipped else raw)
        for a, b in zip(train.load_data(tmp_path), train.load_data(few)): assert torch.equal(a, b)
        assert a.dtype == torch.int64 and train.load_data(few)[0].shape == (300, 1, 32, 32)
        assert (train.load_data(few)[0][:, 0, 2:-2, 2:-2].numpy() == npz["x_train"]).all()

def test_bad_input_is_one_line_and_status_2_and_loses_nothing(run, few, capsys):
    assert run(f"{UNET} --out good.pt") == 0
    assert run("train.py --arch vae --steps 2 --out vae.pt --batch 8") == 0
    good = Path("good.pt").read_bytes()
    Path("cut.pt").write_bytes(good[:len(good) // 2])
    Path("empty.pt").touch(), Path("file").touch()
    torch.save({"config": {"arch": "dit", "net": {}}, "weights": weights("good.pt")}, "foreign.pt")
    torch.save(UNet(), "pickled.pt")
    whole = torch.load("good.pt", weights_only=True)
    torch.save({**whole, "config": {"arch": "unet", "net": {}}}, "bare.pt")
    with np.load(few) as npz: ok = dict(npz)
    x, y = ok["x_train"], ok["y_train"]
    for name, bad in {"float": dict(x_train=x / 2), "shape": dict(x_test=x[:, :20]),
                      "length": dict(y_train=y[:-1]), "label": dict(y_test=y + 8),
                      "none": dict(x_train=x[:0], y_train=y[:0]),
                      "object": dict(y_train=y.astype(object))}.items():
        np.savez(f"{name}.npz", **{**ok, **bad})
    np.savez("keys.npz", x_train=ok["x_train"])
    Path("trunc.npz").write_bytes(few.read_bytes()[:9999])
    names = "no float shape length label none object keys trunc".split()
    data = ["--data .", *(f"--data {name}.npz" for name in names)]
    trains = ("--steps 0", "--steps x", "--batch 0", "--eta 1.5", "--eta nan", "--lr 0", "--lr inf",
              "--ema 2", "--save-every 0", "--seed -1", "--device cuda:9", "--device tpu", "--what",
              "--latent no.pt", "--latent good.pt", "--out file/a.pt", *data,
              "--lr 1 --resume --out good.pt", "--resume --out cut.pt")
    samples = ("nan", "inf", "x", "1e38", "1 --label 10", "1 --label -1", "1 --n 0", "1 --steps 0",
               "1 --sampler rk4", "1 --sampler ddim --noise 1.1", "1 --noise 0.5", "1 --sigma 1",
               "1 --sampler em --sigma -1", "1 --interval 0.8 0.2", "1 --interval -1 2",
               "1 --seed -1", "1 --out a.jpg", "1 3 --out a.npz", "1 --out file/a.png", 
               "1 --device cuda:9", "1 --trajectory --out a.npz",
               *(f"1 --ckpt {n}.pt" for n in "no cut empty foreign pickled bare vae".split()))
    for line in ["train.py", "train.py --arch mlp", "train.py --arch vae --latent vae.pt",
                 "sample.py", *(f"{UNET} {bad}" for bad in trains),
                 *(f"sample.py --ckpt good.pt --steps 2 --n 2 --w {bad}" for bad in samples)]:
        assert run(line) == 2, line
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and len(err) > 20 and "Traceback" not in err, (line, err)
    assert Path("good.pt").read_bytes() == good and not [*Path().rglob(".*")]
