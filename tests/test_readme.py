"""The README's programs, run as printed."""
import re
from pathlib import Path

TEXT = (Path(__file__).parent.parent / "README.md").read_text()
ALGORITHM, DIGITS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


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


def test_the_digits_are_drawn(tmp_path, monkeypatch):
    """Ten digits of the shipped U-Net, in a row of 32 x 32 pixels under a title."""
    monkeypatch.chdir(tmp_path)
    exec(DIGITS, {})
    written = Path("digits.png").read_bytes()
    assert written.startswith(b"\x89PNG")
    assert int.from_bytes(written[16:20], "big") == 10 * 32 + 8
