"""Panoptic quality of the project against the reference evaluator's, on the truth and on perturbed copies of it.

pip install --no-deps panopticapi-lite
python benchmarks/panoptic_quality.py panoptic_val2017.json panoptic_val2017/ --images 100

Prints the largest difference over all figures and classes; both read the same PNG files.
"""

import argparse
import contextlib
import importlib
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from batchformer.tasks.panoptic.maps import PanopticMap
from batchformer.tasks.panoptic.metrics import PanopticQuality

STRENGTHS = (0, 1, 2, 4, 8, 16, 32)


def read_png(path: Path) -> Any:
    """Segment id of each pixel, (H, W)."""
    pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.int64)
    return pixels[..., 0] + 256 * pixels[..., 1] + 65536 * pixels[..., 2]


def write_png(ids: Any, path: Path) -> None:
    Image.fromarray(np.stack([ids >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)).save(path)


def perturb(ids: Any, segments: list[dict[str, Any]], classes: list[int], strength: int, seed: int) -> Any:
    """Shift all segments; lose, rename, cut or join some; put rectangles on top. Strength 0 changes nothing."""
    random = np.random.default_rng(seed)
    ids, category = ids.copy(), {s["id"]: s["category_id"] for s in segments}
    if strength == 0:
        return ids, category
    ids = np.roll(ids, random.integers(-strength, strength + 1, 2), (0, 1))
    for number in list(category):
        draw, mine = random.random(), ids == number
        if draw < 0.08:
            ids[mine] = 0
        elif draw < 0.2:
            category[number] = int(random.choice(classes))
        elif draw < 0.35 and mine.any():
            fresh = int(random.integers(1, 2**24))
            category[fresh] = category[number]
            ids[mine & (np.arange(ids.shape[1]) > np.median(np.nonzero(mine)[1]))] = fresh
        elif draw < 0.45:
            ids[mine] = int(random.choice(list(category)))
    for _ in range(strength // 2):
        fresh, (y, x) = int(random.integers(1, 2**24)), (int(random.integers(0, size)) for size in ids.shape)
        ids[y : y + random.integers(3, 80), x : x + random.integers(3, 80)] = fresh
        category[fresh] = int(random.choice([s["category_id"] for s in segments] + classes[:1]))
    return ids, category


def of_ids(ids: Any, category: dict[int, int], crowd: set[int], index: dict[int, int]) -> PanopticMap:
    numbers = list(category)
    labels = [index[category[n]] for n in numbers]
    return PanopticMap.of(torch.from_numpy(ids), numbers, labels, [n in crowd for n in numbers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("folder", type=Path, help="of the PNG files that it names")
    parser.add_argument("--images", type=int, default=10)
    arguments = parser.parse_args()
    reference: Any = importlib.import_module("panopticapi.evaluation")
    content = json.loads(arguments.json.read_text(encoding="utf-8"))
    categories = {category["id"]: category for category in content["categories"]}
    index = {number: place for place, number in enumerate(categories)}
    worst = 0.0
    for seed, strength in enumerate(STRENGTHS * 6):
        metric, pairs = PanopticQuality([bool(c["isthing"]) for c in categories.values()]), []
        with tempfile.TemporaryDirectory() as folder:
            for truth in content["annotations"][: arguments.images]:
                ids, segments = read_png(arguments.folder / truth["file_name"]), truth["segments_info"]
                guess, category = perturb(ids, segments, list(categories), strength, seed)
                there = set(np.unique(guess).tolist())
                category = {number: c for number, c in category.items() if number in there}
                write_png(guess, Path(folder) / truth["file_name"])
                listed = [{"id": number, "category_id": c} for number, c in category.items()]
                pairs.append((truth, {"file_name": truth["file_name"], "segments_info": listed}))
                crowd = {s["id"] for s in segments if s["iscrowd"]}
                own = of_ids(ids, {s["id"]: s["category_id"] for s in segments}, crowd, index)
                metric.update([of_ids(guess, category, set(), index)], [own])
            with contextlib.redirect_stdout(io.StringIO()):
                counts = reference.pq_compute_single_core(0, pairs, arguments.folder, Path(folder), categories)
        ours = metric.compute()
        for end, things in (("", None), ("_things", True), ("_stuff", False)):
            means, per_class = counts.pq_average(categories, isthing=things)
            worst = max(worst, *(abs(means[name.lower()] - float(ours[name + end])) for name in ("PQ", "SQ", "RQ")))
            mine = ours["per_class"].nan_to_num(0)
            worst = max(worst, *(abs(found["pq"] - float(mine[index[n]])) for n, found in per_class.items()))
        print(f"strength {strength:2d}: PQ {float(ours['PQ']):.4f}")
    print(f"largest difference to panopticapi: {worst:.1e}")


if __name__ == "__main__":
    main()
