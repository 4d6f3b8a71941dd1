"""Panoptic maps as pictures: colours over the image, borders, names, and several maps of an image in one row.

Axis letters: H, W pixels, S segments.
"""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import distance_transform_edt

from batchformer.data.detection_transforms import read_image

from .maps import PanopticMap

__all__ = ["KeptMaps", "draw", "side_by_side"]

_GOLDEN = 0.61803398875
_LEAST = 320
"""Least number of pixels of a picture's longer side, so that names can be read."""


def draw(image: Image.Image, segments: PanopticMap, classes: Sequence[str], is_thing: Sequence[bool]) -> Image.Image:
    """Draw a panoptic map over its image.

    Each class has its hue; instances of a thing differ in brightness; stuff is paler. Void keeps the image's colours.

    Args:
        image: Image of the map's size.
        segments: Panoptic map.
        classes: Name of each class, by class index.
        is_thing: For each class, by index, True for things and False for stuff.

    Returns:
        A new picture; small ones are enlarged so that the names can be read.

    Raises:
        ValueError: When image and map differ in size.

    Example:
        >>> import torch
        >>> whole = PanopticMap.of(torch.ones(20, 30, dtype=torch.long), [1], [0])
        >>> draw(Image.new("RGB", (30, 20)), whole, ["sky"], [False]).size
        (330, 220)
    """
    height, width = segments.ids_HW.shape
    if image.size != (width, height):
        raise ValueError(
            f"Expected an image of the map's size {width} x {height}, got {image.size[0]} x {image.size[1]}. Resize it."
        )
    factor = max(1, -(-_LEAST // max(image.size)))
    ids_HW = segments.ids_HW.cpu().repeat_interleave(factor, 0).repeat_interleave(factor, 1).numpy()
    labels = segments.labels_S.tolist()
    colours = np.array([(0.0, 0.0, 0.0), *_colours(labels, is_thing)])
    pixels = np.asarray(image.convert("RGB").resize((width * factor, height * factor)), dtype=np.float64)
    painted = np.where(ids_HW[..., None] > 0, 0.4 * pixels + 0.6 * 255 * colours[ids_HW], pixels)
    painted[_borders(ids_HW)] = 255
    picture = Image.fromarray(painted.round().astype(np.uint8))
    _write_names(picture, ids_HW, [classes[label] for label in labels])
    return picture


def side_by_side(panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Put pictures into a row, each under its title.

    Args:
        panels: Title and picture of each; lower pictures are enlarged to the height of the tallest.

    Raises:
        ValueError: When there are no panels.

    Example:
        >>> tile = Image.new("RGB", (30, 20))
        >>> side_by_side([("image", tile), ("truth", tile)]).size
        (64, 38)
    """
    if not panels:
        raise ValueError("Expected at least one picture to put into a row, got none.")
    height = max(picture.height for _, picture in panels)
    pictures = [
        picture
        if picture.height == height
        else picture.resize((round(picture.width * height / picture.height), height))
        for _, picture in panels
    ]
    gap, title = 4, 18
    row = Image.new("RGB", (sum(p.width for p in pictures) + gap * (len(pictures) - 1), height + title), "white")
    pen, font, left = ImageDraw.Draw(row), ImageFont.load_default(), 0
    for (words, _), picture in zip(panels, pictures, strict=True):
        pen.text((left + 2, 3), words, fill="black", font=font)
        row.paste(picture, (left, title))
        left += picture.width + gap
    return row


class KeptMaps:
    """Maps of the first test images, which are drawn when the test is over.

    Args:
        most: Number of images that are kept.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: list[tuple[Path, PanopticMap, PanopticMap]] = []

    def add(self, files: Sequence[str], maps: Sequence[tuple[PanopticMap, Any, PanopticMap]]) -> None:
        """Keep the maps of a batch, until there are enough.

        Args:
            files: Image files.
            maps: Predicted map, instances and true map of each image; empty for a detector alone.
        """
        for file, (predicted, _, truth) in zip(files, maps, strict=False):
            if len(self.kept) < self.most:
                self.kept.append((Path(file), truth, predicted))

    def write(self, folder: Path, facts: Any, title: str) -> None:
        """Draw what was kept and forget it.

        Args:
            folder: Gets ``<image>.png`` with the predicted map, and ``given/<image>.png`` with image and true map.
            facts: Facts about the data, with ``classes`` and ``is_thing``.
            title: Title of the predicted maps.
        """
        for file, truth, predicted in self.kept:
            (folder / "given").mkdir(parents=True, exist_ok=True)
            image = read_image(file)
            true, found = (draw(image, one, facts.classes, facts.is_thing) for one in (truth, predicted))
            side_by_side([("image", image), ("truth", true)]).save(folder / "given" / f"{file.stem}.png")
            side_by_side([(title, found)]).save(folder / f"{file.stem}.png")
        self.kept.clear()


def _colours(labels: Sequence[int], is_thing: Sequence[bool]) -> list[tuple[float, float, float]]:
    """Return red, green, blue in 0..1 of each segment, by its class and its number within the class."""
    colours, seen = [], dict.fromkeys(labels, 0)
    for label in labels:
        # Neighbours among the classes get hues far apart.
        hue = (label * _GOLDEN) % 1
        brightness = 1.0 - 0.22 * (seen[label] % 3)
        colours.append(colorsys.hsv_to_rgb(hue, 0.95 if is_thing[label] else 0.45, brightness))
        seen[label] += 1
    return colours


def _borders(ids_HW: Any) -> Any:
    """Mark the pixels whose right or lower neighbour belongs to another segment."""
    borders = np.zeros(ids_HW.shape, dtype=bool)
    borders[:, :-1] |= ids_HW[:, :-1] != ids_HW[:, 1:]
    borders[:-1] |= ids_HW[:-1] != ids_HW[1:]
    return borders


def _write_names(picture: Image.Image, ids_HW: Any, names: Sequence[str]) -> None:
    """Write a name into each segment that has room for it, at its innermost pixel."""
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default()
    for number, name in enumerate(names, 1):
        segment = ids_HW == number
        left, top, right, bottom = pen.textbbox((0, 0), name, font=font)
        if segment.sum() < 2 * (right - left) * (bottom - top):
            continue
        depth = distance_transform_edt(np.pad(segment, 1))[1:-1, 1:-1]  # the picture's edge is an edge too
        row, column = np.unravel_index(int(np.argmax(depth)), depth.shape)
        x = min(max(0, int(column) - int(right) // 2), picture.width - int(right) - 1)
        y = min(max(0, int(row) - int(bottom) // 2), picture.height - int(bottom) - 1)
        pen.text((x, y), name, fill="white", font=font, stroke_width=1, stroke_fill="black")
