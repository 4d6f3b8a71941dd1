"""Fingerprints of data: they change with content alone, and files are read once."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from batchformer.data import fingerprints
from batchformer.data.checks import check_samples
from batchformer.data.coco import open_split
from batchformer.data.coco_identity import split_fingerprint, split_hashes
from batchformer.data.errors import DataError
from batchformer.data.fingerprints import file_hash, file_hashes, fingerprint, shared_images
from batchformer.data.lists import read_folder

Writer = Callable[..., Path]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take files that were written just now for old ones."""
    monkeypatch.setattr(fingerprints, "SETTLED_NS", -(10**12))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes were read."""
    seen: list[str] = []
    real = fingerprints.file_hash

    def watched(file: Path) -> str:
        seen.append(file.name)
        return real(file)

    monkeypatch.setattr(fingerprints, "file_hash", watched)
    return seen


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.usefixtures("settled")
def test_files_are_read_once_and_again_when_they_have_changed(tmp_path: Path, reads: list[str]) -> None:
    root, names = write(tmp_path / "root", a="1", b="2"), ["a", "b", "a"]
    first = file_hashes(root, names, "reading", cache=tmp_path / "memory")
    assert sorted(reads) == ["a", "b"]
    assert file_hashes(root, names, "reading", cache=tmp_path / "memory") == first
    assert len(reads) == 2
    write(root, b="3")
    os.utime(root / "b", ns=(0, (root / "a").stat().st_mtime_ns))  # the same size and time; its entry still changed
    second = file_hashes(root, names, "reading", cache=tmp_path / "memory")
    assert reads[2:] == ["b"]
    assert second["a"] == first["a"]
    assert second["b"] != first["b"]


@pytest.mark.usefixtures("settled")
def test_a_new_time_alone_does_not_change_a_hash(tmp_path: Path, reads: list[str]) -> None:
    root = write(tmp_path / "root", a="1")
    first = file_hashes(root, ["a"], "reading", cache=tmp_path / "memory")
    os.utime(root / "a")
    assert file_hashes(root, ["a"], "reading", cache=tmp_path / "memory") == first
    assert reads == ["a", "a"]


def test_the_hash_of_a_file_that_changed_just_now_is_not_remembered(tmp_path: Path, reads: list[str]) -> None:
    root = write(tmp_path / "root", a="1")
    for _ in range(2):
        file_hashes(root, ["a"], "reading", cache=tmp_path / "memory")
    assert reads == ["a", "a"]


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 3}', '{"a": [1, 2]}'])
def test_a_broken_memory_is_no_memory(text: str, tmp_path: Path) -> None:
    root = write(tmp_path / "root", a="1")
    first = file_hashes(root, ["a"], "reading", cache=tmp_path / "memory")
    (memory,) = (tmp_path / "memory").iterdir()
    memory.write_text(text)
    assert file_hashes(root, ["a"], "reading", cache=tmp_path / "memory") == first


def test_files_that_cannot_be_read_are_all_named(tmp_path: Path) -> None:
    root = write(tmp_path, a="1")
    (root / "folder").mkdir()
    with pytest.raises(DataError, match=r"(?s)2 cannot:.*folder: Is a directory.*gone: No such file"):
        file_hashes(root, ["a", "folder", "gone"], "reading")


@pytest.mark.usefixtures("settled")
def test_looking_at_images_gives_their_hashes(tmp_path: Path, write_images: Writer) -> None:
    samples = read_folder(write_images(tmp_path / "images", [2, 2]))["all"]
    hashes = check_samples(samples, cache=tmp_path / "memory")
    assert hashes == {path: file_hash(samples.root / path) for path in samples.paths}
    assert check_samples(samples, cache=tmp_path / "memory") == hashes
    assert check_samples(samples, decode=False) == hashes


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (["a", "b"], ["b", "a"]),
        (["ab"], ["a", "b"]),
        (torch.tensor([1, 2]), torch.tensor([2, 1])),
        (torch.tensor([1, 2]), torch.tensor([1.0, 2.0])),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(0), torch.zeros(0, 1)),
    ],
)
def test_order_kind_and_shape_are_part_of_a_fingerprint(one: Any, other: Any) -> None:
    assert fingerprint(one) == fingerprint(one)
    assert fingerprint(one) != fingerprint(other)


def test_values_do_not_run_into_each_other() -> None:
    assert fingerprint(["a"], ["b"]) != fingerprint(["a", "b"])
    assert len(fingerprint()) == 16


def test_shared_images_are_counted_with_their_repetitions() -> None:
    assert shared_images(["a", "b"], ["c"], "test") is None
    assert str(shared_images(["a", "b"], ["a", "a", "c"], "unseen")).startswith("2 of 3 images of the split unseen are")


# ---------------------------------------------------------------- COCO folders


def identity(root: Path, kind: Any = "instances") -> str:
    split = open_split(root, "train", kind=kind)
    return split_fingerprint(root, split, split_hashes(root, [split]))


def edit(root: Path, change: Callable[[dict[str, Any]], Any], kind: str = "instances") -> None:
    file = root / "annotations" / f"{kind}_train.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def rename(root: Path, content: dict[str, Any]) -> None:
    file = root / "train" / content["images"][0]["file_name"]
    content["images"][0]["file_name"] = "new.jpg"
    file.rename(file.with_name("new.jpg"))


CHANGES: dict[str, Callable[[Path], None]] = {
    "box": lambda root: edit(root, lambda c: c["annotations"][0]["bbox"].__setitem__(2, 5)),
    "label": lambda root: edit(root, lambda c: c["annotations"][0].update(category_id=_other(c))),
    "area": lambda root: edit(root, lambda c: c["annotations"][0].update(area=5)),
    "crowd": lambda root: edit(root, lambda c: c["annotations"][0].update(iscrowd=1)),
    "class": lambda root: edit(root, lambda c: c["categories"][0].update(name="other")),
    "order": lambda root: edit(root, lambda c: c["images"].reverse()),
    "name": lambda root: edit(root, lambda c: rename(root, c)),
    "box gone": lambda root: edit(root, lambda c: c["annotations"].pop(0)),
    "byte": lambda root: flip(next((root / "train").iterdir())),
}


def _other(content: dict[str, Any]) -> int:
    return int(next(c["id"] for c in content["categories"] if c["id"] != content["annotations"][0]["category_id"]))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_a_coco_split(change: str, tmp_path: Path, write_coco: Writer) -> None:
    root = write_coco(tmp_path, {"train": 4})
    before = identity(root)
    CHANGES[change](root)
    assert identity(root) != before


def test_what_does_not_change_a_coco_split(tmp_path: Path, write_coco: Writer, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_coco(tmp_path / "root", {"train": 4})
    before = identity(root)
    edit(root, lambda c: c.update(info={"year": 2026}))
    for number, entry in enumerate(json.loads((root / "annotations/instances_train.json").read_text())["annotations"]):
        edit(root, lambda c, n=number, e=entry: c["annotations"][n].update(id=e["id"] + 100))
    os.utime(next((root / "train").iterdir()), (1, 1))
    assert identity(root) == before
    shutil.move(root, tmp_path / "moved")
    assert identity(tmp_path / "moved") == before
    monkeypatch.chdir(tmp_path)
    assert identity(Path("moved")) == before


def test_the_png_files_are_part_of_a_panoptic_split(tmp_path: Path, write_panoptic: Writer) -> None:
    root = write_panoptic(tmp_path, ["train"], count=3)
    before = identity(root, "panoptic")
    png = next((root / "annotations/panoptic_train").iterdir())
    image = Image.open(png).convert("RGB")
    image.putpixel((0, 0), image.getpixel((0, 20)))
    image.save(png)
    assert identity(root, "panoptic") != before
