"""A table of published rules of guidance (chapters/rules.py): `python -m experiments.guides`.

--exact N counts too what a rule leaves of N digits a label, on their exact fields.
"""
import sys
from functools import partial

import torch

from cfg_min import NULL, euler
from chapters.exact import choose_digits, effective_number
from chapters.rules import (apg, cfg, cfg_plus_plus, cfg_zero_star, interval, lam_of, rescale,
                            rising)
from experiments.exact import Grouped
from experiments.measures import Measures, show, show_head
from sample import CHUNK
from support import checkpoint, mnist
from support.checkpoint import GENERATORS, autocast
from support.command import BadInput, Parser, execute, number
from support.sampling import Noise


def draw_guided(field, y, steps):
    """Images (N, 1, 32, 32) uint8 of the labels y (N,), by Euler's method, from the same noise."""
    images = []
    for ids in torch.arange(len(y)).split(CHUNK):
        noise = Noise(0, ids.tolist())()
        with autocast(y.device):
            x = euler(partial(field, y=y[ids]), noise, steps)
        images.append(mnist.to_bytes(x))
    return torch.cat(images)


def rules_of(h):
    """{name: rule(cond, uncond, x, t, w)}. h is the step of Euler's method."""
    def cfg_plus_plus_of_mean(cond, uncond, x, t, w):
        return cfg_plus_plus(cond, uncond, x, t, lam_of(w, h), h)

    return {"CFG": cfg, "interval": interval, "rising scale": rising,
            "CFG++": cfg_plus_plus_of_mean, "rescale": rescale, "APG": apg,
            "CFG-Zero*": cfg_zero_star}


def field_of_rule(net, rule, x, t, y, w):
    """u of a rule: it makes one field of u_t(x|y) and u_t(x|null)."""
    return rule(net(x, t, y), net(x, t, torch.full_like(y, NULL)), x, t, w)


def count_left(images, labels, rule, w, steps, samples=200):
    """The effective number of images of a label that a rule leaves, on their exact fields."""
    torch.manual_seed(0)
    y = labels.unique().repeat_interleave(samples)
    x = torch.randn(len(y), images.shape[1])
    field = partial(field_of_rule, Grouped(images, labels), rule, y=y, w=w)
    return effective_number(images, euler(field, x, steps), y)[0]


def parse(argv=None):
    p = Parser(prog="python -m experiments.guides", description=__doc__.splitlines()[0])
    many = number(int, 1, 1e9)
    p.add_argument("--n", type=many, default=1000, help="samples of a measurement (1000)")
    p.add_argument("--steps", type=many, default=25, help="of Euler's method (25)")
    p.add_argument("--w", type=number(float, -1e3, 1e3), nargs="+", default=(1.5, 3.0, 8.0),
                   help="scales (1.5 3 8)")
    p.add_argument("--ckpt", default="weights/unet.pt", metavar="FILE.pt")
    p.add_argument("--exact", type=many, metavar="N",
                   help="count what is left of N digits of a label on their exact fields")
    return p.parse_args(argv)


def load_generator(file):
    """net(x, t, y) -> u of a checkpoint, of pixels and on CondOT. Raises BadInput."""
    net, config = checkpoint.load(file)
    if config["arch"] not in GENERATORS or config["path"] != "condot" or config["latent"]:
        raise BadInput(f"{file}: these rules are written for generators of pixels, --path condot")
    return net


@torch.no_grad()
def main(argv=None):
    options = parse(argv)
    net = load_generator(options.ckpt)
    y = torch.arange(options.n) % 10
    measures = Measures(asked=[y])
    print(f"{options.n} digits in {options.steps} steps of Euler's method")
    for w in options.w:
        for name, rule in rules_of(1 / options.steps).items():
            field = partial(field_of_rule, net, rule, w=w)
            images = draw_guided(field, y, options.steps)
            row = measures(images, y)
            if options.exact:
                exact = choose_digits(measures.x, measures.y, options.exact)
                row["exact, left"] = count_left(*exact, rule, w, options.steps)
            row["white pixels"] = 100 * (images == 255).double().mean().item()
            if name == "CFG" and w == options.w[0]:
                show_head(measures, row, y)
            show(f"w = {w:g}  {name}", row)
    lams = ", ".join(f"{lam_of(w, 1 / options.steps):.2f}" for w in options.w)
    print(f"w of CFG++ is its mean w(t): its own lambda is {lams}")


if __name__ == "__main__":
    sys.exit(execute(main))
