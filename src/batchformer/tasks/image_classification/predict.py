"""The classes that the plain network of a run sees in images that nobody labelled."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch

from batchformer.data import images as files
from batchformer.data.transforms import image_eval, normalize
from batchformer.tasks.longtail.restore import exportable, load_network

_BATCH = 64


def predict(run: Path, images: Sequence[Path], out: Path, *, top: int = 5) -> list[Path]:
    """Write the most probable classes of each image.

    Args:
        run: Run folder.
        images: Image files of any size; the short side is resized and the centre cut out, as for test images.
        out: Folder; gets ``predictions.csv`` with the columns image, rank (from 1), class and probability (0..1).
        top: Classes for each image, at most.

    Returns:
        The file.

    Raises:
        FileNotFoundError: When the run has no checkpoint.
        ValueError: When images cannot be decoded; names all of them.
    """
    facts, forward = load_network(run).facts, exportable(run).forward
    prepare = image_eval(facts.image_size)
    rows: list[tuple[str | int | float, ...]] = []
    broken = []
    for start in range(0, len(images), _BATCH):
        pixels = []
        for path in images[start : start + _BATCH]:
            try:
                pixels.append(prepare(files.decode(path, facts.in_channels)))
            except OSError as error:
                broken.append(f"\n  {path}: {error}")
        if broken:
            continue
        with torch.inference_mode():
            probabilities_NK = forward(normalize(torch.stack(pixels), facts.mean, facts.std)).softmax(dim=1)
        best = probabilities_NK.topk(min(top, len(facts.classes)), dim=1)
        for path, values, classes in zip(images[start:], best.values.tolist(), best.indices.tolist(), strict=False):
            rows += [
                (str(path), rank, facts.classes[k], value)
                for rank, (value, k) in enumerate(zip(values, classes, strict=True), 1)
            ]
    if broken:
        raise ValueError(f"Expected image files, but {len(broken)} cannot be decoded:{''.join(broken)}")
    with (out / "predictions.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([("image", "rank", "class", "probability"), *rows])
    return [out / "predictions.csv"]
