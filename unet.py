"""The lecture's simplified U-Net, and a noisy classifier made of its encoder half.

Lecture 4, "Lab Three U-Net" (000_9a64053bb9e2e45b.txt): first convolution, encoders (residual
layers, downsample), midcoder, decoders (upsample, skip connection, residual layers), last
convolution; t and y are embedded and injected into every residual layer.
B: batch, C: channels of x, H x W: its size, c: a stage's channels, e (B, E): t and y embedded.
"""
import math
from itertools import pairwise

import torch
import torch.nn as nn
import torch.nn.functional as F

def time_features(t, dim=128):
    """Cosines and sines of t in [0, 1] at frequencies from 1 to 1000: (B,) -> (B, dim)."""
    frequencies = torch.exp(torch.linspace(0, math.log(1000), dim // 2, device=t.device))
    angles = t[:, None].float() * frequencies   # (B, dim/2)
    return torch.cat([angles.cos(), angles.sin()], dim=1)

def time_embedding(E): return nn.Sequential(nn.Linear(128, E), nn.SiLU(), nn.Linear(E, E))

def zero(layer):
    """The layer with weights and biases of 0."""
    for p in layer.parameters(): nn.init.zeros_(p)
    return layer

class ResidualLayer(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the second norm scaled and shifted by e."""

    def __init__(self, c, E):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c), nn.Conv2d(c, c, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, c), zero(nn.Conv2d(c, c, 3, padding=1))
        self.inject = nn.Linear(E, 2 * c)

    def forward(self, x, e):                    # (B, c, H, W), (B, E) -> (B, c, H, W)
        scale, shift = self.inject(e)[:, :, None, None].chunk(2, dim=1)     # (B, c, 1, 1) each
        h = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))

def stage(c, E, layers): return nn.ModuleList(ResidualLayer(c, E) for _ in range(layers))

class Encoder(nn.Module):
    """First convolution, encoders, midcoder: x (B, C, H, W), e (B, E) -> the ends of all stages."""

    def __init__(self, channels, layers, in_channels, stride, E):
        super().__init__()
        self.first = nn.Conv2d(in_channels, channels[0], 2 * stride + 1, stride, padding=stride)
        self.stages = nn.ModuleList(stage(c, E, layers) for c in channels)
        self.downs = nn.ModuleList(nn.Conv2d(c, d, 3, stride=2, padding=1)
                                   for c, d in pairwise(channels))

    def forward(self, x, e):
        ends = []                               # (B, c, H/stride, W/stride), then halves
        for down, layers in zip([self.first, *self.downs], self.stages):
            h = down(ends[-1] if ends else x)
            for layer in layers: h = layer(h, e)
            ends.append(h)
        return ends

class UNet(nn.Module):
    """net(x, t, y): x (B, C, H, W), t (B,) in [0, 1], y (B,) in 0..9 or NULL = 10 -> as x.
    stride is that of the first convolution; the last one writes stride x stride pixels a place."""

    def __init__(self, channels=(32, 64, 128), layers=2, in_channels=1, stride=2, E=128):
        super().__init__()
        self.time, self.label, self.stride = time_embedding(E), nn.Embedding(10 + 1, E), stride
        self.encoder = Encoder(channels, layers, in_channels, stride, E)
        pairs = [*pairwise(channels)][::-1]
        self.ups = nn.ModuleList(nn.Conv2d(d, c, 3, padding=1) for c, d in pairs)
        self.decoders = nn.ModuleList(stage(c, E, layers) for c, _ in pairs)
        self.norm = nn.GroupNorm(8, channels[0])
        self.last = zero(nn.Conv2d(channels[0], in_channels * stride**2, 3, padding=1))

    def forward(self, x, t, y):
        e = F.silu(self.time(time_features(t)) + self.label(y))     # (B, E)
        *skips, h = self.encoder(x, e)          # (B, 32, 16, 16), (B, 64, 8, 8); (B, 128, 4, 4)
        for up, layers in zip(self.ups, self.decoders):
            h = up(F.interpolate(h, scale_factor=2)) + skips.pop()  # twice the size, the previous c
            for layer in layers: h = layer(h, e)
        h = self.last(F.silu(self.norm(h)))     # (B, C stride stride, H/stride, W/stride)
        return F.pixel_shuffle(h, self.stride)  # (B, C, H, W)

class NoisyClassifier(nn.Module):
    """p(y|x_t, t) as logits (B, 10): the U-Net's encoder half, mean over places, linear layer."""

    def __init__(self, channels=(24, 48, 64), layers=1, in_channels=1, stride=2, E=128):
        super().__init__()
        self.time = time_embedding(E)
        self.encoder = Encoder(channels, layers, in_channels, stride, E)
        self.norm, self.last = nn.GroupNorm(8, channels[-1]), nn.Linear(channels[-1], 10)

    def forward(self, x, t):
        h = self.encoder(x, F.silu(self.time(time_features(t))))[-1]    # (B, 64, 4, 4)
        return self.last(F.silu(self.norm(h)).mean(dim=(2, 3)))     # (B, 10)
