"""Panoptic data: what training and evaluation labels hold, read from files and beside cached maps."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from batchformer.data.coco import open_split
from batchformer.data.errors import DataError
from batchformer.tasks.panoptic.data import PanopticData, true_map
from batchformer.tasks.panoptic.maps import PanopticMap
from batchformer.tasks.panoptic.metrics import PanopticQuality
from batchformer.tasks.set_prediction.backbone import BackboneSettings, create_backbone

Write = Callable[..., Path]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "cache"))


def data(root: Path, **settings: object) -> PanopticData:
    made = PanopticData("folder", root, size=64, batch_size=4, eval_batch_size=4, num_workers=0, **settings)  # type: ignore[arg-type]
    made.setup()
    return made


def test_classes_and_counts_are_those_of_segments(write_panoptic: Write, tmp_path: Path) -> None:
    root = write_panoptic(tmp_path / "data")
    read = data(root, augment="flip")
    assert [category.name for category in read.categories] == ["box", "plate", "sky", "floor"]
    assert [category.isthing for category in read.categories] == [True, True, False, False]
    listed = json.loads((root / "annotations" / "panoptic_train.json").read_text(encoding="utf-8"))["annotations"]
    segments = [s for entry in listed for s in entry["segments_info"] if not s["iscrowd"]]
    assert read.counts.tolist() == [sum(s["category_id"] == k for s in segments) for k in (3, 17, 90, 184)]
    assert any("crowd" in note for note in read.notes())


def test_the_true_map_is_the_png(write_panoptic: Write, tmp_path: Path) -> None:
    split = open_split(write_panoptic(tmp_path / "data"), "train", kind="panoptic")
    for index in range(len(split)):
        truth = true_map(split, index)
        with Image.open(split.images[index].segments) as png:  # type: ignore[arg-type]
            rgb = np.asarray(png, dtype=np.int64)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        numbers = torch.cat((torch.zeros(1, dtype=torch.int64), split.annotations[index].ids))
        assert torch.equal(numbers[truth.ids_HW], torch.from_numpy(ids))
        assert truth.iscrowd_S.tolist() == split.annotations[index].iscrowd.tolist()
        assert not bool(truth.ids_HW[:4, :4].any()), "the void corner"


@pytest.mark.parametrize("augment", ["detr", "flip", "nothing"])
def test_training_masks_fit_their_boxes_and_leave_crowds_out(
    augment: str, write_panoptic: Write, tmp_path: Path
) -> None:
    read = data(write_panoptic(tmp_path / "data"), augment=augment)
    for batch in read.train_dataloader():
        height, width = batch["pixel_mask"].shape[-2:]
        for label in batch["labels"]:
            assert label["masks"].shape == (len(label["class_labels"]), height, width)
            assert not bool(label["iscrowd"].any())
            h, w = label["size"].tolist()
            for mask, box in zip(label["masks"], label["boxes"], strict=True):
                ys, xs = (line.float() for line in mask.nonzero(as_tuple=True))
                inside = torch.stack((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1))
                corners = torch.cat((box[:2] - box[2:] / 2, box[:2] + box[2:] / 2)) * torch.tensor([w, h, w, h])
                # A box is that of the whole segment: what lies before it may hide a side, rounding moves it by pixels.
                assert bool((inside[:2] >= corners[:2] - 3).all() and (inside[2:] <= corners[2:] + 3).all())


def without_crowds(truth: PanopticMap) -> PanopticMap:
    """What the best of predictions would be."""
    keep = (~truth.iscrowd_S).nonzero()[:, 0].tolist()
    ids = torch.where(torch.isin(truth.ids_HW, torch.tensor(keep) + 1), truth.ids_HW, 0)
    return PanopticMap.of(ids, [segment + 1 for segment in keep], truth.labels_S[keep].tolist())


def test_evaluation_labels_measure_a_perfect_prediction_as_perfect(write_panoptic: Write, tmp_path: Path) -> None:
    read = data(write_panoptic(tmp_path / "data"), augment="nothing")
    quality = PanopticQuality([category.isthing for category in read.categories])
    for batch in read.val_dataloader():
        for label in batch["labels"]:
            assert tuple(label["truth"].ids_HW.shape) == tuple(label["orig_size"].tolist())
            assert Path(label["file"]).is_file()
            assert len(label["truth_boxes"]["boxes"]) == len(label["truth"].labels_S)
            quality.update([without_crowds(label["truth"])], [label["truth"]])
    assert float(quality.compute()["PQ"]) == 1.0


def test_cached_batches_say_what_batches_of_files_say(write_panoptic: Write, tmp_path: Path) -> None:
    root = write_panoptic(tmp_path / "data")
    backbone = create_backbone(
        BackboneSettings("efficientnet_lite0", pretrained=False, trains="nothing", strides=[8, 32])
    )
    cached = data(root, augment="nothing", cache_features=True)
    cached.prepare_features(backbone, "fit")
    files = PanopticData(
        "folder", root, size=64, max_size=64, augment="nothing", batch_size=4, eval_batch_size=4, num_workers=0
    )
    files.setup()
    for ours, theirs in zip(cached.train_dataloader(), files.train_dataloader(), strict=True):
        with torch.no_grad():
            side = ours["pixel_mask"].shape[-1]
            height, width = theirs["pixel_values"].shape[-2:]
            pixels = torch.nn.functional.pad(theirs["pixel_values"], (0, side - width, 0, side - height))
            expected = backbone.maps(pixels)
        for x, y in zip(ours["features"], expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
        for mine, yours in zip(ours["labels"], theirs["labels"], strict=True):
            for name in ("class_labels", "size", "orig_size", "image_id", "iscrowd"):
                assert torch.equal(mine[name], yours[name]), name
            torch.testing.assert_close(mine["boxes"], yours["boxes"], atol=0.03, rtol=0)
            assert torch.equal(mine["masks"][:, :height, :width], yours["masks"])
            assert not bool(mine["masks"][:, height:].any() or mine["masks"][:, :, width:].any())
    for ours, theirs in zip(cached.val_dataloader(), files.val_dataloader(), strict=True):
        for mine, yours in zip(ours["labels"], theirs["labels"], strict=True):
            assert torch.equal(mine["truth"].ids_HW, yours["truth"].ids_HW) and mine["file"] == yours["file"]


def test_mirrored_labels_are_those_of_the_mirror_image(write_panoptic: Write, tmp_path: Path) -> None:
    root = write_panoptic(tmp_path / "data")
    backbone = create_backbone(BackboneSettings("efficientnet_lite0", pretrained=False, trains="nothing", strides=[32]))
    still, turning = (data(root, augment=augment, cache_features=True) for augment in ("nothing", "flip"))
    seen = set()
    for read in (still, turning):
        read.prepare_features(backbone, "fit")
    for plain, turned in zip(still.train_dataloader(), turning.train_dataloader(), strict=True):
        for label, other in zip(plain["labels"], turned["labels"], strict=True):
            width = int(label["size"][1])
            mirrored = not torch.equal(label["boxes"], other["boxes"])
            seen.add(mirrored)
            masks = label["masks"][..., :width]
            assert torch.equal(other["masks"][..., :width], masks.flip(-1) if mirrored else masks)
            center = 1 - label["boxes"][:, 0] if mirrored else label["boxes"][:, 0]
            torch.testing.assert_close(other["boxes"][:, 0], center)
    assert seen == {True, False}


def test_a_png_with_other_sizes_is_named(write_panoptic: Write, tmp_path: Path) -> None:
    root = write_panoptic(tmp_path / "data")
    png = next((root / "annotations" / "panoptic_val").glob("*.png"))
    Image.new("RGB", (5, 7)).save(png)
    with pytest.raises(DataError, match=rf"{png.name}.*got 5 x 7"):
        list(data(root, augment="nothing").val_dataloader())
