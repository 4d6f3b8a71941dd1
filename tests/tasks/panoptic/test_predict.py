"""Predictions see an image file as the test does, and say so when they find nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from batchformer.data.coco import open_split
from batchformer.data.detection_transforms import CocoDetection, collate, eval_transform
from batchformer.tasks.panoptic.drawing import KeptMaps
from batchformer.tasks.panoptic.maps import PanopticMap
from batchformer.tasks.panoptic.predict import predict
from batchformer.tasks.panoptic.restore import PanopticFacts
from batchformer.tasks.panoptic.settings import NetworkSettings, PanopticSettings, PostprocessSettings
from batchformer.tasks.training.checkpoint import Restored

FACTS = PanopticFacts(["sky"], [3], [1], size=32, max_size=64, pad_to=1, is_thing=[False])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What a network is given that finds sky of confidence one half all over every image."""
    pixels: list[torch.Tensor] = []

    def network(*, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> Any:
        pixels.append(pixel_values)
        return SimpleNamespace(logits=torch.zeros(1, 1, 1), pred_masks=torch.ones(1, 1, 8, 8))

    settings = PanopticSettings(NetworkSettings("conditional_detr"), PostprocessSettings(threshold=0.4))
    restored = Restored(network, FACTS, settings, "masks")
    monkeypatch.setattr("batchformer.tasks.panoptic.predict.load_network", lambda run: restored)
    return pixels


@pytest.fixture
def folder(odd_images: Callable[[Path], list[str]], tmp_path: Path) -> Path:
    """A panoptic COCO folder of pictures that are not plain RGB."""
    names = odd_images(tmp_path / "val")
    png = tmp_path / "annotations" / "panoptic_val"
    png.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (40, 30)).save(png / name)
    content = {
        "images": [{"id": n, "file_name": name, "height": 30, "width": 40} for n, name in enumerate(names)],
        "annotations": [],
        "categories": [{"id": 1, "name": "sky", "isthing": 0}],
    }
    (tmp_path / "annotations" / "panoptic_val.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_the_network_is_given_what_the_test_gives_it(folder: Path, seen: list[torch.Tensor]) -> None:
    split = open_split(folder, "val", kind="panoptic")
    tested = CocoDetection(split, eval_transform(FACTS.size, FACTS.max_size))
    predict(folder, [record.file for record in split.images], folder / "out")
    assert len(seen) == len(split) == 3
    for index, pixels in enumerate(seen):
        assert torch.equal(pixels, collate([tested[0, index]])["pixel_values"]), split.images[index].file.name
        assert float(pixels.std()) > 0.1, "neither black nor white all over"


def test_pictures_of_the_test_show_what_the_network_saw(folder: Path) -> None:
    void = PanopticMap.of(torch.zeros(30, 40, dtype=torch.int64), [], [])
    pictures = KeptMaps(1)
    pictures.add([str(folder / "val" / name) for name in ("alpha.png", "deep.png")], [(void, None, void)] * 2)
    pictures.write(folder / "pictures", FACTS, "plain")
    assert [path.name for path in (folder / "pictures").glob("*.png")] == ["alpha.png"]
    with Image.open(folder / "pictures" / "given" / "alpha.png") as picture:
        assert picture.getpixel((10, 150)) == (255, 255, 255), "transparent is white"


@pytest.mark.parametrize(("count", "words"), [(1, "1 image"), (3, "3 images")])
@pytest.mark.parametrize(("given", "least"), [(0.6, r"0\.6"), (None, r"0\.55")])
def test_nothing_found_is_said(
    given: float | None, least: str, count: int, words: str, folder: Path, seen: list[torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    images = sorted((folder / "val").iterdir())[:count]
    predict(folder, images, folder / "out")  # finds sky; a warning is an error in these tests
    monkeypatch.setattr("batchformer.tasks.panoptic.predict.load_network", stricter(0.55))
    message = rf"^No segment above {least} in {words}: lower --threshold, or train longer\.$"
    with pytest.warns(UserWarning, match=message):
        written = predict(folder, images, folder / "out", threshold=given)
    listed = json.loads(written[-1].read_text(encoding="utf-8"))["annotations"]
    assert [entry["segments_info"] for entry in listed] == [[]] * count


def stricter(threshold: float) -> Callable[[Path], Restored]:
    from batchformer.tasks.panoptic import predict as module

    restored = module.load_network(Path())
    settings = restored.settings._replace(postprocess=PostprocessSettings(threshold=threshold))
    return lambda run: restored._replace(settings=settings)
