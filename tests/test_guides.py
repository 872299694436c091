"""The guides of benchmarks/guides.py against the limiting cases of their papers; measures.py.

The fields are exact: a mixture of oracle.py, float64, on CondOT.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
import guides                                                   # noqa: E402
import measures                                                 # noqa: E402
from cfg_min import NULL, ddim, euler, guided_field             # noqa: E402
from command import BadInput                                    # noqa: E402
from oracle import Mixture                                      # noqa: E402
from paths import CondOT                                        # noqa: E402

TIMES = 0.05, 0.3, 0.6, 0.95
MU = [[-1.0, 0.5, 0.0], [1.0, -0.5, 0.3], [0.2, 1.5, -1.0]]
THREE = Mixture(MU, std=[0.5, 0.4, 0.6], weight=[0.3, 0.5, 0.2], label=[0, 1, 2])
NET = THREE.net(CondOT())
Y = torch.arange(12) % 3
PLAIN = guides.cfg, guides.interval, guides.rising, guides.rescale, guides.apg, guides.autoguidance


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def noise():
    """x at t = 0, (12, 3) float64, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 3, generator=generator, dtype=torch.float64)


def fields(t):
    """cond, uncond, x: the exact fields at points x of t."""
    x = noise()
    return NET(x, t, Y), NET(x, t, torch.full_like(Y, NULL)), x


def use(guide, t, w, **options):
    """What a guide makes of the exact fields."""
    cond, uncond, x = fields(t)
    return guide(cond, uncond, x, t, w, **options)


def scale_of(guide, t, *options):
    """The w for which a guide is CFG, from cond = 1 and uncond = 0."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return guide(one, 0 * one, one, t, *options).item()


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("guide", PLAIN)
def test_scale_one_is_the_conditional_field(guide, t):
    """guide(cond, uncond, x, t, 1) = cond."""
    cond, _, _ = fields(t)
    close(use(guide, t, 1.0), cond)


@pytest.mark.parametrize("t", TIMES)
def test_cfg_is_guided_field(t):
    """(1 - w) uncond + w cond, as cfg_min.guided_field has it from one network."""
    close(use(guides.cfg, t, 3.0), guided_field(NET, noise(), t, Y, 3.0))


def test_interval_guides_inside_and_only_there():
    """w inside [low, high], 1 outside; [0, 1] is CFG."""
    cond, _, _ = fields(0.1)
    close(use(guides.interval, 0.1, 3.0, low=0.2, high=0.8), cond)
    cond, _, _ = fields(0.9)
    close(use(guides.interval, 0.9, 3.0, low=0.2, high=0.8), cond)
    for t in (0.2, 0.5, 0.8):
        close(use(guides.interval, t, 3.0, low=0.2, high=0.8), use(guides.cfg, t, 3.0))
    for t in TIMES:
        close(use(guides.interval, t, 3.0, low=0.0, high=1.0), use(guides.cfg, t, 3.0))


def test_interval_of_the_paper_in_our_time():
    """sigma = (1 - t) / t: 2.9 >= sigma > 0.28 is guided, what is 3 % outside it is not."""
    for sigma, scale in ((2.99, 1), (2.81, 3), (0.289, 3), (0.271, 1)):
        assert scale_of(guides.interval, 1 / (1 + sigma), 3.0) == scale


def test_rising_scale_has_mean_w_and_starts_conditional():
    """w(0) = 1, and the mean of w(t) over [0, 1] is w."""
    mean = sum(scale_of(guides.rising, (k + 0.5) / 100, 3.0) for k in range(100)) / 100
    assert scale_of(guides.rising, 0.0, 3.0) == 1
    assert mean == pytest.approx(3.0)


def ddim_renoised_without_label(x, lam, steps):
    """CFG++ as its paper has it: x_s = alpha_s z_lam + beta_s eps(x|null)."""
    path = CondOT()
    for k in range(steps):
        t, s = k / steps, (k + 1) / steps
        cond = NET(x, t, Y)
        uncond = NET(x, t, torch.full_like(Y, NULL))
        eps_lam = torch.lerp(path.u_to_eps(uncond, x, t), path.u_to_eps(cond, x, t), lam)
        u_lam = torch.lerp(uncond, cond, lam)
        z_lam = path.u_to_data(u_lam, x, t)
        close(t * z_lam + (1 - t) * eps_lam, x)                 # z_lam is Tweedie's for eps_lam
        x = s * z_lam + (1 - s) * path.u_to_eps(uncond, x, t)
    return x


@pytest.mark.parametrize("steps", (1, 7, 20))
def test_cfg_plus_plus_is_cfg_with_a_scale_that_depends_on_t(steps):
    """s z_lam + (1 - s) eps_null = x + h u, u guided with w(t) = lam s (1 - t) / h."""
    def field(x, t):
        cond = NET(x, t, Y)
        uncond = NET(x, t, torch.full_like(Y, NULL))
        return guides.cfg_plus_plus(cond, uncond, x, t, 0.6, 1 / steps)
    close(euler(field, noise(), steps), ddim_renoised_without_label(noise(), 0.6, steps))


def test_cfg_plus_plus_of_lam_zero_is_unconditional_ddim():
    """lam = 0: no guidance at all."""
    def uncond(x, t):
        return NET(x, t, torch.full_like(Y, NULL))
    close(ddim_renoised_without_label(noise(), 0.0, 9), ddim(uncond, noise(), 9, CondOT()))


@pytest.mark.parametrize("steps", (1, 2, 25, 50))
def test_mean_scale_of_cfg_plus_plus_is_w(steps):
    """mean over k of lam (k + 1) (steps - k) / steps = w; lam = 1 in 50 steps is w = 8.84."""
    h = 1 / steps
    lam = guides.lam_of(3.0, h)
    scales = [scale_of(guides.cfg_plus_plus, k * h, lam, h) for k in range(steps)]
    assert sum(scales) / steps == pytest.approx(3.0)
    assert scales[0] == pytest.approx(lam)
    assert scales[-1] == pytest.approx(lam)
    assert guides.lam_of(8.84, 1 / 50) == pytest.approx(1.0)


@pytest.mark.parametrize("t", TIMES)
def test_rescale_of_zero_is_cfg_and_of_one_has_the_spread_of_cond(t):
    """phi = 0 is CFG; phi = 1 has std(cond), and the direction of CFG; theirs is 0.7."""
    cond, _, _ = fields(t)
    u = use(guides.cfg, t, 3.0)
    close(use(guides.rescale, t, 3.0, phi=0.0), u)
    whole = use(guides.rescale, t, 3.0, phi=1.0)
    close(guides.std(whole), guides.std(cond))
    close(whole / guides.std(whole), u / guides.std(u))
    close(use(guides.rescale, t, 3.0), 0.7 * whole + 0.3 * u)


@pytest.mark.parametrize("t", TIMES)
def test_apg_with_all_of_d_is_cfg(t):
    """eta = 1 and no limit on |d|: z + (w - 1) d, which is CFG."""
    close(use(guides.apg, t, 3.0, eta=1.0, radius=1e9), use(guides.cfg, t, 3.0))


def moved(guide, t, **options):
    """z_guided - z at w = 3: how far a guide moves E[z|x, y]; and z."""
    cond, _, x = fields(t)
    z = CondOT().u_to_data(cond, x, t)
    return CondOT().u_to_data(use(guide, t, 3.0, **options), x, t) - z, z


def length(a):
    return guides.dot(a, a).sqrt()


@pytest.mark.parametrize("t", TIMES)
def test_apg_moves_z_at_right_angles_to_itself(t):
    """eta = 0, the default: <z_guided - z, z> = 0, and what eta = 1 has more is along z."""
    across, z = moved(guides.apg, t)
    whole, _ = moved(guides.apg, t, eta=1.0)
    close(guides.dot(across, z), torch.zeros(12, 1).double())
    along = whole - across
    close(guides.dot(along, z).abs(), length(along) * length(z))
    assert (length(across) > 1e-9).all()


def test_apg_cuts_d_to_the_radius_and_keeps_its_direction():
    """eta = 1: |z_guided - z| = min((w - 1) |d|, (w - 1) radius), along d."""
    cut, _ = moved(guides.apg, 0.3, eta=1.0, radius=0.1)
    free, _ = moved(guides.cfg, 0.3)
    assert (length(free) > 0.2).any()
    close(length(cut), length(free).clamp(max=0.2))
    close(cut / length(cut), free / length(free))


@pytest.mark.parametrize("t", TIMES)
def test_cfg_zero_star_scale_minimises_the_distance_to_cond(t):
    """w = 0 leaves s uncond, whose error |cond - s uncond|^2 is smaller than any other s has."""
    cond, uncond, _ = fields(t)
    best = use(guides.cfg_zero_star, t, 0.0, start=0.0)
    close(guides.dot(cond - best, uncond), torch.zeros(12, 1).double())
    error = guides.dot(cond - best, cond - best)
    for factor in (0.9, 1.1):
        other = cond - factor * best
        assert (guides.dot(other, other) > error).all()


def test_cfg_zero_star_is_zero_first_and_then_conditional_at_scale_one():
    """u = 0 for t < start; then w = 1 is cond; with uncond along cond, every w is cond."""
    close(use(guides.cfg_zero_star, 0.02, 3.0), torch.zeros(12, 3).double())
    cond, _, x = fields(0.5)
    close(use(guides.cfg_zero_star, 0.5, 1.0), cond)
    close(guides.cfg_zero_star(cond, 2 * cond, x, 0.5, 3.0), cond)


def test_autoguidance_with_itself_changes_nothing():
    """weak = cond: (1 - w) cond + w cond = cond at every w."""
    cond, _, x = fields(0.5)
    close(guides.autoguidance(cond, cond, x, 0.5, 3.0), cond)


def test_autoguidance_takes_the_error_of_the_weak_network_back():
    """If both err alike, cond = u + e and weak = u + 2 e, then w = 2 gives u."""
    u, error, x = fields(0.5)
    close(guides.autoguidance(u + error, u + 2 * error, x, 0.5, 2.0), u)


def test_guides_scale_each_sample_by_itself():
    """A sample's guided field does not depend on the others of its batch."""
    cond, uncond, x = fields(0.3)
    for guide in (guides.rescale, guides.apg, guides.cfg_zero_star):
        together = guide(cond, uncond, x, 0.3, 3.0)
        close(guide(cond[:1], uncond[:1], x[:1], 0.3, 3.0), together[:1])


def test_rows_guide_away_from_the_right_field():
    """CFG is guided_field; autoguidance away from NET / 2 with w = 3 is 3 NET - 2 NET / 2."""
    def weak(x, t, y):
        return NET(x, t, y) / 2
    rows = {name: (guide, second) for name, guide, second in guides.rows_of(NET, weak, 0.1)}
    guide, second = rows["CFG"]
    u = guides.guided(guide, NET, second, 3.0)(noise(), 0.3, Y)
    close(u, guided_field(NET, noise(), 0.3, Y, 3.0))
    guide, second = rows["autoguidance"]
    u = guides.guided(guide, NET, second, 3.0)(noise(), 0.3, Y)
    close(u, 2 * NET(noise(), 0.3, Y))


def test_every_row_of_the_table_guides_its_own_way():
    """rows_of: names, and finite fields, all of them different at w = 3."""
    def weak(x, t, y):
        return 0.5 * NET(x, t, y)
    ends = {}
    for name, guide, second in guides.rows_of(NET, weak, 1 / 10):
        field = guides.guided(guide, NET, second, 3.0)
        ends[name] = euler(lambda x, t: field(x, t, Y), noise(), 10)
    assert len(ends) == 8
    assert all(end.isfinite().all() for end in ends.values())
    assert len({round(end.sum().item(), 6) for end in ends.values()}) == 8


def test_the_judge_can_be_trained_where_gradients_are_off():
    """As on the first run of guides.py, which draws its samples without gradients."""
    images = torch.randint(0, 256, (20, 1, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        net = measures.fit(measures.make_reader(10), images, torch.arange(20) % 10, 1, batch=10)
    assert measures.outputs(net, images).shape == (20, 10)


class MeanGrey:
    """Instead of Measures: of every image, its mean grey level, whatever is asked."""

    seen = []                                                   # labels

    def __call__(self, images, labels, apart):
        self.seen.append(labels.tolist())
        grey = images.double().mean().item()
        return {"read": grey, "diversity": 0.5, "Frechet": 2.0}

    def real_digits(self, labels):
        images = torch.full((len(labels), 1, 32, 32), 90, dtype=torch.uint8)
        images[:, :, :8] = 255                                  # a quarter of it is white
        return images


def test_the_table_has_a_row_a_guide_and_plain_ones_are_no_guidance_at_w_1(monkeypatch, capsys):
    """python benchmarks/guides.py, of an exact field for images of one grey for each label."""
    def net(x, t, y):
        return CondOT().data_to_u((y / 20 + 0.05).view(-1, 1, 1, 1).expand_as(x), x, t)
    model = SimpleNamespace(config=dict(path="condot"), net=net, shape=lambda: (1, 32, 32),
                            to_images=lambda x: measures.mnist.to_bytes(x)[:, 0])
    monkeypatch.setattr(guides, "Model", lambda file, device: model)
    monkeypatch.setattr(guides, "Measures", MeanGrey)
    guides.main(["--n", "12", "--steps", "3", "--w", "1", "3", "--weak", "no.pt"])
    out = capsys.readouterr().out
    assert "no autoguidance without no.pt" in out
    assert "w = 1" in out
    assert "w = 3" in out
    rows = {row[:13].strip(): row[13:].split() for row in out.splitlines()}
    assert rows["real digits"] == ["131.2", "0.50", "1.00", "25.00"]        # 255/4 + 90 3/4
    mean = 127.5 * (1 + 58 / 240)                               # of the labels 0 ... 9, 0, 1
    assert float(rows["no guidance"][0]) == pytest.approx(mean, abs=0.3)
    for name in ("CFG", "interval", "rising scale", "rescale", "APG"):
        assert rows[name][:4] == rows["no guidance"]
    for name in ("CFG", "interval", "rising scale", "CFG++", "rescale", "CFG-Zero*"):
        assert rows[name][4:] != rows["no guidance"]
    assert "autoguidance" not in rows
    assert all(labels == [*range(10), 0, 1] for labels in MeanGrey.seen)


# ---------------------------------------------------------------- benchmarks/measures.py

def test_frechet_is_the_distance_of_two_gaussians():
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): b = 3 a + 1 has C_b = 9 C_a."""
    a = noise()
    b = 3 * a + 1
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum().item()
    variance = a.var(dim=0).sum().item()
    assert measures.frechet(a, b) == pytest.approx(means + (1 + 9 - 2 * 3) * variance)
    assert measures.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_border_is_the_outer_four_pixels():
    images = torch.full((3, 1, 32, 32), 40, dtype=torch.uint8)
    images[:, :, 4:28, 4:28] = 200
    assert measures.border_grey(images) == 40


def test_shapes_are_without_faint_grain():
    """Under 32 black, over 223 white, the rest as it was."""
    images = torch.tensor([0, 31, 32, 223, 224, 255], dtype=torch.uint8)
    assert measures.shapes(images).tolist() == [0, 0, 32, 223, 255, 255]


def grey_images(level):
    return torch.full((8, 1, 32, 32), level, dtype=torch.uint8)


def test_told_apart_is_a_half_of_what_is_alike_and_all_of_what_is_not():
    """50 % of samples that are the real digits, 100 % of black ones beside white ones."""
    assert measures.told_apart(grey_images(90), grey_images(90), steps=20, batch=4) == 50
    assert measures.told_apart(grey_images(0), grey_images(255), steps=20, batch=4) == 100


def test_few_samples_are_told_apart_too():
    """Twelve, which is less than a batch: black from white always."""
    images = torch.zeros(12, 1, 32, 32, dtype=torch.uint8)
    assert measures.told_apart(images, images + 255, steps=20) == 100


def test_real_digits_stand_in_the_order_of_the_labels():
    """Of each label its digits in turn, from the skip-th on."""
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    x = torch.arange(6)[:, None]
    labels = torch.tensor([1, 0, 1])
    assert measures.real_like(labels, x, y)[:, 0].tolist() == [1, 0, 2]
    assert measures.real_like(labels, x, y, skip=1)[:, 0].tolist() == [2, 3, 4]
    with pytest.raises(BadInput, match="too few real digits 1"):
        measures.real_like(labels, x, y, skip=2)


def test_the_test_digits_are_as_good_as_digits_can_be(monkeypatch, tmp_path):
    """No distance to themselves, in features and in grey levels, and a diversity of 1."""
    sizes = dict(x_train=500, y_train=500, x_test=100, y_test=100)
    with np.load(measures.mnist.FILE) as npz:
        np.savez(tmp_path / "few.npz", **{key: npz[key][:n] for key, n in sizes.items()})
    judge = measures.make_reader(10).eval()
    monkeypatch.setattr(measures, "load_judge", lambda x, y: judge)
    measure = measures.Measures(tmp_path / "few.npz")
    row = measure(measure.test, measure.y_test, apart=False)
    assert row["Frechet"] == pytest.approx(0, abs=1e-3)
    assert row["grey"] == 0
    assert row["diversity"] == 1
    reads = measures.outputs(judge, measure.test).argmax(dim=1)
    assert row["read"] == pytest.approx(100 * (reads == measure.y_test).double().mean().item())
    assert row["black"] == pytest.approx(100 * (measure.test == 0).double().mean().item())
    assert row["border"] < 1
    assert "apart" not in row
    assert "shape" not in row
    inverted = measure(255 - measure.test, measure.y_test, apart=False)
    assert inverted["grey"] > 50


def test_samples_are_told_from_other_digits_than_those_of_the_first_row(monkeypatch, tmp_path):
    """Else a row of real digits would be compared with itself; also where all are of one label."""
    sizes = dict(x_train=500, y_train=500, x_test=100, y_test=100)
    with np.load(measures.mnist.FILE) as npz:
        np.savez(tmp_path / "few.npz", **{key: npz[key][:n] for key, n in sizes.items()})
    monkeypatch.setattr(measures, "load_judge", lambda x, y: measures.make_reader(10).eval())
    compared = []
    monkeypatch.setattr(measures, "told_apart", lambda samples, real: compared.append(real))
    measure = measures.Measures(tmp_path / "few.npz")
    for labels in (torch.arange(40) % 10, torch.full((20,), 3)):
        row = measure.real_digits(labels)
        measure(row, labels)
        first = {x.numpy().tobytes() for x in row}
        others = {x.numpy().tobytes() for x in compared.pop()}
        assert not first & others
