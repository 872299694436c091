"""What surrounds a training loop: options, how a run begins, progress, files, processes.

    data, run = prepare(options, "unet", ...)   # reads the data, decides how the run begins
    net = run.set_up(field, optimizer, schedule)
    for step in run.steps():        # from where the run stands; shows progress, saves, minds Ctrl-C
        ...                         # one step, as train.py writes it out
        run.record(loss)
    run.finish()
"""
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from cfg_min import NULL
from paths import PATHS
from support import checkpoint, mnist
from support.checkpoint import GENERATORS, NETWORKS, PREDICTIONS
from support.command import (BadInput, Interrupt, Parser, Progress, add_device, file_name, many,
                             number, processes, say, seed, try_place, write_whole)

HEADER = "step,loss\n"         # of the log


# ---------------------------------------------------------------- options

EXAMPLES = """
examples:
  python train.py --arch unet                           the lecture's recipe, to runs/unet.pt
  python train.py --arch unet --resume                  go on with it after a Ctrl-C
  python train.py --arch unet --predict z --times logit-normal --out runs/better.pt
  python train.py --arch dit --latent weights/vae.pt    a DiT on latents: latent diffusion
defaults of --steps, --batch, --lr:
"""


def parse_options(argv, times):
    """The options of train.py. times: {name: how t is drawn}."""
    defaults = [f"  {arch}: " + ", ".join(str(NETWORKS[arch][key]) for key in
                                          ("steps", "batch", "lr")) for arch in GENERATORS]
    p = Parser(usage="%(prog)s --arch unet|dit [options]", epilog=EXAMPLES + "\n".join(defaults),
               description="Train a network for classifier-free guidance.")
    add = p.add_argument
    add("--arch", required=True, choices=GENERATORS, help="unet.py or dit.py (required)")
    add_options(p)
    add("--eta", type=number(float, 0, 1), default=0.1, help="P(label becomes null) (0.1)")
    add("--path", choices=PATHS, default="condot", help="probability path (condot)")
    add("--predict", choices=PREDICTIONS, default="u",
        help="what the network predicts; u and z learn by the CFM loss, eps by DSM (u)")
    add("--times", choices=times, default="uniform", help="how t is drawn (uniform)")
    add("--latent", type=file_name, metavar="VAE.pt",
        help="train on the latents of this autoencoder (on pixels)")
    options = p.parse_args(argv)
    for name in ("steps", "batch", "lr"):
        if getattr(options, name) is None:
            setattr(options, name, NETWORKS[options.arch][name])
    if options.out is None:
        options.out = f"runs/{'latent_' if options.latent else ''}{options.arch}.pt"
    return options


def add_options(parser, arch=None):
    """The options of every training command; arch: the network, where the command trains one only.
    """
    add = parser.add_argument
    own = NETWORKS.get(arch, {})
    out = f"runs/{arch}.pt" if arch else None
    for name, kind, text in (("steps", many, "how many"), ("batch", many, "images a step"),
                             ("lr", number(float, 1e-9, 1e3), "peak learning rate")):
        add(f"--{name}", type=kind, default=own.get(name),
            help=f"{text} ({own.get(name, 'see below')})")
    add("--seed", type=seed, default=0, help="of all that is random (0)")
    add("--data", type=file_name, default=mnist.FILE, metavar="FILE|DIR",
        help=".npz, or a folder of IDX files: images of 28x28, labels of 0 to 9 (MNIST)")
    add("--init", type=file_name, metavar="FILE.pt",
        help="start from the weights of this checkpoint (from random ones)")
    add("--out", type=file_name, default=out, metavar="FILE.pt",
        help=f"the checkpoint; beside it a .csv of step and loss ({out or 'runs/ARCH.pt'})")
    add("--resume", action="store_true", help="go on from --out, if it is there (start anew)")
    add("--overwrite", action="store_true",
        help="replace any checkpoint at --out (only a finished one of the same configuration)")
    add("--save-every", type=many, default=500, metavar="N", help="save every N steps (500)")
    add_device(parser)


# ---------------------------------------------------------------- how a run begins

def prepare(options, arch, **more):
    """The data (x_train, y_train, x_test, y_test) on the device, and the Run. Raises BadInput.

    more: what the config has besides the options that all trainings share.
    """
    out = Path(options.out)
    _, world = processes()
    if options.batch % world:
        raise BadInput(f"--batch {options.batch} cannot be shared by {world} processes")
    if out.suffix != ".pt" or options.out.endswith("/"):
        raise BadInput(f"--out {options.out!r}: expected the name of a file that ends in .pt")
    device = checkpoint.pick_device(options.device)
    data = mnist.load(options.data)
    vae = None
    if getattr(options, "latent", None):
        vae, more["latent"], carried = load_vae(options.latent, device)
    init = checkpoint.read(options.init) if options.init else None
    config = describe(options, arch, data, init, **more)
    run = Run(options, config, init)
    data = [part.to(device) for part in data]
    if vae:
        data[0] = encode(vae, data[0])
        run.autoencoder = carried
    return data, run


def describe(options, arch, data, init, **more):
    """config: all that a run depends on. It must not change when a run is resumed."""
    images, labels, x_test, y_test = data
    crc = zlib.crc32(labels.numpy(), zlib.crc32(images.numpy()))
    config = dict(arch=arch, net={}, latent=False, predict=None, path=None, steps=options.steps,
                  batch=options.batch, lr=options.lr, seed=options.seed, data=crc, classes=NULL,
                  init=init and checkpoint.checksum_of(init["weights"]),
                  labels=labels.unique().tolist(),
                  real_diversity=mnist.diversity(x_test, y_test)) | more
    if config["latent"]:
        config["net"] = config["net"] | NETWORKS[arch]["latent"]
    if config["predict"] == "eps":
        config["net"] = config["net"] | NETWORKS[arch].get("eps", {})
    return config


def decide(options, config, saved, init):
    """How a run begins: "new", "goes on" or "replaces". Raises BadInput with the line to show.

    saved: the checkpoint at --out, init: that of --init, each None where there is none.
    """
    if init:
        changed = changes(init, config, ("arch", "net", "predict", "latent", "classes"))
        if changed:
            raise BadInput(f"--init {options.init} is of another network: {changed}")
    if saved is None:
        return "new"
    # not real_diversity: data decides it, but its last bits vary with the threads
    changed = changes(saved, config, config.keys() - {"real_diversity"})
    if changed and (options.resume or not options.overwrite):
        raise BadInput(f"{options.out} is of a training with other options: {changed}; keep it by "
                       "another --out, or replace it by --overwrite without --resume")
    finished = saved["step"] == saved["config"]["steps"]
    if not finished and not (options.resume or options.overwrite):
        raise BadInput(f"{options.out} is an unfinished run (step {saved['step']}): add --resume "
                       "or --overwrite, or choose another --out")
    return "goes on" if options.resume else "replaces"


def changes(saved, config, keys):
    """In words, what the config of a checkpoint has otherwise. Old files may lack keys."""
    theirs = config | saved["config"]
    return ", ".join(f"{key} {theirs[key]} (here {config[key]})" for key in sorted(keys)
                     if theirs[key] != config[key])


class Run:
    """A run of training, from new weights, --init's weights, or where --out stands (--resume).

    Its random numbers depend on (seed, step, process) alone, so on a CPU a resumed run equals one
    that was not interrupted, to the bit. After every --save-every steps it writes the checkpoint
    and, beside it, a .csv of all steps and losses. Raises BadInput where it must not begin.
    """

    def __init__(self, options, config, init=None):
        self.config = config
        self.out = Path(options.out)
        self.log_file = self.out.with_suffix(".csv")
        self.save_every = options.save_every
        self.autoencoder = None                 # of a latent model: its config and weights
        self.losses = []                        # tensors, of the steps since the last save
        self.log = HEADER
        try_place(self.out)
        try_place(self.log_file)
        saved = checkpoint.read(self.out) if self.out.exists() else None
        old_log = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
        if old_log and not old_log.startswith(HEADER):
            raise BadInput(f"{self.log_file} is not the log of a training run: choose another "
                           "--out")
        how = decide(options, config, saved, init)
        self.start = saved if how == "goes on" else init
        self.done = saved["step"] if how == "goes on" else 0
        if how == "goes on":
            self.go_on_with(old_log)
        elif how == "replaces":
            say(f"{self.out}, step {saved['step']} of {saved['config']['steps']}, is replaced")
        elif old_log:
            say(f"{self.log_file}, the log of an earlier run, is replaced")
        if init and self.start is init:
            say(f"from the weights of {options.init}")
        self.first = self.done
        _, world = processes()
        self.batch = config["batch"] // world   # of this process

    def go_on_with(self, old_log):
        lines = old_log.splitlines(keepends=True)
        if len(lines) <= self.done:
            say(f"{self.log_file} lacks losses of the steps before {self.done}")
        self.log = "".join(lines[:1 + self.done]) or HEADER

    def set_up(self, field, optimizer, schedule):
        """The network as the loop calls it: in bf16 where that is fast, and under torchrun with
        gradients averaged over all processes. Its weights and its optimizer stand where the run
        does."""
        self.field, self.optimizer, self.schedule = field, optimizer, schedule
        if self.config["predict"]:              # a generator: a mistake in it shows now
            checkpoint.use_once(field.eval(), self.config)
            field.train()
        if self.start:
            load_weights(field, self.start["weights"])
        if 0 < self.done < self.config["steps"]:
            optimizer.load_state_dict(self.start["optimizer"])
            schedule.load_state_dict(self.start["schedule"])
        self.start = None
        # the loss of a network that predicts eps asks for eps, not for the field made from it
        net = field.net if self.config["predict"] == "eps" else field
        device = next(net.parameters()).device
        net.forward = checkpoint.autocast(device)(net.forward)
        _, world = processes()
        if world > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            self.agree_on_start(device)
            net = torch.nn.parallel.DistributedDataParallel(net)
        parameters = sum(p.numel() for p in field.parameters())
        say(f"{self.config['arch']}: {parameters:,} parameters, steps {self.done} to "
            f"{self.config['steps']} of {self.config['batch']} images, to {self.out}")
        return net

    def agree_on_start(self, device):
        """Raise BadInput where processes begin at different steps: not all see the checkpoint."""
        ends = torch.tensor([self.done, -self.done], device=device)
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        latest, earliest = ends[0].item(), -ends[1].item()
        if latest != earliest:
            raise BadInput(f"some processes begin at step {earliest}, others at {latest}: "
                           f"{self.out} must lie on a disk that all of them see")

    def steps(self):
        """The numbers of the steps to take. Raises KeyboardInterrupt after Ctrl-C, BadInput where
        the weights are not finite any more.

        After the last step nothing is saved: the caller may still change the network, then calls
        finish().
        """
        total = self.config["steps"]
        rank, _ = processes()
        progress = Progress(total, self.done)
        shown = self.done
        with Interrupt() as interrupt:
            for step in range(self.done, total):
                torch.manual_seed(seed_of(self.config["seed"], step, rank))
                yield step
                self.done = step + 1
                stop = self.agree(interrupt.asked)
                if progress.is_due() or self.done == total:
                    self.check_weights()
                    recent = torch.stack(self.losses[shown - self.done:])
                    progress.show(self.done, f"loss {recent.mean():.4f}  ")
                    shown = self.done
                if self.done == total:
                    break
                if stop or self.done % self.save_every == 0:
                    self.save()
                    shown = self.done
                if stop:
                    say(f"\nsaved step {self.done} of {total} to {self.out}; the same command with "
                        "--resume goes on")
                    raise KeyboardInterrupt
        progress.keep()

    def agree(self, asked):
        """Whether any process was asked to stop: all stop after the same step."""
        if not dist.is_initialized():
            return asked
        votes = torch.tensor(float(asked), device=self.losses[-1].device)
        dist.all_reduce(votes)
        return votes.item() > 0

    def record(self, loss):
        """Keep the loss of a step: its mean over all processes."""
        loss = loss.detach().float()
        if dist.is_initialized():
            dist.all_reduce(loss)
            loss = loss / dist.get_world_size()
        self.losses.append(loss)

    def check_weights(self):
        """Raise BadInput where the weights are not finite."""
        if not checkpoint.are_finite(self.field.state_dict()):
            raise BadInput(f"the weights are not finite after step {self.done}: lower --lr; "
                           f"{self.out} stays as it was")

    def save(self):
        """Write the checkpoint and the log. Raises BadInput where the weights are not finite."""
        self.check_weights()
        begin = self.done - len(self.losses)
        for k, loss in enumerate(self.losses):
            self.log += f"{begin + k + 1},{loss.item():.6g}\n"
        self.losses = []
        rank, _ = processes()
        if rank > 0:
            return
        saved = dict(config=self.config, step=self.done, weights=self.field.state_dict())
        if self.autoencoder:
            saved["autoencoder"] = self.autoencoder
        if self.done < self.config["steps"]:
            saved["optimizer"] = self.optimizer.state_dict()
            saved["schedule"] = self.schedule.state_dict()
        write_run(self.out, checkpoint.pack(saved), self.log_file, self.log.encode())

    def was_finished(self):
        """Whether there was nothing left to do."""
        return self.first == self.config["steps"]

    def finish(self):
        """Write the finished checkpoint, if there was anything left to do."""
        if self.was_finished():
            say(f"{self.out} is finished: {self.first} steps are done; to train longer: "
                f"--init {self.out} --out OTHER.pt")
        else:
            self.save()
            say(f"wrote {self.out}")
        if dist.is_initialized():
            dist.destroy_process_group()


def load_weights(field, weights):
    """Raises BadInput where they are not those of this code's network."""
    try:
        field.load_state_dict(weights)
    except RuntimeError as error:
        raise BadInput(f"the weights are not this code's: {str(error).splitlines()[0]}") from None


def write_run(out, weights, log_file, log):
    """Both files, or neither; but where the log alone cannot be replaced, as while a spreadsheet on
    Windows has it open, a line says so."""
    try:
        write_whole({out: weights, log_file: log})
    except PermissionError as error:
        if error.filename2 != str(log_file.resolve()):
            raise
        say(f"{log_file} cannot be written ({error.strerror}); {out} is")


def rise_and_fall(optimizer, lr, steps):
    """A schedule: the learning rate rises to lr in 5 % of the steps, then falls to 0, as a cosine.
    """
    # 0.05 would make torch divide by 0 at 20 steps, where the rise takes exactly one
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.0501,
                                               cycle_momentum=False)


def seed_of(seed, step, rank):
    """The seed of a step's random numbers, a function of these three alone."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


# ---------------------------------------------------------------- latents

@torch.no_grad()
def encode(vae, images):
    """images (N, 1, 32, 32) uint8 -> latents (N, 4, 8, 8) of variance 1."""
    latents = []
    with checkpoint.autocast(images.device):
        for x in images.split(500):
            latents.append(vae.encode(mnist.to_unit(x)).float())
    return torch.cat(latents)


def load_vae(file, device):
    """The autoencoder in file, its checksum, and what a latent model's checkpoint carries of it."""
    vae, config = checkpoint.load(file, device)
    if config["arch"] != "vae":
        raise BadInput(f"--latent {file}: not an autoencoder of chapters/vae.py")
    if config["step"] < config["steps"]:
        raise BadInput(f"--latent {file}: step {config['step']} of {config['steps']}; "
                       f"python -m chapters.vae --resume --out {file} finishes it")
    weights = vae.state_dict()
    return vae, checkpoint.checksum_of(weights), dict(config=config, weights=weights)
