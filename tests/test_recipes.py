"""Every recipe of the documents, run as printed; trainings get few steps and digits.

A block of python whose first line names a file goes into a copy of the clone; the commands of its
section run there. "# with PACKAGE" begins a block that runs only where the package is. All other
blocks of change.md run in their order, and each alone after the first.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_line
from test_cfg import close

from paths import CondOT
from support import command

README, CHANGE, GUIDANCE, EXERCISES = (
    Path(ROOT, name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/change.md", "docs/guidance.md", "docs/exercises.md"))
FEW = {"train.py": "--steps 2 --batch 4", "sample.py": "--steps 2 --n 10"}
SECTIONS = [text for text in CHANGE.split("\n## ")[1:] if re.search("```python\n# .*\\.py, ", text)]


def blocks_of(text, kind):
    """Fenced blocks, also those that a list indents."""
    blocks = re.findall(rf"^ *```{kind}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


def commands_of(text):
    """The command lines of all sh blocks, without the leading "python"."""
    for block in blocks_of(text, "sh"):
        for line in re.split(r"\n|&&", block):
            words = line.partition(" #")[0].split()
            if words[:2] == ["python", "-m"]:
                yield " ".join(words[2:])
            elif words[:1] == ["python"]:
                yield " ".join(words[1:])
            else:
                assert not words or words[0] in ("pip", "git", "cd", "source"), line


def few(line):
    """A command with few steps, of few digits; those of other programs are None."""
    program = line.split()[0]
    if program.startswith("chapters.") and program != "chapters.oracle":
        return f"{line} {FEW['train.py']}"
    return f"{line} {FEW[program]}" if program in FEW else None


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_the_algorithm_prints_what_the_readme_says(tmp_path):
    """Shares and spreads of three scales, within 0.04; then the same by two copied files."""
    printed = re.search(r"```\n(w = 0.*?)```", README, re.DOTALL).group(1)
    program, same = blocks_of(README, "python")
    assert len(program.splitlines()) < 45
    shutil.copy(f"{ROOT}/paths.py", tmp_path)
    cfg_min = Path(ROOT, "cfg_min.py").read_text(encoding="utf-8")
    cfg_min = cfg_min.replace("\nNULL = 10 ", "\nNULL = 3 ")
    (tmp_path / "cfg_min.py").write_text(cfg_min, encoding="utf-8")
    check = "print((torch.cdist(x, centres).argmin(dim=1) == y).float().mean().item())"
    done = subprocess.run([sys.executable, "-c", program + same + check], text=True,
                          capture_output=True, cwd=tmp_path)
    *said, last = done.stdout.splitlines()
    for a, b in zip(numbers("\n".join(said)), numbers(printed), strict=True):
        assert abs(a - b) < 0.04
    assert float(last) > 0.95


@pytest.fixture
def folder(tmp_path, monkeypatch, few):
    """An empty folder with few digits where a clone has all."""
    (tmp_path / "data").mkdir()
    shutil.copy(few, tmp_path / "data/mnist.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", [README, CHANGE, GUIDANCE, EXERCISES],
                         ids=["README", "change", "guidance", "exercises"])
def test_commands_run_as_printed(folder, text, monkeypatch):
    """Trainings, samples, chapters; lines of experiments only parse."""
    class Parsed(Exception):
        pass

    def parse(self, argv):
        super(command.Parser, self).parse_args(argv)
        raise Parsed

    for section in SECTIONS:
        text = text.replace(section, "")
    for block in blocks_of(text, "python"):
        if block.startswith("# a command of its own"):
            exec(block, {})
    classifier = few("chapters.classifier")     # the shipped one has not seen these few digits
    assert run_line(classifier, folder / "data/mnist.npz") == 0
    for line in commands_of(text):
        if line.startswith("experiments."):
            module, *argv = shlex.split(line)
            main = __import__(module, fromlist=["main"]).main
            with monkeypatch.context() as patch, pytest.raises(Parsed):
                patch.setattr(command.Parser, "parse_args", parse)
                main(argv)
        elif few(line):
            assert run_line(few(line), folder / "data/mnist.npz") == 0, line
        else:
            assert line.startswith(("pytest", "chapters.oracle"))


SETUP, *RECIPES = (block for block in blocks_of(CHANGE, "python")
                   if not re.match(r"# \S+\.py, |# with PIL|# pictures", block))


def execute_blocks(*blocks):
    """Run blocks one after another, as a reader pastes them; return what they leave."""
    space = {}
    try:
        for block in blocks:
            if block.startswith("# with "):
                pytest.importorskip(re.match(r"# with (\w+)", block).group(1))
            exec(block, space)
    finally:
        torch.set_grad_enabled(True)
    return space


@pytest.mark.parametrize("block", RECIPES, ids=[block.splitlines()[0] for block in RECIPES])
def test_a_recipe_runs_alone(folder, block):
    execute_blocks(SETUP, block)


def test_all_recipes_run_in_their_order(folder, capsys):
    space = execute_blocks(SETUP, *(block for block in RECIPES if block[:6] != "# with"))
    estimated, exact = np.split(np.array(numbers(capsys.readouterr().out)), 2)
    assert np.abs(estimated - exact).max() < 0.01           # the log-likelihood
    z = space["path"].sample(space["z"], space["eps"], 0.9)
    assert (space["again"] - z).square().mean().sqrt() < 0.15           # there and back


def test_pictures_of_ones_own_train_and_sample(tmp_path, monkeypatch):
    """Colour arrays; and where Pillow is, from a folder of files."""
    (block,) = re.findall(r"```python\n(# pictures.*?)```", CHANGE, re.DOTALL)
    block = block.replace("3000", "2")
    space = dict(pictures=torch.randint(256, (70, 3, 32, 32), dtype=torch.uint8),
                 kinds=torch.arange(70) % 3)
    exec(block, space)
    assert space["drawn"].shape == (8, 3, 32, 32)
    image = pytest.importorskip("PIL.Image")
    monkeypatch.chdir(tmp_path)
    for k, name in enumerate("ab"):
        Path("pictures", name).mkdir(parents=True)
        image.new("RGB", (40, 40), (k, 50, 90)).save(f"pictures/{name}/1.png")
    reading = re.findall(r"```python\n(# with PIL.*?)```", CHANGE, re.DOTALL)[0]
    exec(reading + block, space)
    assert space["kinds"].tolist() == [0, 1]
    assert space["pictures"][1, :, 0, 0].tolist() == [1, 50, 90]


def test_conventions_of_others_become_ours_as_printed():
    """Each line of the table, from what the other convention has at one point of a path."""
    rows = re.findall(r"^\| (.*) \| `(.*)` \|$", CHANGE, re.MULTILINE)
    z, eps = torch.randn(2, 3, 4).double()
    t = 0.3
    alpha, beta = t / (t**2 + (1 - t)**2)**0.5, (1 - t) / (t**2 + (1 - t)**2)**0.5
    on_circle = dict(x=alpha * z + beta * eps, alpha=alpha, beta=beta, eps=eps)
    on_line = dict(x=t * z + (1 - t) * eps, t=t, path=CondOT())
    u = z - eps
    sigma = (1 - t) / t
    theirs = {                                  # what they have; what ours must become
        "v-prediction": (on_circle | dict(v=alpha * eps - beta * z), dict(z=z)),
        "EDM": (dict(sigma=sigma, x_edm=z + sigma * eps, D=z, path=CondOT()),
                dict(t=t, x=on_line["x"], u=u)),
        "DDPM, Stable": (on_circle | dict(abar=alpha**2), dict(alpha=alpha, beta=beta, z=z)),
        "the same network": (on_line, dict(abar=alpha**2, x_ddpm=on_circle["x"])),
        "SD3": (dict(sigma=1 - t, v=eps - z), dict(t=t, u=u)),
        "their shift": (dict(s=3.0, sigma=0.5), dict(sigma=0.75)),
        "flow_matching": (dict(t=t, u=u), dict(t=t, u=u)),
        "a score network": (on_line | dict(score=-eps / (1 - t)), dict(u=u)),
        "Ho & Salimans": (dict(w_hs=2.0), dict(w=3.0)),
        "the time k": (dict(k=250, T=1000), dict(t=0.75)),
    }
    assert len(rows) == len(theirs)
    for (name, code), (key, (given, expected)) in zip(rows, theirs.items()):
        assert name.startswith(key)
        space = dict(given)
        exec(code, space)
        for letter, value in expected.items():
            close(space[letter], value, 1e-9)


@pytest.mark.parametrize("section", SECTIONS, ids=[text.splitlines()[0] for text in SECTIONS])
def test_a_clone_is_changed_as_printed(folder, section):
    """A new file, lines at the end of a file, another line, or an entry of a dict."""
    for part in Path(ROOT).glob("*.py"):
        shutil.copy(part, folder)
    for part in ("support", "chapters"):
        shutil.copytree(f"{ROOT}/{part}", folder / part)
    (folder / "weights").symlink_to(f"{ROOT}/weights")
    for block in blocks_of(section, "python"):
        head, code = block.split("\n", 1)
        found = re.fullmatch(r"# (\S+\.py), (.*)", head)
        if not found:
            continue
        name, place = found.groups()
        file = folder / name
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if place in ("a new file", "at the end"):
            text += code
        elif place.startswith("instead of"):    # the line that begins so
            text = re.sub(rf"^{place.split()[-1]} = .*\n", code, text, flags=re.MULTILINE)
        else:                                   # in NAME: its first entry
            line = re.search(rf"^{place.removeprefix('in ')} = {{.*\n", text, re.MULTILINE).group()
            text = text.replace(line, line + code)
        file.write_text(text, encoding="utf-8")
    for line in commands_of(section):
        done = subprocess.run([sys.executable, *shlex.split(few(line))], text=True,
                              capture_output=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert "wrote" in done.stdout


def test_the_notebook_runs_and_says_what_to_fill_in(folder, monkeypatch, few):
    """In docs/ of a clone; outside of one its first cell stops with one line."""
    cells = json.loads(Path(ROOT, "docs/guidance.ipynb").read_text(encoding="utf-8"))["cells"]
    cells = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    display = types.ModuleType("IPython.display")
    display.Image = lambda data: data
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr(sys, "path", list(sys.path))
    first = re.sub(r"^( *)%cd (.*)", r"\1os.chdir(f'\2')", cells[0], flags=re.MULTILINE)
    first = re.sub(r"^( *)[!%].*", r"\1pass", first, flags=re.MULTILINE)
    with pytest.raises(SystemExit, match="REPOSITORY"):
        exec(first, {})
    monkeypatch.chdir(f"{ROOT}/docs")
    space = {}
    exec(first, space)
    assert os.getcwd() == ROOT
    for cell in cells[1:]:
        cell = cell.replace('"300", "--batch", "128"', f'"2", "--batch", "4", "--data", "{few}"')
        cell = cell.replace("steps=25", "steps=2")
        exec(cell.replace("runs/notebook.pt", f"{folder}/notebook.pt"), space)
