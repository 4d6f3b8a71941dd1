"""Pictures and predictions on images of one's own."""

import pytest
import torch
from PIL import Image

from batchformer.tasks.panoptic.maps import PanopticMap
from batchformer.tasks.panoptic.pictures import draw, side_by_side


def test_classes_have_their_colours_and_void_keeps_the_image() -> None:
    ids = torch.zeros(40, 400, dtype=torch.int64)
    ids[:20, :200], ids[:20, 200:], ids[20:, :200] = 1, 2, 3
    segments = PanopticMap.of(ids, [1, 2, 3], [0, 0, 1])
    image = Image.new("RGB", (400, 40), (100, 100, 100))
    picture = draw(image, segments, ["cat", "sky"], [True, False])
    assert picture.size == image.size
    cat, other_cat, sky, void = (picture.getpixel(at) for at in ((3, 3), (390, 3), (3, 33), (390, 33)))
    assert void == (100, 100, 100)
    assert len({cat, other_cat, sky, void}) == 4
    assert picture.getpixel((199, 3)) == (255, 255, 255), "a border between two of a class"


def test_small_pictures_grow_and_sizes_must_agree() -> None:
    segments = PanopticMap.of(torch.ones(20, 30, dtype=torch.int64), [1], [0])
    assert max(draw(Image.new("RGB", (30, 20)), segments, ["sky"], [False]).size) >= 320
    with pytest.raises(ValueError, match="map's size 30 x 20, got 20 x 30"):
        draw(Image.new("RGB", (20, 30)), segments, ["sky"], [False])


def test_a_row_has_all_panels_in_order() -> None:
    tiles = [("red", Image.new("RGB", (40, 60), "red")), ("blue", Image.new("RGB", (20, 30), "blue"))]
    row = side_by_side(tiles)
    assert row.size == (40 + 4 + 40, 60 + 18)
    assert row.getpixel((20, 40)) == (255, 0, 0) and row.getpixel((60, 40)) == (0, 0, 255)
    with pytest.raises(ValueError, match="at least one picture"):
        side_by_side([])
