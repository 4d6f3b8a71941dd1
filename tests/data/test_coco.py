"""COCO folders in their real on-disk format, with everything in them that can be wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from batchformer.data.coco import Findings, open_split, splits
from batchformer.data.errors import DataError, DataNotFoundError

CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}]
Write = Callable[..., Path]


def box(number: int, image: int, bbox: list[float], category: int = 3, **more: Any) -> dict[str, Any]:
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "iscrowd": 0, **more}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write two images of 40 x 30 pixels and the annotations given."""

    def write(annotations: list[dict[str, Any]], year: str = "2017", **changes: Any) -> Path:
        images = [{"id": n, "file_name": f"{n:012d}.jpg", "height": 30, "width": 40} for n in (7, 5)]
        (tmp_path / f"train{year}").mkdir()
        (tmp_path / "annotations").mkdir(exist_ok=True)
        for image in images:
            Image.new("RGB", (40, 30)).save(tmp_path / f"train{year}" / str(image["file_name"]))
        content = {"images": images, "annotations": annotations, "categories": CATEGORIES, **changes}
        path = tmp_path / "annotations" / f"instances_train{year}.json"
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        return tmp_path

    return write


@pytest.mark.parametrize("year", ["", "2014", "2017"])
def test_reads_as_published(write: Write, year: str) -> None:
    root = write([box(1, 5, [10, 5, 20, 10], 90, area=77.5), box(2, 7, [0, 0, 4, 4]), box(3, 5, [1, 2, 3, 4])], year)
    split = open_split(root, "train")
    assert splits(root) == ["train"]
    # Labels are places in the order of ids; images keep the order of the file.
    assert [category.name for category in split.categories] == ["car", "toothbrush"]
    assert [record.id for record in split.images] == [7, 5]
    first, second = split.annotations
    assert first.boxes.tolist() == [[0, 0, 4, 4]]
    assert second.boxes.tolist() == [[10, 5, 30, 15], [1, 2, 4, 6]]
    assert second.labels.tolist() == [1, 0]
    assert second.areas.tolist() == [77.5, 12.0]  # the file's, else the box's
    assert second.ids.tolist() == [1, 3]
    assert split.counts().tolist() == [2, 1]
    assert str(split.findings) == "2 images, 3 boxes"


def test_layout_of_labelling_tools(write: Write) -> None:
    root = write([box(1, 5, [0, 0, 9, 9])], "")
    (root / "annotations" / "instances_train.json").rename(root / "train" / "_annotations.coco.json")
    assert splits(root) == ["train"]
    assert len(open_split(root, "train")) == 2


def test_files_elsewhere(write: Write) -> None:
    root = write([box(1, 5, [0, 0, 9, 9])])
    (root / "train2017").rename(root / "pictures")
    (root / "annotations" / "instances_train2017.json").rename(root / "mine.json")
    split = open_split(root, "train", annotations="mine.json", images="pictures")
    assert split.images[0].file == root / "pictures" / "000000000007.jpg"


def test_policy_clips_drops_and_counts(write: Write) -> None:
    found = [
        box(1, 5, [-5, -5, 10, 10]),  # partly outside
        box(2, 5, [35, 25, 100, 100]),  # partly outside
        box(3, 5, [50, 0, 5, 5]),  # wholly outside
        box(4, 5, [3, 3, 0, 4]),  # no area
        box(5, 5, [1, 1, 5, 5], iscrowd=1),
    ]
    split = open_split(write(found), "train")
    assert split.annotations[1].boxes.tolist() == [[0, 0, 5, 5], [35, 25, 40, 30], [1, 1, 6, 6]]
    assert split.annotations[1].iscrowd.tolist() == [False, False, True]
    assert split.counts().tolist() == [2, 0]  # crowds are not trained on
    assert (split.findings.clipped, split.findings.dropped, split.findings.crowd, split.findings.empty) == (2, 2, 1, 1)
    assert str(split.findings) == (
        "2 images, 3 boxes; 1 crowd box (evaluation ignores what lies there); 1 image without a box; 2 boxes clipped "
        "to their image; 2 boxes without area or outside their image dropped"
    )


def test_strict_policy_refuses_all_at_once(write: Write) -> None:
    root = write([box(1, 5, [-5, -5, 10, 10]), box(2, 7, [3, 3, 0, 4])])
    with pytest.raises(DataError, match=r"policy strict(.|\n)*annotation 1: bbox \[-5(.|\n)*annotation 2.*dropped"):
        open_split(root, "train", policy="strict")


@pytest.mark.parametrize(
    ("annotations", "changes", "message"),
    [
        (
            [box(1, 9, [0, 0, 1, 1]), box(2, 8, [0, 0, 1, 1])],
            {},
            r"of the images .* others:\n  image_id 9: 1 times\n  im",
        ),
        ([box(1, 5, [0, 0, 1, 1], category=4)], {}, r"of the categories .* category_id 4: 1 times|category_id 4"),
        (
            [box(1, 5, [0, 0, 1, 1]), box(1, 5, [0, 0, 2, 2])],
            {},
            r"each annotation id once .*\n  image 5, annotation 1",
        ),
        (
            [box(1, 5, [0, 0, 1]), box(2, 5, [0, 0, float("nan"), 1])],
            {},
            r"four finite numbers(.|\n)*annot.* 1(.|\n)* 2",
        ),
        ([{"id": 1, "image_id": 5}], {}, r"annotations\[0\] has no category_id\n  annotations\[0\] has no bbox"),
        ([7], {}, r"annotations\[0\] has no image_id"),
        ([], {"categories": None}, r"no categories\."),
        ([], {"categories": []}, r"at least one category"),
        ([], {"categories": [*CATEGORIES, {"id": 3, "name": "bus"}]}, r"each id once among the categories .*:\n  3"),
        ([], {"images": []}, r"at least one image"),
    ],
)
def test_errors_name_everything(
    write: Write, annotations: list[dict[str, Any]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        open_split(write(annotations, **changes), "train")


def test_missing_images_are_listed_together(write: Write) -> None:
    root = write([])
    for file in (root / "train2017").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"Expected 2 image files of .*, 2 are missing:\n.*7\.jpg\n.*5\.jpg"):
        open_split(root, "train")


def test_half_a_file(write: Write) -> None:
    root = write([box(1, 5, [0, 0, 9, 9])])
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match="Expected JSON in .* half a file"):
        open_split(root, "train")


def test_not_there(write: Write) -> None:
    root = write([])
    with pytest.raises(DataNotFoundError, match=r"of the split 'val'(.|\n)*instances_val2017(.|\n)*are there: train"):
        open_split(root, "val")
    with pytest.raises(DataNotFoundError, match="none.json"):
        open_split(root, "train", annotations="none.json")
    (root / "train2017").rename(root / "elsewhere")
    with pytest.raises(DataNotFoundError, match="the images of the split 'train'"):
        open_split(root, "train")


def test_findings_speak_of_one_and_of_many() -> None:
    assert str(Findings(1, 1, dropped=1)).endswith("1 box without area or outside its image dropped")
    assert str(Findings(1, 1, empty=2)).endswith("2 images without a box")


# -------------------------------------------------------------------- panoptic


@pytest.fixture
def panoptic(tmp_path: Path) -> Path:
    """One image with a thing over stuff, as COCO lays panoptic files out."""
    ids = np.full((30, 40), 70000)
    ids[5:15, 10:30] = 300
    ids[0, 0] = 0
    folder = tmp_path / "annotations" / "panoptic_val2017"
    folder.mkdir(parents=True)
    (tmp_path / "val2017").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "val2017" / "1.jpg")
    Image.fromarray(np.stack([ids & 255, ids >> 8 & 255, ids >> 16], -1).astype(np.uint8)).save(folder / "1.png")
    segments = [
        {"id": 300, "category_id": 3, "iscrowd": 0, "bbox": [10, 5, 20, 10], "area": 200},
        {"id": 70000, "category_id": 200, "iscrowd": 0, "bbox": [0, 0, 40, 30], "area": 999},
    ]
    content = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 30, "width": 40}],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": segments}],
        "categories": [{"id": 3, "name": "car", "isthing": 1}, {"id": 200, "name": "rug", "isthing": 0}],
    }
    (tmp_path / "annotations" / "panoptic_val2017.json").write_text(json.dumps(content))
    return tmp_path


def test_panoptic_reads_as_published(panoptic: Path) -> None:
    split = open_split(panoptic, "val", kind="panoptic")
    assert [category.isthing for category in split.categories] == [True, False]
    ids = split.segment_map(0)
    assert sorted(ids.unique().tolist()) == [0, 300, 70000]
    masks = split.masks(0)
    assert masks.shape == (2, 30, 40)
    assert masks.sum((1, 2)).tolist() == [200, 999]
    assert torch.equal(masks[0].nonzero().amin(0), torch.tensor([5, 10]))


def test_panoptic_segment_without_a_pixel(panoptic: Path) -> None:
    Image.new("RGB", (40, 30)).save(panoptic / "annotations" / "panoptic_val2017" / "1.png")
    with pytest.raises(DataError, match=r"Expected pixels of the segments \[300, 70000\] in .*, found none"):
        open_split(panoptic, "val", kind="panoptic").masks(0)


def test_panoptic_png_with_segments_that_the_json_has_not(panoptic: Path) -> None:
    file = panoptic / "annotations" / "panoptic_val2017.json"
    content = json.loads(file.read_text())
    segments = content["annotations"][0]["segments_info"]
    segments[0]["bbox"] = [10, 5, 0, 10]  # known, though the policy drops it
    file.write_text(json.dumps(content))
    split = open_split(panoptic, "val", kind="panoptic")
    assert split.annotations[0].dropped == (300,)
    assert split.findings.dropped == 1
    assert 300 in split.segment_map(0)
    del segments[0]
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"1\.png only segments that the JSON has, got others:\n  300$"):
        open_split(panoptic, "val", kind="panoptic").segment_map(0)
    segments.append({"id": 300, "category_id": 3})
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"annotations\[0\], segments_info\[1\] has no bbox"):
        open_split(panoptic, "val", kind="panoptic")


def test_panoptic_png_of_another_size(panoptic: Path) -> None:
    Image.new("RGB", (39, 30)).save(panoptic / "annotations" / "panoptic_val2017" / "1.png")
    with pytest.raises(DataError, match="of 40 x 30 pixels, as its image, got 39 x 30"):
        open_split(panoptic, "val", kind="panoptic").segment_map(0)


def test_panoptic_png_missing_or_broken(panoptic: Path) -> None:
    file = panoptic / "annotations" / "panoptic_val2017" / "1.png"
    file.write_bytes(b"no picture")
    with pytest.raises(DataError, match="PNG of segments .* cannot be read"):
        open_split(panoptic, "val", kind="panoptic").segment_map(0)
    file.unlink()
    with pytest.raises(DataError, match="Expected 1 PNG files of .*, 1 are missing"):
        open_split(panoptic, "val", kind="panoptic")
    file.parent.rmdir()
    with pytest.raises(DataNotFoundError, match="panoptic PNG files"):
        open_split(panoptic, "val", kind="panoptic")


def test_instances_have_no_masks_of_segments(write: Write) -> None:
    with pytest.raises(DataError, match="kind='panoptic'"):
        open_split(write([]), "train").segment_map(0)
