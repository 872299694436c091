"""train.py, classifier.py and vae.py as users run them; files, interrupts, processes."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import checkpoint
import train
import training
from conftest import ROOT, error_line, same, weights

SHORT = "train.py --arch unet --steps 6 --batch 8"


@pytest.mark.parametrize("options", [
    "", "--predict z --times logit-normal", "--predict eps --path ddpm", "--path cosine --eta 1",
    "--arch dit --predict z",
])
def test_each_recipe_trains_to_a_field_of_finite_values(run, options):
    assert run(f"{SHORT} {options} --out a.pt") == 0
    net, config = checkpoint.load("a.pt")
    assert config["step"] == 6
    u = net(torch.randn(2, 1, 32, 32), torch.tensor([0.0, 1.0]), torch.tensor([3, 10]))
    assert u.shape == (2, 1, 32, 32)
    assert u.isfinite().all()


def test_the_default_is_the_lectures_recipe():
    """The network predicts u, t ~ U[0, 1), eta = 0.1, CondOT."""
    options = train.parse(["--arch", "unet"])
    assert (options.predict, options.times, options.eta, options.path) == (
        "u", "uniform", 0.1, "condot")
    assert train.TIMES["uniform"] is torch.rand


def test_logit_normal_times():
    """logit(t) ~ N(-0.8, 0.8^2)."""
    torch.manual_seed(0)
    logits = train.logit_normal(40000).double().logit()
    assert abs(logits.mean() + 0.8) < 0.02
    assert abs(logits.std() - 0.8) < 0.02


def test_training_sees_pairs_labels_dropped_with_eta_and_its_times(run, monkeypatch):
    """Every z comes with its own label, one label in four is dropped, and draw_t is used."""
    seen = []

    def watch(net, path, z, y, eta, t):
        seen.append((z, y, eta, t))
        return net(z, t, y).square().mean()

    monkeypatch.setattr(train, "cfg_cfm_loss", watch)
    assert run(f"{SHORT} --eta 0.25 --times logit-normal") == 0
    x_train, y_train, _, _ = checkpoint_data(run)
    flat = train.mnist.to_unit(x_train).flatten(1)
    for z, y, eta, t in seen:
        assert eta == 0.25
        assert t.mean() < 0.5
        nearest = torch.cdist(z.flatten(1), flat).argmin(dim=1)
        assert torch.equal(y_train[nearest], y)


def checkpoint_data(run):
    return train.mnist.load(run.keywords["few"])


def test_an_interrupted_run_resumes_to_the_same_bits(run, monkeypatch):
    """Ctrl-C after the second step saves and gives status 130; --resume ends as if nothing was."""
    assert run(f"{SHORT} --out whole.pt") == 0
    record = training.Run.record

    def interrupt(self, loss):
        record(self, loss)
        if self.done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(training.Run, "record", interrupt)
    before = signal.getsignal(signal.SIGINT)
    assert run(f"{SHORT} --out half.pt") == 130
    assert signal.getsignal(signal.SIGINT) == before
    assert checkpoint.read("half.pt")["step"] == 2
    assert Path("half.csv").read_text().count("\n") == 3
    monkeypatch.setattr(training.Run, "record", record)
    assert run(f"{SHORT} --out half.pt --resume") == 0
    assert same(weights("half.pt"), weights("whole.pt"))
    assert Path("half.csv").read_text() == Path("whole.csv").read_text()


def test_a_killed_run_keeps_what_it_saved_and_sigterm_saves(run, few):
    """kill -9 leaves the last whole checkpoint; SIGTERM writes one, and the status is 130."""
    command = [sys.executable, f"{ROOT}/train.py", "--arch", "unet", "--steps", "100000", "--batch",
               "4", "--data", str(few), "--save-every", "1", "--out"]
    killed = subprocess.Popen([*command, "killed.pt"], stdout=subprocess.DEVNULL)
    ended = subprocess.Popen([*command, "ended.pt"], stdout=subprocess.DEVNULL)
    while not (Path("killed.pt").exists() and Path("ended.pt").exists()):
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    ended.send_signal(signal.SIGTERM)
    assert ended.wait() == 130
    killed.wait()
    for name in ("killed", "ended"):
        step = checkpoint.read(f"{name}.pt")["step"]
        assert 0 < step < 100000
        assert Path(f"{name}.csv").read_text().count("\n") >= 1 + step


def test_init_starts_from_the_weights_of_another_run(run, unet):
    """The first loss of the new run is that of the old weights, not that of fresh ones."""
    again = f"{SHORT} --predict z --times logit-normal --lr 1e-9"
    assert run(f"{again} --init {unet} --out more.pt") == 0
    for name, value in weights(unet).items():
        torch.testing.assert_close(weights("more.pt")[name], value, atol=1e-6, rtol=0)
    assert checkpoint.load("more.pt")[1]["step"] == 6


def test_latent_models_carry_their_autoencoder(run, monkeypatch, tmp_path):
    """A latent model samples from any folder, after its autoencoder's file is gone."""
    assert run("vae.py --steps 3 --batch 8 --out v.pt") == 0
    assert run("train.py --arch dit --latent v.pt --steps 3 --batch 8 --out latent.pt") == 0
    scale = weights("v.pt")["scale"]
    Path("v.pt").unlink()
    monkeypatch.chdir(tmp_path.parent)
    out = tmp_path / "a.png"
    assert run(f"sample.py --w 3 --ckpt {tmp_path}/latent.pt --n 10 --steps 2 --out {out}") == 0
    vae = checkpoint.load_autoencoder(tmp_path / "latent.pt")
    assert vae.scale == scale != 1


def test_latents_have_variance_1(run, few):
    """python vae.py sets scale so that the latents of the data have standard deviation 1."""
    assert run("vae.py --steps 20 --batch 16 --out v.pt") == 0
    vae, _ = checkpoint.load("v.pt")
    latents = train.encode(vae, checkpoint_data(run)[0], torch.device("cpu"))
    assert latents.shape == (300, 4, 8, 8)
    assert abs(latents.std() - 1) < 0.02


def test_two_processes_share_the_batch(run, few):
    """torchrun trains; both processes see other digits, and one file is written."""
    line = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"{ROOT}/train.py", "--arch",
            "unet", "--steps", "3", "--batch", "8", "--data", str(few), "--out", "two.pt"]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, *line], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote two.pt") == 1
    assert run(f"{SHORT} --steps 3 --out one.pt") == 0
    two = checkpoint.load("two.pt")[1]
    assert two["batch"] == 8
    assert not same(weights("two.pt"), weights("one.pt"))


# ---------------------------------------------------------------- what is refused

def make_inputs(few):
    """Files that a run must not destroy, by name."""
    Path("folder").mkdir()
    Path("file").write_text("mine")
    Path("text.pt").write_text("mine")
    Path("note.csv").write_text("mine")
    Path("mine.npz").write_bytes(Path(few).read_bytes())
    os.mkfifo("fifo.pt")


@pytest.mark.parametrize("out", [
    "''", ".", "/", "folder", "folder/", "file/a.pt", "file", "text.pt", "note.pt", "mine.npz",
    "fifo.pt", "/proc/a.pt",
])
def test_out_is_tried_before_training_and_nothing_of_others_is_lost(run, few, out, capsys,
                                                                    monkeypatch):
    """One line, status 2, before the first step; no file has changed."""
    make_inputs(few)
    monkeypatch.setattr(training.Run, "steps", None)        # training would be a TypeError
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert run(f"{SHORT} --out {out}") == 2
    error_line(capsys)
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


@pytest.mark.parametrize("line, says", [
    ("--init a.pt --out a.pt", "input"),
    ("--steps 9 --out a.pt --resume", "--init"),
    ("--arch dit --init a.pt --out b.pt", "arch"),
    ("--predict u --init a.pt --out b.pt", "predict"),
    ("--latent a.pt --out b.pt", "autoencoder"),
    ("--latent '' --out b.pt", "not a file"),
    ("--data none.npz", "none.npz"),
    ("--lr 0", "--lr"),
    ("--eta 2", "--eta"),
    ("--device hpu", "--device cpu"),
    ("--steps 1.5", "--steps"),
])
def test_input_that_cannot_be_used_is_one_line_that_says_what_to_do(run, unet, capsys, line, says):
    Path("a.pt").write_bytes(Path(unet).read_bytes())
    assert run(f"{SHORT} --predict z {line}") == 2
    assert says in error_line(capsys)
    assert Path("a.pt").read_bytes() == Path(unet).read_bytes()


def test_an_unfinished_run_is_not_replaced_and_a_finished_one_is(run, unet, capsys):
    saved = checkpoint.read(unet)
    saved["config"]["steps"] = 9
    checkpoint.save("half.pt", saved)
    assert run(f"{SHORT} --out half.pt") == 2
    assert "--resume" in error_line(capsys)
    Path("a.pt").write_bytes(Path(unet).read_bytes())
    assert run(f"{SHORT} --out a.pt") == 0
    assert checkpoint.load("a.pt")[1]["step"] == 6


def test_weights_that_are_not_finite_are_never_saved(run, capsys):
    """A learning rate that blows up is one line, and the good file of before stays."""
    line = "train.py --arch dit --batch 8"
    assert run(f"{line} --steps 2 --out a.pt") == 0
    good = Path("a.pt").read_bytes()
    capsys.readouterr()
    assert run(f"{line} --steps 20 --lr 1000 --out a.pt") == 2
    assert "lower --lr" in error_line(capsys)
    assert Path("a.pt").read_bytes() == good


def test_world_size_without_torchrun_is_one_line(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(SHORT) == 2
    assert "torchrun" in error_line(capsys)


def test_a_batch_beyond_memory_is_one_line(run, capsys):
    assert run(f"{SHORT} --batch 900000000") == 2
    assert "out of memory" in error_line(capsys)
