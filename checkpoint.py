"""Networks by name; checkpoints, written and read; the device and its precision.

A checkpoint is a dict: config (all that its run depends on, as train.py lists it), step, weights
(the averaged ones) and, until the last step, what --resume needs: net, optimizers.
"""
import contextlib
import inspect
import io
import os
import warnings
import zipfile
from pathlib import Path

import torch

from cfg_min import u_from_eps, u_from_z
from command import BadInput, write_whole
from dit import DiT
from paths import PATHS
from unet import NoisyClassifier, UNet
from vae import VAE

HERE = Path(__file__).parent
NETS = {"unet": UNet, "dit": DiT, "vae": VAE, "classifier": NoisyClassifier}
FIELDS = set(NETS) - {"vae", "classifier"}      # the networks that can be sampled from
KEYS = {"config", "step", "weights"}
CONFIG_KEYS = {"arch", "net", "path", "predict", "latent", "checksum", "real_diversity"}

PIXELS_SHAPE = 1, 32, 32
LATENT_SHAPE = 4, 8, 8
LATENT_OPTIONS = {                              # of the networks that work on latents
    "unet": dict(in_channels=4, channels=(64, 128), layers=2, stride=1),
    "dit": dict(in_channels=4, size=8, patch=1),
}


def save(file, checkpoint):
    """Write a checkpoint whole; a full disk is an OSError, and the old file stays."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_whole(file, buffer.getbuffer())


def read(file, device="cpu"):
    """The dict in a checkpoint file. Raises BadInput."""
    if not Path(file).exists():
        file = HERE / file                      # weights/ is there from everywhere
    try:
        with zipfile.ZipFile(file) as parts:
            if parts.testzip():                 # a wrong checksum: torch.load does not look
                raise zipfile.BadZipFile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # torch's words on pickles that it then refuses
            checkpoint = torch.load(file, map_location=device, weights_only=True)
    except OSError as error:
        raise BadInput(f"{file}: {error.strerror}; train.py makes one") from None
    except Exception:                           # both raise whatever they stumble over
        raise not_a_checkpoint(file) from None
    if not has_keys(checkpoint, KEYS) or not is_config(checkpoint["config"]):
        raise not_a_checkpoint(file)
    return checkpoint


def has_keys(value, keys):
    return isinstance(value, dict) and keys <= set(value)


def is_config(value):
    """Whether this is the config of a network that can be built here."""
    if not has_keys(value, CONFIG_KEYS):
        return False
    # list: what a damaged file has may not hash
    if value["arch"] not in list(NETS) or value["path"] not in list(PATHS):
        return False
    if not isinstance(value["net"], dict):
        return False
    options = inspect.signature(NETS[value["arch"]]).parameters
    return set(value["net"]) <= set(options)


def not_a_checkpoint(file):
    return BadInput(f"{file}: not a checkpoint of train.py, or a damaged one")


def load(file, device="cpu"):
    """net and config of a checkpoint, with the averaged weights, ready to use. Raises BadInput.

    Of a U-Net or DiT, net(x, t, y) is a vector field u, whatever the network itself predicts. An
    autoencoder and a noisy classifier are themselves. config has the checkpoint's step as well.
    """
    checkpoint = read(file, device)
    config = dict(checkpoint["config"], step=checkpoint["step"])
    net = NETS[config["arch"]](**config["net"]).to(device)
    try:
        net.load_state_dict(checkpoint["weights"])
    except (RuntimeError, TypeError):           # of another network
        raise not_a_checkpoint(file) from None
    net.eval().requires_grad_(False)
    if config["arch"] in FIELDS:
        net = vector_field(net, config)
    return net, config


def vector_field(net, config):
    """net(x, t, y) -> u of a network that predicts what config says: u, eps or z."""
    path = PATHS[config["path"]]
    # bounds of z: pixels lie in [-1, 1], latents, of variance 1, hardly beyond 4
    high = 4.0 if config["latent"] else 1.0
    if config["predict"] == "z":                # not from above: pixels near white would all be 255
        return u_from_z(net, path, low=-high)
    if config["predict"] == "eps":              # both, as an eps may imply any z
        return u_from_eps(net, path, -high, high)
    return net


def pick_device(name):
    """The torch.device; None is CUDA where there is one, else the CPU. Raises BadInput."""
    if name is None:
        local_rank = os.environ.get("LOCAL_RANK", 0)        # one GPU a process, under torchrun
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        empty = torch.empty(0, device=name)
        empty.cpu()                             # not so from meta, which has no values
        return empty.device
    except (RuntimeError, AssertionError):
        raise BadInput(f"--device {name}: not to be had here; try --device cpu") from None


def autocast(device):
    """bf16 on CUDA, and on CPUs with instructions for it (1.3 to 1.6 x float32 when measured)."""
    fast = device.type == "cuda"
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    if fast:
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
