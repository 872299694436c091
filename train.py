"""Training: `python train.py --arch unet|dit|vae|classifier`. Data, checkpoints, loop, command line."""
import argparse
import copy
import gzip
import math
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cfg_min import cfg_cfm_loss, cfg_dsm_loss, classifier_loss, logit_normal
from dit import DiT
from paths import PATHS
from unet import NoisyClassifier, UNet
from vae import VAE, vae_loss

HERE = Path(__file__).parent
NETS = {"unet": UNet, "dit": DiT, "vae": VAE, "classifier": NoisyClassifier}
LATENT = {"unet": dict(in_channels=4, channels=(64, 128), stride=1),
          "dit": dict(in_channels=4, size=8, patch=1)}
RECIPES = {"unet": dict(steps=1600, batch=128, lr=4e-3), "dit": dict(steps=3000, batch=128, lr=4e-3),
           "vae": dict(steps=1000, batch=128, lr=4e-3),
           "classifier": dict(steps=600, batch=128, lr=4e-3)}


class BadInput(ValueError):
    """What the user gave is wrong: one line that says what, and what to do. Exit status 2."""


def read_idx(file):
    """The array in an IDX file of bytes: 0, 0, 8, rank, sizes (big-endian), data; gzipped if .gz."""
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    if raw[:3] != b"\0\0\x08": raise ValueError(f"{file.name} is no IDX file of bytes")
    shape = np.frombuffer(raw, ">u4", raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def load_data(path=HERE / "data/mnist.npz"):
    """x_train, y_train, x_test, y_test: (N, 1, 32, 32) uint8, padded from 28x28; (N,) int64, 0..9.

    From an .npz with arrays of these names, or a folder of MNIST's four IDX files. Raises BadInput.
    """
    path, out = Path(path), []
    try:
        if path.is_dir():
            arrays = [read_idx(f if f.exists() else f.with_name(f.name + ".gz"))
                      for f in (path / f"{part}-{kind}-ubyte" for part in ("train", "t10k")
                                for kind in ("images-idx3", "labels-idx1"))]
        else:
            with np.load(path, allow_pickle=False) as npz:
                arrays = [npz[k] for k in ("x_train", "y_train", "x_test", "y_test")]
    except Exception as e:      # zip, zlib, gzip and numpy each raise their own
        raise BadInput(f"{path}: no data set ({str(e).splitlines()[0]}); give an .npz with x_train, "
                       "y_train, x_test, y_test, or a folder of MNIST's four IDX files") from None
    for x, y in (arrays[:2], arrays[2:]):
        if x.dtype != np.uint8 or x.shape[1:] != (28, 28) or len(x) == 0:
            raise BadInput(f"{path}: images must be uint8 (N, 28, 28), not {x.dtype} {x.shape}")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1] or y.min() < 0 or y.max() > 9:
            raise BadInput(f"{path}: needs a label for each image, an integer in 0..9 (10 is null)")
        x = np.pad(x, ((0, 0), (2, 2), (2, 2)))[:, None]
        out += [torch.from_numpy(x), torch.from_numpy(y.astype(np.int64))]
    return out


def to_unit(images):
    """uint8 0 ... 255 -> float32 -1 ... 1."""
    return images.float() / 127.5 - 1


def diversity(images, labels):
    """Mean distance of two images of a class, averaged over classes; of each, its first 1000."""
    classes = [images[labels == c][:1000].flatten(1).float() for c in labels.unique()]
    return torch.stack([torch.pdist(c).mean() for c in classes]).nanmean().item()


@torch.no_grad()
def accuracy(classifier, images, labels):
    """The share of images (N, 1, 32, 32) uint8 that the noisy classifier reads right, at t = 1."""
    reads = [classifier(to_unit(x), torch.ones(len(x), device=x.device)).argmax(1)
             for x in images.split(500)]
    return (torch.cat(reads) == labels).float().mean().item()


def fingerprint(*tensors):
    """A checksum of data or weights, by which they are known again."""
    return zlib.crc32(b"".join(v.cpu().contiguous().numpy().tobytes() for v in tensors))


def write_whole(path, write):
    """write(file) on a temporary file beside path, then rename: path is whole or as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "wb") as file: write(file)
        os.replace(tmp, path)
    finally: tmp.unlink(missing_ok=True)


def read_checkpoint(path, device="cpu"):
    """The dict of config, step, averaged weights; of an unfinished run net and optimizers too."""
    if not Path(path).is_file(): raise BadInput(f"{path}: no such checkpoint; train.py makes one")
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
        if ckpt["config"]["arch"] in NETS and ckpt["weights"]: return ckpt
    except OSError: raise
    except Exception: pass      # torch.load raises whatever it stumbles over
    raise BadInput(f"{path}: not a checkpoint of train.py, or a damaged one")


def load_checkpoint(path, device="cpu"):
    """net, with its averaged weights and in eval mode, and its config. Raises BadInput."""
    ckpt = read_checkpoint(path, device)
    try:
        net = NETS[ckpt["config"]["arch"]](**ckpt["config"]["net"]).to(device)
        net.load_state_dict(ckpt["weights"])
    except Exception:
        raise BadInput(f"{path}: its weights do not fit the network that it names") from None
    return net.eval().requires_grad_(False), ckpt["config"]


def load_vae(path, device, wanted=None):
    """The autoencoder of a latent model and its fingerprint. Raises BadInput if not the wanted."""
    net, config = load_checkpoint(path, device)
    if config["arch"] != "vae": raise BadInput(f"{path}: a {config['arch']}, where a vae is needed")
    mark = fingerprint(*net.state_dict().values())
    if wanted in (None, mark): return net, mark
    raise BadInput(f"{path}: not the autoencoder that the latent model was trained with")


def pick_device(name):
    """torch.device; for None it is CUDA where there is one, else the CPU. Raises BadInput."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try: return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):
        raise BadInput(f"--device {name}: not to be had here; try --device cpu") from None


def autocast(device):
    """bf16 on CUDA, and on CPUs with instructions for it (1.3 to 1.6 x float32 when measured)."""
    fast = device.type == "cuda" or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def prepare(a, device):
    """All z, all y, test set, config, and the function that makes a batch of z_all the losses' z.

    The config is all that a run depends on: kept in the checkpoint, unchanged when it is resumed.
    """
    x, y, *test = (v.to(device) for v in load_data(a.data))
    settings = ("arch", "steps", "batch", "lr", "eta", "ema", "seed", "path", "predict")
    config = {k: getattr(a, k) for k in settings}
    config.update(net={}, latent=None, data=fingerprint(x, y))
    if a.arch == "classifier": config["real_diversity"] = diversity(*test)
    if not a.latent: return x, y, test, config, to_unit
    vae, mark = load_vae(a.latent, device)
    with torch.no_grad(), autocast(device):
        z = torch.cat([vae.encode(to_unit(batch)).float() for batch in x.split(500)])
    scale = 1 / z.std().item()  # to unit variance; Rombach et al. 2022, appendix G
    config.update(net=LATENT[a.arch], latent=dict(file=a.latent, fingerprint=mark, scale=scale))
    return z, y, test, config, lambda batch: batch * scale


def loss_of(a, net, z, y, share):
    """The loss that --arch and --predict ask for, on this process's share of the batch."""
    if a.arch == "vae": return vae_loss(net, z, share)
    if a.arch == "classifier": return classifier_loss(net, PATHS[a.path], z, y, share)
    if a.predict == "eps": return cfg_dsm_loss(net, PATHS[a.path], z, y, a.eta, share=share)
    return cfg_cfm_loss(net, PATHS[a.path], z, y, a.eta, share=share, draw_t=logit_normal)


def train(a):
    """One run. Step k takes its random numbers from (seed, k) alone, the same in every process."""
    rank, world = (int(os.environ.get(k, v)) for k, v in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun
    if a.batch % world: raise BadInput(f"--batch {a.batch} cannot be shared by {world} processes")
    share = slice(rank * a.batch // world, (rank + 1) * a.batch // world)
    say = print if rank == 0 else lambda *_, **__: None
    device = pick_device(a.device)
    if device.type == "cuda" and world > 1: device = torch.device("cuda", rank % torch.cuda.device_count())
    z_all, y_all, test, config, to_z = prepare(a, device)

    torch.manual_seed(a.seed)
    net = NETS[a.arch](**config["net"]).to(device)
    averaged, start = copy.deepcopy(net).requires_grad_(False), 0
    # Muon (Jordan 2024) for the hidden matrices, kernels as (c_out, c_in k k); AdamW for the rest
    hidden = {name: p for name, p in net.named_parameters() if p.ndim > 1
              and not any(end in name for end in ("first", "last", "embed", "label"))}
    views = [p.detach().flatten(1) for p in hidden.values()]
    rest = [p for name, p in net.named_parameters() if name not in hidden]
    optimizers = (torch.optim.Muon(views, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.01, fused=True))
    if a.resume and Path(a.out).exists():
        ckpt = read_checkpoint(a.out, device)
        changed = [k for k in config if ckpt["config"].get(k) != config[k]]
        if changed: raise BadInput(f"{a.out} has other settings ({', '.join(changed)}); choose its "
                                   "own, or another --out")
        if "net" not in ckpt: return say(f"{a.out} is finished: {a.steps} steps are done")
        net.load_state_dict(ckpt["net"]), averaged.load_state_dict(ckpt["weights"])
        for o, state in zip(optimizers, ckpt["optimizers"]): o.load_state_dict(state)
        start = ckpt["step"]
    elif a.resume: say(f"{a.out} does not exist yet: starting at the beginning")
    model = net
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        model = torch.nn.parallel.DistributedDataParallel(net)

    def save(step):
        if not math.isfinite(total): raise BadInput(f"the loss is not finite near step {step}: try a "
                                                    f"smaller --lr; {a.out} is as of the last good one")
        ckpt = dict(config=config, step=step, weights=averaged.state_dict())
        if step < a.steps: ckpt.update(net=net.state_dict(),
                                       optimizers=[o.state_dict() for o in optimizers])
        if rank == 0: write_whole(a.out, lambda file: torch.save(ckpt, file))

    def interrupt(*_):          # the first Ctrl-C ends the run after its step, a second one at once
        nonlocal stop
        stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    say(f"{a.arch} on {device}: {sum(p.numel() for p in net.parameters()):,} parameters, "
        f"{len(z_all):,} images, steps {start} to {a.steps} of {a.batch}, to {a.out}", flush=True)
    stop, tty, total, shown, since = False, sys.stdout.isatty(), 0.0, start, time.time()
    signal.signal(signal.SIGINT, interrupt)
    for step in range(start, a.steps):
        torch.manual_seed(int(np.random.SeedSequence([a.seed, step]).generate_state(1)[0]))
        i = torch.randint(len(z_all), (a.batch,), device=device)
        with autocast(device): loss = loss_of(a, model, to_z(z_all[i]), y_all[i], share)
        net.zero_grad()
        loss.backward()
        for view, p in zip(views, hidden.values()): view.grad = p.grad.flatten(1)
        for o in optimizers:    # warm-up, then linear decay
            o.param_groups[0]["lr"] = a.lr * min((step + 1) / 100, 1) * (1 - step / a.steps)
            o.step()
        decay = min(a.ema, (step + 1) / (step + 10))    # of the averaged weights; short at first
        torch._foreach_lerp_(list(averaged.parameters()), list(net.parameters()), 1 - decay)

        loss, done = loss.detach() / world, step + 1
        if world > 1: dist.all_reduce(loss)
        total, seconds, last = total + loss, time.time() - since, done == a.steps or stop
        if last or done % a.save_every == 0: save(done)
        if last or seconds > (0.2 if tty else 10):
            rate = (done - shown) / seconds
            line = (f"step {done}/{a.steps}  loss {total / (done - shown):.4f}  "
                    f"{rate * a.batch:.0f} images/s  {(a.steps - done) / rate:.0f} s left")
            if tty: line = f"\r{line[:shutil.get_terminal_size().columns - 1]}\033[K"
            say(line, end="" if tty and not last else "\n", flush=True)
            total, shown, since = 0.0, done, time.time()
        if stop: raise KeyboardInterrupt
    averaged.eval()
    if a.arch == "classifier":
        say(f"{100 * accuracy(averaged, *test):.2f} % of the test images are read right at t = 1")
    if a.arch == "vae":
        with torch.no_grad():
            errors = [averaged.decode(averaged.encode(to_unit(x))) - to_unit(x) for x in test[0].split(500)]
        say(f"mean squared error of test images {torch.cat(errors).square().mean():.4f}, in [-1, 1]")
    say(f"wrote {a.out}")


class Parser(argparse.ArgumentParser):
    def error(self, message): raise BadInput(f"{message} (-h lists the options)")


def number(kind, low, high):
    """An argparse type: a number of that kind in [low, high]."""
    def check(string):
        value = kind(string)
        if low <= value <= high: return value
        raise argparse.ArgumentTypeError(f"{string} is not in [{low:g}, {high:g}]")
    check.__name__ = kind.__name__
    return check


def parse(argv=None):
    p = Parser(description=__doc__)
    many = number(int, 1, 10**9)
    p.add_argument("--arch", choices=NETS, required=True)
    p.add_argument("--steps", type=many, help=f"--steps, --batch, --lr (peak): from {RECIPES}")
    p.add_argument("--batch", type=many)
    p.add_argument("--lr", type=number(float, 1e-9, 1e3))
    p.add_argument("--eta", type=number(float, 0, 1), default=0.1, help="label-drop probability (0.1)")
    p.add_argument("--ema", type=number(float, 0, 1), default=0.999, help="decay of averaging (0.999)")
    p.add_argument("--seed", type=number(int, 0, 2**32), default=0)
    p.add_argument("--data", default=HERE / "data/mnist.npz", help=".npz, or folder of IDX files")
    p.add_argument("--path", choices=PATHS, default="condot", help="probability path (condot)")
    p.add_argument("--predict", choices=("u", "eps"), default="u", help="u: CFM loss; eps: DSM (u)")
    p.add_argument("--latent", metavar="VAE.pt", help="train in this autoencoder's latent space")
    p.add_argument("--out", metavar="FILE.pt", help="runs/<arch>.pt, or runs/latent_<arch>.pt")
    p.add_argument("--resume", action="store_true", help="go on from --out")
    p.add_argument("--save-every", type=many, default=500, metavar="N", help="in steps (500)")
    p.add_argument("--device", help="cuda where there is one, else cpu")
    a = p.parse_args(argv)
    if a.latent and a.arch not in LATENT: raise BadInput("--latent goes with --arch unet or dit")
    for k, v in RECIPES[a.arch].items(): setattr(a, k, getattr(a, k) or v)
    a.out = a.out or f"runs/{'latent_' if a.latent else ''}{a.arch}.pt"
    return a


def command(main):
    """Run main(): bad input or a refusing disk is one line and status 2; Ctrl-C is status 130."""
    try: return main()
    except KeyboardInterrupt: return 130
    except BrokenPipeError:     # nobody reads stdout any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (BadInput, OSError) as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        return 2


def main(argv=None): return train(parse(argv))


if __name__ == "__main__":
    sys.exit(command(main))
