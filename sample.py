"""From a checkpoint to a picture: `python sample.py --w 3`. Samples, figure, report, options."""
import argparse, inspect, io, os, struct, sys, time, zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train
from cfg_min import NULL, SAMPLERS, classifier_guided_field, guided_field
from cfg_min import ddim, euler, euler_maruyama, heun       # noqa: F401, as sample.euler, ...
from paths import PATHS
from train import BadInput, number

CHUNK = 100     # samples computed at once
FONT = dict(zip("0123456789.-+e=wt ", (        # 3 x 5 dots: an octal digit a row
    0o75557, 0o26227, 0o71747, 0o71717, 0o55711, 0o74717, 0o74757, 0o71122, 0o75757, 0o75717,
    0o00002, 0o00700, 0o02720, 0o07747, 0o07070, 0o05577, 0o27222, 0)))

def text(string):
    """string in white dots of 2 x 2 pixels: (10, 8 len(string)) uint8."""
    dots = [[FONT[c] >> 3 * k & bit for c in string for bit in (4, 2, 1, 0)] for k in range(5)]
    return np.kron(np.array(dots[::-1]) > 0, np.full((2, 2), 255)).astype(np.uint8)

def png(grey):
    """(H, W) uint8 as an 8-bit grey PNG: signature, header, zipped rows, end; W3C, PNG."""
    header = struct.pack(">IIBBBBB", *grey.shape[::-1], 8, 0, 0, 0, 0)
    rows = np.pad(grey, ((0, 0), (1, 0))).tobytes()     # a 0 before each row: not filtered
    out = b"\x89PNG\r\n\x1a\n"
    for chunk in (b"IHDR" + header, b"IDAT" + zlib.compress(rows), b"IEND"):
        out += struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return out

def panel(grid, *titles):
    """Images (R, C, 32, 32) uint8 under titles, in a frame; an image is as wide as 4 characters."""
    R, C = grid.shape[:2]
    head, width = 16 * len(titles), max(32 * C, 8 * len(titles[0]))
    picture = np.zeros((head + 32 * R, width), np.uint8)
    picture[head:, :32 * C] = grid.transpose(0, 2, 1, 3).reshape(32 * R, 32 * C)
    for k, words in enumerate(titles):
        picture[16 * k + 3:16 * k + 13, :8 * len(words)] = text(words)
    return np.pad(picture, 4, constant_values=96)

def newest(fits, shipped):
    """The newest checkpoint in runs/ whose config fits, else the shipped one, else None."""
    runs = sorted(Path("runs").glob("*.pt"), key=lambda file: -file.stat().st_mtime)
    for file in (*runs, train.HERE / "weights" / shipped):
        try:
            if fits(train.load_checkpoint(file)[1]): return os.path.relpath(file)
        except (BadInput, OSError): pass        # a damaged file is in nobody's way

def generate(a, net, judge, config, w, y, decode):
    """Samples (N, 32, 32) uint8 for the labels y (N,); with --trajectory also x_t, (N, 11, 32, 32).
    Sample i is made of random numbers of (seed, i) alone: N and CHUNK do not change it."""
    path, images, frames = PATHS[config["path"]], [], []
    limit, shape = (4.0, (4, 8, 8)) if config["latent"] else (1.0, (1, 32, 32))    # of z

    def net_u(x, t, y):
        if config["predict"] == "u": return net(x, t, y)
        u = path.eps_to_u(net(x, t, y), x, t)           # errors in eps, over a small alpha:
        z = path.u_to_data(u, x, t).clamp(-limit, limit)    # so z is clipped, as Ho et al. 2020 do
        alpha, beta, _, _ = path.at(t, x)
        return path.target(z, (x - alpha * z) / beta, t)

    singular = config["predict"] == "eps" or a.guidance == "classifier"     # they divide by alpha
    t0 = 0.01 if singular and path.alpha(torch.zeros(1)) == 0 else 0.0
    for ids in torch.arange(len(y)).split(CHUNK):
        generators, seen = [np.random.default_rng([a.seed, i]) for i in ids.tolist()], []

        def randn(x):
            noise = [g.standard_normal(x.shape[1:], np.float32) for g in generators]
            return torch.from_numpy(np.stack(noise)).to(y.device)

        def to_images(x): return ((decode(x) + 1) * 127.5).round().clamp(0, 255).byte()[:, 0]

        def field(x, t):
            while a.trajectory and len(seen) < 10 and t > len(seen) / 10 - 1e-6:
                seen.append(to_images(x))
            scale = w if a.interval[0] <= t <= a.interval[1] else 1.0
            if a.guidance == "cfg": return guided_field(net_u, x, t, y[ids], scale)
            return classifier_guided_field(net_u, judge, path, x, t, y[ids], scale)

        known = dict(t0=t0, path=path, randn=randn, sigma=a.sigma, noise=a.noise)
        options = {k: known[k] for k in a.takes if known.get(k) is not None}
        x = SAMPLERS[a.sampler](field, randn(torch.empty(len(ids), *shape)), a.steps, **options)
        if not x.isfinite().all(): raise BadInput("the samples are not finite: try a smaller --w")
        images.append(to_images(x))
        if a.trajectory: frames.append(torch.stack((seen + images[-1:] * 11)[:11], dim=1))
    return torch.cat(images), torch.cat(frames) if frames else None

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)   # errors in one line
    add, many, share = p.add_argument, number(int, 1, 1e9), number(float, 0, 1)
    add("--w", type=number(float, -1e3, 1e3), nargs="+", required=True,
        help="guidance scales; 1 is the conditional model, 0 the unconditional one")
    add("--ckpt", metavar="FILE.pt", help="newest of runs/, else weights/unet.pt")
    add("--label", type=int, choices=range(10), help="default: 0, 1, ..., 9 in turn")
    add("--n", type=many, help="samples for each w (100, and 10 of the null label)")
    add("--steps", type=many, default=50, help="of the sampler (50)")
    add("--sampler", choices=SAMPLERS, default="euler", help="em is Euler-Maruyama")
    add("--sigma", type=number(float, 0, 1e3), help="of em: constant (sqrt(2 beta_t))")
    add("--noise", type=share, help="of ddim: 0 is DDIM, 1 DDPM's ancestral sampler (0)")
    add("--guidance", choices=("cfg", "classifier"), default="cfg")
    add("--interval", type=share, nargs=2, default=(0.0, 1.0), metavar=("LO", "HI"),
        help="t with guidance, w = 1 outside; Kynkaanniemi et al. 2024 (0 1)")
    add("--seed", type=number(int, 0, 2**32), default=0)
    add("--out", default="samples.png", metavar="FILE.png|FILE.npz")
    add("--trajectory", action="store_true", help="show x_t from noise to digit")
    add("--device", help="cuda where there is one, else cpu")
    a = p.parse_args(argv)
    a.takes = inspect.signature(SAMPLERS[a.sampler]).parameters
    for option in ("noise", "sigma"):
        if getattr(a, option) is not None and option not in a.takes:
            p.error(f"{a.sampler} takes no --{option}")
    if a.interval[0] > a.interval[1]: p.error("--interval LO HI needs LO <= HI")
    if a.out[-4:] not in (".png", ".npz"): p.error("--out must end in .png or .npz")
    if a.out.endswith(".npz") and (len(a.w) > 1 or a.trajectory):
        p.error(".npz takes one --w, and no --trajectory")
    return a

@torch.no_grad()
def main(argv=None):
    a = parse(argv)
    device, began, calls, panels = train.pick_device(a.device), time.time(), 0, []
    file = a.ckpt or newest(lambda c: c["arch"] in train.LATENT, "unet.pt") or "weights/unet.pt"
    net, config = train.load_checkpoint(file, device)
    latent, by_classifier = config["latent"], a.guidance == "classifier"
    if config["arch"] not in train.LATENT: raise BadInput(f"{file}: no sampler, a {config['arch']}")
    if latent and by_classifier: raise BadInput(f"{file}: a latent model takes --guidance cfg only")
    fits = lambda c: (c["arch"] == "classifier" and c["data"] == config["data"]
                      and (c["path"] == config["path"] or not by_classifier))
    judge_file, decode = newest(fits, "classifier.pt"), lambda x: x
    judge = train.load_checkpoint(judge_file, device)[0] if judge_file else None
    if by_classifier and not judge:
        raise BadInput(f"no classifier for the data and path of {file}: train.py --arch classifier")
    if latent:
        vae, of_vae = train.load_checkpoint(latent["file"], device)
        if of_vae != latent["vae"]: raise BadInput(f"{latent['file']}: {file} has another VAE")
        decode = lambda x: vae.decode(x / latent["scale"])

    def called(*inputs):            # the net, its calls counted
        nonlocal calls
        calls += 1
        with train.autocast(device): return net(*inputs).float()

    figure = a.n is None and a.label is None and a.out.endswith(".png")     # shows NULL as well
    rows = NULL + figure            # a row a label: sample i stands in row i % rows
    n = a.n or rows * (1 if a.trajectory else 10)
    y = torch.arange(n, device=device) % rows if a.label is None else torch.full((n,), a.label)
    y, rows = y.to(device), min(rows, n)
    for w in a.w:
        images, grid = generate(a, called, judge, config, w, y, decode)
        if judge:
            known = y != NULL
            share = train.accuracy(judge, images[known, None], y[known])
            spread = train.diversity(images[known], y[known]) / config["real_diversity"]
            print(f"w = {w:g}: {100 * share:.1f} % read as their label by {judge_file}"
                  + f", diversity {spread:.2f} of that of real digits" * (spread > 0))    # not nan
        if grid is None:
            grid = F.pad(images, (0, 0, 0, 0, 0, -n % rows)).view(-1, rows, 32, 32).transpose(0, 1)
        times = ["".join(f"{k / 10:<4g}" for k in range(11))] if a.trajectory else []
        panels.append(panel(grid.cpu().numpy(), f"w = {w:g}", *times))
    np.savez_compressed(npz := io.BytesIO(), images=images.cpu().numpy(), labels=y.cpu().numpy())
    png_wanted = a.out.endswith(".png")
    train.write_whole(a.out, png(np.hstack(panels)) if png_wanted else npz.getvalue())
    print(f"wrote {a.out}: {len(a.w) * n} samples of {file}, {a.steps} steps of {a.sampler}, "
          f"{calls} network calls, {time.time() - began:.1f} s")

if __name__ == "__main__": sys.exit(train.command(main))
