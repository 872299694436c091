"""The lecture's simplified U-Net: encoders, a midcoder, decoders.

Lecture 4, "Lab Three U-Net". Encoders halve the image and widen its channels, the midcoder works at
the smallest size, decoders go back up. Skip connections join stages of equal size. t and y are
embedded as one vector e, which is injected into every residual layer.

B: batch, C: channels of x, H x W: its size, c and d: channels of a stage and of the one below it,
h x w: the size of a stage, E: the size of e.
"""
import math
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

from cfg_min import NULL
from paths import per_sample

FEATURES = 128          # as many cosines and sines stand for t


def waves(t, x):
    """t (B,) or a number, in [0, 1] -> (B, FEATURES) of x's type: cosines and sines of t."""
    t = per_sample(t, x).view(-1, 1)            # (B, 1)
    logs = torch.linspace(0, math.log(1000), FEATURES // 2, dtype=t.dtype, device=t.device)
    angles = t * logs.exp()                     # (B, FEATURES/2), frequencies from 1 to 1000
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)


def zero(layer):
    """The layer with weights and biases set to 0: it gives 0, until training moves them."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResidualLayer(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), and e scales and shifts the second norm."""

    def __init__(self, c, E):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c)
        self.conv1 = nn.Conv2d(c, c, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, c)
        self.conv2 = zero(nn.Conv2d(c, c, 3, padding=1))
        self.inject = nn.Linear(E, 2 * c)

    def forward(self, x, e):                    # (B, c, h, w), (B, E) -> (B, c, h, w)
        scale, shift = self.inject(e)[:, :, None, None].chunk(2, dim=1)     # (B, c, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class ResidualStack(nn.ModuleList):
    """Residual layers one after another, all at one size: (B, c, h, w) -> (B, c, h, w)."""

    def __init__(self, c, layers, E):
        super().__init__(ResidualLayer(c, E) for _ in range(layers))

    def forward(self, h, e):
        for layer in self:
            h = layer(h, e)
        return h


class Encoder(nn.Module):
    """Residual layers, then half the size: (B, c, h, w) -> (B, d, h/2, w/2), and the skip."""

    def __init__(self, c, d, layers, E):
        super().__init__()
        self.layers = ResidualStack(c, layers, E)
        self.down = nn.Conv2d(c, d, 3, stride=2, padding=1)

    def forward(self, h, e):
        skip = self.layers(h, e)                # (B, c, h, w)
        return self.down(skip), skip


class Decoder(nn.Module):
    """Twice the size, plus the skip, then residual layers: (B, d, h/2, w/2) -> (B, c, h, w)."""

    def __init__(self, d, c, layers, E):
        super().__init__()
        self.up = nn.Conv2d(d, c, 3, padding=1)
        self.layers = ResidualStack(c, layers, E)

    def forward(self, h, skip, e):
        h = F.interpolate(self.up(h), scale_factor=2)
        return self.layers(h + skip, e)


class UNet(nn.Module):
    """net(x, t, y) -> like x (B, C, H, W); t (B,) or a number in [0, 1]; y (B,), 0 ... classes.

    The label `classes`, by default NULL, is "no label". layers: of a stage. H and W are
    multiples of 8 by default; shapes below are of H = W = 32. Stages, channels and residual layers
    are those of Lab Three. The lab, as public copies have it, differs in this:

    - The first convolution has stride 1. Stride 2, after which the last convolution writes 2 x 2
      pixels for each place, makes ours three times as fast (docs/results.md).
    - A skip is taken after the encoder has halved the image, and added before the decoder doubles
      it. Here it is taken before and added after, so it keeps the finer image.
    - t and y are embedded anew for every layer, and both are added. Here one vector e, of both,
      scales and shifts.
    - Its norms are batch norms, its frequencies of t are learned, its upsampling is bilinear.

    add_x: return x plus what the layers give, for a network that predicts eps, because eps is
    nearly x while t is small, and layers take long to learn to copy x.
    """

    def __init__(self, channels=(32, 64, 128), layers=2, in_channels=1, stride=2, E=128,
                 add_x=False, classes=NULL):
        super().__init__()
        self.add_x = add_x
        self.time = nn.Sequential(nn.Linear(FEATURES, E), nn.SiLU(), nn.Linear(E, E))
        self.label = nn.Embedding(classes + 1, E)       # one more for NULL
        self.first = nn.Conv2d(in_channels, channels[0], kernel_size=2 * stride + 1,
                               stride=stride, padding=stride)
        down = list(pairwise(channels))         # (32, 64), (64, 128)
        self.multiple = stride * 2**len(down)   # of H and W, as each stage halves them
        self.encoders = nn.ModuleList(Encoder(c, d, layers, E) for c, d in down)
        self.midcoder = ResidualStack(channels[-1], layers, E)
        self.decoders = nn.ModuleList(Decoder(d, c, layers, E) for c, d in reversed(down))
        self.norm = nn.GroupNorm(8, channels[0])
        self.last = nn.Sequential(
            zero(nn.Conv2d(channels[0], in_channels * stride**2, 3, padding=1)),
            nn.PixelShuffle(stride))            # channels become places: H/2 -> H

    def forward(self, x, t, y):
        H, W = x.shape[2:]
        if H % self.multiple or W % self.multiple:
            raise ValueError(f"x of shape {tuple(x.shape)}: H and W must be multiples of "
                             f"{self.multiple}; pad the images")
        e = F.silu(self.time(waves(t, x)) + self.label(y))         # (B, E)
        h = self.first(x)                       # (B, 32, 16, 16)
        skips = []
        for encoder in self.encoders:
            h, skip = encoder(h, e)             # (B, 64, 8, 8), then (B, 128, 4, 4)
            skips.append(skip)
        h = self.midcoder(h, e)
        for decoder in self.decoders:
            h = decoder(h, skips.pop(), e)      # (B, 64, 8, 8), then (B, 32, 16, 16)
        out = self.last(F.silu(self.norm(h))).to(x.dtype)   # (B, C, H, W)
        return x + out if self.add_x else out
