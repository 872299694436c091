"""What several test files share.

The exact fields come from chapters/oracle.py: MIX is four Gaussians of three classes in the plane.
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
from torch.autograd.functional import jacobian
from torch.distributions import Normal

import sample
import train
from chapters import classifier, oracle, vae
from paths import PATHS
from support import command, mnist
from support.training import Training

ROOT = str(Path(__file__).parent)
ALL_PATHS = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
TIMES = 0.1, 0.45, 0.8, 0.97
MIX = oracle.Mixture(
    mu=[[-1.5, 0.5], [1.0, 1.2], [0.3, -1.4], [1.8, -0.2]],
    std=[0.3, 0.6, 0.4, 0.2],
    weight=[0.3, 0.3, 0.25, 0.15],
    label=[0, 0, 1, 2])
GAUSS = oracle.Mixture(mu=[[0.7]], std=[0.4], weight=[1.0], label=[0])    # on a line
MANY = torch.tensor([0, 1, 2, 1, 0, 2])         # a label for each of the points x


@pytest.fixture(autouse=True)
def seed():
    """Each test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def x():
    """Six points of the plane, (6, 2)."""
    return torch.randn(6, 2).double()


def double(value):
    return torch.as_tensor(value, dtype=torch.float64)


def line(start, end, n):
    """n numbers from start to end, in equal steps, (n,)."""
    return torch.linspace(start, end, n, dtype=torch.float64)


def labels(y, x):
    """The label y, or NULL, for every row of x."""
    return torch.full((len(x),), y)


def close(a, b, tol=1e-8):
    """Fail where a and b differ by more than tol + tol |b|."""
    torch.testing.assert_close(double(a), double(b), rtol=tol, atol=tol)


def distance(a, b):
    """The largest difference."""
    return (double(a) - double(b)).abs().max().item()


def gradient(f, x):
    """grad f at each row of x, for f: (B, ...) -> (B,); by autograd."""
    return jacobian(lambda v: f(v).sum(), x)


def divergence(f, x):
    """div f at each row of x, for f: (B, D) -> (B, D); by autograd."""
    return torch.einsum("bibi->b", jacobian(f, x))


def normal_cdf(x):
    return Normal(0, 1).cdf(x)


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


class Recorder:
    """A network that remembers its calls."""

    def __init__(self, net):
        self.net = net
        self.calls = []

    def __call__(self, *inputs):
        self.calls.append(inputs)
        return self.net(*inputs)


def tiny(x, t, y):
    """A one-line network for images (B, C, H, W)."""
    return 0.3 * x + 0.2 * t.view(-1, 1, 1, 1) + y.view(-1, 1, 1, 1).double().sin()


def call_loss(loss, net, path, **options):
    """The loss on 4000 images; their z and y; and the x, t (and labels) that net gets."""
    z = torch.randn(4000, 1, 2, 2).double()
    y = torch.arange(4000) % 10
    net = Recorder(net)
    value = loss(net, path, z, y, **options)
    (inputs,) = net.calls
    return value, z, y, *inputs


def check_draws(path, z, x, t):
    """t ~ U[0, 1) and x ~ p_t(x|z): (x - alpha z) / beta ~ N(0, I). Returns that noise."""
    alpha, beta, _, _ = path.at(t, z)
    eps = (x - alpha * z) / beta
    assert ks_distance(t, lambda t: t) < 0.025
    assert ks_distance(eps.flatten(), normal_cdf) < 0.015
    assert ks_distance(eps[t < 0.2].flatten(), normal_cdf) < 0.03
    return eps


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
def signal_in(step, number=signal.SIGINT):
    """Trainings get the signal in this step, as of Ctrl-C."""
    record = Training.record

    def interrupt(self, loss):
        record(self, loss)
        if self.done == step - 1:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "record", interrupt)
        yield


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
