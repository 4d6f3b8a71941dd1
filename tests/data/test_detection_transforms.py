"""Augmentation of boxes and masks against what the pixels show, and batches of different sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from batchformer.data.coco import open_split
from batchformer.data.detection_transforms import CocoDetection, collate, eval_transform, train_transform
from batchformer.data.errors import DataError
from batchformer.data.transforms import seeded


def picture(boxes: list[list[int]], size: tuple[int, int] = (60, 80)) -> tuple[Image.Image, dict[str, Tensor]]:
    """A black picture with white rectangles, and its annotations with masks."""
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for row, (x1, y1, x2, y2) in enumerate(boxes):
        pixels[y1:y2, x1:x2] = 255
        masks[row, y1:y2, x1:x2] = True
    annotations = {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.arange(len(boxes)),
        "masks": masks,
    }
    return Image.fromarray(pixels), annotations


def corners(label: dict[str, Tensor]) -> Tensor:
    """Boxes in pixels of the resized picture."""
    height, width = label["size"].tolist()
    centre, side = label["boxes"][:, :2], label["boxes"][:, 2:]
    return torch.cat((centre - side / 2, centre + side / 2), 1) * torch.tensor([width, height] * 2)


@pytest.mark.parametrize("seed", range(12))
def test_boxes_and_masks_follow_the_pixels(seed: int) -> None:
    image, annotations = picture([[10, 8, 30, 40]])
    transform = train_transform([64, 96], 200, crop=(30, 70), crop_scales=(50, 80))
    with seeded(seed):
        pixels, label = transform(image, annotations)
    white = pixels[0] > 0
    assert tuple(label["size"].tolist()) == tuple(pixels.shape[1:])
    assert label["orig_size"].tolist() == [60, 80]
    if not len(label["boxes"]):  # cut away
        assert not label["masks"].any()
        assert white.float().mean() < 0.02
        return
    shown = white.nonzero()
    expected = torch.cat((shown.amin(0).flip(0), shown.amax(0).flip(0) + 1)).float()
    assert (corners(label)[0] - expected).abs().max() <= 2.0  # resizing blurs edges
    assert (label["masks"][0] ^ white).float().mean() < 0.05
    assert label["boxes"].min() >= 0
    assert label["boxes"].max() <= 1
    side = corners(label)[0, 2:] - corners(label)[0, :2]
    assert label["area"].item() == pytest.approx(side.prod().item(), rel=0.02)


def test_flip_mirrors() -> None:
    image, annotations = picture([[10, 8, 30, 40]])
    plain, label = eval_transform(60)(image, annotations)
    mirrored, other = eval_transform(60, flip=True)(image, annotations)
    assert torch.equal(plain.flip(-1), mirrored)
    assert torch.allclose(
        other["boxes"][0], label["boxes"][0] * torch.tensor([-1, 1, 1, 1]) + torch.tensor([1, 0, 0, 0])
    )
    assert torch.equal(label["masks"].flip(-1), other["masks"])


def test_vanished_boxes_take_their_labels_along() -> None:
    image, annotations = picture([[0, 0, 4, 4], [40, 30, 80, 60]])
    transform = train_transform([30], None, flip=0.0, crop=(20, 25), crop_scales=(60,))
    kept = []
    for seed in range(40):
        with seeded(seed):
            _, label = transform(image, annotations)
        assert len(label["boxes"]) == len(label["class_labels"]) == len(label["masks"]) == len(label["area"])
        kept.append(tuple(label["class_labels"].tolist()))
    assert {(), (1,), (0, 1)} <= set(kept)


def test_eval_resizes_within_bounds() -> None:
    image, _ = picture([], (100, 400))
    pixels, label = eval_transform(80, 200)(image, {})
    assert tuple(pixels.shape) == (3, 50, 200)
    assert label["boxes"].shape == (0, 4)


def test_pixels_are_normalised_as_imagenet() -> None:
    pixels, _ = eval_transform(32)(Image.new("RGB", (32, 32), (255, 0, 0)), {})
    expected = torch.tensor([(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    assert torch.allclose(pixels[:, 5, 5], expected, atol=1e-6)


def test_collate_pads_and_says_where() -> None:
    samples = [eval_transform(size)(*picture([[10, 8, 30, 40]])) for size in (30, 60)]
    batch = collate(samples, multiple=32)
    assert batch["pixel_values"].shape == (2, 3, 64, 96)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [30 * 40, 60 * 80]
    assert (batch["pixel_values"][0, :, 30:] == 0).all()
    assert [label["masks"].shape[1:] for label in batch["labels"]] == [(64, 96)] * 2
    assert torch.equal(batch["pixel_values"][0, :, :30, :40], samples[0][0])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one of them with a crowd box."""
    (tmp_path / "train").mkdir()
    (tmp_path / "annotations").mkdir()
    images, annotations = [], []
    for number in range(3):
        picture([[10, 8, 30, 40]])[0].save(tmp_path / "train" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 60, "width": 80})
        annotations.append({"id": 2 * number, "image_id": number, "category_id": 1, "bbox": [10, 8, 20, 32]})
    annotations.append({"id": 9, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50], "iscrowd": 1})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "white"}]}
    (tmp_path / "annotations" / "instances_train.json").write_text(json.dumps(content))
    return tmp_path


def test_samples_are_a_function_of_seed_epoch_and_index(folder: Path) -> None:
    split = open_split(folder, "train")
    transform = train_transform([40, 60, 80], crop=None)
    data = CocoDetection(split, transform, seed=1)
    keys = [(epoch, index) for epoch in range(4) for index in range(3)]
    first = {key: data[key][0] for key in keys}
    again = {key: CocoDetection(split, transform, seed=1)[key][0] for key in reversed(keys)}
    assert all(torch.equal(first[key], again[key]) for key in keys)
    assert len({(*pixels.shape, pixels.sum().item()) for pixels in first.values()}) > 2
    other = CocoDetection(split, transform, seed=2)
    assert any(first[key].shape != other[key][0].shape for key in keys)


def test_crowds_are_for_evaluation_only(folder: Path) -> None:
    split = open_split(folder, "train")
    assert len(CocoDetection(split, eval_transform(60))[0, 1][1]["boxes"]) == 1
    label = CocoDetection(split, eval_transform(60), crowds=True)[0, 1][1]
    assert label["iscrowd"].tolist() == [0, 1]
    assert label["image_id"].item() == 1


def test_a_picture_that_is_not_what_the_annotations_say(folder: Path) -> None:
    data = CocoDetection(open_split(folder, "train"), eval_transform(60))
    Image.new("RGB", (80, 61)).save(folder / "train" / "0.png")
    (folder / "train" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"0\.png of 80 x 60 pixels, as the annotations say, got 80 x 61"):
        data[0, 0]
    with pytest.raises(DataError, match=r"1\.png, but it cannot be decoded"):
        data[0, 1]
