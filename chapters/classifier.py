"""Classifier guidance: a noisy classifier p(y|x_t), its loss, its gradient, the field it guides.

Lecture 4, before classifier-free guidance; DDPM lecture, "Classifier guidance". By Bayes' rule
grad log p_t(x|y) = grad log p_t(x) + grad log p_t(y|x): a classifier of noisy images is all that an
unconditional network lacks.

`python -m chapters.classifier` trains one, to runs/classifier.pt. sample.py guides with it
(--guidance classifier), and prints the share of samples that it labels as asked.
"""
import sys
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

from cfg_min import NULL, call, guided_field
from paths import PATHS, cast_like, per_sample
from unet import FEATURES, Encoder, ResidualStack, waves


class NoisyClassifier(nn.Module):
    """classifier(x, t) -> logits (B, classes): the U-Net's encoders, a mean over places, a layer.

    x (B, C, H, W), t (B,) or a number; shapes below are of H = W = 32.
    """

    def __init__(self, channels=(32, 64, 64), layers=1, in_channels=1, E=128, classes=NULL):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(FEATURES, E), nn.SiLU(), nn.Linear(E, E))
        self.first = nn.Conv2d(in_channels, channels[0], kernel_size=5, stride=2, padding=2)
        self.encoders = nn.ModuleList(Encoder(c, d, layers, E) for c, d in pairwise(channels))
        self.midcoder = ResidualStack(channels[-1], layers, E)
        self.norm = nn.GroupNorm(8, channels[-1])
        self.last = nn.Linear(channels[-1], classes)

    def forward(self, x, t):
        e = F.silu(self.time(waves(t, x)))             # (B, E)
        h = self.first(x)                       # (B, 32, 16, 16)
        for encoder in self.encoders:
            h, _ = encoder(h, e)                # (B, 64, 8, 8), then (B, 64, 4, 4)
        h = self.midcoder(h, e)
        h = F.silu(self.norm(h)).mean(dim=(2, 3))           # (B, 64)
        return self.last(h)


def classifier_loss(classifier, path, z, y):
    """-E log p_theta(y|x_t), x_t ~ p_t(x|z), t ~ U[0, 1).

    DDPM lecture, "Classifier guidance": a classifier for noised samples.
    """
    t = torch.rand(len(z), device=z.device)
    x = path.sample(z, torch.randn_like(z), t)
    return F.cross_entropy(classifier(x, t), y)


@torch.inference_mode(False)                    # in it torch.func.grad gives 0, up to torch 2.11
def classifier_gradient(classifier, x, t, y, null=NULL):
    """grad log p_t(y|x), like x; 0 where y is null. classifier(x, t) -> logits (B, classes)."""
    t = per_sample(t, x).flatten()              # (B,)
    labelled = y != null
    index = torch.where(labelled, y, 0)[:, None]            # (B, 1)

    def sum_of_log_p(x):                        # each sample's gradient is that of its own term
        log_p = classifier(x, t).log_softmax(dim=1).gather(1, index)[:, 0]
        return (labelled * log_p).sum()
    return torch.func.grad(sum_of_log_p)(x.clone())         # x may be from that mode


def classifier_guided_field(net, classifier, path, x, t, y, w, null=NULL):
    """u_t(x|null) + w b_t grad log p_t(y|x), for alpha_t > 0.

    w: a number or (B,). b_t is that of u = a_t x + b_t score.
    Lecture 4, "guidance with classifier"; DDPM lecture, the second "Guided sampling".
    """
    u = guided_field(net, x, t, y, 0, null)     # u_t(x|null)
    _, b = path.a_b(t, x)
    gradient = classifier_gradient(classifier, x, t, y, null)
    return cast_like(x, u + per_sample(w, x) * b * gradient)


def measure_label_errors(net, path, z, t, eps, labels=NULL):
    """|| u_t(x|y) - u_t(x|z) ||^2 for each label y at x = alpha z + beta eps: (B, labels).

    The generator is a classifier: it gives z the label whose field fits z best
    (Li et al. 2023, arXiv 2303.16203). t: (B,). One t and eps serve all labels.
    """
    x = path.sample(z, eps, t)
    target = path.target(z, eps, t)
    errors = []
    for label in range(labels):
        u = call(net, x, t, torch.full((len(z),), label, device=z.device))
        errors.append((u - target).square().flatten(1).sum(dim=1))
    return torch.stack(errors, dim=1)


def likelihood_weight(path, t):
    """alpha / (beta D), on CondOT t / (1 - t): the weight of an error in a log-likelihood.

    With it, two labels' mean errors over t ~ U[0, 1) and eps differ as their -log p(z|y) do. For an
    error of z the weight is half the slope of the signal-to-noise ratio alpha^2 / beta^2 (Kingma et
    al. 2021, arXiv 2107.00630); an error of z is beta / D times that of u.
    """
    return path.alpha(t) / (path.beta(t) * path.D(t))


def main(argv=None):
    from support import mnist
    from support.command import Parser, say
    from support.training import add_options, prepare
    from train import fit

    p = Parser(prog="python -m chapters.classifier",
               description="Train a noisy classifier, p(y|x_t).")
    add_options(p, "classifier")
    p.add_argument("--path", choices=PATHS, default="condot", help="probability path (condot)")
    options = p.parse_args(argv)
    (images, labels, x_test, y_test), run = prepare(options, "classifier", path=options.path)

    def compute_loss(classifier, z, y):
        return classifier_loss(classifier, PATHS[options.path], z, y)

    classifier = fit(run, images, labels, compute_loss)
    run.finish()
    share = mnist.accuracy(classifier.eval(), x_test, y_test)
    say(f"accuracy on the test images, at t = 1: {100 * share:.2f} %")


if __name__ == "__main__":
    from support.command import execute
    sys.exit(execute(main))
