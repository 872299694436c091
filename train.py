"""Training: `python train.py --arch unet`. The loop in `fit` is the notes' box "Training".

By default it is Lecture 4's loss: the network predicts u, t ~ U[0, 1), labels are dropped with
probability eta, the loss is L_CFM^CFG. `--predict z --times logit-normal` is the better recipe
(docs/results.md): the same loss with two changes, explained in chapters/predictions.py and at
logit_normal.
"""
import sys

import torch

from cfg_min import cfg_cfm_loss
from paths import PATHS
from support import checkpoint
from support.command import execute
from support.mnist import draw_batch
from support.training import parse_options, prepare, rise_and_fall


def fit(run, images, labels, compute_loss):
    """Train the network of a run with compute_loss(net, z, y); return it.

    images: (N, 1, 32, 32) uint8, or latents (N, 4, 8, 8); labels (N,). The caller then calls
    run.finish().
    """
    config = run.config
    torch.manual_seed(config["seed"])
    field = checkpoint.build(config, last_t=0.98)           # net(x, t, y) -> u, untrained
    field.train().to(images.device)
    optimizer = torch.optim.AdamW(field.parameters(), config["lr"])
    schedule = rise_and_fall(optimizer, config["lr"], config["steps"])      # of the learning rate
    net = run.set_up(field, optimizer, schedule)            # the field, in bf16 where that is fast

    for step in run.steps():                    # shows progress, saves, minds Ctrl-C
        z, y = draw_batch(images, labels, run.batch)        # (z, y) ~ p_data
        loss = compute_loss(net, z, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.record(loss)
    return field


def logit_normal(n, device=None, mean=-0.8, std=0.8):
    """Draws t (n,) with logit(t) ~ N(mean, std^2): mostly near 0.3.

    Esser et al. 2024, arXiv 2403.03206; mean and std of Li & He 2025, arXiv 2511.13720.
    """
    return (mean + std * torch.randn(n, device=device)).sigmoid()


TIMES = {"uniform": torch.rand, "logit-normal": logit_normal}


def main(argv=None):
    options = parse_options(argv, TIMES)
    (images, labels, *_), run = prepare(options, options.arch, eta=options.eta, path=options.path,
                                        predict=options.predict, times=options.times)
    path, draw_t = PATHS[options.path], TIMES[options.times]
    loss_of = cfg_cfm_loss                      # a network that predicts z is a field u too
    if options.predict == "eps":
        from chapters.ddpm import cfg_dsm_loss as loss_of

    def compute_loss(net, z, y):
        t = draw_t(len(z), device=z.device)
        return loss_of(net, path, z, y, options.eta, t)

    fit(run, images, labels, compute_loss)
    run.finish()


if __name__ == "__main__":
    sys.exit(execute(main))
