"""What surrounds sampling: options, the network and its judge, what is printed and written."""
import io
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cfg_min import NULL
from paths import PATHS
from support import checkpoint, mnist, picture
from support.checkpoint import LATENT_SHAPE, PIXELS_SHAPE
from support.command import (BadInput, Parser, add_device, file_name, many, number, seed,
                             try_place, write_whole)

# A sampler by its dotted name, and which of path, sigma, randn, t0, push, corrector it takes.
SAMPLERS = {
    "euler": ("cfg_min.euler", ["t0"]),
    "em": ("cfg_min.euler_maruyama", ["path", "sigma", "randn", "t0"]),
    "heun": ("chapters.samplers.heun", ["t0"]),
    "ddim": ("chapters.ddpm.ddim", ["path", "t0"]),
    "ddpm": ("chapters.ddpm.ancestral", ["path", "randn", "t0", "push"]),
    "pc": ("chapters.samplers.predictor_corrector", ["path", "randn", "t0", "corrector"]),
    "gibbs": ("chapters.samplers.gibbs", ["path", "randn", "t0", "corrector"]),
}


# ---------------------------------------------------------------- options

EXAMPLES = """
examples:
  python sample.py --w 1 3 5                            a picture of three scales, samples.png
  python sample.py --w 3 --label 7 --n 20               twenty sevens
  python sample.py --w 3 --interval 0.26 0.78           guidance without its price
  python sample.py --w 3 --n 5000 --out samples.npz     arrays of images and labels
"""


def label(string):
    """An argparse type: a label 0 ... 9, or null."""
    known = {str(y): y for y in range(NULL)} | {"null": NULL}
    if string not in known:
        raise ValueError
    return known[string]


label.__name__ = f"label (0 ... {NULL - 1}, or null)"       # for argparse's own message


def parse_options(argv=None):
    p = Parser(usage="%(prog)s --w W [W ...] [options]", epilog=EXAMPLES,
               description="Draw samples from a trained network.")
    add = p.add_argument
    add("--w", type=number(float, -1e3, 1e3), nargs="+", required=True,
        help="guidance scales; 1 is the conditional model, 0 the unconditional one (required)")
    add("--ckpt", type=file_name, metavar="FILE.pt",
        help="the network (runs/unet.pt where there is one, else weights/unet.pt)")
    add("--label", type=label, metavar="Y", help="0 ... 9 or null (0, 1, ..., 9 in turn)")
    add("--n", type=many, help="samples for each w (100, and 10 without a label)")
    add("--sampler", choices=SAMPLERS, default="euler",
        help="em: Euler-Maruyama; ddpm: ancestral; pc: predictor-corrector; gibbs: draw, noise "
             "half way, denoise with guidance (euler)")
    add("--steps", type=many, default=25, help="of the sampler (25)")
    add("--sigma", type=number(float, 0, 1e3), help="the noise of em, a constant (sqrt(2 beta_t))")
    add("--interval", type=number(float, 0, 1), nargs=2, default=(0.0, 1.0),
        metavar=("LOW", "HIGH"), help="the scale is w for t in [LOW, HIGH], else 1 (0 1)")
    add("--guidance", choices=("cfg", "classifier", "mean"), default="cfg",
        help="cfg: classifier-free; classifier: a noisy classifier's gradient is added to the "
             "field; mean: it is added to the mean of each step of ddpm (cfg)")
    add("--away-from", type=label, default=NULL, metavar="Y'",
        help="the label that guidance leads away from (null)")
    add("--seed", type=seed, default=0, help="of all that is random (0)")
    add("--out", type=file_name, default="samples.png", metavar="FILE.png|FILE.npz",
        help="where the samples go; a picture or samples there are replaced (samples.png)")
    add_device(p)
    options = p.parse_args(argv)
    check(options, p.error)
    options.device = checkpoint.pick_device(options.device)
    return options


def check(options, error):
    """Call error with one line where options do not go together."""
    if options.sigma is not None and options.sampler != "em":
        error("--sigma goes with --sampler em")
    if options.guidance == "mean" and options.sampler != "ddpm":
        error("--guidance mean goes with --sampler ddpm")
    if options.guidance != "cfg" and options.away_from != NULL:
        error(f"--guidance {options.guidance} takes no --away-from")
    if options.guidance != "cfg" and tuple(options.interval) != (0, 1):
        error(f"--guidance {options.guidance} takes no --interval")
    if options.interval[0] > options.interval[1]:
        error("--interval wants LOW, then HIGH")
    if options.sampler == "gibbs" and options.steps < 2:
        error("--sampler gibbs takes two --steps at least: one to draw, one to denoise")
    if options.away_from == options.label != NULL:
        error("--label and --away-from are the same: guidance would do nothing")
    if options.out[-4:] not in (".png", ".npz"):
        error("--out must end in .png or .npz")
    if options.out.endswith(".npz") and len(options.w) > 1:
        error("an .npz takes one --w")


def choose_labels(options):
    """The labels y (N,): all the same, or 0, 1, ..., 9 in turn. A whole picture ends with ten
    samples without a label."""
    n = options.n or 100
    if options.label is not None:
        y = torch.full((n,), options.label)
    else:
        y = torch.arange(n) % 10
    if options.label is None and options.n is None and options.out.endswith(".png"):
        y = torch.cat([y, torch.full((10,), NULL)])
    return y.to(options.device)


# ---------------------------------------------------------------- the networks

def load_model(options):
    """net(x, t, y) -> u, its config, and the autoencoder of a latent model, else None."""
    check_out(options.out)
    file = options.ckpt or "runs/unet.pt"
    if options.ckpt is None and not Path(file).is_file():
        file = "weights/unet.pt"
    net, config = checkpoint.load(file, options.device)
    if config["arch"] not in checkpoint.GENERATORS:
        raise BadInput(f"{file}: no generator, but a {config['arch']}")
    print(f"sampling from {file}: {config['arch']}, step {config['step']} of {config['steps']}")
    newest = max(Path("runs").glob("*.pt"), default=None, key=lambda run: run.stat().st_mtime)
    if options.ckpt is None and newest and newest != Path(file):
        print(f"the newest file of runs/ is another: --ckpt {newest} takes it")
    vae = checkpoint.load_autoencoder(file, options.device) if config["latent"] else None
    return net, config, vae


def find_way(options, config):
    """draw(net, y, w, steps, randn, low, high) of chapters/ways.py, or None for Algorithm 8."""
    if (options.sampler, options.guidance, options.away_from) == ("euler", "cfg", NULL):
        return None
    classifier = None
    if options.guidance != "cfg":
        if config["latent"]:
            raise BadInput("a latent model takes --guidance cfg only: the classifier sees pixels")
        classifier, _ = find_classifier(("runs", "weights"), options, config, config["path"])
        if classifier is None:
            raise BadInput("no classifier has seen the data and path of this model: train one with "
                           "python -m chapters.classifier, the same --data and --path")
    name, takes = SAMPLERS[options.sampler]
    return partial(checkpoint.find_by_name("chapters.ways.draw_samples"), takes=takes,
                   sampler=checkpoint.find_by_name(name), guidance=options.guidance,
                   away_from=options.away_from, path=PATHS[config["path"]], sigma=options.sigma,
                   classifier=classifier)


def find_classifier(folders, options, config, path=None):
    """A classifier that was trained on the model's data (and path), and its name; or two None."""
    for folder in folders:
        name = f"{folder}/classifier.pt"
        try:
            classifier, its = checkpoint.load(name, options.device)
        except BadInput:                        # not there, or damaged
            continue
        if its["step"] < its["steps"]:
            name += f" (step {its['step']} of {its['steps']})"
        if its["arch"] == "classifier" and its["data"] == config["data"] and path in (None,
                                                                                  its["path"]):
            return classifier, name
    return None, None


def find_judge(options, config):
    """The classifier that says the label accuracy, and its name: the shipped one, if it can."""
    judge = find_classifier(("weights", "runs"), options, config)
    if judge == (None, None):
        print("no label accuracy: no classifier has seen these data (python -m "
              "chapters.classifier trains one)")
    return judge


class Noise:
    """randn(like) -> at each call the next noise (B, *shape). The argument is not used.

    Each sample has its own stream: that of sample i is seeded with (seed, i).
    """

    def __init__(self, seed, ids, latent=False, device="cpu"):
        self.generators = [np.random.default_rng([seed, i]) for i in ids]
        self.shape = LATENT_SHAPE if latent else PIXELS_SHAPE
        self.device = device

    def __call__(self, like=None):
        noise = [g.standard_normal(self.shape, np.float32) for g in self.generators]
        return torch.from_numpy(np.stack(noise)).to(self.device)


# ---------------------------------------------------------------- what is said and shown

def say_what_is_odd(config, options, y):
    """Print a line for each field that samples of the labels y need, but training never showed."""
    guides = options.guidance != "cfg"          # the unconditional field, by a classifier
    asked = {*y.tolist(), options.away_from} - {NULL}
    lacking = asked - {*config.get("labels", asked)}
    needs_null = NULL in y or guides or (options.away_from == NULL and {*options.w} != {1})
    needs_labels = asked and not guides and any(options.w)
    if lacking:
        print(f"the data of this network have no label {', '.join(map(str, sorted(lacking)))}: "
              "its samples mean nothing")
    if config.get("eta") == 0 and needs_null:
        print("this network was trained with --eta 0, never without a label: only w = 1 is learned")
    if config.get("eta") == 1 and needs_labels:
        print("this network was trained with --eta 1, never with a label: only w = 0 is learned")
    if options.away_from in y.tolist() and options.away_from != NULL:
        print(f"samples of label {options.away_from} are not guided, since guidance leads away "
              "from their own label")


def to_images(x, vae):
    """Images (B, 32, 32) uint8 of samples x: pixels, or latents of vae. Raises BadInput."""
    if not x.isfinite().all():                  # one infinite value makes all later ones so
        raise BadInput("samples are not finite: --w may be too large, or the network is broken")
    if vae:
        x = vae.decode(x)
    return mnist.to_bytes(x)[:, 0]


def report(w, images, y, judge, real_diversity):
    """Print the share of samples that the judge labels as y, and their diversity."""
    classifier, name = judge
    labelled = y != NULL
    if classifier is None or not labelled.any():
        return
    images = images[labelled]
    y = y[labelled]
    share = mnist.accuracy(classifier, images[:, None], y)
    line = f"w = {w:g}: label accuracy {100 * share:.1f} % by {name}"
    diversity = mnist.diversity(images, y)
    if diversity > 0 and real_diversity > 0:    # nan where no class has two samples
        line += f", diversity {diversity / real_diversity:.2f} of that of real digits"
    print(line)


def arrange(images, y):
    """Images (N, 32, 32) as a grid (R, C, 32, 32): sample i stands in row i % 10.

    Samples without a label, if there are others, have a row of their own, the last.
    """
    without = y == NULL
    if without.any() and not without.all():
        grid = arrange(images[~without], y[~without])
        return torch.cat([grid, images[without][None]])
    R = min(10, len(images))
    missing = -len(images) % R
    images = torch.cat([images, images.new_zeros(missing, 32, 32)])
    return images.view(-1, R, 32, 32).transpose(0, 1)


def name_rows(y):
    """The label of each row of that grid."""
    rows = y[y != NULL][:10].tolist() + [NULL] * (NULL in y)
    return ["no label" if label == NULL else str(label) for label in rows]


def write(out, panels, images, y):
    """The figure of all panels, or an .npz of images (N, 32, 32) uint8 and labels (N,) int64."""
    if out.endswith(".png"):
        write_whole({out: picture.png(np.hstack(panels))})
        return
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images.cpu().numpy(), labels=y.cpu().numpy())
    write_whole({out: buffer.getvalue()})


def check_out(out):
    """Raise BadInput where --out cannot be written; a PNG is replaced, and an .npz of samples."""
    try_place(out)
    if not Path(out).exists():
        return
    if out.endswith(".png"):
        ours = Path(out).read_bytes()[:8] == picture.SIGNATURE
    else:
        ours = holds_samples(out)
    if not ours:
        raise BadInput(f"--out {out} holds neither a PNG nor samples: choose another name")


def holds_samples(file):
    """Whether an .npz holds images (N, 32, 32) uint8 and labels (N,) int64, and nothing else."""
    try:
        with np.load(file, allow_pickle=False) as npz:
            images, labels = npz["images"], npz["labels"]
            return (len(npz) == 2 and images.dtype == np.uint8 and labels.dtype == np.int64
                    and images.shape == (len(labels), 32, 32))
    except Exception:                           # numpy, zipfile, zlib: each raises its own
        return False
