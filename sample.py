"""From a checkpoint to a picture: `python sample.py --w 3`. Samples, report, figure, options."""
import io
import math
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import checkpoint
import mnist
import picture
from cfg_min import (NULL, adams_bashforth, classifier_gradient, classifier_guided_field, ddim,
                     euler, euler_maruyama, guided_field, heun, ignore, predictor_corrector, times)
from checkpoint import FIELDS, LATENT_SHAPE, PIXELS_SHAPE, autocast, pick_device
from command import BadInput, Parser, in_place, number, run, write_whole
from mnist import to_bytes
from paths import PATHS

CHUNK = 100     # samples computed at once
FRAMES = 11     # of a trajectory: t = 0, 0.1, ..., 1

SAMPLERS = {    # what each takes beside (field, x, steps, t0, last, watch)
    "ab": (adams_bashforth, ()),
    "euler": (euler, ()),
    "heun": (heun, ()),
    "em": (euler_maruyama, ("path", "randn", "sigma")),
    "ddim": (ddim, ("path", "randn", "noise", "push")),
    "pc": (predictor_corrector, ("path", "randn", "corrector", "corrections")),
}


# ---------------------------------------------------------------- sampling

def noise_of(seed, ids, shape):
    """randn(like) -> at each call the next noise (B, *shape), on the device of like.

    Each sample has its own stream: that of sample i is seeded with (seed, i).
    """
    generators = [np.random.default_rng([seed, i]) for i in ids]

    def randn(like):
        noise = [generator.standard_normal(shape, np.float32) for generator in generators]
        return torch.from_numpy(np.stack(noise)).to(like.device)
    return randn


def generate(simulate, y, shape, seed):
    """Samples, chunk by chunk: yields x at t = 1, (B, *shape), for the next B of the labels y (N,).

    simulate(x, y, randn) -> x, any sampler with its field. Sample i is made of random numbers
    of (seed, i) alone, whatever N and CHUNK.
    """
    for ids in torch.arange(len(y)).split(CHUNK):
        randn = noise_of(seed, ids.tolist(), shape)
        noise = randn(like=y)                   # on y's device
        yield simulate(noise, y[ids], randn)


class Trajectory:
    """x_t at the sampler's first step from t = 0, 0.1, ..., 0.9 on, and at the end."""

    def __init__(self, steps, t0, last=None):
        starts = [t for t, _ in times(steps, t0, last)]
        self.moments = []                                   # 1.0 where no step starts later
        for k in range(FRAMES - 1):
            later = [t for t in starts if t > k / (FRAMES - 1) - 1e-6]
            self.moments.append(min(later, default=1.0))
        self.seen = {t: [] for t in self.moments}           # lists of chunks of x

    def watch(self, t, x):
        if t in self.seen:                      # the same floats: both come from times
            self.seen[t].append(x)

    def frames(self, model, field, y, images):
        """Three rows of 11 images a sample, (3 N, 11, 32, 32): x_t; the guess of its end, the z
        that the guided field implies; where u_t(x|y) and u_t(x|null) differ, white from 1 on."""
        end = [images, images, torch.zeros_like(images)]
        columns = []
        for t in self.moments:
            if t == 1:
                columns.append(end)
                continue
            x = torch.cat(self.seen[t])
            guess = model.path.u_to_data(field(x, t, y), x, t)
            shows = label_shows(model, x, t, y)
            columns.append([model.to_images(x), model.to_images(guess), shows])
        columns.append(end)
        frames = torch.stack([torch.stack(column, dim=1) for column in columns], dim=2)
        return frames.flatten(0, 1)                         # (N, 3, 11, 32, 32) -> (3 N, ...)


def label_shows(model, x, t, y):
    """|u_t(x|y) - u_t(x|null)|, mean over channels, as images (N, 32, 32) uint8."""
    null = torch.full_like(y, NULL)
    difference = model.net(x, t, y) - model.net(x, t, null)
    size = F.interpolate(difference.abs().mean(dim=1, keepdim=True), (32, 32))
    return to_bytes(2 * size - 1)[:, 0]         # 0 is black, 1 white


# ---------------------------------------------------------------- what is sampled from

def newest(fits, shipped):
    """The newest checkpoint in runs/ whose config fits, else the shipped one, else None."""
    runs = sorted(Path("runs").glob("*.pt"), key=lambda file: -file.stat().st_mtime)
    for file in [*runs, checkpoint.HERE / "weights" / shipped]:
        try:
            _, config = checkpoint.load(file)
        except (BadInput, OSError):             # a damaged file is in nobody's way
            continue
        if fits(config):
            return os.path.relpath(file)
    return None


class Model:
    """A checkpoint to sample from: net(x, t, y) is u_t(x|y), not guided; to_images turns x at t = 1
    into pixels."""

    def __init__(self, file, device):
        self.file = file or newest(lambda config: config["arch"] in FIELDS, "unet.pt")
        self.file = self.file or "weights/unet.pt"          # for the error that follows
        self.field, self.config = checkpoint.load(self.file, device)
        if self.config["arch"] not in FIELDS:
            raise BadInput(f"{self.file}: no sampler, a {self.config['arch']}")
        self.path = PATHS[self.config["path"]]
        self.device = device
        self.calls = 0
        self.vae = None
        latent = self.config["latent"]
        if latent:
            self.vae, vae_config = checkpoint.load(latent["file"], device)
            if vae_config != latent["vae"]:
                raise BadInput(f"{latent['file']}: {self.file} has another VAE")

    def net(self, x, t, y):
        """u_t(x|y), in the device's fast precision; counts its calls."""
        self.calls += 1
        with autocast(self.device):
            return self.field(x, t, y).float()

    def shape(self):
        return LATENT_SHAPE if self.vae else PIXELS_SHAPE

    def to_images(self, x):
        """x (B, C, H, W) in the units of the network -> images (B, 32, 32) uint8."""
        if self.vae:
            x = self.vae.decode(x / self.config["latent"]["scale"])
        return to_bytes(x)[:, 0]


def find_judge(model, guides):
    """The newest noisy classifier that saw the model's data, and its file.

    One that guides must have seen the model's path as well. None, None where there is none and
    nothing to guide.
    """
    if guides and model.vae:
        raise BadInput(f"{model.file}: a latent model takes --guidance cfg only")

    def fits(config):
        if config["arch"] != "classifier" or config["checksum"] != model.config["checksum"]:
            return False
        return config["path"] == model.config["path"] or not guides

    file = newest(fits, "classifier.pt")
    if file:
        return checkpoint.load(file, model.device)[0], file
    if guides:
        raise BadInput(f"no classifier for the data and path of {model.file}: "
                       "train.py --arch classifier")
    return None, None


def scale_at(t, w, interval):
    """w for t in the interval [LO, HI], both ends included; outside it 1: samples of y, but no more
    decidedly so than data."""
    low, high = interval
    return w if low <= t <= high else 1.0


def make_field(model, judge, options, w):
    """The guided field (x, t, y) -> u of scale w; options: --guidance, --interval, --away-from."""
    def field(x, t, y):
        scale = scale_at(t, w, options.interval)
        if options.guidance == "classifier":
            return classifier_guided_field(model.net, judge, model.path, x, t, y, scale)
        if options.guidance == "mean":          # unconditional: the sampler's push leads to y
            scale = 0
        return guided_field(model.net, x, t, y, scale, options.away_from)
    return field


def make_push(judge, options, w):
    """push(x, t, y) = w grad log p_t(y|x) that --guidance mean asks for, else None."""
    if options.guidance != "mean":
        return None

    def push(x, t, y):
        return scale_at(t, w, options.interval) * classifier_gradient(judge, x, t, y)
    return push


def first_time(model, guidance):
    """t0: 0.01 where classifier guidance divides by alpha, and alpha is 0 at t = 0."""
    if guidance == "classifier" and model.path.alpha(torch.zeros(1)) == 0:
        return 0.01
    return 0.0


# ---------------------------------------------------------------- what is said and shown

class Progress:
    """On a terminal: the line that says how far the samples of w are; wiped in the end."""

    def __init__(self, w, steps, watch):
        self.w = w
        self.steps = steps                      # of all chunks
        self.also = watch                       # a trajectory's, or ignore
        self.terminal = os.isatty(1)
        self.done = 0
        self.began = time.time()

    def watch(self, t, x):
        self.also(t, x)
        if self.terminal and self.done > 0:
            left = (time.time() - self.began) / self.done * (self.steps - self.done)
            line = f"w = {self.w:g}: step {self.done}/{self.steps}  {left:.0f} s left"
            print(in_place(line), end="", flush=True)
        self.done += 1

    def wipe(self):
        if self.terminal:
            print(in_place(""), end="", flush=True)


def images_of(model, samples):
    """Chunks of x at t = 1, which generate makes one by one, as images (N, 32, 32) uint8.

    Raises BadInput.
    """
    images = []
    for x in samples:
        if not x.isfinite().all():
            raise BadInput("the samples are not finite: try a smaller --w")
        images.append(model.to_images(x))
    return torch.cat(images)


def report(w, images, y, judge, judge_file, real_diversity):
    """Say how many samples are read as their label, and how diverse they are in their classes."""
    labelled = y != NULL
    x = images[labelled][:, None]               # (M, 1, 32, 32)
    share = mnist.accuracy(judge, x, y[labelled])
    line = f"w = {w:g}: {100 * share:.1f} % read as their label by {judge_file}"
    spread = mnist.diversity(images[labelled], y[labelled]) / real_diversity
    if spread > 0:                              # nan where no class has two samples
        line += f", diversity {spread:.2f} of that of real digits"
    print(line)


def by_label(images, rows):
    """Images (N, 32, 32) as a grid (rows, columns, 32, 32): sample i stands in row i % rows."""
    missing = -len(images) % rows
    if missing:
        images = torch.cat([images, images.new_zeros(missing, 32, 32)])
    return images.view(-1, rows, 32, 32).transpose(0, 1)


def titled(w, grid, trajectory):
    """The panel of a grid of images under its w and, above a trajectory, its times."""
    titles = [f"w = {w:g}"]
    if trajectory:
        moments = [k / (FRAMES - 1) for k in range(FRAMES)]
        titles.append("".join(f"{t:<4g}" for t in moments).rstrip())
    return picture.panel(grid.cpu().numpy(), *titles)


def write(out, panels, images, y):
    """The figure of all panels, or an .npz of images (N, 32, 32) uint8 and labels (N,) int64."""
    if out.endswith(".png"):
        write_whole(out, picture.png(np.hstack(panels)))
        return
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images.cpu().numpy(), labels=y.cpu().numpy())
    write_whole(out, buffer.getvalue())


# ---------------------------------------------------------------- the command

USAGE = "%(prog)s --w W [W ...] [options]"
EXAMPLES = """
examples:
  python sample.py --w 1 3 5                            a picture of three scales, samples.png
  python sample.py --w 3 --label 7 --n 20               twenty sevens
  python sample.py --w 3 --n 5000 --out samples.npz     arrays of images and labels
"""


def parse(argv=None):
    p = Parser(usage=USAGE, epilog=EXAMPLES, description="Draw samples from a trained network.")
    add = p.add_argument
    many = number(int, 1, 1e9)
    share = number(float, 0, 1)
    add("--w", type=number(float, -1e3, 1e3), nargs="+", required=True,
        help="guidance scales; 1 is the conditional model, 0 the unconditional one")
    add("--ckpt", metavar="FILE.pt", help="newest of runs/, else weights/unet.pt")
    add("--label", type=int, choices=range(10), help="default: 0, 1, ..., 9 in turn")
    add("--n", type=many, help="samples for each w (100, and 10 of the null label)")
    add("--sampler", choices=SAMPLERS, help="ab: Adams-Bashforth; em: Euler-Maruyama; pc: "
        "predictor-corrector. Default: ab; euler with --trajectory or a network that predicts eps")
    add("--steps", type=many, help="of the sampler (ab 8, others 40)")
    add("--last", type=number(float, 0.1, 0.999), metavar="T",
        help="the last step starts here, steps shrink towards it (ab 0.975, others: equal steps)")
    add("--sigma", type=number(float, 0, 1e3), help="of em: constant (sqrt(2 beta_t))")
    add("--noise", type=share, help="of ddim: 0 is DDIM, 1 DDPM's ancestral sampler (0)")
    add("--corrections", type=many, help="of pc: Langevin steps after each step (1)")
    add("--guidance", choices=("cfg", "classifier", "mean"), default="cfg",
        help="by a noisy classifier: of the field, or of the mean of each step of ddim (cfg)")
    add("--away-from", type=int, choices=range(10), default=NULL, metavar="Y'",
        help="the label that guidance leads away from (null)")
    add("--interval", type=share, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"),
        help="t with guidance, w = 1 outside; Kynkaanniemi et al. 2024 (0 1)")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of all that is random (0)")
    add("--out", default="samples.png", metavar="FILE.png|FILE.npz", help="(samples.png)")
    add("--trajectory", action="store_true",
        help="show x_t from noise to digit, its guess of the digit, and where the label tells")
    add("--device", help="as torch names it: cpu, cuda, mps (cuda where there is one, else cpu)")
    options = p.parse_args(argv)
    check(options, p.error)
    return options


def check(options, error):
    """Call error with one line where options do not go together."""
    for name, sampler in (("noise", "ddim"), ("sigma", "em"), ("corrections", "pc")):
        if getattr(options, name) is not None and options.sampler != sampler:
            error(f"--{name} goes with --sampler {sampler}")
    if options.guidance != "cfg" and options.away_from != NULL:
        error(f"--guidance {options.guidance} takes no --away-from")
    if options.guidance == "mean" and not options.noise:
        error("--guidance mean goes with --sampler ddim --noise 1")
    if options.interval[0] > options.interval[1]:
        error("--interval LO HI needs LO <= HI")
    if options.out[-4:] not in (".png", ".npz"):
        error("--out must end in .png or .npz")
    if options.out.endswith(".npz") and (len(options.w) > 1 or options.trajectory):
        error(".npz takes one --w, and no --trajectory")


def choose_sampler(options, predict):
    """Fill in --sampler, --steps and --last where they are not given.

    After eight steps, the last from t = 0.975, ab gives samples nearer to real digits than Euler
    does (README.md). Not so where eps is predicted: errors are largest in the first steps, and ab
    carries them on.
    """
    if options.sampler is None:
        # a trajectory shows every tenth of t, so it wants many equal steps
        plain = options.trajectory or predict == "eps"
        options.sampler = "euler" if plain else "ab"
    steps, last = (8, 0.975) if options.sampler == "ab" else (40, None)
    if options.steps is None:
        options.steps = steps
    if options.last is None:
        options.last = last


def labels_of(options):
    """The labels y (N,) that the options ask for, and the rows of the figure."""
    rows = 10                                   # one a label
    if options.n is None and options.label is None and options.out.endswith(".png"):
        rows = 11                               # and one of samples without a label, NULL = 10
    columns = 1 if options.trajectory else 10
    n = options.n or rows * columns
    y = torch.arange(n) % rows
    if options.label is not None:
        y = torch.full((n,), options.label)
    return y, min(rows, n)


def make_simulate(model, judge, options, w, t0, watch):
    """simulate(x, y, randn) -> x at t = 1 of noise x, by --sampler and the options it takes."""
    sampler, takes = SAMPLERS[options.sampler]
    towards_w = make_field(model, judge, options, w)
    field = towards_w
    if options.sampler == "pc":                 # predicts with u_t(x|y), corrects towards w
        field = make_field(model, judge, options, 1.0)
    push = make_push(judge, options, w)

    def simulate(x, y, randn):
        given = dict(path=model.path, randn=randn, sigma=options.sigma, noise=options.noise,
                     corrections=options.corrections, corrector=partial(towards_w, y=y))
        if push is not None:
            given["push"] = partial(push, y=y)
        # None is not given: the sampler's own default stands
        given = {name: value for name, value in given.items()
                 if name in takes and value is not None}
        # all but the field by name: predictor_corrector has corrector before x
        return sampler(partial(field, y=y), x=x, steps=options.steps, t0=t0, last=options.last,
                       watch=watch, **given)
    return simulate


def drawn(model, judge, options, w, y, t0, trajectory):
    """Samples of the labels y (N,) at scale w, as images (N, 32, 32) uint8. Raises BadInput."""
    steps = math.ceil(len(y) / CHUNK) * options.steps
    progress = Progress(w, steps, trajectory.watch if trajectory else ignore)
    simulate = make_simulate(model, judge, options, w, t0, progress.watch)
    samples = generate(simulate, y, model.shape(), options.seed)    # lazy: images_of runs it
    try:
        return images_of(model, samples)
    finally:
        progress.wipe()


@torch.no_grad()
def main(argv=None):
    options = parse(argv)
    began = time.time()
    device = pick_device(options.device)
    model = Model(options.ckpt, device)
    choose_sampler(options, model.config["predict"])
    judge, judge_file = find_judge(model, guides=options.guidance != "cfg")
    y, rows = labels_of(options)
    y = y.to(device)
    t0 = first_time(model, options.guidance)
    panels = []
    for w in options.w:
        trajectory = Trajectory(options.steps, t0, options.last) if options.trajectory else None
        images = drawn(model, judge, options, w, y, t0, trajectory)
        if judge:
            report(w, images, y, judge, judge_file, model.config["real_diversity"])
        if trajectory:
            field = make_field(model, judge, options, w)
            grid = trajectory.frames(model, field, y, images)
        else:
            grid = by_label(images, rows)
        panels.append(titled(w, grid, trajectory))
    write(options.out, panels, images, y)
    print(f"wrote {options.out}: {len(options.w) * len(y)} samples of {model.file}, "
          f"{options.steps} steps of {options.sampler}, {model.calls} network calls, "
          f"{time.time() - began:.1f} s")


if __name__ == "__main__":
    sys.exit(run(main))
