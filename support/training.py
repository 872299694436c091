"""What surrounds a training loop: options, where a run stands, progress, files, processes.

    run = Training(options, config, net, optimizer, schedule)
    for step in run.steps():        # from where the run stands; shows progress, saves, minds Ctrl-C
        ...                         # one step, as train.py writes it out
        run.record(loss)
    run.finish()
"""
import copy
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from support import checkpoint, mnist
from support.checkpoint import NETWORKS
from support.command import (BadInput, Interrupt, Progress, file_name, number, processes, say,
                             try_place, write_whole)

HEADER = "step,loss\n"         # of the log


def add_options(parser, arch=None):
    """The options of every training command; arch: the network, where the command trains one only.
    """
    add = parser.add_argument
    many = number(int, 1, 1e9)
    own = NETWORKS.get(arch, {})
    out = f"runs/{arch}.pt" if arch else None
    for name, kind, text in (("steps", many, "how many"), ("batch", many, "images a step"),
                             ("lr", number(float, 1e-9, 1e3), "peak learning rate")):
        add(f"--{name}", type=kind, default=own.get(name),
            help=f"{text} ({own.get(name, 'see below')})")
    add("--seed", type=number(int, 0, 2**32), default=0, help="of all that is random (0)")
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
    add("--device", help="as torch names it: cpu, cuda, mps (cuda where there is one, else cpu)")


def prepare_out(options):
    """Raise BadInput where --out cannot be written, or must not replace what is there."""
    out = Path(options.out)
    _, world = processes()
    if options.batch % world:
        raise BadInput(f"--batch {options.batch} cannot be shared by {world} processes")
    if out.suffix != ".pt" or options.out.endswith("/"):
        raise BadInput(f"--out {options.out!r}: expected the name of a file that ends in .pt")
    try_place(out)
    if out.exists():
        saved = checkpoint.read(out)
        if not is_finished(saved) and not (options.resume or options.overwrite):
            raise BadInput(f"--out {out} is an unfinished run (step {saved['step']}): add --resume "
                           "or --overwrite, or choose another --out")
    log = out.with_suffix(".csv")
    try_place(log)
    if log.exists() and not log.read_text(errors="replace").startswith(HEADER):
        raise BadInput(f"{log} is not the log of a training run: choose another --out")


def is_finished(saved):
    return saved["step"] == saved["config"]["steps"]


def changes(saved, config, keys):
    """In words, what the config of a checkpoint has otherwise. Old files may lack keys."""
    theirs = config | saved["config"]
    return ", ".join(f"{key} ({theirs[key]}, here {config[key]})" for key in keys
                     if theirs[key] != config[key])


def describe(options, arch, data, **more):
    """config: all that a run depends on. It must not change when a run is resumed.

    data: what mnist.load returns.
    """
    images, labels, x_test, y_test = data
    crc = zlib.crc32(labels.numpy(), zlib.crc32(images.numpy()))
    return dict(arch=arch, net={}, latent=False, predict=None, path=None, steps=options.steps,
                batch=options.batch, lr=options.lr, seed=options.seed, init=options.init,
                data=crc, labels=labels.unique().tolist(),
                real_diversity=mnist.diversity(x_test, y_test)) | more


def rise_and_fall(optimizer, lr, steps):
    """A schedule: the learning rate rises to lr in 5 % of the steps, then falls to 0, as a cosine.
    """
    # 0.05 would make torch divide by 0 at 20 steps, where the rise takes exactly one
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.0501,
                                               cycle_momentum=False)


def share_of_batch(batch):
    """How many images of a batch this process takes."""
    _, world = processes()
    return batch // world


def seed_of(seed, step, rank):
    """The seed of a step's random numbers, a function of these three alone."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def share_gradients(net):
    """The net as every process trains it: with gradients averaged over all processes."""
    _, world = processes()
    if world == 1:
        return net
    device = next(net.parameters()).device
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return torch.nn.parallel.DistributedDataParallel(net)


class Training:
    """A run of training, from new weights, --init's weights, or where --out stands (--resume).

    Its random numbers depend on (seed, step, process) alone, so on a CPU a resumed run equals one
    that was not interrupted, to the bit. After every --save-every steps it writes the checkpoint
    and, beside it, a .csv of all steps and losses.
    """

    def __init__(self, options, config, net, optimizer, schedule, autoencoder=None):
        self.out = Path(options.out)
        self.save_every = options.save_every
        self.config = config
        self.net = net
        self.optimizer = optimizer
        self.schedule = schedule
        self.autoencoder = autoencoder          # of a latent model: its config and weights
        self.done = 0
        self.losses = []                        # tensors, of the steps since the last save
        self.log = HEADER
        if self.out.exists():
            self.meet(checkpoint.read(self.out), options)
        if self.done == 0 and options.init is not None:
            self.start_from(options.init)
        self.first = self.done
        parameters = sum(p.numel() for p in net.parameters())
        say(f"{config['arch']}: {parameters:,} parameters, steps {self.done} to {config['steps']} "
            f"of {config['batch']} images, to {self.out}")

    def start_from(self, file):
        saved = checkpoint.read(file)
        changed = changes(saved, self.config, ("arch", "net", "predict", "latent"))
        if changed:
            raise BadInput(f"--init {file} has another {changed}")
        checkpoint.rebuild(saved["config"], saved["weights"], file)     # raises BadInput
        self.net.load_state_dict(saved["weights"])
        say(f"from the weights of {file}, step {saved['step']} of {saved['config']['steps']}")

    def meet(self, saved, options):
        """Go on from the checkpoint that is at --out, or say that it is replaced; else BadInput."""
        # not real_diversity: data decides it, but its last bits vary with the threads
        keys = [key for key in self.config if key != "real_diversity"]
        changed = changes(saved, self.config, keys)
        if changed and (options.resume or not options.overwrite):
            raise BadInput(f"{self.out} has another {changed}: choose another --out, or replace it "
                           f"by --overwrite; --init {self.out} starts from its weights")
        if options.resume:
            self.restore(saved)
        else:
            say(f"{self.out}, step {saved['step']} of {saved['config']['steps']}, is replaced")

    def restore(self, saved):
        checkpoint.rebuild(saved["config"], saved["weights"], self.out)         # raises BadInput
        self.done = saved["step"]
        if is_finished(saved):
            self.net.load_state_dict(saved["weights"])
        else:
            try:
                self.try_states(copy.deepcopy(saved))
                self.load_states(saved)
            except Exception:                   # a forged state may fail anywhere
                raise checkpoint.damaged(self.out) from None
        log = self.out.with_suffix(".csv")
        if log.exists():
            lines = log.read_text(errors="replace").splitlines(keepends=True)
            self.log = "".join(lines[:1 + self.done])

    def load_states(self, saved):
        self.net.load_state_dict(saved["weights"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])

    def try_states(self, saved):
        """Go on from a copy of a checkpoint, with gradients of 0; raises anything where its states
        are not those of this run."""
        self.load_states(saved)
        if self.schedule.last_epoch != self.done or not saved["optimizer"]["state"]:
            raise ValueError
        for p in self.net.parameters():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        for _ in range(self.done, self.config["steps"]):
            self.schedule.step()

    def was_finished(self):
        """Whether there was nothing left to do."""
        return self.first == self.config["steps"]

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
        if not checkpoint.are_finite(self.net.state_dict()):
            raise BadInput(f"the weights are not finite after step {self.done}: lower --lr; "
                           f"{self.out} stays as it was")

    def save(self):
        """Write the log and the checkpoint. Raises BadInput where the weights are not finite."""
        self.check_weights()
        start = self.done - len(self.losses)
        for k, loss in enumerate(self.losses):
            self.log += f"{start + k + 1},{loss.item():.6g}\n"
        self.losses = []
        rank, _ = processes()
        if rank > 0:
            return
        saved = dict(config=self.config, step=self.done, weights=self.net.state_dict())
        if self.autoencoder:
            saved["autoencoder"] = self.autoencoder
        if self.done < self.config["steps"]:
            saved["optimizer"] = self.optimizer.state_dict()
            saved["schedule"] = self.schedule.state_dict()
        log = self.out.with_suffix(".csv")
        is_first = not log.exists()
        write_whole(log, self.log.encode())
        try:
            checkpoint.save(self.out, saved)
        except OSError:                         # a full disk: no log without a checkpoint
            if is_first:
                log.unlink()
            raise

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


# ---------------------------------------------------------------- latents

@torch.no_grad()
def encode(vae, images):
    """images (N, 1, 32, 32) uint8 -> latents (N, 4, 8, 8) of variance 1."""
    latents = []
    with checkpoint.autocast(images.device):
        for x in images.split(500):
            latents.append(vae.encode(mnist.to_unit(x)).float())
    return torch.cat(latents)


def load_latents(file, config, images):
    """The latents of images by the autoencoder in file, and what the checkpoint keeps of it.

    config becomes that of a latent model. Raises BadInput.
    """
    vae, vae_config = checkpoint.load(file, images.device)
    if vae_config["arch"] != "vae":
        raise BadInput(f"--latent {file}: not an autoencoder of chapters/vae.py")
    if vae_config["step"] < vae_config["steps"]:
        raise BadInput(f"--latent {file}: step {vae_config['step']} of {vae_config['steps']}; "
                       f"python -m chapters.vae --resume --out {file} finishes it")
    autoencoder = dict(config=vae_config, weights=vae.state_dict())
    config["net"] = config["net"] | NETWORKS[config["arch"]]["latent"]
    config["latent"] = checkpoint.checksum_of(autoencoder["weights"])
    return encode(vae, images), autoencoder
