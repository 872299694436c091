"""The networks: U-Net, DiT, and the autoencoder of latent diffusion."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Independent, Normal, kl_divergence
from conftest import randomize
from test_cfg import close, distance

from cfg_min import NULL, cfg_cfm_loss
from chapters.vae import VAE, kl_to_normal, vae_loss
from dit import Block, DiT, modulate, patchify, positions, unpatchify
from paths import CondOT
from support.checkpoint import NETWORKS
from unet import ResidualLayer, UNet

NETWORKS = pytest.mark.parametrize("make, options, shape", [
    (UNet, {}, (1, 32, 32)),
    (UNet, NETWORKS["unet"]["latent"], (4, 8, 8)),
    (DiT, {}, (1, 32, 32)),
    (DiT, NETWORKS["dit"]["latent"], (4, 8, 8)),
], ids=["unet", "latent unet", "dit", "latent dit"])
Y = torch.tensor([0, 7, NULL])


@NETWORKS
def test_a_network_starts_at_0_and_uses_all_its_weights(make, options, shape):
    """net(x, t, y) is like x, also for an empty batch, and 0 before training."""
    net = make(**options)
    x = torch.randn(3, *shape)
    assert torch.equal(net(x, torch.rand(3), Y), torch.zeros_like(x))
    assert net(x[:0], torch.rand(0), Y[:0]).shape == x[:0].shape
    cfg_cfm_loss(randomize(net), CondOT(), x, Y, 0.0).backward()
    for name, p in net.named_parameters():
        assert p.grad.abs().sum() > 0, name


@NETWORKS
@torch.no_grad()
def test_a_network_depends_on_t_and_y_and_treats_classes_alike(make, options, shape):
    """Label embeddings permuted as the labels are: the same output. t (B,) or one number."""
    net = randomize(make(**options))
    x = torch.randn(3, *shape)
    t = torch.rand(3)
    out = net(x, t, Y)
    assert distance(net(x, t, Y.flip(0)), out) > 1e-4
    assert distance(net(x, 1 - t, Y), out) > 1e-4
    order = torch.randperm(11)
    net.label.weight[:] = net.label.weight[order].clone()
    close(net(x, t, order.argsort()[Y]), out, 1e-4)
    assert torch.equal(net(x, 0.3, Y), net(x, torch.full((3,), 0.3), Y))


@pytest.mark.parametrize("make", [UNet, DiT])
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_a_network_works_in_any_float_type(make, kind):
    """The same output, as exact as the type is."""
    net = randomize(make())
    x = torch.randn(3, 1, 32, 32)
    out = net(x, 0.3, Y)
    in_kind = net.to(kind)(x.to(kind), 0.3, Y)
    assert in_kind.dtype == kind
    assert distance(in_kind, out) < 0.1 * out.std()


# ---------------------------------------------------------------- U-Net

def test_the_default_unet_has_the_lectures_stages():
    """Encoders halve the image and widen its channels, decoders go back; two layers a stage."""
    net = UNet()
    shapes = []

    def note(stage, inputs, output):
        h = output[0] if stage in net.encoders else output
        shapes.append(tuple(h.shape[1:]))

    for stage in (net.first, *net.encoders, net.midcoder, *net.decoders):
        stage.register_forward_hook(note)
    net(torch.randn(3, 1, 32, 32), 0.5, Y)
    assert shapes == [(32, 16, 16), (64, 8, 8), (128, 4, 4), (128, 4, 4), (64, 8, 8), (32, 16, 16)]
    assert sum(isinstance(part, ResidualLayer) for part in net.modules()) == 2 * 5


@pytest.mark.parametrize("stage", [0, 1])
@torch.no_grad()
def test_each_encoder_reaches_the_output_by_its_skip_connection(stage):
    """Without the skip the output is another one, though the way through the middle is whole."""
    net = randomize(UNet())
    x = torch.randn(3, 1, 32, 32)
    out = net(x, 0.5, Y)
    net.encoders[stage].register_forward_hook(lambda encoder, inputs, ends: (ends[0], 0 * ends[1]))
    assert distance(net(x, 0.5, Y), out) > 1e-3


@torch.no_grad()
def test_a_residual_layer_adds_to_x_and_e_scales_and_shifts_its_norm():
    """As if the norm's own weight were (1 + scale) weight, its bias (1 + scale) bias + shift."""
    layer = ResidualLayer(8, 16)
    x = torch.randn(2, 8, 4, 4)
    e = torch.randn(1, 16)
    assert torch.equal(layer(x, e), x)          # its last convolution starts at 0
    out = randomize(layer)(x, e)
    scale, shift = layer.inject(e)[0].chunk(2)
    assert min(scale.abs().max(), shift.abs().max()) > 0.1
    layer.norm2.weight.mul_(1 + scale)
    layer.norm2.bias.mul_(1 + scale).add_(shift)
    layer.inject.weight.zero_()
    layer.inject.bias.zero_()
    close(layer(x, e), out, 1e-5)


# ---------------------------------------------------------------- DiT

def test_patches_are_those_of_unfold():
    """So they do not overlap and go row by row, and a linear layer on them is a convolution."""
    x = torch.randn(2, 3, 8, 12)
    tokens = patchify(x, 4)
    assert torch.equal(tokens, F.unfold(x, 4, stride=4).transpose(1, 2))
    assert torch.equal(unpatchify(tokens, 4, x.shape), x)


@torch.no_grad()
def test_attention_is_torchs():
    """softmax(q k^T / sqrt(D/heads)) v, in several heads, then a linear layer."""
    block = Block(16, heads=4)
    torchs = torch.nn.MultiheadAttention(16, num_heads=4, batch_first=True)
    torchs.in_proj_weight[:] = block.qkv.weight
    torchs.in_proj_bias[:] = block.qkv.bias
    torchs.out_proj.load_state_dict(block.out.state_dict())
    x = torch.randn(3, 5, 16)
    close(block.attention(x), torchs(x, x, x)[0], 1e-5)


@torch.no_grad()
def test_a_dit_knows_where_a_patch_is_by_its_position_alone():
    """Without positions, patches that change places take their outputs with them."""
    net = randomize(DiT())
    x = torch.randn(3, 1, 32, 32)
    moved = x.roll((4, 8), dims=(2, 3))         # by whole patches

    def difference():
        return distance(net(moved, 0.5, Y), net(x, 0.5, Y).roll((4, 8), dims=(2, 3)))

    assert difference() > 1e-2
    net.positions.zero_()
    assert difference() < 1e-5


def test_a_position_is_half_row_and_half_column():
    """All differ; those of a row share the first half, those of a column the second."""
    place = positions(8, 128)
    assert torch.pdist(place).min() > 0.1
    rows, columns = place.view(8, 8, 128).chunk(2, dim=2)
    assert torch.equal(rows, rows[:, :1].expand_as(rows))
    assert torch.equal(columns, columns[:1].expand_as(columns))


@torch.no_grad()
def test_e_scales_shifts_and_gates_the_blocks_of_a_dit():
    """adaLN: a layer norm with weight 1 + scale and bias shift; adaLN-Zero: gates start at 0."""
    h = torch.randn(1, 64, 128)
    e = torch.randn(1, 128)
    for block in DiT().blocks:
        assert torch.equal(block(h, e), h)
    shift, scale = torch.randn(2, 1, 128)
    close(modulate(h, shift, scale), F.layer_norm(h, (128,), 1 + scale[0], shift[0]), 1e-5)
    block = randomize(Block(128, heads=2))
    shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation(e).chunk(6, dim=1)
    between = h + gate1 * block.attention(modulate(h, shift1, scale1))
    close(block(h, e), between + gate2 * block.mlp(modulate(between, shift2, scale2)), 1e-5)


# ---------------------------------------------------------------- the autoencoder

def test_the_autoencoder_decodes_a_draw_of_its_posterior():
    """A latent is mean + std eps, std^2 = var: of q(latent|x); encode scales it, decode back."""
    vae = randomize(VAE())
    vae.scale.fill_(2.0)
    images = torch.rand(3, 1, 32, 32)
    eps = torch.randn(3, 4, 8, 8)
    recon, mean, log_var = vae(images, eps)
    assert recon.shape == images.shape
    close(vae.encode(images), 2 * mean, 1e-5)
    assert log_var.abs().max() > 0.1            # else std and var are alike
    close(recon, vae.decode(2 * (mean + log_var.exp().sqrt() * eps)), 1e-5)


def test_the_loss_of_the_autoencoder_is_minus_the_elbo():
    """-ELBO = E_q[-log p(x|latent)] + KL(q(latent|x) || N(0, I)), times 2 std^2 / pixels."""
    vae = randomize(VAE())
    images = torch.rand(3, 1, 32, 32)
    torch.manual_seed(0)
    loss = vae_loss(vae, images, std=0.2)
    torch.manual_seed(0)
    recon, mean, log_var = vae(images, torch.randn(3, 4, 8, 8))
    q = Independent(Normal(mean, (log_var / 2).exp()), 3)
    prior = Independent(Normal(torch.zeros_like(mean), 1), 3)
    kl = kl_divergence(q, prior)
    close(kl_to_normal(mean, log_var), kl, 1e-4)
    constant = 512 * math.log(2 * math.pi * 0.2**2)         # of 1024 pixels
    log_p = Independent(Normal(recon, 0.2), 3).log_prob(images) + constant
    close(loss, (kl - log_p).mean() * 2 * 0.2**2 / 1024, 1e-4)
