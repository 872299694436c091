"""Losses: conditional and marginal ones have one gradient."""
import pytest
import torch
from conftest import line
from test_cfg import ALL_PATHS, close, double, gradient
from torch.distributions import Normal

from cfg_min import cfg_cfm_loss
from chapters.ddpm import cfg_dsm_loss


@ALL_PATHS
@pytest.mark.parametrize("kind", ["u", "eps"])
def test_conditional_and_marginal_losses_have_one_gradient(path, kind, monkeypatch):
    """grad E || m - u_t(x|z) ||^2 = grad E || m - u_t(x) ||^2 for a model m; in eps this is DSM.

    Left: our losses, each pair of z and eps once. z has 3 values; eps has -sqrt(3), 0, 0, 0, 0,
    sqrt(3), whose moments up to the fifth are N(0, 1)'s, all that these gradients ask for.
    Right: an integral over x, the score in it by autograd of log p_t(x).
    """
    z = double([-1.2] * 5 + [0.3] * 2 + [1.1] * 3)
    pairs = torch.cartesian_prod(z, double([-3**0.5, 0, 0, 0, 0, 3**0.5]))
    monkeypatch.setattr(torch, "randn_like", lambda z: pairs[:, 1:])
    theta = double([0.3, -0.7, 0.2]).requires_grad_()
    t = double(0.4)

    def model(x, t, y):
        return theta[0] + theta[1] * x + theta[2] * x**2

    loss = {"u": cfg_cfm_loss, "eps": cfg_dsm_loss}[kind]
    conditional = loss(model, path, pairs[:, :1], torch.zeros(60).long(), t=t)

    def log_p(x):                               # of p_t(x), the mean of all p_t(x|z)
        return Normal(path.alpha(t) * z, path.beta(t)).log_prob(x).exp().mean(dim=1).log()

    x = line(-9, 9, 2001)[:, None]
    score = gradient(log_p, x)
    target = {"u": path.score_to_u(score, x, t), "eps": -path.beta(t) * score}[kind]
    p = log_p(x).softmax(dim=0)[:, None]
    marginal = (p * (model(x, t, None) - target)**2).sum()
    assert conditional > marginal + 1e-2        # by the variance of the target, given x
    close(torch.autograd.grad(conditional, theta)[0], torch.autograd.grad(marginal, theta)[0], 1e-7)
