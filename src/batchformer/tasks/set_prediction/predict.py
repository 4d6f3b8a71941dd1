"""The loop over image files: read, pass through a restored detector, write pictures and one JSON file of results."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from batchformer.data.atomic import atomic_file, write_json
from batchformer.data.coco_layout import file_ids
from batchformer.data.detection_transforms import collate, eval_transform, read_image
from batchformer.tasks.training.checkpoint import Restored

__all__ = ["Found", "ImageFile", "check_threshold", "outputs_of", "predict_files"]


class ImageFile(NamedTuple):
    """An image of the user.

    Attributes:
        path: Path of the file.
        image: Picture in RGB.
        image_id: Id in the results: see :func:`batchformer.data.coco_layout.file_ids`.
        name: Name of its picture among the results; no two images have the same.
    """

    path: Path
    image: Image.Image
    image_id: int
    name: str


class Found(NamedTuple):
    """Result for one image.

    Attributes:
        pictures: Path below the folder of results -> picture.
        records: Entries of the JSON file.
        number: Number of objects or segments that were found.
    """

    pictures: dict[str, Image.Image]
    records: list[dict[str, Any]]
    number: int


def predict_files(
    images: Sequence[Path],
    out: Path,
    find: Callable[[ImageFile], Found],
    *,
    listing: str,
    nothing: str,
    key: str | None = None,
) -> list[Path]:
    """Find objects in image files and write the results; every file is whole or not there.

    Args:
        images: Image files.
        out: Folder of the results; made if absent.
        find: Gives the result for one image.
        listing: Name of the JSON file with the records of all images.
        nothing: Beginning of the warning when nothing is found: "No box with a score of 0.5 or more".
        key: Key of the records in the JSON file; ``None``: the file is a list of them.

    Returns:
        The files written, the JSON file last.

    Raises:
        DataError: For a file that is no image.

    Warns:
        UserWarning: When nothing is found in any image.
    """
    written: list[Path] = []
    records: list[dict[str, Any]] = []
    count = 0
    for number, (path, image_id) in enumerate(zip(images, file_ids(images), strict=True), 1):
        name = f"{path.stem}.png"
        if out / name in written:  # images in two folders have the same name
            name = f"{path.stem}-{number}.png"
        found = find(ImageFile(path, read_image(path), image_id, name))
        for place, picture in found.pictures.items():
            with atomic_file(out / place) as new:
                picture.save(new)
            written.append(out / place)
        records += found.records
        count += found.number
    if images and not count:
        where = "1 image" if len(images) == 1 else f"{len(images)} images"
        warnings.warn(f"{nothing} in {where}: lower --threshold, or train longer.", stacklevel=3)
    write_json(out / listing, records if key is None else {key: records})
    return [*written, out / listing]


def check_threshold(threshold: float | None) -> None:
    """Refuse a threshold outside 0..1; ``None`` stands for the run's own.

    Raises:
        ValueError: When it is out of range.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"Expected a threshold in 0..1, got {threshold}.")


@torch.inference_mode()
def outputs_of(restored: Restored, image: Image.Image) -> tuple[dict[str, Any], Any]:
    """Pass one image through a restored detector as the test does.

    Args:
        restored: Network, and facts with ``size``, ``max_size`` and ``pad_to``.
        image: Picture in RGB.

    Returns:
        The batch of this image, with ``pixel_values``, ``pixel_mask`` and ``labels`` (sizes alone), and the network's
        output.
    """
    facts = restored.facts
    batch = collate([eval_transform(facts.size, facts.max_size)(image, {})], multiple=facts.pad_to)
    return batch, restored.network(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
