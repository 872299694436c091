"""A grey PNG of images, in panels under titles, their rows with names."""
import struct
import zlib

import numpy as np

# Characters of 3 x 5 dots: a digit for each row from the top, its bits the dots.
CHARACTERS = "0123456789 .,:'%-+=abcdefghijklmnopqrstuvwxyz"
DOTS = """
    75557 26227 71747 71717 55711 74717 74757 71222 75757 75717 00000 00002 00024 02020 22000
    51245 00700 02720 07070 25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 55655
    44447 57755 65555 25552 65644 25563 65655 34216 72222 55557 55552 55775 55255 55222 71247
"""
FONT = dict(zip(CHARACTERS, DOTS.split()))
DOT = 2         # pixels a dot is wide
LINE = 16       # pixels a line of text is high
MARGIN = 4      # pixels around text
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def text(string):
    """string in white dots, (LINE, W) uint8; a character is 8 pixels wide, capitals are small."""
    rows = np.array([[int(row) for row in FONT[c]] for c in string.lower()])     # (C, 5)
    dots = rows[:, :, None] >> np.array([2, 1, 0]) & 1      # (C, 5, 3)
    dots = np.pad(dots, ((0, 0), (0, 0), (0, 1)))           # a column of space
    line = dots.transpose(1, 0, 2).reshape(5, -1)           # (5, 4 C)
    line = np.kron(line, np.full((DOT, DOT), 255)).astype(np.uint8)
    return np.pad(line, ((3, LINE - 3 - len(line)), (MARGIN, 0)))


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


def panel(grid, title, names=()):
    """Images (R, C, 32, 32) uint8 in rows, in a frame under a title: (H, W) uint8.

    names: of the rows, at their left.
    """
    R, C = grid.shape[:2]
    image = grid.transpose(0, 2, 1, 3).reshape(32 * R, 32 * C)
    if names:
        texts = [text(name) for name in names]
        left = np.zeros((32 * R, MARGIN + max(line.shape[1] for line in texts)), np.uint8)
        for k, line in enumerate(texts):
            left[32 * k + 8:32 * k + 24, -MARGIN - line.shape[1]:-MARGIN] = line
        image = np.hstack([left, image])
    head = text(title)
    width = max(image.shape[1], head.shape[1])
    rows = [np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in (head, image)]
    return np.pad(np.vstack(rows), 4, constant_values=96)
