"""A grey PNG from an array: images in panels, under titles."""
import struct
import zlib

import numpy as np

FONT = {        # rows of dots, from the top; every character is 5 dots high
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
    "a": ".#. #.# ### #.# #.#",
    "c": ".## #.. #.. #.. .##",
    "d": "##. #.# #.# #.# ##.",
    "e": "### #.. ##. #.. ###",
    "f": ".## #.. ##. #.. #..",
    "h": "#.. #.. ##. #.# #.#",
    "i": "### .#. .#. .#. ###",
    "l": "#.. #.. #.. #.. ###",
    "o": ".#. #.# #.# #.# .#.",
    "p": "##. #.# ##. #.. #..",
    "r": "#.# ##. #.. #.. #..",
    "s": ".## #.. .#. ..# ##.",
    "t": ".#. ### .#. .#. .##",
    "v": "#.# #.# #.# #.# .#.",
    "w": "#...# #...# #.#.# #.#.# .#.#.",
    "y": "#.# #.# .#. .#. .#.",
    " ": "... ... ... ... ...",
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


def png(grey):
    """(H, W) uint8 as an 8-bit grey PNG: signature, header, zipped rows, end; W3C, PNG."""
    H, W = grey.shape
    header = struct.pack(">IIBBBBB", W, H, 8, 0, 0, 0, 0)   # 8 bits, grey, no interlacing
    rows = np.pad(grey, ((0, 0), (1, 0)))                   # a 0 before each row: not filtered
    out = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(rows.tobytes())), (b"IEND", b"")):
        checksum = zlib.crc32(kind + data)
        out += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return out


def framed(image, *titles):
    """An image (H, W) uint8 under titles, in a frame."""
    H, W = image.shape
    lines = [text(title) for title in titles]
    head = LINE * len(lines)
    width = max([W, *(MARGIN + line.shape[1] for line in lines)])
    picture = np.zeros((head + H, width), np.uint8)
    picture[head:, :W] = image
    for k, line in enumerate(lines):
        top = LINE * k + 3
        picture[top:top + line.shape[0], MARGIN:MARGIN + line.shape[1]] = line
    return np.pad(picture, 4, constant_values=96)


def panel(grid, *titles):
    """Images (R, C, 32, 32) uint8, framed under titles; an image is as wide as 4 characters."""
    R, C = grid.shape[:2]
    image = grid.transpose(0, 2, 1, 3).reshape(32 * R, 32 * C)
    return framed(image, *titles)
