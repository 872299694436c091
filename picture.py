"""A grey PNG from an array: images in panels, under titles."""
import struct
import zlib

import numpy as np

FONT = {        # 3 x 5 dots a character: an octal digit a row, its bits the dots
    "0": 0o75557, "1": 0o26227, "2": 0o71747, "3": 0o71717, "4": 0o55711, "5": 0o74717,
    "6": 0o74757, "7": 0o71122, "8": 0o75757, "9": 0o75717, ".": 0o00002, "-": 0o00700,
    "+": 0o02720, "e": 0o07747, "=": 0o07070, "w": 0o05577, "t": 0o27222, " ": 0o00000,
}
DOT = 2         # pixels a dot is wide


def character(c):
    """The dots of a character, a row and a column of space included: (5, 4) of 0 and 1."""
    rows = [int(digit) for digit in f"{FONT[c]:05o}"]
    return [[row >> 2 & 1, row >> 1 & 1, row & 1, 0] for row in rows]


def text(string):
    """string in white dots: (10, 8 len(string)) uint8."""
    dots = np.hstack([character(c) for c in string])        # (5, 4 len(string))
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


def panel(grid, *titles):
    """Images (R, C, 32, 32) uint8 under titles, in a frame; an image is as wide as 4 characters."""
    R, C = grid.shape[:2]
    head = 16 * len(titles)
    width = max(32 * C, 8 * len(titles[0]))
    picture = np.zeros((head + 32 * R, width), np.uint8)
    picture[head:, :32 * C] = grid.transpose(0, 2, 1, 3).reshape(32 * R, 32 * C)
    for k, words in enumerate(titles):
        top = 16 * k + 3
        picture[top:top + 10, :8 * len(words)] = text(words)
    return np.pad(picture, 4, constant_values=96)
