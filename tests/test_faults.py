"""Kinds of faults: what is written and what is read, too much of anything, the terminal."""
import io
import os
import resource
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT, error_line, signal_in

from support import checkpoint, command, mnist, sampling, training

TRAIN = "train.py --arch unet --steps 1 --batch 2"
SAMPLE = "sample.py --w 1 --n 2 --steps 1"


# ---------------------------------------------------------------- what is asked for

@pytest.mark.parametrize("line, says", [
    (f"{TRAIN} {options}", says) for options, says in (
        ("--out ''", "--out"), ("--out folder.pt", "plain file"), ("--out folder.pt/", "--out"),
        ("--out text.pt/a.pt", "text.pt"), ("--out text.pt", "text.pt"), ("--out note.pt", "log"),
        ("--out pipe.pt", "plain file"), ("--out /proc/a.pt", "/proc"),
        ("--out link.pt --data few.npz", "link.pt"), ("--out lost.pt", "/proc"),
        ("--out net.pt --init net.pt --predict z", "--overwrite"),
        ("--out net.pt --resume --predict z --steps 9", "steps 4 (here 9)"),
        ("--init net.pt --out b.pt", "predict"), ("--latent net.pt --out b.pt", "autoencoder"),
        ("--latent no.pt --out b.pt", "chapters.vae"), ("--out new/er/a.jpg", ".pt"),
        ("--data no.npz --out new/a.pt", "no.npz"), ("--step 3", "--step"),
        ("--eta '3\n'", "--eta"), ("--seed 4294967296", "--seed"),
        ("--data no.npz --out b.pt", "no.npz"), ("--eta 2", "--eta"), ("--steps 1.5", "--steps"),
        ("--device meta", "try --device cpu"))
] + [
    (f"{SAMPLE} {options}", says) for options, says in (
        ("--ckpt no.pt", "no.pt"), ("--ckpt text.pt", "text.pt"), ("--sigma 1", "--sampler em"),
        ("--interval 0.5 0.2", "LOW"), ("--guidance mean", "--sampler ddpm"),
        ("--guidance classifier --away-from 3", "--away-from"), ("--label 10", "null"),
        ("--label seven", "null"), ("--sampler gibbs --steps 1", "--steps"),
        ("--label 3 --away-from 3", "the same"), ("--out a.jpg", ".png"),
        ("--out other.npz", "other.npz"), ("--out text.png", "text.png"),
        ("--out wide.npz", "wide.npz"),
        ("--device mkldnn", "try --device cpu"), ("--ckpt broken.pt", "not finite"),
        ("--w 1 3 --out a.npz", "one --w"), ("--device cuda:99", "try --device cpu"))
])
def test_what_cannot_be_used_is_one_line_that_says_what_to_do(run, few, unet, capsys, monkeypatch,
                                                              line, says):
    """Before the work begins; and what lies in the folder stays as it is."""
    Path("folder.pt").mkdir()
    for name in ("text.pt", "note.csv", "text.png"):
        Path(name).write_text("mine")
    os.mkfifo("pipe.csv")
    Path("lost.pt").symlink_to("/proc/lost/a.pt")
    np.savez("other.npz", mine=np.arange(3))
    np.savez("wide.npz", images=np.zeros((3, 64, 64)), labels=np.arange(3))
    broken = checkpoint.read(unet)
    broken["weights"]["net.last.0.bias"].fill_(torch.nan)
    Path("broken.pt").write_bytes(checkpoint.pack(broken))
    Path("few.npz").write_bytes(few.read_bytes())
    Path("link.pt").symlink_to("few.npz")
    Path("net.pt").write_bytes(unet.read_bytes())
    monkeypatch.setattr(training.Run, "steps", None)        # training would be a TypeError
    before = {path: path.is_file() and path.read_bytes() for path in Path().iterdir()}
    assert run(line) == 2
    assert says in error_line(capsys)
    assert {path: path.is_file() and path.read_bytes() for path in Path().iterdir()} == before


# ---------------------------------------------------------------- what is written

def test_two_processes_write_one_file_each_whole(tmp_path):
    """Neither fails, and nothing else is left."""
    def write_often(letter):
        for _ in range(100):
            command.try_place(tmp_path / "a")
            command.write_whole({tmp_path / "a": letter * 10000})

    fork = get_context("fork")
    both = [fork.Process(target=write_often, args=(letter,)) for letter in (b"x", b"y")]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert set((tmp_path / "a").read_text()) in ({"x"}, {"y"})
    assert [*tmp_path.iterdir()] == [tmp_path / "a"]


@pytest.mark.parametrize("full", [".pt", ".csv"])
def test_a_full_disk_leaves_both_files_as_they_were(run, monkeypatch, capsys, full):
    """Nothing at the first save; afterwards the old checkpoint and its own log."""
    write = Path.write_bytes

    def fail(path, data):
        if f"{full}." in path.name:
            raise OSError(28, "No space left on device")
        return write(path, data)

    before = {}
    for options in ("", "--overwrite --seed 1"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", fail)
            assert run(f"{TRAIN} --out a.pt {options}") == 2
        assert "No space left" in error_line(capsys)
        assert {path.name: path.read_bytes() for path in Path().iterdir()} == before
        assert run(f"{TRAIN} --out a.pt") == 0
        before = {path.name: path.read_bytes() for path in Path().iterdir()}
        capsys.readouterr()


def test_a_log_that_cannot_be_replaced_costs_no_checkpoint(run, monkeypatch, capsys):
    """As while a spreadsheet on Windows has it open."""
    replace = os.replace

    def deny(old, new):
        if new.suffix == ".csv":
            raise PermissionError(13, "denied", str(old), None, str(new))
        replace(old, new)

    monkeypatch.setattr(os, "replace", deny)
    assert run(f"{TRAIN} --out a.pt") == 0
    assert "a.csv cannot be written" in capsys.readouterr().out
    assert [path.name for path in Path().iterdir()] == ["a.pt"]


@pytest.mark.parametrize("lines, says", [(None, "lacks losses"), (2, "lacks losses"), (9, "")])
def test_a_log_that_is_gone_or_cut_or_of_another_run_is_named(run, capsys, lines, says):
    """At --resume, where the finished log has a gap; and where a lone log is replaced."""
    line = "train.py --arch unet --steps 4 --batch 2 --out a.pt"
    with signal_in(3):
        assert run(line) == 130
    log = Path("a.csv").read_text().splitlines(keepends=True)
    Path("a.csv").unlink()
    if lines:
        Path("a.csv").write_text("".join(log[:lines]))
    assert run(f"{line} --resume") == 0
    said = capsys.readouterr().out
    assert ("lacks losses" in said) == bool(says)
    Path("a.pt").unlink()
    assert run(line) == 0
    assert "the log of an earlier run, is replaced" in capsys.readouterr().out


def test_a_write_that_fails_leaves_the_old_file_and_a_link_stays_a_link(tmp_path):
    link, file = tmp_path / "link", tmp_path / "file"
    link.symlink_to("file")
    for data in (b"old", b"new"):
        command.write_whole({link: data})
    with pytest.raises(TypeError):
        command.write_whole({link: "no bytes"})
    assert link.is_symlink()
    assert file.read_bytes() == b"new"
    assert sorted(tmp_path.iterdir()) == [file, link]


# ---------------------------------------------------------------- what is read

def test_a_classifier_guides_on_its_own_data_and_path_only(run, few, unet, capsys):
    """Of another path it still says the label accuracy; of other data, or damaged, not even that.
    """
    assert run("chapters.classifier --steps 1 --batch 8 --path ddpm") == 0
    assert run(f"{SAMPLE} --ckpt {unet} --guidance classifier") == 2
    assert "--path" in error_line(capsys)
    assert run(f"{SAMPLE} --ckpt {unet}") == 0
    assert "label accuracy" in capsys.readouterr().out
    with np.load(few) as npz:
        np.savez("other.npz", **{key: npz[key][5:] for key in npz})
    assert run("chapters.classifier --steps 1 --batch 8 --data other.npz --overwrite") == 0
    assert run(f"{SAMPLE} --ckpt {unet}") == 0
    Path("runs/classifier.pt").write_text("damaged")
    assert run(f"{SAMPLE} --ckpt {unet}") == 0
    assert capsys.readouterr().out.count("no classifier has seen these data") == 2


def test_the_shipped_classifier_judges_where_it_can_and_a_users_own_guides(run, capsys):
    """A classifier of one step in runs/ judges nothing that the shipped one can judge."""
    assert run(f"chapters.classifier --steps 1 --batch 8 --data {mnist.FILE}") == 0
    line = f"{SAMPLE} --ckpt weights/unet.pt --guidance classifier"
    assert run(line) == 0
    assert "by weights/classifier.pt" in capsys.readouterr().out
    options = sampling.parse_options(line.split()[1:])
    _, config = checkpoint.load("weights/unet.pt")
    guiding = sampling.find_way(options, config).keywords["classifier"]
    own = checkpoint.load("runs/classifier.pt")[0].state_dict()
    assert all(torch.equal(own[key], value) for key, value in guiding.state_dict().items())


# ---------------------------------------------------------------- too much, other machines

def test_what_does_not_fit_into_memory_is_one_line(tmp_path, few):
    """In a process that may have 8 GB."""
    limit = 8 * 2**30
    line = f"{TRAIN} --batch 20000000 --data {few} --out {tmp_path}/a.pt"
    done = subprocess.run([sys.executable, *line.split()], cwd=ROOT, text=True, capture_output=True,
                          preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "out of memory" in done.stderr


def test_each_process_takes_a_gpu_of_its_own(monkeypatch):
    """cuda:LOCAL_RANK under torchrun."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(command.BadInput, match="cuda:99"):
        checkpoint.pick_device(None)


class NoDoubles(TorchDispatchMode):
    """Apple's MPS has no float64."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        assert getattr(out, "dtype", None) != torch.float64 or out.ndim == 0
        return out


@contextmanager
def double_by_default():
    """After a user's torch.set_default_dtype(torch.float64)."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("machine", [NoDoubles, double_by_default])
def test_commands_work_with_no_float64_and_with_float64_by_default(run, machine):
    with machine():
        assert run("chapters.vae --steps 1 --batch 2 --out v.pt") == 0
        assert run("chapters.classifier --steps 1 --batch 2") == 0
        assert run("train.py --arch dit --latent v.pt --steps 1 --batch 2 --out a.pt") == 0
        assert run(f"{TRAIN} --out b.pt") == 0
        for options in ("--ckpt a.pt --sampler em", "--ckpt a.pt --sampler ddpm",
                        "--ckpt b.pt --sampler pc", "--ckpt b.pt --guidance classifier"):
            assert run(f"{SAMPLE} {options}") == 0


def test_only_weights_and_data_are_found_from_another_folder(run, unet, monkeypatch, capsys):
    """runs/ of the clone holds other networks than that of this folder."""
    for folder in ("runs", "weights"):
        Path("clone", folder).mkdir(parents=True)
        Path("clone", folder, "mine.pt").write_bytes(unet.read_bytes())
    monkeypatch.setattr(command, "HERE", Path("clone").resolve())
    assert run(f"{SAMPLE} --ckpt runs/mine.pt") == 2
    assert "no such file" in error_line(capsys)
    assert run(f"{SAMPLE} --ckpt weights/mine.pt") == 0


def test_a_home_is_expanded_in_every_path(run, few, monkeypatch):
    """--out=~/x.pt, which the shell leaves alone, makes no folder named ~."""
    monkeypatch.setenv("HOME", str(Path("home").resolve()))
    Path("home").mkdir()
    Path("home/few.npz").write_bytes(few.read_bytes())
    assert run("chapters.vae --steps 1 --batch 2 --data=~/few.npz --out=~/v.pt") == 0
    for options in ("--out=~/a.pt", "--init=~/a.pt --out=~/b.pt"):
        assert run(f"{TRAIN} --latent=~/v.pt {options}") == 0
    assert run(f"{SAMPLE} --ckpt=~/b.pt --out=~/s.png") == 0
    assert [path.name for path in Path().iterdir()] == ["home"]


# ---------------------------------------------------------------- the terminal

@pytest.mark.parametrize("line, redirect, status, lines", [
    (f"{SAMPLE} --ckpt UNET", "| true", 1, 0), (f"{SAMPLE} --ckpt UNET", "> /dev/full", 2, 1),
    (f"{SAMPLE} --ckpt UNET --out \u03b5.png", "", 0, 0),
    (f"{TRAIN} --data FEW --out a.pt", ">&-", 0, 0),
    (f"{TRAIN} --data FEW --out a.pt", "| true", 0, 0)])
def test_a_stdout_that_takes_nothing_is_silence_or_one_line(run, few, unet, line, redirect, status,
                                                            lines):
    """A reader that went away, a full disk, a terminal of ascii alone, a closed stdout. Training
    goes on."""
    line = line.replace("UNET", str(unet)).replace("FEW", str(few))
    environment = dict(os.environ, PYTHONIOENCODING="ascii", PYTHONUNBUFFERED="")
    command_line = f"set -o pipefail; {sys.executable} {ROOT}/{line} {redirect}"
    done = subprocess.run(["bash", "-c", command_line], text=True, capture_output=True,
                          env=environment)
    assert done.returncode == status
    assert done.stderr.count("\n") == lines
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA")])
def test_out_of_memory_is_one_line_and_a_mistake_of_ours_a_traceback(capsys, error):
    def main(error=error):
        raise error

    assert command.execute(main) == 2
    assert "out of memory" in error_line(capsys)
    with pytest.raises(RuntimeError):
        command.execute(partial(main, RuntimeError("a bug")))


def test_progress_minds_no_clock_that_stands_still_and_no_other_stdout(monkeypatch):
    """No division by 0, and no control codes in a file, though stdout began as a terminal."""
    monkeypatch.setattr(command.time, "monotonic", lambda: 7.0)
    monkeypatch.setattr(os, "isatty", lambda number: True)
    with redirect_stdout(io.StringIO()) as out:
        progress = command.Progress(10)
        progress.show(5)
    assert "step 5/10" in out.getvalue()
    assert "\r" not in out.getvalue()
