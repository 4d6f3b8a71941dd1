"""Fingerprints of images with class labels, from folders, lists and arrays; images that are in two splits."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchformer.tasks.image_classification.data import ImageData
from batchformer.tasks.longtail.data import LongTailData

Writer = Callable[..., Path]
Change = Callable[[Path], Any]


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "data"))


def prints(root: Path, dataset: Any = "folder", **settings: Any) -> dict[str, str]:
    return ImageData(dataset, str(root), **settings).fingerprints()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.fixture
def splits(tmp_path: Path, write_images: Writer) -> Path:
    """A folder with train, val and test, of different pictures."""
    for split, side in (("train", 24), ("val", 40), ("test", 56)):
        write_images(tmp_path / "root" / split, [3, 2], side=side)
    return tmp_path / "root"


@pytest.mark.parametrize(
    ("changed", "change"),
    [
        ({"train"}, lambda root: flip(root / "train/class 0/000.jpg")),
        ({"test"}, lambda root: flip(root / "test/class 0/000.jpg")),
        ({"val"}, lambda root: (root / "val/class 0/001.png").rename(root / "val/class 1/005.png")),
        ({"train"}, lambda root: (root / "train/class 0/001.png").rename(root / "train/class 0/009.png")),
        ({"test"}, lambda root: (root / "test/class 0/001.png").unlink()),
        ({"train", "val", "test"}, lambda root: [(one / "class 0").rename(one / "a") for one in root.iterdir()]),
        (set(), lambda root: os.utime(root / "train/class 0/000.jpg", (1, 1))),
    ],
    ids=["byte", "test byte", "label", "name", "gone", "class", "time"],
)  # fmt: skip
def test_a_fingerprint_changes_with_the_content_of_its_split_alone(
    changed: set[str], change: Change, splits: Path
) -> None:
    before = prints(splits, check_images=False)
    assert list(before) == ["train", "val", "test"]
    assert len(set(before.values())) == 3
    change(splits)
    now = prints(splits, check_images=False)
    assert {name for name in now if now[name] != before[name]} == changed


def test_place_and_reading_do_not_change_it(splits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = prints(splits)
    assert prints(splits, memory_gib=0.0, num_workers=2, check_images=False, seed=3, batch_size=1) == before
    moved = Path(shutil.move(splits, splits.with_name("moved")))
    assert prints(moved) == before
    monkeypatch.chdir(moved)
    assert prints(Path()) == before
    data = ImageData("folder", str(moved))
    data.setup()
    assert data.fingerprints() == before


def test_the_choice_of_images_is_part_of_it(tmp_path: Path, write_images: Writer) -> None:
    root = write_images(tmp_path / "root", [12, 12])
    assert prints(root, subset_seed=1) != prints(root, subset_seed=2)
    cut = LongTailData("folder", str(root), n_max=4).fingerprints()
    whole = LongTailData("folder", str(root)).fingerprints()
    assert cut["train"] != whole["train"]
    assert cut["test"] == whole["test"]


def test_order_and_labels_of_lists_are_part_of_it(tmp_path: Path, write_images: Writer) -> None:
    write_images(tmp_path / "pictures", [2, 2])
    lines = [f"pictures/class {k}/{name} {k}" for k in (0, 1) for name in ("000.jpg", "001.png")]

    def listed(train: list[str]) -> dict[str, str]:
        for name, text in (("a", train), ("b", lines[3:])):
            (tmp_path / name).write_text("\n".join(text))
        return prints(tmp_path, train_list=tmp_path / "a", test_list=tmp_path / "b")

    before = listed(lines[:3])
    assert listed(lines[:3]) == before
    assert listed([lines[1], lines[0], lines[2]])["train"] != before["train"]
    relabelled = listed([lines[0], lines[1][:-1] + "1", lines[2]])
    assert relabelled["train"] != before["train"]
    assert relabelled["test"] == before["test"]


def test_arrays_have_fingerprints_of_pixels_and_labels(
    tmp_path: Path, write_fashion: Writer, write_cifar: Writer
) -> None:
    root = write_fashion(tmp_path / "fashion-mnist", per_class=4)
    before = prints(tmp_path, "fashion-mnist")
    assert before["val"] == before["test"] != before["train"]
    assert LongTailData("fashion-mnist", str(tmp_path), n_max=2).fingerprints()["train"] != before["train"]
    write_fashion(root, per_class=4, tested=2)
    assert prints(tmp_path, "fashion-mnist")["train"] == before["train"]
    assert prints(tmp_path, "fashion-mnist")["test"] != before["test"]
    write_cifar(tmp_path / "cifar-10-batches-py")
    assert prints(tmp_path, "cifar10")["train"] not in before.values()


@pytest.mark.parametrize("way", ["copy", "link"])
def test_test_images_that_are_trained_on_are_counted(way: str, splits: Path) -> None:
    source, target = splits / "train/class 0/000.jpg", splits / "test/class 1/new.jpg"
    shutil.copy(source, target) if way == "copy" else target.symlink_to(source)
    data = LongTailData("folder", str(splits))
    with pytest.warns(UserWarning, match="1 of 6 images of the split test is a training image as well"):
        data.setup()
    assert data.notes()[0].startswith("1 of 6 images of the split test")


def test_without_such_images_there_is_no_note(splits: Path) -> None:
    data = ImageData("folder", str(splits))
    data.setup()
    assert data.notes() == []
