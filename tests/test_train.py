"""train.py and the trainings of chapters/ as users run them; files, interrupts, processes."""
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT, error_line, signal_in, weights

import train
from cfg_min import NULL, cfg_cfm_loss
from paths import PATHS, CondOT
from support import checkpoint, command, mnist, training
from unet import UNet

SHORT = "train.py --arch unet --steps 6 --batch 8"


def losses(file):
    """The losses in the log of a training run."""
    return np.loadtxt(file, delimiter=",", skiprows=1)[:, 1]


class Zero(nn.Module):
    """A network that returns 0, and remembers what it is given in training."""

    calls = []

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.zeros(()))

    def forward(self, x, t, y):
        if self.training:                       # it is tried once before
            Zero.calls.append((x, t, y))
        return self.p * x


@pytest.fixture
def grey(run, monkeypatch):
    """Digit k is a square of the grey level 20 k + 10; the U-Net is Zero."""
    y = np.arange(1000) % 10
    x = np.broadcast_to(20 * y[:, None, None] + 10, (1000, 28, 28))
    np.savez("grey.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setitem(checkpoint.NETWORKS["unet"], "net", f"{__name__}.Zero")
    monkeypatch.setitem(checkpoint.NETWORKS["unet"], "eps", {})
    monkeypatch.setattr(Zero, "calls", [])
    line = "train.py --arch unet --data grey.npz --steps 2 --batch 500 --lr 1e-9 --out a.pt"
    return lambda options: run(f"{line} {options}")


@pytest.mark.parametrize("predict", ["u", "z", "eps"])
@pytest.mark.parametrize("name", PATHS)
def test_the_loss_is_that_of_what_the_network_predicts(grey, name, predict):
    """|| u_theta - u_t(x|z) ||^2, where u_theta or z_theta is 0, or || 0 - eps ||^2; in the csv."""
    path = PATHS[name]
    assert grey(f"--eta 0 --path {name} --predict {predict}") == 0
    for (x, t, y), loss in zip(Zero.calls, losses("a.csv"), strict=True):
        inside = (20 * y + 10).view(-1, 1, 1, 1).expand(-1, 1, 28, 28)
        z = mnist.to_unit(F.pad(inside, (2, 2, 2, 2)))
        at_t = t.view(-1, 1, 1, 1)
        eps = (x - path.alpha(at_t) * z) / path.beta(at_t)      # if z is the digit of label y
        assert abs(eps.std() - 1) < 0.01
        u = path.data_to_u(0 * x, x, t.clamp(max=0.98)) if predict == "z" else 0 * x
        target = eps if predict == "eps" else path.target(z, eps, t)
        assert loss == pytest.approx(F.mse_loss(u, target).item(), rel=1e-3)


@pytest.mark.parametrize("options, eta, mean, std", [
    ("", 0.1, 0.5, 0.289), ("--eta 0.4 --times logit-normal", 0.4, 0.336, 0.156)])
def test_training_sees_pairs_labels_dropped_with_eta_and_its_times(grey, options, eta, mean, std):
    """The lecture's eta = 0.1 and t ~ U[0, 1) by default; the moments of the logit-normal t."""
    assert grey(options) == 0
    _, t, y = (torch.cat(parts) for parts in zip(*Zero.calls))
    assert abs((y == NULL).double().mean() - eta) < 0.05
    assert abs(t.mean() - mean) < 0.03
    assert abs(t.std() - std) < 0.02


@pytest.mark.parametrize("steps, top", [(1, 0), (20, 0), (1000, 50)])
def test_the_learning_rate_rises_to_lr_and_falls_to_0(steps, top):
    """In 5 % of the steps; for any number of steps."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = training.rise_and_fall(optimizer, 2.0, steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert abs(rates.index(max(rates)) - top) <= 1
    assert steps < 1000 or max(rates) == pytest.approx(2.0, rel=1e-4)
    assert rates[-1] < 0.1 or steps == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_resumes_to_the_same_bits(run, capsys, number):
    """It saves, says so and gives status 130; --resume ends as if nothing was."""
    assert run(f"{SHORT} --out whole.pt") == 0
    with signal_in(2, number):
        assert run(f"{SHORT} --out half.pt") == 130
    said = capsys.readouterr().out.splitlines()[-1]
    assert "step 2 of 6 to half.pt" in said
    assert "--resume" in said
    assert run(f"{SHORT} --out half.pt --resume") == 0
    assert Path("half.pt").read_bytes() == Path("whole.pt").read_bytes()
    assert Path("half.csv").read_text() == Path("whole.csv").read_text()


def test_a_handler_that_python_does_not_know_stays(run, monkeypatch):
    """getsignal gives None where C code has set it; the run ends as if there was none."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    assert run(f"{SHORT} --out whole.pt") == 0


def test_a_signal_that_the_parent_ignores_stays_ignored(run):
    """As in a script's background job, whose terminal gets a Ctrl-C."""
    with signal_in(2, handler=signal.SIG_IGN):
        assert run(f"{SHORT} --out whole.pt") == 0


def test_a_run_that_dies_goes_on_from_what_it_saved(run, monkeypatch):
    """As of kill -9 or a full memory: after --save-every steps there is a whole checkpoint."""
    def die(self, asked):
        if self.done == 5:
            raise KeyError

    assert run(f"{SHORT} --out whole.pt") == 0
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(training.Run, "agree", die)
        run(f"{SHORT} --save-every 2 --out half.pt")
    assert checkpoint.read("half.pt")["step"] == 4
    assert run(f"{SHORT} --out half.pt --resume") == 0
    assert Path("half.pt").read_bytes() == Path("whole.pt").read_bytes()


def test_init_starts_from_the_weights_of_another_run(run, unet):
    """A run that learns nothing ends with them."""
    assert run(f"{SHORT} --predict z --lr 1e-9 --init {unet} --out more.pt") == 0
    for name, value in weights(unet).items():
        torch.testing.assert_close(weights("more.pt")[name], value, atol=1e-6, rtol=0)


def test_latent_models_carry_their_autoencoder(run, monkeypatch, tmp_path):
    """A latent model samples from any folder, after its autoencoder's file is gone."""
    assert run("chapters.vae --steps 3 --batch 8 --out v.pt") == 0
    assert run("train.py --arch dit --latent v.pt --steps 3 --batch 8 --out latent.pt") == 0
    scale = weights("v.pt")["scale"]
    Path("v.pt").unlink()
    monkeypatch.chdir(tmp_path.parent)
    out = tmp_path / "a.png"
    assert run(f"sample.py --w 3 --ckpt {tmp_path}/latent.pt --n 10 --steps 2 --out {out}") == 0
    vae = checkpoint.load_autoencoder(tmp_path / "latent.pt")
    assert vae.scale == scale != 1


def test_latents_have_variance_1(run, few):
    """chapters.vae sets scale so that the latents of the data have standard deviation 1, also where
    a save or Ctrl-C falls into the last step."""
    with signal_in(20):
        assert run("chapters.vae --steps 20 --batch 16 --save-every 20 --out v.pt") == 0
    vae, _ = checkpoint.load("v.pt")
    latents = training.encode(vae, mnist.load(few)[0])
    assert latents.shape == (300, 4, 8, 8)
    assert abs(latents.std() - 1) < 0.02


def test_two_processes_share_the_batch(run, few):
    """torchrun's losses are those of one process that takes both halves of each batch itself."""
    line = (f"-m torch.distributed.run --standalone --nproc_per_node=2 {ROOT}/train.py --arch unet "
            f"--steps 4 --batch 8 --lr 0.05 --data {few} --out two.pt")
    done = subprocess.run([sys.executable, *line.split()], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote two.pt") == 1
    images, labels, _, _ = mnist.load(few)
    torch.manual_seed(0)
    net = UNet()
    optimizer = torch.optim.AdamW(net.parameters(), 0.05)
    schedule = training.rise_and_fall(optimizer, 0.05, 4)
    for step, loss in enumerate(losses("two.csv")):
        halves = []
        for rank in range(2):
            torch.manual_seed(training.seed_of(0, step, rank))
            z, y = mnist.draw_batch(images, labels, 4)
            with checkpoint.autocast(torch.device("cpu")):
                halves.append(cfg_cfm_loss(net, CondOT(), z, y, 0.1, torch.rand(4)))
        assert halves[0] != halves[1]           # of other digits
        mean = sum(halves) / 2
        assert loss == pytest.approx(mean.item(), rel=0.01)  # bfloat16 rounds
        optimizer.zero_grad()
        mean.backward()
        optimizer.step()
        schedule.step()


def test_how_a_run_begins_is_one_decision():
    """New, goes on, replaces; decided from two configurations, without training."""
    def begin(step=None, init=None, overwrite=False, resume=False, **changed):
        config = dict(arch="unet", net={}, predict="u", latent=False, classes=10, steps=9,
                      init=init)
        saved = step and dict(step=step, config=config | changed)
        init = init and dict(config=config | dict(arch=init))
        options = SimpleNamespace(out="a.pt", init="b.pt", overwrite=overwrite, resume=resume)
        return training.decide(options, config, saved, init)

    assert begin() == begin(resume=True) == begin(init="unet") == "new"
    assert begin(9) == begin(5, overwrite=True) == begin(9, overwrite=True, lr=7) == "replaces"
    assert begin(5, resume=True) == begin(9, resume=True) == "goes on"
    for refused, says in ((dict(step=5), "unfinished"), (dict(step=9, steps=5), "other options"),
                          (dict(step=5, resume=True, overwrite=True, steps=5), "other options"),
                          (dict(init="dit"), "another network")):
        with pytest.raises(command.BadInput, match=says):
            begin(**refused)


def test_init_is_remembered_by_its_weights(run, unet):
    """The same file under another name is the same start."""
    Path("copy.pt").write_bytes(unet.read_bytes())
    line = f"{SHORT} --predict z --out more.pt"
    with signal_in(3):
        assert run(f"{line} --init {unet}") == 130
    assert run(f"{line} --init ./copy.pt --resume") == 0


def test_processes_that_do_not_see_the_checkpoint_do_not_go_on(run, few, tmp_path):
    """Two processes in two folders, one of which has the unfinished run."""
    with signal_in(3):
        assert run(f"{SHORT} --out a.pt") == 130
    (tmp_path / "other").mkdir()
    (tmp_path / "start.py").write_text(
        "import os, sys\nos.chdir(['.', 'other'][int(os.environ['RANK'])])\n"
        f"sys.path.insert(0, {ROOT!r})\nimport train\n"
        "sys.exit(train.execute(lambda: train.main(sys.argv[1:])))\n")
    line = (f"-m torch.distributed.run --standalone --nproc_per_node=2 start.py --arch unet "
            f"--steps 6 --batch 8 --data {few} --out a.pt --resume")
    before = Path("a.pt").read_bytes()
    done = subprocess.run([sys.executable, *line.split()], capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode != 0
    assert "some processes begin at step 0, others at 3" in done.stderr
    assert Path("a.pt").read_bytes() == before


@pytest.mark.parametrize("step, options, says", [
    (4, "", ""), (4, "--lr 0.1", "lr 0.002 (here 0.1)"), (4, "--lr 0.1 --overwrite", ""),
    (2, "", "--resume or --overwrite"), (2, "--overwrite", "")])
def test_only_a_finished_run_of_the_same_configuration_is_replaced_unasked(run, unet, capsys, step,
                                                                           options, says):
    """Others by --overwrite; a line says which one is replaced, or what to do."""
    Path("a.pt").write_bytes(checkpoint.pack(dict(checkpoint.read(unet), step=step)))
    before = Path("a.pt").read_bytes()
    line = "train.py --arch unet --predict z --times logit-normal --steps 4 --batch 8 --out a.pt"
    status = run(f"{line} {options}")
    if says:
        assert status == 2
        assert says in error_line(capsys)
        assert Path("a.pt").read_bytes() == before
    else:
        assert status == 0
        assert f"a.pt, step {step} of 4, is replaced" in capsys.readouterr().out
        assert checkpoint.load("a.pt")[1]["step"] == 4


class TenLabels(Zero):
    """A network that forgot the eleventh embedding, or that knows t as a number alone."""

    def forward(self, x, t, y):
        return nn.functional.embedding(y, torch.zeros(10, 1)) * x


class OneTime(Zero):
    def forward(self, x, t, y):
        return x + t


@pytest.mark.parametrize("net", ["TenLabels", "OneTime"])
def test_a_mistake_in_a_network_shows_before_the_first_step_with_what_it_got(grey, monkeypatch,
                                                                             capsys, net):
    """Its own error, after a line that says how the network was called."""
    monkeypatch.setitem(checkpoint.NETWORKS["unet"], "net", f"{__name__}.{net}")
    monkeypatch.setattr(train, "draw_batch", None)
    with pytest.raises((IndexError, RuntimeError)):
        grey("")
    assert "x (2, 1, 32, 32), t (2,) and labels 0 and 10" in error_line(capsys)
    assert not Path("a.pt").exists()


def test_weights_that_are_not_finite_are_never_saved(run, unet, capsys, monkeypatch):
    """A learning rate that blows up is one line, soon, and the good file of before stays."""
    monkeypatch.setattr(training.Progress, "is_due", lambda self: True)
    Path("a.pt").write_bytes(unet.read_bytes())
    assert run("train.py --arch dit --batch 8 --steps 200 --lr 1000 --overwrite --out a.pt") == 2
    said = error_line(capsys)
    assert "lower --lr" in said
    assert "step 200" not in said
    assert Path("a.pt").read_bytes() == unet.read_bytes()
