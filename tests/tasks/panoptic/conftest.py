"""Tiny panoptic data in COCO's own on-disk format."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CATEGORIES = [
    {"id": 3, "name": "box", "supercategory": "thing", "isthing": 1, "color": [220, 20, 60]},
    {"id": 17, "name": "plate", "supercategory": "thing", "isthing": 1, "color": [0, 220, 0]},
    {"id": 90, "name": "sky", "supercategory": "stuff", "isthing": 0, "color": [0, 0, 220]},
    {"id": 184, "name": "floor", "supercategory": "stuff", "isthing": 0, "color": [90, 90, 0]},
]
COLOURS = {3: (230, 60, 50), 17: (60, 200, 70), 90: (120, 160, 240), 184: (130, 110, 60)}


def scene(random: np.random.Generator, *, crowd: bool) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Pixels, segment ids and their list: floor under sky, boxes and plates before them, a void corner, or a crowd."""
    height, width = (int(n) for n in random.integers(44, 72, 2))
    ids = np.zeros((height, width), dtype=np.int64)
    kind: dict[int, int] = {}

    def paint(region: Any, category: int) -> None:
        number = int(random.integers(1, 2**24))
        ids[region] = number
        kind[number] = category

    horizon = int(random.integers(height // 3, 2 * height // 3))
    paint(np.s_[:horizon], 90)
    paint(np.s_[horizon:], 184)
    for _ in range(int(random.integers(1, 4))):
        y, x, h, w = (int(random.integers(*span)) for span in ((0, height - 16), (0, width - 16), (12, 26), (12, 26)))
        paint(np.s_[y : y + h, x : x + w], int(random.choice([3, 17])))
    ids[:4, :4] = 0
    pixels = np.zeros((height, width, 3), dtype=np.int64)
    segments = []
    for number, category in kind.items():
        mask = ids == number
        if not mask.any():
            continue
        pixels[mask] = np.array(COLOURS[category]) + random.integers(-20, 20, (int(mask.sum()), 3))
        rows, columns = np.nonzero(mask)
        box = [int(columns.min()), int(rows.min()), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]
        is_crowd = int(crowd and category == 17)
        segments.append(
            {"id": number, "category_id": category, "area": int(mask.sum()), "bbox": box, "iscrowd": is_crowd}
        )
    return pixels.clip(0, 255).astype(np.uint8), ids, segments


def write_split(root: Path, split: str, count: int, seed: int, first_id: int) -> None:
    random = np.random.default_rng(seed)
    images, annotations = [], []
    for folder in (root / split, root / "annotations" / f"panoptic_{split}"):
        folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels, ids, segments = scene(random, crowd=index % 4 == 3)
        number = first_id + index
        name = f"{number:012d}"
        Image.fromarray(pixels).save(root / split / f"{name}.jpg", quality=95)
        rgb = np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
        Image.fromarray(rgb).save(root / "annotations" / f"panoptic_{split}" / f"{name}.png")
        images.append({"id": number, "file_name": f"{name}.jpg", "height": ids.shape[0], "width": ids.shape[1]})
        annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": segments})
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def write_panoptic() -> Callable[..., Path]:
    """Write ``<split>/*.jpg``, ``annotations/panoptic_<split>.json`` and its PNG files for every split."""

    def write(root: Path, splits: Sequence[str] = ("train", "val", "test"), count: int = 8) -> Path:
        for place, split in enumerate(splits):
            write_split(root, split, count, seed=place, first_id=1000 * place + 1)
        return root

    return write
