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
from batchformer.data.errors import DataError
from batchformer.tasks.detection.predict import predict
from batchformer.tasks.detection.settings import NetworkSettings
from batchformer.tasks.set_prediction.restore import CocoFacts
from batchformer.tasks.training.checkpoint import Restored

FACTS = CocoFacts(["car"], [3], [1], size=32, max_size=64, pad_to=1)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What a network is given that finds a car of score one half in every image."""
    pixels: list[torch.Tensor] = []

    def network(*, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> Any:
        pixels.append(pixel_values)
        return SimpleNamespace(logits=torch.zeros(1, 1, 1), pred_boxes=torch.tensor([[[0.5, 0.5, 0.4, 0.4]]]))

    restored = Restored(network, FACTS, NetworkSettings("deformable_detr"), "train")
    monkeypatch.setattr("batchformer.tasks.detection.predict.load_network", lambda run: restored)
    return pixels


@pytest.fixture
def folder(odd_images: Callable[[Path], list[str]], tmp_path: Path) -> Path:
    """A COCO folder of pictures that are not plain RGB."""
    names = odd_images(tmp_path / "train")
    content = {
        "images": [{"id": n, "file_name": name, "height": 30, "width": 40} for n, name in enumerate(names)],
        "annotations": [],
        "categories": [{"id": 1, "name": "car"}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_the_network_is_given_what_the_test_gives_it(folder: Path, seen: list[torch.Tensor]) -> None:
    split = open_split(folder, "train")
    tested = CocoDetection(split, eval_transform(FACTS.size, FACTS.max_size))
    predict(folder, [record.file for record in split.images], folder / "out")
    assert len(seen) == len(split) == 3
    for index, pixels in enumerate(seen):
        assert torch.equal(pixels, collate([tested[0, index]])["pixel_values"]), split.images[index].file.name
        assert float(pixels.std()) > 0.1, "neither black nor white all over"


def test_what_is_drawn_on_is_what_the_network_saw(folder: Path, seen: list[torch.Tensor]) -> None:
    predict(folder, [folder / "train" / "alpha.png"], folder / "out")
    with Image.open(folder / "out" / "alpha.png") as picture:
        assert picture.getpixel((0, 0)) == (255, 255, 255), "transparent is white"


def test_a_file_that_is_no_image_is_named(folder: Path, seen: list[torch.Tensor]) -> None:
    (folder / "train" / "alpha.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"alpha\.png, but it cannot be decoded"):
        predict(folder, [folder / "train" / "alpha.png"], folder / "out")


@pytest.mark.parametrize(("count", "words"), [(1, "1 image"), (3, "3 images")])
def test_nothing_found_is_said(count: int, words: str, folder: Path, seen: list[torch.Tensor]) -> None:
    images = sorted((folder / "train").iterdir())[:count]
    message = rf"^No box with a score of 0\.6 or more in {words}: lower --threshold, or train longer\.$"
    with pytest.warns(UserWarning, match=message):
        written = predict(folder, images, folder / "out", threshold=0.6)
    assert json.loads(written[-1].read_text(encoding="utf-8")) == []
    predict(folder, images, folder / "out", threshold=0.5)  # a warning is an error in these tests
