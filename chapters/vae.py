"""The small autoencoder of latent diffusion: images (B, 1, 32, 32), latents (B, 4, 8, 8).

Lecture 4, "Generative Modeling in Latent Space": the generative model works on the latents of a
variational autoencoder (VAE). `python -m chapters.vae` trains one, to runs/vae.pt; then
`python train.py --arch dit --latent runs/vae.pt`.
"""
import sys

import torch
import torch.nn as nn

from support.mnist import to_unit


def block(c_in, c_out):
    """A convolution that keeps the size: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.SiLU())


class VAE(nn.Module):
    """encode: x (B, 1, 32, 32) in [-1, 1] -> mean of the latent (B, 4, 8, 8); decode: back.

    After training, scale is set so that the latents of the data have variance 1, as Rombach et al.
    2022 do: a path mixes them with noise of variance 1.
    """

    def __init__(self, c=32):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, c, 4, stride=2, padding=1),        # (B, c, 16, 16)
            nn.SiLU(),
            block(c, c),
            nn.Conv2d(c, 2 * c, 4, stride=2, padding=1),    # (B, 2 c, 8, 8)
            nn.SiLU(),
            block(2 * c, 2 * c),
            nn.Conv2d(2 * c, 2 * 4, 3, padding=1))          # (B, 8, 8, 8): mean and log variance
        self.decoder = nn.Sequential(
            block(4, 2 * c),                                # (B, 2 c, 8, 8)
            block(2 * c, 2 * c),
            nn.Conv2d(2 * c, 4 * c, 3, padding=1),
            nn.PixelShuffle(2),                             # (B, c, 16, 16)
            block(c, c),
            nn.Conv2d(c, 4, 3, padding=1),
            nn.PixelShuffle(2))                             # (B, 1, 32, 32)
        self.register_buffer("scale", torch.ones(()))

    def encode(self, x):
        mean, _ = self.encoder(x).chunk(2, dim=1)
        return self.scale * mean

    def decode(self, latent):
        return self.decoder(latent / self.scale)

    def forward(self, x, eps):
        """The decoding of mean + std eps, a draw of q(latent|x); the mean; the log variance."""
        mean, log_var = self.encoder(x).float().chunk(2, dim=1)
        std = (log_var / 2).exp()
        return self.decoder(mean + std * eps), mean, log_var


def kl_to_normal(mean, log_var):
    """KL( N(mean, var) || N(0, I) ), (B, ...) -> (B,); Kingma & Welling 2014."""
    return (mean**2 + log_var.exp() - 1 - log_var).flatten(1).sum(1) / 2


def vae_loss(net, x, std=0.1):
    """-ELBO = E_q[-log p(x|latent)] + KL(q(latent|x) || p(latent)), times 2 std^2 / pixels.

    p(x|latent) = N(decode(latent), std^2 I). So this is the squared error of a pixel plus a light
    KL; the constant of log p is left out. Kingma & Welling 2014. Rombach et al. 2022 have a light
    KL as well, but an absolute error, beside a perceptual and an adversarial loss.
    """
    eps = torch.randn(len(x), 4, 8, 8, dtype=x.dtype, device=x.device)
    recon, mean, log_var = net(x, eps)
    log_p = -(x - recon.float()).square().flatten(1).sum(1) / (2 * std**2)
    minus_elbo = (kl_to_normal(mean, log_var) - log_p).mean()
    return minus_elbo * 2 * std**2 / x[0].numel()


@torch.no_grad()
def measure(net, images):
    """Mean squared error of images (N, 1, 32, 32) uint8, and the standard deviation of latents."""
    errors = []
    latents = []
    for x in to_unit(images).split(500):
        latents.append(net.encode(x))
        errors.append(net.decode(latents[-1]) - x)
    return torch.cat(errors).square().mean().item(), torch.cat(latents).std().item()


def main(argv=None):
    from support.command import Parser, say
    from support.training import add_options, prepare
    from train import fit

    p = Parser(prog="python -m chapters.vae",
               description="Train the autoencoder of latent diffusion.")
    add_options(p, "vae")
    options = p.parse_args(argv)
    (images, labels, x_test, _), run = prepare(options, "vae")

    def compute_loss(net, z, y):
        return vae_loss(net, z)

    net = fit(run, images, labels, compute_loss)
    if not run.was_finished():
        _, std = measure(net, images[:10000])
        net.scale /= std                        # now the latents have variance 1
    run.finish()
    error, _ = measure(net, x_test)
    say(f"mean squared error of the test images: {error:.4f}")


if __name__ == "__main__":
    from support.command import execute
    sys.exit(execute(main))
