"""The DDPM lecture, checked in numbers: its chain, ELBO and L_simple, sampling, guided sampling.

Its letters: x_k for k = 0 ... T is x at t = 1 - k/T, x_0 the data. a_k = 1 - beta_k (its alpha_t),
abar_k their product: alpha = sqrt(abar), beta = sqrt(1 - abar). gamma is our w.
"""
import math
from functools import partial

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from conftest import line
from test_cfg import (ALL_PATHS, GAUSS, MANY, MIX, SCALES, TIMES, call_loss, check_draws,
                      classifier_of, close, distance, double, gradient, labels, net_of, tiny)

from cfg_min import NULL, guide
from chapters.classifier import classifier_gradient, classifier_guided_field
from chapters.ddpm import cfg_dsm_loss, ddim
from chapters.oracle import TWO
from paths import DDPM, CondOT, GaussianPath

T = 1000
BETAS = line(1e-4, 0.02, T)                     # of steps 1 ... T; Ho et al. 2020
ABAR = torch.cat([double([1.0]), torch.cumprod(1 - BETAS, dim=0)])          # of times 0 ... T


def rates(k):
    """a_k, abar_k, abar_(k-1) and beta~_k."""
    a, abar, prev = 1 - BETAS[k - 1], ABAR[k], ABAR[k - 1]
    return a, abar, prev, (1 - a) * (1 - prev) / (1 - abar)


def mu_of(x, eps, k):
    """mu_theta = x / sqrt(a) - (1 - a) / sqrt(a (1 - abar)) eps_theta."""
    a, abar, _, _ = rates(k)
    return x / a.sqrt() - (1 - a) / (a * (1 - abar)).sqrt() * eps


class Chain(GaussianPath):
    """The chain as a path: abar_k from t = 1 - k/T on. Its slopes only give u its meaning."""

    def step(self, t): return (T * (1 - t) - 1e-6).ceil().long()
    def alpha(self, t): return ABAR[self.step(t)].sqrt()
    def beta(self, t): return (1 - ABAR[self.step(t)]).sqrt()
    def d_alpha(self, t): return torch.ones_like(t)
    def d_beta(self, t): return -torch.ones_like(t)


STEPS = pytest.mark.parametrize("k", [2, 50, 500, 1000])


# ---------------------------------------------------------------- the chain

def test_steps_of_the_chain_compose_to_abar():
    """q(x_t|x_{t-1}) = N(sqrt(a) x_{t-1}, 1 - a), t times, is N(sqrt(abar) x_0, 1 - abar)."""
    mean, var = double(1.0), double(0.0)        # of x_k for x_0 = 1
    composed = [(mean, var)]
    for beta in BETAS:
        mean = (1 - beta).sqrt() * mean
        var = (1 - beta) * var + beta
        composed.append((mean, var))
    close(composed, torch.stack([ABAR.sqrt(), 1 - ABAR], dim=1))


def test_the_path_ddpm_is_the_chain_in_continuous_time():
    """alpha = sqrt(abar) at t = 1 - t_DDPM / T, and alpha^2 + beta^2 = 1."""
    t = 1 - torch.arange(T + 1).double() / T
    close(DDPM().alpha(t), ABAR.sqrt(), 2e-3)
    close(DDPM().alpha(t)**2 + DDPM().beta(t)**2, torch.ones(T + 1))


@STEPS
def test_the_posterior_of_a_step_is_the_product_of_two_gaussians(k, x):
    """q(x_{t-1}|x_t, x_0) ~ N(x_{t-1}; sqrt(prev) x_0, 1 - prev) N(x_t; sqrt(a) x_{t-1}, 1 - a)."""
    a, abar, prev, var = rates(k)
    eps = torch.randn_like(x)
    x_t = abar.sqrt() * x + (1 - abar).sqrt() * eps
    precision = 1 / (1 - prev) + a / (1 - a)
    mean = (prev.sqrt() * x / (1 - prev) + a.sqrt() * x_t / (1 - a)) / precision
    close(1 / precision, var)                   # beta~
    close(mu_of(x_t, eps, k), mean)             # mu~


@STEPS
def test_a_term_of_the_elbo_is_the_weighted_error_of_eps(k, x):
    """L_t = KL(q || p) = (1 - a)^2 / (2 beta~ a (1 - abar)) || eps - eps_theta ||^2."""
    a, abar, _, var = rates(k)
    eps, eps_theta = torch.randn(2, 6, 2).double()
    q = Independent(Normal(mu_of(x, eps, k), var.sqrt()), 1)
    p = Independent(Normal(mu_of(x, eps_theta, k), var.sqrt()), 1)
    weight = (1 - a)**2 / (2 * var * a * (1 - abar))
    close(kl_divergence(q, p), weight * ((eps - eps_theta)**2).sum(dim=1))


# ---------------------------------------------------------------- the ELBO of a Gaussian, exactly

SPREAD = (ABAR * 0.4**2 + 1 - ABAR).sqrt()      # std of x_k for the data N(0.7, 0.4^2), k = 0 ... T
Q_0 = Normal(double(0.7), SPREAD[0])
Q_T = Normal(ABAR[-1].sqrt() * 0.7, SPREAD[-1])
P_T = Normal(double(0.0), 1.0)                  # the prior
K = torch.arange(1, T + 1)


def reverse_chain():
    """For the exact eps: slope and shift of mu_theta(x, k); the variance of q(x_{k-1}|x_k)."""
    def mu(x):
        x = torch.full((T, 1), x).double()
        _, eps = GAUSS.data_and_eps(Chain(), x, 1 - K / double(T), labels(0, x))
        return mu_of(x[:, 0], eps[:, 0], K)

    return mu(1.0) - mu(0.0), mu(0.0), BETAS * SPREAD[:-1]**2 / SPREAD[1:]**2


def elbo(x_0, slope, shift, var, prior):
    """E log p(x_0|x_1) - KL(q(x_T|x_0) || p(x_T)) - sum_{t=2}^T E KL(q(x_{t-1}|x_t, x_0) || p)."""
    a, abar, prev, beta_tilde = rates(K)
    x_k = abar.sqrt() * x_0                     # mean of q(x_k|x_0); its variance is 1 - abar
    by_x_k = a.sqrt() * (1 - prev) / (1 - abar)             # mu~ = by_x_k x_k + by_x_0 x_0
    by_x_0 = (1 - a) * prev.sqrt() / (1 - abar)
    gap = (by_x_k - slope) * x_k + by_x_0 * x_0 - shift     # mean of mu~ - mu_theta
    square = gap**2 + (by_x_k - slope)**2 * (1 - abar)
    ratio = beta_tilde / var
    L = square / (2 * var) + (ratio - 1 - ratio.log()) / 2
    reconstruction = -(2 * math.pi * var[0]).log() / 2 - square[0] / (2 * var[0])
    q_T = Normal(x_k[-1], (1 - abar[-1]).sqrt())
    return reconstruction - kl_divergence(q_T, prior) - L[1:].sum()


@pytest.mark.parametrize("x_0", [-1.0, 0.7, 2.0])
def test_the_elbo_of_the_exact_reverse_chain_is_log_p(x_0):
    """p(x_{t-1}|x_t) = q(x_{t-1}|x_t) and p(x_T) = q(x_T): log p(x) = L(q, theta), with no gap."""
    close(elbo(x_0, *reverse_chain(), Q_T), Q_0.log_prob(double(x_0)))


@pytest.mark.parametrize("x_0", [-1.0, 0.7, 2.0])
def test_the_elbo_of_ddpm_is_a_bound(x_0):
    """log p(x) >= L(q, theta), p(x_0) the distribution at the end of the chain from N(0, I).

    The variances are beta~, as the lecture assumes; but beta~_1 = 0, so not in the last step.
    """
    slope, shift, exact_var = reverse_chain()
    _, _, _, var = rates(K)
    var[0] = exact_var[0]
    mean_k, var_k = P_T.mean, P_T.variance
    for k in range(T - 1, -1, -1):
        mean_k = slope[k] * mean_k + shift[k]
        var_k = slope[k]**2 * var_k + var[k]
    log_p = Normal(mean_k, var_k.sqrt()).log_prob(double(x_0))
    gap = log_p - elbo(x_0, slope, shift, var, P_T)
    assert 1e-3 < gap < 2


# ---------------------------------------------------------------- training

@ALL_PATHS
def test_the_dsm_loss_is_the_squared_error_of_eps(path):
    """E || eps_theta(x|y) - eps ||^2, y dropped with probability eta; on DDPM it is L_simple.

    There t ~ U[0, 1) is t_DDPM ~ U{1, ..., T}, as sampling needs; the lecture also prints U{2, T}.
    At each t, || s_theta - grad log p_t(x|z) ||^2, the printed loss, is this one over beta_t^2. So
    its mean over t is infinite: as int dt / (1 - t)^2 on CondOT and Cosine, int dt / (1 - t) on
    DDPM.
    """
    loss, z, y, x, t, y_seen = call_loss(cfg_dsm_loss, tiny, path, eta=0.3)
    eps = check_draws(path, z, x, t)
    dropped = y_seen == NULL
    assert abs(dropped.double().mean() - 0.3) < 0.02
    assert torch.equal(y_seen[~dropped], y[~dropped])
    eps_theta = tiny(x, t, y_seen)
    close(loss, ((eps_theta - eps)**2).mean(), 1e-6)
    at_t = t.double().view(-1, 1, 1, 1)
    beta = path.beta(at_t)
    score = gradient(Normal(path.alpha(at_t) * z, beta).log_prob, x)        # grad log p_t(x|z)
    close((-eps_theta / beta - score)**2, (eps_theta - eps)**2 / beta**2, 1e-6)
    near, nearer = path.beta(double([1 - 1e-5, 1 - 1e-6]))**2
    close(near / nearer, 10 if isinstance(path, DDPM) else 100, 1e-3)       # the power of 1 - t


# ---------------------------------------------------------------- sampling

def lecture_sampling(eps_theta, x, noise, push=None):
    """x_{k-1} = mu_theta(x_k, k) + sqrt(beta~_k) xi for k = K, ..., 1; noise: K times xi.

    push(mu, k - 1) gives gamma g of the first "Guided sampling", for mu + beta~ gamma g.
    """
    for k in range(len(noise), 0, -1):
        _, _, _, var = rates(k)
        mu = mu_of(x, eps_theta(x, k), k)
        if push:
            mu = mu + var * push(mu, 1 - (k - 1) / T)
        x = mu + var.sqrt() * noise[k - 1]
    return x


def our_sampling(field, x, noise, path=Chain(), push=None):
    """The same by ddim with noise 1."""
    left = list(noise)                          # of the steps K, ..., 1: the last first
    return ddim(field, x, len(noise), path, noise=1.0, push=push, t0=1 - len(noise) / T,
                randn=lambda _: left.pop())


def eps_of(x, k, y):
    """The perfect network of the lecture, eps_theta(x, k) for the labels y."""
    return MIX.data_and_eps(Chain(), x, 1 - k / T, y)[1]


def g_of(x, t):
    """gamma grad log p(y|x), of the perfect classifier, for gamma = 3."""
    return 3 * classifier_gradient(partial(MIX.log_posterior, Chain()), x, t, MANY)


@pytest.mark.parametrize("path, tol", [(Chain(), 1e-8), (DDPM(), 0.03)], ids=["chain", "ddpm"])
def test_ddim_with_noise_1_is_the_lectures_sampling(path, tol, x):
    """Box "Sampling", all T steps: on the chain exactly, on the path DDPM nearly."""
    noise = torch.randn(T, 6, 2).double()
    ours = our_sampling(partial(MIX.u, path, y=MANY), x, noise, path)
    assert distance(ours, lecture_sampling(partial(eps_of, y=MANY), x, noise)) < tol


def test_ddim_with_a_push_is_the_lectures_first_guided_sampling(x):
    """x_{k-1} = mu_theta + beta~ gamma g + sqrt(beta~) xi; the lecture prints sqrt(beta~) g."""
    noise = torch.randn(100, 6, 2).double()     # from k = 100 on
    null = labels(NULL, x)
    ours = our_sampling(partial(MIX.u, Chain(), y=null), x, noise, push=g_of)
    close(ours, lecture_sampling(partial(eps_of, y=null), x, noise, g_of))


def test_ddim_on_the_classifier_guided_field_is_the_lectures_second_guided_sampling(x):
    """eps^ = eps_theta - gamma sqrt(1 - abar) g, mu_theta of it, + sqrt(beta~) xi."""
    noise = torch.randn(100, 6, 2).double()
    null = labels(NULL, x)
    classifier = partial(MIX.log_posterior, Chain())
    field = partial(classifier_guided_field, partial(MIX.u, Chain()), classifier, Chain(), y=MANY,
                    w=3.0)

    def corrected(x, k):
        return eps_of(x, k, null) - (1 - ABAR[k]).sqrt() * g_of(x, 1 - k / T)

    close(our_sampling(field, x, noise), lecture_sampling(corrected, x, noise), 1e-6)


@ALL_PATHS
def test_noise_scales_the_new_noise_of_a_step_of_ddim(path, x):
    """sigma = noise sqrt(beta~): what xi does to X_1 is in proportion to noise."""
    def effect(noise):
        ends = [ddim(lambda x, t: x, x, 2, path, noise, t0=0.5, randn=lambda x: xi + 0 * x)
                for xi in (1, 0)]
        return ends[0] - ends[1]

    close(effect(0.3), 0.3 * effect(1.0))


# ---------------------------------------------------------------- guided sampling, derived

def pair_through_x_0(k, y, x_prev, x_t):
    """q(x_{t-1}, x_t|y) = int q(x_0|y) q(x_t|x_0) q(x_{t-1}|x_t, x_0) dx_0, matrices alike."""
    _, abar, _, var = rates(k)
    x_0 = line(-5, 5, 801)[:, None]
    q_0 = TWO.log_p(CondOT(), x_0, 1.0, labels(y, x_0)).exp() / 80          # dx_0 is 1/80
    x_0 = x_0[:, :, None]                       # (801, 1, 1)
    eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
    q_t = Normal(abar.sqrt() * x_0, (1 - abar).sqrt()).log_prob(x_t).exp()
    q_prev = Normal(mu_of(x_t, eps, k), var.sqrt()).log_prob(x_prev).exp()
    return (q_0[:, None, None] * q_t * q_prev).sum(dim=0)


@pytest.mark.parametrize("k", [100, 700])
def test_a_label_depends_on_the_less_noisy_point_alone(k):
    """q(y|x_{t-1}, x_t) = q(y|x_{t-1}); so q(x_{t-1}|x_t, y) ~ q(y|x_{t-1}) q(x_{t-1}|x_t)."""
    x_prev = line(-1.5, 1.5, 7)[:, None]
    x_t = x_prev + BETAS[k - 1].sqrt() * line(-2, 2, 5)             # (7, 5)
    q = torch.stack([pair_through_x_0(k, y, x_prev, x_t) for y in (0, 1)])
    q_y = q / q.sum(dim=0)                      # of two labels, equally likely
    classifier = TWO.posterior(Chain(), x_prev, 1 - (k - 1) / T)[:, :2]
    for j in range(5):
        close(q_y[:, :, j], classifier.T, 1e-6)


def step_of_ddpm(mixture, x, h):
    """A step from t = 0.6 - h to s = 0.6: mu of any eps, the exact eps, beta_t and beta~."""
    t, s = double(0.6 - h), double(0.6)
    beta, beta_s = DDPM().beta(t), DDPM().beta(s)
    a = DDPM().alpha(t)**2 / DDPM().alpha(s)**2
    _, eps = mixture.data_and_eps(DDPM(), x, 0.6 - h, labels(NULL, x))

    def mu(eps):
        return x / a.sqrt() - (1 - a) / (a.sqrt() * beta) * eps

    return mu, eps, beta, (1 - a) * beta_s**2 / beta**2


def test_taylors_step_is_right_as_the_step_vanishes():
    """p(y|v) N(v; mu, beta~) has mean mu + beta~ g, g = grad log p(y|mu), as beta~ goes to 0.

    The lecture prints sqrt(beta~) g.
    """
    x = double([[-0.8], [0.2], [0.5]])
    y = labels(1, x)
    errors = {}
    for h in (0.1, 0.01):
        mu, eps, _, var = step_of_ddpm(TWO, x, h)
        g = classifier_gradient(partial(TWO.log_posterior, DDPM()), mu(eps), 0.6, y)
        v = mu(eps) + line(-8, 8, 2001) * var.sqrt()        # (3, grid)
        log_p_y = TWO.log_posterior(DDPM(), v.reshape(-1, 1), 0.6)[:, 1].view_as(v)
        p = (log_p_y + Normal(mu(eps), var.sqrt()).log_prob(v)).softmax(dim=1)
        moved = (p * (v - mu(eps))).sum(dim=1, keepdim=True)
        errors[h] = distance(moved / (var * g), 1.0)
    assert errors[0.1] < 0.5
    assert errors[0.01] < errors[0.1] / 5


def test_the_two_guided_samplings_agree_only_as_the_step_vanishes(x):
    """mu + beta~ grad log p(y|mu), against mu of the corrected eps: one, to first order in h."""
    classifier = partial(MIX.log_posterior, DDPM())
    errors = {}
    for h in (0.1, 0.01, 0.001):
        mu, eps, beta, var = step_of_ddpm(MIX, x, h)
        by_mean = var * classifier_gradient(classifier, mu(eps), 0.6, MANY)
        corrected = eps - beta * classifier_gradient(classifier, x, 0.6 - h, MANY)
        by_eps = mu(corrected) - mu(eps)
        errors[h] = ((by_mean - by_eps).norm() / by_eps.norm()).item()
    assert errors[0.1] > 0.03
    assert errors[0.01] < errors[0.1] / 3
    assert errors[0.001] < errors[0.01] / 3


@ALL_PATHS
@SCALES
def test_guided_noise_is_corrected_by_the_classifier(path, w, x):
    """eps^ = eps - w beta_t grad log p_t(y|x) = (1 - w) eps(x|null) + w eps(x|y); DDPM lecture."""
    for t in TIMES:
        _, eps = MIX.data_and_eps(path, x, t, labels(NULL, x))
        _, eps_y = MIX.data_and_eps(path, x, t, MANY)
        grad = classifier_gradient(classifier_of(path), x, t, MANY)
        corrected = eps - w * path.beta(double(t)) * grad
        close(guide(eps_y, eps, w), corrected, 1e-6)
        u = classifier_guided_field(net_of(path), classifier_of(path), path, x, t, MANY, w)
        close(path.u_to_eps(u, x, t), corrected, 1e-6)


@ALL_PATHS
@pytest.mark.parametrize("w", [-1.0, 3.0])
def test_the_normaliser_with_a_gradient_is_that_of_the_tilted_classifier(path, w, x):
    """Z(x) = sum_y p_t(y|x)^w has a gradient, except at w = 0 and 1; DDPM lecture, exercise."""
    for t in TIMES:
        def log_z(v, w):
            log_p = classifier_of(path)(v, t)[:, :3]        # the labels that occur
            return (w * log_p).logsumexp(dim=1)

        assert gradient(partial(log_z, w=w), x).abs().max() > 1e-3
        close(gradient(partial(log_z, w=1.0), x), torch.zeros(6, 2))
