"""The lecture's simplified U-Net, and a noisy classifier made of its encoder half.

Lecture 4, "Lab Three U-Net" (000_9a64053bb9e2e45b.txt; 002_49842480371d0be4.txt and
004_4aa8a09610484fd5.txt, section 2.1, say more): encoders halve the image and widen its channels,
the midcoder works at the smallest size, decoders go back up; skip connections join stages of equal
size; t and y are embedded as one vector e and injected into every residual layer.

B: batch, C: channels of x, H x W: its size (of a layer: its input's), c: a stage's channels, E: the
size of e.
"""
import math
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F


def time_features(t, x, dim=128):
    """Cosines and sines of t at frequencies from 1 to 1000, for each of the batch x: (B, dim).

    t in [0, 1]: (B,), or one number for the batch, as ODE solvers have it.
    """
    t = torch.as_tensor(t, dtype=torch.float32, device=x.device).expand(len(x))
    frequencies = torch.exp(torch.linspace(0, math.log(1000), dim // 2, device=x.device))
    angles = t[:, None] * frequencies           # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def time_embedding(E):
    """time_features (B, 128) -> (B, E)."""
    return nn.Sequential(nn.Linear(128, E), nn.SiLU(), nn.Linear(E, E))


def zero(layer):
    """The layer with weights and biases set to 0: it gives 0, until training moves them."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class ResidualLayer(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the second norm scaled and shifted by e."""

    def __init__(self, c, E):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c)
        self.conv1 = nn.Conv2d(c, c, 3, padding=1)
        self.norm2 = nn.GroupNorm(8, c)
        self.conv2 = zero(nn.Conv2d(c, c, 3, padding=1))
        self.inject = nn.Linear(E, 2 * c)

    def forward(self, x, e):                    # (B, c, H, W), (B, E) -> (B, c, H, W)
        scale, shift = self.inject(e)[:, :, None, None].chunk(2, dim=1)     # (B, c, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.norm2(h) * (1 + scale) + shift
        return x + self.conv2(F.silu(h))


class Stage(nn.ModuleList):
    """Residual layers one after another, all at one size: (B, c, H, W), (B, E) -> (B, c, H, W)."""

    def __init__(self, c, E, layers):
        super().__init__(ResidualLayer(c, E) for _ in range(layers))

    def forward(self, h, e):
        for layer in self:
            h = layer(h, e)
        return h


class Encoder(nn.Module):
    """First convolution, encoders and midcoder. Returns what every stage ends with.

    x (B, C, H, W), e (B, E) -> [(B, c, H/stride, W/stride) for the first stage, then each time half
    the height and width]; the last of the stages, the smallest, is the midcoder. layers: how many
    residual layers each stage has.
    """

    def __init__(self, channels, layers, in_channels, stride, E):
        super().__init__()
        self.first = nn.Conv2d(in_channels, channels[0], kernel_size=2 * stride + 1,
                               stride=stride, padding=stride)
        self.stages = nn.ModuleList(Stage(c, E, n) for c, n in zip(channels, layers))
        self.downs = nn.ModuleList(nn.Conv2d(c, d, 3, stride=2, padding=1)
                                   for c, d in pairwise(channels))

    def forward(self, x, e):
        h = self.stages[0](self.first(x), e)
        ends = [h]
        for down, stage in zip(self.downs, self.stages[1:]):
            h = stage(down(h), e)
            ends.append(h)
        return ends


class UNet(nn.Module):
    """net(x, t, y) -> like x (B, C, H, W); t (B,) or a number in [0, 1]; y (B,), 0..9 or NULL = 10.

    H and W are multiples of stride 2^(stages - 1), by default 8; shapes below are of H = W = 32.

    stride is that of the first convolution: the largest stage works on H/stride x W/stride places,
    and the last convolution writes stride x stride pixels for each of them. The greys of all these
    pixels pass through that stage, so it has many channels, and takes most of the time. Its
    residual layers are therefore on the way up only, where the pixels are written; on the way down
    it is no more than the first convolution.
    """

    def __init__(self, channels=(64, 64, 128), layers=1, in_channels=1, stride=2, E=128):
        super().__init__()
        self.stride = stride
        self.time = time_embedding(E)
        self.label = nn.Embedding(10 + 1, E)    # one more for NULL
        downward = [0] + [layers] * (len(channels) - 1)     # residual layers of the stages
        self.encoder = Encoder(channels, downward, in_channels, stride, E)
        upward = list(pairwise(channels))[::-1]             # (c, d): d channels below, c above
        self.ups = nn.ModuleList(nn.Conv2d(d, c, 3, padding=1) for c, d in upward)
        self.decoders = nn.ModuleList(Stage(c, E, layers) for c, _ in upward)
        self.norm = nn.GroupNorm(8, channels[0])
        self.last = zero(nn.Conv2d(channels[0], in_channels * stride**2, 3, padding=1))

    def forward(self, x, t, y):
        e = F.silu(self.time(time_features(t, x)) + self.label(y))     # (B, E)
        *skips, h = self.encoder(x, e)          # (B, 64, 16, 16), (B, 64, 8, 8); (B, 128, 4, 4)
        for up, decoder in zip(self.ups, self.decoders):
            h = F.interpolate(up(h), scale_factor=2)        # d to c channels, then twice the size
            h = decoder(h + skips.pop(), e)
        h = self.last(F.silu(self.norm(h)))     # (B, C stride stride, H/stride, W/stride)
        return F.pixel_shuffle(h, self.stride)  # (B, C, H, W)


class NoisyClassifier(nn.Module):
    """p(y|x_t, t) as logits (B, 10): the U-Net's encoder half, mean over places, linear layer."""

    def __init__(self, channels=(24, 48, 64), layers=1, in_channels=1, stride=2, E=128):
        super().__init__()
        self.time = time_embedding(E)
        self.encoder = Encoder(channels, [layers] * len(channels), in_channels, stride, E)
        self.norm = nn.GroupNorm(8, channels[-1])
        self.last = nn.Linear(channels[-1], 10)

    def forward(self, x, t):                    # (B, C, H, W), (B,) or a number -> (B, 10)
        e = F.silu(self.time(time_features(t, x)))             # (B, E)
        h = self.encoder(x, e)[-1]              # (B, 64, 4, 4)
        h = F.silu(self.norm(h)).mean(dim=(2, 3))           # (B, 64)
        return self.last(h)
