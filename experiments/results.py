"""The tables of docs/results.md: `python -m experiments.results PART ...`.

recipes:  the lecture's recipe, in two sizes of batch; the better one: three seeds each. The
          networks stay in runs/
weights:  the shipped networks
steps:    the shipped U-Net with each sampler, over the calls of the network
predict:  what a network should predict, with t drawn in both ways
"""
import statistics
import subprocess
import sys
import time

import torch

from experiments.measures import Measures, draw, show, show_head
from support.command import HERE, BadInput, Parser, execute, number

UNET = "weights/unet.pt"
BATCH = "--batch", "128"
BETTER = "--predict", "z", "--times", "logit-normal", *BATCH
RECIPES = {                                     # name: options of train.py
    "lecture": (),
    "lecture, 128": ("--steps", "1200", *BATCH),
    "better": (*BETTER, "--steps", "2000"),
}
SEEDS = 0, 1, 2
SAMPLERS = {                                    # name: calls a step, options of sample.py
    "Euler": (1, ("--sampler", "euler")),
    "Heun": (2, ("--sampler", "heun")),
    "Euler-Maruyama": (1, ("--sampler", "em")),
    "ancestral": (1, ("--sampler", "ddpm")),
}


def train(out, *options):
    """Seconds, start-up included, that train.py takes; it goes on with what is there, if anything.
    """
    began = time.monotonic()
    command = [sys.executable, HERE / "train.py", "--arch", "unet", "--resume", "--out", out,
               *options]
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
    """The Frechet distance and the share of black pixels over the number of calls."""
    for name, (cost, options) in SAMPLERS.items():
        for calls in (8, 16, 25, 50, 100, 200):
            images, labels = draw(UNET, 1, n, *options, "--steps", calls // cost)
            row = measures(images, labels)
            row["black pixels"] = 100 * (images == 0).double().mean().item()
            if (name, calls) == ("Euler", 8):
                show_head(measures, row, labels)
            show(f"{name}, {calls} calls", row)


def predict(measures, n):
    for k, kind in enumerate(("u", "z", "eps")):
        for times in ("uniform", "logit-normal"):
            out = f"runs/predict_{kind}_{times}.pt"
            train(out, "--predict", kind, "--times", times, "--steps", 2000, *BATCH)
            row = measure(measures, out, n)
            if k == 0 and times == "uniform":
                show_head(measures, row, torch.arange(n) % 10)
            show(f"{kind}, {times}", row)


PARTS = {"recipes": recipes, "weights": weights, "steps": steps, "predict": predict}


def main(argv=None):
    p = Parser(prog="python -m experiments.results", epilog=__doc__,
               description="The tables of docs/results.md.")
    p.add_argument("parts", nargs="+", choices=PARTS)
    p.add_argument("--n", type=number(int, 20, 1e4), default=2000, help="samples of a row (2000)")
    options = p.parse_args(argv)
    measures = Measures(asked=[torch.arange(options.n) % 10])
    for part in options.parts:
        PARTS[part](measures, options.n)


if __name__ == "__main__":
    sys.exit(execute(main))
