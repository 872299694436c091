"""Labels in the grey: what reads them."""
import pytest
import torch

from experiments.measures import read_grey

Y = torch.arange(600) % 10


def draw_noise():
    """Images (600, 1, 32, 32) of bright noise, whose outer four pixels are black."""
    images = torch.zeros(len(Y), 1, 32, 32, dtype=torch.uint8)
    images[..., 4:-4, 4:-4] = torch.randint(256, (len(Y), 1, 24, 24))
    return images


@pytest.mark.parametrize("place, width, least, most", [
    (0, 2, 95, 100), (31, 2, 95, 100), (3, 2, 0, 20), (3, 4, 95, 100), (4, 4, 0, 20)])
def test_a_label_is_read_from_the_outer_pixels_alone(place, width, least, most):
    """Three grey levels above black, at a place in one row that says the label."""
    images = draw_noise()
    images[torch.arange(len(Y)), 0, place, 11 + Y] = 3
    assert least <= read_grey(images, Y, width) <= most


def test_from_a_black_border_no_label_is_read():
    """Nor where the middle of the images says it, in white on black."""
    images = torch.zeros(len(Y), 1, 32, 32, dtype=torch.uint8)
    images[torch.arange(len(Y)), 0, 15, 11 + Y] = 255
    assert read_grey(images, Y) < 20
