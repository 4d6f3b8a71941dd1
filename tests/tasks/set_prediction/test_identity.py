"""Fingerprints of COCO folders as tasks use them, and images that are in two splits."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchformer.tasks.detection.data import DetectionData
from batchformer.tasks.panoptic.data import PanopticData

Writer = Callable[..., Path]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "data"))


def prints(root: Path, **settings: Any) -> dict[str, str]:
    return DetectionData("folder", str(root), **settings).fingerprints()


def test_every_split_has_one_wherever_it_lies(
    tmp_path: Path, write_coco: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_coco(tmp_path / "root", {"train": 5, "val": 3, "test": 3, "unseen": 3})
    before = prints(root)
    assert list(before) == ["train", "val", "test", "unseen"]
    assert len(set(before.values())) == 4
    assert prints(root, size=200, num_workers=2, seed=4, augment="flip") == before
    moved = Path(shutil.move(root, tmp_path / "moved"))
    assert prints(moved) == before
    monkeypatch.chdir(tmp_path)
    assert prints(Path("moved")) == before
    cut = prints(moved, train_images=3)
    assert cut["train"] != before["train"]
    assert {**cut, "train": ""} == {**before, "train": ""}


def test_boxes_and_segments_of_one_folder_are_different_data(tmp_path: Path, write_panoptic: Writer) -> None:
    data = PanopticData("folder", str(write_panoptic(tmp_path / "root", count=3)))
    assert list(data.fingerprints()) == ["train", "val", "test"]


def test_test_images_that_are_trained_on_are_counted(tmp_path: Path, write_coco: Writer) -> None:
    root = write_coco(tmp_path / "root", {"train": 4, "test": 3, "unseen": 3})
    train, unseen = (sorted((root / split).iterdir()) for split in ("train", "unseen"))
    for source, target in zip(train[:2], unseen[:2], strict=True):
        shutil.copy(source, target)
    data = DetectionData("folder", str(root))
    with pytest.warns(UserWarning, match="2 of 3 images of the split unseen are training images as well"):
        data.fingerprints()
    assert sum("training images as well" in note for note in data.notes()) == 1
