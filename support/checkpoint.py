"""Networks by name; checkpoints, written and read; the device and its precision.

A checkpoint is a dict: config (the options of its run, its data and path), step, weights
and a checksum of all that is in it. That of a latent model has its autoencoder as well (config and
weights). Until the last step it has what --resume needs: optimizer, schedule.
"""
import importlib
import inspect
import io
import json
import os
import warnings
import zlib

import torch

from paths import PATHS
from support.command import BadInput, find, write_whole

PIXELS_SHAPE = 1, 32, 32
LATENT_SHAPE = 4, 8, 8

# A network by its dotted name; the defaults of --steps, --batch, --lr; and its options on latents
# and for --predict eps, where they differ.
NETWORKS = {
    "unet": dict(net="unet.UNet", steps=1200, batch=128, lr=2e-3, eps=dict(add_x=True),
                 latent=dict(in_channels=4, channels=(64, 128), stride=1)),
    "dit": dict(net="dit.DiT", steps=4200, batch=64, lr=1e-3,
                latent=dict(in_channels=4, size=8, patch=1)),
    "classifier": dict(net="chapters.classifier.NoisyClassifier", steps=1800, batch=128, lr=2e-3),
    "vae": dict(net="chapters.vae.VAE", steps=4000, batch=128, lr=4e-3),
}
PREDICTIONS = "u", "z", "eps"
GENERATORS = [name for name in NETWORKS if name not in ("classifier", "vae")]
KINDS = dict(arch=str, net=dict, latent=int, path=(str, type(None)), predict=(str, type(None)),
             steps=int, data=int, real_diversity=float)     # what a config has at least
LAST_T = 0.9999         # of a field for sampling; chapters/predictions.py says why


def find_by_name(dotted):
    """A class or function: "unet.UNet" is UNet of unet.py."""
    module, name = dotted.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def build(config, last_t=LAST_T):
    """The untrained network of a config. A generator is a vector field, net(x, t, y) -> u.

    last_t: the latest t in the formula of u, where the network itself predicts z.
    """
    net = find_by_name(NETWORKS[config["arch"]]["net"])(**config["net"])
    net.float()                                 # whatever torch.set_default_dtype says
    if config["predict"] in ("u", None):        # None: a classifier or an autoencoder
        return net
    from chapters.predictions import DataField, EpsField
    path = PATHS[config["path"]]
    if config["predict"] == "z":
        return DataField(net, path, last_t)
    bound = 4.0 if config["latent"] else 1.0    # pixels lie in [-1, 1], latents hardly beyond 4
    return EpsField(net, path, last_t, bound)


@torch.no_grad()
def use_once(net, config):
    """What net returns for one image of zeros, or for one latent, in evaluation mode."""
    net.eval()
    shape = LATENT_SHAPE if config["latent"] else PIXELS_SHAPE
    x = torch.zeros(1, *shape, dtype=torch.float32)
    t = torch.full((1,), 0.5, dtype=torch.float32)
    if config["arch"] == "vae":
        return net.decode(net.encode(x))
    if config["arch"] == "classifier":
        return net(x, t)
    return net(x, t, torch.zeros(1, dtype=torch.int64))


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
    return BadInput(f"{file}: not a checkpoint of this project, or damaged")


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
        if saved.pop("checksum") != checksum_of(saved) or not is_whole(saved):
            raise ValueError
    except (MemoryError, PermissionError):
        raise
    except Exception:                           # torch raises whatever it stumbles over
        raise damaged(file) from None
    return saved


def is_whole(saved):
    """Whether a checkpoint has its parts, each of its kind; raises anything where it has not."""
    config, step = saved["config"], saved["step"]
    json.dumps(config)                          # plain data
    return (all(isinstance(config[key], kind) for key, kind in KINDS.items())
            and isinstance(config.get("labels", []), list) and isinstance(step, int)
            and 0 < step <= config["steps"] and saved["weights"]
            and all(isinstance(value, torch.Tensor) for value in saved["weights"].values()))


def rebuild(config, weights, file):
    """The network of a checkpoint, tried once, in evaluation mode.

    Raises BadInput where this code has no such network. What a network itself raises goes through.
    """
    for key, known in (("arch", NETWORKS), ("path", PATHS), ("predict", PREDICTIONS)):
        if config[key] is not None and config[key] not in known:
            raise BadInput(f"{file}: its {key} is {config[key]!r}; known here: {', '.join(known)}")
    make = find_by_name(NETWORKS[config["arch"]]["net"])
    try:
        inspect.signature(make).bind(**config["net"])
        net = build(config)
        net.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{file}: its {config['arch']} is not this code's: {reason}") from None
    finite = use_once(net, config).isfinite().all()
    if not finite or not are_finite(weights):
        raise BadInput(f"{file}: its network gives values that are not finite: train "
                       "another, with a lower --lr")
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
    return rebuild(**autoencoder, file=file).to(device)


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
    kind = device.type if fast else "cpu"       # not every device knows autocast
    return torch.autocast(kind, torch.bfloat16, enabled=fast)
