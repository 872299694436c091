"""Speed and quality on the machine at hand: `python benchmarks/speed.py [rate|calls|time ...]`.

rate: matrix products, training, sampling, memory. calls: quality against network calls.
time: quality after 30, 60, 120 and 300 s of training, and a PNG of it. All three by default.
--against FILE.py: our training step and another's, make_net() and train_step(net, optimizer, z, y).
"""
import argparse
import importlib.util
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import checkpoint                                               # noqa: E402
import mnist                                                    # noqa: E402
import picture                                                  # noqa: E402
from cfg_min import NULL, cfg_cfm_loss, guided_field, logit_normal      # noqa: E402
from checkpoint import LATENT_OPTIONS, autocast                 # noqa: E402
from command import write_whole                                 # noqa: E402
from paths import CondOT                                        # noqa: E402
from sample import generate                                     # noqa: E402
from train import RECIPES, Optimizers                           # noqa: E402

DEVICE = checkpoint.pick_device(None)
NETS = {"unet": ("unet", {}), "dit": ("dit", {}), "latent dit": ("dit", LATENT_OPTIONS["dit"])}


def sync():
    if DEVICE.type == "cuda": torch.cuda.synchronize()


def median_time(f, n=7):
    """Median seconds of f() over n runs after two."""
    seconds = []
    for _ in range(n + 2):
        sync()
        began = time.perf_counter()
        f()
        sync()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def matmul_rate(dtype, n=2048):
    """FLOP/s of a product of two n x n matrices: the best of nine."""
    a, b = torch.randn(2, n, n, device=DEVICE).to(dtype)
    return 2 * n**3 / min(median_time(lambda: a @ b, 3) for _ in range(3))


def run(script, *options):
    """Run a command of the project; returns what it printed."""
    command = [sys.executable, ROOT / script, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode: sys.exit(f"{script} {options}: {done.stderr}")
    return done.stdout


def batch_of(arch, options, batch):
    shape = (4, 8, 8) if options else (1, 32, 32)
    z = torch.randn(batch, *shape, device=DEVICE)
    return z, torch.randint(0, NULL, (batch,), device=DEVICE)


def our_step(net, optimizers, z, y):
    """A step of train.py without its data and averaging."""
    with autocast(DEVICE):
        loss = cfg_cfm_loss(net, CondOT(), z, y, draw_t=logit_normal)
    loss.backward()
    optimizers.step(1e-3)


def rates():
    """Arithmetic rate of the machine, and how much of it training and sampling reach."""
    kinds = {"float32": torch.float32, "bf16": torch.bfloat16}
    rate = {k: matmul_rate(v) for k, v in kinds.items()}
    used = "bf16" if autocast(DEVICE)._enabled else "float32"
    print(f"matrix product, 2048 x 2048, on {DEVICE}, {torch.get_num_threads()} threads: "
          + ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in rate.items())
          + f"; networks use {used}")
    print("net          MFLOP/image  training images/s  share  sampling calls/s  share  in net")
    for name, (arch, options) in NETS.items():
        torch.manual_seed(0)
        batch, net = RECIPES[arch]["batch"], checkpoint.NETS[arch](**options).to(DEVICE)
        z, y = batch_of(arch, options, batch)
        t = torch.rand(batch, device=DEVICE)
        with FlopCounterMode(display=False) as counter: net(z, t, y)
        flop, optimizer = counter.get_total_flops() / batch, Optimizers(net)
        per_s = batch / median_time(lambda: our_step(net, optimizer, z, y))
        inside = 0.0

        def timed(*inputs):
            nonlocal inside
            sync()
            began = time.perf_counter()
            with autocast(DEVICE): out = net(*inputs).float()
            sync()
            inside += time.perf_counter() - began
            return out

        def field(x, t, y):
            return guided_field(timed, x, t, y, 3.0)

        began = time.perf_counter()
        y = torch.arange(200, device=DEVICE) % 10
        with torch.no_grad():
            for x in generate(field, y, z.shape[1:], 0, "euler", 10, {}):
                mnist.to_bytes(x)
        total = time.perf_counter() - began
        calls_per_s = 200 * 2 * 10 / total                      # guided: two evaluations a step
        print(f"{name:12s} {flop / 1e6:11.0f} {per_s:18.0f} {3 * flop * per_s / rate[used]:6.0%} "
              f"{calls_per_s:17.0f} {flop * calls_per_s / rate[used]:6.0%} {inside / total:7.1%}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"peak memory of this process {peak:.0f} MiB")
    if DEVICE.type == "cuda":
        print(f"peak memory of the GPU {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


# ------------------------------------------------------------------------------ quality

def features(classifier, images):
    """The classifier's last hidden layer for images (N, 32, 32) uint8, and what it reads."""
    kept = []
    hook = classifier.last.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        reads = [classifier(mnist.to_unit(x), torch.ones(len(x), device=DEVICE)).argmax(1)
                 for x in images[:, None].to(DEVICE).split(500)]
    hook.remove()
    return torch.cat(kept).double().cpu(), torch.cat(reads).cpu()


def frechet(a, b):
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); Heusel et al. 2017, eq. 6."""
    ca, cb = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(ca @ cb).real.clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0))**2).sum() + ca.trace() + cb.trace() - 2 * root


class Judge:
    """Accuracy, Frechet distance to the test digits over its floor, diversity, seconds."""

    def __init__(self, n):
        self.n, (x, _, test, y) = n, mnist.load()
        self.classifier, _ = checkpoint.load(ROOT / "weights/classifier.pt", DEVICE)
        self.test, _ = features(self.classifier, test[:, 0])
        real, _ = features(self.classifier, x[:n, 0])           # as many real training digits
        self.floor = frechet(real, self.test)
        self.real = mnist.diversity(test, y)

    def __call__(self, ckpt, w, *options):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "a.npz"
            said = run("sample.py", "--ckpt", ckpt, "--w", w, "--n", self.n, "--out", out, *options)
            with np.load(out) as a:
                images, labels = (torch.from_numpy(a[k]) for k in ("images", "labels"))
        f, reads = features(self.classifier, images)
        seconds = float(re.search(r"([\d.]+) s$", said.strip())[1])
        distance = (frechet(f, self.test) / self.floor).item()
        diversity = mnist.diversity(images, labels) / self.real
        return 100 * (reads == labels).double().mean().item(), distance, diversity, seconds


def calls(n):
    """Quality against network calls, with the shipped U-Net at w = 1.25."""
    judge = Judge(n)
    print(f"\n{n} samples of weights/unet.pt at w = 1.25: "
          "% read as their label / Frechet distance over its floor / seconds")
    budgets = (5, 10, 20, 50, 100)
    print("calls     " + "".join(f"{b:>20d}" for b in budgets))
    for sampler in ("euler", "heun", "ddim", "em"):
        cells = []
        for b in budgets:
            steps = (b + 1) // 2 if sampler == "heun" else b
            options = "--sampler", sampler, "--steps", steps
            accuracy, distance, _, seconds = judge(ROOT / "weights/unet.pt", 1.25, *options)
            cells.append(f"{accuracy:.1f} / {distance:.2f} / {seconds:.0f}")
        print(f"{sampler:10s}" + "".join(f"{c:>20s}" for c in cells), flush=True)


def time_to_quality(n, budgets, seeds, arch="unet"):
    """Quality after so many seconds of training from nothing: --steps is set to what fits."""
    judge, batch = Judge(n), RECIPES[arch]["batch"]
    print(f"\n--arch {arch}, {n} samples in 10 steps of Heun, medians of {seeds} seeds: "
          "% read right, Frechet distance over its floor, diversity\n"
          "seconds of training   steps    loss        w = 1              w = 1.25           w = 3")
    curve = []
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "a.pt"
        probe = run("train.py", "--arch", arch, "--steps", 60, "--out", out)
        rate = float(re.findall(r"([\d.]+) images/s", probe)[-1])
        for budget in budgets:
            rows, steps = [], max(100, int(budget * rate / batch))
            for seed in range(seeds):
                began = time.perf_counter()
                options = "--arch", arch, "--steps", steps, "--seed", seed, "--out", out
                said = run("train.py", *options)
                seconds = time.perf_counter() - began
                rate = steps * batch / seconds                  # start-up included
                loss = float(re.findall(r"loss ([\d.]+)", said)[-1])
                heun = "--sampler", "heun", "--steps", 10
                cells = [v for w in (1, 1.25, 3) for v in judge(out, w, *heun)[:3]]
                rows.append([seconds, loss, *cells, steps])
                print(f"  seed {seed}: " + " ".join(f"{v:.4g}" for v in rows[-1]), flush=True)
                steps = max(100, int(budget * rate / batch))
            m = [statistics.median(column) for column in zip(*rows)]
            curve.append(m)
            print(f"{m[0]:19.0f} {m[-1]:7.0f} {m[1]:7.4f}" + "".join(
                f" {m[i]:6.1f} {m[i + 1]:5.2f} {m[i + 2]:5.2f}" for i in (2, 5, 8)), flush=True)
    return curve


def plot(curve, file, size=(240, 480)):
    """A PNG of accuracy at w = 1, at w = 3 and of the loss, over log seconds of training."""
    H, W = size
    seconds = np.log([m[0] for m in curve])
    x = 40 + (seconds - seconds[0]) / max(seconds[-1] - seconds[0], 1e-9) * (W - 80)
    panels = []
    kinds = ("100 w=1", 2, 50, 100), ("100 w=3", 8, 50, 100), ("0.2", 1, 0.1, 0.2)
    for title, column, low, high in kinds:
        picture = np.zeros((H, W), np.uint8)
        picture[20:H - 20, 38:40] = picture[H - 22:H - 20, 38:W - 20] = 96
        y = (np.clip([m[column] for m in curve], low, high) - low) / (high - low)
        y = H - 22 - y * (H - 44)
        columns = np.arange(int(x[0]), int(x[-1]) + 1)
        rows = np.interp(columns, x, y).astype(int)
        picture[rows, columns] = picture[rows + 1, columns] = 255
        marks = [(f"{m[0]:.0f}", H - 15, int(c) - 10) for m, c in zip(curve, x)]
        for words, top, left in ((title, 5, 8), (f"{low:g}", H - 34, 4), *marks):
            dots = picture.text(words)
            picture[top:top + dots.shape[0], left:left + dots.shape[1]] |= dots[:, :W - left]
        panels.append(picture)
    write_whole(file, picture.png(np.hstack(panels)))


def against(file):
    """Our training step and another's in turn, on one batch: ratios of images/s."""
    spec = importlib.util.spec_from_file_location("other", file)
    other = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(other)
    ours, theirs = checkpoint.NETS["unet"]().to(DEVICE), other.make_net().to(DEVICE)
    optimizer = Optimizers(ours)
    their_optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-4)
    z, y = batch_of("unet", {}, 128)
    ratios = []
    for _ in range(5):
        a = median_time(lambda: our_step(ours, optimizer, z, y), 3)
        b = median_time(lambda: other.train_step(theirs, their_optimizer, z, y), 3)
        ratios.append(b / a)
        print(f"ours {128 / a:.0f} images/s, theirs {128 / b:.0f} images/s, ratio {b / a:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}")


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("part", nargs="*", help="rate, calls, time (default: all)")
    p.add_argument("--against", metavar="FILE.py")
    p.add_argument("--n", type=int, default=1000, help="samples a measurement")
    p.add_argument("--seconds", type=int, nargs="+", default=(30, 60, 120, 300), help="of training")
    p.add_argument("--seeds", type=int, default=3)
    a = p.parse_args()
    if a.against: return against(a.against)
    parts = a.part or ["rate", "calls", "time"]
    if "rate" in parts: rates()
    if "calls" in parts: calls(a.n)
    if "time" in parts:
        plot(time_to_quality(a.n, a.seconds, a.seeds), Path(__file__).with_name("speed.png"))


if __name__ == "__main__":
    main()
