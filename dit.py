"""The diffusion transformer (DiT): patches are tokens; t and y modulate every block (adaLN-Zero).

Lecture 4, "Diffusion Transformer (DiT)"; Peebles & Xie 2023.

B: batch, C: channels of x, H x W: its size, p: the width of a patch, N = (H/p)(W/p): the tokens,
D: the width of a token, e (B, D): t and y embedded.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from cfg_min import NULL
from unet import FEATURES, waves, zero


def patchify(x, p):
    """(B, C, H, W) -> (B, N, C p p): patches row by row, each flat."""
    B, C, H, W = x.shape
    x = x.view(B, C, H // p, p, W // p, p)
    x = x.permute(0, 2, 4, 1, 3, 5)             # (B, H/p, W/p, C, p, p)
    return x.reshape(B, (H // p) * (W // p), C * p * p)


def unpatchify(tokens, p, shape):
    """(B, N, C p p) -> shape (B, C, H, W): patchify's steps undone."""
    B, C, H, W = shape
    x = tokens.view(B, H // p, W // p, C, p, p)
    x = x.permute(0, 3, 1, 4, 2, 5)             # (B, C, H/p, p, W/p, p)
    return x.reshape(B, C, H, W)


def positions(n, D):
    """Fixed sin-cos positions on an n x n grid, (n n, D): half of D is the row, half the column."""
    scales = 100 ** torch.linspace(0, 1, D // 4)            # up to 100: a grid is short
    angles = torch.arange(n)[:, None] / scales              # (n, D/4)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)   # (n, D/2)
    rows = line.repeat_interleave(n, 0)         # 0 0 0 1 1 1 ...
    columns = line.repeat(n, 1)                 # 0 1 2 0 1 2 ...
    return torch.cat([rows, columns], dim=1)    # (n n, D)


def modulate(x, shift, scale):
    """adaLN: x (B, N, D) normalised, then scaled and shifted by (B, D)."""
    x = F.layer_norm(x, x.shape[-1:])
    return x * (1 + scale[:, None]) + shift[:, None]


def attend(q, k, v):
    """softmax(q k^T / sqrt(D/heads)) v; all (B, heads, N, D/heads). Vaswani et al. 2017."""
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])     # (B, heads, N, N)
    return scores.softmax(dim=-1) @ v


class Block(nn.Module):
    """x + gate attention(adaLN(x)), then x + gate mlp(adaLN(x)); the gates start at 0."""

    def __init__(self, D, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.SiLU(), nn.Linear(4 * D, D))
        self.modulation = zero(nn.Linear(D, 6 * D))

    def attention(self, x):                     # (B, N, D) -> (B, N, D)
        qkv = self.qkv(x)                       # (B, N, 3 D)
        qkv = qkv.unflatten(2, (3, self.heads, -1))         # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)    # (B, heads, N, D/heads) each
        x = attend(q, k, v)
        x = x.transpose(1, 2).flatten(2)        # (B, N, heads, D/heads) -> (B, N, D)
        return self.out(x)

    def forward(self, x, e):                    # (B, N, D), (B, D) -> (B, N, D)
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(e).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attention(modulate(x, shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(x, shift2, scale2))


class DiT(nn.Module):
    """net(x, t, y) -> like x (B, C, H, W); t (B,) or a number in [0, 1]; y (B,), 0 ... classes.

    The label `classes`, by default NULL, is "no label".
    """

    def __init__(self, size=32, in_channels=1, patch=4, width=128, depth=5, heads=2, classes=NULL):
        super().__init__()
        self.size = size
        self.patch = patch
        numbers = in_channels * patch**2        # of a patch
        self.embed = nn.Linear(numbers, width)
        self.last = zero(nn.Linear(width, numbers))
        # fixed, so not saved
        self.register_buffer("positions", positions(size // patch, width), persistent=False)
        self.time = nn.Sequential(nn.Linear(FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width)       # one more for NULL
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation = zero(nn.Linear(width, 2 * width))

    def forward(self, x, t, y):
        if x.shape[2:] != (self.size, self.size):
            raise ValueError(f"x of shape {tuple(x.shape)}: H and W must be {self.size}")
        e = F.silu(self.time(waves(t, x)) + self.label(y))         # (B, D)
        h = self.embed(patchify(x, self.patch))             # (B, N, D)
        h = h + self.positions.to(h.dtype)
        for block in self.blocks:
            h = block(h, e)
        shift, scale = self.modulation(e).chunk(2, dim=1)   # (B, D) each
        h = self.last(modulate(h, shift, scale))            # (B, N, C p p)
        return unpatchify(h, self.patch, x.shape).to(x.dtype)
