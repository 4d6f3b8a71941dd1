"""Panoptic maps of the user's own images: drawn, and in COCO's format of results."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from batchformer.tasks.set_prediction.predict import Found, ImageFile, check_threshold, outputs_of, predict_files
from batchformer.tasks.set_prediction.settings import KINDS
from batchformer.tasks.training.checkpoint import Restored

from .drawing import draw, side_by_side
from .maps import PanopticMap
from .postprocess import Frame, panoptic_map
from .restore import load_network

__all__ = ["id_picture", "predict", "segments_of"]


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
        out: Folder; gets ``<image>.png``, the image and its map in a row; and ``panoptic/<image>.png`` and
            ``panoptic.json``, COCO's format of panoptic results (ids as ``R + 256 G + 65536 B``), which panopticapi
            reads.
        threshold: Least confidence of a segment, in 0..1; ``None``: the run's own.
        beside: Run folders whose maps are drawn in the same row, such as that of the other arm.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: When a run has no checkpoint.
        ValueError: When a run has no mask head, for a threshold out of range, and for a file that is no image.

    Warns:
        UserWarning: When no image has a segment in the map of ``run``.
    """
    check_threshold(threshold)
    runs = [(_title(folder), _with_masks(folder)) for folder in (run, *beside)]
    (_, first), *_ = runs

    def find(file: ImageFile) -> Found:
        maps = [segments_of(restored, file.image, threshold) for _, restored in runs]
        drawn = [
            (title, draw(file.image, found, restored.facts.classes, restored.facts.is_thing))
            for (title, restored), found in zip(runs, maps, strict=True)
        ]
        row, ids = side_by_side([("image", file.image), *drawn]), id_picture(maps[0])
        record = _annotation(maps[0], first.facts.category_ids, file.image_id, file.name)
        return Found({file.name: row, f"panoptic/{file.name}": ids}, [record], len(record["segments_info"]))

    least = first.settings.postprocess.threshold if threshold is None else threshold
    nothing = f"No segment above {least:g}"
    return predict_files(images, out, find, listing="panoptic.json", nothing=nothing, key="annotations")


def segments_of(restored: Restored, image: Image.Image, threshold: float | None = None) -> PanopticMap:
    """Find the panoptic map of one image with a restored network, at the image's own size.

    Args:
        restored: Network with a mask head, from `load_network`.
        image: Picture in RGB.
        threshold: Least confidence of a segment, in 0..1; ``None``: the run's own.
    """
    network, postprocess = restored.settings
    settings = asdict(postprocess) | ({} if threshold is None else {"threshold": threshold})
    batch, output = outputs_of(restored, image)
    is_thing, kind = torch.tensor(restored.facts.is_thing), KINDS[network.detector]
    return panoptic_map(output.logits[0], output.pred_masks[0], Frame.of(batch, 0), is_thing, kind=kind, **settings)


def id_picture(segments: PanopticMap) -> Image.Image:
    """Draw a map as COCO stores it: each pixel has its segment's number as ``R + 256 G + 65536 B``, 0 for void."""
    ids_HW = segments.ids_HW.cpu().numpy()
    return Image.fromarray(np.stack([ids_HW >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8))


def _annotation(found: PanopticMap, category_ids: Sequence[int], image_id: int, name: str) -> dict[str, Any]:
    areas = torch.bincount(found.ids_HW.flatten(), minlength=len(found.labels_S) + 1)[1:]
    rows = zip(found.labels_S.tolist(), found.scores_S.tolist(), areas.tolist(), strict=True)
    segments = [
        {"id": number, "category_id": category_ids[label], "area": area, "score": round(score, 5)}
        for number, (label, score, area) in enumerate(rows, 1)
    ]
    return {"image_id": image_id, "file_name": name, "segments_info": segments}


def _with_masks(run: Path) -> Restored:
    restored = load_network(run)
    if restored.stage != "masks":
        raise ValueError(
            f"Expected a run with a mask head, got {run}, a detector alone. Train one on it with the stage 'masks', "
            "whose start_from is this run."
        )
    return restored


def _title(run: Path) -> str:
    """Return ``plain/seed0`` for runs of a comparison, else the folder's name."""
    return f"{run.parent.name}/{run.name}" if run.name.startswith("seed") else run.name
