"""experiments/: the guides against the limiting cases of their papers; measures; plots.

The fields are exact: a mixture of oracle.py, float64, on CondOT.
"""
import re
import struct
import zlib
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import checkpoint
import command
import mnist
from cfg_min import NULL, euler, guided_field
from conftest import close, error_line
from experiments import guides, measures, plots
from oracle import Mixture
from paths import CondOT

THREE = Mixture([[-1.0, 0.5, 0.0], [1.0, -0.5, 0.3], [0.2, 1.5, -1.0]], std=[0.5, 0.4, 0.6],
                weight=[0.3, 0.5, 0.2], label=[0, 1, 2])
NET = partial(THREE.u, CondOT())
Y = torch.arange(12) % 3
EVERY_T = pytest.mark.parametrize("t", [0.05, 0.3, 0.6, 0.95])


@pytest.fixture
def noise():
    return torch.randn(12, 3).double()


def unconditional(x, t, y):
    return NET(x, t, torch.full_like(y, NULL))


def use(guide, x, t, w, **options):
    """What a guide makes of the exact fields at x."""
    return guide(NET(x, t, Y), unconditional(x, t, Y), x, t, w, **options)


def scale_of(guide, t, *options):
    """The w for which a guide is CFG, from cond = 1 and uncond = 0."""
    one = torch.ones(1, 1).double()
    return guide(one, 0 * one, one, t, *options).item()


def move(guide, x, t, **options):
    """How far a guide moves E[z|x, y] at w = 3; and E[z|x, y]."""
    z = CondOT().u_to_data(NET(x, t, Y), x, t)
    return CondOT().u_to_data(use(guide, x, t, 3.0, **options), x, t) - z, z


def length(a):
    return guides.dot(a, a).sqrt()


# ---------------------------------------------------------------- guides.py

@EVERY_T
@pytest.mark.parametrize("guide", [
    guides.cfg, guides.interval, guides.rising, guides.rescale, guides.apg, guides.autoguidance,
    partial(guides.cfg_zero_star, start=0.0)])
def test_scale_one_is_the_conditional_field(noise, guide, t):
    """guide(cond, uncond, x, t, 1) = cond, of each sample by itself."""
    close(use(guide, noise, t, 1.0), NET(noise, t, Y))
    together = use(guide, noise, t, 3.0)
    cond, uncond = NET(noise, t, Y), unconditional(noise, t, Y)
    close(guide(cond[:1], uncond[:1], noise[:1], t, 3.0), together[:1])


@EVERY_T
@pytest.mark.parametrize("guide", [
    guides.cfg, partial(guides.interval, low=0.0, high=1.0), partial(guides.rescale, phi=0.0),
    partial(guides.apg, eta=1.0, radius=1e9), guides.autoguidance])
def test_each_guide_is_cfg_in_its_limit(noise, guide, t):
    """(1 - w) u_t(x|null) + w u_t(x|y), as cfg_min.guided_field has it."""
    close(use(guide, noise, t, 3.0), guided_field(NET, noise, t, Y, 3.0))


def test_interval_of_the_paper_in_our_time():
    """sigma = (1 - t) / t: 2.9 >= sigma > 0.28 is guided, what is 3 % outside it is not."""
    for sigma, scale in ((2.99, 1), (2.81, 3), (0.289, 3), (0.271, 1)):
        assert scale_of(guides.interval, 1 / (1 + sigma), 3.0) == scale


def test_rising_scale_has_mean_w_and_starts_conditional():
    """w(0) = 1, and the mean of w(t) over [0, 1] is w."""
    scales = [scale_of(guides.rising, t, 3.0) for t in (0.0, 0.25, 0.75, 1.0)]
    assert scales[0] == 1
    assert sum(scales) / 4 == pytest.approx(3.0)


@pytest.mark.parametrize("steps", [1, 7, 20])
def test_cfg_plus_plus_is_ddim_that_renoises_without_the_label(noise, steps):
    """alpha_s z_lam + beta_s eps(x|null) is Euler's step with w(t) = lam s (1 - t) / h, mean w."""
    path = CondOT()
    lam = guides.lam_of(3.0, 1 / steps)
    scales = [scale_of(guides.cfg_plus_plus, k / steps, lam, 1 / steps) for k in range(steps)]
    assert sum(scales) / steps == pytest.approx(3.0)
    x = noise
    for k in range(steps):
        t, s = k / steps, (k + 1) / steps
        z = path.u_to_data(torch.lerp(unconditional(x, t, Y), NET(x, t, Y), lam), x, t)
        x = s * z + (1 - s) * path.u_to_eps(unconditional(x, t, Y), x, t)
    rows = {name: guide for name, guide, _ in guides.rows_of(NET, None, 1 / steps)}
    close(euler(lambda x, t: use(rows["CFG++"], x, t, 3.0), noise, steps), x)


@EVERY_T
def test_rescale_has_the_spread_of_cond(noise, t):
    """phi = 1 has std(cond), and the direction of CFG; theirs is phi = 0.7."""
    cond, u = NET(noise, t, Y), use(guides.cfg, noise, t, 3.0)
    whole = use(guides.rescale, noise, t, 3.0, phi=1.0)
    close(guides.std(whole), guides.std(cond))
    close(whole / guides.std(whole), u / guides.std(u))
    close(use(guides.rescale, noise, t, 3.0), 0.7 * whole + 0.3 * u)


@EVERY_T
def test_apg_moves_z_at_right_angles_to_itself(noise, t):
    """eta = 0, the default: <z_guided - z, z> = 0, and what eta = 1 has more is along z."""
    across, z = move(guides.apg, noise, t)
    along = move(guides.apg, noise, t, eta=1.0)[0] - across
    close(guides.dot(across, z), torch.zeros(12, 1))
    close(guides.dot(along, z).abs(), length(along) * length(z))
    assert (length(across) > 1e-9).all()


def test_apg_cuts_d_to_the_radius_and_keeps_its_direction(noise):
    """eta = 1: |z_guided - z| = min((w - 1) |d|, (w - 1) radius), along d."""
    cut, _ = move(guides.apg, noise, 0.3, eta=1.0, radius=0.1)
    free, _ = move(guides.cfg, noise, 0.3)
    assert (length(free) > 0.2).any()
    close(length(cut), length(free).clamp(max=0.2))
    close(cut / length(cut), free / length(free))


@EVERY_T
def test_cfg_zero_star_scale_minimises_the_distance_to_cond(noise, t):
    """w = 0 leaves s uncond: <cond - s uncond, uncond> = 0. Before start, u = 0."""
    cond, uncond = NET(noise, t, Y), unconditional(noise, t, Y)
    best = use(guides.cfg_zero_star, noise, t, 0.0)
    close(guides.dot(cond - best, uncond), torch.zeros(12, 1))
    close(length(best) * length(uncond), guides.dot(best, uncond).abs())
    close(use(guides.cfg_zero_star, noise, 0.03, 3.0), torch.zeros(12, 3))


def test_autoguidance_takes_the_error_of_the_weak_network_back(noise):
    """If both err alike, cond = u + e and weak = u + 2 e, then w = 2 gives u."""
    u, e = NET(noise, 0.5, Y), noise.sin()
    rows = {name: (guide, second) for name, guide, second in guides.rows_of(NET, "weak", 0.1)}
    guide, second = rows["autoguidance"]
    assert second == "weak"
    close(guide(u + e, u + 2 * e, noise, 0.5, 2.0), u)


def test_every_row_of_the_table_guides_its_own_way(noise):
    """Eight rows; all ends differ at w = 3."""
    def weak(x, t, y):
        return 0.5 * NET(x, t, y)
    ends = set()
    for _, guide, second in guides.rows_of(NET, weak, 1 / 10):
        x = euler(lambda x, t: guide(NET(x, t, Y), second(x, t, Y), x, t, 3.0), noise, 10)
        assert x.isfinite().all()
        ends.add(round(x.sum().item(), 6))
    assert len(ends) == 8


# ---------------------------------------------------------------- measures.py

@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Measures against 900 digits, 700 of them for the evaluator, which is hardly trained."""
    with np.load(mnist.FILE) as npz:
        arrays = {key: npz[key][:4000] for key in npz}
    np.savez(tmp_path / "some.npz", **arrays)
    monkeypatch.setattr(measures, "EVALUATOR", tmp_path / "evaluator.pt")
    monkeypatch.setattr(measures, "load_evaluator", partial(measures.load_evaluator, steps=30))
    monkeypatch.chdir(tmp_path)
    return partial(measures.Measures, "some.npz")


def test_frechet_is_the_distance_of_two_gaussians(noise):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): b = 3 a + 1 has C_b = 9 C_a."""
    other = 3 * noise + 1
    means = (noise.mean(dim=0) - other.mean(dim=0)).square().sum().item()
    variance = noise.var(dim=0).sum().item()
    assert measures.frechet(noise, other) == pytest.approx(means + (1 + 9 - 2 * 3) * variance)
    assert measures.frechet(noise, noise) == pytest.approx(0, abs=1e-9)


def test_real_digits_are_as_good_as_digits_can_be(evaluate):
    """Their labels are their own, their distance is to other digits; inverted ones are far away."""
    measure = evaluate()
    labels = torch.arange(200) % 10
    places, rest = measure.split(labels)
    assert torch.equal(measure.y_test[places], labels)
    assert not set(places.tolist()) & set(rest.tolist())
    assert measure.y_test[rest].bincount().unique().numel() == 1
    real = measure.real_digits(labels)
    row = measure(real, labels)
    guesses = measures.apply(measure.evaluator, real).argmax(dim=1)
    assert row["label accuracy"] == pytest.approx(100 * (guesses == labels).double().mean().item())
    assert row["diversity"] == pytest.approx(1, abs=0.1)
    assert measure(255 - real, labels)["Frechet"] > 10 * row["Frechet"]
    with pytest.raises(command.BadInput, match="at most"):
        measure(real, torch.zeros(200, dtype=torch.int64))


def test_the_evaluator_is_kept_whole_and_trained_anew_for_other_data(evaluate, capsys):
    first = evaluate().evaluator
    second = evaluate().evaluator
    assert capsys.readouterr().out.count("training the evaluator") == 1
    assert torch.equal(first[-1].weight, second[-1].weight)
    checkpoint.read(measures.EVALUATOR)
    measures.load_evaluator(torch.zeros(50, 1, 32, 32).byte(), torch.arange(50) % 10)
    assert "training the evaluator" in capsys.readouterr().out


def test_c2st_is_a_half_of_what_is_alike_and_all_of_what_is_not():
    """50 % of samples that are the real digits, 100 % of black ones beside white ones."""
    grey = torch.full((16, 1, 32, 32), 90, dtype=torch.uint8)
    assert measures.classify_two_samples(grey, grey, steps=20) == 50
    assert measures.classify_two_samples(0 * grey, 0 * grey + 255, steps=20) == 100


@pytest.mark.parametrize("images, labels", [
    (np.zeros((30, 28, 28), np.uint8), np.arange(30) % 10), (np.zeros((30, 32, 32)), np.arange(30)),
    (np.zeros((30, 32, 32), np.uint8), np.arange(29) % 10),
    (np.zeros((30, 32, 32), np.uint8), np.full(30, NULL)),
    (np.zeros((1, 32, 32), np.uint8), np.arange(1)), (np.array([{}]), np.arange(1)), (None, None)])
def test_samples_that_cannot_be_measured_are_one_line(evaluate, capsys, images, labels):
    """Of another size or kind, without labels, one alone, a pickle, not there."""
    if images is not None:
        np.savez("samples.npz", images=images, labels=labels)
    evaluate()
    line = ["samples.npz", "--data", "some.npz"]
    assert command.run(partial(measures.main, line)) == 2
    error_line(capsys)


def test_the_table_of_measures_and_that_of_guides_have_their_rows(evaluate, unet, capsys,
                                                                  monkeypatch):
    """A file of sample.py; rules of w = 1 that are no guidance have one row's numbers."""
    labels = np.arange(40) % 10
    np.savez("samples.npz", images=np.zeros((40, 32, 32), np.uint8), labels=labels)
    assert measures.main(["samples.npz", "--data", "some.npz"]) is None
    monkeypatch.setattr(guides, "Measures", evaluate)
    guides.main(["--n", "20", "--steps", "2", "--w", "1", "3", "--ckpt", str(unet)])
    out = capsys.readouterr().out
    rows = dict(re.findall(r"^(.{30})((?: +[\d.]+)+)$", out, re.MULTILINE))
    rows = {name.strip(): numbers.split() for name, numbers in rows.items()}
    assert {"40 real digits", "samples.npz", "20 real digits", "w = 3  CFG"} <= set(rows)
    assert len(rows) == 3 + 2 * 7
    for name in ("interval", "rising scale", "rescale", "APG"):
        assert rows[f"w = 1  {name}"] == rows["w = 1  CFG"]


# ---------------------------------------------------------------- plots.py

def test_a_line_goes_where_its_numbers_say():
    """The corners of the axes, and the middle; what lies above the frame is left out."""
    marks = [plots.line([0, 5, 10], [1, 2, 3]), plots.dots([0], [9])]
    text = plots.svg([plots.axes(marks, (0, 10), (1, 3), "a < b", "t", "x")] * 2)
    assert len(ElementTree.fromstring(text)) == 3           # the background and two panels
    left, right, top, bottom = (plots.LEFT, plots.LEFT + plots.WIDTH, plots.TOP,
                                plots.TOP + plots.HEIGHT)
    middle = f"{(left + right) / 2:.1f} {(top + bottom) / 2:.1f}"
    assert f"{left:.1f} {bottom:.1f}L{middle}L{right:.1f} {top:.1f}" in text
    assert "h0" not in text
    assert "a &lt; b" in text


@pytest.mark.parametrize("low, high, ticks", [
    (0, 1.08, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-3, 4, [-3, -2, -1, 0, 1, 2, 3, 4]),
    (0, 12000, [0, 2000, 4000, 6000, 8000, 10000, 12000])])
def test_ticks_are_round_numbers_within_the_range(low, high, ticks):
    assert plots.choose_ticks(low, high) == pytest.approx(ticks)


def test_a_moving_picture_has_its_frames_in_order():
    """Chunks of an animated PNG: whole, numbered 0, 1, 2, ..., each frame's pixels and time."""
    frames = [np.full((3, 5), k, np.uint8) for k in (7, 8)]
    raw = plots.animated_png(frames, [0.1, 2.5])
    place, numbers, pixels, times = 8, [], [], []
    while place < len(raw):
        size, = struct.unpack(">I", raw[place:place + 4])
        kind, data = raw[place + 4:place + 8], raw[place + 8:place + 8 + size]
        place += 12 + size
        assert struct.pack(">I", zlib.crc32(kind + data)) == raw[place - 4:place]
        if kind in (b"fcTL", b"fdAT"):
            numbers.append(data[3])
        if kind == b"fcTL":
            times.append(struct.unpack(">HH", data[20:24]))
        if kind == b"fdAT":
            pixels.append(zlib.decompress(data[4:])[1])
    assert numbers == [0, 1, 2, 3]
    assert times == [(10, 100), (250, 100)]
    assert pixels == [7, 8]
