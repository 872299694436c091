"""The tables of docs/guidance.md and docs/exercises.md: `python -m experiments.guidance PART ...`.

scales:   what w does by Algorithm 8, and in an interval of t: a table and figures/curves.svg
price:    guidance by Algorithm 8 and without its price, w = 3, three seeds; w = 1.5 and 8, one
others:   the same at w = 3 for the shipped DiT, and for the lecture's recipe if runs/unet.pt is one
when:     w = 3 in one part of the time, w = 1 in the others
between:  w between 0 and 1: how many samples lie between the classes
cas:      what a classifier learns from real digits and from samples, by their number
classify: the shipped U-Net as a classifier of real test digits
"""
import math
import statistics
import sys
from pathlib import Path

import torch

from chapters.classifier import likelihood_weight, measure_label_errors
from chapters.oracle import PATH
from experiments import plots
from experiments.measures import Measures, count_calls, draw, read_grey, show, show_head
from support import checkpoint, mnist
from support.command import HERE, Parser, execute, number, write_whole

UNET = "weights/unet.pt"
SEEDS = 0, 1, 2
INTERVAL = "--interval", 0.26, 0.78
WAYS = {                                        # name: sigma of the SDE, options of sample.py
    "guided ODE (Algorithm 8)": (None, ()),
    "SDE, sigma^2 = 2 beta": (None, ("--sampler", "em")),
    "SDE, sigma^2 = 8 beta": (lambda t: math.sqrt(8 * (1 - t)), ("--sampler", "em", "--steps", 50)),
    "predictor-corrector": (None, ("--sampler", "pc")),
    "interval [.26, .78]": (None, INTERVAL),
    "Gibbs-like": (None, ("--sampler", "gibbs")),
    "Gibbs-like, until .78": (None, ("--sampler", "gibbs", "--interval", 0, 0.78)),
}


def measure(measures, ckpt, w, n, way, seed=0):
    """The fast measures, CAS, black pixels, grey and calls of n samples by one of WAYS."""
    sigma, options = WAYS[way]
    return measure_options(measures, ckpt, w, n, *options, seed=seed, sigma=sigma)


def measure_options(measures, ckpt, w, n, *options, seed=0, sigma=None):
    """The same by options of sample.py."""
    images, labels = draw(ckpt, w, n, *options, "--seed", seed, sigma=sigma)
    row = measures(images, labels)
    row["CAS"] = measures.cas(images, labels, seed)
    row["black pixels"] = 100 * (images == 0).double().mean().item()
    row["grey"] = read_grey(images, labels)
    row["calls"] = count_calls(ckpt, w, *options, sigma=sigma)
    return row


def show_real(measures, n):
    """Print the names of the measures, and their values of real test digits; return these. CAS
    learns from training digits."""
    y = torch.arange(n) % 10
    images = measures.real_digits(y)
    row = measures(images, y)
    row["CAS"] = measures.cas(measures.training_digits(y), y)
    row["black pixels"] = 100 * (images == 0).double().mean().item()
    row["grey"] = read_grey(images, y)
    row["calls"] = 0
    print(" " * 44 + "".join(f"{key:>16s}" for key in row))
    show("real digits", row)
    return row


def show_rows(measures, ckpt, w, n, ways, seeds=(0,)):
    """Print a row for each way: the median over seeds, and where there are several, each."""
    for way in ways:
        rows = [measure(measures, ckpt, w, n, way, seed) for seed in seeds]
        for seed, row in zip(seeds, rows):
            show(f"w = {w:g}  {way}, seed {seed}", row)
        if len(seeds) > 1:
            show(f"w = {w:g}  {way}, median",
                 {key: statistics.median(row[key] for row in rows) for key in rows[0]})


def price(measures, n):
    show_real(measures, n)
    show_rows(measures, UNET, 1, n, ["guided ODE (Algorithm 8)"], SEEDS)
    for way, (sigma, options) in WAYS.items():
        show_rows(measures, UNET, 3, n, [way], SEEDS[:1] if "em" in options else SEEDS)
    for w in (1.5, 8):
        show_rows(measures, UNET, w, n, WAYS)


def others(measures, n):
    show_real(measures, n)
    ways = [way for way in WAYS if not way.startswith("SDE")]
    for ckpt in ("weights/dit.pt", "runs/unet.pt"):
        if Path(ckpt).exists() or ckpt.startswith("weights"):
            print(ckpt)
            show_rows(measures, ckpt, 1, n, ["guided ODE (Algorithm 8)"])
            show_rows(measures, ckpt, 3, n, ways)


def when(measures, n):
    """w = 3 for t in an interval, w = 1 elsewhere."""
    show_real(measures, n)
    for name, w, low, high in (("nowhere", 1, 0, 1), ("before .2", 3, 0, 0.199),
                               (".2 to .5", 3, 0.2, 0.499), (".5 to .8", 3, 0.5, 0.799),
                               ("after .8", 3, 0.8, 1), ("everywhere", 3, 0, 1)):
        show(name, measure_options(measures, UNET, w, n, "--interval", low, high))


def between(measures, n, scales=(0, 0.25, 0.5, 0.75, 1)):
    """% of samples of whose label the evaluator is less than 90 % sure."""
    y = torch.arange(n) % 10
    for w in (None, *scales):
        images = measures.real_digits(y) if w is None else draw(UNET, w, n)[0]
        row = measures(images, y)
        row["unsure"] = 100 * (measures.sureness(images) < 0.9).double().mean().item()
        if w is None:
            show_head(measures, row, y)
        show("real digits" if w is None else f"w = {w:g}", row)


def scales(measures, n, scales=(0, 0.5, 1, 1.5, 2, 3, 5, 8)):
    """Label accuracy, Frechet distance, diversity and CAS over w, of two ways to guide."""
    curves = {}
    for way in ("guided ODE (Algorithm 8)", "interval [.26, .78]"):
        ws = [w for w in scales if w >= 1 or way.startswith("guided")]
        curves[way] = ws, [measure(measures, UNET, w, n, way) for w in ws]
        for w, row in zip(*curves[way]):
            show(f"w = {w:g}  {way}", row)
    real = show_real(measures, n)
    panels = []
    for key in ("label accuracy", "Frechet", "diversity", "CAS"):
        legend = key == "diversity"             # where there is room
        marks = [plots.line([0, 8], [real[key]] * 2, "#999", "real digits" if legend else "")]
        values = [real[key]]
        for colour, (way, (ws, rows)) in zip(plots.COLOURS, curves.items()):
            heights = [row[key] for row in rows]
            marks.append(plots.line(ws, heights, colour, way if legend else ""))
            marks.append(plots.dots(ws, heights, colour))
            values += heights
        margin = (max(values) - min(values)) / 20
        panels.append(plots.axes(marks, (0, 8), (min(values) - margin, max(values) + margin), key,
                                 "w"))
    write_whole({HERE / "figures/curves.svg": plots.svg(panels).encode()})
    print("wrote figures/curves.svg")


def cas(measures, n, sizes=(2000, 10000)):
    """The classification accuracy score of real digits and of samples: median of three trainings.

    n is not used.
    """
    y = torch.arange(max(sizes)) % 10
    for w, options in ((None, ()), (1, ()), (3, ()), (3, INTERVAL)):
        images = measures.training_digits(y) if w is None else draw(UNET, w, len(y), *options)[0]
        for size in sizes:
            scores = [measures.cas(images[:size], y[:size], seed) for seed in SEEDS]
            name = "real digits" if w is None else f"w = {w} {' '.join(map(str, options))}"
            print(f"{size:6d} {name:32s} {statistics.median(scores):.1f} %  {scores}", flush=True)


@torch.no_grad()
def classify(measures, n, draws=(1, 4, 10, 20)):
    """% of real test digits that the U-Net labels correctly, by how t is drawn and weighted."""
    net, _ = checkpoint.load(UNET)
    z = mnist.to_unit(measures.x_test[:n])

    def uniform(low, high):
        return lambda: low + (high - low) * torch.rand(n)

    def uniform_logit(low, high):
        return lambda: (low + (high - low) * torch.rand(n)).sigmoid()

    ways = {                                    # name: how t is drawn, the weight of an error
        "logit(t) in (-3, 1.5), exact weight": (uniform_logit(-3, 1.5), lambda t: t**2),
        "logit(t) in (-3, 3), exact weight": (uniform_logit(-3, 3), lambda t: t**2),
        "t in (0.05, 0.95), exact weight": (uniform(0.05, 0.95),
                                            lambda t: likelihood_weight(PATH, t)),
        "t in (0.05, 0.95), weight 1": (uniform(0.05, 0.95), torch.ones_like),
    }
    for name, (draw_t, weight) in ways.items():
        torch.manual_seed(0)
        total = 0.0
        for k in range(max(draws)):
            t = draw_t()
            eps = torch.randn_like(z)
            errors = torch.cat([measure_label_errors(net, PATH, *parts) for parts in
                                zip(z.split(100), t.split(100), eps.split(100))])
            total = total + weight(t)[:, None] * errors
            if k + 1 in draws:
                right = (total.argmin(1) == measures.y_test[:n]).double().mean()
                print(f"{name:36s} {k + 1:3d} draws {100 * right:.1f} %", flush=True)


PARTS = {"scales": scales, "price": price, "others": others, "when": when, "between": between,
         "cas": cas, "classify": classify}


def main(argv=None):
    p = Parser(prog="python -m experiments.guidance", epilog=__doc__,
               description="The tables of docs/guidance.md.")
    p.add_argument("parts", nargs="+", choices=PARTS)
    p.add_argument("--n", type=number(int, 20, 1e4), default=2000, help="samples of a row (2000)")
    options = p.parse_args(argv)
    measures = Measures(asked=[torch.arange(options.n) % 10])
    for part in options.parts:
        PARTS[part](measures, options.n)


if __name__ == "__main__":
    sys.exit(execute(main))
