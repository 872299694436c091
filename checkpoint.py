"""Networks by name; checkpoints, written and read; the device and its precision.

A checkpoint is a dict: config (all that its run depends on, as train.py lists it), step, weights
and a checksum of all that is in it. That of a latent model has its autoencoder as well (config and
weights). Until the last step it has what --resume needs: optimizer, schedule.
"""
import contextlib
import io
import json
import os
import warnings
import zlib
from pathlib import Path

import torch

from classifier import NoisyClassifier
from command import BadInput, write_whole
from ddpm import EpsField
from dit import DiT
from paths import PATHS, DataField
from unet import UNet
from vae import VAE

HERE = Path(__file__).parent
NETS = {"unet": UNet, "dit": DiT, "classifier": NoisyClassifier, "vae": VAE}
PIXELS_SHAPE = 1, 32, 32
LATENT_SHAPE = 4, 8, 8
LATENT_OPTIONS = {                              # of the networks that work on latents
    "unet": dict(in_channels=4, channels=(64, 128), stride=1),
    "dit": dict(in_channels=4, size=8, patch=1),
}


def build(config):
    """The untrained network of a config. A U-Net or DiT is a vector field, net(x, t, y) -> u."""
    net = NETS[config["arch"]](**config["net"])
    net.float()                                 # whatever torch.set_default_dtype says
    if config["arch"] == "vae":
        return net
    path = PATHS[config["path"]]
    predict = config["predict"]
    if predict == "z":
        return DataField(net, path)
    if predict == "eps":                        # pixels lie in [-1, 1], latents hardly beyond 4
        return EpsField(net, path, bound=4.0 if config["latent"] else 1.0)
    if predict in ("u", None):                  # None: a classifier
        return net
    raise ValueError(f"predict = {predict}")


def use_once(net, config):
    """What net returns for one image of zeros, or for one latent."""
    shape = LATENT_SHAPE if config["latent"] else PIXELS_SHAPE
    x = torch.zeros(1, *shape, dtype=torch.float32)
    if config["arch"] == "vae":
        return net.decode(net.encode(x))
    if config["arch"] == "classifier":
        return net(x, 0.5)
    return net(x, 0.5, torch.zeros(1, dtype=torch.int64))


# ---------------------------------------------------------------- files

def checksum_of(value, crc=0):
    """The crc32 of all that is in nested dicts, lists and tensors."""
    if isinstance(value, torch.Tensor):
        return zlib.crc32(value.detach().cpu().reshape(-1).view(torch.uint8).numpy(), crc)
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, (list, tuple)):
        for part in value:
            crc = checksum_of(part, crc)
        return crc
    return zlib.crc32(repr(value).encode(), crc)


def save(file, saved):
    """Write a checkpoint whole; a full disk is an OSError, and the old file stays."""
    buffer = io.BytesIO()
    torch.save(dict(saved, checksum=checksum_of(saved)), buffer)
    write_whole(file, buffer.getbuffer())


def damaged(file):
    return BadInput(f"{file}: it is not a checkpoint of this project, or is damaged, or its "
                    "network is not this code's")


def find(file):
    """The place of a checkpoint; weights/ is found from anywhere."""
    if not Path(file).is_file() and (HERE / file).is_file():
        return HERE / file
    return Path(file)


def are_finite(weights):
    return all(value.isfinite().all() for value in weights.values())


def read(file):
    """The dict in a checkpoint file, on the CPU. Raises BadInput."""
    place = find(file)
    if not place.is_file():
        reason = "not a file" if place.exists() else "no such file"
        raise BadInput(f"{str(file)!r}: {reason}; train.py makes a checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # torch warns of pickles, then refuses them
            saved = torch.load(place, map_location="cpu", weights_only=True)
        if saved.pop("checksum") != checksum_of(saved):
            raise ValueError
        json.dumps(saved["config"])             # plain data
        step = saved["step"]
        if not isinstance(step, int) or not 0 < step <= saved["config"]["steps"]:
            raise ValueError
        if not saved["weights"]:
            raise ValueError
    except (MemoryError, PermissionError):
        raise
    except Exception:                           # torch raises whatever it stumbles over
        raise damaged(file) from None
    return saved


def rebuild(config, weights, file):
    """The network of a checkpoint, tried once, in evaluation mode. Raises BadInput."""
    try:
        net = build(config)
        net.load_state_dict(weights)
        net.eval()
        with torch.no_grad():
            finite = use_once(net, config).isfinite().all()
        known = "data" in config and isinstance(config["real_diversity"], float)
        if not finite or not are_finite(weights) or not known:
            raise ValueError
    except Exception:                           # a damaged config may fail anywhere
        raise damaged(file) from None
    return net


def load(file, device="cpu"):
    """net and config of a checkpoint, ready to use. Raises BadInput.

    net is an nn.Module in evaluation mode. That of a U-Net or DiT is a vector field,
    net(x, t, y) -> u, whatever the network itself predicts. config has the step as well.
    """
    saved = read(file)
    net = rebuild(saved["config"], saved["weights"], file)
    return net.to(device), dict(saved["config"], step=saved["step"])


def load_autoencoder(file, device="cpu"):
    """The autoencoder that a latent model's checkpoint carries. Raises BadInput."""
    autoencoder = read(file).get("autoencoder")
    if not isinstance(autoencoder, dict) or autoencoder.keys() != {"config", "weights"}:
        raise damaged(file)
    vae = rebuild(**autoencoder, file=file)
    if not isinstance(vae, VAE):
        raise damaged(file)
    return vae.to(device)


# ---------------------------------------------------------------- device

def pick_device(name):
    """The torch.device; None is CUDA where there is one, else the CPU. Raises BadInput."""
    if name is None:
        local_rank = os.environ.get("LOCAL_RANK", 0)        # one GPU a process, under torchrun
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        empty = torch.empty(0, device=name)
        empty.cpu()                             # fails on meta, which has no values
        return empty.device
    except Exception:                           # each device has its own way to be missing
        raise BadInput(f"--device {name}: not available here; try --device cpu") from None


def autocast(device):
    """bf16 on CUDA, and on CPUs with instructions for it (1.3 to 1.6 x float32 when measured)."""
    fast = device.type == "cuda"
    if device.type == "cpu":
        fast = torch.cpu._is_avx512_bf16_supported()
    if fast:
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()
