"""Boxes on images of one's own, drawn and as COCO's results."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from batchformer.data.coco_layout import file_ids
from batchformer.data.detection_transforms import collate, eval_transform, read_image

from .metrics import detections
from .restore import Restored, load_network

__all__ = ["draw", "predict"]

_COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#9a6324",
    "#808000",
    "#000075",
    "#f032e6",
)


def predict(run: Path, images: Sequence[Path], out: Path, *, threshold: float = 0.5) -> list[Path]:
    """Detect objects with the plain detector of a run.

    Args:
        run: Run folder.
        images: Image files.
        out: Folder; gets ``<image>.png`` with boxes, and ``detections.json``: COCO's results format with ``image_id``
            (:func:`batchformer.data.coco_layout.file_ids`), ``category_id``,
            ``bbox`` (x, y, width, height in pixels), ``score`` and also ``file_name``.
        threshold: Least score of a box, in 0..1.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: When the run has no checkpoint.
        ValueError: For a threshold out of range, and for a file that is no image.

    Warns:
        UserWarning: When no image has a box.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"Expected a threshold in 0..1, got {threshold}.")
    restored = load_network(run)
    facts = restored.facts
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    written: list[Path] = []
    ids = file_ids(images)
    for number, file in enumerate(images, 1):
        image = read_image(file)
        found = _detect(restored, image)
        keep = found["scores"] >= threshold
        found = {name: value[keep] for name, value in found.items()}
        picture = draw(image, found, facts.classes)
        path = out / f"{file.stem}.png"
        if path in written:  # of images with the same name in two folders
            path = out / f"{file.stem}-{number}.png"
        picture.save(path)
        written.append(path)
        results += _coco_results(found, facts.category_ids, ids[number - 1], file.name)
    if images and not results:
        warnings.warn(
            f"No box with a score of {threshold:g} or more in {_count(images)}: lower --threshold, or train longer.",
            stacklevel=2,
        )
    listing = out / "detections.json"
    listing.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return [*written, listing]


def _count(images: Sequence[Path]) -> str:
    return "1 image" if len(images) == 1 else f"{len(images)} images"


def _detect(restored: Restored, image: Image.Image) -> dict[str, Tensor]:
    facts = restored.facts
    pixels, label = eval_transform(facts.size, facts.max_size)(image, {})
    batch = collate([(pixels, label)], multiple=facts.pad_to)
    with torch.inference_mode():
        output = restored.network(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
    return detections(output.logits, output.pred_boxes, label["orig_size"][None], restored.kind)[0]


def draw(image: Image.Image, found: dict[str, Tensor], classes: Sequence[str]) -> Image.Image:
    """Draw boxes with class and score; the best on top.

    Args:
        image: Picture.
        found: ``boxes`` (D, 4) x1, y1, x2, y2 in its pixels, ``labels`` (D,), and ``scores`` (D,) where there are any.
        classes: Names by class index.

    Returns:
        A new picture, small ones enlarged so that the words can be read.
    """
    factor = max(1, round(480 / max(image.size)))
    picture = image.convert("RGB").resize((image.width * factor, image.height * factor))
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default()
    for row in reversed(range(len(found["labels"]))):
        label = int(found["labels"][row])
        left, top, right, bottom = (factor * float(x) for x in found["boxes"][row])
        colour = _COLOURS[label % len(_COLOURS)]
        pen.rectangle((left, top, max(left, right), max(top, bottom)), outline=colour, width=2)
        words = classes[label] + (f" {float(found['scores'][row]):.2f}" if "scores" in found else "")
        frame = pen.textbbox((max(0, left), max(0, top)), words, font=font)
        pen.rectangle(frame, fill=colour)
        pen.text((max(0, left), max(0, top)), words, fill="white", font=font)
    return picture


def _coco_results(found: dict[str, Tensor], category_ids: list[int], image_id: int, name: str) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[int(label)],
            "bbox": [round(float(x), 2) for x in (box[0], box[1], box[2] - box[0], box[3] - box[1])],
            "score": round(float(score), 5),
            "file_name": name,
        }
        for label, box, score in zip(found["labels"], found["boxes"], found["scores"], strict=True)
    ]
