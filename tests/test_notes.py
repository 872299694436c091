"""docs/notes.md: what its rows name exists, and the tests of a row enter the functions of that row.

It runs last, and uses the record that conftest.py keeps of the tests that ran before it.
"""
import importlib
import inspect
import re
from pathlib import Path

import pytest

from conftest import ENTERED, NOT_RUN, ROOT

ROWS = []                                       # ("000: slides of lecture 4, row 1", its line)
TESTS = set()                                   # all names of tests

for section in (Path(ROOT) / "docs/notes.md").read_text().split("\n## ")[1:]:
    title = section.splitlines()[0].replace("`", "")
    for line in re.findall(r"^\| [\d`].*", section, re.MULTILINE):
        ROWS.append((f"{title}, row {line.split(' | ')[0][2:]}", line))
for file in (*Path(ROOT).glob("test_*.py"), *Path(ROOT).glob("tests/test_*.py")):
    TESTS.update(re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE))


def find_tests(line):
    return re.findall(r"`(test_\w+)`", line)


def find_functions(line):
    """What the row names as `file.function` or `file.Class.method`."""
    return re.findall(r"`([a-z]\w*\.(?!md|py)[\w.]+)`", line)


def codes_of(name):
    """The code of a function, of all methods of a class, or of nothing, for a constant."""
    module, *parts = name.split(".")
    thing = importlib.import_module(module)
    for part in parts:
        thing = getattr(thing, part)
    members = vars(thing).values() if inspect.isclass(thing) else [thing]
    return {inspect.unwrap(f).__code__ for f in members if inspect.isfunction(f)}


@pytest.mark.parametrize("title, size", [
    ("The derivation", 13), ("000", 19), ("001", 14), ("002", 23), ("003: the", 27), ("004", 12)])
def test_each_note_has_its_table(title, size):
    """Rows are numbered from 1, and each names a test or says that it is not executed."""
    rows = [(name, line) for name, line in ROWS if name.startswith(title) and line[2].isdigit()]
    assert [int(name.split(" row ")[1]) for name, _ in rows] == list(range(1, size + 1))
    for _, line in rows:
        assert line.count(" | ") == 3
        assert find_tests(line) or "not executed: " in line


@pytest.mark.parametrize("line", [line for _, line in ROWS], ids=[name for name, _ in ROWS])
def test_the_tests_of_a_row_exist_and_enter_its_functions(line):
    """Skipped where a test of the row was not part of this run, or did not pass."""
    tests = find_tests(line)
    assert set(tests) <= TESTS
    codes = {name: codes_of(name) for name in find_functions(line)}
    if NOT_RUN.intersection(tests) or not all(test in ENTERED for test in tests):
        pytest.skip("not all tests of this row ran")
    entered = set().union(*(ENTERED[test] for test in tests))
    assert [name for name, code in codes.items() if code and not code & entered] == []
