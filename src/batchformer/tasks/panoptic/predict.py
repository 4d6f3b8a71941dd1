"""Panoptic maps of images of one's own: drawn, and in COCO's format of results."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from batchformer.data.coco_layout import file_ids
from batchformer.data.detection_transforms import collate, eval_transform, read_image

from .drawing import draw, side_by_side
from .maps import PanopticMap
from .postprocess import Frame, panoptic_map
from .restore import Restored, load_network

__all__ = ["predict", "segments_of", "write_png"]


def predict(
    run: Path,
    images: Sequence[Path],
    out: Path,
    *,
    threshold: float | None = None,
    beside: Sequence[Path] = (),
) -> list[Path]:
    """Segment images with the plain network of a run.

    Args:
        run: Run folder.
        images: Image files.
        out: Folder; gets ``<image>.png``: the image beside its map; ``panoptic/<image>.png`` and ``panoptic.json``:
            COCO's format of panoptic results (ids as ``R + 256 G + 65536 B``), which panopticapi reads.
        threshold: Least confidence of a segment, in 0..1; the run's own by default.
        beside: Run folders whose maps are drawn beside it, such as the other arm's.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: When a run has no checkpoint.
        ValueError: When a run has no mask head, for a threshold out of range, and for a file that is no image.

    Warns:
        UserWarning: When no image has a segment in the map of ``run``.
    """
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"Expected a threshold in 0..1, got {threshold}.")
    runs = [(_title(folder), _with_masks(folder)) for folder in (run, *beside)]
    written: list[Path] = []
    annotations = []
    (out / "panoptic").mkdir(parents=True, exist_ok=True)
    ids = file_ids(images)
    for number, file in enumerate(images, 1):
        image = read_image(file)
        maps = [segments_of(restored, image, threshold) for _, restored in runs]
        drawn = [
            (title, draw(image, found, restored.facts.classes, restored.facts.is_thing))
            for (title, restored), found in zip(runs, maps, strict=True)
        ]
        name = f"{file.stem}.png"
        if out / name in written:  # of images with the same name in two folders
            name = f"{file.stem}-{number}.png"
        side_by_side([("image", image), *drawn]).save(out / name)
        write_png(maps[0], out / "panoptic" / name)
        written += [out / name, out / "panoptic" / name]
        annotations.append(_annotation(maps[0], runs[0][1], ids[number - 1], name))
    if images and not any(entry["segments_info"] for entry in annotations):
        least = runs[0][1].postprocess.threshold if threshold is None else threshold
        number_of = "1 image" if len(images) == 1 else f"{len(images)} images"
        warnings.warn(f"No segment above {least:g} in {number_of}: lower --threshold, or train longer.", stacklevel=2)
    listing = out / "panoptic.json"
    listing.write_text(json.dumps({"annotations": annotations}, indent=1) + "\n", encoding="utf-8")
    return [*written, listing]


@torch.inference_mode()
def segments_of(restored: Restored, image: Image.Image, threshold: float | None = None) -> PanopticMap:
    """The panoptic map of one image by a restored network, at the image's own size.

    Args:
        restored: From `load_network`.
        image: RGB.
        threshold: Least confidence; the run's own by default.
    """
    facts, settings = restored.facts, asdict(restored.postprocess)
    batch = collate([eval_transform(facts.size, facts.max_size)(image, {})], multiple=facts.pad_to)
    output = restored.network(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
    if threshold is not None:
        settings["threshold"] = threshold
    is_thing = torch.tensor(facts.is_thing)
    return panoptic_map(
        output.logits[0], output.pred_masks[0], Frame.of(batch, 0), is_thing, kind=restored.kind, **settings
    )


def write_png(segments: PanopticMap, path: Path) -> None:
    """Write a map as COCO does: segment number ``R + 256 G + 65536 B``, 0 for void."""
    ids_HW = segments.ids_HW.cpu().numpy()
    Image.fromarray(np.stack([ids_HW >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)).save(path)


def _annotation(found: PanopticMap, restored: Restored, image_id: int, name: str) -> dict[str, Any]:
    areas = torch.bincount(found.ids_HW.flatten(), minlength=len(found.labels_S) + 1)[1:]
    rows = zip(found.labels_S.tolist(), found.scores_S.tolist(), areas.tolist(), strict=True)
    segments = [
        {"id": number, "category_id": restored.facts.category_ids[label], "area": area, "score": round(score, 5)}
        for number, (label, score, area) in enumerate(rows, 1)
    ]
    return {"image_id": image_id, "file_name": name, "segments_info": segments}


def _with_masks(run: Path) -> Restored:
    restored = load_network(run)
    if restored.part != "masks":
        raise ValueError(
            f"Expected a run with a mask head, got {run}, a detector alone. Train one on it with "
            "--model.stage.name=masks --model.stage.start_from=RUN."
        )
    return restored


def _title(run: Path) -> str:
    """``plain/seed0`` for runs of a comparison, else the folder's name."""
    return f"{run.parent.name}/{run.name}" if run.name.startswith("seed") else run.name
