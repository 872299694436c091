"""Training: `python train.py --arch unet|dit|vae|classifier`. Data, checkpoints, loop, options."""
import argparse, copy, gzip, io, os, signal, sys, time, zlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cfg_min import NULL, cfg_cfm_loss, cfg_dsm_loss, classifier_loss, logit_normal
from dit import DiT
from paths import PATHS
from unet import NoisyClassifier, UNet
from vae import VAE, vae_loss

HERE = Path(__file__).parent
NETS = {"unet": UNet, "dit": DiT, "vae": VAE, "classifier": NoisyClassifier}
LATENT = {"unet": dict(in_channels=4, channels=(64, 128), stride=1),
          "dit": dict(in_channels=4, size=8, patch=1)}      # options of the nets for 4x8x8 latents
RECIPES = {"unet": (1200, 128, 4e-3), "dit": (2800, 64, 8e-3),
           "vae": (2000, 128, 4e-3), "classifier": (1800, 128, 4e-3)}   # --steps, --batch, --lr

class BadInput(ValueError):
    """The user's input is wrong, and the text says how: one line on stderr, exit status 2."""

def read_idx(file):
    """An IDX file of bytes, or its .gz: 0, 0, 8, the rank, big-endian sizes, data."""
    raw = file.read_bytes() if file.exists() else gzip.decompress(Path(f"{file}.gz").read_bytes())
    if raw[:3] != b"\0\0\x08": raise ValueError(f"{file.name} is no IDX file of bytes")
    shape = np.frombuffer(raw, ">u4", raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)

def load_data(path=HERE / "data/mnist.npz"):
    """x_train, y_train, x_test, y_test: (N, 1, 32, 32) uint8, padded from 28x28; (N,) int64, 0..9.
    From an .npz of arrays so named, or a folder of MNIST's four IDX files. Raises BadInput."""
    idx = "train-images-idx3 train-labels-idx1 t10k-images-idx3 t10k-labels-idx1".split()
    out = []
    try:
        if Path(path).is_dir(): arrays = [read_idx(Path(path, f"{name}-ubyte")) for name in idx]
        else:
            with np.load(path, allow_pickle=False) as npz:
                arrays = [npz[k] for k in ("x_train", "y_train", "x_test", "y_test")]
        for x, y in (arrays[:2], arrays[2:]):
            if not (x.dtype == np.uint8 and x.shape == (y.size or 1, 28, 28) and y.ndim == 1
                    and y.dtype.kind in "iu" and {*y.tolist()} <= {*range(NULL)}):
                raise ValueError(f"has {x.dtype} {x.shape} and {y.dtype} {y.shape}")
            out += [torch.from_numpy(np.pad(x, ((0, 0), (2, 2), (2, 2))))[:, None],
                    torch.from_numpy(y.astype(np.int64))]
    except Exception as e:      # zip, zlib, gzip and numpy each raise their own
        raise BadInput(f"{path}: {str(e).splitlines()[0]}; --data wants an .npz of x_train, y_train"
                       ", x_test, y_test, or a folder of MNIST's four IDX files: images (N, 28, 28)"
                       " uint8, labels (N,) in 0..9 (10 is null), N > 0") from None
    return out

def to_unit(images): return images.float() / 127.5 - 1      # uint8 0 ... 255 -> float32 -1 ... 1

def diversity(images, labels):
    """Mean distance of two images of a class, averaged over classes; of each, its first 1000."""
    classes = [images[labels == c][:1000].flatten(1).float() for c in labels.unique()]
    return torch.stack([torch.pdist(c).mean() for c in classes]).nanmean().item()

@torch.no_grad()
def accuracy(classifier, images, labels):
    """The share of images (N, 1, 32, 32) uint8 that the noisy classifier reads right, at t = 1."""
    reads = [classifier(to_unit(x), torch.ones(len(x)).to(x.device)) for x in images.split(500)]
    return (torch.cat(reads).argmax(1) == labels).float().mean().item()

def write_whole(path, data):
    """Write bytes under a temporary name, then rename: path is whole or stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        tmp.write_bytes(data)
        os.replace(tmp, path)
    finally: tmp.unlink(missing_ok=True)

def load_checkpoint(path, device="cpu"):
    """The net of a checkpoint, with the averaged weights, and its config. Raises BadInput."""
    path = path if Path(path).exists() else HERE / path     # weights/ is there from everywhere
    try:
        ckpt = torch.load(path, map_location=device, weights_only=True)
        config = dict(ckpt["config"], step=ckpt["step"])
        if not {"path", "predict", "latent", "data", "real_diversity"} <= {*config}: raise KeyError
        net = NETS[config["arch"]](**config["net"]).to(device)
        net.load_state_dict(ckpt["weights"])
    except OSError as e: raise BadInput(f"{path}: {e.strerror}; train.py makes one") from None
    except Exception:           # torch.load raises whatever it stumbles over
        raise BadInput(f"{path}: not a checkpoint of train.py, or a damaged one") from None
    return net.eval().requires_grad_(False), config

def pick_device(name):
    """The torch.device; None is CUDA where there is one, else the CPU. Raises BadInput."""
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"         # one a process, under torchrun
    try: return torch.empty(0, device=name or (gpu if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError):
        raise BadInput(f"--device {name}: not to be had here; try --device cpu") from None

def autocast(device):
    """bf16 on CUDA, and on CPUs with instructions for it (1.3 to 1.6 x float32 when measured)."""
    fast = device.type == "cuda" or device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)

def make_optimizers(net):
    """Muon (Jordan 2024) for hidden matrices, kernels as (c_out, c_in k k); AdamW for the rest.
    The rest: vectors, first and last layers, and what only embeddings of t and y go through."""
    ends, hidden, rest = "first last embed label time inject modulation".split(), [], []
    for name, p in net.named_parameters():
        p.grad = torch.zeros_like(p)
        if p.ndim == 1 or any(word in name for word in ends): rest.append(p)
        else:
            hidden.append(p.detach().flatten(1))            # a view of the same memory,
            hidden[-1].grad = p.grad.flatten(1)             # and of its gradient's
    return (torch.optim.Muon(hidden, weight_decay=0.01, ns_steps=3, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.01, fused=True))

def loss_of(a, net, z, y, share):
    """The loss that --arch and --predict ask for, on this process's share of the batch."""
    if a.arch == "vae": return vae_loss(net, z, share)
    if a.arch == "classifier": return classifier_loss(net, PATHS[a.path], z, y, share)
    if a.predict == "eps": return cfg_dsm_loss(net, PATHS[a.path], z, y, a.eta, share=share)
    draw_t = partial(logit_normal, mean=0.0) if a.latent else logit_normal   # decided later there
    return cfg_cfm_loss(net, PATHS[a.path], z, y, a.eta, share=share, draw_t=draw_t)

def train(a):
    """One run. Step k takes its random numbers from (seed, k) alone, the same in every process."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
    if a.batch % world: raise BadInput(f"--batch {a.batch} cannot be shared by {world} processes")
    share = slice(rank * a.batch // world, (rank + 1) * a.batch // world)
    device, say = pick_device(a.device), print if rank == 0 else lambda *_, **__: None

    # the data, and the config: all that the run depends on, which a resumed run must not change
    x_all, y_all, *test = (v.to(device) for v in load_data(a.data))
    settings = "arch", "steps", "batch", "lr", "eta", "ema", "seed", "path", "predict"
    checksum = zlib.crc32(y_all.cpu().numpy(), zlib.crc32(x_all.cpu().numpy()))
    config = dict({k: getattr(a, k) for k in settings}, net={}, latent=None,
                  data=checksum, real_diversity=diversity(*test))
    if a.latent:
        vae, of_vae = load_checkpoint(a.latent, device)
        if of_vae["arch"] != "vae": raise BadInput(f"--latent {a.latent}: not of --arch vae")
        with torch.no_grad(), autocast(device):
            x_all = torch.cat([vae.encode(to_unit(x)).float() for x in x_all.split(500)])
        scale = 1 / x_all.std().item()          # to unit variance; Rombach et al. 2022, app. G
        x_all *= scale
        config.update(net=LATENT[a.arch], latent=dict(file=a.latent, vae=of_vae, scale=scale))

    torch.manual_seed(a.seed)
    net, start = NETS[a.arch](**config["net"]).to(device), 0
    averaged, optimizers = copy.deepcopy(net).requires_grad_(False), make_optimizers(net)
    if a.resume and Path(a.out).exists():
        saved = load_checkpoint(a.out, device)[1]
        changed = ", ".join(k for k in config if saved.get(k) != config[k])
        if changed: raise BadInput(f"{a.out} has another {changed}: choose another --out")
        if saved["step"] == a.steps: return say(f"{a.out} is finished: {a.steps} steps are done")
        ckpt, start = torch.load(a.out, map_location=device, weights_only=True), saved["step"]
        net.load_state_dict(ckpt["net"]), averaged.load_state_dict(ckpt["weights"])
        for o, state in zip(optimizers, ckpt["optimizers"]): o.load_state_dict(state)
    elif a.resume: say(f"{a.out} does not exist yet: starting at the beginning")
    if world > 1: dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = torch.nn.parallel.DistributedDataParallel(net) if world > 1 else net

    say(f"{a.arch} on {device}: {sum(p.numel() for p in net.parameters()):,} parameters, "
        f"{len(x_all):,} images, steps {start} to {a.steps} of {a.batch}, to {a.out}", flush=True)
    stop, tty, total, shown, since = [], os.isatty(1), 0.0, start, time.time()
    # the first Ctrl-C stops after the step, a second one at once
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130) if stop else stop.append(True))
    for step in range(start, a.steps):
        torch.manual_seed(int(np.random.SeedSequence([a.seed, step]).generate_state(1)[0]))
        i = torch.randint(len(x_all), (a.batch,), device=device)
        z = x_all[i] if a.latent else to_unit(x_all[i])
        with autocast(device): loss = loss_of(a, model, z, y_all[i], share)
        net.zero_grad(set_to_none=False)
        loss.backward()
        for optimizer in optimizers:            # warm-up, then linear decay
            optimizer.param_groups[0]["lr"] = a.lr * min((step + 1) / 100, 1) * (1 - step / a.steps)
            optimizer.step()
        decay = min(a.ema, (step + 1) / (step + 10))        # of the mean weights; short at first
        for p, q in zip(averaged.parameters(), net.parameters()): p.lerp_(q.detach(), 1 - decay)

        loss, done = loss.detach() / world, step + 1
        if world > 1: dist.all_reduce(loss)
        total, last, seconds = total + loss, done == a.steps or bool(stop), time.time() - since
        if last or done % a.save_every == 0:
            if not total.isfinite():
                raise BadInput(f"loss not finite at step {done}: lower --lr; {a.out} is kept")
            ckpt = dict(config=config, step=done, weights=averaged.state_dict())
            if done < a.steps:                  # what --resume needs
                ckpt.update(net=net.state_dict(), optimizers=[o.state_dict() for o in optimizers])
            torch.save(ckpt, buffer := io.BytesIO())        # so a full disk is an OSError
            if rank == 0: write_whole(a.out, buffer.getbuffer())
        if last or seconds > (0.2 if tty else 10):
            rate = (done - shown) / seconds
            line = (f"step {done}/{a.steps}  loss {total / (done - shown):.4f}  "
                    f"{rate * a.batch:.0f} images/s  {(a.steps - done) / rate:.0f} s left")
            if tty: line = f"\r{line[:os.get_terminal_size().columns - 1]}\033[K"
            say(line, end="" if tty and not last else "\n", flush=True)
            total, shown, since = 0.0, done, time.time()
        if stop: raise KeyboardInterrupt
    if a.arch == "classifier":
        say(f"{100 * accuracy(averaged, *test):.2f} % of the test images are read right at t = 1")
    if a.arch == "vae":
        errors = [averaged.decode(averaged.encode(x)) - x for x in to_unit(test[0]).split(500)]
        say(f"mean squared error of test images: {torch.cat(errors).square().mean():.4f}")
    if world > 1: dist.destroy_process_group()
    say(f"wrote {a.out}")

def number(kind, low, high):
    """An argparse type: a number of that kind in [low, high]."""
    def check(string):
        if low <= kind(string) <= high: return kind(string)
        raise argparse.ArgumentTypeError(f"{string} is not in [{low:g}, {high:g}]")
    check.__name__ = kind.__name__      # for argparse's own message
    return check

def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS)   # errors in one line
    add, many, share = p.add_argument, number(int, 1, 1e9), number(float, 0, 1)
    add("--arch", choices=NETS, required=True)
    add("--steps", type=many, help=f"and --batch and --lr, the peak: {RECIPES}")
    add("--batch", type=many)
    add("--lr", type=number(float, 1e-9, 1e3))
    add("--eta", type=share, default=0.1, help="label-drop probability (0.1)")
    add("--ema", type=share, default=0.999, help="decay of the averaged weights (0.999)")
    add("--seed", type=number(int, 0, 2**32), default=0)
    add("--data", default=HERE / "data/mnist.npz", help=".npz, or a folder of IDX files")
    add("--path", choices=PATHS, default="condot", help="probability path (condot)")
    add("--predict", choices=("u", "eps"), default="u", help="CFM loss (u) or DSM loss")
    add("--latent", metavar="VAE.pt", help="train in this autoencoder's latent space")
    add("--out", metavar="FILE.pt", help="runs/<arch>.pt or runs/latent_<arch>.pt")
    add("--resume", action="store_true", help="go on from --out")
    add("--save-every", type=many, default=500, metavar="N", help="steps (500)")
    add("--device", help="cuda where there is one, else cpu")
    a = p.parse_args(argv)
    if a.latent and a.arch not in LATENT: p.error("--latent goes with --arch unet or dit")
    for k, v in zip(("steps", "batch", "lr"), RECIPES[a.arch]): setattr(a, k, getattr(a, k) or v)
    a.out = a.out or f"runs/{'latent_' if a.latent else ''}{a.arch}.pt"
    return a

def command(main):
    """Run main(): bad input or a refusing disk is one line and status 2; Ctrl-C is status 130."""
    try: return main()
    except KeyboardInterrupt: return 130
    except BrokenPipeError: os._exit(1)                 # nobody reads stdout any more
    except (BadInput, OSError) as e:
        print(f"{Path(sys.argv[0]).name}: {e}", file=sys.stderr)
        return 2

def main(argv=None): return train(parse(argv))

if __name__ == "__main__": sys.exit(command(main))
