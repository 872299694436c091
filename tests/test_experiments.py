"""Published rules against the limiting cases of their papers; measures; plots.

The fields are exact: a mixture of chapters.oracle, float64, on CondOT.
"""
import re
from functools import partial
from inspect import signature

import numpy as np
import pytest
import torch
from conftest import save_first
from test_cfg import close, labels

from cfg_min import NULL, guided_field
from chapters import rules
from chapters.oracle import Mixture
from chapters.samplers import gibbs
from chapters.vae import vae_loss
from experiments import guides, measures, plots
from paths import CondOT

THREE = Mixture([[-1.0, 0.5, 0.0], [1.0, -0.5, 0.3], [0.2, 1.5, -1.0]], std=[0.5, 0.4, 0.6],
                weight=[0.3, 0.5, 0.2], label=[0, 1, 2])
NET = partial(THREE.u, CondOT())
X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(12) % 3
EVERY_T = pytest.mark.parametrize("t", [0.05, 0.3, 0.6, 0.95])


def fields(t):
    """u_t(x|y), u_t(x|null) and x."""
    return NET(X, t, Y), NET(X, t, labels(NULL, X)), X


def use(guide, t, w, **options):
    """What a guide makes of the exact fields."""
    return guide(*fields(t), t, w, **options)


def scale_of(guide, t, *options):
    """The w for which a guide is CFG, from cond = 1 and uncond = 0."""
    one = torch.ones(1, 1).double()
    return guide(one, 0 * one, one, t, *options).item()


def move(guide, **options):
    """How far a guide moves E[z|x, y] at t = 0.3 and w = 3; and E[z|x, y]."""
    z = CondOT().u_to_data(NET(X, 0.3, Y), X, 0.3)
    return CondOT().u_to_data(use(guide, 0.3, 3.0, **options), X, 0.3) - z, z


def length(a):
    return rules.dot(a, a).sqrt()


# ---------------------------------------------------------------- the rules

@pytest.mark.parametrize("guide", [rules.rescale, rules.apg, rules.cfg_zero_star])
def test_a_rule_is_a_number_where_a_field_is_0(guide):
    zero = torch.zeros(2, 3).double()
    for cond, uncond in ((X[:2], zero), (zero, X[:2]), (zero, zero)):
        assert guide(cond, uncond, zero, 0.5, 3.0).isfinite().all()


@pytest.mark.parametrize("function, name, value", [
    (rules.apg, "radius", 2.5), (rules.rescale, "phi", 0.7), (rules.cfg_zero_star, "start", 0.04),
    (gibbs, "middle", 0.5), (vae_loss, "std", 0.1)])
def test_constants_are_those_that_the_documents_name(function, name, value):
    assert signature(function).parameters[name].default == value


def test_an_interval_holds_its_ends_though_t_is_rounded():
    assert scale_of(rules.interval, 0.78 + 1e-15, 3.0) == 3
    assert scale_of(rules.interval, 0.26 - 1e-15, 3.0) == 3


@EVERY_T
@pytest.mark.parametrize("guide", [
    rules.cfg, rules.interval, rules.rising, rules.rescale, rules.apg, rules.autoguidance,
    partial(rules.cfg_zero_star, start=0.0)])
def test_scale_one_is_the_conditional_field(guide, t):
    """guide(cond, uncond, x, t, 1) = cond, of each sample by itself."""
    close(use(guide, t, 1.0), NET(X, t, Y))
    close(guide(*(part[:1] for part in fields(t)), t, 3.0), use(guide, t, 3.0)[:1])


@EVERY_T
@pytest.mark.parametrize("guide", [
    rules.cfg, partial(rules.interval, low=0.0, high=1.0), partial(rules.rescale, phi=0.0),
    partial(rules.apg, eta=1.0, radius=1e9), rules.autoguidance])
def test_each_guide_is_cfg_in_its_limit(guide, t):
    """(1 - w) u_t(x|null) + w u_t(x|y), as cfg_min.guided_field has it."""
    close(use(guide, t, 3.0), guided_field(NET, X, t, Y, 3.0))


def test_interval_and_rising_scale_are_those_of_their_papers():
    """2.9 >= (1 - t) / t > 0.28 is guided, what is 3 % outside is not; w(0) = 1, mean w."""
    for sigma, scale in ((2.99, 1), (2.81, 3), (0.289, 3), (0.271, 1)):
        assert scale_of(rules.interval, 1 / (1 + sigma), 3.0) == scale
    scales = [scale_of(rules.rising, t, 3.0) for t in (0.0, 0.25, 0.75, 1.0)]
    assert scales[0] == 1
    assert sum(scales) / 4 == pytest.approx(3.0)


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_cfg_plus_plus_is_ddim_that_renoises_without_the_label(steps):
    """alpha_s z_lam + beta_s eps(x|null) is Euler's step with w(t) = lam s (1 - t) / h, mean w."""
    path = CondOT()
    lam = rules.lam_of(3.0, 1 / steps)
    scales = [scale_of(rules.cfg_plus_plus, k / steps, lam, 1 / steps) for k in range(steps)]
    assert sum(scales) / steps == pytest.approx(3.0)
    for k in range(steps):
        t, s = k / steps, (k + 1) / steps
        cond, uncond, x = fields(t)
        z = path.u_to_data(torch.lerp(uncond, cond, lam), x, t)
        step = rules.cfg_plus_plus(cond, uncond, x, t, lam, 1 / steps) / steps
        close(x + step, s * z + (1 - s) * path.u_to_eps(uncond, x, t))


@EVERY_T
def test_rescale_has_the_spread_of_cond(t):
    """phi = 1 has std(cond), and the direction of CFG; theirs is phi = 0.7."""
    cond, u = NET(X, t, Y), use(rules.cfg, t, 3.0)
    whole = use(rules.rescale, t, 3.0, phi=1.0)
    close(rules.std(whole), rules.std(cond))
    close(whole / rules.std(whole), u / rules.std(u))
    close(use(rules.rescale, t, 3.0), 0.7 * whole + 0.3 * u)


def test_apg_moves_z_at_right_angles_to_itself_and_not_far():
    """<z_guided - z, z> = 0; with eta = 1 along d, and no farther than (w - 1) radius."""
    across, z = move(rules.apg)
    along = move(rules.apg, eta=1.0)[0] - across
    close(rules.dot(across, z), torch.zeros(12, 1))
    close(rules.dot(along, z).abs(), length(along) * length(z))
    cut, _ = move(rules.apg, eta=1.0, radius=0.1)
    free, _ = move(rules.cfg)
    assert (length(free) > 0.2).any()
    close(length(cut), length(free).clamp(max=0.2))
    close(cut / length(cut), free / length(free))


@EVERY_T
def test_cfg_zero_star_scale_minimises_the_distance_to_cond(t):
    """w = 0 leaves s uncond: <cond - s uncond, uncond> = 0. Before start, u = 0."""
    cond, uncond, _ = fields(t)
    best = use(rules.cfg_zero_star, t, 0.0)
    close(rules.dot(cond - best, uncond), torch.zeros(12, 1))
    close(length(best) * length(uncond), rules.dot(best, uncond).abs())
    close(use(rules.cfg_zero_star, 0.03, 3.0), torch.zeros(12, 3))


# ---------------------------------------------------------------- measures.py

@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Measures against 1500 digits, with an evaluator that is hardly trained."""
    monkeypatch.setattr(measures, "EVALUATOR", tmp_path / "evaluator.pt")
    monkeypatch.setattr(measures, "load_evaluator", partial(measures.load_evaluator, steps=5))
    monkeypatch.chdir(tmp_path)
    return partial(measures.Measures, save_first(1500, "some.npz"))


def test_frechet_is_the_distance_of_two_gaussians():
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): b = 3 a + 1 has C_b = 9 C_a."""
    other = 3 * X + 1
    means = (X.mean(dim=0) - other.mean(dim=0)).square().sum().item()
    variance = X.var(dim=0).sum().item()
    assert measures.frechet(X, other) == pytest.approx(means + (1 + 9 - 2 * 3) * variance)
    with pytest.raises(ValueError):
        measures.frechet(X * torch.nan, X)


def test_real_digits_are_as_good_as_digits_can_be(evaluate):
    """Their labels are their own, their distance is to other digits; inverted ones are far away."""
    measure = evaluate()
    labels = torch.arange(200) % 10
    places, rest = measure.split(labels)
    assert torch.equal(measure.y_test[places], labels)
    assert not set(places.tolist()) & set(rest.tolist())
    real = measure.real_digits(labels)
    row = measure(real, labels)
    guesses = measures.apply(measure.evaluator, real).argmax(dim=1)
    assert row["label accuracy"] == 100 * (guesses == labels).double().mean().item()
    assert row["diversity"] == pytest.approx(1, abs=0.1)
    assert measure(255 - real, labels)["Frechet"] > 10 * row["Frechet"]


def test_the_evaluator_is_trained_once_and_anew_where_it_is_damaged(evaluate, capsys):
    for _ in range(2):
        evaluate()
        evaluate()
        assert capsys.readouterr().out.count("training the evaluator") == 1
        raw = measures.EVALUATOR.read_bytes()
        measures.EVALUATOR.write_bytes(raw[:2000] + b"x" + raw[2001:])


def test_the_table_of_measures_and_that_of_guides_have_their_rows(evaluate, unet, capsys,
                                                                  monkeypatch):
    """A file of sample.py; at w = 1 most rules are no guidance, so their numbers are one row's."""
    labels = np.arange(40) % 10
    np.savez("samples.npz", images=np.zeros((40, 32, 32), np.uint8), labels=labels)
    measures.main(["samples.npz", "--data", "some.npz"])
    monkeypatch.setattr(guides, "Measures", evaluate)
    guides.main(["--n", "20", "--steps", "2", "--w", "1", "--ckpt", str(unet)])
    out = capsys.readouterr().out
    rows = re.findall(r"^(.+?) {3,}([\d. ]+)$", out, re.MULTILINE)
    rows = {name: numbers.split() for name, numbers in rows}
    assert {"40 real digits", "samples.npz", "20 real digits"} < set(rows)
    for name in ("interval", "rising scale", "rescale", "APG"):
        assert rows[f"w = 1  {name}"] == rows["w = 1  CFG"]


# ---------------------------------------------------------------- plots.py

def test_a_line_goes_where_its_numbers_say():
    """From corner to corner; ticks at round numbers."""
    lines = [plots.line([0, 5, 10], [1, 2, 3])]
    text = plots.axes(lines, (0, 10), (1, 3), "title", "t", "x")
    left, top = plots.LEFT, plots.TOP
    right, bottom = left + plots.WIDTH, top + plots.HEIGHT
    middle = f"{(left + right) / 2:.1f} {(top + bottom) / 2:.1f}"
    assert f"{left:.1f} {bottom:.1f}L{middle}L{right:.1f} {top:.1f}" in text
    assert plots.choose_ticks(0, 1.08) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
