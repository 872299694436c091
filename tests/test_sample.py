"""sample.py as users run it: options, pictures, arrays, classifiers; what is refused."""
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import randomize, run_line

import sample
import train
from cfg_min import NULL, cfg_cfm_loss, euler, euler_maruyama, guided_field
from chapters import vae
from chapters.classifier import classifier_gradient, classifier_guided_field
from chapters.ddpm import ddim
from chapters.samplers import gibbs, heun, predictor_corrector
from paths import CondOT, Cosine
from support import checkpoint, mnist, picture, sampling, training
from support.sampling import Noise, arrange, choose_labels


def draw(run, line):
    """The images (N, 32, 32) int64 that a sample.py line writes, and their labels (N,)."""
    Path("drawn.npz").unlink(missing_ok=True)
    assert run(f"sample.py --steps 3 --out drawn.npz {line}") == 0
    with np.load("drawn.npz") as npz:
        return npz["images"].astype(int), npz["labels"]


@pytest.fixture(scope="session")
def loud(tmp_path_factory, few):
    """A folder of networks of random weights, in whose samples every option shows."""
    folder = tmp_path_factory.mktemp("loud")
    lines = {
        "unet": "train.py --arch unet --predict z --path cosine",
        "vae": "chapters.vae",
        "latent": f"train.py --arch unet --latent {folder}/vae.pt",
        "classifier": "chapters.classifier --path cosine",
    }
    for name, line in lines.items():
        assert run_line(f"{line} --steps 1 --batch 2 --out {folder}/{name}.pt", few) == 0
        saved = checkpoint.read(folder / f"{name}.pt")
        net = checkpoint.rebuild(saved["config"], saved["weights"], name)
        saved["weights"] = randomize(net).state_dict()
        if name == "classifier":
            saved["config"]["steps"] = 9        # unfinished
        (folder / f"{name}.pt").write_bytes(checkpoint.pack(saved))
    return folder


def guided(net, w=3.0, away=NULL, low=0.0, high=1.0):
    """The guided field for t in [low, high], the conditional one elsewhere."""
    return lambda x, t: guided_field(net, x, t, Y, w if low - 1e-9 < t < high + 1e-9 else 1.0, away)


def by_classifier(net, noisy, w=3.0):
    return partial(classifier_guided_field, net, noisy, PATH, y=Y, w=w)


def by_mean(net, noisy, x, randn):
    """DDPM lecture, the first "Guided sampling": push = w grad log p(y|mean), u_t(x|null)."""
    def push(x, t):
        return 3 * classifier_gradient(noisy, x, t, Y)

    return ddim(guided(net, 0), x, 3, PATH, noise=1.0, push=push, randn=randn)


Y = torch.arange(12) % 10
PATH = Cosine()             # of loud networks
WAYS = {
    "": lambda u, c, x, r: euler(guided(u), x, 3),
    "--ckpt runs/latent.pt": lambda u, c, x, r: euler(guided(u), x, 3),
    "--interval 0.2 0.5": lambda u, c, x, r: euler(guided(u, low=0.2, high=0.5), x, 3),
    "--away-from 8 --w -1e-1": lambda u, c, x, r: euler(guided(u, -0.1, 8), x, 3),
    "--sampler heun": lambda u, c, x, r: heun(guided(u), x, 3),
    "--sampler em": lambda u, c, x, r: euler_maruyama(guided(u), x, 3, PATH, randn=r),
    "--sampler em --sigma 0.5": lambda u, c, x, r: euler_maruyama(
        guided(u), x, 3, PATH, 0.5, randn=r),
    "--sampler ddim": lambda u, c, x, r: ddim(guided(u), x, 3, PATH),
    "--sampler ddpm": lambda u, c, x, r: ddim(guided(u), x, 3, PATH, 1.0, randn=r),
    "--sampler gibbs": lambda u, c, x, r: gibbs(guided(u, 1), x, 3, PATH, guided(u), randn=r),
    "--sampler gibbs --interval 0 0.6 --steps 25": lambda u, c, x, r: gibbs(
        guided(u, 1), x, 25, PATH, guided(u, high=0.62), randn=r),      # t is .6000000000000001
    "--guidance classifier": lambda u, c, x, r: euler(by_classifier(u, c), x, 3, 0.01),
    "--guidance classifier --sampler gibbs": lambda u, c, x, r: gibbs(
        by_classifier(u, c, 1), x, 3, PATH, by_classifier(u, c), t0=0.01, randn=r),
    "--guidance classifier --sampler pc": lambda u, c, x, r: predictor_corrector(
        by_classifier(u, c, 1), x, 3, PATH, by_classifier(u, c), t0=0.01, randn=r),
    "--guidance mean --sampler ddpm": by_mean,
}


@pytest.mark.parametrize("line", WAYS)
@torch.no_grad()
def test_sample_py_is_algorithm_8(run, loud, line):
    """Or what options put in its place: from the noise of (seed, i), for label i % 10."""
    Path("runs").symlink_to(loud)
    latent = "latent" in line
    images, labels = draw(run, f"--w 3 --n 12 --seed 5 {line}")
    file = f"runs/{'latent' if latent else 'unet'}.pt"
    net, _ = checkpoint.load(file)
    noisy, _ = checkpoint.load("runs/classifier.pt")
    randn = Noise(5, range(12), latent)
    noise = randn()
    with checkpoint.autocast(torch.device("cpu")):
        x = WAYS[line](net, noisy, noise, randn)
    if latent:
        x = checkpoint.load_autoencoder(file).decode(x)
    assert labels.tolist() == Y.tolist()
    assert images.std() > 10
    assert np.abs(mnist.to_bytes(x)[:, 0].numpy().astype(int) - images).max() <= 3


def test_a_sample_depends_on_the_seed_and_its_number_alone(run, unet, monkeypatch):
    """The first four of 7 samples, computed two at once, are the four of a run of 4."""
    line = f"--w 2 --label 7 --ckpt {unet} --sampler em"
    four, labels = draw(run, f"{line} --n 4")
    assert labels.tolist() == [7] * 4
    monkeypatch.setattr(sample, "CHUNK", 2)
    seven, _ = draw(run, f"{line} --n 7")
    assert np.abs(seven[:4] - four).max() <= 3              # bf16 rounds by the size of the batch
    other, _ = draw(run, f"{line} --n 4 --seed 1")
    assert np.abs(other - four).max() > 20


def test_the_figure_has_a_panel_a_scale_and_a_row_a_label(run, loud):
    """Image i % 10, i // 10 of a panel is sample i; by default a row of no label comes last."""
    line = f"--ckpt {loud}/unet.pt --steps 3"
    panels = []
    for w in (1, 3):
        images, _ = draw(run, f"{line} --w {w} --n 20")
        grid = [[images[r], images[10 + r]] for r in range(10)]
        names = "0123456789" if w == 1 else ""
        panels.append(picture.panel(np.array(grid, np.uint8), f"w = {w}", names))
    assert run(f"sample.py {line} --w 1 3 --n 20 --out a.png") == 0
    assert Path("a.png").read_bytes() == picture.png(np.hstack(panels))
    y = choose_labels(sampling.parse_options(["--w", "1"]))
    assert torch.equal(y, torch.cat([torch.arange(100) % 10, torch.full((10,), NULL)]))
    grid = arrange(torch.arange(110)[:, None, None].expand(-1, 32, 32), y)
    assert torch.equal(grid[10, :, 0, 0], torch.arange(100, 110))
    assert sampling.name_rows(y) == [*"0123456789", "no label"]
    assert sampling.name_rows(torch.full((3,), NULL)) == ["no label"]
    assert sampling.name_rows(torch.full((20,), 7)) == ["7"] * 10


def test_the_report_is_of_the_samples_as_the_classifier_sees_them(run, loud, capsys):
    """Label accuracy, and the diversity of the samples over that of the test digits."""
    Path("runs").symlink_to(loud)
    images, labels = draw(run, "--w 3 --n 60")
    images, labels = torch.from_numpy(images).byte()[:, None], torch.from_numpy(labels)
    classifier, _ = checkpoint.load("runs/classifier.pt")
    _, config = checkpoint.load("runs/unet.pt")
    share = 100 * mnist.accuracy(classifier, images, labels)
    ratio = mnist.diversity(images, labels) / config["real_diversity"]
    said = capsys.readouterr().out
    assert f"w = 3: label accuracy {share:.1f} % by runs/classifier.pt (step 1 of 9)" in said
    assert f"diversity {ratio:.2f} of that of real digits" in said


@pytest.mark.parametrize("name, parse", [
    ("sample", sampling.parse_options),
    ("train", partial(training.parse_options, times=train.TIMES))])
def test_the_examples_of_help_parse(capsys, name, parse):
    with pytest.raises(SystemExit, match="0"):
        parse(["--help"])
    said = capsys.readouterr().out
    lines = re.findall(rf"^  python {name}.py (.*?)(?:   .*)?$", said, re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        parse(line.split())


def test_without_ckpt_it_takes_runs_unet_and_says_so(run, unet, capsys):
    """Else it takes weights/unet.pt, and names the newest network of runs/."""
    Path("runs").mkdir()
    Path("runs/unet.pt").write_bytes(unet.read_bytes())
    assert run("sample.py --w 1 --n 2 --steps 1") == 0
    assert capsys.readouterr().out.startswith("sampling from runs/unet.pt")
    Path("runs/unet.pt").unlink()
    assert run("sample.py --w 1 --n 2 --steps 1") == 0
    assert capsys.readouterr().out.startswith("sampling from weights/unet.pt")
    Path("runs/mine.pt").write_bytes(unet.read_bytes())
    assert run("sample.py --w 1 --n 2 --steps 1") == 0
    assert "--ckpt runs/mine.pt" in capsys.readouterr().out


def test_a_row_that_guidance_leads_away_from_itself_is_named(run, unet, capsys):
    assert run(f"sample.py --w 3 --n 10 --steps 1 --ckpt {unet} --away-from 3") == 0
    assert "samples of label 3 are not guided" in capsys.readouterr().out


def test_a_picture_and_arrays_of_ours_are_replaced(run, unet):
    for name in ("a.png", "a.npz"):
        for _ in range(2):
            assert run(f"sample.py --w 3 --n 10 --steps 1 --ckpt {unet} --out {name}") == 0


@pytest.mark.parametrize("eta, labels, line, says", [
    (0.0, range(10), "--w 1 --label null", "never without a label"),
    (0.0, range(10), "--w 3 --away-from 4", ""),
    (1.0, range(10), "--w 1", "never with a label"),
    (1.0, range(10), "--w 3 --guidance classifier", ""),
    (0.1, range(9), "--w 2 --label 3 --away-from 9", "no label 9"),
    (0.1, range(9), "--w 1 --label 3", "")])
def test_what_training_never_showed_is_named(run, loud, capsys, eta, labels, line, says):
    """A label that the data lack, or the field that eta of 0 or 1 leaves out: one line, no more."""
    saved = checkpoint.read(loud / "unet.pt")
    saved["config"].update(eta=eta, labels=[*labels])
    Path("a.pt").write_bytes(checkpoint.pack(saved))
    Path("runs").symlink_to(loud)
    draw(run, f"--ckpt a.pt --n 10 {line}")
    said = capsys.readouterr().out
    assert says in said
    assert said.count("this network") == bool(says)


@pytest.mark.parametrize("file, w, low", [
    ("unet", 1, 0.93), ("dit", 3, 0.99), ("latent_dit", 3, 0.99)])
def test_the_shipped_networks_draw_their_labels(run, file, w, low):
    """Label accuracy by the shipped classifier, 100 samples."""
    images, labels = draw(run, f"--w {w} --n 100 --steps 10 --ckpt weights/{file}.pt")
    noisy, _ = checkpoint.load("weights/classifier.pt")
    images = torch.from_numpy(images).byte()[:, None]
    assert mnist.accuracy(noisy, images, torch.from_numpy(labels)) >= low


@torch.no_grad()
def test_the_shipped_networks_fit_test_digits_as_well_as_when_they_were_trained():
    """A changed line of a network's forward pass shows in its loss, accuracy or error."""
    _, _, images, y = mnist.load()
    images, y = images[:200], y[:200]
    z = mnist.to_unit(images)
    autoencoder, _ = checkpoint.load("weights/vae.pt")
    latents = autoencoder.encode(z)
    t = torch.linspace(0.05, 0.9, 200)
    for name, data, bound in (("unet", z, 0.13), ("dit", z, 0.14), ("latent_dit", latents, 0.83)):
        net, _ = checkpoint.load(f"weights/{name}.pt")
        loss = cfg_cfm_loss(net, CondOT(), data, y, 0.0, t)
        assert loss < bound
    noisy, _ = checkpoint.load("weights/classifier.pt")
    assert mnist.accuracy(noisy, images, y) > 0.97
    error, std = vae.measure(autoencoder, images)
    assert error < 0.004
    assert abs(std - 1) < 0.1
