"""Kinds of faults: what is written and what is read, too much of anything, the terminal."""
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT, error_line, run_line, signal_in
from support import checkpoint, command

TRAIN = "train.py --arch unet --steps 1 --batch 2"
SAMPLE = "sample.py --w 1 --n 2 --steps 1"


# ---------------------------------------------------------------- what is written

@pytest.mark.parametrize("line", ["--ckpt net.png --out net.png", "--out pipe.png"])
def test_a_picture_destroys_nothing_that_is_no_picture(run, unet, capsys, line):
    Path("net.png").write_bytes(unet.read_bytes())
    os.mkfifo("pipe.png")
    assert run(f"{SAMPLE} {line}") == 2
    error_line(capsys)
    assert Path("pipe.png").is_fifo()
    assert Path("net.png").read_bytes() == unet.read_bytes()


def test_two_processes_write_one_file_each_whole(tmp_path):
    """Neither fails, and what a user has under such a name stays, if it is not old."""
    mine = tmp_path / ".a.1.tmp", tmp_path / ".a.probe"
    left = tmp_path / ".a.2.tmp"                # by a process that was killed two hours ago
    for path in (*mine, left):
        path.touch()
    os.utime(left, (time.time() - 7200,) * 2)

    def write_often(letter):
        for _ in range(100):
            command.try_place(tmp_path / "a")
            command.write_whole(tmp_path / "a", letter * 10000)

    fork = get_context("fork")
    both = [fork.Process(target=write_often, args=(letter,)) for letter in (b"x", b"y")]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert set((tmp_path / "a").read_text()) in ({"x"}, {"y"})
    assert sorted(tmp_path.iterdir()) == [*mine, tmp_path / "a"]


def test_a_full_disk_at_the_first_save_leaves_nothing(run, monkeypatch, capsys):
    def fail(file, saved):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save", fail)
    assert run(f"{TRAIN} --out a.pt") == 2
    assert "No space left" in error_line(capsys)
    assert not [*Path().iterdir()]


def test_a_link_stays_a_link_and_its_file_is_written(tmp_path):
    (tmp_path / "link").symlink_to("file")
    for data in (b"new", b"newer"):
        command.write_whole(tmp_path / "link", data)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "file").read_bytes() == data


# ---------------------------------------------------------------- what is read

def spoil(saved, part, value):
    """A change of a checkpoint's dict, at a path of keys and numbers."""
    *parents, last = [int(key) if key == "0" else key for key in part.split("/")]
    for key in parents:
        saved = saved[key]
    if value is None:
        del saved[last]
    else:
        saved[last] = value


@pytest.fixture(scope="module")
def halfway(tmp_path_factory, few):
    """The unfinished checkpoint of a run of 9 steps, at step 4."""
    file = tmp_path_factory.mktemp("halfway") / "a.pt"
    with signal_in(4):
        assert run_line(f"{LINE} --out {file}", few) == 130
    return file


LINE = "train.py --arch unet --predict z --times logit-normal --steps 9 --batch 8"
NAN = torch.full((32,), torch.nan)


@pytest.mark.parametrize("use, part, value", [
    (use, part, value) for use in ("--init bad.pt --out new.pt", "--resume --out bad.pt")
    for part, value in (("weights", None), ("weights", {1: 2}), ("weights/net.norm.bias", NAN),
                        ("config/net", dict(layers=1)))
] + [("--resume --out bad.pt", part, value) for part, value in (
    ("optimizer", None), ("optimizer/state", {}), ("optimizer/state/0", 3),
    ("optimizer/state/0/exp_avg", None), ("optimizer/state/0/exp_avg", torch.zeros(7)),
    ("optimizer/param_groups", None), ("optimizer/param_groups/0/lr", "x"), ("schedule", 3),
    ("schedule/last_epoch", "x"), ("schedule", {}), ("schedule/total_steps", 5),
    ("schedule/_schedule_phases", []))])
def test_a_damaged_checkpoint_starts_no_run(run, halfway, capsys, use, part, value):
    """With a right checksum: parts that are missing, of another network, type or shape, or not
    finite."""
    saved = checkpoint.read(halfway)
    spoil(saved, part, value)
    checkpoint.save("bad.pt", saved)
    before = Path("bad.pt").read_bytes()
    assert run(f"{LINE} {use}") == 2
    error_line(capsys)
    assert Path("bad.pt").read_bytes() == before


@pytest.mark.parametrize("scale", [0.0, torch.nan])
def test_an_autoencoder_that_decodes_nothing_is_damaged(run, capsys, scale):
    """scale = 0 would divide by 0; of a latent model's own autoencoder too."""
    assert run("chapters.vae --steps 1 --batch 8 --out v.pt") == 0
    assert run("train.py --arch dit --latent v.pt --steps 1 --batch 2 --out latent.pt") == 0
    for file, part in (("v.pt", "weights/scale"), ("latent.pt", "autoencoder/weights/scale")):
        saved = checkpoint.read(file)
        spoil(saved, part, torch.tensor(scale))
        checkpoint.save(file, saved)
    capsys.readouterr()
    assert run("train.py --arch dit --latent v.pt --steps 1 --batch 2 --out a.pt") == 2
    assert "not finite" in error_line(capsys)
    for autoencoder in (saved["autoencoder"], {1: 2}):
        checkpoint.save("latent.pt", dict(saved, autoencoder=autoencoder))
        assert run(f"{SAMPLE} --ckpt latent.pt") == 2
        assert re.search("damaged|not finite", error_line(capsys))


@pytest.mark.parametrize("make", [
    lambda file: file.symlink_to("nowhere"), os.mkfifo, Path.mkdir,
    lambda file: file.write_text("damaged")])
def test_what_lies_in_runs_is_in_nobodys_way(run, unet, capsys, make):
    """A broken link, a pipe, a folder or a damaged file instead of a classifier is passed over."""
    Path("runs").mkdir()
    make(Path("runs/classifier.pt"))
    assert run(f"{SAMPLE} --ckpt {unet}") == 0
    assert "no classifier has seen these data" in capsys.readouterr().out


def test_a_classifier_guides_on_its_own_data_and_path_only(run, few, unet, capsys):
    """Of another path it still says the label accuracy; of other data not even that."""
    assert run("chapters.classifier --steps 1 --batch 8 --path ddpm") == 0
    assert run(f"{SAMPLE} --ckpt {unet} --guidance classifier") == 2
    assert "--path" in error_line(capsys)
    assert run(f"{SAMPLE} --ckpt {unet}") == 0
    assert "label accuracy" in capsys.readouterr().out
    with np.load(few) as npz:
        np.savez("other.npz", **{key: npz[key][5:] for key in npz})
    assert run("chapters.classifier --steps 1 --batch 8 --data other.npz --overwrite") == 0
    assert run(f"{SAMPLE} --ckpt {unet}") == 0
    assert "no classifier has seen these data" in capsys.readouterr().out


# ---------------------------------------------------------------- too much, other machines

@pytest.mark.parametrize("line", [
    f"{TRAIN} --batch 20000000 --data FEW --out RUN/a.pt", f"{SAMPLE} --n 1000000000 --ckpt UNET"])
def test_what_does_not_fit_into_memory_is_one_line(tmp_path, few, unet, line):
    """In a process that may have 8 GB."""
    limit = 8 * 2**30
    line = line.replace("FEW", str(few)).replace("UNET", str(unet)).replace("RUN", str(tmp_path))
    done = subprocess.run([sys.executable, *line.split()], cwd=ROOT, text=True, capture_output=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "out of memory" in done.stderr


WHOLE = dict(RANK="0", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.mark.parametrize("change", [
    dict(RANK=""), dict(RANK="2"), dict(WORLD_SIZE="0"), dict(WORLD_SIZE="x"),
    dict(MASTER_ADDR=""), dict(MASTER_PORT="x")])
def test_torchruns_variables_are_whole_or_one_line_says_so(run, monkeypatch, capsys, change):
    for name, value in (WHOLE | change).items():
        monkeypatch.setenv(name, value)
    assert run(TRAIN) == 2
    assert "torchrun" in error_line(capsys)


@pytest.mark.parametrize("line, device", [
    (TRAIN, "hpu"), (TRAIN, "meta"), (SAMPLE, "cuda:99"), ("chapters.classifier", "tpu"),
    ("chapters.vae", "''")])
def test_a_device_that_is_not_there_is_one_line(run, capsys, line, device):
    assert run(f"{line} --device {device}") == 2
    assert "try --device cpu" in error_line(capsys)


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    """cuda:LOCAL_RANK under torchrun."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(command.BadInput, match="cuda:99"):
        checkpoint.pick_device(None)


def test_commands_work_whatever_the_default_type_is(run, few):
    """After a user's torch.set_default_dtype(torch.float64)."""
    torch.set_default_dtype(torch.float64)
    try:
        assert run("chapters.vae --steps 1 --batch 2 --out v.pt") == 0
        assert run("chapters.classifier --steps 1 --batch 2") == 0
        assert run("train.py --arch dit --latent v.pt --steps 1 --batch 2 --out a.pt") == 0
        assert run(f"{TRAIN} --out b.pt") == 0
        for line in ("--ckpt a.pt", "--ckpt b.pt --guidance classifier"):
            assert run(f"{SAMPLE} {line}") == 0
    finally:
        torch.set_default_dtype(torch.float32)


def test_progress_needs_no_clock_no_terminal_and_no_torchrun(run, unet, monkeypatch, capsys):
    """A clock that stands still; a stream in stdout's place; WORLD_SIZE alone, as a cluster's shell
    may have it."""
    monkeypatch.setattr(command.Progress, "is_due", lambda self: True)
    monkeypatch.setattr(time, "monotonic", lambda: 7.0)
    monkeypatch.setattr(os, "isatty", lambda number: True)
    assert run(f"{TRAIN} --out a.pt") == 0
    assert run(f"{TRAIN} --lr 1 --out a.pt") == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(f"{SAMPLE} --ckpt {unet}") == 0
    said = capsys.readouterr()
    assert "\033" not in said.out + said.err


class NoDoubles(TorchDispatchMode):
    """Apple's MPS has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        assert getattr(out, "dtype", None) != torch.float64 or out.ndim == 0
        return out


def test_no_command_makes_tensors_of_float64(run):
    """But for numbers, which are on the CPU."""
    with NoDoubles():
        assert run(f"{TRAIN} --out a.pt") == 0
        assert run("chapters.classifier --steps 1 --batch 2") == 0
        for sampler in ("em", "ddpm", "pc"):
            assert run(f"{SAMPLE} --ckpt a.pt --sampler {sampler}") == 0


def test_only_weights_and_data_are_found_from_another_folder(run, unet, monkeypatch, capsys):
    """runs/ of the clone holds other networks than that of this folder."""
    Path("clone/runs").mkdir(parents=True)
    for name in ("mine", "classifier"):
        Path(f"clone/runs/{name}.pt").write_bytes(unet.read_bytes())
    monkeypatch.setattr(command, "HERE", Path("clone").resolve())
    assert run(f"{SAMPLE} --ckpt runs/mine.pt") == 2
    assert "no such file" in error_line(capsys)
    Path("clone/runs").rename("clone/weights")
    assert run(f"{SAMPLE} --ckpt weights/mine.pt") == 0


def test_a_home_is_expanded_in_every_path(run, few, monkeypatch):
    """--out=~/x.pt, which the shell leaves alone, makes no folder named ~."""
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    Path("home").mkdir()
    Path("home/few.npz").write_bytes(few.read_bytes())
    assert run("chapters.vae --steps 1 --batch 2 --data=~/few.npz --out=~/v.pt") == 0
    assert run(f"{TRAIN} --latent=~/v.pt --out=~/a.pt") == 0
    assert run(f"{TRAIN} --latent=~/v.pt --init=~/a.pt --out=~/b.pt") == 0
    assert run(f"{SAMPLE} --ckpt=~/b.pt --out=~/s.png") == 0
    assert not Path("~").exists()
    assert {"a.csv", "b.pt", "s.png"} < {path.name for path in Path("home").iterdir()}


# ---------------------------------------------------------------- the terminal

@pytest.mark.parametrize("line, redirect, status, lines", [
    (f"{SAMPLE} --ckpt UNET", "| true", 1, 0), (f"{SAMPLE} --ckpt UNET", "> /dev/full", 2, 1),
    (f"{SAMPLE} --ckpt UNET", ">&-", 0, 0), ("chapters.oracle", "> /dev/full", 2, 1),
    (f"{SAMPLE} --ckpt UNET --out \u03b5.png", "", 0, 0), ("train.py --help", "| true", 1, 0),
    ("train.py --help", "> /dev/full", 1, 0), (f"{TRAIN} --data FEW --out a.pt", "| true", 0, 0)])
def test_a_stdout_that_takes_nothing_is_silence_or_one_line(run, few, unet, line, redirect, status,
                                                            lines):
    """A reader that went away, a full disk, a closed stdout, a terminal of ascii alone. Training
    goes on."""
    line = line.replace("UNET", str(unet)).replace("FEW", str(few))
    environment = dict(os.environ, PYTHONIOENCODING="ascii", PYTHONUNBUFFERED="")
    command_line = f"set -o pipefail; {sys.executable} {ROOT}/{line} {redirect}"
    done = subprocess.run(["bash", "-c", command_line], text=True, capture_output=True,
                          env=environment)
    assert done.returncode == status
    assert done.stderr.count("\n") == lines
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error, status", [
    (command.BadInput("wrong"), 2), (OSError(28, "No space left"), 2), (MemoryError(), 2),
    (torch.OutOfMemoryError("CUDA"), 2), (KeyboardInterrupt(), 130),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2)])
def test_what_a_user_can_cause_is_one_line_and_a_status(capsys, error, status):
    """And a mistake of ours is a traceback."""
    def main(error=error):
        raise error

    assert command.execute(main) == status
    assert len(capsys.readouterr().err.splitlines()) == (status == 2)
    with pytest.raises(RuntimeError):
        command.execute(lambda: main(RuntimeError("a bug")))


def test_training_in_a_thread_needs_no_signals(run, few):
    """As in a notebook's thread: it ends well, and Ctrl-C is as it was."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    status = []
    thread = threading.Thread(target=lambda: status.append(run(f"{TRAIN} --out a.pt")))
    thread.start()
    thread.join()
    assert status == [0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

