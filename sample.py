"""Samples: `python sample.py --w 3`. Options, the network, Algorithm 8 for each w, a picture."""
import io
import sys
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch

import checkpoint
import mnist
import picture
from cfg_min import NULL, euler, euler_maruyama, guided_field
from checkpoint import LATENT_SHAPE, PIXELS_SHAPE, autocast, pick_device
from classifier import classifier_gradient, classifier_guided_field
from command import BadInput, Parser, Progress, number, run, try_place, write_whole
from ddpm import ddim
from paths import PATHS
from samplers import heun, predictor_corrector

CHUNK = 100     # samples computed at once
SAMPLERS = "euler", "heun", "em", "ddim", "pc"


# ---------------------------------------------------------------- sampling

class Noise:
    """randn(like) -> at each call the next noise (B, *shape), on the device of like.

    Each sample has its own stream: that of sample i is seeded with (seed, i).
    """

    def __init__(self, seed, ids, shape):
        self.generators = [np.random.default_rng([seed, i]) for i in ids]
        self.shape = shape

    def __call__(self, like):
        noise = [g.standard_normal(self.shape, np.float32) for g in self.generators]
        return torch.from_numpy(np.stack(noise)).to(like.device)


def draw_samples(net, classifier, path, options, w, y, randn):
    """x at t = 1 for the labels y (B,): Algorithm 8, or what the options put in its place."""
    def field(x, t, w=w):
        if options.guidance == "classifier":
            return classifier_guided_field(net, classifier, path, x, t, y, w)
        if options.guidance == "mean":          # unconditional: push leads to y
            return guided_field(net, x, t, y, 0)
        return guided_field(net, x, t, y, w, options.away_from)

    def push(x, t):
        return w * classifier_gradient(classifier, x, t, y)

    noise = randn(y)
    t0 = 0.0
    if options.guidance == "classifier" and path.alpha(torch.zeros(1)) == 0:
        t0 = 0.01                               # b_t is infinite where alpha is 0
    if options.sampler == "euler":
        return euler(field, noise, options.steps, t0)
    if options.sampler == "heun":
        return heun(field, noise, options.steps, t0)
    if options.sampler == "em":
        return euler_maruyama(field, noise, options.steps, path, options.sigma, t0, randn)
    if options.sampler == "ddim":
        push = push if options.guidance == "mean" else None
        return ddim(field, noise, options.steps, path, options.noise or 0.0, push, t0, randn)
    conditional = partial(field, w=1.0)         # pc: predict u_t(x|y), correct towards w
    return predictor_corrector(conditional, noise, options.steps, path, corrector=field, t0=t0,
                               randn=randn)


def draw_images(net, vae, classifier, path, options, w, y):
    """Images (N, 32, 32) uint8 of the labels y (N,), a chunk at a time. Raises BadInput."""
    progress = Progress(len(y), unit="sample")
    images = []
    for ids in torch.arange(len(y)).split(CHUNK):
        randn = Noise(options.seed, ids.tolist(), LATENT_SHAPE if vae else PIXELS_SHAPE)
        with autocast(y.device):
            x = draw_samples(net, classifier, path, options, w, y[ids], randn)
        if not x.isfinite().all():
            raise BadInput("the samples are not finite: try a smaller --w")
        if vae:
            x = vae.decode(x)
        images.append(mnist.to_bytes(x)[:, 0])
        if progress.is_due():
            progress.show(ids[-1].item() + 1, f"w = {w:g}  ")
    progress.wipe()
    return torch.cat(images)


# ---------------------------------------------------------------- the networks

def load_model(options, device):
    """net(x, t, y) -> u, its config, and the autoencoder of a latent model, else None."""
    file = options.ckpt
    if file is None:
        file = "runs/unet.pt" if Path("runs/unet.pt").is_file() else "weights/unet.pt"
    net, config = checkpoint.load(file, device)
    if config["arch"] in ("vae", "classifier"):
        raise BadInput(f"{file}: no generator, but a {config['arch']}")
    print(f"sampling from {file}: {config['arch']}, step {config['step']} of {config['steps']}")
    vae = checkpoint.load_autoencoder(file, device) if config["latent"] else None
    return net, config, vae


def find_classifier(options, config, device):
    """A classifier trained on the model's data (and path, if it guides), and its file.

    None, None if none is found and none is needed. Raises BadInput.
    """
    guides = options.guidance != "cfg"
    if guides and config["latent"]:
        raise BadInput("a latent model takes --guidance cfg only: the classifier sees pixels")
    for file in ("runs/classifier.pt", "weights/classifier.pt"):
        try:
            classifier, its = checkpoint.load(file, device)
        except BadInput:                        # not there, or damaged
            continue
        fits = its["arch"] == "classifier" and its["data"] == config["data"]
        if fits and (its["path"] == config["path"] or not guides):
            return classifier, file
    if guides:
        raise BadInput("no classifier has seen the data and path of this model: train one with "
                       "classifier.py, the same --data and --path")
    print("no label accuracy: no classifier has seen these data (classifier.py trains one)")
    return None, None


# ---------------------------------------------------------------- what is said and shown

def report(w, images, y, classifier, file, real_diversity):
    """Print the share of samples that the classifier labels as y, and their diversity."""
    labelled = y != NULL
    if not labelled.any():
        return
    images = images[labelled]
    y = y[labelled]
    share = mnist.accuracy(classifier, images[:, None], y)
    line = f"w = {w:g}: label accuracy {100 * share:.1f} % by {file}"
    diversity = mnist.diversity(images, y)
    if diversity > 0 and real_diversity > 0:    # nan where no class has two samples
        line += f", diversity {diversity / real_diversity:.2f} of that of real digits"
    print(line)


def arrange(images, rows):
    """Images (N, 32, 32) as a grid (rows, columns, 32, 32): sample i stands in row i % rows."""
    missing = -len(images) % rows
    images = torch.cat([images, images.new_zeros(missing, 32, 32)])
    return images.view(-1, rows, 32, 32).transpose(0, 1)


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


def label(string):
    """An argparse type: a label 0 ... 9, or null."""
    return NULL if string == "null" else number(int, 0, 9)(string)


def parse(argv=None):
    p = Parser(usage=USAGE, epilog=EXAMPLES, description="Draw samples from a trained network.")
    add = p.add_argument
    many = number(int, 1, 1e9)
    add("--w", type=number(float, -1e3, 1e3), nargs="+", required=True,
        help="guidance scales; 1 is the conditional model, 0 the unconditional one")
    add("--ckpt", metavar="FILE.pt", help="(runs/unet.pt where there is one, else weights/unet.pt)")
    add("--label", type=label, metavar="Y", help="0 ... 9 or null (0, 1, ..., 9 in turn)")
    add("--n", type=many, help="samples for each w (100, and 10 of the null label)")
    add("--sampler", choices=SAMPLERS, default="euler",
        help="em: Euler-Maruyama; pc: predictor-corrector (euler)")
    add("--steps", type=many, default=25, help="of the sampler (25)")
    add("--sigma", type=number(float, 0, 1e3), help="of em: a constant (sqrt(2 beta_t))")
    add("--noise", type=number(float, 0, 1), help="of ddim: 1 is DDPM's ancestral sampler (0)")
    add("--guidance", choices=("cfg", "classifier", "mean"), default="cfg",
        help="by a noisy classifier: of the field, or of the mean of each step of ddim (cfg)")
    add("--away-from", type=label, default=NULL, metavar="Y'",
        help="the label that guidance leads away from (null)")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of all that is random (0)")
    add("--out", default="samples.png", metavar="FILE.png|FILE.npz", help="(samples.png)")
    add("--device", help="as torch names it: cpu, cuda, mps (cuda where there is one, else cpu)")
    options = p.parse_args(argv)
    check(options, p.error)
    return options


def check(options, error):
    """Call error with one line where options do not go together."""
    for name, sampler in (("noise", "ddim"), ("sigma", "em")):
        if getattr(options, name) is not None and options.sampler != sampler:
            error(f"--{name} goes with --sampler {sampler}")
    if options.guidance != "cfg" and options.away_from != NULL:
        error(f"--guidance {options.guidance} takes no --away-from")
    if options.away_from == options.label != NULL:
        error("--label and --away-from are the same: guidance would do nothing")
    if options.guidance == "mean" and not options.noise:
        error("--guidance mean goes with --sampler ddim --noise 1")
    if options.out[-4:] not in (".png", ".npz"):
        error("--out must end in .png or .npz")
    if options.out.endswith(".npz") and len(options.w) > 1:
        error("an .npz takes one --w")


def check_out(out):
    """Raise BadInput where --out cannot be written, or holds anything that this does not write."""
    try_place(out)
    if not Path(out).exists():
        return
    ours = Path(out).read_bytes()[:8] == picture.SIGNATURE
    if out.endswith(".npz"):
        try:
            with zipfile.ZipFile(out) as parts:
                ours = sorted(parts.namelist()) == ["images.npy", "labels.npy"]
        except zipfile.BadZipFile:
            ours = False
    if not ours:
        raise BadInput(f"--out {out} holds something else than samples: choose another name")


def choose_labels(options):
    """The labels y (N,) that the options ask for, and the rows of the figure."""
    rows = 10                                   # one a label
    if options.n is None and options.label is None and options.out.endswith(".png"):
        rows = 11                               # and one of samples without a label, NULL = 10
    n = options.n or 10 * rows
    y = torch.arange(n) % rows
    if options.label is not None:
        y = torch.full((n,), options.label)
    return y, min(rows, n)


@torch.no_grad()
def main(argv=None):
    options = parse(argv)
    began = time.monotonic()
    device = pick_device(options.device)
    check_out(options.out)
    net, config, vae = load_model(options, device)
    classifier, classifier_file = find_classifier(options, config, device)
    y, rows = choose_labels(options)
    y = y.to(device)
    panels = []
    for w in options.w:
        images = draw_images(net, vae, classifier, PATHS[config["path"]], options, w, y)
        if classifier:
            report(w, images, y, classifier, classifier_file, config["real_diversity"])
        panels.append(picture.panel(arrange(images, rows).cpu().numpy(), f"w = {w:g}"))
    write(options.out, panels, images, y)
    print(f"wrote {options.out}: {len(panels) * len(y)} samples, {options.steps} steps of "
          f"{options.sampler}, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    sys.exit(run(main))
