"""Networks by name; checkpoints, written and read; the device and its precision.

A checkpoint is a dict: config (the options of its run, its data and path), step, weights
and a checksum of all that is in it. That of a latent model has its autoencoder as well (config and
weights). Until the last step it has what --resume needs: optimizer, schedule.
"""
import importlib
import io
import os
import sys
import warnings
import zlib

import torch

from cfg_min import NULL
from paths import PATHS
from support.command import BadInput, find

PIXELS_SHAPE = 1, 32, 32
LATENT_SHAPE = 4, 8, 8

# A network by its dotted name; the defaults of --steps, --batch, --lr; and its options on latents
# and for --predict eps, where they differ.
NETWORKS = {
    "unet": dict(net="unet.UNet", steps=2400, batch=64, lr=2e-3, eps=dict(add_x=True),
                 latent=dict(in_channels=4, channels=(64, 128), stride=1)),
    "dit": dict(net="dit.DiT", steps=4200, batch=64, lr=1e-3,
                latent=dict(in_channels=4, size=8, patch=1)),
    "classifier": dict(net="chapters.classifier.NoisyClassifier", steps=1800, batch=128, lr=2e-3),
    "vae": dict(net="chapters.vae.VAE", steps=4000, batch=128, lr=4e-3),
}
PREDICTIONS = "u", "z", "eps"
GENERATORS = [name for name in NETWORKS if name not in ("classifier", "vae")]
LAST_T = 0.9999         # of a field for sampling; chapters/predictions.py says why


def find_by_name(dotted):
    """A class or function: "unet.UNet" is UNet of unet.py."""
    module, name = dotted.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def build(config, last_t=LAST_T):
    """The untrained network of a config. A generator is a vector field, net(x, t, y) -> u.

    last_t: the latest t in the formula of u, where the network itself predicts z or eps.
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
def use_once(field, config):
    """Call a generator once. Where it fails, a line says with what it was called."""
    device = next(field.parameters()).device
    shape = LATENT_SHAPE if config["latent"] else PIXELS_SHAPE
    x = torch.zeros(2, *shape, dtype=torch.float32, device=device)
    t = torch.full((2,), 0.5, dtype=torch.float32, device=device)
    y = torch.tensor([0, NULL], device=device)
    try:
        field(x, t, y)
    except Exception:
        print(f"the network was called with x {tuple(x.shape)}, t (2,) and labels 0 and {NULL}, "
              "where it fails:", file=sys.stderr)
        raise


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


def pack(saved):
    """The bytes of a checkpoint's file."""
    buffer = io.BytesIO()
    torch.save(dict(saved, checksum=checksum_of(saved)), buffer)
    return buffer.getvalue()


def are_finite(weights):
    return all(value.isfinite().all() for value in weights.values())


def read(file):
    """The dict in a checkpoint file, on the CPU. Raises BadInput."""
    place = find(file)
    if not place.is_file():
        reason = "not a file" if place.exists() else "no such file"
        raise BadInput(f"{str(file)!r}: {reason}; train.py makes checkpoints of generators, python "
                       "-m chapters.vae and chapters.classifier theirs; weights/ has some of each")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")     # torch warns of pickles, then refuses them
            saved = torch.load(place, map_location="cpu", weights_only=True)
        if saved.pop("checksum") != checksum_of(saved):
            raise ValueError
    except (MemoryError, PermissionError):
        raise
    except Exception:                           # torch raises whatever it stumbles over
        raise BadInput(f"{file}: not a checkpoint of this project, or damaged") from None
    return saved


def rebuild(config, weights, file):
    """The network of a checkpoint, in evaluation mode. Raises BadInput where this code has none."""
    for key, known in (("arch", NETWORKS), ("path", PATHS), ("predict", PREDICTIONS)):
        if config[key] is not None and config[key] not in known:
            raise BadInput(f"{file}: its {key} is {config[key]!r}; known here: {', '.join(known)}")
    if config.get("classes", 10) != NULL:
        raise BadInput(f"{file}: trained with NULL = {config['classes']} in cfg_min.py, which now "
                       f"has {NULL}")
    try:
        net = build(config)
        net.load_state_dict(weights)
    except (TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{file}: its {config['arch']} is not this code's: {reason}") from None
    return net.eval()


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
    return rebuild(**read(file)["autoencoder"], file=file).to(device)


# ---------------------------------------------------------------- device

def pick_device(name):
    """The torch.device; None is CUDA where there is one, else the CPU. Raises BadInput."""
    if name is None:
        local_rank = os.environ.get("LOCAL_RANK", 0)        # one GPU a process, under torchrun
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            empty = torch.empty(0, device=name)
            empty.cpu()                         # fails on meta, which has no values
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
