"""Samplers of all chapters: where they end, how exact they are, when they call the field."""
from functools import partial

import pytest
import torch
from conftest import moments_of
from test_cfg import ALL_PATHS, GAUSS, MANY, close, distance, double, labels, net_of

from cfg_min import euler, euler_maruyama, euler_maruyama_step, guided_field, times
from chapters.ddpm import ddim
from chapters.oracle import TWO, Mixture, tilted_moments
from chapters.samplers import gibbs, heun, langevin, predictor_corrector
from paths import PATHS, CondOT

SAMPLERS = {
    "euler": euler,
    "heun": heun,
    "euler_maruyama": partial(euler_maruyama, path=CondOT()),
    "ddim": partial(ddim, path=CondOT(), noise=0.5),
    "predictor_corrector": lambda field, x, steps, **options: predictor_corrector(
        field, x, steps, path=CondOT(), corrector=field, **options),
}
ALL_SAMPLERS = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())


@ALL_SAMPLERS
def test_samplers_begin_at_t0_and_end_at_1(sampler, x):
    """Equal steps from t0 to exactly 1."""
    seen = []

    def field(x, t):
        seen.append(t)
        return x

    sampler(field, x, 5, t0=0.5)
    assert list(times(5, 0.5))[-1][1] == 1
    close(sorted(set(seen)), [0.5, 0.6, 0.7, 0.8, 0.9])


@ALL_SAMPLERS
def test_samplers_refuse_a_field_of_another_shape(sampler, x):
    """A field of (6, 1) for x of (6, 2), which torch would stretch."""
    with pytest.raises(ValueError, match="shape"):
        sampler(lambda x, t: x[:, :1], x, 3)


def field_of_gauss(path):
    return lambda x, t: GAUSS.u(path, x, t, labels(0, x))


def exact_end(sampler, path, steps, **options):
    """Mean and standard deviation of X_1 for data N(0.7, 0.4^2), exactly."""
    def run(x, randn):
        if sampler not in (euler, heun):
            options.update(path=path, randn=randn)
        if sampler is predictor_corrector:
            options.update(corrector=field_of_gauss(path))
        return sampler(field_of_gauss(path), x, steps, **options)

    return double(moments_of(run, steps + 1))


@ALL_PATHS
@pytest.mark.parametrize("sampler, options", [
    (euler_maruyama, {}), (euler_maruyama, dict(sigma=0.5)), (euler_maruyama, dict(sigma=2.0)),
    (heun, {}), (ddim, dict(noise=0.0)), (ddim, dict(noise=0.5)), (ddim, dict(noise=1.0)),
    (predictor_corrector, {})])
def test_samplers_end_in_the_distribution_of_the_data(sampler, options, path):
    """X_1 ~ p_data. 2 X(h/2) - X(h) cancels an error of order h."""
    coarse = exact_end(sampler, path, 100, **options)
    fine = exact_end(sampler, path, 200, **options)
    mean, std = 2 * fine - coarse
    assert abs(mean / 0.7 - 1) < 0.005
    assert abs(std / 0.4 - 1) < 0.01


@pytest.mark.parametrize("name", ["condot", "cosine"])              # DDPM's u is infinite at t = 1
@pytest.mark.parametrize("sampler, order", [(euler, 1), (heun, 2)])
def test_twice_the_steps_divide_the_error_by_2_to_the_order(sampler, order, name):
    """Euler has order 1, Heun order 2."""
    exact = double([0.7, 0.4])
    coarse = exact_end(sampler, PATHS[name], 50) - exact
    fine = exact_end(sampler, PATHS[name], 100) - exact
    assert 0.8 * 2**order < coarse.norm() / fine.norm() < 1.25 * 2**order


def test_ddim_on_condot_is_euler():
    """x + h u = s z + (1 - s) eps, for z = x + (1 - t) u and eps = x - t u."""
    noise = torch.randn(50, 1).double()
    guided = partial(guided_field, partial(TWO.u, CondOT()), y=labels(1, noise), w=3.0)
    close(ddim(guided, noise, 20, CondOT()), euler(guided, noise, 20))


# ---------------------------------------------------------------- Langevin, predictor-corrector

@ALL_PATHS
@pytest.mark.parametrize("shift, steps", [(0.0, 20), (1.0, 150)])
def test_langevin_steps_keep_their_distribution_and_find_it(path, shift, steps):
    """x <- x + h score + sqrt(2 h) xi leaves p_t as it is, and leads there from beside it."""
    t = 0.6
    alpha, beta = path.alpha(double(t)).item(), path.beta(double(t)).item()
    mean = alpha * 0.7
    std = (alpha**2 * 0.4**2 + beta**2)**0.5

    def run(x, randn):
        return langevin(field_of_gauss(path), mean + shift + std * x, t, path, steps, randn)

    found_mean, found_std = moments_of(run, steps + 1)
    assert abs(found_mean - mean) < 0.06 * std
    assert abs(found_std / std - 1) < 0.06


def guided_and_conditional(w, x, mixture=TWO, path=CondOT()):
    net = partial(mixture.u, path)
    y = labels(1, x)
    return partial(guided_field, net, y=y, w=w), partial(net, y=y)


def test_a_predictor_corrector_comes_near_the_tilted_distribution():
    """p(.|y)^3 p^-2 on two Gaussians: mean 1.05, std .46; the more Langevin steps, the nearer."""
    noise = torch.randn(4000, 1).double()
    guided, conditional = guided_and_conditional(3.0, noise)
    mean, std = tilted_moments(TWO, 1, 3.0)
    far = predictor_corrector(conditional, noise, 60, CondOT(), corrector=guided, corrections=1)
    near = predictor_corrector(conditional, noise, 60, CondOT(), corrector=guided, corrections=5)
    assert euler(guided, noise, 60).mean() > mean + 0.4
    assert mean + 0.08 < far.mean() < mean + 0.2
    assert abs(near.mean() - mean) < 0.06
    assert abs(near.std() - std) < 0.03


def test_corrections_follow_each_step_but_the_last():
    """Without corrections it is Euler's method; with 2 the corrector is called twice at each s."""
    noise = torch.randn(6, 1).double()
    guided, conditional = guided_and_conditional(3.0, noise)
    called = []

    def corrector(x, t):
        called.append(t)
        return guided(x, t)

    plain = predictor_corrector(conditional, noise, 4, CondOT(), corrector, corrections=0)
    assert torch.equal(plain, euler(conditional, noise, 4))
    assert not called
    predictor_corrector(conditional, noise, 4, CondOT(), corrector, corrections=2)
    assert called == [0.25, 0.25, 0.5, 0.5, 0.75, 0.75]


@ALL_PATHS
def test_corrections_are_safe_near_t_1(path):
    """Data that are nearly two points: h score stays small, though the score grows as beta^-2."""
    points = Mixture(mu=[[-1.0], [1.0]], std=[1e-3] * 2, weight=[0.5] * 2, label=[0, 1])
    noise = torch.randn(200, 1).double()
    guided, conditional = guided_and_conditional(8.0, noise, points, path)
    x = predictor_corrector(conditional, noise, 50, path, corrector=guided, corrections=3)
    assert distance(x, 1.0) < 0.06


def test_gibbs_draws_then_noises_and_denoises_with_guidance():
    """15 of 25 steps draw; each round noises the draw to t = middle and takes ten steps more."""
    noise, *eps = torch.randn(3, 6, 1).double()
    guided, conditional = guided_and_conditional(3.0, noise)
    draws = iter(eps)
    ours = gibbs(conditional, noise, 25, CondOT(), guided, middle=0.4, rounds=2,
                 randn=lambda x: next(draws))
    x = euler(conditional, noise, 15)
    for e in eps:
        x = euler(guided, 0.4 * x + 0.6 * e, 10, t0=0.4)
    close(ours, x)


# ---------------------------------------------------------------- the SDE

@ALL_PATHS
def test_euler_maruyama_adds_no_more_noise_than_the_path_has_left(path, x):
    """h sigma_t^2 <= beta_s^2, whatever sigma is asked for."""
    def step(xi):
        field = partial(net_of(path), y=MANY)
        return euler_maruyama_step(field, x, 0.5, 0.6, path, 100.0, lambda _: xi)

    close(step(torch.ones_like(x)) - step(torch.zeros_like(x)), path.beta(double(0.6)).expand(6, 2))


def test_an_sde_without_the_score_term_ends_wider_than_the_data():
    """dX = u dt + sigma dW, as the handwritten notes print it: at sigma = 1 std .62, not .4."""
    def sampler(x, randn):
        for k in range(200):
            x = x + GAUSS.u(CondOT(), x, k / 200, labels(0, x)) / 200 + randn() / 200**0.5
        return x

    _, std = moments_of(sampler, 201)
    _, ours = exact_end(euler_maruyama, CondOT(), 200, sigma=1.0)
    assert abs(ours - 0.4) < 0.01
    assert std > 0.6
