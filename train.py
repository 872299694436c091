"""Training: `python train.py --arch unet`. The lecture's box "Training" is the loop in `fit`.

By default it is the lecture's loss: the network predicts u, t ~ U[0, 1), labels are dropped with
probability eta, the loss is L_CFM^CFG. `--predict z --times logit-normal` is the better recipe
(docs/results.md): the same loss with two changes, explained at DataField and at logit_normal.
"""
import sys

import torch

from cfg_min import cfg_cfm_loss
from paths import PATHS
from support import checkpoint, mnist
from support.checkpoint import GENERATORS, NETWORKS, PREDICTIONS, autocast
from support.command import Parser, execute, file_name, number
from support.mnist import draw_batch
from support.training import (Training, add_options, describe, load_latents, prepare_out,
                              rise_and_fall, share_gradients, share_of_batch)


def fit(options, config, images, labels, compute_loss, autoencoder=None):
    """Train the network of a config with compute_loss(net, z, y); return it and its run.

    images: (N, 1, 32, 32) uint8, or latents (N, 4, 8, 8); labels (N,). The caller then calls
    run.finish().
    """
    torch.manual_seed(options.seed)
    field = checkpoint.build(config, last_t=0.98)           # chapters/predictions.py says why
    checkpoint.use_once(field, config)          # a mistake in a network shows now
    field.train().to(images.device)
    optimizer = torch.optim.AdamW(field.parameters(), options.lr)
    schedule = rise_and_fall(optimizer, options.lr, options.steps)
    run = Training(options, config, field, optimizer, schedule, autoencoder)
    # the loss of a network that predicts eps asks for eps, not for the field made from it
    net = share_gradients(field.net if config["predict"] == "eps" else field)
    batch = share_of_batch(options.batch)       # of this process

    for step in run.steps():                    # shows progress, saves, minds Ctrl-C
        z, y = draw_batch(images, labels, batch)            # (z, y) ~ p_data
        with autocast(images.device):
            loss = compute_loss(net, z, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.record(loss)
    return field, run


def logit_normal(n, device=None, mean=-0.8, std=0.8):
    """Draws t (n,) with logit(t) ~ N(mean, std^2): mostly near 0.3.

    Esser et al. 2024, arXiv 2403.03206; mean and std of Li & He 2025, arXiv 2511.13720.
    """
    return (mean + std * torch.randn(n, device=device)).sigmoid()


TIMES = {"uniform": torch.rand, "logit-normal": logit_normal}

EXAMPLES = """
examples:
  python train.py --arch unet                           the lecture's recipe, to runs/unet.pt
  python train.py --arch unet --resume                  go on with it after a Ctrl-C
  python train.py --arch unet --predict z --times logit-normal --out runs/better.pt
  python train.py --arch dit --latent weights/vae.pt    a DiT on latents: latent diffusion
defaults of --steps, --batch, --lr:
"""


def parse(argv=None):
    defaults = [f"  {arch}: " + ", ".join(str(NETWORKS[arch][key]) for key in
                                          ("steps", "batch", "lr")) for arch in GENERATORS]
    p = Parser(usage="%(prog)s --arch unet|dit [options]", epilog=EXAMPLES + "\n".join(defaults),
               description="Train a network for classifier-free guidance.")
    add = p.add_argument
    add("--arch", required=True, choices=GENERATORS, help="unet.py or dit.py (required)")
    add_options(p)
    add("--eta", type=number(float, 0, 1), default=0.1, help="P(label becomes null) (0.1)")
    add("--path", choices=PATHS, default="condot", help="probability path (condot)")
    add("--predict", choices=PREDICTIONS, default="u",
        help="what the network predicts; u and z learn by the CFM loss, eps by DSM (u)")
    add("--times", choices=TIMES, default="uniform", help="how t is drawn (uniform)")
    add("--latent", type=file_name, metavar="VAE.pt",
        help="train on the latents of this autoencoder (on pixels)")
    options = p.parse_args(argv)
    for name in ("steps", "batch", "lr"):
        if getattr(options, name) is None:
            setattr(options, name, NETWORKS[options.arch][name])
    if options.out is None:
        options.out = f"runs/{'latent_' if options.latent else ''}{options.arch}.pt"
    return options


def main(argv=None):
    options = parse(argv)
    device = checkpoint.pick_device(options.device)
    prepare_out(options)
    data = mnist.load(options.data)
    config = describe(options, options.arch, data, eta=options.eta, path=options.path,
                      predict=options.predict, times=options.times)
    if options.predict == "eps":
        config["net"] = NETWORKS[options.arch].get("eps", {})
    images, labels = data[0].to(device), data[1].to(device)
    autoencoder = None
    if options.latent:
        images, autoencoder = load_latents(options.latent, config, images)
    path, eta, draw_t = PATHS[options.path], options.eta, TIMES[options.times]
    loss_of = cfg_cfm_loss
    if options.predict == "eps":
        from chapters.ddpm import cfg_dsm_loss as loss_of

    def compute_loss(net, z, y):
        return loss_of(net, path, z, y, eta, draw_t(len(z), device=device))

    _, run = fit(options, config, images, labels, compute_loss, autoencoder)
    run.finish()


if __name__ == "__main__":
    sys.exit(execute(main))
