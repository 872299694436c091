"""docs/notes.md: links resolve, names are defined in the file that is linked before them."""
import ast
import re
from pathlib import Path

from conftest import ROOT

NOTES = Path(ROOT) / "docs/notes.md"
TEXT = NOTES.read_text(encoding="utf-8")


def find_names(nodes, prefix=""):
    """The functions and classes of a file, and methods as Class.method."""
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + node.name
            yield from find_names(node.body, f"{prefix}{node.name}.")


def test_what_is_linked_and_named_exists():
    wrong = []
    for link, name in re.findall(r"\]\((?!http)(.*?)\)|`([A-Za-z_].*?)`", TEXT):
        if link:
            text = (NOTES.parent / link).read_text(encoding="utf-8")
            file, defined = link, set(find_names(ast.parse(text).body))
        elif name not in defined:
            wrong.append((file, name))
    assert wrong == []


def test_the_parts_are_those_of_test_cfg_and_each_row_names_a_test():
    text = Path(ROOT, "test_cfg.py").read_text(encoding="utf-8")
    parts = re.findall(r"^# -+ (\d+\. .*)", text, re.MULTILINE)
    assert [part.lower() for part in re.findall(r"\*\*(\d+\. .*)\*\*", TEXT)] == \
        [part.lower() for part in parts]
    numbers = re.findall(r"^\|(\d+)\|", TEXT, re.MULTILINE)
    tested = re.findall(r"^\|(\d+)(?:\|[^|]+){3}\|\[[^|]* `test_[^|]*\|$", TEXT, re.MULTILINE)
    assert numbers == tested == [str(n + 1) for n in range(len(numbers))]
