"""Fields as users take them: derivatives, precision, the ends of time, shapes.

The mathematics of the paths is in test_cfg.py.
"""
from functools import partial

import numpy as np
import pytest
import torch
from torch.func import jvp, vjp, vmap
from conftest import randomize
from test_cfg import ALL_PATHS, MANY, Recorder, close, double, tiny

from cfg_min import cfg_cfm_loss, drop_labels, euler, euler_maruyama, guide, guided_field
from chapters.classifier import NoisyClassifier, classifier_guided_field, measure_label_errors
from chapters.ddpm import cfg_dsm_loss
from chapters.oracle import TWO, Mixture, tilted_moments
from chapters.predictions import DataField, EpsField
from paths import DDPM, CondOT, GaussianPath
from unet import UNet

PATH = CondOT()
Y = torch.zeros(4, dtype=torch.int64)

# ---------------------------------------------------------------- derivatives

def make_field(kind):
    """A field (x, t, y) of a small network in float64, made in one of the ways there are."""
    options = dict(channels=(8, 16), E=16)
    net = randomize(UNet(**options)).double().eval()
    classifier = randomize(NoisyClassifier(**options)).double().eval()
    return {
        "eps": EpsField(net, PATH, 0.98, bound=3.0),
        "guided": partial(guided_field, DataField(net, PATH, 0.98), w=3.0),
        "guided by classifier": partial(classifier_guided_field, net, classifier, PATH, w=3.0),
    }[kind]


FIELDS = pytest.mark.parametrize("kind", ["eps", "guided", "guided by classifier"])


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


def test_one_compiled_graph_serves_all_sizes_of_a_batch():
    """torch.compile(dynamic=True) of a guided field; t a number or (B,)."""
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    field = partial(guided_field, DataField(UNet(channels=(8, 16), E=16), PATH, 0.98), w=3.0)
    for times in (lambda B: 0.3, torch.rand):
        torch._dynamo.reset()
        graphs.clear()
        compiled = torch.compile(field, backend=keep, dynamic=True)
        for B in (2, 3, 5):
            compiled(torch.randn(B, 1, 8, 8), times(B), torch.arange(B))
        assert len(graphs) == 1


# ---------------------------------------------------------------- precision

@ALL_PATHS
def test_time_is_exact_whatever_type_x_has(path):
    """alpha_t and beta_t are those of t in float32, and the network gets that t."""
    t = torch.tensor([0.9981, 0.3217])
    z = torch.ones(2, 1, dtype=torch.bfloat16)
    close(path.sample(z, 0 * z, t), path.alpha(t)[:, None].bfloat16())
    close(path.sample(0 * z, z, t), path.beta(t)[:, None].bfloat16())
    net = Recorder(lambda x, t, y: x)
    guided_field(net, z, t, Y[:2], 3.0)
    assert torch.equal(net.calls[0][1], t.repeat(2))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("w", [3.0, np.float32(3), torch.full((2,), 3.0)])
def test_a_network_of_low_precision_trains_and_samples_in_its_type(kind, w):
    """Factors are wide; what they give is cast back, or the second step of a sampler fails."""
    net = DataField(randomize(UNet(channels=(8, 16), E=16)), PATH, 0.98).to(kind)
    x = torch.randn(2, 1, 8, 8).to(kind)
    field = partial(guided_field, net, y=Y[:2], w=w)
    assert cfg_cfm_loss(net, PATH, x, Y[:2]).dtype == kind
    assert euler(field, x, 2).dtype == kind
    assert euler_maruyama(field, x, 2, PATH).dtype == kind


def test_integers_are_mixed_as_floats():
    """x = alpha z + beta eps for bytes z; alpha as a byte would be 0."""
    z = torch.tensor([[100], [200]], dtype=torch.uint8)
    close(PATH.sample(z, torch.zeros_like(z), 0.9), [[90.0], [180.0]], 1e-5)


# ---------------------------------------------------------------- the ends of time

@ALL_PATHS
@pytest.mark.parametrize("t", [0.0, 1.0, 1.000001, torch.zeros(6)])
@pytest.mark.parametrize("kind", [torch.float64, torch.float16])
def test_fields_are_finite_where_a_solver_may_ask(path, t, kind, x):
    """u is finite at both ends, and just past them, of a z-network and of an eps-network."""
    def net(x, t, y):
        return 0.5 * x

    for field in (DataField(net, path, 0.98), EpsField(net, path, 0.98, bound=1.0)):
        assert field(x.to(kind), t, MANY).isfinite().all()
    assert DDPM().beta(double(1.000001)) == 0
    close(DDPM().d_beta(double(1.0)), -1000 * DDPM().d_alpha(double(1.0)))      # not infinite


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


IMAGES = torch.zeros(4, 1, 8, 8)
FLAT = torch.zeros(4, 8, 8)
REFUSED = {
    "sample": lambda: PATH.sample(IMAGES, FLAT, 0.5),
    "t (1,)": lambda: PATH.sample(IMAGES, IMAGES, torch.rand(1)),
    "guide": lambda: guide(IMAGES, FLAT, 3.0),
    "w (B - 1,)": lambda: guide(IMAGES, IMAGES, torch.ones(3)),
    "guided y (B, 1)": lambda: guided_field(tiny, IMAGES, 0.5, Y[:, None], 3.0),
    "net, w = 3": lambda: guided_field(flat_net, IMAGES, 0.5, Y, 3.0),
    "net as a classifier": lambda: measure_label_errors(flat_net, PATH, IMAGES, Y / 2, IMAGES),
    "net and loss": lambda: cfg_cfm_loss(flat_net, PATH, IMAGES, Y),
    "net and DSM loss": lambda: cfg_dsm_loss(flat_net, PATH, IMAGES, Y),
    "loss t 1.5": lambda: cfg_cfm_loss(tiny, PATH, IMAGES, Y, t=Y + 1.5),
    "loss t -1": lambda: cfg_dsm_loss(tiny, PATH, IMAGES, Y, t=Y - 1.0),
    "label above null": lambda: cfg_cfm_loss(tiny, PATH, IMAGES, Y + 5, null=4),
    "labels (B, 1)": lambda: drop_labels(Y[:, None], 0.1),
    "28 x 28": lambda: UNet()(torch.zeros(4, 1, 28, 28), 0.5, Y),
    "tilt without an integral": lambda: tilted_moments(NARROW, 0, -2.0),
}
NARROW = Mixture(mu=[[0.0], [0.0]], std=[1.0, 3.0], weight=[0.5, 0.5], label=[0, 1])


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_shapes_and_values_that_do_not_fit_are_refused(call):
    """Else shapes would broadcast, and numbers lead, to something that looks right."""
    with pytest.raises((ValueError, TypeError)):
        call()


class Smoothstep(GaussianPath):
    """alpha = 3 t^2 - 2 t^3, beta = 1 - alpha: it starts and ends at rest, so D = alpha' = 0."""

    def alpha(self, t): return 3 * t**2 - 2 * t**3
    def beta(self, t): return 1 - self.alpha(t)
    def d_alpha(self, t): return 6 * t - 6 * t**2
    def d_beta(self, t): return -self.d_alpha(t)


@pytest.mark.parametrize("w", [np.float32(2), torch.tensor(2), torch.full((4,), 2.0)])
def test_a_scale_is_a_number_of_any_kind_or_one_a_sample(w):
    cond, uncond = torch.rand(2, 4, 4)
    close(guide(cond, uncond, w), 2 * cond - uncond, 1e-6)


def test_a_path_with_D_0_trains_and_samples_by_euler():
    """Neither needs a conversion."""
    assert cfg_cfm_loss(tiny, Smoothstep(), IMAGES, Y, t=torch.zeros(4)).isfinite()
    x = torch.randn(4, 1).double()
    ours, condot = (partial(TWO.u, path, y=Y) for path in (Smoothstep(), PATH))
    close(euler(ours, x, 400), euler(condot, x, 400), 0.02)
