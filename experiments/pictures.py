"""Pictures for the README: `python benchmarks/pictures.py strip|away|loss|curves`, into figures/.

strip:  digits of the shipped U-Net: a row is one label and noise, a column one w
away:   threes of w = 3 and, from the same noise, threes away from 8
loss:   of a training run, by what it printed: `python train.py --arch unet > LOG`, then `loss LOG`
curves: what w does to three measures of measures.py, 500 samples of the shipped U-Net each
"""
import argparse
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import picture                                                  # noqa: E402
from command import BadInput, run, write_whole                  # noqa: E402
from measures import Measures                                   # noqa: E402
from quality import sampled                                     # noqa: E402

WIDTH, HEIGHT = 240, 160                        # of a plot, from axis to axis, in pixels
LEFT, TOP, RIGHT, BELOW = 56, 8, 20, 24         # around it, for the numbers


def round_numbers(values):
    """At most ten round numbers in equal steps, from below the values to above."""
    low = min(values)
    high = max(values)
    steps = [digit * 10.0**k for k in range(-4, 6) for digit in (1, 2, 5)]
    step = min(step for step in steps if high - low <= 8 * step)
    return step * np.arange(np.floor(low / step), np.ceil(high / step) + 1)


def powers_of_2(values):
    """The same for an axis of logarithms."""
    low, high = np.log2([min(values), max(values)])
    return 2 ** np.arange(np.floor(low), np.ceil(high) + 1)


def places(values, ticks, size):
    """Where values stand on an axis of so many pixels that reaches from tick to tick."""
    share = (values - ticks[0]) / (ticks[-1] - ticks[0])
    return (share * (size - 1)).round().astype(int)


def write_text(image, string, top, left):
    dots = picture.text(string)
    image[top:top + dots.shape[0], left:left + dots.shape[1]] = dots


def line_plot(xs, ys, title, x_ticks, y_ticks, scale=np.asarray):
    """The line through (xs, ys) under its title, (H, W) uint8; scale=np.log2: a logarithmic y axis.
    """
    image = np.zeros((TOP + HEIGHT + BELOW, LEFT + WIDTH + RIGHT), np.uint8)
    bottom = TOP + HEIGHT - 1
    for tick, column in zip(x_ticks, LEFT + places(x_ticks, x_ticks, WIDTH)):
        image[TOP:bottom + 1, column] = 64
        write_text(image, f"{tick:g}", bottom + 9, column - 4 * len(f"{tick:g}") + 1)
    for tick, up in zip(y_ticks, places(scale(y_ticks), scale(y_ticks), HEIGHT)):
        image[bottom - up, LEFT:LEFT + WIDTH] = 64
        write_text(image, f"{tick:g}", bottom - up - 5, LEFT - 6 - 8 * len(f"{tick:g}"))
    columns = LEFT + places(xs, x_ticks, WIDTH)
    rows = bottom - places(scale(ys), scale(y_ticks), HEIGHT)
    for start, end in pairwise(zip(columns, rows)):
        for column, row in np.linspace(start, end, 2 * WIDTH).round().astype(int):
            image[row:row + 2, column:column + 2] = 255
    return picture.framed(image, title)


def strip(folder, scales=(0, 1, 1.5, 2, 3, 5, 8)):
    """All ten digits, a row each, and a column for each w; a row starts from one noise."""
    columns = [sampled(folder, "weights/unet.pt", w, 10)[0] for w in scales]
    grid = torch.cat(columns, dim=1).numpy()    # (10, columns, 32, 32)
    return picture.panel(grid, "w =", "".join(f"{w:<4g}" for w in scales).rstrip())


def away(folder):
    """Guidance away from none, above, and from the label 8, below."""
    rows = []
    for more in ((), ("--away-from", 8)):
        images, _, _ = sampled(folder, "weights/unet.pt", 3, 10, "--label", 3, *more)
        rows.append(images[:, 0])
    return picture.panel(torch.stack(rows).numpy())


def loss(log):
    """The loss, on an axis of logarithms, over the steps."""
    lines = re.findall(r"step (\d+)/\d+  loss (\S+)", Path(log).read_text())
    if len(lines) < 2:
        raise BadInput(f"{log}: not the lines of a run of train.py")
    steps, losses = np.array(lines, float).T
    x_ticks = np.linspace(0, steps[-1], 5)
    return line_plot(steps, losses, "loss over steps", x_ticks, powers_of_2(losses), np.log2)


def curves(folder, scales=(0, 0.5, 1, 1.5, 2, 3, 5, 8), n=500):
    """Three measures over w, side by side."""
    measures = Measures()
    rows = []
    for w in scales:
        images, labels, _ = sampled(folder, "weights/unet.pt", w, n)
        rows.append(measures(images, labels, apart=False))
    panels = []
    for name in ("read", "Frechet", "diversity"):
        values = np.array([row[name] for row in rows])
        title = f"{name.lower()} over w"
        panels.append(line_plot(scales, values, title, np.arange(9), round_numbers(values)))
    return np.hstack(panels)


SAMPLED = {"strip": strip, "away": away, "curves": curves}


def main():
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("part", choices=("loss", *SAMPLED))
    p.add_argument("log", nargs="?", default="LOG", help="of loss: what train.py printed")
    options = p.parse_args()
    if options.part == "loss":
        image = loss(options.log)
    else:
        with tempfile.TemporaryDirectory() as folder:
            draw = SAMPLED[options.part]
            image = draw(folder)
    write_whole(ROOT / f"figures/{options.part}.png", picture.png(image))


if __name__ == "__main__":
    sys.exit(run(main))
