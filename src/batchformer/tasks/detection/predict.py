"""Detection on the user's own images: boxes drawn, and in COCO's format of results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from batchformer.tasks.set_prediction.postprocess import detections
from batchformer.tasks.set_prediction.predict import Found, ImageFile, check_threshold, outputs_of, predict_files
from batchformer.tasks.set_prediction.settings import KINDS

from .restore import load_network

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
            (:func:`batchformer.data.coco_layout.file_ids`), ``category_id``, ``bbox`` (x, y, width, height in pixels)
            and ``score``, and also ``file_name``.
        threshold: Least score of a box, in 0..1.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: When the run has no checkpoint.
        ValueError: For a threshold out of range, and for a file that is no image.

    Warns:
        UserWarning: When no image has a box.
    """
    check_threshold(threshold)
    restored = load_network(run)
    kind, facts = KINDS[restored.settings.detector], restored.facts

    def find(file: ImageFile) -> Found:
        batch, output = outputs_of(restored, file.image)
        sizes = batch["labels"][0]["orig_size"][None]
        found = detections(output.logits, output.pred_boxes, sizes, kind)[0]
        keep = found["scores"] >= threshold
        found = {name: value[keep] for name, value in found.items()}
        records = _coco_results(found, facts.category_ids, file.image_id, file.path.name)
        return Found({file.name: draw(file.image, found, facts.classes)}, records, len(records))

    nothing = f"No box with a score of {threshold:g} or more"
    return predict_files(images, out, find, listing="detections.json", nothing=nothing)


def draw(image: Image.Image, found: dict[str, Tensor], classes: Sequence[str]) -> Image.Image:
    """Draw boxes with class and score; the box with the best score lies on top.

    Args:
        image: Picture.
        found: ``boxes`` (D, 4), x1, y1, x2, y2 in pixels of the picture; ``labels`` (D,); and ``scores`` (D,), best
            first, where there are any.
        classes: Name of each class, by class index.

    Returns:
        A new picture; small pictures are enlarged so that the words can be read.

    Example:
        >>> from torch import tensor
        >>> found = {"boxes": tensor([[10.0, 20.0, 40.0, 50.0]]), "labels": tensor([1]), "scores": tensor([0.9])}
        >>> draw(Image.new("RGB", (64, 64)), found, ["cat", "dog"]).size
        (512, 512)
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
