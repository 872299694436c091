"""Every recipe of the documents, run as printed; trainings get few steps and digits.

A block of python whose first line names a file goes into a copy of the clone; the commands of its
section run there. All other blocks of a document run one after another, in one empty folder.
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

from conftest import ROOT, run_line
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


def test_blocks_of_python_run_as_printed(folder, capsys):
    """One after another, as a reader pastes them."""
    import torch
    space = {}
    try:
        for block in blocks_of(CHANGE, "python"):
            if not block.startswith("# "):
                exec(block, space)
    finally:
        torch.set_grad_enabled(True)
    estimated, exact = np.split(np.array(numbers(capsys.readouterr().out)), 2)
    assert np.abs(estimated - exact).max() < 0.01           # the log-likelihood
    z = space["path"].sample(space["z"], space["eps"], 0.9)
    assert (space["again"] - z).square().mean().sqrt() < 0.15           # there and back


@pytest.mark.parametrize("section", SECTIONS, ids=[text.splitlines()[0] for text in SECTIONS])
def test_a_clone_is_changed_as_printed(folder, section):
    """A new file, lines at the end of a file, or an entry of a dict."""
    for part in Path(ROOT).glob("*.py"):
        shutil.copy(part, folder)
    for part in ("support", "chapters"):
        shutil.copytree(f"{ROOT}/{part}", folder / part)
    (folder / "weights").symlink_to(f"{ROOT}/weights")
    for block in blocks_of(section, "python"):
        head, code = block.split("\n", 1)
        name, place = re.fullmatch(r"# (\S+), (.*)", head).groups()
        file = folder / name
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        if place in ("a new file", "at the end"):
            text += code
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
        cell = cell.replace('"300"', f'"2", "--batch", "4", "--data", "{few}"')
        exec(cell.replace("runs/notebook.pt", f"{folder}/notebook.pt"), space)
