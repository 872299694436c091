"""The two commands, end to end, as their users call them: train.py and sample.py."""
import copy
import gzip
import itertools
import math
import os
import pickle
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import checkpoint
import command
import mnist
import oracle
import picture
import sample
import train
from cfg_min import NULL, classifier_gradient
from command import BadInput
from paths import PATHS
from unet import UNet
from vae import VAE

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "benchmarks"))
import pictures                                                 # noqa: E402

SHORT_UNET = "train.py --arch unet --steps 6 --batch 8"
SHORT_VAE = "train.py --arch vae --steps 2 --batch 8"


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A data file of the first 300 of the digits, for training and for testing."""
    with np.load(mnist.FILE) as npz:
        arrays = {key: npz[key][:300] for key in npz}
    file = tmp_path_factory.mktemp("data") / "few.npz"
    np.savez(file, **arrays)
    return file


def run_line(line, few):
    """The exit status of a command line; a training without --data is of the few digits."""
    script, *argv = line.split()
    if script == "train.py" and "--data" not in argv:
        argv += ["--data", str(few)]
    main = {"train.py": train.main, "sample.py": sample.main}[script]
    ctrl_c = signal.getsignal(signal.SIGINT)
    try:
        return command.run(partial(main, argv)) or 0
    except SystemExit as error:                 # argparse's way out
        return error.code
    finally:
        signal.signal(signal.SIGINT, ctrl_c)


@pytest.fixture
def run(tmp_path, monkeypatch, few):
    """run(command line) -> its exit status; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return partial(run_line, few=few)


@pytest.fixture(scope="session")
def unet(tmp_path_factory, few):
    """The file of a U-Net that has hardly been trained, for tests that need any network."""
    file = tmp_path_factory.mktemp("unet") / "unet.pt"
    assert run_line(f"{SHORT_UNET} --out {file}", few) == 0
    return file


def contents(file):
    return torch.load(file, weights_only=True)


def weights(file):
    return contents(file)["weights"]


def same(a, b):
    """Whether two networks' weights are equal to the bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def sampled(run, line):
    """The images (N, 32, 32) int64 that a sample.py line writes, and their labels (N,)."""
    assert run(f"sample.py {line} --out sampled.npz") == 0
    with np.load("sampled.npz") as npz:
        return npz["images"].astype(int), npz["labels"]


def in_a_process(script, line):
    """The arguments of a process that runs a command line by a script."""
    _, *argv = line.split()
    return [sys.executable, HERE / script, *argv]


def on_a_terminal(script, line):
    """What a command line writes to a terminal, which only a process of its own can have."""
    pty = pytest.importorskip("pty")            # Windows has none
    ours, theirs = pty.openpty()
    process = subprocess.Popen(in_a_process(script, line), stdout=theirs)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 4096):
            written += part
    except OSError:                             # Linux's way to say that it is closed
        pass
    assert process.wait() == 0
    return written.decode()


def left_to_see(written):
    """The lines of a terminal in the end: of each, what follows its last return to the left."""
    return [line.split("\r")[-1].replace("\033[K", "") for line in written.split("\r\n")]


# ---------------------------------------------------------------- pictures

def read_png(file):
    """The image (H, W) uint8 of an 8-bit grey PNG, each chunk's checksum tested."""
    raw = Path(file).read_bytes()
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    chunks = {}
    at = 8
    while at < len(raw):
        size, kind = struct.unpack(">I4s", raw[at:at + 8])
        end = at + 8 + size
        checksum, = struct.unpack(">I", raw[end:end + 4])
        assert checksum == zlib.crc32(raw[at + 4:end])
        chunks[kind] = raw[at + 8:end]
        at = end + 4
    width, height, *kind = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert kind == [8, 0, 0, 0, 0]              # 8 bits, grey, not interlaced
    data = zlib.decompress(chunks[b"IDAT"])
    rows = np.frombuffer(data, np.uint8).reshape(height, width + 1)
    assert (rows[:, 0] == 0).all()              # not filtered
    return rows[:, 1:]


def test_a_png_decodes_to_what_was_written(tmp_path):
    """PNG -> pixels gives back the array, of odd sizes too, in folders made for it."""
    grey = np.random.default_rng(0).integers(0, 256, (37, 53), np.uint8)
    file = tmp_path / "new" / "folder" / "a.png"
    command.write_whole(file, picture.png(grey))
    assert (read_png(file) == grey).all()


def test_a_panel_shows_its_images_in_rows_under_its_titles():
    """Image (r, c) of the grid in row r, column c; a title's dots are two pixels wide."""
    grid = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8)
    panel = picture.panel(grid, "w = 3", "0.1")
    assert panel.shape == (4 + 2 * 16 + 64 + 4, 4 + 96 + 4)
    for r, c in itertools.product(range(2), range(3)):
        top, left = 36 + 32 * r, 4 + 32 * c
        assert (panel[top:top + 32, left:left + 32] == grid[r, c]).all()
    for k, title in enumerate(["w = 3", "0.1"]):
        dots = picture.text(title)
        top = 4 + 16 * k + 3
        assert (panel[top:top + 10, 8:8 + dots.shape[1]] == dots).all()
    plus = picture.text("+")[::2, ::2] == 255
    assert ["".join(".#"[dot] for dot in row) for row in plus.astype(int)] == [
        "....", ".#..", "###.", ".#..", "...."]


def test_the_figure_has_a_panel_a_scale_and_a_row_a_label(run, unet, capsys):
    """Two w: two panels of a title, ten rows of labels and one without, ten columns each."""
    assert run(f"sample.py --ckpt {unet} --w 1 3 --steps 2") == 0
    assert read_png("samples.png").shape == (16 + 32 * 11 + 8, 2 * (320 + 8))
    out = capsys.readouterr().out
    assert f"220 samples of {unet}" in out
    assert "8 network calls" in out             # two chunks, two w, two steps


def test_the_trajectory_has_a_row_a_label_and_a_column_a_moment(run, unet):
    """Two titles, three rows for each label and for none, eleven columns: t = 0, 0.1, ..., 1."""
    assert run(f"sample.py --ckpt {unet} --w 3 --steps 5 --trajectory --out t.png") == 0
    assert read_png("t.png").shape == (32 + 32 * 33 + 8, 32 * 11 + 8)


def test_the_oracles_figures_have_their_panels(tmp_path, monkeypatch):
    """p_t over time for three w; data, guided samples, corrected ones and the tilted law."""
    monkeypatch.setattr(oracle, "over_time", partial(oracle.over_time, n=200))
    monkeypatch.setattr(oracle, "in_plane", partial(oracle.in_plane, n=200, steps=10))
    oracle.write_pictures(tmp_path)
    assert read_png(tmp_path / "oracle_line.png").shape == (16 + 256 + 8, 3 * (2 * 143 + 8))
    assert read_png(tmp_path / "oracle_plane.png").shape == (16 + 256 + 8, 4 * (256 + 8))


def test_the_readmes_example_runs_as_printed(tmp_path, monkeypatch):
    """The Python block of README.md writes a picture of ten digits in a row."""
    monkeypatch.chdir(tmp_path)
    block = (HERE / "README.md").read_text().split("```python\n")[1].split("```")[0]
    torch.manual_seed(0)
    exec(block, {})
    row = read_png("digits.png")[4:-4, 4:-4]
    assert row.shape == (32, 320)
    images = torch.from_numpy(row.copy()).view(32, 10, 32).transpose(0, 1)
    classifier, _ = checkpoint.load("weights/classifier.pt")
    assert mnist.accuracy(classifier, images[:, None], torch.arange(10)) > 0.8


def test_a_plot_s_line_goes_where_its_numbers_say(tmp_path):
    """The loss of three lines of a log, 1, 0.5 and 0.25, on an axis of logarithms."""
    log = tmp_path / "log"
    log.write_text("".join(f"step {k}/9  loss {2 ** -(k // 4)}  5 images/s\n" for k in (1, 5, 9)))
    plot = pictures.loss(log)[4 + 16:, 4:]      # without frame and title
    top, left = pictures.TOP, pictures.LEFT
    axes = plot[top:top + 160, left:left + 240] == 255
    assert axes[0, 27]                          # 1 at step 1, of the ticks 0 ... 9
    assert axes[79:82, 133].any()               # 0.5 at step 5
    assert axes[159, 239]                       # 0.25 at step 9
    assert not axes[81:, :120].any()
    assert not axes[:78, 140:].any()
    log.write_text("nothing")
    with pytest.raises(BadInput):
        pictures.loss(log)


@pytest.mark.parametrize("values, first, last, n", [
    ([10.8, 100.0], 0, 100, 6), ([0.131, 1.368], 0, 1.4, 8), ([0.906, 1.107], 0.9, 1.15, 6)])
def test_round_numbers_lie_around_the_values(values, first, last, n):
    """The numbers on an axis."""
    assert pictures.round_numbers(values) == pytest.approx(np.linspace(first, last, n))


# ---------------------------------------------------------------- data

@pytest.fixture
def idx_folder(tmp_path, few):
    """A folder of the few digits as four IDX files: 0, 8, the rank, the sizes, the bytes."""
    folder = tmp_path / "idx"
    folder.mkdir()
    with np.load(few) as npz:
        for key, name in zip(mnist.KEYS, mnist.IDX_FILES):
            v = npz[key]
            header = struct.pack(f">HBB{v.ndim}I", 0, 8, v.ndim, *v.shape)
            (folder / name).write_bytes(header + v.tobytes())
    return folder


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_folders_are_read_as_the_npz_is(idx_folder, few, zipped):
    """MNIST's four IDX files, or their .gz, give the tensors that the .npz gives."""
    if zipped:
        for file in list(idx_folder.iterdir()):
            Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    for a, b in zip(mnist.load(idx_folder), mnist.load(few), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def damaged(raw, damage):
    """An IDX file's bytes with one thing wrong."""
    return {
        "cut": raw[:-1],
        "longer": raw + b"\0",
        "empty": b"",
        "of floats": raw[:2] + b"\x0d" + raw[3:],
    }[damage]


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "of floats"])
@pytest.mark.parametrize("name", mnist.IDX_FILES)
def test_a_damaged_idx_file_is_bad_input(idx_folder, name, damage):
    """Cut short, too long, empty, or of other numbers than bytes."""
    file = idx_folder / name
    file.write_bytes(damaged(file.read_bytes(), damage))
    with pytest.raises(BadInput, match=name):
        mnist.load(idx_folder)


@pytest.mark.parametrize("damage", ["none", "plain", "cut", "checksum", "no block"])
def test_a_damaged_gz_file_is_bad_input(idx_folder, damage):
    """Not there, not zipped, cut short, of a wrong checksum, or with nonsense where data begin."""
    file = idx_folder / mnist.IDX_FILES[0]
    raw = file.read_bytes()
    zipped = gzip.compress(raw)
    file.unlink()
    if damage != "none":
        wrong = {
            "plain": raw,
            "cut": zipped[:len(zipped) // 2],
            "checksum": zipped[:-8] + bytes(8),
            "no block": zipped[:10] + b"\xff" + zipped[11:],         # what follows the header
        }[damage]
        Path(f"{file}.gz").write_bytes(wrong)
    with pytest.raises(BadInput, match=file.name):
        mnist.load(idx_folder)


def test_the_reason_why_a_file_cannot_be_read_is_one_line_and_never_empty():
    assert "a.npz: EOFError;" in str(mnist.unreadable("a.npz", EOFError()))
    assert "a.npz: one;" in str(mnist.unreadable("a.npz", ValueError("one\ntwo")))


@pytest.mark.parametrize("images, labels", [
    (np.zeros((2, 28, 28)), np.array([0, 9])),
    (np.zeros((2, 28, 27), np.uint8), np.array([0, 9])),
    (np.zeros((2, 784), np.uint8), np.array([0, 9])),
    (np.zeros((3, 28, 28), np.uint8), np.array([0, 9])),
    (np.zeros((2, 28, 28), np.uint8), np.array([0.0, 9.0])),
    (np.zeros((2, 28, 28), np.uint8), np.array([[0], [9]])),
    (np.zeros((2, 28, 28), np.uint8), np.array([-1, 9])),
    (np.zeros((2, 28, 28), np.uint8), np.array([0, 10])),
    (np.zeros((0, 28, 28), np.uint8), np.array([], int)),
], ids=["float", "27", "flat", "three", "float labels", "column", "-1", "null", "none"])
def test_other_arrays_are_no_digits(images, labels):
    """Images are (N, 28, 28) uint8, labels (N,) whole numbers of 0 ... 9; 10 is null, no digit."""
    assert mnist.fault(images, labels)


@pytest.mark.parametrize("kind", [np.uint8, np.int32, np.int64])
def test_labels_may_be_any_whole_numbers(kind):
    assert mnist.fault(np.zeros((2, 28, 28), np.uint8), np.array([0, 9], kind)) is None


def test_diversity_is_the_mean_distance_of_two_images_of_a_class():
    """The mean over classes, but those of one image; of each class its first 1000 images."""
    images = torch.zeros(1006, 1, 2, 2, dtype=torch.uint8)
    labels = torch.zeros(1006).long()
    images[1000:] = 200                         # the 1001st of class 0 is left out
    labels[1001:] = torch.tensor([1, 1, 2, 2, 3])
    images[1002] = 203                          # 2 pixels x 2 pixels, 3 apart: a distance of 6
    assert mnist.diversity(images, labels) == pytest.approx((0 + 6 + 0) / 3)


def test_digits_are_padded_and_labels_are_int64(few):
    """x (N, 1, 32, 32) uint8 with the 28x28 in its middle, y (N,) int64."""
    x, y, _, _ = mnist.load(few)
    assert x.shape == (300, 1, 32, 32)
    assert x.dtype == torch.uint8
    assert y.dtype == torch.int64
    with np.load(few) as npz:
        assert (x[:, 0, 2:-2, 2:-2].numpy() == npz["x_train"]).all()
        assert (y.numpy() == npz["y_train"]).all()


@pytest.mark.parametrize("part, images, labels, wrong", [
    ("training", (6, 64, 64), np.arange(6), r"images uint8 \(6, 64, 64\)"),
    ("test", (6, 28, 28, 3), np.arange(6), r"images uint8 \(6, 28, 28, 3\)"),
    ("test", (6, 784), np.arange(6), r"images uint8 \(6, 784\)"),
    ("test", (6, 0, 0), np.arange(6), r"images uint8 \(6, 0, 0\)"),
    ("training", (), np.arange(6), r"images uint8 \(\)"),
    ("training", (0, 28, 28), np.arange(0), "no images"),
    ("test", (6, 28, 28), np.arange(5), "6 images, but 5 labels"),
    ("training", (6, 28, 28), np.eye(6, 10, dtype=int), r"labels int64 \(6, 10\)"),
    ("training", (6, 28, 28), np.arange(6) / 1, r"labels float64 \(6,\)"),
    ("training", (47, 28, 28), np.arange(47), "labels from 0 to 46"),
    ("test", (6, 28, 28), np.arange(-1, 5), "labels from -1 to 4"),
    ("test", (10, 28, 28), np.arange(1, 11), "labels from 1 to 10"),
])
def test_what_is_wrong_with_the_data_is_said(tmp_path, few, part, images, labels, wrong):
    """Which part, what it has, and the sizes and labels that are wanted."""
    with np.load(few) as npz:
        arrays = dict(npz)
    name = {"training": "train", "test": "test"}[part]
    arrays[f"x_{name}"] = np.zeros(images, np.uint8)
    arrays[f"y_{name}"] = labels
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(BadInput, match=rf"{part} part has {wrong}; .*\(N, 28, 28\).* in 0\.\.9"):
        mnist.load(tmp_path / "bad.npz")


def test_data_of_three_classes_train_and_sample(run, few):
    """Labels need not be all of 0 ... 9."""
    with np.load(few) as npz:
        arrays = dict(npz)
    for part in ("train", "test"):
        kept = arrays[f"y_{part}"] < 3
        arrays[f"x_{part}"] = arrays[f"x_{part}"][kept]
        arrays[f"y_{part}"] = arrays[f"y_{part}"][kept]
    np.savez("three.npz", **arrays)
    assert run("train.py --arch classifier --steps 2 --batch 8 --data three.npz") == 0
    assert run(f"{SHORT_UNET} --data three.npz") == 0
    images, labels = sampled(run, "--w 1 --n 4 --steps 2")
    assert labels.tolist() == [0, 1, 2, 3]
    assert images.shape == (4, 32, 32)


def test_bytes_and_pixels_are_two_names_of_one_thing():
    """0 ... 255 is -1 ... 1, there and back; what lies outside is clipped."""
    grey = torch.arange(256, dtype=torch.uint8)
    x = mnist.to_unit(grey)
    assert x[0] == -1
    assert x[255] == 1
    assert torch.equal(mnist.to_bytes(x), grey)
    assert mnist.to_bytes(torch.tensor([-1.5, 1.5])).tolist() == [0, 255]


# ---------------------------------------------------------------- what the network is given

class Recorder(nn.Module):
    """Instead of a U-Net: it keeps what it is given, and what its squared error aims at."""

    seen = []                                   # of dicts of x, t, y, target

    def __init__(self):
        super().__init__()
        self.hidden = nn.Parameter(torch.zeros(1, 1))       # one parameter for Muon,
        self.last = nn.Parameter(torch.zeros(1))            # and one for AdamW

    def forward(self, x, t, y):
        out = torch.zeros_like(x) + self.hidden + self.last
        record = dict(x=x, t=t, y=y, out=out.detach())
        self.seen.append(record)

        def keep_target(gradient):              # 2 (out - target) / numel
            record["target"] = (out - gradient * out.numel() / 2).detach()
        out.register_hook(keep_target)
        return out


@pytest.fixture
def recorder(run, monkeypatch):
    """recorder(options) -> x, t, y, target of 2000 samples of a training of the Recorder.

    Its digits are squares of one grey: digit k is 20 k + 10 all over.
    """
    labels = np.arange(1000) % 10
    grey = (20 * labels + 10).astype(np.uint8)
    images = np.tile(grey[:, None, None], (1, 28, 28))
    np.savez("grey.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    monkeypatch.setitem(checkpoint.NETS, "unet", Recorder)
    monkeypatch.setattr(Recorder, "seen", [])

    def record(options):
        assert run(f"train.py --arch unet --data grey.npz --steps 4 --batch 500 {options}") == 0
        assert len(Recorder.seen) == 4
        keys = "x", "t", "y", "target", "out"
        return [torch.cat([batch[key] for batch in Recorder.seen]) for key in keys]
    return record


def digit_of(z):
    """The digit of a clean square of the recorder's data, wherever all of it is of one grey."""
    square = (z[:, 0, 2:-2, 2:-2] + 1) * 127.5
    grey = square.mean((1, 2))
    assert (square - grey[:, None, None]).abs().max() < 0.1
    digit = (grey - 10) / 20
    assert (digit - digit.round()).abs().max() < 0.01
    return digit.round()


@pytest.mark.parametrize("name", PATHS)
def test_training_aims_at_z_and_gives_each_digit_its_label(recorder, name):
    """|| u_theta - u ||^2 = (D / beta)^2 || z_theta - z ||^2, z the digit whose label is y."""
    x, t, y, target, out = recorder(f"--eta 0 --path {name} --predict z")
    _, beta, _, _ = PATHS[name].at(t, x)
    weight = (PATHS[name].determinant(t, x) / beta)**2
    z = out + (target - out) / weight
    assert torch.equal(digit_of(z), y.float())


@pytest.mark.parametrize("predict", ["u", "eps"])
@pytest.mark.parametrize("name", PATHS)
def test_training_aims_at_u_or_eps_and_gives_each_digit_its_label(recorder, name, predict):
    """x = alpha z + beta eps, y the label of z; the target is alpha' z + beta' eps, or eps."""
    x, t, y, target, _ = recorder(f"--eta 0 --path {name} --predict {predict}")
    path = PATHS[name]
    alpha, beta, _, _ = path.at(t, x)
    eps = target
    if predict == "u":
        eps = path.u_to_eps(target, x, t)
    assert abs(eps.mean()) < 0.01
    assert abs(eps.std() - 1) < 0.01
    clear = alpha.flatten() > 0.05              # z = (x - beta eps) / alpha can be told
    z = (x - beta * eps) / alpha
    assert clear.sum() > 1000
    assert torch.equal(digit_of(z[clear]), y[clear].float())


@pytest.mark.parametrize("eta", [0, 0.1, 0.5, 1])
def test_training_drops_labels_with_probability_eta(recorder, eta):
    """Of 2000 labels, the share of --eta is null; the others are not touched."""
    _, _, y, _, _ = recorder(f"--eta {eta}")
    dropped = (y == NULL).float().mean()
    assert abs(dropped - eta) <= 5 * (eta * (1 - eta) / 2000) ** 0.5
    assert y.min() >= 0
    assert y.max() <= NULL


def test_without_eta_one_label_in_ten_is_dropped(recorder):
    """The default of --eta is 0.1."""
    _, _, y, _, _ = recorder("")
    assert abs((y == NULL).float().mean() - 0.1) < 0.03


@pytest.mark.parametrize("predict, latent, mean, std", [
    ("z", None, -0.8, 0.8), ("u", None, -1, 1), ("z", "vae.pt", 0, 1)])
def test_t_is_drawn_where_the_label_is_decided(predict, latent, mean, std):
    """logit(t) ~ N(-0.8, 0.8^2) for a network that predicts z, N(0, 1) in latents."""
    logits = times_of_training(predict, latent, step=799, steps=850).logit()
    assert abs(logits.mean() - mean) < 0.05
    assert abs(logits.std() - std) < 0.05


@pytest.mark.parametrize("predict", ["z", "u"])
def test_in_the_last_third_every_second_time_is_late(predict):
    """Half of them uniform in [0.4, 0.97], of which 0.22/0.57 lie above 0.75."""
    before = times_of_training(predict, None, step=999)
    after = times_of_training(predict, None, step=1000)
    usual = (before > 0.75).double().mean()
    late = (after > 0.75).double().mean()
    assert abs(late - (usual + 0.22 / 0.57) / 2) < 0.02
    assert after.max() < 0.971


def test_latents_have_their_times_to_the_end():
    logits = times_of_training("u", "vae.pt", step=1499).logit()
    assert abs(logits.mean()) < 0.05
    assert abs(logits.std() - 1) < 0.05


def times_of_training(predict, latent, step, steps=1500):
    """4000 times t at which a step of a run of so many calls the network."""
    config = dict(arch="unet", path="condot", predict=predict, eta=0.1, latent=latent, steps=steps)
    z = torch.zeros(4000, 1, 1, 1)
    times = []

    def net(x, t, y):
        times.append(t)
        return x
    torch.manual_seed(0)
    train.loss_of(config, net, z, torch.zeros(4000).long(), step)
    return times[0]


def test_a_checkpoint_holds_the_average_of_the_weights(run, monkeypatch):
    """average <- d average + (1 - d) net after step k, d = min(ema, (k + 1)/(k + 10))."""
    saved = []

    def keep(file, contents):
        saved.append(copy.deepcopy(contents))
    monkeypatch.setattr(checkpoint, "save", keep)
    assert run(f"{SHORT_UNET} --save-every 1 --ema 0.3") == 0
    torch.manual_seed(0)
    average = UNet().state_dict()
    for k, contents in enumerate(saved[:5]):    # the last has no "net"
        d = min(0.3, (k + 1) / (k + 10))
        for name, p in contents["net"].items():
            average[name] = d * average[name] + (1 - d) * p
            torch.testing.assert_close(contents["weights"][name], average[name])
    assert len(saved) == 6
    assert not same(saved[4]["net"], saved[4]["weights"])


def test_the_averaged_weights_are_the_ones_that_sample(run):
    """checkpoint.load gives the network of "weights", not the one that --resume trains on."""
    assert run(f"{SHORT_UNET} --predict u --out a.pt") == 0
    whole = contents("a.pt")
    other = UNet().state_dict()
    checkpoint.save("b.pt", dict(whole, net=other))
    net, _ = checkpoint.load("b.pt")
    assert same(net.state_dict(), whole["weights"])
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


# ---------------------------------------------------------------- training

def test_the_defaults_are_those_that_the_help_names():
    options = train.parse(["--arch", "dit"])
    assert (options.eta, options.ema, options.seed, options.save_every) == (0.1, 0.999, 0, 500)
    assert (options.path, options.predict, options.out) == ("condot", "z", "runs/dit.pt")
    latent = train.parse(["--arch", "dit", "--latent", "vae.pt"])
    assert (latent.predict, latent.out) == ("u", "runs/latent_dit.pt")
    options = sample.parse(["--w", "3"])
    assert options.guidance == "cfg"
    assert (options.interval, options.seed, options.out) == ((0.0, 1.0), 0, "samples.png")


@pytest.mark.parametrize("line, predict, wanted", [
    ("", "z", ("ab", 8, 0.975)), ("", "u", ("ab", 8, 0.975)), ("", "eps", ("euler", 40, None)),
    ("--sampler ab", "eps", ("ab", 8, 0.975)), ("--sampler pc", "z", ("pc", 40, None)),
    ("--trajectory", "z", ("euler", 40, None)), ("--steps 7", "z", ("ab", 7, 0.975)),
    ("--last 0.9 --sampler em", "z", ("em", 40, 0.9))])
def test_steps_and_last_go_with_the_sampler(line, predict, wanted):
    options = sample.parse(["--w", "3", *line.split()])
    sample.choose_sampler(options, predict)
    assert (options.sampler, options.steps, options.last) == wanted


def test_the_learning_rate_rises_for_100_steps_and_falls_to_0():
    """lr min((k + 1) / 100, 1) (1 - k / steps) at step k."""
    config = dict(lr=2.0, steps=400)
    rates = [train.learning_rate(config, k) for k in range(400)]
    assert rates[0] == pytest.approx(0.02)
    assert max(rates) == rates[99] == pytest.approx(2 * 301 / 400)
    assert rates[200] == pytest.approx(1.0)
    assert rates[399] == pytest.approx(2 / 400)


def test_a_killed_run_resumes_to_the_same_bits(run, few):
    """kill -9 at any step, then --resume: the weights of a run that nothing stopped."""
    assert run(f"{SHORT_UNET} --out whole.pt") == 0
    arguments = in_a_process("train.py", f"{SHORT_UNET} --save-every 1 --data {few}")
    killed = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while not Path("runs/unet.pt").exists():
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert run(f"{SHORT_UNET} --resume") == 0
    assert same(weights("whole.pt"), weights("runs/unet.pt"))


def test_another_seed_gives_other_weights(run, unet):
    """--seed 0 twice: the same bits; --seed 1: others."""
    assert run(f"{SHORT_UNET} --out a.pt") == 0
    assert run(f"{SHORT_UNET} --seed 1 --out b.pt") == 0
    assert same(weights(unet), weights("a.pt"))
    assert not same(weights(unet), weights("b.pt"))


def test_resume_says_so_when_a_run_is_finished_or_another(run, unet, capsys):
    """--resume of a finished run does nothing; of a run with other options it is refused."""
    before = unet.read_bytes()
    assert run(f"{SHORT_UNET} --out {unet} --resume") == 0
    assert "finished" in capsys.readouterr().out
    assert run(f"{SHORT_UNET} --out {unet} --resume --lr 1") == 2
    assert "another lr" in capsys.readouterr().err
    assert unet.read_bytes() == before


def test_resume_takes_a_run_whose_diversity_was_added_up_by_more_threads(run, unet, capsys):
    """It differs in its last bits then, though the data are the same, as their checksum says."""
    saved = contents(unet)
    saved["config"]["real_diversity"] *= 1 + 1e-7
    torch.save(saved, unet)
    assert run(f"{SHORT_UNET} --out {unet} --resume") == 0
    assert "finished" in capsys.readouterr().out


def test_resume_of_a_run_that_is_not_there_yet_says_so_and_begins(run, monkeypatch, capsys):
    """--resume may stand in a script from its first run on."""
    begun = []

    def fake_train(config, images, labels, out, save_every, resume):
        begun.append(resume)
    monkeypatch.setattr(train, "train", fake_train)
    assert run(f"{SHORT_UNET} --resume") == 0
    assert "starting at the beginning" in capsys.readouterr().out
    Path("runs").mkdir()
    Path("runs/unet.pt").touch()
    assert run(f"{SHORT_UNET} --resume") == 0
    assert capsys.readouterr().out == ""
    assert begun == [False, True]


def test_the_line_of_progress_is_wiped_before_an_error(capsys):
    progress = train.Progress(0, dict(steps=5, batch=1))
    progress.terminal = True
    progress.add(torch.tensor(torch.inf))
    with pytest.raises(BadInput, match="not finite at step 1"):
        progress.check("a.pt")
    assert capsys.readouterr().out == "\r\033[K"


def test_the_line_of_progress_says_how_fast_and_how_long(monkeypatch, capsys):
    """20 of 50 steps of 8 images in 10 s: 16 images/s, and 15 s for the other 30."""
    now = SimpleNamespace(time=lambda: 100.0)
    monkeypatch.setattr(train, "time", now)
    monkeypatch.setattr(os, "isatty", lambda fd: False)
    progress = train.Progress(0, dict(steps=50, batch=8))
    for k in range(20):
        progress.add(torch.tensor(1.0 + k % 2))
    now.time = lambda: 109.0
    progress.show(last=False)
    assert capsys.readouterr().out == ""        # a line every ten seconds
    now.time = lambda: 110.0
    progress.show(last=False)
    assert capsys.readouterr().out == "step 20/50  loss 1.5000  16 images/s  15 s left\n"
    progress.add(torch.tensor(7.0))
    now.time = lambda: 111.0
    progress.show(last=True)                    # of what came since the line before
    assert capsys.readouterr().out == "step 21/50  loss 7.0000  8 images/s  29 s left\n"


def test_ctrl_c_keeps_the_step_that_it_interrupts(run, unet, monkeypatch):
    """Ctrl-C lets the step end, writes it, exits with 130; --resume reaches the same bits."""
    loss_of = train.loss_of

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return loss_of(*arguments)
    monkeypatch.setattr(train, "loss_of", interrupted)
    assert run(f"{SHORT_UNET} --out a.pt") == 130
    assert contents("a.pt")["step"] == 1
    monkeypatch.setattr(train, "loss_of", loss_of)
    assert run(f"{SHORT_UNET} --out a.pt --resume") == 0
    assert same(weights("a.pt"), weights(unet))


def test_ctrl_c_while_a_step_is_reported_keeps_the_next_one(run, monkeypatch):
    """It is not too late for one more step: that is taken, and written, and then the run ends."""
    show = train.Progress.show

    def interrupted(progress, last):
        if progress.done == 1:
            signal.raise_signal(signal.SIGINT)
        show(progress, last)
    monkeypatch.setattr(train.Progress, "show", interrupted)
    assert run(f"{SHORT_UNET} --out a.pt") == 130
    assert contents("a.pt")["step"] == 2


def test_a_loss_that_is_not_finite_keeps_the_last_good_step(run, monkeypatch, capsys):
    """nan from the fifth step on: one line, and the checkpoint of the third step stays."""
    loss_of = train.loss_of
    calls = itertools.count(1)

    def spoiled(*arguments):
        loss = loss_of(*arguments)
        if next(calls) > 4:
            loss = loss * math.nan
        return loss
    monkeypatch.setattr(train, "loss_of", spoiled)
    assert run(f"{SHORT_UNET} --save-every 3 --out a.pt") == 2
    assert "not finite" in capsys.readouterr().err
    assert contents("a.pt")["step"] == 3
    assert all(v.isfinite().all() for v in weights("a.pt").values())


def test_training_needs_no_open_stdout(run, monkeypatch):
    """python train.py >&- trains as any other run does."""
    monkeypatch.setattr(sys, "stdout", None)
    assert run(f"{SHORT_UNET} --out a.pt") == 0


def test_training_overwrites_its_line_on_a_terminal(run, few):
    """One line that changes, with the last step's in the end; the lines around it stay."""
    written = on_a_terminal("train.py", f"{SHORT_UNET} --data {few}")
    first, progress, last, end = written.split("\r\n")
    assert first.startswith("unet on ")
    assert progress.startswith("\rstep ")
    assert progress.split("\r")[-1].startswith("step 6/6  loss ")
    assert progress.count("\r") == progress.count("\033[K") >= 1
    assert last == "wrote runs/unet.pt"
    assert end == ""


# ---------------------------------------------------------------- two processes

HOOKED = """
import os
import torch
import train

first = {}
loss_of = train.loss_of
plain_train = train.train

def loss_that_remembers_its_first_share(config, net, z, y, step):
    first.setdefault("z", z)
    return loss_of(config, net, z, y, step)

def train_that_keeps_its_average(*arguments):
    average = plain_train(*arguments)
    rank = os.environ["RANK"]
    torch.save(dict(first, weights=average.state_dict()), f"rank{rank}.pt")
    return average

train.loss_of = loss_that_remembers_its_first_share
train.train = train_that_keeps_its_average
train.main()
"""
LONGER_UNET = "--arch unet --steps 20 --batch 16 --lr 0.03 --predict u"
TORCHRUN = "-m torch.distributed.run --standalone --nproc_per_node=2"


def mean_loss(printed):
    """The mean loss of a run, whose lines of progress each say the mean since the line before."""
    total = 0.0
    before = 0
    for step, loss in re.findall(r"step (\d+)/20  loss (\S+)", printed):
        total += (int(step) - before) * float(loss)
        before = int(step)
    return total / before


def run_by_torchrun(few):
    """Train by the hooked script in two processes of a thread each; returns what they print."""
    Path("hooked.py").write_text(HOOKED)
    line = f"{TORCHRUN} hooked.py {LONGER_UNET} --data {few} --out two.pt"
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *line.split()], env=environment, text=True,
                          check=True, capture_output=True)
    return done.stdout


@torch.no_grad()
def loss_on(few, file):
    """The loss of a checkpoint's network on the few digits, the same draws for every one."""
    net, config = checkpoint.load(file)
    images, labels, _, _ = mnist.load(few)
    torch.manual_seed(0)
    return train.loss_of(config, net, mnist.to_unit(images), labels, 0).item()


def test_two_processes_share_the_batch_and_hold_the_same_weights(run, few, capsys):
    """torchrun, N = 2: other digits in each, the same weights in both, the loss of one process."""
    two = run_by_torchrun(few)
    assert run(f"train.py {LONGER_UNET} --out one.pt") == 0
    one = capsys.readouterr().out
    rank0 = contents("rank0.pt")
    rank1 = contents("rank1.pt")
    assert len(rank0["z"]) == len(rank1["z"]) == 8
    assert not torch.equal(rank0["z"], rank1["z"])
    assert same(rank0["weights"], rank1["weights"])
    assert same(rank0["weights"], weights("two.pt"))
    assert abs(mean_loss(two) / mean_loss(one) - 1) < 0.15
    assert abs(loss_on(few, "two.pt") / loss_on(few, "one.pt") - 1) < 0.15
    assert loss_on(few, "two.pt") < 1.3         # from about 2


def test_a_batch_that_the_processes_cannot_share_is_refused(run, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(SHORT_UNET) == 2
    assert "--batch 8 cannot be shared by 3 processes" in capsys.readouterr().err


def test_a_finished_run_has_nothing_to_do_for_several_processes(run, unet, monkeypatch, capsys):
    """--resume ends before the processes are joined."""
    shutil.copy(unet, "a.pt")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(f"{SHORT_UNET} --out a.pt --resume") == 0
    assert "is finished" in capsys.readouterr().out


# ---------------------------------------------------------------- sampling

@pytest.mark.parametrize("path, predict, kinds", [
    ("condot", "z", 7), ("condot", "u", 7), ("condot", "eps", 6), ("cosine", "z", 7),
    ("cosine", "eps", 6), ("ddpm", "z", 7), ("ddpm", "u", 7), ("ddpm", "eps", 6)])
def test_every_sampler_serves_every_network(run, path, predict, kinds):
    """Each sampler, and --sigma and --noise, make samples of their own.

    (After so little training, the z of eps lies on its bounds: there Euler and Heun are one.)
    """
    assert run(f"{SHORT_UNET} --path {path} --predict {predict}") == 0
    different = set()
    for options in ("euler", "heun", "ab", "em", "em --sigma 1", "ddim --noise 1", "pc",
                    "pc --corrections 2"):
        images, _ = sampled(run, f"--w 2 --n 2 --steps 4 --sampler {options}")
        different.add(images.tobytes())
    assert len(different) >= kinds


@pytest.mark.parametrize("sampler", ["ab", "euler", "heun", "em", "ddim", "pc"])
def test_last_reaches_every_sampler(run, sampler):
    line = f"--ckpt weights/unet.pt --w 3 --n 2 --steps 4 --sampler {sampler}"
    some, _ = sampled(run, f"{line} --last 0.9")
    other, _ = sampled(run, f"{line} --last 0.8")
    again, _ = sampled(run, f"{line} --last 0.8")
    assert abs(some - other).max() > 20
    assert abs(again - other).max() == 0


def test_guidance_is_applied_within_its_interval_only(run):
    """--interval LO HI: w where LO <= t <= HI, and 1 elsewhere."""
    line = "--ckpt weights/unet.pt --n 2 --steps 4 --sampler euler"      # t = 0, 1/4, 1/2, 3/4
    plain, _ = sampled(run, f"{line} --w 1")
    guided, _ = sampled(run, f"{line} --w 3")
    early, _ = sampled(run, f"{line} --w 3 --interval 0 0.4")
    everywhere, _ = sampled(run, f"{line} --w 3 --interval 0 0.75")
    nowhere, _ = sampled(run, f"{line} --w 3 --interval 0.8 1")
    assert abs(everywhere - guided).max() == 0
    assert abs(nowhere - plain).max() == 0
    assert abs(early - guided).max() > 20
    assert abs(early - plain).max() > 20


def test_guidance_away_from_a_label_starts_from_that_label(run):
    """w = 0 away from 8 is the conditional model of 8; w = 3 is another guidance than from null."""
    line = "--ckpt weights/unet.pt --n 2 --steps 3"
    eight, _ = sampled(run, f"{line} --label 8 --w 1")
    start, _ = sampled(run, f"{line} --label 3 --away-from 8 --w 0")
    away, _ = sampled(run, f"{line} --label 3 --away-from 8 --w 3")
    guided, _ = sampled(run, f"{line} --label 3 --w 3")
    assert abs(start - eight).max() <= 2        # rounding
    assert abs(away - guided).max() > 20


def test_the_classifier_moves_the_mean_of_each_ancestral_step(run):
    """--guidance mean: at w = 0 the unconditional ancestral sampler, at w = 3 another."""
    line = "--ckpt weights/unet.pt --n 2 --steps 5 --sampler ddim --noise 1"
    plain, _ = sampled(run, f"{line} --w 0")
    unmoved, _ = sampled(run, f"{line} --w 0 --guidance mean")
    moved, _ = sampled(run, f"{line} --w 3 --guidance mean")
    assert abs(unmoved - plain).max() == 0
    assert abs(moved - plain).max() > 20


def test_samples_depend_on_seed_and_index_alone(run, unet, monkeypatch):
    """Sample i is the same whatever --n and the chunks are, up to rounding; --seed changes it."""
    line = f"--ckpt {unet} --w 3 --sampler em --steps 3"
    twelve, labels = sampled(run, f"{line} --n 12")
    seven, _ = sampled(run, f"{line} --n 7")
    other, _ = sampled(run, f"{line} --n 12 --seed 1")
    monkeypatch.setattr(sample, "CHUNK", 5)
    by_fives, _ = sampled(run, f"{line} --n 12")
    assert labels.tolist() == [*range(10), 0, 1]
    assert twelve.shape == (12, 32, 32)
    assert abs(twelve[:7] - seven).max() <= 2
    assert abs(twelve - by_fives).max() <= 2
    assert abs(twelve - other).max() > 2


def test_sampling_shows_its_steps_on_a_terminal_and_wipes_them(run):
    """Of all chunks, for each w; the report's lines are all that is left."""
    line = "--ckpt weights/unet.pt --w 0 3 --n 101 --steps 2"
    written = on_a_terminal("sample.py", f"sample.py {line}")
    steps = re.findall(r"\rw = (\d): step (\d)/4  \d+ s left\033\[K", written)
    assert steps == [(w, step) for w in "03" for step in "123"]
    at_0, at_3, wrote, end = left_to_see(written)
    assert re.match(r"w = 0: \S+ % read as their label", at_0)
    assert re.match(r"w = 3: \S+ % read as their label", at_3)
    assert wrote.startswith("wrote samples.png: ")
    assert end == ""


def test_sampling_shows_no_steps_where_its_output_is_piped(run, unet, capfd):
    """Neither steps nor a terminal's signs: one line, and nothing on stderr."""
    assert run(f"sample.py --ckpt {unet} --w 3 --n 101 --steps 2") == 0
    out, err = capfd.readouterr()
    assert re.fullmatch(r"wrote samples.png: [^\r\033\n]*\n", out)
    assert err == ""


@pytest.mark.parametrize("error, status", [(KeyboardInterrupt, 130), (BadInput, 2)])
def test_sampling_wipes_its_steps_before_an_error(run, unet, monkeypatch, capsys, error, status):
    """A Ctrl-C or an error leaves no half line on the terminal."""
    def fail(self, x):
        raise error
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    monkeypatch.setattr(sample.Model, "to_images", fail)
    assert run(f"sample.py --ckpt {unet} --w 3 --n 1 --steps 2") == status
    out = capsys.readouterr().out
    assert "step 1/2" in out
    assert left_to_see(out) == [""]


def test_classifier_guidance_starts_late_where_alpha_is_0_and_nothing_else_does():
    """t0 = 0.01 where a division by alpha_0 = 0 waits, else 0."""
    starts = {}
    for guidance in ("cfg", "classifier", "mean"):
        models = [SimpleNamespace(path=path) for path in PATHS.values()]
        starts[guidance] = [sample.first_time(model, guidance) for model in models]
    assert list(PATHS) == ["condot", "cosine", "ddpm"]
    assert starts == {"cfg": [0, 0, 0], "classifier": [0.01, 0.01, 0], "mean": [0, 0, 0]}


def test_push_is_w_times_the_classifiers_gradient_within_its_interval():
    """w grad log p(y|x) where LO <= t <= HI, 1 times it elsewhere; nothing to push without mean."""
    def judge(x, t):
        return x.flatten(1)[:, :10]
    x = torch.randn(3, 1, 4, 4)
    y = torch.tensor([2, 7, 7])
    gradient = classifier_gradient(judge, x, 0.5, y)
    push = sample.make_push(judge, SimpleNamespace(guidance="mean", interval=(0.2, 0.8)), 3.0)
    for t in (0.2, 0.5, 0.8):
        torch.testing.assert_close(push(x, t, y), 3 * gradient)
    for t in (0.1, 0.9):
        torch.testing.assert_close(push(x, t, y), gradient)
    assert sample.make_push(judge, SimpleNamespace(guidance="cfg", interval=(0, 1)), 3.0) is None


@pytest.mark.parametrize("guides", [False, True])
def test_a_classifier_judges_its_own_data_and_guides_on_its_own_path_too(monkeypatch, guides):
    """Which checkpoints fit; where none does, there is no judge, and guidance is refused."""
    asked = []

    def newest(fits, shipped):
        asked.append(fits)
    monkeypatch.setattr(sample, "newest", newest)
    model = SimpleNamespace(vae=None, config=dict(checksum=1, path="condot"), file="a.pt")
    if guides:
        with pytest.raises(BadInput, match="train.py --arch classifier"):
            sample.find_judge(model, guides)
    else:
        assert sample.find_judge(model, guides) == (None, None)
    fits, = asked
    good = dict(arch="classifier", checksum=1, path="condot")
    assert fits(good)
    assert not fits(dict(good, arch="unet"))
    assert not fits(dict(good, checksum=2))
    assert fits(dict(good, path="ddpm")) is not guides


def test_a_classifier_cannot_guide_latents():
    with pytest.raises(BadInput, match="latent"):
        sample.find_judge(SimpleNamespace(vae="vae", file="a.pt"), guides=True)


def test_the_newest_checkpoint_that_fits_is_taken_and_a_damaged_one_passed_over(run, monkeypatch):
    """In runs/, by the time of writing; the shipped one where none fits, and None without it."""
    Path("runs").mkdir()
    for age, name in enumerate(["damaged", "c", "a", "b"]):
        file = Path(f"runs/{name}.pt")
        file.touch()
        os.utime(file, (1000 - age, 1000 - age))

    def load(file):
        if "damaged" in str(file):
            raise BadInput
        return None, Path(file).stem
    monkeypatch.setattr(checkpoint, "load", load)
    assert sample.newest(lambda name: True, "shipped.pt") == "runs/c.pt"
    assert sample.newest(lambda name: name in "ab", "shipped.pt") == "runs/a.pt"
    assert sample.newest(lambda name: name == "shipped", "shipped.pt").endswith("shipped.pt")
    assert sample.newest(lambda name: False, "shipped.pt") is None


def test_samples_that_are_not_finite_are_no_images():
    """A w too large: one line, no picture of nothing."""
    with pytest.raises(BadInput, match="not finite"):
        sample.images_of(None, [torch.full((1, 1, 32, 32), math.nan)])


def read_grey(x, t):
    """A judge of squares of one grey: 20 k is digit k."""
    grey = mnist.to_bytes(x).float().mean(dim=(1, 2, 3))
    return torch.eye(10)[(grey / 20).round().long()]


def test_the_report_is_of_the_samples_that_have_a_label(capsys):
    """% read as their label, and the diversity over that of real digits, of classes of two."""
    images = torch.tensor([60, 62, 80, 200]).to(torch.uint8).view(4, 1, 1).expand(4, 32, 32)
    y = torch.tensor([3, 3, 5, NULL])
    sample.report(3.0, images, y, read_grey, "judge.pt", real_diversity=128)
    sample.report(3.0, images[1:], y[1:], read_grey, "judge.pt", real_diversity=128)
    lines = capsys.readouterr().out.splitlines()
    share = "% read as their label by judge.pt"
    assert lines[0] == f"w = 3: 66.7 {share}, diversity 0.50 of that of real digits"
    assert lines[1] == f"w = 3: 50.0 {share}"


def test_the_newest_run_is_sampled_from(run, capsys):
    """Without --ckpt: the newest file of runs/ that can be sampled from."""
    assert run(SHORT_UNET) == 0
    assert run(SHORT_VAE) == 0
    assert run("sample.py --w 1 --steps 1 --n 1") == 0
    assert "samples of runs/unet.pt" in capsys.readouterr().out


def test_classifier_trains_guides_and_judges(run, capsys):
    """--arch classifier reads digits; sample.py then names it as judge, and can guide by it."""
    assert run(SHORT_UNET) == 0
    assert run("sample.py --w 3 --steps 2 --n 4 --guidance classifier") == 2    # none is there yet
    assert "train.py --arch classifier" in capsys.readouterr().err
    assert run("train.py --arch classifier --steps 60 --batch 32") == 0
    percent = re.search(r"(\S+) % of the test images", capsys.readouterr().out)
    assert float(percent[1]) > 25
    guided, _ = sampled(run, "--w 3 --steps 2 --n 4 --guidance classifier")
    assert "read as their label by runs/classifier.pt" in capsys.readouterr().out
    unguided, _ = sampled(run, "--w 0 --steps 2 --n 4 --guidance classifier")
    cfg, _ = sampled(run, "--w 0 --steps 2 --n 4 --guidance cfg")
    assert abs(guided - unguided).max() > 2
    assert abs(unguided - cfg).max() <= 2       # at w = 0 both are u(x|null)


@pytest.mark.parametrize("arch", ["dit", "unet"])
def test_latent_models_train_sample_and_insist_on_their_autoencoder(run, few, arch, capsys):
    """An autoencoder, a network on its latents of variance 1, samples; no other VAE will do."""
    assert run("train.py --arch vae --steps 20 --batch 16 --out vae.pt") == 0
    assert "mean squared error" in capsys.readouterr().out
    assert run(f"train.py --arch {arch} --latent vae.pt --steps 6 --batch 8") == 0
    _, config = checkpoint.load(f"runs/latent_{arch}.pt")
    vae, _ = checkpoint.load("vae.pt")
    images, *_ = mnist.load(few)
    latents = vae.encode(mnist.to_unit(images)) * config["latent"]["scale"]
    assert abs(latents.std() - 1) < 0.02
    line = "sample.py --w 2 --n 4 --steps 2"
    assert run(f"{line} --trajectory") == 0
    os.rename("vae.pt", "kept.pt")
    assert run(line) == 2
    assert "vae.pt" in capsys.readouterr().err
    assert run("train.py --arch vae --steps 2 --batch 16 --seed 1 --out vae.pt") == 0
    assert run(line) == 2
    assert "another VAE" in capsys.readouterr().err


# ---------------------------------------------------------------- other devices

class NoFloat64(TorchDispatchMode):
    """Every operation of torch in its scope fails that takes or makes a float64 tensor."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            assert getattr(value, "dtype", None) is not torch.float64, operation
        return out


@pytest.mark.parametrize("options", [
    "--arch unet", "--arch dit --path cosine --predict u", "--arch unet --path ddpm --predict eps"])
def test_no_float64_trains_or_samples(run, options):
    """MPS has none: reading data, training, each sampler."""
    with NoFloat64():
        assert run(f"train.py {options} --steps 2 --batch 4 --out a.pt") == 0
        for sampler in ("ab", "euler", "heun", "em", "em --sigma 1", "ddim --noise 1", "pc"):
            line = f"sample.py --ckpt a.pt --w 3 --n 2 --steps 2 --sampler {sampler}"
            assert run(line) == 0


def test_no_float64_guides_judges_or_works_on_latents(run, capsys):
    """The classifier, of the data of the networks, and the autoencoder."""
    with NoFloat64():
        assert run("train.py --arch classifier --steps 2 --batch 4") == 0
        assert run("train.py --arch vae --steps 2 --batch 4") == 0
        assert run("train.py --arch dit --steps 2 --batch 4 --latent runs/vae.pt --out a.pt") == 0
        assert run("sample.py --ckpt a.pt --w 3 --n 20 --steps 2 --trajectory") == 0
        assert run("train.py --arch unet --steps 2 --batch 4 --out b.pt") == 0
        line = "sample.py --ckpt b.pt --w 3 --n 20 --steps 2"
        assert run(f"{line} --guidance classifier") == 0
        assert run(f"{line} --guidance mean --sampler ddim --noise 1") == 0
    assert capsys.readouterr().out.count("% read as their label by runs/classifier.pt") == 3


def test_distances_of_images_are_measured_on_the_cpu(few, monkeypatch):
    """Wherever the images are: pdist is not to be had on MPS."""
    moved = []
    pdist = torch.pdist

    def cpu(v):
        moved.append(v)
        return v

    def pdist_of_moved(v):
        assert v is moved[-1]
        return pdist(v)
    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    monkeypatch.setattr(torch, "pdist", pdist_of_moved)
    images, labels, _, _ = mnist.load(few)
    assert mnist.diversity(images, labels) > 0
    assert len(moved) == 10


# ---------------------------------------------------------------- the shipped weights

def percent_read(images, labels):
    """How many of these images the shipped classifier reads as their label."""
    judge, _ = checkpoint.load("weights/classifier.pt")
    images = torch.from_numpy(images).to(torch.uint8)[:, None]
    return 100 * mnist.accuracy(judge, images, torch.from_numpy(labels))


def test_the_shipped_classifier_reads_real_digits(few):
    """At t = 1 it reads at least 97 of 100 test images right."""
    _, _, x_test, y_test = mnist.load(few)
    assert percent_read(x_test[:, 0].numpy(), y_test.numpy()) >= 97


@pytest.mark.parametrize("file, w, low, high", [
    ("unet.pt", 0, 0, 30),                      # any digit: 10 in 100 are of the label
    ("unet.pt", 1, 85, 100),
    ("unet.pt", 3, 97, 100),
    ("dit.pt", 3, 97, 100),
    ("latent_dit.pt", 3, 97, 100),
])
def test_the_shipped_networks_draw_their_labels_as_w_says(run, capsys, file, w, low, high):
    """50 samples, read by the shipped classifier: by chance at w = 0, nearly all at w = 3."""
    line = f"--ckpt weights/{file} --n 50 --steps 8 --sampler heun"
    images, labels = sampled(run, f"{line} --w {w}")
    percent = percent_read(images, labels)
    assert low <= percent <= high
    assert f"w = {w}: {percent:.1f} % read as their label" in capsys.readouterr().out


def test_more_w_pays_with_diversity(run):
    """From the same noise, samples of a class lie nearer to one another at w = 8 than at w = 1."""
    spread = {}
    for w in (1, 8):
        line = f"--ckpt weights/unet.pt --n 50 --steps 8 --sampler heun --w {w}"
        images, labels = sampled(run, line)
        spread[w] = mnist.diversity(torch.from_numpy(images), torch.from_numpy(labels))
    assert spread[8] < 0.99 * spread[1]


@pytest.mark.parametrize("file", ["unet.pt", "dit.pt", "latent_dit.pt"])
def test_the_background_of_shipped_networks_samples_is_black(run, file):
    """Exactly, as 85 % of a digit's pixels are: z and the autoencoder's pixels are held there."""
    line = f"--ckpt weights/{file} --n 20 --steps 8 --sampler heun --w 1"
    images, _ = sampled(run, line)
    assert 0.8 < (images == 0).mean() < 0.9


def test_label_asks_for_one_digit(run):
    """--label 7: labels and images are of sevens alone."""
    line = "--ckpt weights/unet.pt --w 3 --n 10 --steps 8 --sampler heun"
    images, labels = sampled(run, f"{line} --label 7")
    assert labels.tolist() == [7] * 10
    assert percent_read(images, labels) >= 90


def test_latents_are_decoded_in_the_autoencoder_s_own_units(few):
    """What training makes of images, scaled to variance 1, sampling turns back into them."""
    images, _, _, _ = mnist.load(few)
    cpu = torch.device("cpu")
    model = sample.Model("weights/latent_dit.pt", cpu)
    vae, _ = checkpoint.load("weights/vae.pt")
    plain = mnist.to_bytes(vae.decode(vae.encode(mnist.to_unit(images))))[:, 0].int()
    latents = vae.encode(mnist.to_unit(images)) * model.config["latent"]["scale"]
    assert abs(latents.std() - 1) < 0.05
    assert (model.to_images(latents).int() - plain).abs().max() <= 1
    assert (images[:, 0].int() - plain).abs().float().mean() < 10


# ---------------------------------------------------------------- help

@pytest.mark.parametrize("module, required", [(train, "--arch"), (sample, "--w")])
def test_help_has_a_usage_line_and_examples_that_parse(run, capsys, module, required):
    """--help: the usage in one line, with what is required; commands that can be copied."""
    script = f"{module.__name__}.py"
    assert run(f"{script} --help") == 0
    usage, *lines = capsys.readouterr().out.splitlines()
    assert re.match(rf"usage: .* {required} .*\[options\]$", usage)
    examples = [line for line in lines if line.startswith(f"  python {script} ")]
    assert len(examples) >= 2
    for example in examples:
        command_line, *meaning = example.strip().split("   ")
        assert module.parse(command_line.split()[2:])
        assert len(meaning[-1]) > 5


def test_help_says_the_defaults_of_each_arch_in_words(run, capsys):
    """--steps, --batch and --lr depend on --arch."""
    assert run("train.py --help") == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "(unet 1800, dit 4200, vae 2000, classifier 1800)" in words
    assert "(unet 128, dit 64, vae 128, classifier 128)" in words
    assert "(unet 0.002, dit 0.004, vae 0.004, classifier 0.004)" in words


@pytest.mark.parametrize("line, error", [
    ("train.py", "the following arguments are required: --arch"),
    ("sample.py --w x", "argument --w: invalid float value: 'x'"),
    ("sample.py --w 1 --noise 1", "--noise goes with --sampler ddim"),
    ("sample.py --w 1 --sampler ddim --sigma 1", "--sigma goes with --sampler em"),
    ("sample.py --w 1 --sampler em --corrections 2", "--corrections goes with --sampler pc"),
])
def test_a_wrong_option_is_named_without_the_usage(run, capsys, line, error):
    """One line."""
    assert run(line) == 2
    err = capsys.readouterr().err
    assert err.endswith(f": error: {error}\n")
    assert err.count("\n") == 1


# ---------------------------------------------------------------- damage

KILLED_WRITE = """
import os
import signal
import command

def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)

os.replace = die
command.write_whole("a.bin", b"half")
"""


def test_a_killed_write_loses_nothing_and_leaves_nothing_for_ever(tmp_path, monkeypatch):
    """The old file stays; the next write to its name clears what was left, and nothing else."""
    monkeypatch.chdir(tmp_path)
    command.write_whole("a.bin", b"old")
    Path(".b.bin.1.tmp").touch()                # of a write to another name
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    killed = subprocess.run([sys.executable, "-c", KILLED_WRITE], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert Path("a.bin").read_bytes() == b"old"
    assert len(os.listdir()) == 3
    command.write_whole("a.bin", b"new")
    assert Path("a.bin").read_bytes() == b"new"
    assert sorted(os.listdir()) == [".b.bin.1.tmp", "a.bin"]


def outcome(file):
    """The averaged weights in a checkpoint, or None where it is refused."""
    try:
        return checkpoint.read(file)["weights"]
    except BadInput:
        return None


def test_a_flipped_bit_in_a_checkpoint_is_noticed(tmp_path):
    """Wherever it is: the file is refused, or the bit was in padding and changes no weight."""
    raw = (HERE / "weights" / "vae.pt").read_bytes()
    whole = weights(HERE / "weights" / "vae.pt")
    file = tmp_path / "flipped.pt"
    rng = np.random.default_rng(0)
    refused = 0
    for at in rng.integers(len(raw), size=40):
        flipped = bytearray(raw)
        flipped[at] ^= 1 << rng.integers(8)
        file.write_bytes(flipped)
        read = outcome(file)
        if read is None:
            refused += 1
        else:
            assert same(read, whole)
    assert refused > 30


@pytest.mark.parametrize("part", [
    "config", "step", "weights",
    "arch", "net", "path", "predict", "latent", "checksum", "real_diversity",       # of config
])
def test_a_checkpoint_that_lacks_a_part_is_refused(unet, tmp_path, part):
    """Before anything is made of it, as a file of another program would be."""
    whole = contents(unet)
    if part in whole:
        del whole[part]
    else:
        del whole["config"][part]
    torch.save(whole, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="not a checkpoint"):
        checkpoint.read(tmp_path / "a.pt")


@pytest.mark.parametrize("part, value", [
    ("arch", ["unet"]), ("arch", "gan"), ("path", {}), ("net", 3), ("net", dict(layer=2))])
def test_a_checkpoint_whose_config_is_not_ours_is_refused(unet, tmp_path, part, value):
    whole = contents(unet)
    whole["config"][part] = value
    torch.save(whole, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="not a checkpoint"):
        checkpoint.read(tmp_path / "a.pt")


@pytest.mark.parametrize("value", [7, None, [1, 2], dict(config=7, step=1, weights={})])
def test_a_file_of_something_else_is_no_checkpoint(tmp_path, value):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(BadInput, match="not a checkpoint"):
        checkpoint.read(tmp_path / "a.pt")


def test_a_checkpoint_is_read_to_the_device_that_is_asked_for(unet):
    """Where it was written from does not matter: the meta device stands for any."""
    whole = checkpoint.read(unet, "meta")
    assert {p.device.type for p in whole["weights"].values()} == {"meta"}


@pytest.mark.parametrize("other", [None, [1, 2], {}, {"first": torch.zeros(1)}])
def test_weights_of_another_network_or_none_are_refused(unet, tmp_path, other):
    torch.save(dict(contents(unet), weights=other), tmp_path / "a.pt")
    with pytest.raises(BadInput, match="not a checkpoint"):
        checkpoint.load(tmp_path / "a.pt")


def test_where_there_is_no_checkpoint_the_line_says_what_makes_one(run, capsys):
    assert run("sample.py --w 1 --ckpt no.pt") == 2
    assert "No such file or directory; train.py makes one" in capsys.readouterr().err


class Bug(ValueError, KeyError, RuntimeError, TypeError):
    """A mistake of ours, of every kind that a guard for bad input may be there for."""


def stumble(*arguments, **options):
    raise Bug


@pytest.mark.parametrize("where, what", [(mnist, "fault"), (np, "pad"), (np, "frombuffer")])
def test_a_bug_in_reading_digits_is_not_bad_data(idx_folder, monkeypatch, where, what):
    """What goes wrong in checking, padding and parsing is not put down to the file."""
    monkeypatch.setattr(where, what, stumble)
    with pytest.raises(Bug):
        mnist.load(idx_folder)


@pytest.mark.parametrize("where, what", [(mnist, "fault"), (np, "pad"), (torch, "from_numpy")])
def test_a_bug_after_reading_an_npz_is_not_bad_data(few, monkeypatch, where, what):
    """Likewise for an .npz, whose guard takes every exception there is."""
    monkeypatch.setattr(where, what, stumble)
    with pytest.raises(Bug):
        mnist.load(few)


@pytest.mark.parametrize("where, what", [
    (checkpoint, "is_config"), (UNet, "__init__"), (UNet, "forward"), (nn.Module, "eval"),
    (torch.cuda, "is_available"), (sample, "make_field"), (sample, "find_judge"), (picture, "png"),
    (sample, "to_bytes"),
])
def test_a_bug_in_sampling_is_not_bad_input(run, unet, monkeypatch, where, what):
    """It ends in a traceback, which says where, not in one line about the user's file."""
    monkeypatch.setattr(where, what, stumble)
    with pytest.raises(Bug):
        run(f"sample.py --ckpt {unet} --w 1 --n 1 --steps 1")


@pytest.mark.parametrize("where, what", [
    (torch.cuda, "is_available"), (mnist, "load"), (mnist, "diversity"), (UNet, "__init__"),
    (train, "draw_batch"), (train, "loss_of"), (checkpoint, "save"),
])
def test_a_bug_in_training_is_not_bad_input(run, monkeypatch, where, what):
    """Likewise."""
    monkeypatch.setattr(where, what, stumble)
    with pytest.raises(Bug):
        run(SHORT_UNET)


@pytest.mark.parametrize("where, what", [
    (checkpoint, "has_keys"), (train, "restore"), (nn.Module, "load_state_dict")])
def test_a_bug_in_resuming_is_not_bad_input(run, unet, monkeypatch, where, what):
    """Likewise, of a checkpoint that is whole and of this very run."""
    monkeypatch.setattr(where, what, stumble)
    with pytest.raises(Bug):
        run(f"{SHORT_UNET} --out {unet} --resume")


@pytest.mark.parametrize("where, what", [
    (checkpoint, "is_config"), (VAE, "__init__"), (VAE, "encode"), (mnist, "to_unit")])
def test_a_bug_in_encoding_is_not_bad_input(run, monkeypatch, where, what):
    """Likewise, of an autoencoder that is whole."""
    monkeypatch.setattr(where, what, stumble)
    with pytest.raises(Bug):
        run("train.py --arch dit --latent weights/vae.pt --steps 1 --batch 4")


def test_a_bug_in_reading_a_run_does_not_pass_it_over(run, unet, monkeypatch):
    """A damaged file of runs/ is passed over; one that a bug keeps us from reading is not."""
    os.mkdir("runs")
    Path("runs/unet.pt").write_bytes(unet.read_bytes())
    load = checkpoint.load

    def load_shipped(file, device="cpu"):
        if Path(file).parent.name == "runs":
            raise Bug
        return load(file, device)
    monkeypatch.setattr(checkpoint, "load", load_shipped)
    with pytest.raises(Bug):
        run("sample.py --w 1 --n 1 --steps 1")


@pytest.mark.parametrize("steps, reason", [
    ("x", "invalid int value: 'x'"), ("0", "0 is not in [1, 1e+09]")])
def test_a_wrong_number_is_told_what_it_should_be(run, capsys, steps, reason):
    assert run(f"train.py --arch dit --steps {steps}") == 2
    assert reason in capsys.readouterr().err


def test_a_reader_of_stdout_that_goes_away_ends_the_command(monkeypatch):
    """python sample.py ... | head: status 1, at once and without a word."""
    def main():
        raise BrokenPipeError
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as end:
        command.run(main)
    assert end.value.code == 1


FREED = """
import resource, torch, command, unet
net = unet.UNet()
x = torch.randn(64, 1, 32, 32)
y = torch.arange(64) % 10
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use(n):
    for _ in range(n):
        net(x, 0.5, y).sum().backward()
command.run(lambda: use(10))                    # until everything has found its place
before = faults()
use(5)
print((faults() - before) / 5)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other libraries are left alone")
def test_memory_that_is_freed_is_kept():
    """Once warm, a step finds its pages where the last one left them."""
    done = subprocess.run([sys.executable, "-c", FREED], cwd=HERE, capture_output=True, text=True)
    assert float(done.stdout) < 2000, done.stderr


def test_each_process_takes_a_gpu_of_its_own_where_there_are_some(monkeypatch):
    """cuda:LOCAL_RANK under torchrun, else cuda:0; without CUDA the CPU."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert checkpoint.pick_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def empty(n, device):
        return SimpleNamespace(device=device, cpu=lambda: None)
    monkeypatch.setattr(torch, "empty", empty)
    assert checkpoint.pick_device(None) == "cuda:0"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert checkpoint.pick_device(None) == "cuda:3"


# ---------------------------------------------------------------- bad input

class Malice:
    """Unpickled, it runs a command of the file's author."""

    def __reduce__(self):
        return os.system, ("touch owned",)


def write_forged(good, file):
    """A checkpoint's zip, its pickle replaced by malice, of the protocol at which torch warns."""
    with zipfile.ZipFile(good) as parts, zipfile.ZipFile(file, "w") as forged:
        for name in parts.namelist():
            data = parts.read(name)
            if name.endswith("data.pkl"):
                data = pickle.dumps(Malice(), protocol=4)
            forged.writestr(name, data)


def write_bad_checkpoints(good):
    """Files that no run of train.py has written whole, or none of this version."""
    raw = good.read_bytes()
    whole = contents(good)
    Path("cut.pt").write_bytes(raw[:len(raw) // 2])
    Path("empty.pt").touch()
    torch.save(UNet(), "pickled.pt")
    foreign = dict(config=dict(arch="dit", net={}), weights=whole["weights"])
    torch.save(foreign, "foreign.pt")
    write_forged(good, "forged.pt")
    Path("script.pt").write_bytes(raw)
    with zipfile.ZipFile("script.pt", "a") as parts:        # so torch takes it for TorchScript
        folder, _ = parts.namelist()[0].split("/", 1)
        parts.writestr(f"{folder}/constants.pkl", b"")
    bare = dict(whole, config=dict(arch="unet", net={}))
    torch.save(bare, "bare.pt")
    changes = {
        "arch": dict(arch="mlp"),
        "other": dict(arch="dit"),              # of which these are not the weights
        "path": dict(path="straight"),
        "option": dict(net=dict(depth=3)),
    }
    for name, change in changes.items():
        changed = dict(whole, config=dict(whole["config"], **change))
        torch.save(changed, f"{name}.pt")


def write_bad_data(few):
    """Data files that each have one thing wrong."""
    with np.load(few) as npz:
        good = dict(npz)
    x = good["x_train"]
    y = good["y_train"]
    np.savez("float.npz", **{**good, "x_train": x / 2})
    np.savez("shape.npz", **{**good, "x_test": x[:, :20]})
    np.savez("length.npz", **{**good, "y_train": y[:-1]})
    np.savez("label.npz", **{**good, "y_test": y + 8})
    np.savez("none.npz", **{**good, "x_train": x[:0], "y_train": y[:0]})
    np.savez("object.npz", **{**good, "y_train": np.array([Malice()])})
    np.savez("keys.npz", x_train=x)
    Path("trunc.npz").write_bytes(few.read_bytes()[:9999])


@pytest.fixture(scope="session")
def bad_folder(tmp_path_factory, few, unet):
    """A folder of a good.pt, a vae.pt, and files with something wrong."""
    folder = tmp_path_factory.mktemp("bad")
    before = os.getcwd()
    os.chdir(folder)
    Path("good.pt").write_bytes(unet.read_bytes())
    assert run_line(f"{SHORT_VAE} --out vae.pt", few) == 0
    Path("file").touch()
    write_bad_checkpoints(unet)
    write_bad_data(few)
    os.chdir(before)
    return folder


BAD_COMMANDS = (
    "train.py",
    "train.py --arch mlp",
    "train.py --arch vae --latent vae.pt",
    "sample.py",
)
BAD_TRAINING = (
    "--steps 0", "--steps x", "--batch 0", "--eta 1.5", "--eta nan", "--lr 0", "--lr inf",
    "--ema 2", "--save-every 0", "--seed -1", "--device cuda:9", "--device tpu", "--device meta",
    "--what",
    "--latent no.pt", "--latent good.pt", "--out file/a.pt",
    "--lr 1 --resume --out good.pt", "--resume --out cut.pt",
    "--data .", "--data no.npz", "--data float.npz", "--data shape.npz", "--data length.npz",
    "--data label.npz", "--data none.npz", "--data object.npz", "--data keys.npz",
    "--data trunc.npz", "--path straight", "--predict v",
)
BAD_SAMPLING = (
    "nan", "inf", "x", "1e38", "1 --label 10", "1 --label -1", "1 --n 0", "1 --steps 0",
    "1 --sampler rk4", "1 --sampler ddim --noise 1.1", "1 --noise 0.5", "1 --sigma 1",
    "1 --sampler em --sigma -1", "1 --interval 0.8 0.2", "1 --interval -1 2", "1 --seed -1",
    "1 --device cuda:9", "1 --out a.jpg", "1 3 --out a.npz", "1 --trajectory --out a.npz",
    "1 --out file/a.png",
    "1 --ckpt no.pt", "1 --ckpt cut.pt", "1 --ckpt empty.pt", "1 --ckpt foreign.pt",
    "1 --ckpt pickled.pt", "1 --ckpt bare.pt", "1 --ckpt vae.pt", "1 --ckpt forged.pt",
    "1 --ckpt script.pt", "1 --ckpt arch.pt", "1 --ckpt other.pt", "1 --ckpt path.pt",
    "1 --ckpt option.pt", "1 --corrections 2", "1 --guidance mean",
    "1 --guidance classifier --away-from 3", "1 --guidance free",
)
BAD_LINES = [
    *BAD_COMMANDS,
    *(f"{SHORT_UNET} {options}" for options in BAD_TRAINING),
    *(f"sample.py --ckpt good.pt --steps 2 --n 2 --w {options}" for options in BAD_SAMPLING),
]


@pytest.mark.parametrize("line", BAD_LINES)
def test_bad_input_is_one_line_and_status_2_and_loses_nothing(run, bad_folder, line, capsys,
                                                              monkeypatch, recwarn):
    """One line on stderr, status 2; good.pt stays as it was, and no temporary file is left."""
    monkeypatch.chdir(bad_folder)
    before = Path("good.pt").read_bytes()
    assert run(line) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert len(err) > 20
    assert "Traceback" not in err
    shown = [w for w in recwarn.list if w.category is not ResourceWarning]
    assert shown == []                          # torch's would be lines of their own
    assert not Path("owned").exists()
    assert Path("good.pt").read_bytes() == before
    assert list(Path().rglob(".*")) == []
