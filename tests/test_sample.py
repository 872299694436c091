"""sample.py as users run it: options, pictures, arrays, classifiers; what is refused."""
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import mnist
import sample
from cfg_min import NULL, euler, guided_field
from classifier import classifier_gradient
from conftest import error_line, run_line
from ddpm import ddim
from paths import CondOT


def draw(run, line):
    """The images (N, 32, 32) int64 that a sample.py line writes, and their labels (N,)."""
    Path("drawn.npz").unlink(missing_ok=True)
    assert run(f"sample.py --out drawn.npz --steps 3 {line}") == 0
    with np.load("drawn.npz") as npz:
        return npz["images"].astype(int), npz["labels"]


@pytest.fixture(scope="session")
def classifier(tmp_path_factory, few):
    file = tmp_path_factory.mktemp("classifier") / "classifier.pt"
    assert run_line(f"classifier.py --steps 4 --batch 8 --out {file}", few) == 0
    return file


@pytest.mark.parametrize("line", [
    "--sampler euler", "--sampler heun", "--sampler em", "--sampler em --sigma 0.5",
    "--sampler ddim", "--sampler ddim --noise 1", "--sampler pc", "--away-from 8", "--label null",
    "--w -1e-1", "--w 0", "--guidance classifier", "--guidance classifier --sampler pc",
    "--guidance mean --sampler ddim --noise 1",
])
def test_every_way_to_sample_gives_images_of_its_own(run, unet, classifier, line):
    """Each option changes the samples of the plain command."""
    Path("runs").mkdir()
    Path("runs/classifier.pt").write_bytes(classifier.read_bytes())
    images, labels = draw(run, f"--w 3 --n 4 --ckpt {unet} {line}")
    assert images.shape == (4, 32, 32)
    assert labels.tolist() == ([NULL] * 4 if "null" in line else [0, 1, 2, 3])
    plain, _ = draw(run, f"--w 3 --n 4 --ckpt {unet}")
    if line not in ("--sampler euler", "--sampler ddim"):   # on CondOT these two are one
        assert np.abs(images - plain).max() > 0
    else:
        assert np.abs(images - plain).max() <= 1


def test_sample_py_is_algorithm_8(run, unet):
    """Euler's steps of the guided field, from the noise of (seed, i), for label i % 10."""
    images, labels = draw(run, f"--w 3 --n 12 --seed 5 --ckpt {unet}")
    net, _ = checkpoint.load(unet)
    noise = np.stack([np.random.default_rng([5, i]).standard_normal((1, 32, 32), np.float32)
                      for i in range(12)])
    y = torch.arange(12) % 10
    field = partial(guided_field, net, y=y, w=3.0)
    with torch.no_grad(), checkpoint.autocast(torch.device("cpu")):
        x = euler(field, torch.from_numpy(noise), 3)
    assert labels.tolist() == y.tolist()
    assert np.abs(mnist.to_bytes(x)[:, 0].numpy().astype(int) - images).max() <= 3


def test_a_sample_depends_on_the_seed_and_its_number_alone(run, unet, monkeypatch):
    """The first four of 7 samples, computed two at once, are the four of a run of 4."""
    four, _ = draw(run, f"--w 2 --n 4 --ckpt {unet} --sampler em")
    monkeypatch.setattr(sample, "CHUNK", 2)
    seven, _ = draw(run, f"--w 2 --n 7 --ckpt {unet} --sampler em")
    assert np.abs(seven[:4] - four).max() <= 3              # bf16 rounds by the size of the batch
    other, _ = draw(run, f"--w 2 --n 4 --ckpt {unet} --sampler em --seed 1")
    assert np.abs(other - four).max() > 20


def test_guidance_mean_moves_each_step_by_the_classifiers_gradient(run, unet, classifier):
    """ddim with push = w grad log p(y|mean), on the unconditional field."""
    Path("runs").mkdir()
    Path("runs/classifier.pt").write_bytes(classifier.read_bytes())
    line = "--sampler ddim --noise 1 --guidance mean"
    images, _ = draw(run, f"--w 40 --n 4 --ckpt {unet} {line}")
    net, _ = checkpoint.load(unet)
    noisy, _ = checkpoint.load(classifier)
    y = torch.arange(4)
    randn = sample.Noise(0, range(4), (1, 32, 32))

    def push(x, t):
        return 40 * classifier_gradient(noisy, x, t, y)

    with torch.no_grad(), checkpoint.autocast(torch.device("cpu")):
        field = partial(guided_field, net, y=y, w=0)
        x = ddim(field, randn(y), 3, CondOT(), noise=1.0, push=push, randn=randn)
    assert np.abs(mnist.to_bytes(x)[:, 0].numpy().astype(int) - images).max() <= 3


def test_the_figure_has_a_panel_a_scale_and_a_row_a_label():
    """Sample i has label i % 10: its place is row i % 10, column i // 10."""
    images = torch.arange(25, dtype=torch.uint8).view(25, 1, 1).expand(25, 32, 32)
    grid = sample.arrange(images, 10)
    assert grid.shape == (10, 3, 32, 32)
    assert grid[3, :, 0, 0].tolist() == [3, 13, 23]
    assert grid[7, :, 0, 0].tolist() == [7, 17, 0]
    options = sample.parse(["--w", "1", "3"])
    y, rows = sample.choose_labels(options)
    assert rows == 11
    assert torch.equal(y, torch.arange(110) % 11)           # the last row has no label


def test_without_ckpt_it_takes_runs_unet_and_says_so(run, unet, capsys):
    """A newer file of another name in runs/ changes nothing."""
    Path("runs").mkdir()
    Path("runs/unet.pt").write_bytes(Path(unet).read_bytes())
    Path("runs/exercise.pt").write_bytes(b"newer")
    assert run("sample.py --w 1 --n 2 --steps 1") == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("sampling from runs/unet.pt")
    assert "no classifier has seen these data" in said[1]
    Path("runs/unet.pt").unlink()
    assert run("sample.py --w 1 --n 2 --steps 1") == 0
    assert capsys.readouterr().out.startswith("sampling from weights/unet.pt")


@pytest.mark.parametrize("line, says", [
    ("--ckpt no.pt", "no.pt"),
    ("--ckpt ''", "not a file"),
    ("--ckpt broken.pt", "broken.pt"),
    ("--sigma 1", "--sampler em"),
    ("--noise 1", "--sampler ddim"),
    ("--guidance mean", "--noise 1"),
    ("--guidance classifier --away-from 3", "--away-from"),
    ("--label 3 --away-from 3", "the same"),
    ("--label 11", "--label"),
    ("--steps 0", "--steps"),
    ("--out a.jpg", ".png"),
    ("--out other.npz", "other.npz"),
    ("--out folder.png", "plain file"),
    ("--w 1 3 --out a.npz", "one --w"),
])
def test_input_that_cannot_be_used_is_one_line_that_says_what_to_do(run, unet, capsys, line, says):
    Path("broken.pt").write_bytes(Path(unet).read_bytes()[:-1000])
    Path("folder.png").mkdir()
    np.savez("other.npz", mine=np.arange(3))
    before = Path("other.npz").read_bytes()
    ckpt = "" if "--ckpt" in line else f"--ckpt {unet}"
    w = "" if "--w" in line else "--w 3"
    assert run(f"sample.py {w} --n 2 {ckpt} {line}") == 2
    assert says in error_line(capsys)
    assert Path("other.npz").read_bytes() == before


@pytest.mark.parametrize("file, w, low", [
    ("unet", 1, 0.93), ("unet", 3, 0.99), ("dit", 3, 0.99), ("latent_dit", 3, 0.99)])
def test_the_shipped_networks_draw_their_labels(run, file, w, low):
    """Label accuracy by the shipped classifier, 100 samples."""
    Path("drawn.npz").unlink(missing_ok=True)
    assert run(f"sample.py --w {w} --n 100 --steps 10 --ckpt weights/{file}.pt --out d.npz") == 0
    noisy, _ = checkpoint.load("weights/classifier.pt")
    with np.load("d.npz") as npz:
        images = torch.from_numpy(npz["images"])[:, None]
        labels = torch.from_numpy(npz["labels"])
    assert mnist.accuracy(noisy, images, labels) >= low
