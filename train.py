"""Training: `python train.py --arch unet`. Options, data, and one loop, the lecture's "Training".

By default it is the lecture to the letter: the network predicts u, t ~ U[0, 1), labels are dropped
with probability eta, the loss is L_CFM^CFG. `--predict z --times logit-normal` is the better recipe
(docs/results.md): two changes, which are explained at DataField and at logit_normal.
"""
import sys

import torch

import checkpoint
import mnist
from cfg_min import cfg_cfm_loss
from checkpoint import LATENT_OPTIONS, autocast, pick_device
from command import BadInput, Parser, number, processes, run
from ddpm import cfg_dsm_loss
from mnist import draw_batch
from paths import PATHS
from training import Run, add_options, describe, prepare_out, rise_and_fall, share_gradients

RECIPES = {                                     # the defaults of --steps, --batch and --lr
    "unet": dict(steps=2000, batch=128, lr=2e-3),
    "dit": dict(steps=4200, batch=64, lr=1e-3),
}


def logit_normal(n, device=None, mean=-0.8, std=0.8):
    """Draws t (n,) with logit(t) ~ N(mean, std^2): mostly near 0.3, where the label is decided.

    Esser et al. 2024, arXiv 2403.03206; mean and std of Li & He 2025, arXiv 2511.13720.
    """
    return (mean + std * torch.randn(n, device=device)).sigmoid()


TIMES = {"uniform": torch.rand, "logit-normal": logit_normal}


@torch.no_grad()
def encode(vae, images, device):
    """images (N, 1, 32, 32) uint8 -> latents (N, 4, 8, 8) of variance 1."""
    latents = []
    with autocast(device):
        for x in images.split(500):
            latents.append(vae.encode(mnist.to_unit(x)).float())
    return torch.cat(latents)


EXAMPLES = """
examples:
  python train.py --arch unet                           the lecture's recipe, to runs/unet.pt
  python train.py --arch unet --resume                  go on with it after a Ctrl-C
  python train.py --arch unet --predict z --times logit-normal --out runs/better.pt
  python train.py --arch dit --latent weights/vae.pt    a DiT on latents: latent diffusion
defaults:
"""


def parse(argv=None):
    defaults = [f"  {arch}: {recipe}" for arch, recipe in RECIPES.items()]
    p = Parser(usage="%(prog)s --arch unet|dit [options]", epilog=EXAMPLES + "\n".join(defaults),
               description="Train a network to draw digits.")
    add = p.add_argument
    add("--arch", choices=RECIPES, required=True)
    add_options(p, out=None)
    add("--eta", type=number(float, 0, 1), default=0.1, help="label-drop probability (0.1)")
    add("--path", choices=PATHS, default="condot", help="probability path (condot)")
    add("--predict", choices=("u", "z", "eps"), default="u",
        help="what the network predicts (u); u and z learn by the CFM loss, eps by DSM")
    add("--times", choices=TIMES, default="uniform", help="how t is drawn (uniform)")
    add("--latent", metavar="VAE.pt", help="train on the latents of this autoencoder")
    options = p.parse_args(argv)
    for name, value in RECIPES[options.arch].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.out is None:
        options.out = f"runs/{'latent_' if options.latent else ''}{options.arch}.pt"
    return options


def load_data(options, device):
    """images, labels, config and, for a latent model, what its checkpoint keeps of the autoencoder.

    images: (N, 1, 32, 32) uint8, or (N, 4, 8, 8) latents.
    """
    data = mnist.load(options.data)
    config = describe(options, options.arch, data, eta=options.eta, path=options.path,
                      predict=options.predict, times=options.times)
    images = data[0].to(device)
    labels = data[1].to(device)
    if options.latent is None:
        return images, labels, config, None
    vae, vae_config = checkpoint.load(options.latent, device)
    if vae_config["arch"] != "vae":
        raise BadInput(f"--latent {options.latent}: not an autoencoder of vae.py")
    autoencoder = dict(config=vae_config, weights=vae.state_dict())
    config["net"] = LATENT_OPTIONS[options.arch]
    config["latent"] = checkpoint.checksum_of(autoencoder["weights"])
    return encode(vae, images, device), labels, config, autoencoder


def main(argv=None):
    options = parse(argv)
    device = pick_device(options.device)
    prepare_out(options, options.data, options.init, options.latent)
    images, labels, config, autoencoder = load_data(options, device)
    path = PATHS[options.path]
    draw_t = TIMES[options.times]
    _, world = processes()
    batch = options.batch // world              # of this process

    torch.manual_seed(options.seed)
    field = checkpoint.build(config).to(device)
    optimizer = torch.optim.AdamW(field.parameters(), options.lr)
    schedule = rise_and_fall(optimizer, options.lr, options.steps)
    run = Run(options, config, field, optimizer, schedule, autoencoder)
    net = field
    compute_loss = cfg_cfm_loss
    if options.predict == "eps":                # this loss needs eps, not the field made from it
        net = field.net
        compute_loss = cfg_dsm_loss
    net = share_gradients(net)

    for step in run.steps():                    # shows progress, saves, minds Ctrl-C
        z, y = draw_batch(images, labels, batch)            # (z, y) ~ p_data
        with autocast(device):
            loss = compute_loss(net, path, z, y, options.eta, draw_t(batch, device=device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        run.record(loss)
    run.finish()


if __name__ == "__main__":
    sys.exit(run(main))
