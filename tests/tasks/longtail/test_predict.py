"""Predictions on images of one's own: the plain network's, in a file that people and programs read."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from batchformer.data.images import decode
from batchformer.data.transforms import image_eval, normalize
from batchformer.tasks.longtail.model import build_network
from batchformer.tasks.longtail.predict import predict
from batchformer.tasks.longtail.restore import LongTailFacts, load_network
from batchformer.tasks.longtail.settings import NetworkSettings

FACTS = LongTailFacts(
    classes=["a", "b", "c"], counts=[9, 5, 2], groups={"many": [0], "medium": [1], "few": [2]},
    in_channels=3, image_size=16, mean=[0.5] * 3, std=[0.2] * 3,
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    settings = NetworkSettings()
    network = build_network(settings, 3, 3)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    torch.save(
        {
            "state_dict": {f"network.{name}": value for name, value in network.state_dict().items()},
            "longtail": {"stage": "train", "settings": {"network": vars(settings)}, "facts": vars(FACTS)},
        },
        tmp_path / "run" / "checkpoints" / "last.ckpt",
    )
    return tmp_path / "run"


def test_the_most_probable_classes_of_each_image(run: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = [tmp_path / f"{i}.png" for i in range(70)]  # more than a batch
    for i, path in enumerate(images):
        Image.fromarray(random.integers(0, 256, (20, 17 + i, 3), dtype=np.uint8)).save(path)
    (file,) = predict(run, images, tmp_path, top=2)
    with file.open(newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened))
    assert [row["rank"] for row in rows] == ["1", "2"] * 70
    network = load_network(run).network
    for i in (0, 64, 69):  # an oracle for one image at a time
        pixels = normalize(image_eval(16)(decode(images[i], 3))[None], FACTS.mean, FACTS.std)
        with torch.no_grad():
            expected = network(pixels).softmax(1)[0]
        first = rows[2 * i]
        assert first["image"] == str(images[i])
        assert FACTS.classes[int(expected.argmax())] == first["class"]
        assert float(first["probability"]) == pytest.approx(float(expected.max()), abs=1e-5)


def test_all_broken_images_are_named(run: Path, tmp_path: Path) -> None:
    good, *broken = (tmp_path / name for name in ("good.png", "one.png", "two.jpg"))
    Image.new("RGB", (20, 20)).save(good)
    for path in broken:
        path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"(?s)2 cannot be decoded:.*one.png.*two.jpg"):
        predict(run, [good, *broken], tmp_path)
    assert not (tmp_path / "predictions.csv").exists()
