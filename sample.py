"""Sampling: `python sample.py --w 3` draws digits for each w into a picture.

`draw_samples` is Lecture 4, Algorithm 8: draw X_0 from noise, follow the guided field. Where
options name another sampler or another guidance, chapters/ways.py takes its place.
"""
import sys
import time

import torch

from cfg_min import euler, guided_field
from support.checkpoint import autocast
from support.command import Progress, execute
from support.picture import panel
from support.sampling import (Noise, arrange, choose_labels, find_judge, find_way, load_model,
                              name_rows, parse_options, report, say_what_is_odd, to_images, write)

CHUNK = 100     # samples computed at once


def draw_samples(net, y, w, steps, randn, low=0.0, high=1.0):
    """Lecture 4, Algorithm 8: samples (B, ...) of the labels y (B,).

    Beyond the lecture: guidance may be kept to t in [low, high]; outside the scale is 1.
    """
    def field(x, t):
        inside = low - 1e-9 < t < high + 1e-9               # t is rounded
        return guided_field(net, x, t, y, w if inside else 1.0)

    return euler(field, randn(), steps)         # X_0 ~ p_init -> X_1


def draw_images(draw, net, vae, y, w, options):
    """Images (N, 32, 32) uint8 of the labels y (N,), a chunk at a time. Raises BadInput."""
    progress = Progress(len(y), unit="sample")
    images = []
    for ids in torch.arange(len(y)).split(CHUNK):
        randn = Noise(options.seed, ids.tolist(), vae is not None, y.device)    # a stream each
        with autocast(y.device):
            x = draw(net, y[ids], w, options.steps, randn, *options.interval)
        images.append(to_images(x, vae))
        if progress.is_due():
            progress.show(ids[-1].item() + 1, f"w = {w:g}  ")
    progress.wipe()
    return torch.cat(images)


@torch.no_grad()
def main(argv=None):
    options = parse_options(argv)
    began = time.monotonic()
    net, config, vae = load_model(options)
    draw = find_way(options, config) or draw_samples        # unless options name another way
    judge = find_judge(options, config)
    y = choose_labels(options)
    say_what_is_odd(config, options, y)
    panels = []
    for w in options.w:
        images = draw_images(draw, net, vae, y, w, options)
        report(w, images, y, judge, config["real_diversity"])
        names = () if panels else name_rows(y)  # at the first panel alone
        panels.append(panel(arrange(images, y).cpu().numpy(), f"w = {w:g}", names))
    write(options.out, panels, images, y)
    print(f"wrote {options.out}: {len(panels) * len(y)} samples, {options.steps} steps of "
          f"{options.sampler}, {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    sys.exit(execute(main))
