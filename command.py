"""What train.py and sample.py share: errors in one line, memory, checked numbers, whole files."""
import argparse
import ctypes
import glob
import os
import platform
import shutil
import sys
from pathlib import Path


class BadInput(ValueError):
    """The user's input is wrong, and the text says what to do: one line on stderr, status 2."""


def run(main):
    """main()'s exit status; bad input or an OSError is one line and 2, Ctrl-C is 130."""
    keep_freed_memory()
    try:
        return main()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os._exit(1)                             # nobody reads stdout any more
    except (BadInput, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2


def keep_freed_memory():
    """Let the C library keep the memory that this process frees: the next step needs as much again.

    Otherwise glibc hands large blocks back, and the system clears every page of the next ones,
    which costs a tenth of the time of training and of sampling.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    m_trim_threshold = -1                       # the options' numbers in malloc.h
    m_mmap_max = -4
    libc = ctypes.CDLL(None)
    libc.mallopt(m_mmap_max, 0)                 # no block by mmap: these go back when freed
    libc.mallopt(m_trim_threshold, 2**31 - 1)   # up to 2 GiB may lie free at the heap's end


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are one line, without the usage; the epilog stays as it is."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind, low, high):
    """An argparse type: a number of that kind in [low, high]."""
    def check(string):
        value = kind(string)
        if low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(f"{string} is not in [{low:g}, {high:g}]")
    check.__name__ = kind.__name__              # for argparse's own message
    return check


def in_place(line):
    """The line as a terminal shows it in place of the one before: cut to its width, rest wiped."""
    columns = shutil.get_terminal_size().columns
    return f"\r{line[:columns - 1]}\033[K"


def write_whole(path, data):
    """Write bytes under a temporary name, then rename: path is whole or stays as it was."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        left.unlink(missing_ok=True)            # by a write that was killed
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
