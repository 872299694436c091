"""Sampling: `python sample.py --w 3` draws digits for each w into a picture.

`draw_samples` is Lecture 4, Algorithm 8: choose y, draw X_0 from noise, follow the guided field.
Options put another sampler, another guidance, or guidance for a part of the time in its place.
"""
import inspect
import sys
import time
from functools import partial

import torch

from cfg_min import NULL, euler, euler_maruyama, guided_field
from paths import PATHS
from support.checkpoint import autocast, find_by_name, pick_device
from support.command import Parser, Progress, execute, file_name, number
from support.mnist import to_bytes
from support.picture import panel
from support.sampling import (Noise, arrange, check_out, choose_labels, find_classifier, label,
                              load_model, report, say_what_is_untrained, write)

CHUNK = 100     # samples computed at once
OTHER_SAMPLERS = {                              # beyond the notes' Euler and Euler-Maruyama
    "heun": "chapters.samplers.heun",
    "ddim": "chapters.ddpm.ddim",
    "ddpm": "chapters.ddpm.ancestral",
    "pc": "chapters.samplers.predictor_corrector",
    "gibbs": "chapters.samplers.gibbs",
}


def draw_samples(net, y, w, options, path, randn, classifier=None):
    """x at t = 1 for the labels y (B,): Algorithm 8, or what the options put in its place."""
    low, high = options.interval
    t0 = 0.0
    push = None
    if options.guidance != "cfg":
        from chapters.classifier import classifier_gradient, classifier_guided_field
    if options.guidance == "classifier" and path.alpha(torch.zeros(1)) == 0:
        t0 = 0.01                               # b_t is infinite where alpha is 0
    if options.guidance == "mean":              # the field is unconditional, push leads to y
        push = lambda x, t: w * classifier_gradient(classifier, x, t, y)

    def field(x, t, w=w):
        if options.guidance == "classifier":
            return classifier_guided_field(net, classifier, path, x, t, y, w)
        if options.guidance == "mean":
            return guided_field(net, x, t, y, 0)
        scale = w if low <= t <= high else 1.0
        return guided_field(net, x, t, y, scale, options.away_from)

    noise = randn()                             # X_0 ~ p_init
    if options.sampler == "euler":
        return euler(field, noise, options.steps, t0)       # X_0 -> X_1
    if options.sampler == "em":
        return euler_maruyama(field, noise, options.steps, path, options.sigma, t0, randn)
    sampler = find_by_name(OTHER_SAMPLERS[options.sampler])
    takes = inspect.signature(sampler).parameters
    more = dict(path=path, t0=t0, push=push, randn=randn, corrector=field)
    if "corrector" in takes:                    # it draws with u_t(x|y), corrects with the guided
        field = partial(field, w=1.0)
    return sampler(field, noise, options.steps, **{k: more[k] for k in more if k in takes})


def draw_images(net, vae, classifier, path, options, w, y):
    """Images (N, 32, 32) uint8 of the labels y (N,), a chunk at a time. Raises BadInput."""
    progress = Progress(len(y), unit="sample")
    images = []
    for ids in torch.arange(len(y)).split(CHUNK):
        randn = Noise(options.seed, ids.tolist(), vae is not None, y.device)
        with autocast(y.device):
            x = draw_samples(net, y[ids], w, options, path, randn, classifier)
        images.append(to_bytes(vae.decode(x) if vae else x)[:, 0])
        if progress.is_due():
            progress.show(ids[-1].item() + 1, f"w = {w:g}  ")
    progress.wipe()
    return torch.cat(images)


# ---------------------------------------------------------------- the command

EXAMPLES = """
examples:
  python sample.py --w 1 3 5                            a picture of three scales, samples.png
  python sample.py --w 3 --label 7 --n 20               twenty sevens
  python sample.py --w 3 --interval 0.26 0.78           guidance without its price
  python sample.py --w 3 --n 5000 --out samples.npz     arrays of images and labels
"""


def parse(argv=None):
    p = Parser(usage="%(prog)s --w W [W ...] [options]", epilog=EXAMPLES,
               description="Draw samples from a trained network.")
    add = p.add_argument
    many = number(int, 1, 1e9)
    add("--w", type=number(float, -1e3, 1e3), nargs="+", required=True,
        help="guidance scales; 1 is the conditional model, 0 the unconditional one (required)")
    add("--ckpt", type=file_name, metavar="FILE.pt",
        help="the network (runs/unet.pt where there is one, else weights/unet.pt)")
    add("--label", type=label, metavar="Y", help="0 ... 9 or null (0, 1, ..., 9 in turn)")
    add("--n", type=many, help="samples for each w (100, and 10 without a label)")
    add("--sampler", choices=("euler", "em", *OTHER_SAMPLERS), default="euler",
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
    add("--seed", type=number(int, 0, 2**32), default=0, help="of all that is random (0)")
    add("--out", type=file_name, default="samples.png", metavar="FILE.png|FILE.npz",
        help="where the samples go (samples.png)")
    add("--device", help="as torch names it: cpu, cuda, mps (cuda where there is one, else cpu)")
    options = p.parse_args(argv)
    check(options, p.error)
    return options


def check(options, error):
    """Call error with one line where options do not go together."""
    if options.sigma is not None and options.sampler != "em":
        error("--sigma goes with --sampler em")
    if (options.guidance == "mean") and options.sampler != "ddpm":
        error("--guidance mean goes with --sampler ddpm")
    if options.guidance != "cfg" and options.away_from != NULL:
        error(f"--guidance {options.guidance} takes no --away-from")
    if options.guidance != "cfg" and tuple(options.interval) != (0, 1):
        error(f"--guidance {options.guidance} takes no --interval")
    if options.interval[0] > options.interval[1]:
        error("--interval wants LOW, then HIGH")
    if options.away_from == options.label != NULL:
        error("--label and --away-from are the same: guidance would do nothing")
    if options.out[-4:] not in (".png", ".npz"):
        error("--out must end in .png or .npz")
    if options.out.endswith(".npz") and len(options.w) > 1:
        error("an .npz takes one --w")


@torch.no_grad()
def main(argv=None):
    options = parse(argv)
    began = time.monotonic()
    device = pick_device(options.device)
    check_out(options.out)
    net, config, vae = load_model(options.ckpt, device)
    classifier, file = find_classifier(options.guidance != "cfg", config, device)
    y = choose_labels(options.label, options.n, options.out.endswith(".png")).to(device)
    say_what_is_untrained(config, options, y)
    panels = []
    for w in options.w:
        images = draw_images(net, vae, classifier, PATHS[config["path"]], options, w, y)
        report(w, images, y, classifier, file, config["real_diversity"])
        panels.append(panel(arrange(images, y).cpu().numpy(), f"w = {w:g}"))
    write(options.out, panels, images, y)
    print(f"wrote {options.out}: {len(panels) * len(y)} samples, {options.steps} steps of "
          f"{options.sampler}, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    sys.exit(execute(main))
