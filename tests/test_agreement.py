"""Agreement with libraries that others wrote; each test is skipped where its library is missing.

    pip install torchdiffeq flow_matching diffusers
"""
from functools import partial

import pytest
import torch
from test_ddpm import Chain
from conftest import line
from test_cfg import MANY, close

from cfg_min import euler, guided_field
from chapters import rules
from chapters.ddpm import ddim
from chapters.oracle import TRIANGLE
from paths import CondOT

FIELD = partial(guided_field, partial(TRIANGLE.u, CondOT()), y=MANY, w=3.0)


def test_torchdiffeq_euler_and_dopri5(x):
    """Euler's steps are equal to rounding; dopri5 is where many steps of Euler lead."""
    odeint = pytest.importorskip("torchdiffeq").odeint

    def field(t, x):
        return FIELD(x, t)

    theirs = odeint(field, x, line(0, 1, 51), method="euler")[-1]
    close(euler(FIELD, x, 50), theirs, 1e-12)
    close(euler(FIELD, x, 4000), odeint(field, x, line(0, 1, 2))[-1], 2e-3)


def test_flow_matching_conversions(x):
    """u, z and eps become each other as in flow_matching's AffineProbPath."""
    path = pytest.importorskip("flow_matching.path")
    theirs = path.AffineProbPath(path.scheduler.CondOTScheduler())
    ours = CondOT()
    u = x.cos()
    t = torch.tensor(0.3, dtype=torch.float64)
    close(ours.u_to_data(u, x, t), theirs.velocity_to_target(u, x, t), 1e-12)
    close(ours.u_to_eps(u, x, t), theirs.velocity_to_epsilon(u, x, t), 1e-12)
    close(ours.data_to_u(u, x, t), theirs.target_to_velocity(u, x, t), 1e-12)
    close(ours.eps_to_u(u, x, t), theirs.epsilon_to_velocity(u, x, t), 1e-12)


@pytest.mark.parametrize("name, noise", [("DDIMScheduler", 0.0), ("DDPMScheduler", 1.0)])
def test_diffusers_ddim_and_ddpm(name, noise, x):
    """The last 100 of 1000 steps for eps = sin x, with the same new noise."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(1000)
    theirs = x
    torch.manual_seed(1)
    for k in range(99, -1, -1):
        theirs = scheduler.step(theirs.sin(), k, theirs).prev_sample
    torch.manual_seed(1)
    ours = ddim(lambda x, t: Chain().eps_to_u(x.sin(), x, t), x, 100, Chain(), noise, t0=0.9)
    close(ours, theirs, 1e-4)                   # its abar is float32


@pytest.mark.parametrize("rule, name, options", [
    (rules.cfg, "ClassifierFreeGuidance", dict(guidance_scale=3.0)),
    (rules.rescale, "ClassifierFreeGuidance", dict(guidance_scale=3.0, guidance_rescale=0.7)),
    (partial(rules.cfg_zero_star, start=0.0), "ClassifierFreeZeroStarGuidance",
     dict(guidance_scale=3.0, zero_init_steps=0)),
    (rules.apg, "AdaptiveProjectedGuidance", dict(
        guidance_scale=2.0, adaptive_projected_guidance_rescale=2.5, eta=0.0,
        adaptive_projected_guidance_momentum=None, use_original_formulation=True)),
])
def test_diffusers_guiders(rule, name, options):
    """At x = 0 and t = 0 u is z; the scale of APG is w - 1 there, of the others w."""
    guiders = pytest.importorskip("diffusers.guiders")
    cond, uncond = torch.randn(2, 4, 1, 8, 8).double()
    guider = getattr(guiders, name)(**options)
    guider.set_state(step=5, num_inference_steps=25, timestep=torch.tensor(500))
    ours = rule(cond, uncond, torch.zeros_like(cond), 0.0, 3.0)
    close(ours, guider.forward(cond, uncond)[0], 1e-6)
