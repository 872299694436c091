"""Pictures of the documents: SVG plots of lines, dots and arrows, and an animated PNG.

Marks are in the units of the data; axes() places them. A panel is a string of SVG.
"""
import html
import math
import struct

from support.picture import SIGNATURE, chunk, compress, header

WIDTH, HEIGHT = 220, 200                        # of a plot, from axis to axis, in pixels
LEFT, TOP, RIGHT, BOTTOM = 52, 28, 16, 40       # around it, for numbers and labels
COLOURS = "#1f6fb4", "#d1495b", "#2e8b57", "#8a6d1f", "#6a4c93"


def line(xs, ys, colour=COLOURS[0], label="", width=1.3):
    """A line through the points (x, y), and what the legend says of it."""
    return dict(xs=xs, ys=ys, colour=colour, width=width, step="L", label=label)


def dots(xs, ys, colour=COLOURS[1], label=""):
    """A dot at each point (x, y)."""
    return dict(xs=xs, ys=ys, colour=colour, width=3, step="M", label=label)


def arrow(start, end, colour, label=""):
    """A line from start (x, y) to end, with a head."""
    (x0, y0), (x1, y1) = start, end
    length = math.hypot(x1 - x0, y1 - y0)
    back_x, back_y = 0.12 * (x0 - x1) / length, 0.12 * (y0 - y1) / length
    left = x1 + back_x - back_y / 2, y1 + back_y + back_x / 2
    right = x1 + back_x + back_y / 2, y1 + back_y - back_x / 2
    xs, ys = zip(start, end, left, end, right)
    return line(xs, ys, colour, label, width=2)


def choose_ticks(low, high):
    """Round numbers in [low, high], four to nine of them, in equal steps."""
    step = min(digit * 10.0**k for k in range(-6, 9) for digit in (1, 2, 5)
               if (high - low) <= 8 * digit * 10.0**k)
    return [k * step for k in range(math.ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)]


def axes(marks, x_range, y_range, title, x_label="", y_label=""):
    """Marks in a frame with ticks, a title and labels, as SVG. Ranges: (low, high)."""
    def place(x, y):
        right = LEFT + WIDTH * (x - x_range[0]) / (x_range[1] - x_range[0])
        down = TOP + HEIGHT * (y_range[1] - y) / (y_range[1] - y_range[0])
        return right, down

    def write(string, x, y, more=""):
        return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{html.escape(string)}</text>'

    bottom = TOP + HEIGHT
    out = [f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="white" '
           'stroke="#888"/>', write(title, LEFT + WIDTH / 2, TOP - 9, 'font-size="13"')]
    for x in choose_ticks(*x_range):
        column, _ = place(x, 0)
        out.append(f'<path d="M{column:.1f} {bottom}v4" stroke="#888"/>')
        out.append(write(f"{x:.6g}", column, bottom + 15))
    for y in choose_ticks(*y_range):
        _, row = place(0, y)
        out.append(f'<path d="M{LEFT} {row:.1f}h-4" stroke="#888"/>')
        out.append(write(f"{y:.6g}", LEFT - 7, row + 4, 'text-anchor="end"'))
    out.append(write(x_label, LEFT + WIDTH / 2, bottom + 31))
    middle = TOP + HEIGHT / 2
    out.append(write(y_label, 13, middle, f'transform="rotate(-90 13 {middle:.0f})"'))
    for mark in marks:
        points = [place(x, y) for x, y in zip(mark["xs"], mark["ys"])]
        inside = [(x, y) for x, y in points
                  if TOP <= y <= bottom and LEFT <= x <= LEFT + WIDTH]
        end = "h0" if mark["step"] == "M" else ""           # a stroke of length 0 is a dot
        steps = "".join(f"{mark['step']}{x:.1f} {y:.1f}{end}" for x, y in inside)
        style = f'stroke="{mark["colour"]}" stroke-width="{mark["width"]}"'
        out.append(f'<path d="M{steps[1:]}" fill="none" stroke-linecap="round" {style}/>')
    labelled = [mark for mark in marks if mark["label"]]
    for k, mark in enumerate(labelled):         # the legend, at the top right
        more = f'text-anchor="end" fill="{mark["colour"]}"'
        out.append(write(mark["label"], LEFT + WIDTH - 6, TOP + 15 + 14 * k, more))
    return "\n".join(out)


def svg(panels):
    """Panels side by side, as the text of an SVG file."""
    width = LEFT + WIDTH + RIGHT
    height = TOP + HEIGHT + BOTTOM
    groups = [f'<g transform="translate({k * width} 0)">\n{panel}\n</g>'
              for k, panel in enumerate(panels)]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width * len(panels)}" '
            f'height="{height}" font-family="sans-serif" font-size="11" text-anchor="middle">\n'
            f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(groups) + "\n</svg>\n")


def animated_png(frames, seconds):
    """Frames (H, W) uint8, each shown for so many seconds, over and over, as a PNG file."""
    H, W = frames[0].shape
    out = SIGNATURE + header(H, W) + chunk(b"acTL", struct.pack(">II", len(frames), 0))
    out += chunk(b"IDAT", compress(frames[0]))              # for viewers that do not animate
    for k, (frame, delay) in enumerate(zip(frames, seconds)):
        numbers = 2 * k, 2 * k + 1              # fcTL and fdAT are counted together
        out += chunk(b"fcTL", struct.pack(">IIIIIHHBB", numbers[0], W, H, 0, 0,
                                          round(100 * delay), 100, 0, 0))
        out += chunk(b"fdAT", struct.pack(">I", numbers[1]) + compress(frame))
    return out + chunk(b"IEND", b"")
