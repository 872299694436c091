"""Lecture 4, checked in numbers: from the path to what guidance samples, as in docs/notes.md.

Each section is one step of the derivation, and most tests are one equation, whose two sides are
computed on exact fields: `Mixture` (chapters/oracle.py) knows p_t(x|y), its score, u_t(x|y),
E[z|x, y] and p_t(y|x) of a mixture of Gaussians in closed form. So nothing here depends on a
network or on training. All other tests are in tests/.
"""
from functools import partial

import pytest
import torch
from torch.autograd.functional import jacobian
from torch.distributions import Normal

from cfg_min import NULL, cfg_cfm_loss, drop_labels, euler, euler_maruyama_step, guide, guided_field
from chapters.classifier import classifier_gradient, classifier_guided_field
from chapters.oracle import TWO, Mixture, tilted_moments
from paths import PATHS, CondOT

MIX = Mixture(                                  # four Gaussians of three classes, in the plane
    mu=[[-1.5, 0.5], [1.0, 1.2], [0.3, -1.4], [1.8, -0.2]],
    std=[0.3, 0.6, 0.4, 0.2],
    weight=[0.3, 0.3, 0.25, 0.15],
    label=[0, 0, 1, 2])
GAUSS = Mixture(mu=[[0.7]], std=[0.4], weight=[1.0], label=[0])     # one, on a line
MANY = torch.tensor([0, 1, 2, 1, 0, 2])         # a label for each of the points x
TIMES = 0.1, 0.45, 0.8, 0.97
ALL_PATHS = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
SCALES = pytest.mark.parametrize("w", [-1.0, 0.0, 1.0, 3.0, 8.0])


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def x():
    """Six points of the plane, (6, 2)."""
    return torch.randn(6, 2).double()


def double(value):
    return torch.as_tensor(value, dtype=torch.float64)


def labels(y, x):
    """The label y, or NULL, for every row of x."""
    return torch.full((len(x),), y)


def close(a, b, tol=1e-8):
    """Fail where a and b differ by more than tol + tol |b|."""
    torch.testing.assert_close(double(a), double(b), rtol=tol, atol=tol)


def distance(a, b):
    """The largest difference."""
    return (double(a) - double(b)).abs().max().item()


def gradient(f, x):
    """grad f at each row of x, for f: (B, ...) -> (B,); by autograd."""
    return jacobian(lambda v: f(v).sum(), x)


def divergence(f, x):
    """div f at each row of x, for f: (B, D) -> (B, D); by autograd."""
    return torch.einsum("bibi->b", jacobian(f, x))          # each row's own trace


def net_of(path, mixture=MIX):
    """The perfect network, net(x, t, y) -> u_t(x|y)."""
    return partial(mixture.u, path)


def classifier_of(path):
    """The perfect noisy classifier, (x, t) -> log p_t(y|x) for y = 0 ... 9."""
    return partial(MIX.log_posterior, path)


# ---------------------------------------------------------------- 1. the path
#
# Noise eps at t = 0 and data z at t = 1 are joined by x = alpha_t z + beta_t eps. The lecture's
# choice is alpha = t, beta = 1 - t (CondOT); every equation below holds for each such path.

@pytest.mark.parametrize("name, tol_alpha, tol_beta", [
    ("condot", 1e-7, 1e-7), ("cosine", 1e-7, 1e-7), ("ddpm", 0.007, 1e-4)])
def test_a_path_leads_from_noise_to_data(name, tol_alpha, tol_beta):
    """alpha_1 = beta_0 = 1, alpha_0 = beta_1 = 0; DDPM's nearly."""
    ends = double([0.0, 1.0])
    close(PATHS[name].alpha(ends), ends, tol_alpha)
    close(PATHS[name].beta(ends), 1 - ends, tol_beta)


@ALL_PATHS
def test_a_point_of_the_path_is_gaussian_with_mean_alpha_z_and_std_beta(path, x):
    """x = alpha z + beta eps, so p_t(x|z) = N(x; alpha z, beta^2 I)."""
    for t in TIMES:
        mean = path.sample(x, torch.zeros_like(x), t)
        std = path.sample(x, torch.ones_like(x), t) - mean
        close(mean, path.alpha(double(t)) * x)
        close(std, path.beta(double(t)).expand_as(x))


# ---------------------------------------------------------------- 2. its slopes
#
# A point of the path moves with u_t(x|z) = alpha' z + beta' eps: the conditional vector field.

@ALL_PATHS
def test_slopes_are_the_derivatives(path):
    """alpha' = d alpha/dt, beta' = d beta/dt."""
    t = torch.linspace(0.001, 0.999, 50).double()
    close(path.d_alpha(t), gradient(path.alpha, t))
    close(path.d_beta(t), gradient(path.beta, t))


@ALL_PATHS
def test_the_conditional_field_is_the_velocity_on_the_path(path, x):
    """u_t(x|z) = d/dt (alpha z + beta eps)."""
    eps = torch.randn_like(x)
    for t in TIMES:
        velocity = jacobian(lambda s: path.sample(x, eps, s), double(t))
        close(path.target(x, eps, t), velocity)


# ---------------------------------------------------------------- 3. four ways to say it
#
# x and u are linear in z and eps. So, at a given x, any one of u, score, eps and z gives the
# others: for one pair (z, eps), and also for the means over all pairs that meet in x. The mean of
# the u_t(x|z) is the marginal vector field u_t(x), which a network learns.

@ALL_PATHS
def test_u_gives_z_eps_and_score_of_one_pair_and_they_give_u(path, x):
    """Given z: u, score, eps and z say the same; score = grad log N(x; alpha z, beta^2 I)."""
    z = x
    eps = torch.randn_like(z)
    for t in (0.0, *TIMES, 1.0):                # at both ends too, where samplers need these two
        x_t = path.sample(z, eps, t)
        u = path.target(z, eps, t)
        close(path.u_to_data(u, x_t, t), z)
        close(path.u_to_eps(u, x_t, t), eps)
    for t in TIMES:
        x_t = path.sample(z, eps, t)
        u = path.target(z, eps, t)
        p = Normal(path.alpha(double(t)) * z, path.beta(double(t)))
        score = gradient(p.log_prob, x_t)
        close(path.u_to_score(u, x_t, t), score)
        close(path.score_to_u(score, x_t, t), u)
        close(path.eps_to_u(eps, x_t, t), u)
        close(path.eps_to_data(eps, x_t, t), z)
        close(path.data_to_u(z, x_t, t), u)


@ALL_PATHS
def test_the_marginal_field_gives_the_means_of_z_and_eps_and_the_marginal_score(path, x):
    """The same conversions for u_t(x|y): they give E[z|x, y], E[eps|x, y], grad log p_t(x|y)."""
    for t in TIMES:
        u = MIX.u(path, x, t, MANY)
        z, eps = MIX.data_and_eps(path, x, t, MANY)
        close(path.u_to_data(u, x, t), z)
        close(path.u_to_eps(u, x, t), eps)
        close(path.u_to_score(u, x, t), MIX.score(path, x, t, MANY), 1e-7)


@ALL_PATHS
def test_FACT_of_the_lecture_and_its_misprint(path, x):
    """u = a x + b score, b = (alpha' beta^2 - beta' beta alpha)/alpha; the slides drop a beta."""
    for t in TIMES:
        u = MIX.u(path, x, t, MANY)
        score = MIX.score(path, x, t, MANY)
        alpha, beta, d_alpha, d_beta = (f(double(t)) for f in (
            path.alpha, path.beta, path.d_alpha, path.d_beta))
        b = (d_alpha * beta**2 - d_beta * beta * alpha) / alpha
        close(path.a_b(t, x)[1], b.expand(6, 1))
        close(d_alpha / alpha * x + b * score, u)
    printed_b = (d_alpha * beta**2 - d_beta * alpha) / alpha
    assert distance(d_alpha / alpha * x + printed_b * score, u) > 1e-2


# ---------------------------------------------------------------- 4. Fokker-Planck
#
# Why the marginal field is worth learning: its ODE carries the noise to the data. The Fokker-Planck
# equation says how a density moves under dX = v dt + sigma dW, where v is the drift. It shows that
# X_t keeps the distribution p_t if v = u + sigma^2/2 score.

def fokker_planck_error(path, x, t, sigma, drift):
    """(d/dt p + div(p v) - sigma^2/2 laplace p) / p of p = p_t(x|y), for the drift v(x), y = 1."""
    y = labels(1, x)
    score = MIX.score(path, x, t, y)
    d_log_p = jacobian(lambda s: MIX.log_p(path, x, s, y), double(t))
    div_pv = divergence(drift, x) + (drift(x) * score).sum(dim=1)
    laplace = divergence(lambda v: MIX.score(path, v, t, y), x) + (score**2).sum(dim=1)
    return d_log_p + div_pv - sigma**2 / 2 * laplace


@ALL_PATHS
@pytest.mark.parametrize("sigma", [0.0, 0.5, 2.0])
def test_an_sde_keeps_to_p_t_if_its_drift_is_u_plus_half_sigma_squared_score(path, sigma, x):
    """d/dt p = -div(p v) + sigma^2/2 laplace p, v = u + sigma^2/2 score; sigma = 0 is the ODE."""
    for t in TIMES:
        def u(v):
            return MIX.u(path, v, t, labels(1, v))

        def drift(v):
            return u(v) + sigma**2 / 2 * MIX.score(path, v, t, labels(1, v))

        close(fokker_planck_error(path, x, t, sigma, drift), torch.zeros(6), 1e-7)
        if sigma > 0:                           # the handwritten notes print u alone
            assert fokker_planck_error(path, x, t, sigma, u).abs().max() > 1e-2


# ---------------------------------------------------------------- 5. CFM and FM: one gradient
#
# How it is learned: u_t(x) is unknown, but u_t(x|z) is known. As u_t(x) is its mean, the loss with
# either target has the same gradient (tests/test_losses.py), so the loss is least at u_t(x).

@ALL_PATHS
def test_the_conditional_loss_is_least_at_the_marginal_field(path):
    """d/dtheta E || u_t(x) + theta f(x) - u_t(x|z) ||^2 = 0 at theta = 0, whatever f is.

    The loss there is not 0 but the variance of u_t(x|z) at given x: for data N(mu, s^2),
    D^2 s^2 / (alpha^2 s^2 + beta^2).
    """
    z = GAUSS.draw(100000)
    theta = torch.zeros(3).double().requires_grad_()

    def model(x, t, y):
        return GAUSS.u(path, x, t, y) + theta[0] + theta[1] * x + theta[2] * x.sin()

    t = double(0.6)
    loss = cfg_cfm_loss(model, path, z, labels(0, z), eta=0.0, t=t)
    var = path.D(t)**2 * 0.4**2 / (path.alpha(t)**2 * 0.4**2 + path.beta(t)**2)
    close(loss, var, 0.02)
    slopes, = torch.autograd.grad(loss, theta)
    assert slopes.abs().max() < 0.02


# ---------------------------------------------------------------- 6. Bayes' rule
#
# What a label adds to the score of unlabelled data is the gradient of a classifier.

@ALL_PATHS
def test_bayes_rule_for_scores(path, x):
    """grad log p_t(x|y) = grad log p_t(x) + grad log p_t(y|x), as grad log p_t(y) = 0."""
    for t in TIMES:
        score = MIX.score(path, x, t, labels(NULL, x))
        score_y = MIX.score(path, x, t, MANY)
        grad = classifier_gradient(classifier_of(path), x, t, MANY)
        close(score_y, score + grad, 1e-7)
        assert distance(score_y, grad) > 1e-2   # the Markdown notes call log p_t(x|y) a classifier


# ---------------------------------------------------------------- 7. classifier guidance
#
# So the label adds b_t grad log p_t(y|x) to the field. Guidance adds w times as much.

@ALL_PATHS
def test_a_label_adds_b_times_the_classifiers_gradient_to_the_field(path, x):
    """u_t(x|y) = u_t(x) + b_t grad log p_t(y|x)."""
    for t in TIMES:
        u = MIX.u(path, x, t, labels(NULL, x))
        u_y = MIX.u(path, x, t, MANY)
        grad = classifier_gradient(classifier_of(path), x, t, MANY)
        _, b = path.a_b(t, x)
        close(u + b * grad, u_y, 1e-7)
    assert distance(u + grad, u_y) > 1e-2       # the handwritten notes leave b_t out once


@ALL_PATHS
@SCALES
def test_classifier_guidance_scales_the_classifiers_gradient(path, w, x):
    """u_t(x) + w b_t grad log p_t(y|x); and nothing is added where y is null."""
    y = MANY.clone()
    y[0] = NULL
    for t in TIMES:
        u = MIX.u(path, x, t, labels(NULL, x))
        grad = classifier_gradient(classifier_of(path), x, t, MANY)
        grad[0] = 0
        _, b = path.a_b(t, x)
        scales = torch.full((6,), w)            # w may be (B,): a scale for each sample
        guided = classifier_guided_field(net_of(path), classifier_of(path), path, x, t, y, scales)
        close(guided, u + w * b * grad)


# ---------------------------------------------------------------- 8. classifier-free guidance
#
# By Bayes' rule again, the classifier's gradient is a difference of two scores. That makes the
# guided field (1 - w) u_t(x|null) + w u_t(x|y), and no classifier is needed.

@ALL_PATHS
@SCALES
def test_classifier_guidance_is_classifier_free_guidance(path, w, x):
    """u_t(x) + w b_t grad log p_t(y|x) = (1 - w) u_t(x|null) + w u_t(x|y)."""
    for t in TIMES:
        u = MIX.u(path, x, t, labels(NULL, x))
        u_y = MIX.u(path, x, t, MANY)
        close(guide(u_y, u, w), (1 - w) * u + w * u_y)
        close(classifier_guided_field(net_of(path), classifier_of(path), path, x, t, MANY, w),
              guide(u_y, u, w), 1e-6)


@ALL_PATHS
def test_two_networks_guide_as_one_with_a_null_label_does(path, x):
    """Two models, u_t(x|y) and u_t(x), are one, with u_t(x) = u_t(x|null)."""
    unlabelled = Mixture(MIX.mu, MIX.std, MIX.weight, label=[0, 0, 0, 0])
    for t in TIMES:
        two = guide(MIX.u(path, x, t, MANY), unlabelled.u(path, x, t, labels(0, x)), 3.0)
        close(guided_field(net_of(path), x, t, MANY, 3.0), two)


# ---------------------------------------------------------------- 9. one rule in u, score, eps, z
#
# The weights 1 - w and w add to 1, so the rule is the same for all kinds of prediction. In scores
# it says what guidance aims at: the tilted distribution p_t(x|y)^w p_t(x)^(1-w).

@ALL_PATHS
@SCALES
def test_guidance_is_one_rule_in_u_score_eps_and_z(path, w, x):
    """(1 - w) m(x|null) + w m(x|y) for m = u, score, eps, z: one point, said in four ways."""
    null = labels(NULL, x)
    for t in TIMES:
        u = guide(MIX.u(path, x, t, MANY), MIX.u(path, x, t, null), w)
        score = guide(MIX.score(path, x, t, MANY), MIX.score(path, x, t, null), w)
        z_y, eps_y = MIX.data_and_eps(path, x, t, MANY)
        z, eps = MIX.data_and_eps(path, x, t, null)
        close(path.u_to_score(u, x, t), score, 1e-6)
        close(path.u_to_eps(u, x, t), guide(eps_y, eps, w), 1e-6)
        close(path.u_to_data(u, x, t), guide(z_y, z, w), 1e-6)


@ALL_PATHS
@SCALES
def test_the_guided_score_is_that_of_the_tilted_distribution(path, w, x):
    """score_w = grad log [p_t(y|x)^w p_t(x) / Z] = grad log [p_t(x|y)^w p_t(x)^(1-w)]."""
    for t in TIMES:
        def log_tilted(v):
            log_p_y = classifier_of(path)(v, t).gather(1, MANY[:, None])[:, 0]
            return w * log_p_y + MIX.log_p(path, v, t, labels(NULL, v))     # Z is a constant

        guided = guided_field(net_of(path), x, t, MANY, w)
        close(path.u_to_score(guided, x, t), gradient(log_tilted, x), 1e-6)


# ---------------------------------------------------------------- 10. the loss
#
# One network learns u_t(x|y) and u_t(x|null): now and then, the label is dropped.

class Recorder:
    """A network that remembers its calls."""

    def __init__(self, net):
        self.net = net
        self.calls = []

    def __call__(self, *inputs):
        self.calls.append(inputs)
        return self.net(*inputs)


def tiny(x, t, y):
    """A one-line network for images (B, C, H, W)."""
    return 0.3 * x + 0.2 * t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1).double().sin()


def call_loss(loss, net, path, **options):
    """The loss on 4000 images; their z and y; and the x, t (and labels) that net gets."""
    z = torch.randn(4000, 1, 2, 2).double()
    y = torch.arange(4000) % 10
    net = Recorder(net)
    value = loss(net, path, z, y, **options)
    (inputs,) = net.calls
    return value, z, y, *inputs


def check_draws(path, z, x, t):
    """t ~ U[0, 1) and x = alpha z + beta eps, eps ~ N(0, I), by their quantiles. Returns eps."""
    at_t = t.double().view(-1, 1, 1, 1)
    eps = (x - path.alpha(at_t) * z) / path.beta(at_t)
    for part in (eps, eps[t < 0.2]):
        q = Normal(0, 1).cdf(part.flatten().sort().values)
        assert distance(q, torch.linspace(0, 1, len(q))) < 0.03
    assert distance(t.sort().values, torch.linspace(0, 1, len(t))) < 0.03
    return eps


@pytest.mark.parametrize("null", [NULL, 4])
def test_labels_are_dropped_one_by_one_with_probability_eta(null):
    """y <- null with probability eta, in a new tensor."""
    y = torch.arange(null).repeat(2000)
    dropped = drop_labels(y, 0.1, null)
    assert torch.equal(y, torch.arange(null).repeat(2000))
    assert dropped.dtype == y.dtype
    changed = (dropped != y).view(-1, null)
    assert (dropped[changed.flatten()] == null).all()
    assert distance(changed.double().mean(dim=0), 0.1) < 0.025          # of each label
    assert torch.equal(drop_labels(y, 0.0, null), y)
    assert (drop_labels(y, 1.0, null) == null).all()


@ALL_PATHS
@pytest.mark.parametrize("options, eta", [({}, 0.1), (dict(eta=0.3, null=12), 0.3)])
def test_the_loss_is_that_of_conditional_flow_matching_with_dropped_labels(path, options, eta):
    """L_CFM^CFG = E || u_theta(x|y) - u_t(x|z) ||^2, (z, y) ~ p_data, t ~ U, x ~ p_t(x|z)."""
    loss, z, y, x, t, y_seen = call_loss(cfg_cfm_loss, tiny, path, **options)
    eps = check_draws(path, z, x, t)
    dropped = y_seen == options.get("null", NULL)
    assert abs(dropped.double().mean() - eta) < 0.02
    assert torch.equal(y_seen[~dropped], y[~dropped])
    at_t = t.view(-1, 1, 1, 1)
    target = path.d_alpha(at_t) * z + path.d_beta(at_t) * eps
    close(loss, ((tiny(x, t, y_seen) - target)**2).mean(), 1e-4)


# ---------------------------------------------------------------- 11. Algorithm 8
#
# Sampling: start from noise, follow the guided field. Each step calls the network once, on 2B.

@pytest.mark.parametrize("t", [0.3, torch.tensor([0.1, 0.2, 0.5, 0.9])], ids=["number", "(B,)"])
@pytest.mark.parametrize("w", [-1.0, 3.0, torch.tensor([0.0, 1.0, 3.0, 8.0])])
@pytest.mark.parametrize("null", [NULL, 4])
def test_the_guided_field_is_one_call_on_2B(w, t, null):
    """(1 - w) net(x, t, null) + w net(x, t, y); w (B,) is a scale for each sample."""
    x = torch.randn(4, 4, 4, 4).double()
    y = torch.tensor([0, 3, 4, 9])
    net = Recorder(tiny)
    out = guided_field(net, x, t, y, w, null)
    (x_seen, t_seen, y_seen), = net.calls
    assert len(x_seen) == len(t_seen) == len(y_seen) == 8
    for i in range(4):
        t_i = double(t).expand(4)[i:i + 1]
        w_i = double(w).expand(4)[i]
        cond = tiny(x[i:i + 1], t_i, y[i:i + 1])
        uncond = tiny(x[i:i + 1], t_i, torch.tensor([null]))
        close(out[i:i + 1], (1 - w_i) * uncond + w_i * cond, 1e-6)


@pytest.mark.parametrize("w", [0, 1.0])
def test_the_guided_field_at_w_0_and_1_is_one_call_on_B(w):
    """w = 0 is net(x, t, null), w = 1 is net(x, t, y), to the bit."""
    x = torch.randn(4, 4, 4, 4)
    given = torch.tensor([0, 3, 4, 9])
    y = given if w == 1 else labels(NULL, x)
    net = Recorder(tiny)
    out = guided_field(net, x, 0.3, given, w)
    (x_seen, _, _), = net.calls
    assert len(x_seen) == 4
    assert torch.equal(out, tiny(x, torch.full((4,), 0.3), y))


def test_algorithm_8_step_by_step(x):
    """X_0 ~ N(0, I); dX_t = [(1 - w) u_t(X_t|null) + w u_t(X_t|y)] dt from t = 0 to t = 1."""
    u = net_of(CondOT())
    ours = euler(partial(guided_field, u, y=MANY, w=3.0), x, steps=10)
    for k in range(10):
        t = k / 10
        x = x + 0.1 * ((1 - 3) * u(x, t, labels(NULL, x)) + 3 * u(x, t, MANY))
    close(ours, x)


def guided_quantiles(w, steps=200, path=CondOT(), mixture=TWO):
    """What Algorithm 8 for y = 1 makes of quantiles of N(0, 1), and their levels q; (400,) each.

    On a line the flow is increasing, so these are the quantiles of X_1, and their mean is E[X_1].
    """
    q = (torch.arange(400).double() + 0.5) / 400
    noise = Normal(0, 1).icdf(q)[:, None]
    field = partial(guided_field, net_of(path, mixture), y=labels(1, noise), w=w)
    return euler(field, noise, steps)[:, 0], q


@ALL_PATHS
def test_algorithm_8_samples_the_data_at_w_0_and_the_class_at_w_1(path):
    """X_1 ~ p at w = 0, X_1 ~ p(.|y) at w = 1: quantiles of the noise become those of the data."""
    of_class, q = guided_quantiles(1, path=path)
    close(Normal(1, 0.5).cdf(of_class), q, 0.008)
    of_all, _ = guided_quantiles(0, path=path)
    close((Normal(-1, 0.5).cdf(of_all) + Normal(1, 0.5).cdf(of_all)) / 2, q, 0.008)


# ---------------------------------------------------------------- 12. the SDE
#
# The same with noise: dX = [u + sigma_t^2/2 score] dt + sigma_t dW.

@ALL_PATHS
@pytest.mark.parametrize("sigma, sigma_t", [(0.5, 0.5), (lambda t: 1.5 * t, 0.75), (None, None)])
def test_a_step_of_euler_maruyama(path, sigma, sigma_t, x):
    """x + h (u + sigma_t^2/2 score) + sqrt(h) sigma_t xi; sigma_t^2 = 2 beta_t unless given."""
    t, h = 0.5, 0.05
    xi = torch.randn_like(x)
    if sigma_t is None:
        sigma_t = (2 * path.beta(double(t)))**0.5
    field = partial(net_of(path), y=MANY)
    step = euler_maruyama_step(field, x, t, t + h, path, sigma, lambda _: xi)
    drift = MIX.u(path, x, t, MANY) + sigma_t**2 / 2 * MIX.score(path, x, t, MANY)
    close(step, x + h * drift + h**0.5 * sigma_t * xi)


# ---------------------------------------------------------------- 13. what w does
#
# At w = 0 and 1 samples follow the data. At any other w they do not follow the tilted distribution,
# though the guided score is its score at every t. Bradley & Nakkiran 2024, arXiv 2408.09000.

def test_guidance_at_w_3_goes_beyond_the_tilted_distribution_and_any_mixture():
    """Two Gaussians, y = +1: mean 1.5, std .3; tilted p(.|y)^3 p^-2: 1.05, .46.

    A mixture of p(.|y) and p has its mean in [0, 1]; the Markdown notes say that X_1 follows one.
    """
    x, _ = guided_quantiles(3)
    close([x.mean(), x.std()], [1.52, 0.31], 0.013)
    close(tilted_moments(TWO, 1, 3), [1.05, 0.46], 0.005)
    for w in (0, 1):                            # without guidance the two are one distribution
        x, _ = guided_quantiles(w)
        close([x.mean(), x.std()], tilted_moments(TWO, 1, w), 0.01)


def test_the_guided_field_aims_w_times_as_far_as_the_class_while_x_is_noise():
    """The mean of p_t(x|y)^w p_t(x)^(1-w), divided by alpha_t, goes from w at t = 0 to 1.05 at 1.

    If the tilted data were noised instead, it would be 1.05 at every t.
    """
    aims = [tilted_moments(TWO, 1, 3, t)[0] / t for t in (0.01, 0.3, 0.5, 1.0)]
    close(aims, [3.00, 2.31, 1.54, 1.05], 0.005)


def test_more_w_trades_diversity_for_clarity():
    """The larger w, the smaller the spread of X_1, and the surer the classifier of its label."""
    spread, doubt = [], []
    for w in (1, 2, 3, 5):
        x, _ = guided_quantiles(w)
        spread.append(x.std())
        doubt.append(1 - TWO.posterior(CondOT(), x[:, None], 1.0)[:, 1].mean())
    assert spread == sorted(spread, reverse=True)
    assert doubt == sorted(doubt, reverse=True)
    assert doubt[-1] < doubt[0] / 10
