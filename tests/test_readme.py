"""The README's program, run as printed."""
import re
from pathlib import Path

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
(ALGORITHM,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_the_algorithm_prints_what_the_readme_says(capsys):
    """Shares and spreads of the three scales, within 0.04."""
    printed = re.search(r"```\n(w = 0.*?)```", TEXT, re.DOTALL).group(1)
    exec(ALGORITHM, {})
    said = numbers(capsys.readouterr().out)
    assert len(said) == 6
    for a, b in zip(said, numbers(printed), strict=True):
        assert abs(a - b) < 0.04
