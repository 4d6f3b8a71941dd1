"""Batches of COCO folders: splits, augmentation as a pure function of the seeds, cached maps equal to computed ones."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from batchformer.data import detection_transforms
from batchformer.data.errors import DataError, DataNotFoundError
from batchformer.tasks.detection.data import DetectionData
from batchformer.tasks.detection.model import build_network
from batchformer.tasks.detection.settings import NetworkSettings
from batchformer.tasks.set_prediction.detector import backbone_of

Data = Callable[..., DetectionData]


def batches(data: DetectionData, epoch: int = 0) -> list[dict[str, Any]]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_splits_classes_and_counts(data: Data) -> None:
    made = data()
    made.setup()
    assert [category.id for category in made.categories] == [3, 7, 90]
    assert made.counts.sum() == sum(len(a.labels) for a in made._splits["train"].annotations)
    assert made.test_splits == ["test", "unseen"]
    assert [len(list(loader)) for loader in made.test_dataloader()] == [2, 1]
    assert [note.split(":")[0] for note in made.notes()] == ["Data, train", "Data, val", "Data, test", "Data, unseen"]
    assert "1 crowd box" in made.notes()[1]


@pytest.mark.parametrize(
    ("given", "val", "test"),
    [({"train": 3, "val": 2}, "val", "val"), ({"train": 3, "test": 2}, "test", "test"),
     ({"train": 3, "valid": 2, "test": 3}, "valid", "test")],
)  # fmt: skip
def test_a_split_that_is_not_there_is_stood_in_for(
    write_coco: Callable[..., Path], tmp_path: Path, given: dict[str, int], val: str, test: str
) -> None:
    made = DetectionData("coco", write_coco(tmp_path / "it", given, year="2017" if "valid" not in given else ""))
    made.setup()
    assert (made._splits["val"].name, made._splits["test"].name) == (val, test)
    assert len(made.notes()) == len(given)


def test_a_training_batch_has_transformers_form(data: Data) -> None:
    first = batches(data())[0]
    assert first["pixel_values"].shape[:2] == (4, 3)
    assert first["pixel_mask"].shape == first["pixel_values"].shape[:1] + first["pixel_values"].shape[2:]
    for label in first["labels"]:
        assert label["boxes"].shape == (len(label["class_labels"]), 4)
        assert (label["boxes"] >= 0).all() and (label["boxes"] <= 1).all()
        assert not label["iscrowd"].any()
    evaluated = [label for batch in data().val_dataloader() for label in batch["labels"]]
    assert sum(int(label["iscrowd"].sum()) for label in evaluated) == 1, "crowds are there for the evaluation"


def same(first: Any, second: Any) -> bool:
    return all(
        torch.equal(a["pixel_values"], b["pixel_values"])
        and all(torch.equal(x["boxes"], y["boxes"]) for x, y in zip(a["labels"], b["labels"], strict=True))
        for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("augment", ["detr", "flip"])
def test_batches_are_a_function_of_seed_and_epoch(data: Data, augment: str) -> None:
    assert same(batches(data(augment=augment), 3), batches(data(augment=augment), 3))
    assert not same(batches(data(augment=augment), 3), batches(data(augment=augment), 4))
    assert not same(batches(data(augment=augment, seed=0), 3), batches(data(augment=augment, seed=1), 3))


def test_the_sizes_of_detr_in_proportion(folder: Path) -> None:
    published = DetectionData("folder", folder, size=800)
    assert published.max_size == 1333
    assert published._scaled(480, 800) == [480, 800]
    small = DetectionData("folder", folder, size=400)
    assert small.max_size == 666
    assert small._scaled(480, 800) == [240, 400]


def test_some_training_images(data: Data) -> None:
    made, other = data(train_images=5), data(train_images=5, subset_seed=1)
    made.setup(), other.setup()
    kept = [record.id for record in made._splits["train"].images]
    assert len(kept) == 5 and kept == sorted(kept)
    assert kept != [record.id for record in other._splits["train"].images]
    with pytest.raises(DataError, match=r"train_images in 1..9, got 10"):
        data(train_images=10).setup()


# ------------------------------------------------------------------ cached maps


def detector(small: Callable[..., NetworkSettings], **settings: Any) -> Any:
    torch.manual_seed(0)
    return build_network(small(**settings), 3).eval()


def test_cached_maps_are_what_the_network_computes(data: Data, small: Callable[..., NetworkSettings]) -> None:
    network = detector(small)
    backbone = backbone_of(network)
    made = data(cache_features=True, augment="flip")
    made.setup()
    made.prepare_features(backbone, "fit")
    # The same images in the same order, from files: the long side 64, padded to a square.
    live = data(augment="flip", max_size=64)
    seen = {True: 0, False: 0}
    for epoch in range(3):
        for found, wanted in zip(batches(made, epoch), batches(live, epoch), strict=True):
            assert found["pixel_values"].shape == (4, 3, 64, 64)
            for a, b in zip(found["labels"], wanted["labels"], strict=True):
                assert a["image_id"] == b["image_id"]
                assert torch.equal(a["size"], b["size"])
                mirrored = not torch.allclose(a["boxes"], b["boxes"], atol=1e-5)
                other = torch.cat((1 - b["boxes"][:, :1], b["boxes"][:, 1:]), 1)
                assert not mirrored or torch.allclose(a["boxes"], other, atol=1e-5)
                seen[mirrored] += len(b["boxes"]) > 0
                torch.testing.assert_close(a["area"], b["area"], rtol=1e-4, atol=1e-2)
    assert min(seen.values()) > 2, "the two ways choose the mirror images apart"
    loader = made.val_dataloader()
    from_files = data(max_size=64).val_dataloader()
    for found, wanted in zip(loader, from_files, strict=True):
        height, width = wanted["pixel_values"].shape[2:]
        pixels = torch.zeros(len(wanted["labels"]), 3, 64, 64)
        pixels[:, :, :height, :width] = wanted["pixel_values"]
        torch.testing.assert_close(found["features"][0], backbone.maps(pixels)[0], rtol=2e-3, atol=2e-3)
        assert torch.equal(found["pixel_mask"][:, :height, :width], wanted["pixel_mask"])


def test_mirrored_maps_come_with_mirrored_boxes(data: Data, small: Callable[..., NetworkSettings]) -> None:
    backbone = backbone_of(detector(small))
    made = data(cache_features=True, augment="flip")
    made.setup()
    made.prepare_features(backbone, "fit")
    dataset = made._cached["train"]
    (turned,) = [i for i in range(9) if dataset[0, i].mirrored][:1]
    item = dataset[0, turned]
    plain = dataset.labels[turned]
    torch.testing.assert_close(item.label["boxes"][:, 0], 1 - plain["boxes"][:, 0])
    record = made._splits["train"].images[turned]
    image = Image.open(record.file).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    pixels, _ = detection_transforms.eval_transform(64, 64)(image, {})
    padded = torch.nn.functional.pad(pixels, (0, 64 - pixels.shape[2], 0, 64 - pixels.shape[1]))
    (found,) = dataset.cache.read([turned], [True])
    torch.testing.assert_close(found, backbone.maps(padded[None])[0], rtol=2e-3, atol=2e-3)


def test_a_cache_serves_the_next_run_without_a_pass_of_the_backbone(
    data: Data, small: Callable[..., NetworkSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = data(cache_features=True, augment="flip")
    first.setup()
    first.prepare_features(backbone_of(detector(small)), "fit")
    again = data(cache_features=True, augment="flip")
    again.setup()

    def none(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(detection_transforms, "decode", none)
    again.prepare_features(backbone_of(detector(small)), "fit")
    assert len(batches(again)) == 2


def test_cached_maps_need_a_frozen_backbone_and_fixed_images(data: Data, small: Callable[..., NetworkSettings]) -> None:
    with pytest.raises(ValueError, match="data.augment=flip or nothing with data.cache_features"):
        data(cache_features=True, augment="detr")
    made = data(cache_features=True, augment="flip")
    made.setup()
    with pytest.raises(
        ValueError, match=r"frozen backbone with data.cache_features, got trains='all'. Set model.network"
    ):
        made.prepare_features(backbone_of(detector(small, trains="all")), "fit")


# ------------------------------------------------------------------ what cannot be used


def test_no_folder_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data.root=PATH, with annotations/instances_train.json and train/"):
        DetectionData("folder").setup()
    with pytest.raises(DataNotFoundError, match="instances_train.json"):
        DetectionData("folder", tmp_path).setup()


def test_splits_with_other_classes_are_refused(folder: Path) -> None:
    path = folder / "annotations" / "instances_val.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["categories"][0]["name"] = "other"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(DataError, match=r"the same categories in all splits .* those of 'val' are .*7 other"):
        DetectionData("folder", folder).setup()
