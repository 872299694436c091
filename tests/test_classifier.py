"""The noisy classifier: its network, its loss, its gradient. The field it guides: test_cfg.py."""
from functools import partial

import pytest
import torch
from torch.distributions import Normal
from conftest import randomize
from test_cfg import (ALL_PATHS, MIX, TIMES, call_loss, check_draws, classifier_of, close, distance,
                      double, gradient, labels, net_of)

from cfg_min import NULL, guided_field
from chapters.classifier import (NoisyClassifier, classifier_gradient, classifier_loss,
                                 likelihood_weight, measure_label_errors)
from chapters.oracle import TWO
from paths import CondOT, Cosine


def test_the_classifier_gives_ten_logits_that_depend_on_t_and_all_its_weights():
    """classifier(x, t) -> (B, 10); t (B,) or a number."""
    net = randomize(NoisyClassifier())
    x = torch.randn(2, 1, 32, 32)
    early = net(x, 0.0)
    assert early.shape == (2, 10)
    assert distance(early, net(x, torch.ones(2))) > 1e-4
    early.log_softmax(dim=1)[:, 3].sum().backward()
    for name, p in net.named_parameters():
        assert p.grad.abs().sum() > 0, name


@ALL_PATHS
def test_the_loss_is_the_cross_entropy_of_noisy_images(path):
    """-E log p_theta(y|x_t), t ~ U[0, 1), x_t ~ p_t(x|z)."""
    def classifier(x, t):
        return x.flatten(1).repeat(1, 3)[:, :10] * (1 + t[:, None])

    loss, z, y, x, t = call_loss(classifier_loss, classifier, path)
    check_draws(path, z, x, t)
    log_p = classifier(x, t).log_softmax(dim=1)
    close(loss, -log_p[torch.arange(4000), y].mean(), 1e-6)


@pytest.mark.parametrize("null", [NULL, 4])
def test_the_gradient_is_each_samples_own_and_0_without_a_label(null):
    """grad log p_t(y|x) by autograd, sample by sample, in a batch of several labels and null."""
    def classifier(x, t):
        return (x[:, :1] * torch.arange(10.0).double() * (1 + t[:, None])).sin()

    x = torch.tensor([[0.3, 1.0], [0.7, 2.0], [-0.4, 3.0]]).double()
    y = torch.tensor([2, null, 7])
    grad = classifier_gradient(classifier, x, 0.5, y, null)

    def log_p(v):
        return classifier(v, double([0.5])).log_softmax(dim=1)[range(3), y % 10]

    close(grad[[0, 2]], gradient(log_p, x)[[0, 2]])
    assert grad[1].tolist() == [0, 0]


# ---------------------------------------------------------------- the generator as a classifier

@pytest.mark.parametrize("path", [CondOT(), Cosine()], ids=["condot", "cosine"])
@pytest.mark.parametrize("z", [-0.8, 0.3])
def test_weighted_errors_of_the_field_give_bayes_rule(path, z):
    """E_{t,eps} alpha / (beta D) || u_t(x|y) - u_t(x|z) ||^2 = -log p(z|y) + what labels share."""
    t = (torch.arange(1000).double() + 0.5) / 1000          # midpoints of t
    eps = Normal(0, 1).icdf((torch.arange(200).double() + 0.5) / 200)       # quantiles of the noise
    t, eps = torch.cartesian_prod(t, eps).T
    data = torch.full_like(t, z)[:, None]
    errors = measure_label_errors(partial(TWO.u, path), path, data, t, eps[:, None], labels=2)
    minus_log_p = (likelihood_weight(path, t)[:, None] * errors).mean(dim=0)
    log_p = Normal(double([-1.0, 1.0]), 0.5).log_prob(double(z))
    close(minus_log_p[0] - minus_log_p[1], log_p[1] - log_p[0], 0.01)


@ALL_PATHS
def test_guidance_away_from_a_label_adds_the_gradients_of_two_classifiers(path, x):
    """With y' as null: u_t(x|y) + (w - 1) b_t (grad log p_t(y|x) - grad log p_t(y'|x))."""
    y, other, w = labels(1, x), labels(2, x), 3.0
    for t in TIMES:
        towards = classifier_gradient(classifier_of(path), x, t, y)
        away = classifier_gradient(classifier_of(path), x, t, other)
        _, b = path.a_b(t, x)
        close(guided_field(net_of(path), x, t, y, w, null=2),
              MIX.u(path, x, t, y) + (w - 1) * b * (towards - away), 1e-7)
