"""Quality tables of the README: `python benchmarks/quality.py calls|predict|time|weights`.

calls:   against network calls, for some samplers: the shipped U-Net at w = 1
predict: what a network should predict: u, eps or z, each after the default run
time:    after a minute of training from nothing and after the default run, medians of three seeds
weights: the shipped networks
The measures are those of measures.py. All samples and networks come from the two commands; samples
are made as sample.py does by default, except in calls and predict.
"""
import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from measures import Measures, read_samples, show, show_names

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import command                                                  # noqa: E402
from train import RECIPES                                       # noqa: E402

GUIDED = 500    # samples at w = 3
SOLVERS = {                     # name: options of sample.py
    "Euler": ("--sampler", "euler"),
    "Euler, last 0.975": ("--sampler", "euler", "--last", 0.975),
    "Heun, last 0.975": ("--sampler", "heun", "--last", 0.975),
    "ab, last 0.975": ("--sampler", "ab"),
    "em": ("--sampler", "em"),
}
BUDGETS = 8, 20, 40             # calls of the network
MINUTE = 340    # steps of training that take about a minute on two cores


def run(script, *options):
    """Run a command of the project; returns what it printed."""
    arguments = [sys.executable, ROOT / script, *map(str, options)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{script} {options}: {done.stderr}")
    return done.stdout


def sampled(folder, ckpt, w, n, *options):
    """images, labels and seconds of n samples."""
    out = Path(folder) / "samples.npz"
    began = time.perf_counter()
    run("sample.py", "--ckpt", ckpt, "--w", w, "--n", n, "--out", out, *options)
    seconds = time.perf_counter() - began
    images, labels = read_samples(out)
    return images, labels, seconds


def show_real(measures, labels, **slow):
    """The head of a table: the measures' names, and what they say of real digits."""
    row = measures(measures.real_digits(labels), labels, **slow)
    show_names(row)
    show(f"{len(labels)} real digits", row)


def calls(folder, measures, n):
    """Quality against network calls.

    A step of Heun is two calls, the last step one: of an even number of calls it leaves one out.
    """
    show_real(measures, torch.arange(n) % 10)
    for name, options in SOLVERS.items():
        for budget in BUDGETS:
            steps = (budget + 1) // 2 if "heun" in options else budget
            images, labels, seconds = sampled(folder, "weights/unet.pt", 1, n, "--steps", steps,
                                              *options)
            show(f"{name}, {budget} calls, {seconds:.0f} s", measures(images, labels))


def show_network(folder, measures, n, name, ckpt, *options):
    """A row at w = 1, by all measures; one at w = 3, not told apart: guided, they are to differ."""
    images, labels, _ = sampled(folder, ckpt, 1, n, *options)
    show(f"{name}, w = 1", measures(images, labels, shape=True))
    images, labels, _ = sampled(folder, ckpt, 3, GUIDED, *options)
    show(f"{name}, w = 3", measures(images, labels, apart=False))


def predict(folder, measures, n):
    """What a network should predict: u, eps or z, on CondOT, after the default run.

    Samples are made in 40 steps of Euler, as ab does not suit eps. The networks stay in
    runs/predict_*.pt, and are not trained again.
    """
    show_real(measures, torch.arange(n) % 10, shape=True)
    for kind in ("u", "eps", "z"):
        out = Path("runs") / f"predict_{kind}.pt"
        run("train.py", "--arch", "unet", "--predict", kind, "--out", out, "--resume")
        show_network(folder, measures, n, kind, out, "--sampler", "euler")


def weights(folder, measures, n):
    """The shipped networks."""
    show_real(measures, torch.arange(n) % 10, shape=True)
    for name in ("unet", "dit", "latent_dit"):
        show_network(folder, measures, n, name, ROOT / f"weights/{name}.pt")


def trained(out, steps, seed):
    """Seconds, start-up included, of a training run; its last printed loss."""
    began = time.perf_counter()
    said = run("train.py", "--arch", "unet", "--steps", steps, "--seed", seed, "--out", out)
    loss = float(re.findall(r"loss ([\d.]+)", said)[-1])
    return time.perf_counter() - began, loss


def time_to_quality(folder, measures, n, seeds=3):
    """After about a minute and after the default run: rows of each seed, and their medians.

    The networks stay in runs/time_*.pt.
    """
    show_real(measures, torch.arange(n) % 10)
    for steps in (MINUTE, RECIPES["unet"]["steps"]):
        rows = []
        for seed in range(seeds):
            out = Path("runs") / f"time_{steps}_{seed}.pt"
            seconds, loss = trained(out, steps, seed)
            images, labels, _ = sampled(folder, out, 1, n)
            row = measures(images, labels)
            guided, guided_labels, _ = sampled(folder, out, 3, GUIDED)
            row["w=3 read"] = measures(guided, guided_labels, apart=False)["read"]
            row["loss"] = loss
            row["seconds"] = seconds
            if not rows:
                show_names(row)
            show(f"seed {seed}, {steps} steps", row)
            rows.append(row)
        medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        show(f"median, {steps} steps", medians)


PARTS = {"calls": calls, "predict": predict, "time": time_to_quality, "weights": weights}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=PARTS)
    many = command.number(int, 1, 1e9)
    p.add_argument("--n", type=many, default=2000, help="samples a measurement (2000)")
    options = p.parse_args()
    measures = Measures()
    with tempfile.TemporaryDirectory() as folder:
        table = PARTS[options.part]
        table(folder, measures, options.n)


if __name__ == "__main__":
    sys.exit(command.run(main))
