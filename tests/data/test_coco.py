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
        "2 images, 3 boxes; 1 crowd box (evaluation ignores detections there); 1 image without a box; 2 boxes clipped "
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
        ([7], {}, r"annotations\[0\] is 7, not an object"),
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


IMAGE = {"id": 5, "file_name": "000000000005.jpg", "height": 30, "width": 40}


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), "big", True, [4]])
def test_areas_are_finite_and_not_negative(value: Any, write: Write) -> None:
    root = write([box(1, 5, [0, 0, 9, 9], area=value), box(2, 5, [0, 0, 9, 9], area=-0.5)])
    words = f"area is {json.dumps(value)}, not a finite number of at least 0"
    with pytest.raises(DataError, match=r"instances_train2017\.json") as caught:
        open_split(root, "train")
    assert f"\n  annotations[0]: {words}\n  annotations[1]: area is -0.5, not" in str(caught.value)
    assert "number the images" not in str(caught.value), "advice on ids, of which none is wrong"


@pytest.mark.parametrize("key", ["height", "width"])
@pytest.mark.parametrize("value", [0, -30, None, 30.5, "30", float("inf"), True])
def test_images_have_a_size(key: str, value: Any, write: Write) -> None:
    root = write([box(1, 5, [0, 0, 9, 9])], images=[{**IMAGE, key: value}, {**IMAGE, "id": 7, key: value}])
    words = f"{key} is {json.dumps(value)}, not a whole number of at least 1"
    with pytest.raises(DataError) as caught:
        open_split(root, "train")
    assert f"2017.json, of the types that COCO has:\n  images[0]: {words}\n  images[1]: {words}" in str(caught.value)


def test_wrong_types_are_listed_together_with_their_places(write: Write) -> None:
    found = [
        box(1, 5, [0, 0, 9, 9]),
        {**box(2, 5, [0, 0, 9, 9]), "id": None},
        {**box(3, 5, [0, 0, 9, 9]), "id": "abc", "category_id": [1]},
        {**box(4, 5, [0, 0, 9, 9]), "image_id": 5.5, "iscrowd": "no"},
        {"id": True, "image_id": 5, "category_id": 3},
    ]
    categories = [*CATEGORIES, {"id": "car", "name": None, "isthing": None}]
    images = [IMAGE, {**IMAGE, "id": "img0", "file_name": 7}]
    with pytest.raises(DataError, match=r"Expected complete entries in .*instances_train2017\.json") as caught:
        open_split(write(found, images=images, categories=categories), "train")
    assert str(caught.value).splitlines()[1:] == [
        '  images[1]: id is "img0", not a whole number',
        "  images[1]: file_name is 7, not a string",
        '  categories[2]: id is "car", not a whole number',
        "  categories[2]: name is null, not a string",
        "  categories[2]: isthing is null, not 0 or 1",
        "  annotations[1]: id is null, not a whole number",
        '  annotations[2]: id is "abc", not a whole number',
        "  annotations[2]: category_id is [1], not a whole number",
        "  annotations[3]: image_id is 5.5, not a whole number",
        '  annotations[3]: iscrowd is "no", not 0 or 1',
        "  annotations[4]: id is true, not a whole number",
        "  annotations[4] has no bbox",
        "Ids are whole numbers: number the images, categories and annotations, and put these numbers where image_id "
        "and category_id refer to them.",
        "Correct the file, or export it again.",
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"iscrowd": 7}, "iscrowd is 7, not 0 or 1"),
        ({"iscrowd": -1}, "iscrowd is -1, not 0 or 1"),
        ({"id": 10**20}, "id is 100000000000000000000, not a whole number"),
        ({"bbox": ["1", "2", "4", "4"]}, "four finite numbers"),
        ({"bbox": [0, 0, 10**400, 5]}, "four finite numbers"),
        ({"bbox": [0, 0, True, 5]}, "four finite numbers"),
    ],
)
def test_numbers_that_are_none_in_coco(change: dict[str, Any], words: str, write: Write) -> None:
    with pytest.raises(DataError) as caught:
        open_split(write([{**box(1, 5, [0, 0, 9, 9]), **change}]), "train")
    assert words in str(caught.value)


def test_what_exporters_write_is_read(write: Write) -> None:
    """Whole numbers as floats, as pandas writes them; no id, no area, null where nothing is known."""
    plain = {"image_id": 5.0, "category_id": 3.0, "bbox": [0, 0, 4, 5], "area": None, "iscrowd": None}
    image = {**IMAGE, "id": 5.0, "height": 30.0}
    split = open_split(write([plain, {**plain, "area": 0, "iscrowd": 1.0}], images=[image]), "train")
    assert split.annotations[0].areas.tolist() == [20.0, 20.0]
    assert split.annotations[0].iscrowd.tolist() == [False, True]
    assert split.annotations[0].ids.tolist() == [1, 2]


def test_missing_images_are_listed_together(write: Write) -> None:
    root = write([])
    for file in (root / "train2017").iterdir():
        file.unlink()
    with pytest.raises(
        DataError, match=r"Expected the 2 image files that .* lists, 2 are missing:\n.*7\.jpg\n.*5\.jpg"
    ):
        open_split(root, "train")


def test_half_a_file(write: Write) -> None:
    root = write([box(1, 5, [0, 0, 9, 9])])
    path = root / "annotations" / "instances_train2017.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match="Expected JSON in .* a part of a file"):
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


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataNotFoundError) as caught:
        open_split("cooc", "train")
    assert str(caught.value) == (
        f"Could not find the folder of the data: cooc does not exist. Looked in:\n  {tmp_path / 'cooc'}\n"
        "What to do:\n"
        "  - Check the path: --data.root=PATH (in code: root), the folder that has annotations/ and the images."
    )
    Path("cooc").touch()
    with pytest.raises(DataNotFoundError, match="cooc is a file and no folder"):
        open_split("cooc", "train")


def test_advice_is_for_the_command_line_and_for_code(write: Write) -> None:
    """There is no recipe with a setting ``annotations`` or ``images``."""
    root = write([])
    with pytest.raises(DataNotFoundError, match=r"--data\.root=PATH(.|\n)*in code: open_split\(.*annotations=FILE\)"):
        open_split(root, "val")
    (root / "train2017").rename(root / "elsewhere")
    with pytest.raises(DataNotFoundError, match=r"Rename, move or link .*in code: open_split\(.*images=FOLDER\)"):
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
    with pytest.raises(DataError, match=r"1\.png only segments that are in the JSON, got others:\n  300$"):
        open_split(panoptic, "val", kind="panoptic").segment_map(0)
    segments.append({"id": 300, "category_id": 3})
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"annotations\[0\], segments_info\[1\] has no bbox"):
        open_split(panoptic, "val", kind="panoptic")


@pytest.mark.parametrize(
    ("entry", "change", "message"),
    [
        (0, {"segments_info": None}, r"annotations\[0\]: segments_info is null, not a list"),
        (0, {"file_name": None}, r"annotations\[0\]: file_name is null, not a string"),
        (2, {"segments_info": [7]}, r"annotations\[2\], segments_info\[0\] is 7, not an object"),
        (2, {"segments_info": [{}]}, r"annotations\[2\], segments_info\[0\] has no id\n"),
        (0, "area", r"annotations\[0\], segments_info\[1\]: area is -3, not a finite"),
        (0, "id", r"annotations\[0\], segments_info\[1\]: id is -3.5, not a whole number"),
    ],
)
def test_panoptic_entries_are_named_by_their_places(entry: int, change: Any, message: str, panoptic: Path) -> None:
    file = panoptic / "annotations" / "panoptic_val2017.json"
    content = json.loads(file.read_text())
    listed = content["annotations"]
    listed += [{**listed[0], "segments_info": []}, {**listed[0], "segments_info": []}]
    if isinstance(change, str):
        listed[entry]["segments_info"][1][change] = {"area": -3, "id": -3.5}[change]
    else:
        listed[entry].update(change)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
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
    with pytest.raises(DataError, match="Expected the 1 PNG files that .* lists, 1 are missing"):
        open_split(panoptic, "val", kind="panoptic")
    file.parent.rmdir()
    with pytest.raises(DataNotFoundError, match="panoptic PNG files"):
        open_split(panoptic, "val", kind="panoptic")


def test_instances_have_no_masks_of_segments(write: Write) -> None:
    with pytest.raises(DataError, match="kind='panoptic'"):
        open_split(write([]), "train").segment_map(0)
