"""What all commands share: errors in one line, checked numbers, whole files, progress, Ctrl-C."""
import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent.parent             # the clone


class BadInput(ValueError):
    """The user's input is wrong, and the text says what to do: one line on stderr, status 2."""


def execute(main):
    """main()'s exit status; 2, and one line, for bad input, a full disk or memory; 130 for Ctrl-C.

    It is 1, without a line, where stdout's reader goes away too early.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")   # names that a terminal cannot show
    try:
        status = main()
        if sys.stdout:
            sys.stdout.flush()                  # a full disk shows here, not at exit
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:                     # nobody reads stdout any more
        silence_stdout()
        return 1
    except (BadInput, OSError) as error:
        complain(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        complain("out of memory: try a smaller --batch, --n or file of data")
    return 2


def complain(error):
    """One line on stderr, in place of a line of progress."""
    wipe = "\r\033[K" if sys.stderr and sys.stderr.isatty() else ""
    print(f"{wipe}{Path(sys.argv[0]).name}: {one_line(error)}", file=sys.stderr)
    if isinstance(error, OSError):
        silence_stdout()                        # it may be stdout that is full


def one_line(text):
    return " ".join(str(text).split())


def silence_stdout():
    """Let what is left in stdout's buffer go nowhere, so that Python's exit does not fail too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def is_out_of_memory(error):
    """numpy and Python raise MemoryError, torch its own, and on a CPU a plain RuntimeError."""
    return (isinstance(error, (MemoryError, torch.OutOfMemoryError))
            or "can't allocate memory" in str(error))


class Parser(argparse.ArgumentParser):
    """argparse's parser. Its errors are one line, no usage. The epilog stays as it is."""

    def __init__(self, **options):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                         **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")   # -1e-1 is a number too

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def file_name(string):
    """An argparse type: a file's name, in which ~ is the home folder (the shell expands it only
    where it stands first in a word)."""
    return os.path.expanduser(string)


def number(kind, low, high):
    """An argparse type: a number of that kind in [low, high]."""
    def check(string):
        value = kind(string)
        if low <= value <= high:
            return value
        raise argparse.ArgumentTypeError(f"{string} is not in [{low:g}, {high:g}]")
    check.__name__ = kind.__name__              # for argparse's own message
    return check


many = number(int, 1, 1e9)
seed = number(int, 0, 2**32 - 1)                # one word: a larger seed would repeat others


def add_device(parser):
    parser.add_argument("--device", help="as torch names it: cpu, cuda, mps (cuda where there is "
                        "one, else cpu)")


# ---------------------------------------------------------------- files

def find(file):
    """The place of a file as this process sees it; weights/ and data/ are found from anywhere."""
    file = Path(file)
    if not file.exists() and str(file.parent) in ("weights", "data"):
        return HERE / file
    return file


def write_whole(files):
    """Write {path: bytes}: all under temporary names, then rename them one after another.

    So each file is whole or stays as it was. A link stays one: what it leads to is written.
    """
    staged = {}
    try:
        for path, data in files.items():
            path = Path(os.path.realpath(path))
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            staged[temporary] = path
            temporary.write_bytes(data)
        for temporary, path in staged.items():
            os.replace(temporary, path)
    finally:
        for temporary in staged:
            temporary.unlink(missing_ok=True)


def try_place(path):
    """Raise BadInput or OSError where no file can be written at path, before the work begins."""
    path = Path(os.path.realpath(path))         # where a link leads
    if path.exists() and not path.is_file():
        raise BadInput(f"--out {path}: this is not a plain file; choose another name")
    folder = next(parent for parent in path.parents if parent.exists())
    with tempfile.TemporaryFile(dir=folder):    # folders that are missing are made when needed
        pass


# ---------------------------------------------------------------- processes, progress, signals

def processes():
    """This process's rank, and how many there are: torchrun says so."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def say(text, end="\n"):
    """Print, in the first process only. Where nobody can read it any more, work goes on in silence.
    """
    rank, _ = processes()
    if rank == 0:
        try:
            print(text, end=end, flush=True)
        except OSError:                         # a terminal or a pipe that went away
            silence_stdout()


class Progress:
    """How far a loop is: a line in place on a terminal, else a line every ten seconds."""

    def __init__(self, steps, done=0, unit="step"):
        self.steps = steps
        self.unit = unit
        self.terminal = sys.stdout is not None and sys.stdout.isatty()
        self.began = time.monotonic()
        self.shown = self.began
        self.first = done

    def is_due(self):
        return time.monotonic() - self.shown > (0.2 if self.terminal else 10)

    def show(self, done, text=""):
        self.shown = time.monotonic()
        seconds = max(self.shown - self.began, 1e-3)        # a clock may stand still
        rate = (done - self.first) / seconds
        left = (self.steps - done) / max(rate, 1e-9)
        line = (f"{self.unit} {done}/{self.steps}  {text}{rate:.1f} {self.unit}s/s  "
                f"{left:.0f} s left")
        if self.terminal:                       # cut to the width, over the line before
            line = f"\r{line[:shutil.get_terminal_size().columns - 1]}\033[K"
        say(line, end="" if self.terminal else "\n")

    def keep(self):
        """Let the line of progress stay."""
        if self.terminal:
            say("")

    def wipe(self):
        if self.terminal:
            say("\r\033[K", end="")


class Interrupt:
    """While it is open, the first Ctrl-C, SIGTERM or SIGHUP is noted; a second one stops at once.

    A signal that the parent process ignores, as nohup does, stays ignored, and so does one whose
    handler is not Python's.
    """

    def __init__(self):
        self.asked = False
        self.before = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():   # others get no signals
            for name in ("SIGINT", "SIGTERM", "SIGHUP"):
                number = getattr(signal, name, None)        # Windows has no SIGHUP
                if number and signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self.note)
        return self

    def note(self, number, frame):
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
