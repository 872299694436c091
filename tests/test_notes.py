"""NOTES.md: what it names exists, each of the five notes has a table, each row says its piece."""
import ast
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TEXT = (HERE / "NOTES.md").read_text()
SPANS = re.findall(r"`([^`]+)`", TEXT)


def defined_in(file):
    """The names at the top of a Python file and, as Class.method, those in its classes."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            names |= {f"{node.name}.{method}" for method in methods}
    return names


DEFINED = {file.stem: defined_in(file) for file in HERE.glob("*.py")}


def tables():
    """The rows of each note's table, lists of cells, by the note's three digits."""
    found = {}
    for section in TEXT.split("\n## ")[1:]:
        note = section[1:4]                     # `000`: ...
        if not note.isdigit():                  # the list of misprints
            continue
        lines = re.findall(r"^\| (\d.*) \|$", section, re.MULTILINE)
        found[note] = [line.split(" | ") for line in lines]
    return found


def exists(span):
    """Whether file.function or file.Class.method is in file.py, or the span is a file itself."""
    file, name = span.split(".", 1)
    return name in DEFINED.get(file, ()) or (HERE / span).exists()


def test_every_function_that_the_concordance_names_exists():
    """`file.function`, `file.Class.method`."""
    named = [span for span in SPANS if re.fullmatch(r"\w+(\.\w+)+", span)]
    assert [span for span in named if not exists(span)] == []


def test_every_test_that_the_concordance_names_exists():
    """`test_...` is a function of some test_*.py."""
    tests = set()
    for file, names in DEFINED.items():
        if file.startswith("test_"):
            tests |= names
    named = [span for span in SPANS if re.fullmatch(r"test_\w+", span)]
    assert [name for name in named if name not in tests] == []


def test_each_of_the_five_notes_has_its_table():
    """Rows of four cells, numbered from 1 in each table; 60 to 120 in all."""
    found = tables()
    assert list(found) == ["000", "001", "002", "003", "004"]
    for note, rows in found.items():
        assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1)), note
        assert {len(row) for row in rows} == {4}, note
    assert 60 <= sum(len(rows) for rows in found.values()) <= 120


@pytest.mark.parametrize("note", ["000", "001", "002", "003", "004"])
def test_a_row_names_code_and_a_test_or_says_that_it_is_not_executed(note):
    """... or names the row of another note, which is there."""
    found = tables()
    for number, says, executed, tested in found[note]:
        referred = re.findall(r"(00\d), rows? (\d+)(?: and (\d+))?", says + executed)
        for other, *rows in referred:
            assert max(int(row or 1) for row in rows) <= len(found[other]), number
        if executed.startswith("not executed: "):
            continue
        assert re.search(r"`test_\w+`", tested), number
        in_code = re.search(r"`\w+\.[\w.]+`", executed)
        assert in_code or referred or executed == "only in the tests", number
