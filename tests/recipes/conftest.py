"""Tiny data in the real on-disk format of every data set that a recipe names."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from batchformer.data import fetch

TRAIN_COUNTS = (8, 4, 3, 2)
SCENES = {"scenes.json", "annotations/instances_train.json", "annotations/panoptic_train.json"}
LISTED = {
    "imagenet-lt": "train/n0144076{label}/n0144076{label}_{index}.JPEG",
    "places-lt": "data_256/a/place {label}/{index:08d}.jpg",
    "inat18": "train_val2018/Plantae/{label}/{index:032x}.jpg",
}


def write_lists(root: Path, dataset: str) -> Path:
    """Write the published list files, "path label" a line, and the JPEG files that they name."""
    random = np.random.default_rng(0)
    for split, name in zip(("train", "val", "test"), fetch.describe(dataset).files, strict=False):
        lines = []
        for label, count in enumerate(TRAIN_COUNTS):
            for _ in range(count if split == "train" else 2):
                path = LISTED[dataset].format(label=label, index=int(random.integers(2**31)))
                file = root / path
                file.parent.mkdir(parents=True, exist_ok=True)
                height, width = random.integers(36, 48, 2)
                Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "JPEG")
                lines.append(f"{path} {label}")
        (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def make_data(
    write_fashion: Callable[..., Path],
    write_cifar: Callable[..., Path],
    write_images: Callable[..., Path],
    write_coco: Callable[..., Path],
    write_panoptic: Callable[..., Path],
    tmp_path: Path,
) -> Callable[..., Path]:
    """Write a data set once and say where it is."""

    def make(dataset: str, task: str = "longtail") -> Path:
        root = tmp_path / "data" / task / dataset
        year = "2017" if dataset == "coco" else ""
        if root.exists():
            return root
        if task in ("detection", "panoptic"):
            splits = {"train": 16, "val": 4} | ({"test": 4, "unseen": 3} if dataset == "scenes" else {})
            if task == "detection":
                write_coco(root, splits, year=year)
            else:
                write_panoptic(root, [f"{split}{year}" for split in splits])
            if dataset == "scenes":  # the rest of what a written set has
                for name in SCENES - {path.relative_to(root).as_posix() for path in root.rglob("*.json")}:
                    (root / name).write_text("{}", encoding="utf-8")
            return root
        if dataset == "fashion-mnist":
            return write_fashion(root, per_class=6, tested=2)
        if dataset in ("cifar10", "cifar100"):
            return write_cifar(root, classes=10 if dataset == "cifar10" else 6, per_class=5)
        if dataset == "folder":
            return write_images(root, [12, 8, 6])
        return write_lists(root, dataset)

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep what the data module remembers out of the user's cache."""
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "cache"))
