"""The notes' derivations, executed: paths, guidance, losses, DDPM, samplers; then the networks.

The oracle, a labelled mixture of Gaussians (oracle.py), knows p_t(x), p_t(x|y), p_t(y|x), score, u,
E[z|x] and E[eps|x] on every path, in closed form: an equation of the notes becomes a test, without
network or training. It is itself tested first, against autograd and quadrature. All in float64.

`000` ... `004` are the notes, by their first three digits; the commands are in test_commands.py.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.functional import jacobian
from torch.distributions import (Categorical, Independent, MixtureSameFamily, Normal,
                                 kl_divergence)

import cfg_min
import dit
import oracle
import train
import vae
from cfg_min import (NULL, adams_bashforth, ddim, euler, euler_maruyama, guide, guided_field,
                     heun, predictor_corrector, times)
from checkpoint import LATENT_OPTIONS, vector_field
from paths import DDPM, PATHS, CondOT, GaussianPath
from unet import NoisyClassifier, UNet

ALL_PATHS = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
TIMES = (0.1, 0.45, 0.8, 0.97)

MIX = oracle.Mixture(                           # in the plane
    mu=[[-1.5, 0.5], [1.0, 1.2], [0.3, -1.4], [1.8, -0.2]],
    std=[0.3, 0.6, 0.4, 0.2],
    weight=[0.3, 0.3, 0.25, 0.15],
    label=[0, 0, 1, 2])
LINE = oracle.TWO                               # -1 and +1 on a line, of labels 0 and 1


def law_distance(samples, cdf):
    """Kolmogorov's sup |F_n - F|, of samples (n,) from F; 1.6 / sqrt(n) is exceeded once in 100."""
    n = len(samples)
    F_n = (torch.arange(n).double() + 0.5) / n
    return distance(cdf(samples.double().sort().values), F_n)


def data_law_distance(samples, y):
    """law_distance of points of the plane from MIX's p(z|y): the largest along four directions."""
    weight = MIX.log_weight[:, y].exp()[None]                       # (1, K)
    distances = []
    for angle in (0, math.pi / 4, math.pi / 2, 3 * math.pi / 4):
        direction = double([math.cos(angle), math.sin(angle)])
        parts = Normal(MIX.mu @ direction, MIX.std)                 # a Gaussian for each component

        def cdf(v):
            return (weight * parts.cdf(v[:, None])).sum(dim=1)

        distances.append(law_distance(samples @ direction, cdf))
    return max(distances)


@pytest.fixture
def x():
    """Six points of the plane."""
    torch.manual_seed(0)
    return torch.randn(6, 2).double()


def double(v):
    return torch.as_tensor(v, dtype=torch.float64)


def line(start, end, n):
    """n numbers from start to end, in equal steps."""
    return torch.linspace(start, end, n, dtype=torch.float64)


def close(a, b, tol=1e-8):
    torch.testing.assert_close(double(a), double(b), rtol=tol, atol=tol)


def distance(a, b):
    """The largest difference."""
    return (a - b).abs().max().item()


def labels(y, x):
    """The label y, or NULL, for every row of x."""
    return torch.full((len(x),), y)


def gradient(f, x):
    """grad f at each row of x, for f: (B, ...) -> (B,)."""
    return jacobian(lambda v: f(v).sum(), x)


def divergence(f, x):
    """div f at each row of x, for f: (B, D) -> (B, D)."""
    return torch.stack([jacobian(f, row[None])[0, :, 0].trace() for row in x])


# ---------------------------------------------------------------- the oracle

@ALL_PATHS
@pytest.mark.parametrize("y", [NULL, 0, 2])
def test_oracle_is_the_mixture_of_its_components(path, y, x):
    """p_t(x|y) = sum_k weight_k N(x; alpha mu_k, alpha^2 std_k^2 + beta^2), for k of class y."""
    inside = (MIX.label == y) | torch.tensor(y == NULL)
    alpha = path.alpha(double(0.6))
    beta = path.beta(double(0.6))
    std = (alpha**2 * MIX.std**2 + beta**2).sqrt()[inside]
    parts = Independent(Normal(alpha * MIX.mu[inside], std[:, None]), 1)
    law = MixtureSameFamily(Categorical(MIX.weight[inside]), parts)
    close(MIX.log_p(path, x, 0.6, labels(y, x)), law.log_prob(x))


@pytest.mark.parametrize("y", [NULL, 0, 2])
def test_oracle_draws_from_its_law(y):
    """z ~ p(z|y)."""
    torch.manual_seed(0)
    assert data_law_distance(MIX.draw(4000, y), y) < 0.03


@ALL_PATHS
@pytest.mark.parametrize("y", [NULL, 0, 2])
def test_oracle_score_is_the_gradient_of_its_log_p(path, y, x):
    """score = grad log p_t(x|y), by autograd."""
    def log_p(v):
        return MIX.log_p(path, v, 0.6, labels(y, v))

    close(MIX.score(path, x, 0.6, labels(y, x)), gradient(log_p, x))


def joint_on_a_grid(path, x, t, y):
    """Data points z on a grid of the plane, (N, 2), and p_t(x|z) p(z|y) dz for each x, (B, N)."""
    z = torch.cartesian_prod(line(-6, 6, 241), line(-6, 6, 241))
    p_z = MIX.log_p(CondOT(), z, 1.0, labels(y, z)).exp() * 0.05**2             # at t = 1, x is z
    close(p_z.sum(), 1.0, 1e-6)
    p_xz = Normal(path.alpha(t) * z, path.beta(t)).log_prob(x[:, None]).sum(dim=2).exp()
    return z, p_xz * p_z


@ALL_PATHS
@pytest.mark.parametrize("y", [NULL, 0, 2])
def test_oracle_is_what_quadrature_over_the_data_gives(path, y, x):
    """p_t(x|y) = int p_t(x|z) p(z|y) dz; u, E[z|x] and E[eps|x] are means over p_t(z|x, y)."""
    t = double(0.6)
    z, joint = joint_on_a_grid(path, x, t, y)
    y = labels(y, x)
    p_x = joint.sum(dim=1)
    close(MIX.log_p(path, x, t, y).exp(), p_x, 1e-6)

    posterior = (joint / p_x[:, None])[:, :, None]                  # p_t(z|x, y), (B, N, 1)
    eps = (x[:, None] - path.alpha(t) * z) / path.beta(t)           # the noise that leads z to x
    u_xz = path.target(z.expand_as(eps), eps, t)                    # u_t(x|z)
    mean_z, mean_eps = MIX.data_and_eps(path, x, t, y)
    close(mean_z, (posterior * z).sum(dim=1), 1e-6)
    close(mean_eps, (posterior * eps).sum(dim=1), 1e-6)
    close(MIX.u(path, x, t, y), (posterior * u_xz).sum(dim=1), 1e-5)


@ALL_PATHS
def test_oracle_posterior_is_bayes_rule(path, x):
    """p_t(y|x) = p(y) p_t(x|y) / p_t(x); the classifier is its logarithm."""
    posterior = MIX.posterior(path, x, 0.6)
    assert posterior.shape == (6, 10)
    p_x = MIX.log_p(path, x, 0.6, labels(NULL, x)).exp()
    for y, p_y in enumerate([0.6, 0.25, 0.15]):
        p_x_given_y = MIX.log_p(path, x, 0.6, labels(y, x)).exp()
        close(posterior[:, y], p_y * p_x_given_y / p_x)
    close(posterior.sum(dim=1), torch.ones(6))
    close(MIX.classifier(path)(x, 0.6).exp(), posterior)


@ALL_PATHS
def test_oracle_takes_a_time_and_a_label_for_each_row(path, x):
    """A batch of (x, t, y) gives what its rows give alone."""
    t = double([0.1, 0.3, 0.5, 0.6, 0.8, 0.9])
    y = torch.tensor([0, 1, 2, NULL, 2, 0])
    together = MIX.net(path)(x, t, y)
    for i in range(6):
        close(together[i:i + 1], MIX.net(path)(x[i:i + 1], t[i], y[i:i + 1]))


# ---------------------------------------------------------------- paths and conversions

@ALL_PATHS
def test_slopes_are_the_derivatives(path):
    """alpha' = d alpha/dt, beta' = d beta/dt."""
    t = line(0.001, 0.999, 50)
    close(path.d_alpha(t), gradient(path.alpha, t))
    close(path.d_beta(t), gradient(path.beta, t))


@pytest.mark.parametrize("name, tol_alpha, tol_beta", [
    ("condot", 1e-7, 1e-7), ("cosine", 1e-7, 1e-7), ("ddpm", 0.007, 1e-4)])
def test_paths_go_from_noise_to_data(name, tol_alpha, tol_beta):
    """alpha_1 = beta_0 = 1, alpha_0 = beta_1 = 0 (`000`, which prints omega_0); DDPM almost."""
    ends = double([0.0, 1.0])
    close(PATHS[name].alpha(ends), ends, tol_alpha)
    close(PATHS[name].beta(ends), 1 - ends, tol_beta)


@ALL_PATHS
def test_u_score_eps_and_z_say_the_same_on_a_conditional_path(path, x):
    """x = alpha z + beta eps follows N(alpha z, beta^2 I); each conversion returns its part."""
    z = x
    eps = torch.randn_like(z)
    for t in (0.0, *TIMES, 1.0):
        x_t = path.sample(z, eps, t)
        u = path.target(z, eps, t)
        close(path.u_to_data(u, x_t, t), z)
        close(path.u_to_eps(u, x_t, t), eps)
    for t in (0.0, *TIMES):
        x_t = path.sample(z, eps, t)
        alpha, beta, _, _ = path.at(t, z)
        score = gradient(Normal(alpha * z, beta.expand_as(z)).log_prob, x_t)    # grad log p_t(x|z)
        close(path.u_to_score(path.target(z, eps, t), x_t, t), score)
    for t in TIMES:
        x_t = path.sample(z, eps, t)
        u = path.target(z, eps, t)
        close(path.score_to_u(path.u_to_score(u, x_t, t), x_t, t), u)
        close(path.eps_to_u(eps, x_t, t), u)
        close(path.data_to_u(z, x_t, t), u)


@ALL_PATHS
def test_conditional_field_moves_the_conditional_path(path, x):
    """u_t(x|z) = d/dt (alpha z + beta eps)."""
    eps = torch.randn_like(x)
    for t in TIMES:
        velocity = jacobian(lambda s: path.sample(x, eps, s), double(t))
        close(path.target(x, eps, t), velocity)


@ALL_PATHS
def test_time_goes_over_the_batch_never_the_width(path):
    """t (B,) means t[i] for all of x[i], also where B is the width."""
    z = torch.randn(4, 4, 4, 4)
    eps = torch.randn(4, 4, 4, 4)
    t = torch.rand(4)
    x = path.sample(z, eps, t)
    noise = path.u_to_eps(z, eps, t)
    for i in range(4):
        close(x[i], path.alpha(t[i]) * z[i] + path.beta(t[i]) * eps[i], 1e-6)
        close(noise[i:i + 1], path.u_to_eps(z[i:i + 1], eps[i:i + 1], t[i]), 1e-5)


@ALL_PATHS
def test_lecture_FACT_and_its_misprint(path, x):
    """u = a x + b score, b = (alpha' beta^2 - beta' beta alpha)/alpha; `000` leaves out a beta."""
    y = labels(0, x)
    for t in TIMES:
        u = MIX.u(path, x, t, y)
        score = MIX.score(path, x, t, y)
        a, b = path.a_b(t, x)
        close(a * x + b * score, u)
        close(path.score_to_u(score, x, t), u)
    for t in (0.8, 0.97):
        alpha, beta, d_alpha, d_beta = path.at(t, x)
        printed_b = (d_alpha * beta**2 - d_beta * alpha) / alpha
        printed_u = d_alpha / alpha * x + printed_b * MIX.score(path, x, t, y)
        assert distance(printed_u, MIX.u(path, x, t, y)) > 1e-3


# ---------------------------------------------------------------- dynamics

def fokker_planck_error(path, x, t, y, sigma, drift):
    """d/dt p + div(p v) - sigma^2/2 laplace p, over p, for the drift v(x)."""
    y = labels(y, x)
    score = MIX.score(path, x, t, y)
    d_log_p = jacobian(lambda s: MIX.log_p(path, x, s, y), double(t))
    div_pv = divergence(drift, x) + (drift(x) * score).sum(dim=1)
    laplace = divergence(lambda v: MIX.score(path, v, t, y[:1]), x) + (score**2).sum(dim=1)
    return d_log_p + div_pv - sigma**2 / 2 * laplace


@ALL_PATHS
@pytest.mark.parametrize("sigma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("y", [NULL, 1])
def test_u_plus_sigma2_half_score_solves_fokker_planck(path, sigma, y, x):
    """d/dt p = -div(p v) + sigma^2/2 laplace p, v = u + sigma^2/2 score; sigma = 0: continuity."""
    for t in TIMES:
        def drift(v):
            score = MIX.score(path, v, t, labels(y, v))
            return MIX.u(path, v, t, labels(y, v)) + sigma**2 / 2 * score

        error = fokker_planck_error(path, x, t, y, sigma, drift)
        assert error.abs().max() < 1e-7


@ALL_PATHS
@pytest.mark.parametrize("sigma", [0.5, 2.0])
@pytest.mark.parametrize("y", [NULL, 1])
def test_u_alone_is_not_the_drift_of_an_sde(path, sigma, y, x):
    """`001` prints dX = u dt + sigma dW; its law is not p_t."""
    for t in TIMES:
        def drift(v):
            return MIX.u(path, v, t, labels(y, v))

        error = fokker_planck_error(path, x, t, y, sigma, drift)
        assert error.abs().max() > 1e-2


@ALL_PATHS
@pytest.mark.parametrize("kind", ["u", "score"])
def test_conditional_and_marginal_losses_have_one_gradient(path, kind):
    """E || m - u_t(x|z) ||^2 = E || m - u_t(x) ||^2 + const (CFM); so for the score (DSM)."""
    t = double(0.4)
    z = double([-1.2, 0.3, 1.1])
    weight = double([0.5, 0.2, 0.3])
    x = line(-9, 9, 4001)[:, None]                # (grid, 1)
    p_xz = weight * Normal(path.alpha(t) * z, path.beta(t)).log_prob(x).exp()   # (grid, 3)
    eps = (x - path.alpha(t) * z) / path.beta(t)
    targets = {"u": path.d_alpha(t) * z + path.d_beta(t) * eps, "score": -eps / path.beta(t)}
    conditional = targets[kind]
    marginal = (p_xz * conditional).sum(dim=1, keepdim=True) / p_xz.sum(dim=1, keepdim=True)

    theta = double([0.3, -0.7, 0.2]).requires_grad_()
    model = theta[0] + theta[1] * x + theta[2] * torch.sin(3 * x)   # (grid, 1)
    cfm = (p_xz * (model - conditional)**2).sum()
    fm = (p_xz * (model - marginal)**2).sum()
    assert cfm > fm + 1e-3
    grad_cfm, = torch.autograd.grad(cfm, theta, retain_graph=True)
    grad_fm, = torch.autograd.grad(fm, theta)
    close(grad_cfm, grad_fm)


# ---------------------------------------------------------------- guidance

SCALES = pytest.mark.parametrize("w", [-1.0, 0.0, 1.0, 3.0, 8.0])
MANY = torch.tensor([0, 1, 2, 1, 0, 2])         # a label for each of the points x


def grad_log_classifier(path, x, t, y):
    """grad log p_t(y|x)."""
    rows = torch.arange(len(x))
    return gradient(lambda v: MIX.classifier(path)(v, t)[rows, y], x)


@ALL_PATHS
def test_bayes_rule_for_scores(path, x):
    """grad log p_t(x|y) = grad log p_t(x) + grad log p_t(y|x): log p_t(y|x) is the classifier.

    `002` says log p_t(x|y) is.
    """
    for t in TIMES:
        score = MIX.score(path, x, t, labels(NULL, x))
        score_y = MIX.score(path, x, t, MANY)
        grad = grad_log_classifier(path, x, t, MANY)
        close(score_y, score + grad, 1e-7)
        assert distance(score_y, grad) > 1e-2


@ALL_PATHS
def test_the_label_adds_b_times_the_classifiers_gradient(path, x):
    """u(x|y) = u(x) + b_t grad log p_t(y|x); one line of `001` has the gradient without its factor.

    (`001` writes u = b_t x + a_t score throughout, the names of `000` exchanged: no error.)
    """
    for t in TIMES:
        u = MIX.u(path, x, t, labels(NULL, x))
        u_y = MIX.u(path, x, t, MANY)
        grad = grad_log_classifier(path, x, t, MANY)
        _, b = path.a_b(t, x)
        close(u + b * grad, u_y, 1e-7)
    assert distance(u + grad, u_y) > 1e-2


@ALL_PATHS
@SCALES
def test_guidance_is_one_rule_in_u_score_eps_and_z(path, w, x):
    """(1 - w) m(x|null) + w m(x|y) for m = u, score, eps, z: one point, in four ways to say it."""
    null = labels(NULL, x)
    for t in TIMES:
        u = guide(MIX.u(path, x, t, MANY), MIX.u(path, x, t, null), w)
        score = guide(MIX.score(path, x, t, MANY), MIX.score(path, x, t, null), w)
        z_y, eps_y = MIX.data_and_eps(path, x, t, MANY)
        z_null, eps_null = MIX.data_and_eps(path, x, t, null)
        close(u, (1 - w) * MIX.u(path, x, t, null) + w * MIX.u(path, x, t, MANY))
        close(guided_field(MIX.net(path), x, t, MANY, w), u)
        close(path.u_to_score(u, x, t), score, 1e-6)
        close(path.u_to_eps(u, x, t), guide(eps_y, eps_null, w), 1e-6)
        close(path.u_to_data(u, x, t), guide(z_y, z_null, w), 1e-6)


def test_a_classifiers_gradient_is_each_samples_own_and_0_without_a_label():
    """d/dx of the sum of log p(y|x) over a batch of mixed labels, NULL among them."""
    def classifier(x, t):
        return (x[:, :1] * torch.arange(10.0).double()).sin() * t[:, None]
    x = torch.tensor([[0.3, 1.0], [0.7, 2.0], [-0.4, 3.0]]).double()
    y = torch.tensor([2, NULL, 7])
    gradient = cfg_min.classifier_gradient(classifier, x, 0.5, y)
    for i in (0, 2):
        alone = cfg_min.classifier_gradient(classifier, x[i:i + 1], 0.5, y[i:i + 1])
        close(gradient[i:i + 1], alone)
        assert alone[0, 0] != 0
    assert gradient[1].tolist() == [0, 0]


@ALL_PATHS
@SCALES
def test_classifier_guidance_is_classifier_free_guidance(path, w, x):
    """u(x) + w b_t grad log p_t(y|x) = (1 - w) u(x|null) + w u(x|y): gamma of `003` is w.

    In eps: eps - gamma sqrt(1 - abar) grad log p(y|x), the corrected eps; beta = sqrt(1 - abar).
    """
    classifier = MIX.classifier(path)
    for t in TIMES:
        cfg = guided_field(MIX.net(path), x, t, MANY, w)
        by_classifier = cfg_min.classifier_guided_field(
            MIX.net(path), classifier, path, x, t, MANY, w)
        close(by_classifier, cfg, 1e-6)

        score = MIX.score(path, x, t, labels(NULL, x))
        grad = grad_log_classifier(path, x, t, MANY)
        close(path.u_to_score(cfg, x, t), score + w * grad, 1e-6)
        beta = path.beta(double(t))
        close(path.u_to_eps(cfg, x, t), -beta * score - w * beta * grad, 1e-6)


@ALL_PATHS
@SCALES
def test_guided_score_is_that_of_the_tilted_law(path, w, x):
    """score_w = grad log [p(y|x)^w p(x) / Z]: Z is constant. `003` says "check grad log Z != 0"."""
    for t in TIMES:
        def log_tilted(v):
            log_p_y = MIX.classifier(path)(v, t)[torch.arange(6), MANY]
            return w * log_p_y + MIX.log_p(path, v, t, labels(NULL, v))

        cfg = guided_field(MIX.net(path), x, t, MANY, w)
        close(path.u_to_score(cfg, x, t), gradient(log_tilted, x), 1e-6)


@ALL_PATHS
@pytest.mark.parametrize("w", [-1.0, 3.0, 8.0])
def test_sum_of_tilted_classifiers_is_not_constant(path, w, x):
    """Z(x) = sum_y p(y|x)^w has a gradient, except at w = 0 and 1."""
    for t in TIMES:
        def log_z(v):
            log_p = MIX.classifier(path)(v, t)[:, :3]               # the labels that occur
            return (w * log_p).exp().sum(dim=1).log()

        assert gradient(log_z, x).abs().max() > 1e-3


@ALL_PATHS
@SCALES
def test_classifier_guidance_adds_nothing_where_there_is_no_label(path, w, x):
    """y = null: the field is u(x), whatever w."""
    null = labels(NULL, x)
    field = cfg_min.classifier_guided_field(
        MIX.net(path), MIX.classifier(path), path, x, 0.5, null, w)
    close(field, MIX.u(path, x, 0.5, null))


@ALL_PATHS
@SCALES
def test_two_networks_guide_as_one_with_a_null_label_does(path, w, x):
    """`001`: "There are still 2 models", u(x|y) and u(x). `000`: "nothing is something": one."""
    unlabelled = oracle.Mixture(MIX.mu, MIX.std, MIX.weight, label=[0, 0, 0, 0])

    def conditional(x, t, y):
        assert (y != NULL).all()
        return MIX.u(path, x, t, y)

    def unconditional(x, t):
        return unlabelled.u(path, x, t, labels(0, x))

    for t in TIMES:
        two = guide(conditional(x, t, MANY), unconditional(x, t), w)
        close(guided_field(MIX.net(path), x, t, MANY, w), two)


def loop_guided(net, x, t, y, w):
    """(1 - w) net(x, t, null) + w net(x, t, y), by two calls."""
    null = labels(NULL, x)
    return (1 - w) * net(x, t, null) + w * net(x, t, y)


def tiny(x, t, y):
    """A network for images, of one line."""
    return 0.3 * x + 0.2 * t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1).double().sin()


class Recorder:
    """A network that remembers its calls."""

    def __init__(self, net):
        self.net = net
        self.calls = []

    def __call__(self, *inputs):
        self.calls.append(inputs)
        return self.net(*inputs)


TIME_KINDS = pytest.mark.parametrize(
    "t", [0.3, torch.tensor(0.3), torch.tensor([0.1, 0.2, 0.5, 0.9])], ids=["float", "0-d", "(B,)"])


@TIME_KINDS
@pytest.mark.parametrize("w", [-1.0, 3.0])
def test_guided_field_calls_once_on_2B(w, t):
    """(1 - w) net(x, t, null) + w net(x, t, y), on every channel, t (B,) for the network."""
    x = torch.randn(4, 4, 4, 4).double()
    y = torch.tensor([0, 3, NULL, 9])
    net = Recorder(tiny)
    out = guided_field(net, x, t, y, w)
    (x_seen, t_seen, y_seen), = net.calls
    assert len(x_seen) == 8
    assert t_seen.shape == y_seen.shape == (8,)
    close(out, loop_guided(tiny, x, double(t).expand(4), y, w), 1e-6)
    assert y.tolist() == [0, 3, NULL, 9]


@TIME_KINDS
@pytest.mark.parametrize("w, label", [(0, NULL), (0.0, NULL), (1, None), (1.0, None)])
def test_guided_field_at_w_0_and_1_is_one_call_on_B_to_the_bit(w, label, t):
    """w = 0 is net(x, t, null), w = 1 is net(x, t, y)."""
    x = torch.randn(4, 4, 4, 4)
    given = torch.tensor([0, 3, NULL, 9])
    y = given
    if label is NULL:
        y = labels(NULL, x)
    net = Recorder(tiny)
    out = guided_field(net, x, t, given, w)
    (x_seen, t_seen, y_seen), = net.calls
    assert t_seen.shape == y_seen.shape == (4,)
    assert torch.equal(x_seen, x)
    assert torch.equal(out, tiny(x, torch.as_tensor(t).expand(4), y))


# ---------------------------------------------------------------- training

def test_labels_are_dropped_sample_by_sample_and_never_in_place():
    """y <- null with probability eta."""
    torch.manual_seed(0)
    y = torch.arange(10).repeat(2000)
    dropped = cfg_min.drop_labels(y, 0.1)
    assert torch.equal(y, torch.arange(10).repeat(2000))
    assert dropped.dtype == y.dtype
    kept = dropped != NULL
    assert torch.equal(dropped[kept], y[kept])
    share = (~kept).view(-1, 10).double().mean(dim=0)               # of each label
    assert distance(share, double(0.1)) < 0.025
    assert torch.equal(cfg_min.drop_labels(y, 0.0), y)
    assert (cfg_min.drop_labels(y, 1.0) == NULL).all()


def uniform_cdf(t):
    return t


def normal_cdf(v):
    return Normal(0, 1).cdf(v)


def run_loss(loss, net, path, **options):
    """The loss on 4000 images; of each: z, label, and the x, t and label that the network sees."""
    torch.manual_seed(3)
    z = torch.randn(4000, 1, 2, 2).double()
    y = torch.arange(4000) % 10
    net = Recorder(net)
    value = loss(net, path, z, y, **options)
    (x, t, *y_seen), = net.calls
    return value, z, y, x, t, y_seen


def check_draws(path, z, x, t):
    """t ~ U[0, 1) and x ~ p_t(x|z), that is (x - alpha z)/beta ~ N(0, I). Returns that noise."""
    alpha, beta, _, _ = path.at(t, z)
    eps = (x - alpha * z) / beta
    assert law_distance(t, uniform_cdf) < 0.025
    assert law_distance(eps.flatten(), normal_cdf) < 0.015
    assert law_distance(eps[t < 0.2].flatten(), normal_cdf) < 0.03
    return eps


def check_labels(y_seen, y, eta):
    """With probability eta, y <- null; the others stay with their images."""
    dropped = y_seen == NULL
    assert abs(dropped.double().mean() - eta) < 0.02
    assert torch.equal(y_seen[~dropped], y[~dropped])


@ALL_PATHS
@pytest.mark.parametrize("eta", [0.1, 0.3])
def test_cfm_loss_sample_by_sample(path, eta):
    """L_CFM^CFG = E || u_theta(x|y) - u_t(x|z) ||^2, (z, y) ~ p_data, t ~ U, x ~ p_t(x|z)."""
    loss, z, y, x, t, (y_seen,) = run_loss(cfg_min.cfg_cfm_loss, tiny, path, eta=eta)
    eps = check_draws(path, z, x, t)
    check_labels(y_seen, y, eta)
    _, _, d_alpha, d_beta = path.at(t, z)
    u = d_alpha * z + d_beta * eps
    close(loss, ((tiny(x, t, y_seen) - u)**2).mean(), 1e-6)


@ALL_PATHS
@pytest.mark.parametrize("eta", [0.1, 0.3])
def test_dsm_loss_sample_by_sample(path, eta):
    """E || eps_theta(x|y) - eps ||^2 = E beta_t^2 || s_theta - grad log p_t(x|z) ||^2."""
    loss, z, y, x, t, (y_seen,) = run_loss(cfg_min.cfg_dsm_loss, tiny, path, eta=eta)
    eps = check_draws(path, z, x, t)
    check_labels(y_seen, y, eta)
    eps_theta = tiny(x, t, y_seen)
    close(loss, ((eps_theta - eps)**2).mean(), 1e-6)


@pytest.mark.parametrize("loss", [cfg_min.cfg_cfm_loss, cfg_min.cfg_dsm_loss])
def test_losses_drop_one_label_in_ten_unless_told_otherwise(loss):
    """The default of eta is 0.1."""
    by_default, *_, (y_seen,) = run_loss(loss, tiny, CondOT())
    told, *_, (y_told,) = run_loss(loss, tiny, CondOT(), eta=0.1)
    assert torch.equal(y_seen, y_told)
    assert torch.equal(by_default, told)


@ALL_PATHS
def test_printed_dsm_loss_is_ours_over_beta_squared(path):
    """`002`: || s_theta - grad log p_t(x|z) ||^2 is || eps_theta - eps ||^2 / beta_t^2.

    Both have one minimum at each t. But on CondOT the printed one's mean over t is infinite, as
    int dt / (1 - t)^2 is: a few late t are nearly all of it.
    """
    ours, z, y, x, t, (y_seen,) = run_loss(cfg_min.cfg_dsm_loss, tiny, path)
    alpha, beta, _, _ = path.at(t, z)
    score = gradient(Normal(alpha * z, beta.expand_as(z)).log_prob, x)      # grad log p_t(x|z)
    s_theta = -tiny(x, t, y_seen) / beta
    printed = ((s_theta - score)**2).mean(dim=(1, 2, 3))            # (B,)
    close(ours, (beta.flatten()**2 * printed).mean(), 1e-6)
    if path is PATHS["condot"]:
        late = t > 0.99
        assert late.double().mean() < 0.02
        assert printed[late].sum() > 0.9 * printed.sum()


def test_cfm_loss_takes_another_law_of_t():
    """The t that is given, instead of t ~ U[0, 1), is what the network sees, and x is of it."""
    given = torch.linspace(0.1, 0.2, 4000).double()
    loss, z, y, x, t, (y_seen,) = run_loss(cfg_min.cfg_cfm_loss, tiny, CondOT(), t=given)
    assert torch.equal(t, given)
    eps = (x - given.view(-1, 1, 1, 1) * z) / (1 - given.view(-1, 1, 1, 1))
    assert law_distance(eps.flatten(), normal_cdf) < 0.015
    close(loss, ((tiny(x, t, y_seen) - (z - eps))**2).mean(), 1e-6)


@pytest.mark.parametrize("mean, std", [(-0.8, 0.8), (0.0, 1.0)])
def test_logit_normal(mean, std):
    """logit(t) = log(t / (1 - t)) ~ N(mean, std^2)."""
    torch.manual_seed(0)
    t = cfg_min.logit_normal(40000, mean, std).double()
    assert law_distance((t.logit() - mean) / std, normal_cdf) < 0.008


@ALL_PATHS
def test_u_from_eps_is_u_with_z_held_in_its_limits(path, x):
    """u = alpha' z + beta' eps for the clamped z = (x - beta eps_theta) / alpha, and eps by it."""
    def net(x, t, y):
        return MIX.data_and_eps(path, x, t, y)[1]

    for t in TIMES:
        z, _ = MIX.data_and_eps(path, x, t, MANY)
        free = cfg_min.u_from_eps(net, path, -9.0, 9.0)(x, t, MANY)
        close(free, MIX.u(path, x, t, MANY), 1e-6)
        held = cfg_min.u_from_eps(net, path, -0.3, 0.4)(x, t, MANY)
        close(path.u_to_data(held, x, t), z.clamp(-0.3, 0.4), 1e-6)


@ALL_PATHS
def test_u_from_z_is_u_with_z_held_in_its_limits(path, x):
    """u = (D z + beta' x) / beta for the clamped z."""
    def net(x, t, y):
        return MIX.data_and_eps(path, x, t, y)[0]

    for t in TIMES:
        z, _ = MIX.data_and_eps(path, x, t, MANY)
        free = cfg_min.u_from_z(net, path)(x, t, MANY)
        close(free, MIX.u(path, x, t, MANY), 1e-6)
        held = cfg_min.u_from_z(net, path, low=-0.3)(x, t, MANY)
        close(path.u_to_data(held, x, t), z.clamp(min=-0.3), 1e-6)


@pytest.mark.parametrize("latent, limit", [(None, 1.0), ("vae.pt", 4.0)])
@pytest.mark.parametrize("predict", ["z", "eps"])
def test_pixels_are_held_within_1_and_latents_within_4(predict, latent, limit):
    """A z network, of which white may be anything, below alone; an eps network on both sides."""
    x = torch.zeros(3, 1, 1, 1)
    z = torch.tensor([-9.0, 0.5, 9.0]).view(3, 1, 1, 1)
    means = {"z": z, "eps": -z}                 # x = t z + (1 - t) eps at t = 0.5
    config = dict(path="condot", predict=predict, latent=latent)
    field = vector_field(lambda x, t, y: means[predict], config)
    held = CondOT().u_to_data(field(x, 0.5, None), x, 0.5)
    highest = {"z": 9.0, "eps": limit}
    close(held.flatten(), [-limit, 0.5, highest[predict]], 1e-5)


@ALL_PATHS
def test_fields_of_networks_are_finite_where_solvers_ask(path, x):
    """u is finite at t = 0 and t = 1, as a number and as a tensor, of a z and of an eps network."""
    def net(x, t, y):
        return 0.5 * x

    for make in (cfg_min.u_from_z, cfg_min.u_from_eps):
        field = make(net, path, -1.0, 1.0)
        for t in (0.0, 1.0, torch.zeros(6).double(), torch.tensor(1.0)):
            assert field(x, t, MANY).isfinite().all()


def test_last_step_of_euler_lands_on_the_networks_z(x):
    """x + (1 - t) (z - x) / (1 - t) = z, on CondOT."""
    def net(x, t, y):
        return 0.3 * x.sin()

    field = cfg_min.u_from_z(net, CondOT())
    close(x + 0.02 * field(x, 0.98, MANY), 0.3 * x.sin())


def test_what_is_held_is_so_in_value_and_not_in_gradient():
    """held(z) = clamp(z), d held / dz = 1: the loss can call back an output that is outside."""
    z = torch.tensor([-3.0, 0.5, 2.0]).requires_grad_()
    held = cfg_min.held(z, -1.0, 1.0)
    assert held.tolist() == [-1.0, 0.5, 1.0]
    held.sum().backward()
    assert z.grad.tolist() == [1.0, 1.0, 1.0]


@ALL_PATHS
def test_classifier_loss_sample_by_sample(path):
    """-E log p_theta(y|x_t), t ~ U[0, 1), x_t ~ p_t(x|z)."""
    def classifier(x, t):
        return x.flatten(1).repeat(1, 3)[:, :10] * (1 + t[:, None])

    loss, z, y, x, t, _ = run_loss(cfg_min.classifier_loss, classifier, path)
    check_draws(path, z, x, t)
    log_p = classifier(x, t).log_softmax(dim=1)
    close(loss, -log_p[torch.arange(4000), y].mean(), 1e-6)


def test_classifier_loss_is_least_at_the_exact_posterior():
    """Of softmax(sharpness log p_t(y|x)), sharpness = 1 has the least cross-entropy."""
    torch.manual_seed(0)
    z = LINE.draw(2000)
    p_1 = LINE.posterior(CondOT(), z, 1.0)[:, 1]
    y = torch.bernoulli(p_1).long()
    losses = {}
    for sharpness in (0.5, 1.0, 2.0):
        def classifier(x, t):
            return sharpness * LINE.posterior(CondOT(), x, t)[:, :2].log()

        torch.manual_seed(1)
        losses[sharpness] = cfg_min.classifier_loss(classifier, CondOT(), z, y)
    assert losses[1.0] < losses[0.5]
    assert losses[1.0] < losses[2.0]


# ---------------------------------------------------------------- DDPM (`003`)

T = 1000
BETAS = line(1e-4, 0.02, T)                     # of steps 1 ... T; Ho et al. 2020
ABAR = torch.cat([double([1.0]), torch.cumprod(1 - BETAS, dim=0)])          # of times 0 ... T


def rates(k):
    """a_k = 1 - beta_k, abar_k, abar_(k-1) and beta~_k; `003` writes t for k, alpha for a."""
    a, abar, prev = 1 - BETAS[k - 1], ABAR[k], ABAR[k - 1]
    return a, abar, prev, (1 - a) * (1 - prev) / (1 - abar)


def mu_of(x, eps, k):
    """mu_theta = x / sqrt(a) - (1 - a) / sqrt(a (1 - abar)) eps_theta."""
    a, abar, _, _ = rates(k)
    return x / a.sqrt() - (1 - a) / (a * (1 - abar)).sqrt() * eps


class Chain(GaussianPath):
    """The chain as a path: abar_k from t = 1 - k/T on. Any slopes do: they only name u."""

    def step(self, t): return (T * (1 - t) - 1e-6).ceil().long()
    def alpha(self, t): return ABAR[self.step(t)].sqrt()
    def beta(self, t): return (1 - ABAR[self.step(t)]).sqrt()
    def d_alpha(self, t): return torch.ones_like(t)
    def d_beta(self, t): return -torch.ones_like(t)


STEPS = pytest.mark.parametrize("k", [2, 50, 500, 1000])


def test_steps_of_the_chain_compose_to_abar():
    """q(x_t|x_{t-1}) = N(sqrt(a) x_{t-1}, 1 - a), t times: N(sqrt(abar) x_0, 1 - abar)."""
    scale = double(1.0)
    var = double(0.0)
    for k in range(1, T + 1):
        a, abar, _, _ = rates(k)
        scale = a.sqrt() * scale
        var = a * var + (1 - a)
        close(scale, abar.sqrt())
        close(var, 1 - abar)


def test_ddpm_path_is_the_chain_in_continuous_time():
    """alpha = sqrt(abar) at t = 1 - t_DDPM/T, and alpha^2 + beta^2 = 1."""
    t = 1 - torch.arange(T + 1).double() / T
    close(DDPM().alpha(t), ABAR.sqrt(), 2e-3)
    close(DDPM().alpha(t)**2 + DDPM().beta(t)**2, torch.ones(T + 1))
    close(Chain().alpha(t), ABAR.sqrt())


def test_l_simple_is_our_dsm_loss_on_the_chain():
    """|| eps - eps_theta(sqrt(abar_k) x_0 + sqrt(1 - abar_k) eps, k) ||^2 for k ~ U{1, ..., T}."""
    loss, z, y, x, t, (y_seen,) = run_loss(cfg_min.cfg_dsm_loss, tiny, Chain(), eta=0.0)
    k = Chain().step(double(t))
    assert k.min() >= 1
    assert k.max() <= T
    assert law_distance(k / T, uniform_cdf) < 0.025
    abar = ABAR[k].view(-1, 1, 1, 1)
    eps = (x - abar.sqrt() * z) / (1 - abar).sqrt()
    assert law_distance(eps.flatten(), normal_cdf) < 0.015
    close(loss, ((eps - tiny(x, t, y))**2).mean(), 1e-6)


@STEPS
def test_posterior_of_a_step_is_the_product_of_two_gaussians(k, x):
    """q(x_{t-1}|x_t, x_0) ~ N(x_{t-1}; sqrt(prev) x_0, 1 - prev) N(x_t; sqrt(a) x_{t-1}, 1 - a)."""
    a, abar, prev, var = rates(k)
    eps = torch.randn_like(x)
    x_t = abar.sqrt() * x + (1 - abar).sqrt() * eps
    precision = 1 / (1 - prev) + a / (1 - a)
    mean = (prev.sqrt() * x / (1 - prev) + a.sqrt() * x_t / (1 - a)) / precision
    close(1 / precision, var)                   # beta~
    close(((1 - a) * prev.sqrt() * x + a.sqrt() * (1 - prev) * x_t) / (1 - abar), mean)
    close(mu_of(x_t, eps, k), mean)
    score = -eps / (1 - abar).sqrt()
    close((x_t + (1 - a) * score) / a.sqrt(), mean)


@STEPS
def test_elbo_term_is_the_weighted_error_of_eps(k, x):
    """L_t = KL(q || p) = (1 - a)^2 / (2 beta~ a (1 - abar)) || eps - eps_theta ||^2."""
    a, abar, _, var = rates(k)
    eps, eps_theta = torch.randn(2, 6, 2).double()
    q = Independent(Normal(mu_of(x, eps, k), var.sqrt()), 1)
    p = Independent(Normal(mu_of(x, eps_theta, k), var.sqrt()), 1)
    weight = (1 - a)**2 / (2 * var * a * (1 - abar))
    close(kl_divergence(q, p), weight * ((eps - eps_theta)**2).sum(dim=1))


def ancestral(eps_theta, x, noise):
    """`003`, Sampling: x_{t-1} = mu_theta(x_t, t) + sqrt(beta~_t) eps, for t = T, ..., 1."""
    for k in range(T, 0, -1):
        _, _, _, var = rates(k)
        x = mu_of(x, eps_theta(x, k), k) + var.sqrt() * noise[k - 1]
    return x


@pytest.mark.parametrize("path, tol", [(Chain(), 1e-8), (DDPM(), 0.03)], ids=["chain", "ddpm"])
def test_ddim_with_noise_1_is_ancestral_sampling(path, tol, x):
    """All T steps, one noise: ours at t = 1 - t_DDPM/T is the note's; nearly, on the path DDPM."""
    noise = torch.randn(T, 6, 2).double()
    left = list(noise)                          # of the steps T, ..., 1: the last first

    def eps_theta(x, k):
        _, eps = MIX.data_and_eps(Chain(), x, 1 - k / T, MANY)
        return eps

    def field(x, t):
        return MIX.u(path, x, t, MANY)

    ours = ddim(field, x, T, path, noise=1.0, randn=lambda _: left.pop())
    assert distance(ours, ancestral(eps_theta, x, noise)) < tol


# -log p and the ELBO, all in closed form: the data are one Gaussian on a line

MEAN, STD = double([0.7, 0.4])
GAUSS = oracle.Mixture(mu=[[MEAN]], std=[STD], weight=[1.0], label=[0])
SPREAD = (ABAR * STD**2 + 1 - ABAR).sqrt()      # of x_k, k = 0 ... T
Q_0 = Normal(MEAN, STD)
Q_T = Normal(ABAR[-1].sqrt() * MEAN, SPREAD[-1])
P_T = Normal(double(0.0), 1.0)                  # the prior N(0, I)
K = torch.arange(1, T + 1)


def exact_model():
    """For the exact eps: slope and shift of mu_theta(x, k); the variance of q(x_{k-1}|x_k)."""
    def mu(x):
        x = torch.full((T, 1), x).double()
        _, eps = GAUSS.data_and_eps(Chain(), x, 1 - K / double(T), labels(0, x))
        return mu_of(x[:, 0], eps[:, 0], K)

    shift = mu(0.0)
    slope = mu(1.0) - shift
    return slope, shift, BETAS * SPREAD[:-1]**2 / SPREAD[1:]**2


def elbo(x_0, slope, shift, var, prior):
    """E log p(x_0|x_1) - KL(q(x_T|x_0) || p(x_T)) - sum_{t=2}^T E KL(q(x_{t-1}|x_t, x_0) || p).

    For the model p(x_{k-1}|x_k) = N(slope_k x_k + shift_k, var_k); L_k is an expected square.
    """
    a, abar, prev, beta_tilde = rates(K)
    x_k = abar.sqrt() * x_0                     # mean of q(x_k|x_0); its variance is 1 - abar
    by_x_k = a.sqrt() * (1 - prev) / (1 - abar)             # mu~ = by_x_k x_k + by_x_0 x_0
    by_x_0 = (1 - a) * prev.sqrt() / (1 - abar)
    gap = (by_x_k - slope) * x_k + by_x_0 * x_0 - shift     # mean of mu~ - mu_theta
    square = gap**2 + (by_x_k - slope)**2 * (1 - abar)
    ratio = beta_tilde / var
    L = square / (2 * var) + (ratio - 1 - ratio.log()) / 2  # its first is no KL: beta~_1 = 0
    reconstruction = -(2 * math.pi * var[0]).log() / 2 - square[0] / (2 * var[0])
    q_T = Normal(x_k[-1], (1 - abar[-1]).sqrt())
    return reconstruction - kl_divergence(q_T, prior) - L[1:].sum()


@pytest.mark.parametrize("x_0", [-1.0, 0.7, 2.0])
def test_elbo_of_the_exact_reverse_chain_is_log_p(x_0):
    """p(x_{t-1}|x_t) = q(x_{t-1}|x_t) and p(x_T) = q(x_T): log p(x) = L(q, theta), with no gap."""
    close(elbo(x_0, *exact_model(), Q_T), Q_0.log_prob(double(x_0)))


def ddpm_model():
    """`003`'s assumption: the variance is beta~; but for the last step, where that is 0."""
    slope, shift, exact_var = exact_model()
    _, _, _, var = rates(K)
    var[0] = exact_var[0]
    return slope, shift, var


@pytest.mark.parametrize("x_0", [-1.0, 0.7, 2.0])
def test_elbo_of_ddpm_is_a_bound(x_0):
    """log p(x) >= L(q, theta), where p(x_0) is the law at the end of the chain from N(0, I)."""
    slope, shift, var = ddpm_model()
    mean_k, var_k = P_T.mean, P_T.variance
    for k in range(T - 1, -1, -1):
        mean_k = slope[k] * mean_k + shift[k]
        var_k = slope[k]**2 * var_k + var[k]
    log_p = Normal(mean_k, var_k.sqrt()).log_prob(double(x_0))
    gap = log_p - elbo(x_0, slope, shift, var, P_T)
    assert 1e-3 < gap < 2


def test_what_the_elbo_of_ddpm_lacks_is_its_prior_and_its_variances():
    """E [log q(x_0) - L] = KL(q(x_T) || p(x_T)) + sum_t KL(q(x_{t-1}|x_t) || p(x_{t-1}|x_t))."""
    _, _, exact_var = exact_model()
    _, _, var = ddpm_model()
    ratio = exact_var / var
    steps = (ratio - 1 - ratio.log()) / 2       # KLs of Gaussians with one mean

    lacking = 0
    # Gauss and Hermite: three points and weights, exact as log q - L is a square in x_0
    for x_0, weight in ((-3**0.5, 1 / 6), (0, 2 / 3), (3**0.5, 1 / 6)):
        x_0 = MEAN + STD * x_0
        lacking = lacking + weight * (Q_0.log_prob(x_0) - elbo(x_0, *ddpm_model(), P_T))
    close(lacking, kl_divergence(Q_T, P_T) + steps.sum())


# ---------------------------------------------------------------- DDPM, guided (`003`)

def pair_through_x_0(k, y, x_prev, x_t):
    """q(x_{t-1}, x_t|y) = int q(x_0|y) q(x_t|x_0) q(x_{t-1}|x_t, x_0) dx_0, matrices alike."""
    _, abar, _, var = rates(k)
    x_0 = line(-5, 5, 801)[:, None]
    q_0 = LINE.log_p(CondOT(), x_0, 1.0, labels(y, x_0)).exp() / 80             # dx_0 is 1/80
    x_0 = x_0[:, :, None]                       # (801, 1, 1)
    eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
    q_t = Normal(abar.sqrt() * x_0, (1 - abar).sqrt()).log_prob(x_t).exp()
    q_prev = Normal(mu_of(x_t, eps, k), var.sqrt()).log_prob(x_prev).exp()
    return (q_0[:, None, None] * q_t * q_prev).sum(dim=0)


GUIDED_STEPS = pytest.mark.parametrize("k", [100, 400, 700])


@GUIDED_STEPS
def test_the_label_depends_on_the_less_noisy_point_alone(k):
    """q(y|x_{t-1}, x_t) = q(y|x_{t-1}): the noisier x_t says nothing more."""
    x_prev = line(-1.5, 1.5, 7)[:, None]
    x_t = x_prev + BETAS[k - 1].sqrt() * line(-2, 2, 5)             # (7, 5)
    q = torch.stack([pair_through_x_0(k, y, x_prev, x_t) for y in (0, 1)])
    q_y = q / q.sum(dim=0)                      # of two labels, as likely
    classifier = LINE.posterior(Chain(), x_prev, 1 - (k - 1) / T)[:, :2]
    for j in range(5):
        close(q_y[:, :, j], classifier.T, 1e-6)


@GUIDED_STEPS
@pytest.mark.parametrize("y", [0, 1])
def test_conditional_step_is_the_step_times_the_classifier(k, y):
    """q(x_{t-1}|x_t, y) = q(y|x_{t-1}) q(x_{t-1}|x_t) const, on a grid of x_{t-1}."""
    a, _, _, _ = rates(k)
    t_prev = 1 - (k - 1) / T
    x_prev = line(-4, 4, 801)[:, None]
    marginal = LINE.log_p(Chain(), x_prev, t_prev, labels(NULL, x_prev)).exp()  # q(x_{t-1})
    classifier = LINE.posterior(Chain(), x_prev, t_prev)[:, y]
    for x_t in double([-1.2, 0.1, 0.9]):
        step = Normal(a.sqrt() * x_prev, (1 - a).sqrt()).log_prob(x_t)[:, 0].exp()
        product = classifier * step * marginal  # q(x_{t-1}|x_t) is step marginal / const
        q = pair_through_x_0(k, y, x_prev, x_t)[:, 0]
        close(q / q.sum(), product / product.sum(), 1e-6)


def test_guided_gaussian_moves_by_its_variance_times_g():
    """N(mu, s^2) times exp(x g) is N(mu + s^2 g, s^2); `003` prints s g, and sqrt(beta~) g."""
    mu, s, g = 0.3, 0.4, 1.7
    grid = line(-5, 6, 20001)
    p = (Normal(mu, s).log_prob(grid) + grid * g).softmax(dim=0)
    mean = (p * grid).sum()
    close(mean, mu + s**2 * g, 1e-6)
    assert abs(mean - (mu + s * g)) > 0.1


class Step:
    """A step of DDPM from t = 0.6 - h to s = 0.6: a, beta~ and, at x, eps and mu."""

    def __init__(self, mixture, x, h):
        self.path = DDPM()
        self.t = 0.6 - h
        self.s = 0.6
        alpha, self.beta, _, _ = self.path.at(self.t, x)
        alpha_s, beta_s, _, _ = self.path.at(self.s, x)
        self.a = alpha**2 / alpha_s**2
        self.var = (1 - self.a) * beta_s**2 / self.beta**2
        _, self.eps = mixture.data_and_eps(self.path, x, self.t, labels(NULL, x))
        self.x = x
        self.mu = self.mean(self.eps)

    def mean(self, eps):
        return self.x / self.a.sqrt() - (1 - self.a) / (self.a.sqrt() * self.beta) * eps


@pytest.mark.parametrize("y", [0, 1])
def test_taylors_step_with_the_exact_classifier(y):
    """p(y|v) N(v; mu, beta~) has mean mu + beta~ g, g = grad log p(y|mu), as beta~ goes to 0."""
    x = double([[-0.8], [0.2], [0.5]])
    errors = {}
    for h in (0.1, 0.01, 0.001):
        step = Step(LINE, x, h)
        std = step.var.sqrt()
        g = gradient(lambda v: LINE.classifier(step.path)(v, step.s)[:, y], step.mu)
        v = step.mu + line(-8, 8, 2001) * std   # (3, grid)
        log_p_y = LINE.classifier(step.path)(v.reshape(-1, 1), step.s)[:, y].view_as(v)
        p = (log_p_y + Normal(step.mu, std).log_prob(v)).softmax(dim=1)
        moved = (p * (v - step.mu)).sum(dim=1, keepdim=True)
        errors[h] = distance(moved / (step.var * g), double(1.0))
    assert errors[0.1] < 0.5
    assert errors[0.01] < errors[0.1] / 5
    assert errors[0.001] < errors[0.01] / 5


def test_the_two_guided_samplings_of_ddpm_agree_only_as_the_step_vanishes(x):
    """mu + beta~ grad log p(y|mu), against mu of the corrected eps: one, to first order in h."""
    errors = {}
    for h in (0.1, 0.01, 0.001):
        step = Step(MIX, x, h)
        by_mean = step.var * grad_log_classifier(step.path, step.mu, step.s, MANY)
        corrected = step.eps - step.beta * grad_log_classifier(step.path, x, step.t, MANY)
        by_eps = step.mean(corrected) - step.mu
        errors[h] = ((by_mean - by_eps).norm() / by_eps.norm()).item()
    assert errors[0.1] > 0.03
    assert errors[0.01] < errors[0.1] / 3
    assert errors[0.001] < errors[0.01] / 3


@ALL_PATHS
def test_push_is_the_first_guided_sampling_of_ddpm(path, x):
    """A step of ddim from t to s with a push: mu + beta~ w grad log p_s(y|mu) + sqrt(beta~) xi."""
    def field(x, t):
        return MIX.u(path, x, t, labels(NULL, x))

    def push(mean, s):
        return 3 * cfg_min.classifier_gradient(MIX.classifier(path), mean, s, MANY)

    class Half:
        """The path from t = 0.5 on, so that one step ends at t = 0.75."""
        def at(self, t, x):
            return path.at((2 + t) / 4, x)

        def u_to_data(self, u, x, t):
            return path.u_to_data(u, x, (2 + t) / 4)

        def u_to_eps(self, u, x, t):
            return path.u_to_eps(u, x, (2 + t) / 4)

    xi = torch.randn_like(x)
    options = dict(noise=1.0, randn=lambda x: xi)
    free = ddim(lambda x, t: field(x, 0.5), x, 1, Half(), **options)
    pushed = ddim(lambda x, t: field(x, 0.5), x, 1, Half(), **options,
                  push=lambda mean, s: push(mean, 0.75))
    alpha, beta, _, _ = path.at(0.5, x)
    alpha_s, beta_s, _, _ = path.at(0.75, x)
    variance = beta_s**2 / beta**2 * (beta**2 - alpha**2 / alpha_s**2 * beta_s**2)
    mu = free - variance.sqrt() * xi
    close(pushed - free, variance * 3 * grad_log_classifier(path, mu, 0.75, MANY), 1e-7)


# ---------------------------------------------------------------- samplers

RUNS = {
    "euler": (euler, {}),
    "heun": (heun, {}),
    "ab": (adams_bashforth, {}),
    "ab late": (adams_bashforth, dict(last=0.98)),
    "ddim 0": (ddim, dict(noise=0.0)),
    "ddim 0.5": (ddim, dict(noise=0.5)),
    "ddim 1": (ddim, dict(noise=1.0)),
    "em": (euler_maruyama, {}),
    "em 0.5": (euler_maruyama, dict(sigma=0.5)),
    "em 1": (euler_maruyama, dict(sigma=1.0)),
    "em 2": (euler_maruyama, dict(sigma=2.0)),
}


def integrate(run, field, x, steps, path, randn=torch.randn_like, **options):
    """The sampler named run; path and randn go to those that take them."""
    sampler, own = RUNS[run]
    if sampler in (ddim, euler_maruyama):
        own = dict(own, path=path, randn=randn)
    return sampler(field, x, steps, **own, **options)


def simulate(run, path, y, w, n=3000, steps=80):
    """n samples of MIX, of label y with guidance w, from the noise of seed 0."""
    torch.manual_seed(0)
    x = torch.randn(n, 2).double()

    def field(x, t):
        return guided_field(MIX.net(path), x, t, labels(y, x), w)

    return integrate(run, field, x, steps, path)


ALL_RUNS = pytest.mark.parametrize("run", RUNS)
EQUAL_RUNS = pytest.mark.parametrize("run", [run for run in RUNS if "late" not in run])


@ALL_PATHS
@ALL_RUNS
@pytest.mark.parametrize("w, y", [(0, NULL), (1, 0)])
def test_samplers_end_in_the_data_law(run, path, w, y):
    """w = 1 ends in p(.|y), w = 0 in p."""
    assert data_law_distance(simulate(run, path, 0, w), y) < 0.04


@pytest.mark.parametrize("run", ["euler", "heun", "ab", "ab late", "ddim 0"])
@ALL_PATHS
def test_odes_carry_quantiles_to_quantiles(run, path):
    """On a line x -> X_1 is increasing: the q-quantile of the noise becomes that of the data."""
    q = line(0.02, 0.98, 49)

    def field(x, t):
        return LINE.u(path, x, t, labels(NULL, x))

    x = integrate(run, field, Normal(0, 1).icdf(q)[:, None], 200, path)
    cdf = (Normal(-1, 0.5).cdf(x) + Normal(1, 0.5).cdf(x)) / 2
    assert distance(cdf[:, 0], q) < 0.008


def unit_noise(steps):
    """X_0 and randn that give the law of X_1 for Gaussian data exactly, with no random number.

    X_1 is then affine in X_0 and in the noise of each step: row i of the batch has a unit of the
    i-th of these and nothing else; the last row has nothing at all.
    """
    units = iter(torch.eye(steps + 2).double())

    def randn(x=None):
        return next(units)[:, None]

    return randn(), randn


def spread(x):
    """The standard deviation of a state x that began with unit_noise; its mean is x[-1]."""
    return (x - x[-1]).norm().item()


def end_of_a_gaussian(run, path, steps):
    """Mean and standard deviation of X_1, where that of the data are MEAN and STD."""
    x, randn = unit_noise(steps)

    def field(x, t):
        return GAUSS.u(path, x, t, labels(NULL, x))

    x = integrate(run, field, x, steps, path, randn)
    return double([x[-1], spread(x)])


@ALL_PATHS
@ALL_RUNS
def test_samplers_end_in_a_gaussian_data_law(run, path):
    """Its mean and deviation, free of chance; 2 (h) - (2 h) cancels the steps' error of order h."""
    coarse = end_of_a_gaussian(run, path, 100)
    fine = end_of_a_gaussian(run, path, 200)
    mean, std = 2 * fine - coarse
    assert abs(mean / MEAN - 1) < 0.005
    assert abs(std / STD - 1) < 0.01


@pytest.mark.parametrize("name", ["condot", "cosine"])              # DDPM's u is infinite at t = 1
@pytest.mark.parametrize("run, order", [("euler", 1), ("heun", 2), ("ab", 2)])
def test_order_of_the_samplers(run, order, name):
    """Twice the steps, an error 2^order times smaller."""
    exact = simulate("heun", PATHS[name], 0, 3, n=20, steps=1000)
    coarse = simulate(run, PATHS[name], 0, 3, n=20, steps=50)
    fine = simulate(run, PATHS[name], 0, 3, n=20, steps=100)
    ratio = (coarse - exact).norm() / (fine - exact).norm()
    assert 0.75 * 2**order < ratio < 1.3 * 2**order


def test_ddim_never_takes_the_root_of_what_rounding_left_below_0():
    """In float32 sigma^2 may round to more than beta_s^2, where noise is 1 and t near 0."""
    x = torch.ones(1, 1)
    for last in torch.linspace(0.9, 0.999, 400).tolist():
        end = ddim(lambda x, t: x, x, 2, CondOT(), noise=1.0, t0=0.01, last=last)
        assert end.isfinite().all()


def test_ddim_on_condot_is_euler():
    """x + h u = s z + (1 - s) eps, for z = x + (1 - t) u and eps = x - t u."""
    by_ddim = simulate("ddim 0", CondOT(), 0, 3, n=50, steps=20)
    by_euler = simulate("euler", CondOT(), 0, 3, n=50, steps=20)
    close(by_ddim, by_euler)


@ALL_PATHS
@pytest.mark.parametrize("noise", [0.0, 0.5, 1.0])
def test_ddim_step(path, noise, x):
    """x_s = alpha_s z + sqrt(beta_s^2 - sigma^2) eps + sigma xi, sigma = noise sqrt(beta~)."""
    t, s = double(0.5), double(0.75)            # the first of two steps from t0 = 0.5
    z, eps, xi = torch.randn(3, 6, 2).double()
    seen = []

    def field(x, t):
        return path.target(z, eps, t)

    ddim(field, path.sample(z, eps, t), 2, path, noise=noise, t0=0.5, randn=lambda _: xi,
         watch=lambda _, x: seen.append(x))
    a = (path.alpha(t) / path.alpha(s))**2
    added = path.beta(t)**2 - a * path.beta(s)**2
    sigma = noise * (added * path.beta(s)**2 / path.beta(t)**2).sqrt()
    deterministic = path.alpha(s) * z + (path.beta(s)**2 - sigma**2).sqrt() * eps
    close(seen[1], deterministic + sigma * xi)


def em_step(path, x, sigma, xi):
    """What Euler-Maruyama does from t = 0.5 to 0.6: the first of five steps from t0 = 0.5."""
    seen = []

    def field(x, t):
        return MIX.u(path, x, t, MANY)

    def watch(t, x):
        seen.append(x)

    euler_maruyama(field, x, 5, path, sigma, t0=0.5, randn=lambda _: xi, watch=watch)
    return seen[1]


@ALL_PATHS
@pytest.mark.parametrize("sigma", [None, 0.5, 1.0])
def test_euler_maruyama_step(path, sigma, x):
    """x + h (u + sigma_t^2/2 score) + sqrt(h) sigma_t xi, sigma_t^2 = 2 beta_t unless given."""
    t, h = double(0.5), 0.1
    xi = torch.randn_like(x)
    variance = 2 * path.beta(t)
    if sigma is not None:
        variance = sigma**2
    drift = MIX.u(path, x, t, MANY) + variance / 2 * MIX.score(path, x, t, MANY)
    expected = x + h * drift + (h * variance)**0.5 * xi
    close(em_step(path, x, sigma, xi), expected)


@ALL_PATHS
def test_euler_maruyama_puts_in_no_more_noise_than_the_path_has_left(path, x):
    """h sigma_t^2 <= beta_s^2, whatever sigma is asked for."""
    xi = torch.randn_like(x)
    noise = em_step(path, x, 100.0, xi) - em_step(path, x, 100.0, 0 * xi)
    close(noise, path.beta(double(0.6)) * xi)


def test_capped_noise_settles_at_4_thirds_of_the_paths():
    """h sigma^2 = c beta_s^2 takes the noise's variance v to (1 - c/2)^2 v + c, in units of beta^2.

    That settles at 1 / (1 - c/4): 4/3 for the cap's c = 1, twice too much for c = 2, never for 4.
    """
    law = oracle.Mixture(mu=[[0.7]], std=[1e-4], weight=[1.0], label=[0])   # z is all but known
    start, randn = unit_noise(400)
    variances = []

    def field(x, t):
        return law.u(CondOT(), x, t, labels(NULL, x))

    def watch(t, x):
        if 0.2 < t < 0.8:
            variances.append((spread(x) / (1 - t))**2)

    euler_maruyama(field, start, 400, CondOT(), sigma=100.0, randn=randn, watch=watch)
    assert abs(min(variances) - 4 / 3) < 0.03
    assert abs(max(variances) - 4 / 3) < 0.03


@EQUAL_RUNS
def test_samplers_call_the_field_from_noise_to_the_last_step(run):
    """At t_DDPM = T, ..., 1: training needs t ~ U{1, T}; `003` also prints U{2, T}."""
    called = []

    def field(x, t):
        called.append(round(10 - 10 * t))
        return 0 * x

    integrate(run, field, torch.zeros(1, 1), 10, CondOT())
    assert sorted(set(called)) == list(range(1, 11))
    calls = {"heun": 19}
    assert len(called) == calls.get(run, 10)


@pytest.mark.parametrize("run", [run for run in RUNS if not run.startswith("ab")])
def test_samplers_show_each_state_once_from_t0_on(run):
    """watch(t, x) sees x before each of the equal steps from t0 to 1."""
    seen = []

    def field(x, t):
        return x

    def watch(t, x):
        seen.append((t, x))

    start = torch.ones(1, 1).double()
    end = integrate(run, field, start, 5, CondOT(), t0=0.5, watch=watch)
    times = [t for t, _ in seen]
    close(times, [0.5, 0.6, 0.7, 0.8, 0.9])
    assert seen[0][1] is start
    (t, x) = seen[-1]
    u = field(x, t)
    close(end, x + (1 - t) * u)     # the last step is Euler's: beta_1 = 0


@pytest.mark.parametrize("t0, last", [(0.0, None), (0.0, 0.9), (0.5, 0.9)])
@pytest.mark.parametrize("steps", [1, 5])
def test_times_begin_at_t0_and_end_at_1(t0, last, steps):
    """Each step ends where the next one begins; they are equal, or sqrt(1 - t) falls evenly."""
    pairs = list(times(steps, t0, last))
    starts = double([t for t, _ in pairs])
    ends = double([s for _, s in pairs])
    assert len(pairs) == steps
    assert pairs[0][0] == pytest.approx(t0)
    assert pairs[-1][1] == 1
    assert torch.equal(starts[1:], ends[:-1])
    if steps == 1:
        return
    falls = starts if last is None else (1 - starts).sqrt()
    close(falls.diff().diff(), torch.zeros(steps - 2))
    if last is not None:
        close(starts[-1], last)


@pytest.mark.parametrize("run", ["euler", "heun", "ab", "em", "ddim 1", "pc"])
def test_every_sampler_takes_its_last_step_from_last(run):
    seen = []

    def field(x, t):
        return x

    def watch(t, x):
        seen.append(t)
    start = torch.ones(1, 1).double()
    options = dict(last=0.9, watch=watch)
    if run == "pc":
        predictor_corrector(field, field, start, 5, CondOT(), **options)
    else:
        integrate(run, field, start, 5, CondOT(), **options)
    assert seen == [t for t, _ in times(5, 0.0, 0.9)]


@pytest.mark.parametrize("last", [None, 0.9])
def test_adams_bashforth_is_exact_where_u_is_a_line_over_t(last):
    """u = 2 - 6 t: its integral, 2 t - 3 t^2, but for the first and the last step: Euler's."""
    end = adams_bashforth(lambda x, t: torch.full_like(x, 2 - 6 * t), double([0.0]), 5, last=last)
    pairs = list(times(5, 0.0, last))
    _, s = pairs[0]
    t, _ = pairs[-1]
    first = 2 * s
    others = (2 * t - 3 * t**2) - (2 * s - 3 * s**2)
    final = (1 - t) * (2 - 6 * t)
    close(end, double([first + others + final]))


def test_what_w_does_to_two_gaussians(capsys):
    """At w = 0 and 1 the guided ODE, SDE and p(.|y)^w p^(1-w) are one law; at w = 3 no two are.

    Nor is X_1 a mixture of p(.|y) and p, whose mean lies in [0, 1], as `002` says. The
    predictor-corrector comes near the tilted law.
    """
    oracle.main()
    rows = {}
    for line in capsys.readouterr().out.splitlines()[2:]:
        w, *numbers = [float(v) for v in line.split()]
        rows[w] = numbers       # mean and std of ODE, SDE, predictor-corrector, tilted law, mixture
    for w in (0, 1):
        ode, sde, _, tilted, mixture = rows[w][0::2]
        assert distance(double([ode, sde, tilted, mixture]), double(w)) < 0.06
    ode, sde, corrected, tilted, mixture = rows[3][0::2]
    tilted_std = rows[3][7]
    assert 1.45 < ode < 1.6
    assert 1.1 < sde < ode - 0.1
    assert tilted < corrected < tilted + 0.05
    assert corrected < sde - 0.1
    assert abs(tilted - 1.05) < 0.01
    assert abs(tilted_std - 0.46) < 0.01
    assert mixture == 1.0


def test_an_sde_without_the_score_term_ends_wider_than_the_data():
    """dX = u dt + sigma dW (`001`) at sigma = 1: X_1 has a standard deviation over 0.6, not 0.5."""
    torch.manual_seed(0)
    x = torch.randn(4000, 1).double()
    for k in range(100):
        u = LINE.u(CondOT(), x, k / 100, labels(1, x))
        x = x + 0.01 * u + 0.1 * torch.randn_like(x)
    assert x.std() > 0.6


# ---------------------------------------------------------------- networks

def shaken(net):
    """net with every weight off its zero initialisation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return net


def check_every_parameter_has_a_gradient(net, loss):
    loss.backward()
    for name, p in net.named_parameters():
        assert p.grad.abs().sum() > 0, name


NETWORKS = pytest.mark.parametrize("make, options, shape", [
    (UNet, {}, (1, 32, 32)),
    (UNet, LATENT_OPTIONS["unet"], (4, 8, 8)),
    (dit.DiT, {}, (1, 32, 32)),
    (dit.DiT, LATENT_OPTIONS["dit"], (4, 8, 8)),
], ids=["unet", "latent unet", "dit", "latent dit"])


@NETWORKS
def test_networks_start_at_0_and_use_all_parameters(make, options, shape):
    """net(x, t, y) is like x, and 0 before training."""
    net = make(**options)
    x = torch.randn(3, *shape)
    y = torch.tensor([0, 7, NULL])
    out = net(x, torch.rand(3), y)
    assert out.shape == x.shape
    assert (out == 0).all()
    loss = cfg_min.cfg_cfm_loss(shaken(net), CondOT(), x, y, 0.0)
    check_every_parameter_has_a_gradient(net, loss)


@NETWORKS
@torch.no_grad()
def test_networks_see_t_and_y_and_treat_classes_alike(make, options, shape):
    """Another t or y, another output; label embeddings permuted as the labels are, the same."""
    net = shaken(make(**options))
    x = torch.randn(3, *shape)
    t = torch.rand(3)
    y = torch.tensor([0, 7, NULL])
    out = net(x, t, y)
    assert distance(net(x, t, y.flip(0)), out) > 1e-4
    assert distance(net(x, 1 - t, y), out) > 1e-4
    order = torch.randperm(11)
    net.label.weight[:] = net.label.weight[order].clone()
    close(net(x, t, order.argsort()[y]), out, 1e-4)


@NETWORKS
@torch.no_grad()
def test_networks_take_one_time_for_the_batch(make, options, shape):
    """net(x, 0.3, y), as ODE solvers call it, is net(x, [0.3, ..., 0.3], y)."""
    net = shaken(make(**options))
    x = torch.randn(3, *shape)
    y = torch.tensor([0, 7, NULL])
    out = net(x, torch.full((3,), 0.3), y)
    assert torch.equal(net(x, 0.3, y), out)
    assert torch.equal(net(x, torch.tensor(0.3), y), out)
    assert torch.equal(net(x, torch.full((3,), 0.3).double(), y), out)


@NETWORKS
@pytest.mark.parametrize("predict", ["z", "u", "eps"])
def test_training_and_sampling_keep_to_their_device(make, options, shape, predict):
    """On torch's meta device, where nothing has a value: losses and samplers neither leave the
    tensors' device nor wait for a number; so they would not on an accelerator."""
    arch = "unet" if make is UNet else "dit"
    config = dict(arch=arch, path="condot", predict=predict, latent=bool(options), eta=0.1,
                  steps=1)
    with torch.device("meta"):
        net = make(**options)
    z = torch.empty(4, *shape, device="meta")
    y = torch.empty(4, dtype=torch.int64, device="meta")
    assert train.loss_of(config, net, z, y, 0).device.type == "meta"
    field = vector_field(net, config)

    def guided(x, t):
        return guided_field(field, x, t, y, 3.0)

    for run in RUNS:
        assert integrate(run, guided, z, 3, CondOT()).device.type == "meta"


def test_unet_has_the_lectures_stages():
    """Encoders halve the image and widen its channels: 32 x 16 x 16, 64 x 8 x 8, 128 x 4 x 4.

    At the largest size, where a layer costs most, residual layers stand on the way up alone.
    """
    net = UNet(channels=(32, 64, 128), layers=2)
    assert 1.2e6 < sum(p.numel() for p in net.parameters()) < 1.4e6
    x = torch.randn(2, 1, 32, 32)
    shapes = [h.shape[1:] for h in net.encoder(x, torch.randn(2, 128))]
    assert shapes == [(32, 16, 16), (64, 8, 8), (128, 4, 4)]
    assert [len(stage) for stage in net.encoder.stages] == [0, 2, 2]
    assert [len(stage) for stage in net.decoders] == [2, 2]


def test_the_way_up_convolves_before_it_doubles():
    """Nearest neighbours of a convolution at the small size: a quarter of the places."""
    net = UNet()
    sizes = []
    for up in net.ups:
        up.register_forward_hook(lambda up, args, h: sizes.append((args[0].shape[1:], h.shape[1:])))
    net(torch.randn(2, 1, 32, 32), torch.rand(2), torch.tensor([3, NULL]))
    assert sizes == [((128, 4, 4), (64, 4, 4)), ((64, 8, 8), (64, 8, 8))]


def test_every_stage_of_the_unet_reaches_its_output(monkeypatch):
    """Skip connections: the output depends on what each stage of the encoder ends with."""
    net = shaken(UNet())
    x = torch.randn(2, 1, 32, 32)
    ends = net.encoder(x, torch.randn(2, 128))
    ends = [h.detach().requires_grad_() for h in ends]
    monkeypatch.setattr(net.encoder, "forward", lambda x, e: ends)
    net(x, torch.rand(2), torch.tensor([3, NULL])).square().sum().backward()
    for h in ends:
        assert h.grad.abs().sum() > 0


def test_noisy_classifier_gives_ten_logits_that_see_t():
    """classifier(x, t) -> (B, 10)."""
    net = shaken(NoisyClassifier())
    x = torch.randn(2, 1, 32, 32)
    early = net(x, torch.zeros(2))
    late = net(x, torch.ones(2))
    assert early.shape == (2, 10)
    assert distance(early, late) > 1e-4


def test_patchify_against_unfold_and_a_strided_convolution():
    """Patches row by row: F.unfold; a linear layer on them is a convolution of stride p."""
    p = 4
    x = torch.randn(2, 3, 8, 12)
    tokens = dit.patchify(x, p)
    assert torch.equal(tokens, F.unfold(x, p, stride=p).transpose(1, 2))
    assert torch.equal(dit.unpatchify(tokens, p, x.shape), x)
    linear = torch.nn.Linear(3 * p * p, 5)
    convolved = F.conv2d(x, linear.weight.view(5, 3, p, p), linear.bias, stride=p)
    close(linear(tokens), convolved.flatten(2).transpose(1, 2), 1e-5)


def test_adaln_zero_blocks_start_as_the_identity():
    """x + gate f(x) with gate = 0."""
    h = torch.randn(2, 64, 128)
    e = torch.randn(2, 128)
    for block in dit.DiT().blocks:
        assert torch.equal(block(h, e), h)


def test_positions_differ():
    assert torch.pdist(dit.positions(8, 128)).min() > 0.1


def test_attention_against_torch():
    """softmax(q k^T / sqrt(D/heads)) v, of 3 images, 2 heads, 5 tokens, 7 numbers each."""
    q, k, v = torch.randn(3, 3, 2, 5, 7, dtype=torch.float64)
    close(dit.attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("row, column", [(0, 0), (3, 5), (7, 7)])
def test_attention_lets_one_patch_reach_all(row, column):
    """A change of the first patch, one inside or the last changes every patch of the output."""
    x = torch.zeros(2, 1, 32, 32)
    x[1, :, 4 * row:4 * row + 4, 4 * column:4 * column + 4] += 1
    net = shaken(dit.DiT())
    out = net(x, torch.ones(2), torch.ones(2).long())
    change = dit.patchify(out[:1] - out[1:], 4).abs().amax(dim=2)   # (1, N)
    assert (change > 1e-6).all()


def test_vae_shapes():
    """Images (B, 1, 32, 32), latents (B, 4, 8, 8)."""
    net = vae.VAE()
    x = torch.rand(3, 1, 32, 32) * 2 - 1
    latent = net.encode(x)
    assert latent.shape == (3, 4, 8, 8)
    assert net.decode(latent).shape == x.shape


def test_vae_decodes_a_draw_of_its_posterior():
    """latent = mean + std eps, std = sqrt(var), is a draw from q(latent|x) = N(mean, var)."""
    net = shaken(vae.VAE())
    x = torch.rand(3, 1, 32, 32) * 2 - 1
    eps = torch.randn(3, 4, 8, 8)
    recon, mean, log_var = net(x, eps)
    close(mean, net.encode(x), 1e-5)
    assert log_var.abs().max() > 0.1            # else std and var are alike
    close(recon, net.decode(mean + log_var.exp().sqrt() * eps), 1e-5)


def test_the_autoencoder_writes_black_and_nothing_below_it():
    """Held in value, not in gradient, as a predicted z is."""
    autoencoder = vae.VAE()
    autoencoder.decoder = torch.nn.Identity()
    latent = torch.tensor([-1.5, -0.5, 1.5], requires_grad=True)
    pixels = autoencoder.decode(latent)
    assert pixels.tolist() == [-1.0, -0.5, 1.5]
    pixels.sum().backward()
    assert latent.grad.tolist() == [1, 1, 1]


def test_vae_loss_is_minus_the_elbo():
    """-ELBO = E_q[-log p(x|latent)] + KL(q(latent|x) || N(0, I)), times 2 std^2 / pixels."""
    net = shaken(vae.VAE())
    x = torch.rand(3, 1, 32, 32) * 2 - 1
    torch.manual_seed(0)
    loss = vae.vae_loss(net, x, std=0.2)
    torch.manual_seed(0)
    recon, mean, log_var = net(x, torch.randn(3, 4, 8, 8))
    q = Independent(Normal(mean, (log_var / 2).exp()), 3)
    prior = Independent(Normal(torch.zeros_like(mean), 1), 3)
    kl = kl_divergence(q, prior)
    close(vae.kl_to_normal(mean, log_var), kl, 1e-4)
    constant = 512 * math.log(2 * math.pi * 0.2**2)                 # of 1024 pixels
    log_p = Independent(Normal(recon, 0.2), 3).log_prob(x) + constant
    close(loss, (kl - log_p).mean() * 2 * 0.2**2 / 1024, 1e-4)
    check_every_parameter_has_a_gradient(net, loss)
