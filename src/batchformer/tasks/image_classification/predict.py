"""Predictions of a classifier on images without labels, as a CSV file."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from batchformer.data import images as files
from batchformer.data.atomic import atomic_file
from batchformer.data.transforms import image_eval, normalize
from batchformer.tasks.training.contract import Exportable

_BATCH = 64


def predict_classes(plain: Exportable, images: Sequence[Path], out: Path, *, top: int = 5) -> list[Path]:
    """Write the most probable classes of each image.

    Args:
        plain: Plain network of a run, from images to logits; its ``facts`` hold classes, in_channels, image_size, mean
            and std.
        images: Image files of any size; the short side is resized and the centre cut out, as for test images.
        out: Folder; gets ``predictions.csv`` with the columns image, rank (from 1), class and probability (0..1).
        top: Largest number of classes for each image.

    Returns:
        The file.

    Raises:
        ValueError: When images cannot be decoded; names all of them.
    """
    facts, classes = plain.facts, plain.facts["classes"]
    prepare = image_eval(facts["image_size"])
    rows: list[tuple[str | int | float, ...]] = []
    broken = []
    for start in range(0, len(images), _BATCH):
        pixels = []
        for path in images[start : start + _BATCH]:
            try:
                pixels.append(prepare(files.decode(path, facts["in_channels"])))
            except OSError as error:
                broken.append(f"\n  {path}: {error}")
        if broken:
            continue
        with torch.inference_mode():
            logits_NK = plain.forward(normalize(torch.stack(pixels), facts["mean"], facts["std"]))
        best = logits_NK.softmax(dim=1).topk(min(top, len(classes)), dim=1)
        for path, values, indices in zip(images[start:], best.values.tolist(), best.indices.tolist(), strict=False):
            rows += [
                (str(path), rank, classes[k], value)
                for rank, (value, k) in enumerate(zip(values, indices, strict=True), 1)
            ]
    if broken:
        raise ValueError(f"Expected image files, but {len(broken)} cannot be decoded:{''.join(broken)}")
    path = out / "predictions.csv"
    with atomic_file(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("image", "rank", "class", "probability"), *rows])
    return [path]
