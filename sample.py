"""From a checkpoint to a picture: `python sample.py --w 3`. Guided samples, figure, report, command line."""
import math
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train
from cfg_min import NULL, classifier_guided_field, ddim, euler, euler_maruyama, guided_field, heun
from paths import PATHS
from train import BadInput

SAMPLERS = {"euler": lambda a, field, x, t0, path, randn: euler(field, x, a.steps, t0),
            "heun": lambda a, field, x, t0, path, randn: heun(field, x, a.steps, t0),
            "em": lambda a, field, x, t0, path, randn: euler_maruyama(field, x, a.steps, path, a.sigma, t0, randn),
            "ddim": lambda a, field, x, t0, path, randn: ddim(field, x, a.steps, path, a.noise, t0, randn)}
CHUNK = 100     # samples computed at once

# 3 x 5 dots a character: five octal digits, a row each
FONT = {"0": 0o75557, "1": 0o26227, "2": 0o71747, "3": 0o71717, "4": 0o55711, "5": 0o74717, "6": 0o74757,
        "7": 0o71122, "8": 0o75757, "9": 0o75717, ".": 0o00002, "-": 0o00700, "+": 0o02720, "e": 0o07747,
        "=": 0o07070, "w": 0o55575, "t": 0o27222, " ": 0}


def text(string, size):
    """string in dots of size x size: (5 size, 4 size len(string)), 0 and 255."""
    dots = [[FONT[c] >> 3 * row & bit for c in string for bit in (4, 2, 1, 0)] for row in range(4, -1, -1)]
    return np.kron(np.array(dots) > 0, np.full((size, size), 255)).astype(np.uint8)


def write_png(file, grey):
    """grey (H, W) uint8 as a PNG: signature, and the chunks IHDR, IDAT, IEND; W3C PNG specification."""
    def chunk(kind, data): return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    size = struct.pack(">IIBBBBB", grey.shape[1], grey.shape[0], 8, 0, 0, 0, 0)     # 8 bits, grey
    rows = np.pad(grey, ((0, 0), (1, 0))).tobytes()     # before each row a 0: no filter
    file.write(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def panel(grid, title, columns=()):
    """Images (R, C, 32, 32) uint8 as one picture, under a title and, where given, a title a column."""
    R, C = grid.shape[:2]
    picture = np.zeros((32 * R + (36 if columns else 20), max(32 * C, 8 * len(title) + 8)), np.uint8)
    picture[-32 * R:, :32 * C] = grid.transpose(0, 2, 1, 3).reshape(32 * R, 32 * C)
    for string, y, x, size in [(title, 5, 4, 2), *((c, 24, 32 * i + 4, 1) for i, c in enumerate(columns))]:
        dots = text(string, size)
        picture[y:y + dots.shape[0], x:x + dots.shape[1]] = dots
    return np.pad(picture, 4, constant_values=96)       # a frame


def newest(fits, shipped):
    """The newest checkpoint in runs/ whose config fits, else the shipped one, else None."""
    runs = sorted(Path("runs").glob("*.pt"), key=lambda file: -file.stat().st_mtime)
    for file in (*runs, train.HERE / "weights" / shipped):
        try:
            if fits(train.read_checkpoint(file)["config"]): return file
        except BadInput: pass                           # a damaged file is in nobody's way


def generate(a, net, classifier, config, w, y, decode=lambda x: x):
    """Samples (N, 32, 32) uint8 of the labels y (N,), and with --trajectory x_t at 0, 0.1, ..., 1 of each.

    Sample i is made of random numbers of (seed, i) alone, whatever the number of samples and the chunk.
    """
    path, device, images, frames = PATHS[config["path"]], y.device, [], []
    if config["predict"] == "u": net_u = net
    else: net_u = lambda x, t, y: path.eps_to_u(net(x, t, y), x, t)
    # at alpha = 0 neither eps_to_u nor b_t is finite: start just after
    singular = config["predict"] == "eps" or a.guidance == "classifier"
    t0 = 0.01 if singular and path.alpha(torch.zeros(1)) == 0 else 0.0
    for ids in torch.arange(len(y)).split(CHUNK):
        generators, seen = [np.random.default_rng([a.seed, i]) for i in ids.tolist()], []

        def randn(x):
            noise = np.stack([g.standard_normal(x.shape[1:], np.float32) for g in generators])
            return torch.from_numpy(noise).to(device)

        def to_images(x):
            return ((decode(x) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)[:, 0]     # (B, 32, 32)

        def field(x, t):
            while a.trajectory and len(seen) < 10 and t >= len(seen) / 10 - 1e-6: seen.append(to_images(x))
            scale = w if a.interval[0] <= t <= a.interval[1] else 1.0
            if a.guidance == "cfg": return guided_field(net_u, x, t, y[ids], scale)
            return classifier_guided_field(net_u, classifier, path, x, t, y[ids], scale)

        x = randn(torch.empty(len(ids), *((4, 8, 8) if config["latent"] else (1, 32, 32))))
        x = SAMPLERS[a.sampler](a, field, x, t0, path, randn)
        if not x.isfinite().all(): raise BadInput("samples are not finite: a smaller --w or more --steps may help")
        images.append(to_images(x))
        if a.trajectory: frames.append(torch.stack((seen + images[-1:] * 11)[:11], dim=1))
    return torch.cat(images), torch.cat(frames) if frames else None


def accuracy(classifier, images, labels):
    """The share of images (N, 32, 32) uint8 that the noisy classifier, at t = 1, reads as their labels."""
    reads = [classifier(train.to_unit(x)[:, None], torch.ones(len(x), device=x.device)).argmax(1)
             for x in images.split(500)]
    return (torch.cat(reads) == labels).float().mean().item()


def parse(argv=None):
    p = train.Parser(description=__doc__)
    p.add_argument("--w", type=float, nargs="+", required=True, help="guidance scales; 1: none, 0: no label")
    p.add_argument("--ckpt", metavar="FILE.pt", help="newest of runs/, else weights/unet.pt")
    p.add_argument("--label", type=int, choices=range(10), help="0, 1, ..., 9, 0, ... in turn")
    p.add_argument("--n", type=int, help="samples a w (100, and 10 with the null label)")
    p.add_argument("--steps", type=int, default=50, help="50")
    p.add_argument("--sampler", choices=SAMPLERS, default="euler", help="em: Euler-Maruyama")
    p.add_argument("--sigma", type=float, help="em: constant sigma_t (sqrt(2 beta_t))")
    p.add_argument("--noise", type=float, help="ddim: from 0, DDIM, to 1, DDPM's ancestral sampler (0)")
    p.add_argument("--guidance", choices=("cfg", "classifier"), default="cfg")
    p.add_argument("--interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"),
                   help="of t with guidance, w = 1 outside; Kynkaanniemi et al. 2024 (0 1)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", default="samples.png", metavar="FILE.png|FILE.npz")
    p.add_argument("--trajectory", action="store_true", help="show x_t from noise to digit")
    p.add_argument("--device", help="cuda where there is one, else cpu")
    a = p.parse_args(argv)
    png = a.out.endswith(".png")
    for wrong, what in ((not all(map(math.isfinite, a.w)), "--w must be finite numbers"),
                        (a.n is not None and a.n < 1, "--n must be at least 1"),
                        (a.steps < 1, "--steps must be at least 1"), (a.seed < 0, "--seed must be at least 0"),
                        (a.noise is not None and a.sampler != "ddim", "--noise goes with --sampler ddim"),
                        (not 0 <= (a.noise or 0) <= 1, "--noise must lie in [0, 1]"),
                        (a.sigma is not None and a.sampler != "em", "--sigma goes with --sampler em"),
                        (not 0 <= (a.sigma or 0) < math.inf, "--sigma must be at least 0, and finite"),
                        (not 0 <= a.interval[0] <= a.interval[1] <= 1, "--interval: 0 <= LO <= HI <= 1"),
                        (not png and not a.out.endswith(".npz"), "--out must end in .png or .npz"),
                        (not png and (len(a.w) > 1 or a.trajectory), "an .npz takes one --w and no --trajectory")):
        if wrong: raise BadInput(what)
    a.noise = a.noise or 0.0
    return a


@torch.no_grad()
def main(argv=None):
    a = parse(argv)
    device, guided_by_classifier = train.pick_device(a.device), a.guidance == "classifier"
    file = a.ckpt or newest(lambda c: c["arch"] in ("unet", "dit"), "unet.pt")
    if file is None: raise BadInput("no checkpoint yet: python train.py --arch unet")
    net, config = train.load_checkpoint(file, device)
    if config["arch"] not in ("unet", "dit"): raise BadInput(f"{file}: a {config['arch']}; it makes no samples")
    if guided_by_classifier and config["latent"]:
        raise BadInput(f"{file}: a latent model, but the classifier reads pixels: --guidance cfg")
    judge_file = newest(lambda c: c["arch"] == "classifier" and c["data"] == config["data"]
                        and (c["path"] == config["path"] or not guided_by_classifier), "classifier.pt")
    if judge_file: judge, judge_config = train.load_checkpoint(judge_file, device)
    elif guided_by_classifier: raise BadInput(f"no classifier for the data and path of {file}: train.py --arch classifier")
    else: judge = None

    calls = 0

    def called(*inputs):                                # the net under autocast, its calls counted
        nonlocal calls
        calls += 1
        with train.autocast(device): return net(*inputs).float()

    decode = lambda x: x
    if latent := config["latent"]:
        vae, _ = train.load_vae(latent["file"], device, latent["fingerprint"])
        decode = lambda z: vae.decode(z / latent["scale"])
    n = a.n or (10 if a.trajectory else 100)
    y = torch.arange(n) % 10 if a.label is None else torch.full((n,), a.label)
    figure = a.n is None and a.label is None and a.out.endswith(".png")                 # with a row for NULL
    y_all = torch.cat([y, torch.full((n // 10 * figure,), NULL)]).to(device)
    began, panels = time.time(), []
    for w in a.w:
        images, frames = generate(a, called, judge, config, w, y_all, decode)
        if judge:
            spread = train.diversity(images[:n], y_all[:n]) / judge_config["real_diversity"]
            print(f"w = {w:g}: {100 * accuracy(judge, images[:n], y_all[:n]):.1f} % read as their label, "
                  f"diversity {spread:.2f} of real digits (by {judge_file})")
        if a.trajectory: grid, columns = frames, [f"t={k / 10:g}" for k in range(11)]
        else:
            rows, columns = min(n, 10), ()              # sample i in row i % 10: a row a digit
            grid = F.pad(images[:n], (0, 0, 0, 0, 0, -n % rows)).view(-1, rows, 32, 32).transpose(0, 1)
            if figure: grid = torch.cat([grid, images[None, n:]])
        panels.append(panel(grid.cpu().numpy(), f"w = {w:g}", columns))
    seconds = time.time() - began
    if a.out.endswith(".png"): train.write_whole(a.out, lambda f: write_png(f, np.concatenate(panels, axis=1)))
    else: train.write_whole(a.out, lambda f: np.savez_compressed(f, images=images.cpu().numpy(), labels=y.numpy()))
    print(f"wrote {a.out}: {len(a.w) * len(y_all)} samples of {file}, {a.steps} steps of {a.sampler}, "
          f"{calls} network calls, {seconds:.1f} s")


if __name__ == "__main__":
    sys.exit(train.command(main))
