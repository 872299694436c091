"""The tables of docs/results.md: `python -m experiments.results PART ...`.

recipes:  the lecture's recipe and the better one after about five minutes, the better one after one
          minute as well: three seeds each. The networks stay in runs/
weights:  the shipped networks
steps:    the shipped U-Net with each sampler, over the calls of the network
predict:  what a network should predict, with t drawn in both ways
guidance: what w does: the shipped U-Net, as a table and as figures/curves.svg
cas:      what a classifier learns from real digits and from samples, by their number
classify: the shipped U-Net as a classifier of real test digits
"""
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from chapters.classifier import likelihood_weight, measure_label_errors
from experiments import plots
from experiments.measures import Measures, draw, show, show_head
from paths import CondOT
from support import checkpoint, mnist
from support.command import BadInput, Parser, execute, number, write_whole

HERE = Path(__file__).parent.parent
UNET = "weights/unet.pt"
BETTER = "--predict", "z", "--times", "logit-normal"
RECIPES = {                                     # name: options of train.py
    "lecture": (),
    "better": BETTER,
    "better, a minute": (*BETTER, "--steps", "380"),
}
SEEDS = 0, 1, 2
SAMPLERS = {                                    # name: calls a step, options of sample.py
    "Euler": (1, ("--sampler", "euler")),
    "Heun": (2, ("--sampler", "heun")),
    "Euler-Maruyama": (1, ("--sampler", "em")),
    "ancestral": (1, ("--sampler", "ddpm")),
}


def train(out, *options):
    """Seconds, start-up included, that train.py takes; 0 where out is finished already."""
    if Path(out).exists():
        return 0.0
    began = time.monotonic()
    command = [sys.executable, HERE / "train.py", "--arch", "unet", "--out", out, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise BadInput(f"train.py: {done.stderr}")
    return time.monotonic() - began


def measure(measures, ckpt, n, *options):
    """The measures of n samples at w = 1, and the label accuracy of n at w = 3."""
    row = measures(*draw(ckpt, 1, n, *options))
    row["accuracy, w = 3"] = measures(*draw(ckpt, 3, n, *options))["label accuracy"]
    return row


def recipes(measures, n):
    y = torch.arange(n) % 10
    for name, options in RECIPES.items():
        rows = []
        for seed in SEEDS:
            out = f"runs/{name.replace(', ', '_').replace(' ', '_')}_{seed}.pt"
            seconds = train(out, "--seed", seed, *options)
            row = measure(measures, out, n)
            row["seconds"] = seconds
            rows.append(row)
            if len(rows) == 1:
                show_head(measures, row, y)
            show(f"{name}, seed {seed}", row)
        show(f"{name}, median", {key: statistics.median(r[key] for r in rows) for key in rows[0]})


def weights(measures, n):
    for name in ("unet", "dit", "latent_dit"):
        began = time.monotonic()
        row = measure(measures, f"weights/{name}.pt", n)
        row["seconds"] = time.monotonic() - began           # of 2 n samples, measured and all
        if name == "unet":
            show_head(measures, row, torch.arange(n) % 10)
        show(name, row)


def steps(measures, n):
    """The Frechet distance over the number of calls, for each sampler."""
    for name, (cost, options) in SAMPLERS.items():
        for calls in (8, 16, 25, 50):
            row = measures(*draw(UNET, 1, n, *options, "--steps", calls // cost))
            if (name, calls) == ("Euler", 8):
                show_head(measures, row, torch.arange(n) % 10)
            show(f"{name}, {calls} calls", row)


def predict(measures, n):
    for k, kind in enumerate(("u", "z", "eps")):
        for times in ("uniform", "logit-normal"):
            out = f"runs/predict_{kind}_{times}.pt"
            train(out, "--predict", kind, "--times", times)
            row = measure(measures, out, n)
            if k == 0 and times == "uniform":
                show_head(measures, row, torch.arange(n) % 10)
            show(f"{kind}, {times}", row)


def guidance(measures, n, scales=(0, 0.5, 1, 1.5, 2, 3, 5, 8)):
    """Label accuracy, diversity, Frechet distance and CAS, each over w."""
    y = torch.arange(n) % 10
    real = measures.real_digits(y)
    ideal = measures(real, y)
    ideal["CAS"] = measures.cas(measures.training_digits(y), y)
    rows = []
    for w in scales:
        images, labels = draw(UNET, w, n)
        row = measures(images, labels)
        row["CAS"] = measures.cas(images, labels)
        rows.append(row)
        if len(rows) == 1:
            show_head(measures, row, y)
            show("real training digits", ideal)
        show(f"w = {w:g}", row)
    panels = []
    for key in ideal:
        values = np.array([row[key] for row in rows])
        low, high = values.min(), max(values.max(), ideal[key])
        margin = (high - low) / 20
        marks = [plots.line([0, 8], [ideal[key]] * 2, colour="#aaa"),
                 plots.line(scales, values), plots.dots(scales, values)]
        panels.append(plots.axes(marks, (0, 8), (low - margin, high + margin), key, "w"))
    write_whole(HERE / "figures/curves.svg", plots.svg(panels).encode())
    print("wrote figures/curves.svg")


def cas(measures, n, sizes=(2000, 5000, 10000)):
    """The classification accuracy score of real digits and of samples: median of three trainings.

    n is not used.
    """
    y = torch.arange(max(sizes)) % 10
    for w in (None, 1, 3):
        images = measures.training_digits(y) if w is None else draw(UNET, w, len(y))[0]
        for size in sizes:
            scores = [measures.cas(images[:size], y[:size], seed) for seed in SEEDS]
            name = "real digits" if w is None else f"samples, w = {w}"
            print(f"{size:6d} {name:16s} {statistics.median(scores):.1f} %", flush=True)


@torch.no_grad()
def classify(measures, n, draws=(1, 4, 10, 20), low=0.05, high=0.95):
    """% of real test digits that the U-Net labels correctly, for three weights of t."""
    net, _ = checkpoint.load(UNET)
    path = CondOT()
    z = mnist.to_unit(measures.x_test[:n])
    weights = {"t / (1 - t)": partial(likelihood_weight, path),
               "1": torch.ones_like, "(1 - t)^2": lambda t: (1 - t)**2}
    sums = dict.fromkeys(weights, 0.0)
    torch.manual_seed(0)
    for k in range(max(draws)):
        t = low + (high - low) * torch.rand(n)
        eps = torch.randn_like(z)
        errors = torch.cat([measure_label_errors(net, path, *parts) for parts in
                            zip(z.split(100), t.split(100), eps.split(100))])
        for name, weight in weights.items():
            sums[name] = sums[name] + weight(t)[:, None] * errors
        if k + 1 in draws:
            for name, total in sums.items():
                right = (total.argmin(1) == measures.y_test[:n]).double().mean()
                print(f"{k + 1:3d} draws, weight {name:20s} {100 * right:.1f} %", flush=True)


PARTS = {"recipes": recipes, "weights": weights, "steps": steps, "predict": predict,
         "guidance": guidance, "cas": cas, "classify": classify}


def main(argv=None):
    p = Parser(description="The tables of docs/results.md.", epilog=__doc__)
    p.add_argument("parts", nargs="+", choices=PARTS)
    p.add_argument("--n", type=number(int, 20, 8900), default=1000, help="samples of a row (1000)")
    options = p.parse_args(argv)
    measures = Measures()
    for part in options.parts:
        PARTS[part](measures, options.n)


if __name__ == "__main__":
    sys.exit(execute(main))
