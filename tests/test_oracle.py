"""What guided samples follow, on exact fields: equations of Bradley & Nakkiran 2024, executed.

MIX is a labelled mixture in the plane, whose scores and fields are known on every path (oracle.py);
"the tilted law" is p_t(x|y)^w p_t(x)^(1-w), s_w its score, and u_w the guided field.
"""
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import oracle
import sample
from cfg_min import (NULL, cfg_cfm_loss, euler, guide, guided_field, ignore, langevin,
                     predictor_corrector)
from oracle import TRIANGLE, TWO, moments, tilted_moments
from paths import PATHS, CondOT
from sample import Trajectory, generate, noise_of

ALL_PATHS = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
MIX = oracle.Mixture(
    mu=[[-1.5, 0.5], [1.0, 1.2], [0.3, -1.4], [1.8, -0.2]],
    std=[0.3, 0.6, 0.4, 0.2],
    weight=[0.3, 0.3, 0.25, 0.15],
    label=[0, 0, 1, 2])


@pytest.fixture
def x():
    """Six points of the plane."""
    torch.manual_seed(0)
    return torch.randn(6, 2).double()


def labels(y, n):
    return torch.full((n,), y)


def close(a, b, tol=1e-9):
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def scores(path, x, t, y=1):
    """s(x|y) and s(x)."""
    return MIX.score(path, x, t, labels(y, len(x))), MIX.score(path, x, t, labels(NULL, len(x)))


def draw_noise(n, dimensions):
    torch.manual_seed(1)
    return torch.randn(n, dimensions).double()


# ---------------------------------------------------------------- one family of laws

@ALL_PATHS
@pytest.mark.parametrize("t", (0.1, 0.45, 0.8, 0.97))
@pytest.mark.parametrize("sigma", (0.3, 1.0, 2.5))
def test_guided_sde_is_conditional_ode_with_langevin_towards_another_tilt(path, t, sigma, x):
    """u_w + sigma^2/2 s_w = u(x|y) + sigma^2/2 s_w', w' = w + 2 (w - 1) b_t / sigma^2."""
    w = 3.0
    y = labels(1, len(x))
    s_y, s = scores(path, x, t)
    _, b = path.a_b(t, x)
    u_w = guided_field(MIX.net(path), x, t, y, w)
    guided_sde = u_w + sigma**2 / 2 * guide(s_y, s, w)
    other_w = w + 2 * (w - 1) * b / sigma**2
    langevin_after_ode = MIX.u(path, x, t, y) + sigma**2 / 2 * guide(s_y, s, other_w)
    close(guided_sde, langevin_after_ode)


@ALL_PATHS
@pytest.mark.parametrize("t", (0.1, 0.45, 0.8, 0.97))
def test_at_the_noise_of_ddpm_the_other_tilt_is_2w_minus_1(path, t, x):
    """u_w + b_t s_w = u(x|y) + b_t s_w', w' = 2w - 1: sigma^2 = 2 b_t."""
    w = 3.0
    y = labels(1, len(x))
    s_y, s = scores(path, x, t)
    _, b = path.a_b(t, x)
    u_w = guided_field(MIX.net(path), x, t, y, w)
    close(u_w + b * guide(s_y, s, w), MIX.u(path, x, t, y) + b * guide(s_y, s, 2 * w - 1))


def divergence(field, x, t):
    """sum_i d field_i / d x_i, (B,)."""
    x = x.detach().requires_grad_()
    u = field(x, t)
    total = torch.zeros(len(x)).double()
    for i in range(x.shape[1]):
        gradient, = torch.autograd.grad(u[:, i].sum(), x, retain_graph=True)
        total += gradient[:, i]
    return total


@ALL_PATHS
@pytest.mark.parametrize("w", (0.5, 3.0))
def test_what_the_guided_ode_forgets_is_where_the_scores_disagree(path, w, x):
    """d log(p(.|y)^w p^(1-w) / own density) = b_t w (w - 1) |s(x|y) - s(x)|^2 dt along the flow.

    The own density falls by div u_w dt. All three integrals by the midpoint rule, which is exact to
    the square of the step.
    """
    y = labels(1, len(x))
    guided = partial(guided_field, MIX.net(path), y=y, w=w)

    def log_tilted(x, t):
        return guide(MIX.log_p(path, x, t, y), MIX.log_p(path, x, t, labels(NULL, len(x))), w)
    start, end, steps = 0.1, 0.7, 600
    h = (end - start) / steps
    gained = -log_tilted(x, start)
    forgotten = torch.zeros(len(x)).double()
    for k in range(steps):
        t = start + k * h
        middle = x + h / 2 * guided(x, t)
        s_y, s = scores(path, middle, t + h / 2)
        _, b = path.a_b(t + h / 2, middle)
        forgotten += h * w * (w - 1) * (b * (s_y - s)**2).sum(dim=1)
        gained += h * divergence(guided, middle, t + h / 2)
        x = x + h * guided(middle, t + h / 2)
    gained += log_tilted(x, end)
    assert forgotten.abs().max() > 0.1
    close(gained, forgotten, 1e-3)


@ALL_PATHS
@pytest.mark.parametrize("t", (0.2, 0.6, 0.9))
def test_loss_of_the_exact_field_is_the_variance_of_the_target(path, t):
    """E |u_t(x) - u_t(x|z)|^2 = E Var(u_t(x|z) given x), no 0: D^2 s^2 / (alpha^2 s^2 + beta^2) for
    data N(mu, s^2 I), D the determinant."""
    std = 0.7
    data = oracle.Mixture(mu=[[0.3]], std=[std], weight=[1.0], label=[4])
    torch.manual_seed(0)
    z = 0.3 + std * torch.randn(200000, 1).double()
    times = torch.full((len(z),), t).double()
    loss = cfg_cfm_loss(data.net(path), path, z, labels(4, len(z)), 0.1, times)
    alpha, beta, d_alpha, d_beta = path.at(times[:1], z[:1])
    determinant = d_alpha * beta - alpha * d_beta
    variance = determinant**2 * std**2 / (alpha**2 * std**2 + beta**2)
    close(loss, variance.squeeze(), 0.02)


def test_guidance_leads_to_where_labels_agree_that_lie_in_three_of_ten_cases():
    """The exact field of wrong labels draws them: 70 % at +1, given 1; w = 3 nearly all."""
    lies = oracle.Mixture(mu=[[1.0], [-1.0], [-1.0], [1.0]], std=[0.3] * 4,
                          weight=[0.35, 0.15, 0.35, 0.15], label=[1, 1, 0, 0])
    x = draw_noise(2000, 1)
    right = {}
    for w in (1.0, 3.0):
        field = partial(guided_field, lies.net(CondOT()), y=labels(1, len(x)), w=w)
        right[w] = (euler(field, x, 50) > 0).double().mean()
    assert abs(right[1.0] - 0.7) < 0.03
    assert right[3.0] > 0.9


# ---------------------------------------------------------------- Langevin, predictor-corrector

@ALL_PATHS
@pytest.mark.parametrize("t", (0.2, 0.6))
def test_langevin_stays_in_its_law_and_finds_it(path, t):
    """x <- x + h score + sqrt(2h) xi leaves p_t(.|y) as it is, and leads there from beside it."""
    y = labels(1, 4000)
    noise = draw_noise(4000, 2)
    mean, std = torch.tensor([1.0]), 0.5
    alpha, beta, _, _ = path.at(t, noise[:1, :1])
    law_mean, law_std = alpha * mean, (alpha**2 * std**2 + beta**2).sqrt()
    inside = law_mean + law_std * noise[:, :1]
    beside = inside + beta                                  # as far as its noise is wide
    field = partial(TWO.net(path), y=y)
    torch.manual_seed(0)
    for x, steps in ((inside, 20), (beside, 150)):
        x = langevin(field, x, t, path, steps)
        assert abs(x.mean() - law_mean) < 0.07 * law_std
        assert abs(x.std() / law_std - 1) < 0.05


def law_of_pc(path, w, corrections, steps=100, n=8000):
    """Mean and std of predictor-corrector samples of TWO, y = +1."""
    net = TWO.net(path)
    y = labels(1, n)
    guided = partial(guided_field, net, y=y, w=w)
    x = predictor_corrector(partial(net, y=y), guided, draw_noise(n, 1), steps, path, corrections)
    return moments(x)


@ALL_PATHS
def test_predictor_corrector_comes_near_the_tilted_law_that_the_ode_misses(path):
    """Mean of p(.|y)^3 p^-2 on two Gaussians: 1.05, std 0.46; of the guided ODE about 1.5, 0.31.

    The more Langevin steps, the nearer.
    """
    mean, std = tilted_moments(TWO, 1, 3.0)
    guided = partial(guided_field, TWO.net(path), y=labels(1, 8000), w=3.0)
    ode_mean, ode_std = moments(euler(guided, draw_noise(8000, 1), 100))
    pc_mean, pc_std = law_of_pc(path, 3.0, corrections=1)
    near_mean, near_std = law_of_pc(path, 3.0, corrections=4)
    assert ode_mean - mean > 0.4
    assert 0.07 < pc_mean - mean < 0.15
    assert abs(near_mean - mean) < 0.065
    assert abs(near_std - std) < 0.03
    assert ode_std < pc_std - 0.08


def test_in_the_plane_guidance_bends_samples_away_from_the_other_classes():
    """Total variation from p(.|y)^3 p^-2, cells of 0.37: ODE 0.58, p(.|y) 0.11, corrected 0.05.

    The samples of the ODE move up from the two other classes, further than the tilted law.
    """
    given_y, ode, pc, law = oracle.in_plane(w=3, n=20000).values()

    def distance(a):
        cells = [p.unfold(0, 16, 16).unfold(1, 16, 16).sum(dim=(2, 3)) for p in (a, law)]
        return (cells[0] - cells[1]).abs().sum().item() / 2

    def height(p):
        return (p.flatten() * oracle.plane()[:, 1]).sum().item()
    assert distance(ode) > 0.4
    assert distance(pc) < 0.06 < distance(given_y)
    assert height(given_y) < height(law) < height(pc) < height(ode) - 0.4
    assert 1.6 < height(ode) < 1.75


def test_the_figure_of_p_t_shows_how_far_the_ode_goes_beyond_the_tilted_law():
    """Up is up: a column for t = 0, 1/128, ..., 1, two of black, twelve of the tilted law."""
    image = oracle.over_time(3, n=2000)
    assert (image[::2] == image[1::2]).all()                # two pixels a bin, down
    assert (image[:, ::2] == image[:, 1::2]).all()          # and across
    columns = torch.from_numpy(image[::2, ::2].copy())
    assert columns.shape == (128, 129 + 2 + 12)
    assert (columns[:, 129:131] == 0).all()
    height = torch.linspace(3, -3, 128)[columns.int().argmax(dim=0)]
    assert abs(height[0]) < 0.2                             # N(0, 1)
    assert abs(height[128] - 1.5) < 0.2
    assert (abs(height[131:] - 1.05) < 0.1).all()


@ALL_PATHS
def test_predictor_corrector_is_safe_near_t_1(path):
    """Data that are two points, +1 and -1, almost: h score stays small, and all samples land there.

    The score grows as 1 / beta_t^2, which a step h of the size of the time step would not survive.
    """
    points = oracle.Mixture(mu=[[-1.0], [1.0]], std=[1e-3] * 2, weight=[0.5] * 2, label=[0, 1])
    net = points.net(path)
    y = labels(1, 500)
    for w in (1.0, 8.0):
        guided = partial(guided_field, net, y=y, w=w)
        x = predictor_corrector(partial(net, y=y), guided, draw_noise(500, 1), 50, path, 3)
        assert (x - 1).abs().max() < 0.06


def test_predictor_corrector_without_corrections_is_euler():
    """X_s = X_t + h u_t(X_t), exactly; the last step is Euler's at any number of corrections."""
    field = partial(MIX.net(CondOT()), y=labels(1, 6))
    corrector_times = []

    def corrector(x, t):
        corrector_times.append(t)
        return field(x, t)
    noise = draw_noise(6, 2)
    x = predictor_corrector(field, corrector, noise, 10, CondOT(), corrections=0)
    assert torch.equal(x, euler(field, noise, 10))
    assert corrector_times == []
    seen = []

    def watch(t, x):
        seen.append(t)
    predictor_corrector(field, corrector, noise, 4, CondOT(), corrections=2, watch=watch)
    assert corrector_times == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]
    assert seen == [0.0, 0.25, 0.5, 0.75]


# ---------------------------------------------------------------- away from a label

@ALL_PATHS
@pytest.mark.parametrize("t", (0.1, 0.45, 0.8, 0.97))
def test_guidance_away_from_a_label_follows_both_classifiers(path, t, x):
    """u = u(x|y) + (w - 1) b_t [grad log p_t(y|x) - grad log p_t(y'|x)], y' instead of null."""
    y, other, w = 1, 2, 3.0
    away = guided_field(MIX.net(path), x, t, labels(y, len(x)), w, away_from=other)
    _, b = path.a_b(t, x)
    variable = x.clone().requires_grad_()
    p = MIX.posterior(path, variable, t)
    log_odds = p[:, y].log() - p[:, other].log()
    gradient, = torch.autograd.grad(log_odds.sum(), variable)
    close(away, MIX.u(path, x, t, labels(y, len(x))) + (w - 1) * b * gradient, 1e-7)


@ALL_PATHS
def test_away_from_a_label_at_w_0_is_that_label_and_at_w_1_nothing(path, x):
    """(1 - w) u(x|y') + w u(x|y) is u(x|y') at w = 0, u(x|y) at w = 1; y' = null is guidance."""
    net = MIX.net(path)
    y, other = labels(1, len(x)), labels(2, len(x))
    close(guided_field(net, x, 0.4, y, 0, away_from=2), net(x, 0.4, other))
    close(guided_field(net, x, 0.4, y, 1, away_from=2), net(x, 0.4, y))
    close(guided_field(net, x, 0.4, y, 3.0, away_from=NULL), guided_field(net, x, 0.4, y, 3.0))


def test_samples_move_away_from_the_label_and_not_from_the_third():
    """Of three classes in a triangle, on top and away from the left one: up and to the right.

    The samples move along mu_y - mu_y', and across it not.
    """
    y = labels(0, 4000)
    guided = partial(guided_field, TRIANGLE.net(CondOT()), y=y, w=3.0, away_from=1)
    x = euler(guided, draw_noise(4000, 2), 50)
    moved = x.mean(dim=0) - TRIANGLE.mu[0]
    along = TRIANGLE.mu[0] - TRIANGLE.mu[1]
    along = along / along.norm()
    across = torch.stack([-along[1], along[0]])
    assert moved @ along > 0.8
    assert abs(moved @ across) < 0.05


# ---------------------------------------------------------------- the command

def test_sample_py_corrects_with_the_guided_field_of_each_sample_s_label():
    """--sampler pc is predictor_corrector; sample i depends on (seed, i) alone."""
    net = MIX.net(CondOT())
    guided = partial(guided_field, net, w=3.0)
    y = torch.arange(250) % 3                               # more than two chunks
    options = sample.parse("--w 3 --sampler pc --corrections 2 --steps 5".split())
    model = SimpleNamespace(net=net, path=CondOT())
    simulate = sample.make_simulate(model, None, options, 3.0, 0.0, ignore)
    made = torch.cat(list(generate(simulate, y, (2,), seed=0)))
    some = torch.tensor([0, 120, 249])
    randn = noise_of(0, some.tolist(), (2,))
    wanted = predictor_corrector(partial(net, y=y[some]), partial(guided, y=y[some]), randn(y), 5,
                                 randn=randn, path=CondOT(), corrections=2)
    close(made[some], wanted, 1e-5)


def test_trajectory_shows_x_the_guess_of_its_end_and_where_the_label_tells():
    """Rows x_t, E[z|x_t] = (beta u - beta' x) / D, |u(x|y) - u(x|null)|; t = 0, 0.1, ..., 1.

    Of a network that expects a dark image for label 1, a white one for null: at w = 1 the guess is
    dark at once, and the third row white, as the fields differ by 2 / beta.
    """
    path = CondOT()

    def net(x, t, y):
        z = torch.where(y == NULL, 1.0, -1.0).view(-1, 1, 1, 1).expand_as(x)
        return path.data_to_u(z, x, t)
    model = SimpleNamespace(path=path, net=net, to_images=lambda x: (x[:, 0] > 0).byte())
    y = labels(1, 2)
    trajectory = Trajectory(10, 0.0)
    x = euler(partial(net, y=y), torch.randn(2, 1, 32, 32), 10, watch=trajectory.watch)
    frames = trajectory.frames(model, net, y, model.to_images(x))
    assert frames.shape == (6, 11, 32, 32)
    x_t, guess, difference = frames.view(2, 3, 11, 32, 32).unbind(dim=1)
    assert 0.4 < x_t[:, 0].float().mean() < 0.6             # noise
    assert x_t[:, 10].max() == 0
    assert guess.max() == 0
    assert difference[:, :10].min() == 255
