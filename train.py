"""Training: `python train.py --arch unet|dit|vae|classifier`. The loop, what it needs, options."""
import copy
import os
import signal
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import mnist
from cfg_min import cfg_cfm_loss, cfg_dsm_loss, classifier_loss, logit_normal
from checkpoint import LATENT_OPTIONS, NETS, autocast, pick_device, vector_field
from command import BadInput, Parser, in_place, number, run
from paths import PATHS
from vae import vae_loss

RECIPES = {                                     # the defaults of --steps, --batch and --lr
    "unet": dict(steps=1800, batch=128, lr=2e-3),
    "dit": dict(steps=4200, batch=64, lr=4e-3),
    "vae": dict(steps=2000, batch=128, lr=4e-3),
    "classifier": dict(steps=1800, batch=128, lr=4e-3),
}

TIMES = {                                       # mean and std of logit(t), by what is predicted
    "z": (-0.8, 0.8),                           # Li & He 2025
    "u": (-1.0, 1.0),
    "latent": (0.0, 1.0),                       # z or u of latents: their label is decided later
}
LATE = 0.4, 0.97                                # t in which the pixels are decided
LATE_FROM = 800                                 # the first training step that may draw such t


# ---------------------------------------------------------------- one step

def seed_of(seed, step, rank):
    """The seed of a step's random numbers, a function of these three alone."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def draw_batch(images, labels, n):
    """n data points z, in the units of the network, and their labels y: (z, y) ~ p_data."""
    i = torch.randint(len(images), (n,), device=images.device)
    z = images[i]
    if z.dtype == torch.uint8:                  # pixels; latents are in their units already
        z = mnist.to_unit(z)
    return z, labels[i]


def draw_times(config, n, step, device):
    """t (n,), logit-normal: most where the label is decided.

    From two thirds of the run on, half of the t are uniform in LATE instead: by then samples differ
    from digits mostly in the grey of single pixels, which the field at late t decides. Not so in
    latents; nor before step LATE_FROM, since a short run is still learning what decides the label.
    """
    if config["latent"]:
        return logit_normal(n, *TIMES["latent"], device)
    t = logit_normal(n, *TIMES[config["predict"]], device)
    if step < max(LATE_FROM, 2 / 3 * config["steps"]):
        return t
    low, high = LATE
    late = low + (high - low) * torch.rand(n, device=device)
    chosen = torch.rand(n, device=device) < 0.5
    return torch.where(chosen, late, t)


def loss_of(config, net, z, y, step):
    """The loss that --arch and --predict ask for.

    A network that predicts z learns by L_CFM, too, as the vector field u that its z gives: of an
    error of z this is the square, (D/beta)^2 times, 1/(1 - t)^2 on CondOT.
    """
    path = PATHS[config["path"]]
    if config["arch"] == "vae":
        return vae_loss(net, z)
    if config["arch"] == "classifier":
        return classifier_loss(net, path, z, y)
    if config["predict"] == "eps":
        return cfg_dsm_loss(net, path, z, y, config["eta"])
    t = draw_times(config, len(z), step, z.device)
    return cfg_cfm_loss(vector_field(net, config), path, z, y, config["eta"], t)


def learning_rate(config, step):
    """Linear decay to 0, times a warm-up over the first 100 steps."""
    warm_up = min((step + 1) / 100, 1)
    decay = 1 - step / config["steps"]
    return config["lr"] * warm_up * decay


NOT_HIDDEN = "first", "last", "embed", "label", "time", "inject", "modulation"


def is_hidden_matrix(name, p):
    """Whether Muon trains this parameter: a matrix or kernel between two hidden layers.

    Not so are vectors, the first and the last layer of a U-Net or DiT, and what only embeddings of
    t and y go through: AdamW trains these.
    """
    return p.ndim > 1 and not any(word in name for word in NOT_HIDDEN)


class Optimizers:
    """Muon (Jordan 2024) for the hidden matrices, AdamW for all other parameters of the net.

    Muon moves a matrix by the mean of its last gradients, made nearly orthogonal by ns_steps
    iterations of Newton and Schulz.
    """

    def __init__(self, net):
        self.parameters = list(net.parameters())
        self.kernels = [p for name, p in net.named_parameters() if is_hidden_matrix(name, p)]
        rest = [p for name, p in net.named_parameters() if not is_hidden_matrix(name, p)]
        # Muon wants matrices: views (c_out, c_in k k) of the kernels' own memory
        self.matrices = [p.detach().flatten(1) for p in self.kernels]
        self.muon = torch.optim.Muon(self.matrices, weight_decay=0.01, ns_steps=3,
                                     adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(rest, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def step(self, lr):
        """Move the net's parameters by their gradients, and forget these."""
        for matrix, kernel in zip(self.matrices, self.kernels):
            matrix.grad = kernel.grad.flatten(1)            # a view has no gradient of its own
        for optimizer in (self.muon, self.adamw):
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        for p in self.parameters:
            p.grad = None

    def state_dict(self):
        return [self.muon.state_dict(), self.adamw.state_dict()]

    def load_state_dict(self, states):
        self.muon.load_state_dict(states[0])
        self.adamw.load_state_dict(states[1])


def update_average(average, net, step, ema):
    """average <- decay average + (1 - decay) net; the decay rises from 0.1 to ema."""
    decay = min(ema, (step + 1) / (step + 10))
    for p, q in zip(average.parameters(), net.parameters()):
        p.lerp_(q.detach(), 1 - decay)


# ---------------------------------------------------------------- around the loop

def processes():
    """This process's rank, and how many there are: torchrun says so."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text, end="\n"):
    """Print, in the first process only."""
    rank, _ = processes()
    if rank == 0:
        print(text, end=end, flush=True)


class Progress:
    """The line that a run prints: step, mean loss since the last line, speed, seconds left."""

    def __init__(self, start, config):
        self.steps = config["steps"]
        self.batch = config["batch"]
        self.terminal = os.isatty(1)
        self.done = start
        self.restart()

    def restart(self):
        self.total = 0.0                        # of the losses
        self.shown = self.done
        self.since = time.time()

    def add(self, loss):
        """Count a step; loss is the mean over this process's share of the batch."""
        _, world = processes()
        loss = loss.detach() / world
        if world > 1:
            dist.all_reduce(loss)
        self.total = self.total + loss
        self.done += 1

    def check(self, out):
        """Raise BadInput if a loss since the last line was not finite."""
        if not torch.as_tensor(self.total).isfinite():
            if self.terminal:
                say(in_place(""), end="")       # the error stands on a line of its own
            raise BadInput(f"loss not finite at step {self.done}: lower --lr; {out} is kept")

    def show(self, last):
        """Print the line if it is time, and always after the last step."""
        seconds = time.time() - self.since
        if not last and seconds < (0.2 if self.terminal else 10):
            return
        steps = self.done - self.shown
        rate = steps / seconds
        line = (f"step {self.done}/{self.steps}  loss {self.total / steps:.4f}  "
                f"{rate * self.batch:.0f} images/s  {(self.steps - self.done) / rate:.0f} s left")
        if self.terminal:
            line = in_place(line)
        say(line, end="" if self.terminal and not last else "\n")
        self.restart()


class Interrupt:
    """Ctrl-C: the first one lets the step end, a second one stops at once."""

    def __init__(self):
        self.asked = False
        signal.signal(signal.SIGINT, self.handle)

    def handle(self, signum, frame):
        if self.asked:
            sys.exit(130)
        self.asked = True


def announce(config, net, n, start, out):
    """Say what is about to be trained, on how much, and where it goes."""
    device = next(net.parameters()).device
    parameters = sum(p.numel() for p in net.parameters())
    say(f"{config['arch']} on {device}: {parameters:,} parameters, {n:,} images, "
        f"steps {start} to {config['steps']} of {config['batch']}, to {out}")


def save(out, config, step, net, average, optimizers):
    """Write the checkpoint after `step` steps; the last one has only what sampling needs."""
    rank, _ = processes()
    if rank > 0:
        return
    contents = dict(config=config, step=step, weights=average.state_dict())
    if step < config["steps"]:
        contents["net"] = net.state_dict()
        contents["optimizers"] = optimizers.state_dict()
    checkpoint.save(out, contents)


def restore(out, config, net, average, optimizers):
    """Load a checkpoint of this very run into net, average, optimizers; returns its step. Raises
    BadInput."""
    saved = checkpoint.read(out, next(net.parameters()).device)
    # not real_diversity: the checksum stands for it, and its last bits vary with the threads
    asked = [key for key in config if key != "real_diversity"]
    changed = [key for key in asked if saved["config"].get(key) != config[key]]
    if changed:
        raise BadInput(f"{out} has another {', '.join(changed)}: choose another --out")
    if saved["step"] < config["steps"]:
        net.load_state_dict(saved["net"])
        optimizers.load_state_dict(saved["optimizers"])
    average.load_state_dict(saved["weights"])
    return saved["step"]


def share_gradients(net):
    """The net as every process trains it: with gradients averaged over all processes."""
    _, world = processes()
    if world == 1:
        return net
    device = next(net.parameters()).device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return torch.nn.parallel.DistributedDataParallel(net)


def train(config, images, labels, out, save_every, resume):
    """One run, from the beginning or, to resume, from the step that out has.

    Step k takes its random numbers from (seed, k, rank) alone. Returns the averaged network, or
    None where nothing was left to do.
    """
    rank, world = processes()
    steps = config["steps"]
    torch.manual_seed(config["seed"])
    net = NETS[config["arch"]](**config["net"]).to(images.device)
    average = copy.deepcopy(net).requires_grad_(False)
    optimizers = Optimizers(net)
    start = restore(out, config, net, average, optimizers) if resume else 0
    if start == steps:
        say(f"{out} is finished: {start} steps are done")
        return None
    announce(config, net, len(images), start, out)

    shared = share_gradients(net)
    interrupt = Interrupt()
    progress = Progress(start, config)
    for step in range(start, steps):
        torch.manual_seed(seed_of(config["seed"], step, rank))
        z, y = draw_batch(images, labels, config["batch"] // world)
        with autocast(images.device):
            loss = loss_of(config, shared, z, y, step)
        loss.backward()
        optimizers.step(learning_rate(config, step))
        update_average(average, net, step, config["ema"])
        progress.add(loss)

        stop = interrupt.asked                  # once: a Ctrl-C from here on is for the next step
        last = stop or step + 1 == steps
        if last or (step + 1) % save_every == 0:
            progress.check(out)
            save(out, config, step + 1, net, average, optimizers)
        progress.show(last)
        if stop:
            raise KeyboardInterrupt
    return average


# ---------------------------------------------------------------- the command

@torch.no_grad()
def encode(file, images, device):
    """images (N, 1, 32, 32) uint8 -> latents (N, 4, 8, 8) of unit variance, and what a checkpoint
    keeps of the autoencoder in file. Rombach et al. 2022, appendix G, scale so, too; they draw the
    latent from the encoder's Gaussian, this takes its mean."""
    vae, vae_config = checkpoint.load(file, device)
    if vae_config["arch"] != "vae":
        raise BadInput(f"--latent {file}: not of --arch vae")
    latents = []
    with autocast(device):
        for x in images.split(500):
            latents.append(vae.encode(mnist.to_unit(x)).float())
    latents = torch.cat(latents)
    scale = 1 / latents.std().item()
    return latents * scale, dict(file=file, vae=vae_config, scale=scale)


@torch.no_grad()
def report(arch, net, x_test, y_test):
    """Say how well the finished classifier or autoencoder does on the test images."""
    if arch == "classifier":
        share = mnist.accuracy(net, x_test, y_test)
        say(f"{100 * share:.2f} % of the test images are read right at t = 1")
    if arch == "vae":
        errors = []
        for x in mnist.to_unit(x_test).split(500):
            errors.append(net.decode(net.encode(x)) - x)
        say(f"mean squared error of test images: {torch.cat(errors).square().mean():.4f}")


USAGE = "%(prog)s --arch unet|dit|vae|classifier [options]"
EXAMPLES = """
examples:
  python train.py --arch unet                           the U-Net, to runs/unet.pt
  python train.py --arch unet --resume                  go on with it after a Ctrl-C
  python train.py --arch dit --latent weights/vae.pt    a DiT on latents: latent diffusion
"""


def defaults(name):
    """What an option is by default, for --help: it depends on --arch."""
    return ", ".join(f"{arch} {recipe[name]:g}" for arch, recipe in RECIPES.items())


def parse(argv=None):
    p = Parser(usage=USAGE, epilog=EXAMPLES, description="Train a network on images of digits.")
    add = p.add_argument
    many = number(int, 1, 1e9)
    share = number(float, 0, 1)
    add("--arch", choices=NETS, required=True)
    add("--steps", type=many, help=f"of training ({defaults('steps')})")
    add("--batch", type=many, help=f"images a step ({defaults('batch')})")
    add("--lr", type=number(float, 1e-9, 1e3), help=f"peak learning rate ({defaults('lr')})")
    add("--eta", type=share, default=0.1, help="label-drop probability (0.1)")
    add("--ema", type=share, default=0.999, help="decay of the averaged weights (0.999)")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of all that is random (0)")
    add("--data", default=mnist.FILE,
        help=".npz, or a folder of IDX files: images of 28x28, labels of 0 to 9")
    add("--path", choices=PATHS, default="condot", help="probability path (condot)")
    add("--predict", choices=("z", "u", "eps"),
        help="what the output is (z; with --latent u); z and u learn by the CFM loss, eps by DSM")
    add("--latent", metavar="VAE.pt", help="train in this autoencoder's latent space")
    add("--out", metavar="FILE.pt", help="runs/<arch>.pt or runs/latent_<arch>.pt")
    add("--resume", action="store_true", help="go on from --out")
    add("--save-every", type=many, default=500, metavar="N", help="save every N steps (500)")
    add("--device", help="as torch names it: cpu, cuda, mps (cuda where there is one, else cpu)")
    options = p.parse_args(argv)
    if options.latent and options.arch not in LATENT_OPTIONS:
        p.error("--latent goes with --arch unet or dit")
    for name, value in RECIPES[options.arch].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.predict is None:
        options.predict = "u" if options.latent else "z"
    if options.out is None:
        kind = "latent_" if options.latent else ""
        options.out = f"runs/{kind}{options.arch}.pt"
    return options


def main(argv=None):
    options = parse(argv)
    _, world = processes()
    if options.batch % world:
        raise BadInput(f"--batch {options.batch} cannot be shared by {world} processes")
    device = pick_device(options.device)
    x_train, y_train, x_test, y_test = (v.to(device) for v in mnist.load(options.data))

    # all that the run depends on, which a resumed run must not change
    settings = "arch", "steps", "batch", "lr", "eta", "ema", "seed", "path", "predict"
    config = {name: getattr(options, name) for name in settings}
    config["net"] = {}
    config["latent"] = None
    config["checksum"] = zlib.crc32(y_train.cpu().numpy(), zlib.crc32(x_train.cpu().numpy()))
    config["real_diversity"] = mnist.diversity(x_test, y_test)
    images = x_train
    if options.latent:
        images, config["latent"] = encode(options.latent, x_train, device)
        config["net"] = LATENT_OPTIONS[options.arch]

    resume = options.resume and Path(options.out).exists()
    if options.resume and not resume:
        say(f"{options.out} does not exist yet: starting at the beginning")
    average = train(config, images, y_train, options.out, options.save_every, resume)
    if dist.is_initialized():                   # not so where a finished run had nothing to do
        dist.destroy_process_group()
    if average is not None:
        report(options.arch, average, x_test, y_test)
        say(f"wrote {options.out}")


if __name__ == "__main__":
    sys.exit(run(main))
