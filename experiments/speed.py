"""Speed on the machine at hand: `python benchmarks/speed.py [--against FILE.py]`.

How fast a matrix product is, and what share of that rate training and sampling reach.
--against FILE.py: our training step and another's in turn, on one batch, and the ratio; the file
has make_net() and train_step(net, optimizer, z, y).
"""
import argparse
import importlib.util
import resource
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mnist                                                    # noqa: E402
from cfg_min import NULL, euler, guided_field                   # noqa: E402
from checkpoint import (LATENT_OPTIONS, LATENT_SHAPE, NETS, PIXELS_SHAPE, autocast,     # noqa: E402
                        pick_device, vector_field)
from command import run                                         # noqa: E402
from sample import generate                                     # noqa: E402
from train import RECIPES, Optimizers, loss_of                  # noqa: E402

DEVICE = pick_device(None)
CASES = {"U-Net": ("unet", False), "DiT": ("dit", False), "latent DiT": ("dit", True)}


def wait():
    """Until the device has done what it was asked for."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def median_time(f, n=7):
    """Median seconds of f() over n runs, after two that do not count."""
    seconds = []
    for _ in range(n + 2):
        wait()
        began = time.perf_counter()
        f()
        wait()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def matmul_rate(dtype, n=2048):
    """FLOP/s of a product of two n x n matrices: the best of three medians."""
    a, b = torch.randn(2, n, n, device=DEVICE).to(dtype)
    seconds = [median_time(lambda: a @ b, 3) for _ in range(3)]
    return 2 * n**3 / min(seconds)


class Case:
    """A network, a batch for it, and what loss_of and vector_field read of its config."""

    def __init__(self, arch, latent):
        torch.manual_seed(0)
        options = LATENT_OPTIONS[arch] if latent else {}
        self.net = NETS[arch](**options).to(DEVICE)
        self.optimizers = Optimizers(self.net)
        self.config = dict(arch=arch, path="condot", predict="u" if latent else "z", eta=0.1,
                           latent=latent, steps=1)
        self.batch = RECIPES[arch]["batch"]
        self.shape = LATENT_SHAPE if latent else PIXELS_SHAPE
        self.z = torch.randn(self.batch, *self.shape, device=DEVICE)
        self.y = torch.randint(0, NULL, (self.batch,), device=DEVICE)

    def train_step(self):
        """A step of train.py without its data and averaging."""
        with autocast(DEVICE):
            loss = loss_of(self.config, self.net, self.z, self.y, step=0)
        loss.backward()
        self.optimizers.step(1e-3)

    def flop(self):
        """Of one evaluation of the network on one image."""
        with FlopCounterMode(display=False) as counter:
            self.net(self.z, 0.5, self.y)
        return counter.get_total_flops() / self.batch


class Timed:
    """A vector field in the device's fast precision, with the seconds spent inside."""

    def __init__(self, case):
        self.field = vector_field(case.net, case.config)
        self.seconds = 0.0

    def __call__(self, x, t, y):
        wait()
        began = time.perf_counter()
        with autocast(DEVICE):
            u = self.field(x, t, y).float()
        wait()
        self.seconds += time.perf_counter() - began
        return u


@torch.no_grad()
def sampling(case, n=200, steps=10):
    """Evaluations per second in guided sampling, two a step and sample; the net's share of time."""
    net = Timed(case)
    y = torch.arange(n, device=DEVICE) % 10

    def simulate(noise, y, randn):
        return euler(partial(guided_field, net, y=y, w=3.0), noise, steps)

    began = time.perf_counter()
    for x in generate(simulate, y, case.shape, 0):
        mnist.to_bytes(x)
    seconds = time.perf_counter() - began
    return 2 * steps * n / seconds, net.seconds / seconds


def rates():
    """Arithmetic rate of the machine, and how much of it training and sampling reach."""
    float32 = matmul_rate(torch.float32)
    bf16 = matmul_rate(torch.bfloat16)
    fast = isinstance(autocast(DEVICE), torch.autocast)
    rate = bf16 if fast else float32
    print(f"matrix product, 2048 x 2048, on {DEVICE}, {torch.get_num_threads()} threads: float32 "
          f"{float32 / 1e9:.0f} GFLOP/s, bf16 {bf16 / 1e9:.0f} GFLOP/s; "
          f"networks use {'bf16' if fast else 'float32'}")
    print("net          MFLOP/image  training images/s  share  sampling calls/s  share  in net")
    for name, (arch, latent) in CASES.items():
        case = Case(arch, latent)
        flop = case.flop()
        trained = case.batch / median_time(case.train_step)     # images/s, forward and backward
        called, inside = sampling(case)
        # backward costs twice as much as forward
        print(f"{name:12s} {flop / 1e6:11.0f} {trained:18.0f} {3 * flop * trained / rate:6.0%} "
              f"{called:17.0f} {flop * called / rate:6.0%} {inside:7.1%}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process {peak:.0f} MiB")
    if DEVICE.type == "cuda":
        print(f"peak memory of the GPU {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


def against(file):
    """Our training step and another's in turn, on one batch: ratios of images/s."""
    spec = importlib.util.spec_from_file_location("other", file)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    ours = Case("unet", latent=False)
    net = other.make_net().to(DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    ratios = []
    for _ in range(5):
        a = median_time(ours.train_step, 3)
        b = median_time(lambda: other.train_step(net, optimizer, ours.z, ours.y), 3)
        ratios.append(b / a)
        print(f"ours {ours.batch / a:.0f} images/s, theirs {ours.batch / b:.0f} images/s, "
              f"ratio {b / a:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}")


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--against", metavar="FILE.py")
    options = p.parse_args()
    if options.against:
        against(options.against)
    else:
        rates()


if __name__ == "__main__":
    sys.exit(run(main))
