"""Fields as users take them: derivatives, precision, the ends of time, shapes; a path of one's own.

The mathematics of the paths is in test_cfg.py.
"""
from functools import partial

import numpy as np
import pytest
import torch
from torch.func import jvp, vjp, vmap

from cfg_min import (cfg_cfm_loss, drop_labels, euler, euler_maruyama, guide,
                     guided_field)
from chapters.classifier import (NoisyClassifier, classifier_gradient,
                                 classifier_guided_field, measure_label_errors)
from chapters.ddpm import cfg_dsm_loss, ddim
from chapters.oracle import TWO, Mixture, repaired_sde, tilted_moments
from chapters.samplers import langevin
from conftest import ALL_PATHS, MANY, MIX, close, double, randomize, tiny
from dit import DiT
from paths import DDPM, CondOT, DataField, EpsField, GaussianPath
from support import mnist
from unet import UNet

# ---------------------------------------------------------------- derivatives

def make_field(kind):
    """A field (x, t, y) of a small network in float64, made in one of the ways there are."""
    options = dict(channels=(8, 16), E=16)
    net = randomize(UNet(**options)).double().eval()
    classifier = randomize(NoisyClassifier(**options)).double().eval()
    path = CondOT()
    return {
        "u": net,
        "z": DataField(net, path, 0.98),
        "eps": EpsField(net, path, bound=3.0),
        "guided": partial(guided_field, DataField(net, path, 0.98), w=3.0),
        "guided by classifier": partial(classifier_guided_field, net, classifier, path, w=3.0),
    }[kind]


FIELDS = pytest.mark.parametrize("kind", ["u", "z", "eps", "guided", "guided by classifier"])


@pytest.fixture
def images():
    """Two images x (2, 1, 8, 8), their times and their labels."""
    return torch.randn(2, 1, 8, 8).double(), double([0.8, 0.9]), torch.tensor([3, 7])


@FIELDS
def test_the_derivative_of_a_field_is_that_of_what_it_returns(kind, images):
    """jvp along (x, t) = (f(x + h v) - f(x - h v)) / 2 h; <v, jvp> = <vjp v, v>."""
    x, t, y = images
    field = partial(make_field(kind), y=y)
    v = torch.randn_like(x), torch.randn_like(t)
    h = 1e-6
    _, along = jvp(field, (x, t), v)
    ahead = field(x + h * v[0], t + h * v[1])
    behind = field(x - h * v[0], t - h * v[1])
    close(along, (ahead - behind) / (2 * h), 1e-5)
    _, pull = vjp(field, x, t)
    g_x, g_t = pull(v[0])
    close((v[0] * along).sum(), (g_x * v[0]).sum() + (g_t * v[1]).sum())


@FIELDS
def test_a_field_works_under_inference_mode_vmap_and_compile(kind, images):
    """All give what a plain call gives."""
    x, t, y = images
    field = make_field(kind)
    plain = field(x, t, y=y)
    with torch.inference_mode():
        close(field(x.clone(), t.clone(), y=y), plain)
    each = vmap(lambda x, t, y: field(x[None], t, y=y[None])[0])
    close(each(x, t, y), plain)
    torch._dynamo.reset()
    compiled = torch.compile(field, backend="eager")
    close(compiled(x, t, y=y), plain)


# ---------------------------------------------------------------- precision

@ALL_PATHS
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_time_is_exact_whatever_type_x_has(path, kind):
    """alpha_t and beta_t are those of t in float32, and the network gets that t."""
    t = torch.tensor([0.9981, 0.3217])
    z = torch.ones(2, 1, dtype=kind)
    close(path.sample(z, 0 * z, t), path.alpha(t)[:, None].to(kind))
    close(path.sample(0 * z, z, t), path.beta(t)[:, None].to(kind))
    seen = []

    def net(x, t, y):
        seen.append(t)
        return x

    guided_field(net, z, t, torch.tensor([1, 2]), 3.0)
    assert torch.equal(seen[0], t.repeat(2))
    for field in (DataField(net, path, 0.98), EpsField(net, path, 1.0)):
        for s in (0.0, 1.0, 0.998):
            assert field(z, s, torch.tensor([1, 2])).isfinite().all()


def test_integers_are_mixed_as_floats():
    """x = alpha z + beta eps for bytes z; alpha as a byte would be 0."""
    z = torch.tensor([[100], [200]], dtype=torch.uint8)
    close(CondOT().sample(z, torch.zeros_like(z), 0.9), [[90.0], [180.0]], 1e-5)


# ---------------------------------------------------------------- the ends of time

@ALL_PATHS
@pytest.mark.parametrize("t", [0.0, 1.0, 1.000001, torch.zeros(6).double(), torch.tensor(1.0)])
def test_fields_are_finite_where_a_solver_may_ask(path, t, x):
    """u is finite at both ends, and just past them, of a z-network and of an eps-network."""
    for make in (DataField, EpsField):          # the bound of t is chosen, or of eps
        assert make(lambda x, t, y: 0.5 * x, path, 0.999)(x, t, MANY).isfinite().all()
    assert DDPM().beta(double(1.000001)) == 0


# ---------------------------------------------------------------- shapes

@ALL_PATHS
def test_time_goes_over_the_batch_and_never_over_the_width(path):
    """t (B,) means t[i] for all of x[i], also where B is the width."""
    z, eps = torch.randn(2, 4, 4, 4, 4)
    t = torch.rand(4)
    x = path.sample(z, eps, t)
    noise = path.u_to_eps(z, eps, t)
    for i in range(4):
        close(x[i], path.alpha(t[i]) * z[i] + path.beta(t[i]) * eps[i], 1e-6)
        close(noise[i:i + 1], path.u_to_eps(z[i:i + 1], eps[i:i + 1], t[i]), 1e-5)


def flat_net(x, t, y):
    return x[:, 0]


def still(x, t):
    return x


PATH = CondOT()
IMAGES = torch.zeros(4, 1, 8, 8)
FLAT = torch.zeros(4, 8, 8)
Y = torch.zeros(4, dtype=torch.int64)
SHAPES = {
    "sample": lambda: PATH.sample(IMAGES, FLAT, 0.5),
    "u_to_data": lambda: PATH.u_to_data(FLAT, IMAGES, 0.5),
    "score_to_u": lambda: PATH.score_to_u(FLAT, IMAGES, 0.5),
    "t (B, 1)": lambda: PATH.sample(IMAGES, IMAGES, torch.rand(4, 1)),
    "t (1,)": lambda: PATH.sample(IMAGES, IMAGES, torch.rand(1)),
    "guide": lambda: guide(IMAGES, FLAT, 3.0),
    "w (B - 1,)": lambda: guide(IMAGES, IMAGES, torch.ones(3)),
    "y (B, 1)": lambda: drop_labels(Y[:, None], 0.1),
    "guided y (B, 1)": lambda: guided_field(tiny, IMAGES, 0.5, Y[:, None], 3.0),
    "guided t (1,)": lambda: guided_field(tiny, IMAGES, torch.rand(1), Y, 3.0),
    "net, w = 0": lambda: guided_field(flat_net, IMAGES, 0.5, Y, 0),
    "net, w = 1": lambda: guided_field(flat_net, IMAGES, 0.5, Y, 1),
    "net, w = 3": lambda: guided_field(flat_net, IMAGES, 0.5, Y, 3.0),
    "net as a classifier": lambda: measure_label_errors(flat_net, PATH, IMAGES, Y / 2, IMAGES),
    "loss y (B - 1,)": lambda: cfg_cfm_loss(tiny, PATH, IMAGES, Y[1:]),
    "DSM loss y (B - 1,)": lambda: cfg_dsm_loss(tiny, PATH, IMAGES, Y[1:]),
    "net and loss": lambda: cfg_cfm_loss(flat_net, PATH, IMAGES, Y),
    "net and DSM loss": lambda: cfg_dsm_loss(flat_net, PATH, IMAGES, Y),
    "gradient y (1,)": lambda: classifier_gradient(NoisyClassifier(), IMAGES, 0.5, Y[:1]),
    "U-Net y (1,)": lambda: UNet()(IMAGES, 0.5, Y[:1]),
    "DiT y (1,)": lambda: DiT(size=8)(IMAGES, 0.5, Y[:1]),
    "28 x 28": lambda: UNet()(torch.zeros(4, 1, 28, 28), 0.5, Y),
    "image that is no square": lambda: DiT()(torch.zeros(4, 1, 16, 64), 0.5, Y),
    "push": lambda: ddim(still, MIX.mu, 3, PATH, 1.0, push=lambda x, s: x[:, :1]),
    "noise of ddim": lambda: ddim(still, MIX.mu, 3, PATH, 1.0, randn=lambda x: x[:, :1]),
    "noise of em": lambda: euler_maruyama(still, MIX.mu, 3, PATH, randn=lambda x: x[:, :1]),
    "accuracy": lambda: mnist.accuracy(lambda x, t: x[:, 0, 0], IMAGES.byte(), Y[:, None]),
    "x of a mixture": lambda: TWO.u(PATH, MIX.mu, 0.5, Y),
    "weight (1,)": lambda: Mixture(mu=[[0.0], [1.0]], std=[1, 1], weight=[1.0], label=[0, 1]),
}
VALUES = {
    "null 2.7": lambda: guided_field(tiny, IMAGES, 0.5, Y, 3.0, null=2.7),
    "label above null": lambda: drop_labels(Y + 11, 0.1),
    "label above null in a loss": lambda: cfg_cfm_loss(tiny, PATH, IMAGES, Y + 5, null=4),
    "eta > 1": lambda: drop_labels(Y, 1.5),
    "eta nan": lambda: drop_labels(Y, float("nan")),
    "t 500": lambda: cfg_cfm_loss(tiny, PATH, IMAGES, Y, t=Y + 500.0),
    "t -1": lambda: cfg_dsm_loss(tiny, PATH, IMAGES, Y, t=Y - 1.0),
    "t a number": lambda: cfg_cfm_loss(tiny, PATH, IMAGES, Y, t=0.5),
    "t0 -1": lambda: euler(still, MIX.mu, 3, t0=-1),
    "t of langevin": lambda: langevin(still, MIX.mu, 500, PATH, 1),
    "langevin steps -1": lambda: langevin(still, MIX.mu, 0.5, PATH, -1),
    "noise > 1": lambda: ddim(still, MIX.mu, 3, PATH, noise=2.0),
    "sigma -1": lambda: euler_maruyama(still, MIX.mu, 3, PATH, sigma=-1.0),
    "sigma(t) -1": lambda: euler_maruyama(still, MIX.mu, 3, PATH, sigma=lambda t: -1.0),
    "no bound": lambda: EpsField(tiny, PATH),
    "y a number": lambda: guided_field(tiny, IMAGES, 0.5, 3, 3.0),
    "y a list": lambda: cfg_cfm_loss(tiny, PATH, IMAGES, [0, 1, 2, 3]),
    "w a list": lambda: guide(IMAGES, IMAGES, [1.0, 2.0, 3.0, 4.0]),
    "label of a mixture": lambda: Mixture(mu=[[0.0]], std=[1.0], weight=[1.0], label=[10]),
    "std 0": lambda: Mixture(mu=[[0.0]], std=[0.0], weight=[1.0], label=[0]),
    "repaired SDE": lambda: repaired_sde(
        lambda x, t, y: torch.where(x < -1, torch.inf, x), MIX.mu, Y, 3.0, 3),
    "tilt without an integral": lambda: tilted_moments(NARROW, 0, -2.0),
}
NARROW = Mixture(mu=[[0.0], [0.0]], std=[1.0, 3.0], weight=[0.5, 0.5], label=[0, 1])
ZERO = {
    "u_to_score": lambda t: PATH.u_to_score(MIX.mu, MIX.mu, t),
    "data_to_u": lambda t: PATH.data_to_u(MIX.mu, MIX.mu, t),
    "eps_to_u": lambda t: PATH.eps_to_u(MIX.mu, MIX.mu, 1 - t),
    "eps_to_data": lambda t: PATH.eps_to_data(MIX.mu, MIX.mu, 1 - t),
    "score_to_u": lambda t: PATH.score_to_u(MIX.mu, MIX.mu, 1 - t),
    "langevin": lambda t: langevin(still, MIX.mu, t, PATH, 1),
}


@pytest.mark.parametrize("call", [*SHAPES.values(), *VALUES.values()], ids=[*SHAPES, *VALUES])
def test_shapes_and_values_that_do_not_fit_are_refused(call):
    """Else shapes would broadcast, and numbers lead, to something that looks right."""
    with pytest.raises((ValueError, TypeError)):
        call()


@pytest.mark.parametrize("call", ZERO.values(), ids=ZERO.keys())
def test_where_alpha_or_beta_is_0_a_number_t_is_refused(call):
    """A tensor t is not looked at, as vmap could not follow."""
    with pytest.raises(ValueError, match="is 0 at t"):
        call(1)
    if call is not ZERO["langevin"]:
        call(torch.tensor(1.0))


@pytest.mark.parametrize("w", [np.float32(2), np.int64(2), torch.tensor(2), torch.full((4,), 2.0)])
def test_a_scale_is_a_number_of_any_kind_or_one_a_sample(w):
    cond, uncond = torch.rand(2, 4, 4)
    close(guide(cond, uncond, w), 2 * cond - uncond, 1e-6)
    close(guide(cond, uncond, torch.arange(4))[3], 3 * cond[3] - 2 * uncond[3], 1e-6)


def test_dropped_labels_keep_their_type():
    assert drop_labels(Y, 1.0, null=10.0).tolist() == [10] * 4
    assert drop_labels(Y, 1.0, null=10.0).dtype == Y.dtype


# ---------------------------------------------------------------- a path of one's own

class Smoothstep(GaussianPath):
    """alpha = 3 t^2 - 2 t^3, beta = 1 - alpha: it starts and ends at rest, so D = alpha' = 0."""

    def alpha(self, t): return 3 * t**2 - 2 * t**3
    def beta(self, t): return 1 - self.alpha(t)
    def d_alpha(self, t): return 6 * t - 6 * t**2
    def d_beta(self, t): return -self.d_alpha(t)


def test_a_path_with_D_0_trains_and_samples_by_euler():
    """Neither needs a conversion; those that do say that D is 0, and work later."""
    path = Smoothstep()
    theta = torch.zeros(1, requires_grad=True)
    loss = cfg_cfm_loss(lambda x, t, y: theta * x, path, IMAGES, Y, t=torch.zeros(4))
    loss.backward()
    assert theta.grad.isfinite()
    x = torch.randn(4, 1).double()
    field = partial(TWO.u, path, y=Y)
    close(euler(field, x, 400), euler(partial(TWO.u, CondOT(), y=Y), x, 400), 0.02)
    for sampler in (euler_maruyama, ddim):
        with pytest.raises(ValueError, match="D is 0"):
            sampler(field, x, 10, path=path)
        assert sampler(field, x, 10, path=path, t0=0.1).isfinite().all()
