"""The pictures of the documents: `python -m experiments.pictures PART ...`, into figures/.

grid:       digits of the shipped U-Net at w = 1, 3, 5, a row a label, the last row without label
strip:      a row is one label and noise, a column one w
price:      ten of each label at w = 3, from the same noise: Algorithm 8, an interval; real digits
away:       fours and sevens of w = 3 and, from the same noise, away from 9 and from 1
trajectory: x_t, the end that it implies, and where the label makes a difference, over t
moving:     noise becomes digits, w = 1 and w = 3
liked:      of 1,000 exact digits, those that w = 8 draws most often and some that it never draws
plane:      guided samples of three classes in the plane, exactly (chapters/oracle.py)
arrows:     u_t(x|null), u_t(x|y) and the guided field at one point of the plane, exactly
aim:        where the guided field aims over t, and where samples are, exactly
loss:       of the shipped U-Net's training, from weights/unet.csv
"""
import sys
from functools import partial

import numpy as np
import torch

import sample
from cfg_min import NULL, euler, guide, guided_field, times
from chapters import oracle
from chapters.exact import find_nearest
from chapters.oracle import TRIANGLE, TWO
from chapters.samplers import predictor_corrector
from chapters.ways import interval_field
from experiments import plots
from experiments.exact import DECIDED, Digits
from experiments.measures import draw
from support import checkpoint, picture
from support.command import HERE, Parser, execute, write_whole
from support.mnist import load, to_bytes
from support.sampling import Noise

UNET = "weights/unet.pt"


def write(name, data):
    write_whole({HERE / "figures" / name: data})
    print(f"wrote figures/{name}")


# ---------------------------------------------------------------- digits

def grid():
    sample.main(["--w", "1", "3", "5", "--ckpt", UNET, "--out", str(HERE / "figures/grid.png")])


def strip(scales=(0, 1, 1.5, 2, 3, 5, 8)):
    columns = [draw(UNET, w, 10)[0][:, 0] for w in scales]              # (10, 32, 32) each
    panels = [picture.panel(column[:, None].numpy(), f"w={w:g}", "0123456789" if w == 0 else "")
              for w, column in zip(scales, columns)]
    write("strip.png", picture.png(np.hstack(panels)))


def price():
    _, _, test_digits, labels = load()
    real = torch.stack([test_digits[labels == label][:10, 0] for label in range(10)])
    columns = {
        "algorithm 8   w = 3": draw(UNET, 3, 100)[0],
        "interval .26 - .78   w = 3": draw(UNET, 3, 100, "--interval", 0.26, 0.78)[0],
        "real digits": real.transpose(0, 1),
    }
    panels = []
    for title, images in columns.items():
        grid = images.reshape(10, 10, 32, 32).transpose(0, 1)           # a row a label
        panels.append(picture.panel(grid.numpy(), title, "" if panels else "0123456789"))
    write("price.png", picture.png(np.hstack(panels)))


def away():
    panels = []
    for label, other in ((4, 9), (7, 1)):
        towards = draw(UNET, 3, 12, "--label", label)[0][:, 0]
        away = draw(UNET, 3, 12, "--label", label, "--away-from", other)[0][:, 0]
        names = [f"{label}", f"{label} away from {other}"]
        panels.append(picture.panel(torch.stack([towards, away]).numpy(), "w = 3", names))
    write("away.png", picture.png(np.vstack(panels)))


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
    """Four digits: rows x_t, E[z|x_t] of the guided field, |u_t(x|y) - u_t(x|null)|; columns t."""
    y = torch.tensor([2, 4, 5, 8])
    columns = []
    for net, t, x in follow(w, y, steps):
        if round(t * steps) % 2 or t == 1:
            continue
        guess = oracle.PATH.u_to_data(guided_field(net, x, t, y, w), x, t)
        difference = net(x, t, y) - net(x, t, torch.full_like(y, NULL))
        rows = [to_bytes(x), to_bytes(guess), to_bytes(2 * difference.abs() - 1)]
        images = torch.stack(rows, dim=1).flatten(0, 2)                 # (12, 32, 32)
        names = () if columns else ["x", "predicted z", "label counts"] * 4
        columns.append(picture.panel(images[:, None].numpy(), f"{t:.1f}" if t else "t = 0", names))
    write("trajectory.png", picture.png(np.hstack(columns)))


def moving(steps=24):
    """Two panels of 20 digits, in 16 grey levels, so that noise takes less room."""
    y = torch.arange(20) % 10
    panels = []
    for w in (1, 3):
        frames = [to_bytes(x).view(2, 10, 32, 32) // 17 * 17 for _, _, x in follow(w, y, steps)]
        panels.append([picture.panel(frame.numpy(), f"w = {w:g}") for frame in frames[::2]])
    *frames, last = [np.vstack(pair) for pair in zip(*panels)]
    seconds = [2.5] + [0.15] * len(frames)      # digits first, where a viewer shows one frame only
    write("moving.png", plots.animated_png([last, *frames], seconds))


# ---------------------------------------------------------------- exact fields

def count_draws(label, w, n):
    """The first 1,000 digits of a label, and how often each is among n exact draws (1000,)."""
    digits = Digits(1000, n, asked=[label])
    own = digits.labels == label
    z = torch.cat([euler(partial(interval_field, digits.net, y=y, w=w, high=DECIDED), x, 25)
                   for x, y in zip(digits.x.split(2000), digits.y.split(2000))])
    counts = find_nearest(digits.images[own], z).bincount(minlength=1000)
    x_train, y_train, _, _ = load()
    return x_train[y_train == label][:1000, 0], counts


@torch.no_grad()
def liked(labels=(2, 7), n=10000, columns=14):
    """Digits that Algorithm 8 draws most often at w = 8, and some that only w = 1 draws."""
    panels = []
    for label in labels:
        images, by_1 = count_draws(label, 1, n)
        _, by_8 = count_draws(label, 8, n)
        often = by_8.argsort(descending=True)[:2 * columns]
        never = ((by_8 == 0) & (by_1 > 0)).nonzero()[:, 0]
        share = 100 * by_8[often].sum() / n
        pair = []
        for title, places in (
                (f"{len(often)} of 1000 make {share:.0f} % of algorithm 8's draws, w = 8", often),
                (f"{len(never)} of 1000 it never drew, though w = 1 did: some",
                 never[:2 * columns])):
            grid = images[places].view(2, columns, 32, 32)
            pair.append(picture.panel(grid.numpy(), title))
        panels.append(np.hstack(pair))
    write("liked.png", picture.png(np.vstack(panels)))


# ---------------------------------------------------------------- the oracle

def plane(w=3, n=400, steps=200):
    """Guided samples of the top class of TRIANGLE, and draws of the tilted distribution."""
    torch.manual_seed(0)
    ticks = torch.linspace(-3, 3, 200)
    points = torch.cartesian_prod(ticks, ticks)
    drawn = torch.multinomial(oracle.tilted(TRIANGLE, 0, w, points), n, replacement=True)
    clouds = {"data of the class": TRIANGLE.draw(n, y=0)}
    ways = oracle.guided_samples(TRIANGLE, 0, w, n, steps, dimensions=2)
    for name in ("guided ODE", "predictor-corrector, 4 corrections", "repaired SDE"):
        clouds[name] = ways[name]
    clouds["tilted distribution"] = points[drawn] + 6 / 200 * (torch.rand(n, 2) - 0.5)
    behind = plots.dots(*TRIANGLE.draw(2 * n).T.tolist(), colour="#ddd")
    panels = []
    for title, x in clouds.items():
        marks = [behind, plots.dots(*x.T.tolist())]
        panels.append(plots.axes(marks, (-2.75, 2.75), (-2.25, 2.75), title))
    write("oracle_plane.svg", plots.svg(panels).encode())


def arrows(w=3, t=0.3, x=(0.9, 0.2)):
    """The three fields at one point, and the data at that t; each arrow is a third as long as u."""
    torch.manual_seed(0)
    cloud = oracle.PATH.sample(TRIANGLE.draw(600), torch.randn(600, 2), t)
    point = torch.tensor([x]).double()
    cond = TRIANGLE.u(oracle.PATH, point, t, torch.tensor([0]))
    uncond = TRIANGLE.u(oracle.PATH, point, t, torch.tensor([NULL]))
    fields = [("u(x | null)", uncond, "#444"), ("u(x | y)", cond, plots.COLOURS[0]),
              (f"guided, w = {w}", guide(cond, uncond, w), plots.COLOURS[1])]
    marks = [plots.dots(*cloud.T.tolist(), colour="#ddd"),
             plots.dots([], [], "#999", "all data at that t")]          # for the legend
    for name, u, colour in reversed(fields):
        marks.append(plots.arrow(x, (point + u / 3)[0].tolist(), colour, name))
    marks.append(plots.dots(*[[c] for c in x], colour="#000"))
    panel = plots.axes(marks, (-1.9, 1.9), (-1.2, 2.25), f"at one x, t = {t}; y is the top class")
    write("arrows.svg", plots.svg([panel]).encode())


def aim(w=3, n=10000, steps=200):
    """Means over alpha_t: of what the guided field aims at, and of the samples of three samplers.
    """
    ts = torch.linspace(0.01, 1, 100).tolist()
    net = partial(TWO.u, oracle.PATH)
    y = torch.ones(n, dtype=torch.int64)
    noise = torch.special.ndtri((torch.arange(n).double() + 0.5) / n)[:, None]      # quantiles
    guided = partial(guided_field, net, y=y, w=w)
    late = partial(oracle.guided_after, net, y=y, w=w, start=0.7)
    aims = [oracle.tilted_moments(TWO, 1, w, t)[0] / t for t in ts]
    marks = [plots.line([0, 1], [aims[-1]] * 2, "#aaa", "needed"),
             plots.line(ts, aims, "#444", "aim of the guided field")]
    conditional = partial(net, y=y)
    ways = {
        "guided ODE": lambda note: euler(note(guided), noise, steps),
        "predictor-corrector": lambda note: predictor_corrector(
            note(conditional), noise, steps, oracle.PATH, guided, corrections=4),
        "guided for t > 0.7 alone": lambda note: euler(note(late), noise, steps),
    }
    torch.manual_seed(0)
    for colour, (name, way) in zip(plots.COLOURS, ways.items()):
        times, means = [], []

        def note(field):
            def noted(x, t):
                if t >= 0.01:
                    times.append(t)
                    means.append((x.mean() / t).item())
                return field(x, t)
            return noted

        way(note)
        marks.append(plots.line(times, means, colour, name))
    panel = plots.axes(marks, (0, 1), (0, 4.2), "w = 3", "t", "mean of x, divided by alpha(t)")
    write("aim.svg", plots.svg([panel]).encode())


def loss(bin=50):
    """The mean loss of every so many steps."""
    _, values = np.loadtxt(HERE / "weights/unet.csv", delimiter=",", skiprows=1).T
    means = values[:len(values) // bin * bin].reshape(-1, bin).mean(axis=1)
    steps = bin * (np.arange(len(means)) + 0.5)
    panel = plots.axes([plots.line(steps / 1000, means)], (0, len(values) / 1000), (0, 0.4),
                       "training of the shipped U-Net", "thousand steps", "loss")
    write("loss.svg", plots.svg([panel]).encode())


PARTS = {"grid": grid, "strip": strip, "away": away, "trajectory": trajectory, "moving": moving,
         "liked": liked, "plane": plane, "loss": loss, "price": price, "arrows": arrows,
         "aim": aim}


def main(argv=None):
    p = Parser(prog="python -m experiments.pictures", epilog=__doc__,
               description="Draw the pictures of the documents.")
    p.add_argument("parts", nargs="+", choices=PARTS)
    for part in p.parse_args(argv).parts:
        PARTS[part]()


if __name__ == "__main__":
    sys.exit(execute(main))
