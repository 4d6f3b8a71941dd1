"""Pictures and predictions on images of one's own."""

import pytest
import torch
from PIL import Image

from batchformer.tasks.panoptic.drawing import draw, side_by_side
from batchformer.tasks.panoptic.maps import PanopticMap
from batchformer.tasks.panoptic.predict import segments_of
from batchformer.tasks.panoptic.restore import PanopticFacts
from batchformer.tasks.panoptic.settings import NetworkSettings, PanopticSettings, PostprocessSettings
from batchformer.tasks.training.checkpoint import Restored


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


def test_a_name_stands_in_the_middle_of_its_segment() -> None:
    ids = torch.ones(320, 320, dtype=torch.int64)
    ids[60:260, 60:260] = 2  # a ring around it: the pixels nearest to the ring's middle lie at its inner edge
    picture = draw(
        Image.new("RGB", (320, 320)), PanopticMap.of(ids, [1, 2], [0, 1]), ["backdrop", "cat"], [False, True]
    )
    black = torch.tensor([[sum(picture.getpixel((x, y))) < 30 for x in range(320)] for y in range(320)])
    rows, columns = black.nonzero(as_tuple=True)
    inside = (rows >= 60) & (rows < 260) & (columns >= 60) & (columns < 260)
    assert abs(rows[inside].float().mean() - 160) < 10 and abs(columns[inside].float().mean() - 160) < 10
    ring = rows[~inside].float().mean(), columns[~inside].float().mean()
    assert min(*ring, 320 - ring[0], 320 - ring[1]) < 60, "between the picture's edge and the square"
    assert int(inside.sum()) > 20 and int((~inside).sum()) > 20


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


class _Seen(Exception):
    """Stops a network that has been given what the test asks for."""


@pytest.mark.parametrize(("pad_to", "expected"), [(64, (64, 64)), (1, (32, 64))])
def test_trained_on_squares_it_predicts_on_squares(pad_to: int, expected: tuple[int, int]) -> None:
    def network(*, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> None:
        assert tuple(pixel_values.shape[2:]) == tuple(pixel_mask.shape[1:]) == expected
        assert int(pixel_mask.sum()) == 32 * 64, "the rest is padding"
        raise _Seen

    facts = PanopticFacts(["cat"], [3], [1], size=64, max_size=64, pad_to=pad_to, is_thing=[True])
    with pytest.raises(_Seen):
        segments_of(
            Restored(network, facts, PanopticSettings(NetworkSettings(), PostprocessSettings()), "masks"),
            Image.new("RGB", (200, 100)),
        )
