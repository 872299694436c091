"""What several test files share; the helpers of mathematics come from test_cfg.py.

All mathematics is tested in float64.
"""
import os
import shlex
import signal
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cfg import distance, seed, x          # two of these are fixtures

import sample
import train
from chapters import classifier, oracle, vae
from support import command, mnist
from support.training import Run

ROOT = str(Path(__file__).parent.parent)


def line(start, end, n):
    """n numbers from start to end, in equal steps, (n,)."""
    return torch.linspace(start, end, n, dtype=torch.float64)


def ks_distance(samples, cdf):
    """Kolmogorov's sup |F_n - F|, of samples (n,) from F: 1.6 / sqrt(n) is exceeded once in 100."""
    n = len(samples)
    F_n = (torch.arange(n).double() + 0.5) / n
    return distance(cdf(samples.double().sort().values), F_n)


def moments_of(sampler, draws):
    """Exact mean and standard deviation of what sampler(x, randn) makes of Gaussian noise.

    The sampler must be affine in x and in all that randn gives, on a line. Row i of the batch has
    a unit of draw i, and of no other; the last row has none. draws: x and the calls of randn.
    """
    units = iter(torch.eye(draws + 1).double())

    def randn(like=None):
        return next(units)[:, None]

    x = sampler(randn(), randn)
    return x[-1].item(), (x - x[-1]).norm().item()


def randomize(net):
    """The net with every weight moved away from its initial value: some of these are 0."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return net


# ---------------------------------------------------------------- commands

MAINS = {"train.py": train.main, "sample.py": sample.main, "chapters.classifier": classifier.main,
         "chapters.vae": vae.main, "chapters.oracle": oracle.main}


def save_first(n, file):
    """Write a data file of the first n digits; return its name."""
    with np.load(mnist.FILE) as npz:
        np.savez(file, **{key: npz[key][:n] for key in npz})
    return file


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A data file of the first 300 of the digits, for training and for testing."""
    return save_first(300, tmp_path_factory.mktemp("data") / "few.npz")


def run_line(line, few):
    """The exit status of a command line; a training without --data is of the few digits."""
    script, *argv = shlex.split(line)
    if script not in ("sample.py", "chapters.oracle") and "--data" not in argv:
        argv += ["--data", str(few)]
    try:
        return command.execute(partial(MAINS[script], argv)) or 0
    except SystemExit as error:                 # argparse's way out
        return error.code


@pytest.fixture
def run(tmp_path, monkeypatch, few):
    """run(command line) -> its exit status; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(run_line, few=few)


@contextmanager
def signal_in(step, number=signal.SIGINT, handler=signal.default_int_handler):
    """Trainings get the signal in this step, as of Ctrl-C. handler: that of the time before."""
    record = Run.record

    def interrupt(self, loss):
        record(self, loss)
        if self.done == step - 1:
            os.kill(os.getpid(), number)

    before = signal.signal(number, handler)     # a job in the background may ignore SIGINT
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "record", interrupt)
            yield
        assert signal.getsignal(number) is handler          # the run has put it back
    finally:
        signal.signal(number, before)


@pytest.fixture(scope="session")
def unet(tmp_path_factory, few):
    """The file of a U-Net that has hardly been trained, for tests that need any network."""
    file = tmp_path_factory.mktemp("unet") / "unet.pt"
    line = f"train.py --arch unet --predict z --times logit-normal --steps 4 --batch 8 --out {file}"
    assert run_line(line, few) == 0
    return file


def weights(file):
    return torch.load(file, weights_only=True)["weights"]


def error_line(capsys):
    """The one line on stderr of a command that was refused."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]
