"""The small autoencoder of latent diffusion: images (B, 1, 32, 32), latents (B, 4, 8, 8).

004_4aa8a09610484fd5.txt, section 2.3: the generative model works on the latents of a VAE.
"""
import math

import torch
import torch.nn as nn

from cfg_min import held

BLACK = -1.0


def block(c_in, c_out):
    """A convolution that keeps the size: (B, c_in, H, W) -> (B, c_out, H, W)."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.GroupNorm(8, c_out), nn.SiLU())


class VAE(nn.Module):
    """encode: x (B, 1, 32, 32) in [-1, 1] -> mean of the latent (B, 4, 8, 8); decode: back."""

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

    def encode(self, x):
        mean, _ = self.encoder(x).chunk(2, dim=1)
        return mean

    def decode(self, latent):
        return held(self.decoder(latent), BLACK, math.inf)  # so that black is exactly black

    def forward(self, x, eps):
        """Reconstruction from a draw mean + std eps of q(latent|x); the mean; the log variance."""
        mean, log_var = self.encoder(x).float().chunk(2, dim=1)
        std = (log_var / 2).exp()
        return self.decode(mean + std * eps), mean, log_var


def kl_to_normal(mean, log_var):
    """KL( N(mean, var) || N(0, I) ), (B, ...) -> (B,); Kingma & Welling 2014, appendix B."""
    return (mean**2 + log_var.exp() - 1 - log_var).flatten(1).sum(1) / 2


def vae_loss(net, x, std=0.1):
    """-ELBO = E_q[-log p(x|latent)] + KL(q(latent|x) || p(latent)); Kingma & Welling 2014, eq. 3.

    p(x|latent) = N(decode(latent), std^2 I). Returned is 2 std^2 times -ELBO, per pixel and without
    its constant: the squared error, and a light KL, 2 std^2 times. Latent diffusion has a light KL
    too, but a perceptual and an adversarial loss instead of the squared error (Rombach et al. 2022,
    section 3.1).
    """
    eps = torch.randn(len(x), 4, 8, 8, device=x.device)
    recon, mean, log_var = net(x, eps)
    log_p = -(x - recon.float()).square().flatten(1).sum(1) / (2 * std**2)
    minus_elbo = (kl_to_normal(mean, log_var) - log_p).mean()
    return minus_elbo * 2 * std**2 / x[0].numel()
