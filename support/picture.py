"""A grey PNG of images, in panels under titles."""
import struct
import zlib

import numpy as np

FONT = {        # rows of dots, from the top; all are 5 high
    "0": "### #.# #.# #.# ###",
    "1": ".#. ##. .#. .#. ###",
    "2": "### ..# ### #.. ###",
    "3": "### ..# ### ..# ###",
    "4": "#.# #.# ### ..# ..#",
    "5": "### #.. ### ..# ###",
    "6": "### #.. ### #.# ###",
    "7": "### ..# ..# .#. .#.",
    "8": "### #.# ### #.# ###",
    "9": "### #.# ### ..# ###",
    ".": "... ... ... ... .#.",
    "-": "... ... ### ... ...",
    "+": "... .#. ### .#. ...",
    "=": "... ### ... ### ...",
    ",": "... ... ... .#. #..",
    ":": "... .#. ... .#. ...",
    "%": "#.# ..# .#. #.. #.#",
    " ": "... ... ... ... ...",
    "a": ".#. #.# ### #.# #.#",
    "b": "##. #.# ##. #.# ##.",
    "c": ".## #.. #.. #.. .##",
    "d": "##. #.# #.# #.# ##.",
    "e": "### #.. ##. #.. ###",
    "f": "### #.. ##. #.. #..",
    "g": ".## #.. #.# #.# .##",
    "h": "#.# #.# ### #.# #.#",
    "i": "# # # # #",
    "j": "..# ..# ..# #.# .#.",
    "k": "#.# #.# ##. #.# #.#",
    "l": "#.. #.. #.. #.. ###",
    "m": "#...# ##.## #.#.# #...# #...#",
    "n": "#..# ##.# #.## #..# #..#",
    "o": "### #.# #.# #.# ###",
    "p": "##. #.# ##. #.. #..",
    "q": "### #.# #.# ### ..#",
    "r": "##. #.# ##. #.# #.#",
    "s": ".## #.. .#. ..# ##.",
    "t": ".#. ### .#. .#. .##",
    "u": "#.# #.# #.# #.# ###",
    "v": "#.# #.# #.# #.# .#.",
    "w": "#...# #...# #.#.# #.#.# .#.#.",
    "x": "#.# #.# .#. #.# #.#",
    "y": "#.# #.# .#. .#. .#.",
    "z": "### ..# .#. #.. ###",
}
DOT = 2         # pixels a dot is wide
LINE = 16       # pixels a line of text is high
MARGIN = 4      # pixels to its left


def character(c):
    """The dots of a character and a column of space: (5, width + 1) of 0 and 1."""
    rows = FONT[c].split()
    return np.array([[dot == "#" for dot in row + "."] for row in rows])


def text(string):
    """string in white dots, (10, W) uint8; most characters are 8 pixels wide."""
    dots = np.hstack([character(c) for c in string])
    return np.kron(dots, np.full((DOT, DOT), 255)).astype(np.uint8)


SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind, data):
    """A chunk of a PNG file: its length, kind, data and checksum."""
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def header(H, W):
    return chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, 0, 0, 0, 0))     # 8 bits, grey


def compress(grey):
    """The zipped rows of (H, W) uint8, a 0 before each row: not filtered."""
    if grey.dtype != np.uint8 or grey.ndim != 2:
        raise ValueError(f"{grey.dtype} {grey.shape}: a picture is (H, W) uint8")
    return zlib.compress(np.pad(grey, ((0, 0), (1, 0))).tobytes(), 9)


def png(grey):
    """(H, W) uint8 as an 8-bit grey PNG file; W3C, PNG."""
    return SIGNATURE + header(*grey.shape) + chunk(b"IDAT", compress(grey)) + chunk(b"IEND", b"")


def panel(grid, title):
    """Images (R, C, 32, 32) uint8 in rows, in a frame under a title: (H, W) uint8."""
    R, C = grid.shape[:2]
    image = grid.transpose(0, 2, 1, 3).reshape(32 * R, 32 * C)
    dots = text(title)                          # (10, W)
    width = max(32 * C, MARGIN + dots.shape[1])
    out = np.zeros((LINE + 32 * R, width), grid.dtype)      # png takes uint8 alone
    out[3:3 + dots.shape[0], MARGIN:MARGIN + dots.shape[1]] = dots
    out[LINE:, :32 * C] = image
    return np.pad(out, 4, constant_values=96)
