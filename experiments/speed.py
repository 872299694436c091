"""Speed on this machine: `python -m experiments.speed`.

Of training: the whole step over forward and backward alone. Of sampling: the whole over the
network's own evaluations. And what the stride of the U-Net's first convolution buys. All ratios are
of median times, measured in turn in the same run.
"""
import statistics
import sys
import time

import torch

import sample
from cfg_min import NULL, cfg_cfm_loss
from dit import DiT
from paths import CondOT
from support import checkpoint
from support.checkpoint import LATENT_SHAPE, NETWORKS, PIXELS_SHAPE, autocast, pick_device
from support.command import Parser, execute
from support.mnist import draw_batch, to_bytes
from support.sampling import Noise
from unet import UNet

DEVICE = pick_device(None)
PATH = CondOT()
CASES = {                                       # name: network, its options, shape, batch
    "U-Net": (UNet, {}, PIXELS_SHAPE, 128),
    "U-Net, stride 1": (UNet, dict(stride=1), PIXELS_SHAPE, 128),
    "U-Net, one layer a stage": (UNet, dict(layers=1), PIXELS_SHAPE, 128),
    "DiT": (DiT, {}, PIXELS_SHAPE, 64),
    "latent DiT": (DiT, NETWORKS["dit"]["latent"], LATENT_SHAPE, 64),
}


def median_times(functions, n=7):
    """Median seconds of each function, called in turn n times, after one round that is not counted.
    """
    seconds = [[] for _ in functions]
    for _ in range(n + 1):
        for function, record in zip(functions, seconds):
            began = time.perf_counter()
            function()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            record.append(time.perf_counter() - began)
    return [statistics.median(record[1:]) for record in seconds]


def time_training(make, options, shape, batch):
    """Images a second of a whole step as train.py makes it, and its time over that of forward and
    backward alone."""
    net = make(**options).to(DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-4)
    images = torch.randn(4 * batch, *shape, device=DEVICE)
    labels = torch.randint(0, NULL, (4 * batch,), device=DEVICE)
    t = torch.rand(batch, device=DEVICE)

    def step():
        z, y = draw_batch(images, labels, batch)
        with autocast(DEVICE):
            loss = cfg_cfm_loss(net, PATH, z, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def forward_and_backward():
        with autocast(DEVICE):
            loss = net(images[:batch], t, labels[:batch]).square().mean()
        loss.backward()

    whole, alone = median_times([step, forward_and_backward])
    return batch / whole, whole / alone


@torch.no_grad()
def time_sampling(make, options, shape, steps=10, n=100):
    """Guided samples a second, and the time over that of the network's evaluations alone."""
    net = make(**options).to(DEVICE).eval()
    y = torch.arange(n, device=DEVICE) % 10
    latent = shape == LATENT_SHAPE
    x = torch.randn(2 * n, *shape, device=DEVICE)
    t = torch.full((2 * n,), 0.5, device=DEVICE)

    def whole():
        randn = Noise(0, range(n), latent, DEVICE)
        with autocast(DEVICE):
            out = sample.draw_samples(net, y, 3.0, steps, randn)
        to_bytes(out)

    def evaluations_alone():
        with autocast(DEVICE):
            for _ in range(steps):
                net(x, t, torch.cat([y, y]))

    whole_time, alone = median_times([whole, evaluations_alone])
    return n / whole_time, whole_time / alone


def main(argv=None):
    Parser(prog="python -m experiments.speed", description=__doc__.splitlines()[0]).parse_args(argv)
    print(f"{DEVICE}, {torch.get_num_threads()} threads, "
          f"bf16: {checkpoint.autocast(DEVICE)._enabled}")
    print("network                    training images/s   over alone   samples/s (10 steps)   "
          "over alone")
    for name, (make, options, shape, batch) in CASES.items():
        torch.manual_seed(0)
        trained, training_ratio = time_training(make, options, shape, batch)
        sampled, sampling_ratio = time_sampling(make, options, shape)
        print(f"{name:26s} {trained:17.0f} {training_ratio:12.2f} {sampled:22.0f} "
              f"{sampling_ratio:12.2f}", flush=True)


if __name__ == "__main__":
    sys.exit(execute(main))
