"""The pictures of the documents: `python -m experiments.pictures PART ...`, into figures/.

grid:       digits of the shipped U-Net at w = 1, 3, 5, a row a label, the last row without label
strip:      a row is one label and noise, a column one w
away:       threes of w = 3 and, from the same noise, threes away from 8
trajectory: x_t, the end that it implies, and where the label makes a difference, over t
moving:     noise becomes digits, w = 1 and w = 3
line:       where guidance carries the quantiles of the noise, exactly (oracle.py)
plane:      guided samples of three classes in the plane, exactly (oracle.py)
loss:       of the shipped U-Net's training, from weights/unet.csv
"""
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch

import sample
from cfg_min import NULL, guided_field, times
from chapters import oracle
from chapters.oracle import TRIANGLE, TWO
from experiments import plots
from experiments.measures import draw
from support import checkpoint, picture
from support.command import Parser, execute, write_whole
from support.mnist import to_bytes
from support.sampling import Noise

HERE = Path(__file__).parent.parent
UNET = "weights/unet.pt"


def write(name, data):
    write_whole(HERE / "figures" / name, data)
    print(f"wrote figures/{name}")


# ---------------------------------------------------------------- digits

def grid():
    sample.main(["--w", "1", "3", "5", "--ckpt", UNET, "--out", str(HERE / "figures/grid.png")])


def strip(scales=(0, 1, 1.5, 2, 3, 5, 8)):
    columns = [draw(UNET, w, 10)[0][:, 0] for w in scales]              # (10, 32, 32) each
    panels = [picture.panel(column[:, None].numpy(), f"{w:g}")
              for w, column in zip(scales, columns)]
    write("strip.png", picture.png(np.hstack(panels)))


def away():
    options = "--label", 3
    threes = draw(UNET, 3, 10, *options)[0][:, 0]
    from_8 = draw(UNET, 3, 10, *options, "--away-from", 8)[0][:, 0]
    write("away.png", picture.png(picture.panel(torch.stack([threes, from_8]).numpy(), "w = 3")))


@torch.no_grad()
def follow(w, y, steps):
    """x_t of Euler's method for the labels y (B,), at each of its times, 1 included: (t, x)."""
    net, _ = checkpoint.load(UNET)
    x = Noise(0, range(len(y)))()
    for t, s in times(steps):
        yield net, t, x
        x = x + (s - t) * guided_field(net, x, t, y, w)
    yield net, 1.0, x


@torch.no_grad()
def trajectory(w=3, steps=20):
    """Rows of four digits: x_t; E[z|x_t] of the guided field; |u_t(x|y) - u_t(x|null)|."""
    y = torch.tensor([2, 4, 5, 8])
    columns = []
    for net, t, x in follow(w, y, steps):
        if round(t * steps) % 2 or t == 1:
            continue
        guess = oracle.PATH.u_to_data(guided_field(net, x, t, y, w), x, t)
        difference = net(x, t, y) - net(x, t, torch.full_like(y, NULL))
        rows = [to_bytes(x), to_bytes(guess), to_bytes(2 * difference.abs() - 1)]
        columns.append(torch.stack(rows, dim=1)[:, :, 0])               # (4, 3, 32, 32)
    image = torch.stack(columns, dim=2).flatten(0, 1)                   # (12, 10, 32, 32)
    write("trajectory.png", picture.png(picture.panel(image.numpy(), f"w = {w:g}")))


def moving(steps=24):
    """Two panels of 20 digits, in 16 grey levels, so that noise takes less room."""
    y = torch.arange(20) % 10
    panels = []
    for w in (1, 3):
        frames = [to_bytes(x).view(2, 10, 32, 32) // 17 * 17 for _, _, x in follow(w, y, steps)]
        panels.append([picture.panel(frame.numpy(), f"w = {w:g}") for frame in frames[::2]])
    frames = [np.vstack(pair) for pair in zip(*panels)]
    seconds = [0.15] * (len(frames) - 1) + [2.5]
    write("moving.png", plots.animated_png(frames, seconds))


# ---------------------------------------------------------------- the oracle

def line(scales=(1, 3, 8), steps=50, n=15):
    """Paths of the noise's quantiles in the guided ODE; dots: the tilted distribution's."""
    share = (torch.arange(n) + 0.5) / n
    points = torch.linspace(-4, 8, 4001)[:, None]
    y = torch.ones(n, dtype=torch.int64)
    net = partial(TWO.u, oracle.PATH)
    panels = []
    for w in scales:
        x = torch.special.ndtri(share)[:, None]             # quantiles of N(0, 1)
        lines = [x[:, 0]]
        for t, s in times(steps):
            x = x + (s - t) * guided_field(net, x, t, y, w)
            lines.append(x[:, 0])
        ts = [k / steps for k in range(steps + 1)]
        marks = [plots.line(ts, xs.tolist()) for xs in torch.stack(lines, dim=1)]
        ends = torch.searchsorted(oracle.tilted(TWO, 1, w, points).cumsum(0), share.double())
        marks.append(plots.dots([1.04] * n, points[ends, 0].tolist()))
        panels.append(plots.axes(marks, (0, 1.08), (-3, 4), f"w = {w}", "t", "x"))
    write("oracle_line.svg", plots.svg(panels).encode())


def plane(w=3, n=400, steps=200):
    """Guided samples of the top class of TRIANGLE, and draws of the tilted distribution."""
    torch.manual_seed(0)
    ticks = torch.linspace(-3, 3, 200)
    points = torch.cartesian_prod(ticks, ticks)
    drawn = torch.multinomial(oracle.tilted(TRIANGLE, 0, w, points), n, replacement=True)
    clouds = {"data of the class": TRIANGLE.draw(n, y=0)}
    clouds |= oracle.guided_samples(TRIANGLE, 0, w, n, steps, dimensions=2)
    clouds["tilted distribution"] = points[drawn] + 6 / 200 * (torch.rand(n, 2) - 0.5)
    del clouds["guided SDE"]
    behind = plots.dots(*TRIANGLE.draw(2 * n).T.tolist(), colour="#ddd")
    panels = []
    for title, x in clouds.items():
        marks = [behind, plots.dots(*x.T.tolist())]
        panels.append(plots.axes(marks, (-2.75, 2.75), (-2.25, 2.75), title))
    write("oracle_plane.svg", plots.svg(panels).encode())


def loss(bin=50):
    """The mean loss of every so many steps."""
    _, values = np.loadtxt(HERE / "weights/unet.csv", delimiter=",", skiprows=1).T
    means = values[:len(values) // bin * bin].reshape(-1, bin).mean(axis=1)
    steps = bin * (np.arange(len(means)) + 0.5)
    panel = plots.axes([plots.line(steps, means)], (0, len(values)), (0, 0.4),
                       "shipped U-Net", "step", "loss")
    write("loss.svg", plots.svg([panel]).encode())


PARTS = {"grid": grid, "strip": strip, "away": away, "trajectory": trajectory, "moving": moving,
         "line": line, "plane": plane, "loss": loss}


def main(argv=None):
    p = Parser(description="Draw the pictures of the documents.", epilog=__doc__)
    p.add_argument("parts", nargs="+", choices=PARTS)
    for part in p.parse_args(argv).parts:
        PARTS[part]()


if __name__ == "__main__":
    sys.exit(execute(main))
