"""Agreement with libraries that others wrote; each test is skipped where its library is missing.

    pip install torchdiffeq flow_matching diffusers
"""
from functools import partial

import pytest
import torch

from cfg_min import euler, guided_field
from chapters import oracle
from chapters.ddpm import ddim
from conftest import close
from experiments import guides
from paths import PATHS, CondOT, GaussianPath

Y = torch.tensor([0, 1, 2, 1, 0, 2])
FIELD = partial(guided_field, partial(oracle.TRIANGLE.u, CondOT()), y=Y, w=3.0)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(6, 2, dtype=torch.float64)


def test_torchdiffeq_euler_and_dopri5(x):
    """Euler's steps are equal to rounding; dopri5 is where many steps of Euler lead."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    times = torch.linspace(0, 1, 51, dtype=torch.float64)
    theirs = torchdiffeq.odeint(lambda t, x: FIELD(x, t), x, times, method="euler")[-1]
    close(euler(FIELD, x, 50), theirs, 1e-12)
    exact = torchdiffeq.odeint(lambda t, x: FIELD(x, t), x, times[[0, -1]], rtol=1e-9, atol=1e-9)
    close(euler(FIELD, x, 4000), exact[-1], 2e-3)


def test_flow_matching_conversions_and_solver(x):
    """u, z and eps become each other as in flow_matching's AffineProbPath; its Euler is ours."""
    pytest.importorskip("flow_matching")
    from flow_matching.path import AffineProbPath
    from flow_matching.path.scheduler import CondOTScheduler
    from flow_matching.solver import ODESolver
    theirs = AffineProbPath(CondOTScheduler())
    ours = CondOT()
    u = x.cos()
    t = torch.tensor(0.3, dtype=torch.float64)
    close(ours.u_to_data(u, x, t), theirs.velocity_to_target(u, x, t), 1e-12)
    close(ours.u_to_eps(u, x, t), theirs.velocity_to_epsilon(u, x, t), 1e-12)
    close(ours.data_to_u(u, x, t), theirs.target_to_velocity(u, x, t), 1e-12)
    close(ours.eps_to_u(u, x, t), theirs.epsilon_to_velocity(u, x, t), 1e-12)
    sampled = ODESolver(FIELD).sample(x, step_size=0.02, method="euler")
    close(euler(FIELD, x, 50), sampled, 1e-6)   # its times are float32


def test_diffusers_euler_of_flow_matching(x):
    """FlowMatchEulerDiscreteScheduler counts time from data to noise, and so its u is -u."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - k / 50 for k in range(50)])
    theirs = x
    for k, time in enumerate(scheduler.timesteps):
        theirs = scheduler.step(-FIELD(theirs, k / 50), time, theirs).prev_sample
    close(euler(FIELD, x, 50), theirs, 1e-5)    # its steps are float32


class Discrete(GaussianPath):
    """The chain of a diffusers scheduler as a path, at t = 1 - (k + 1) / T; t = 1 is the data."""

    def __init__(self, abar):
        self.abar = torch.cat([torch.ones(1), abar]).double()

    def at_step(self, t):
        return self.abar[((1 - t) * (len(self.abar) - 1)).round().long()]

    def alpha(self, t): return self.at_step(t).sqrt()
    def beta(self, t): return (1 - self.at_step(t)).sqrt()
    def d_alpha(self, t): return torch.ones_like(t)
    def d_beta(self, t): return -torch.ones_like(t)


@pytest.mark.parametrize("name, noise", [("DDIMScheduler", 0.0), ("DDPMScheduler", 1.0)])
def test_diffusers_ddim_and_ddpm_step(name, noise, x):
    """One step from k = 600 to 599 of T = 1000, eps given, with the same new noise."""
    diffusers = pytest.importorskip("diffusers")
    options = dict(clip_sample=False, beta_schedule="linear")
    scheduler = getattr(diffusers, name)(num_train_timesteps=1000, **options)
    scheduler.set_timesteps(1000)
    path = Discrete(scheduler.alphas_cumprod)
    eps = x.sin()
    torch.manual_seed(1)
    theirs = scheduler.step(eps, 600, x).prev_sample
    t, s = 1 - 601 / 1000, 1 - 600 / 1000

    def field(x, now):
        return path.eps_to_u(eps, x, t)

    torch.manual_seed(1)
    one_step = StepsOf([(t, s)])
    ours = one_step.run(ddim, field, x, path=path, noise=noise)
    close(ours, theirs, 1e-5)                   # its abar is float32


class StepsOf:
    """Runs a sampler over the given steps (t, s) instead of equal ones to t = 1."""

    def __init__(self, pairs):
        self.pairs = pairs

    def run(self, sampler, *arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ddpm.times", lambda steps, t0: self.pairs)
            return sampler(*arguments, steps=1, **options)


def images():
    torch.manual_seed(0)
    return torch.randn(2, 4, 1, 8, 8, dtype=torch.float64)


@pytest.mark.parametrize("ours, theirs, options", [
    (guides.cfg, "ClassifierFreeGuidance", {}),
    (partial(guides.rescale, phi=0.7), "ClassifierFreeGuidance", dict(guidance_rescale=0.7)),
    (partial(guides.cfg_zero_star, start=0.0), "ClassifierFreeZeroStarGuidance",
     dict(zero_init_steps=0)),
])
def test_diffusers_guiders(ours, theirs, options):
    """CFG, rescaled CFG and CFG-Zero* on a velocity; diffusers' guidance_scale is our w."""
    pytest.importorskip("diffusers")
    from diffusers import guiders
    cond, uncond = images()
    guider = getattr(guiders, theirs)(guidance_scale=3.0, **options)
    guider.set_state(step=5, num_inference_steps=25, timestep=torch.tensor(500))
    expected = guider.forward(cond, uncond)[0]
    close(ours(cond, uncond, torch.zeros_like(cond), 0.5, 3.0), expected, 1e-6)


def test_diffusers_adaptive_projected_guidance():
    """APG on z: the same radius and eta, no momentum. In this formulation its scale is w - 1."""
    pytest.importorskip("diffusers")
    from diffusers import guiders
    z, z_null = images()
    x = torch.zeros_like(z)
    path = PATHS["condot"]
    guider = guiders.AdaptiveProjectedGuidance(
        guidance_scale=2.0, adaptive_projected_guidance_rescale=2.5, eta=0.0,
        adaptive_projected_guidance_momentum=None, use_original_formulation=True)
    guider.set_state(step=5, num_inference_steps=25, timestep=torch.tensor(500))
    expected = guider.forward(z, z_null)[0]
    u = guides.apg(path.data_to_u(z, x, 0.5), path.data_to_u(z_null, x, 0.5), x, 0.5, 3.0)
    close(path.u_to_data(u, x, 0.5), expected, 1e-6)
