"""AP equal to pycocotools on a COCO folder, through the data module's batches; the published way to score boxes."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from batchformer.tasks.detection.data import DetectionData
from batchformer.tasks.detection.metrics import AP_NAMES, DetectionMetrics, detections


def guess(labels: list[dict[str, Any]], random: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Logits (B, 12, 3) and boxes: near the truth, with wrong classes, doubles and inventions."""
    logits, boxes = [], []
    for label in labels:
        shaken = label["boxes"].repeat(3, 1)[:12]
        shaken = (shaken + torch.tensor(random.normal(0, 0.04, shaken.shape), dtype=torch.float32)).clamp(0.02, 0.98)
        invented = torch.tensor(random.uniform(0.2, 0.6, (12 - len(shaken), 4)), dtype=torch.float32)
        boxes.append(torch.cat([shaken, invented]))
        classes = label["class_labels"].repeat(3)[:12]
        sure = torch.tensor(random.normal(-2, 1, (12, 3)), dtype=torch.float32)
        sure[torch.arange(len(classes)), classes] += 2
        logits.append(sure)
    return torch.stack(logits), torch.stack(boxes)


def official(annotations: Path, found: list[dict[str, Any]], ids: list[int]) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.params.imgIds = ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(AP_NAMES, evaluation.stats[:6], strict=True)}


@pytest.mark.parametrize("size", [64, 200])
def test_equal_to_pycocotools(size: int, write_coco: Callable[..., Path], tmp_path: Path) -> None:
    # Boxes of 12 to 28 pixels are small to COCO, those of the larger copy medium.
    root = write_coco(tmp_path / "coco", {"train": 2, "val": 12}, side=60)
    data = DetectionData("folder", root, size=size, eval_batch_size=5, num_workers=0)
    random = np.random.default_rng(0)
    metric, results, ids = DetectionMetrics(3, "focal"), [], []
    for batch in data.val_dataloader():
        logits, boxes = guess(batch["labels"], random)
        metric.add(logits, boxes, batch["labels"])
        sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
        for label, found in zip(batch["labels"], detections(logits, boxes, sizes, "focal"), strict=True):
            ids.append(int(label["image_id"]))
            for score, k, (x0, y0, x1, y1) in zip(found["scores"], found["labels"], found["boxes"], strict=True):
                box = [float(x0), float(y0), float(x1 - x0), float(y1 - y0)]
                category = data.categories[int(k)].id
                results.append({"image_id": ids[-1], "category_id": category, "bbox": box, "score": float(score)})
    ours, theirs = metric.compute(), official(root / "annotations" / "instances_val.json", results, ids)
    assert theirs["AP"] > 0.05
    for name, value in theirs.items():
        if value < 0:
            assert ours[name].isnan()
        else:
            assert float(ours[name]) == pytest.approx(value, abs=1e-6), name
    assert float(ours["per_class"].mean()) == pytest.approx(theirs["AP"], abs=1e-6)


def test_sizes_are_those_of_the_file_not_of_the_resized_image(write_coco: Callable[..., Path], tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", {"train": 2, "val": 4})
    metric = DetectionMetrics(3, "focal")
    for batch in DetectionData("folder", root, size=400, num_workers=0).val_dataloader():
        assert any((label["area"] > 32**2).any() for label in batch["labels"])
        metric.add(torch.zeros(2, 1, 3), torch.full((2, 1, 4), 0.5), batch["labels"])
    values = metric.compute()
    assert not values["APS"].isnan() and values["APM"].isnan()


def test_detr_has_a_class_for_no_object_and_one_detection_a_query() -> None:
    logits = torch.tensor([[[0.0, 3.0, 1.0], [2.0, 0.0, 9.0]]])
    (found,) = detections(logits, torch.full((1, 2, 4), 0.5), torch.tensor([[10, 20]]), "softmax")
    assert found["labels"].tolist() == [1, 0]
    torch.testing.assert_close(found["scores"][0], logits[0, 0].softmax(0)[1])
    assert found["scores"][1] < 0.01, "the query is sure that there is nothing"
    assert found["boxes"][0].tolist() == [5.0, 2.5, 15.0, 7.5]


def test_the_others_score_the_best_pairs_of_query_and_class() -> None:
    logits = torch.tensor([[[2.0, 1.0], [-1.0, 1.5]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.5, 0.5]]])
    (found,) = detections(logits, boxes, torch.tensor([[10, 10]]), "focal", top=3)
    assert found["labels"].tolist() == [0, 1, 1]
    torch.testing.assert_close(found["scores"], torch.tensor([2.0, 1.5, 1.0]).sigmoid())
    assert [box[2].item() for box in found["boxes"]] == [10.0, 5.0, 10.0], "a query may stand for two classes"


@pytest.mark.parametrize("seed", range(3))
def test_equal_to_pycocotools_with_crowds_and_recalls_on_the_thresholds(seed: int) -> None:
    # Seldom classes have recalls such as 0.6, which lie on one of COCO's thresholds: rounded thresholds miss them.
    random, stream = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    metric, images, annotations, results = DetectionMetrics(4, "focal"), [], [], []
    for number in range(5, 35):
        height, width = (int(side) for side in random.integers(100, 500, 2))
        count = int(random.integers(0, 9))
        center, side = torch.rand(count, 2, generator=stream), torch.rand(count, 2, generator=stream)
        boxes = torch.cat([0.2 + 0.6 * center, 0.02 + 0.35 * side], 1)
        classes = torch.randint(4, (count,), generator=stream)
        crowds = (torch.rand(count, generator=stream) < 0.15).long()
        size = torch.tensor([height, width])
        truth = {"image_id": torch.tensor(number), "orig_size": size, "class_labels": classes, "boxes": boxes}
        truth["iscrowd"] = crowds
        shaken = boxes + 0.02 * torch.randn(count, 4, generator=stream)
        invented = 0.1 + 0.4 * torch.rand(20, 4, generator=stream)
        guessed = torch.cat([shaken, invented]).clamp(min=0.01)
        logits = torch.randn(len(guessed), 4, generator=stream) - 1
        logits[torch.arange(count), classes] += 5 * torch.rand(count, generator=stream)
        metric.add(logits[None], guessed[None], [truth])
        images.append({"id": number, "height": height, "width": width})
        for row, (x, y, w, h) in enumerate((boxes.double() * size[[1, 0, 1, 0]]).tolist()):
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": int(classes[row])})
            annotations[-1] |= {"bbox": [x - w / 2, y - h / 2, w, h], "area": w * h, "iscrowd": int(crowds[row])}
        found = detections(logits[None], guessed[None], size[None], "focal")[0]
        rows = (found[name].tolist() for name in ("scores", "labels", "boxes"))
        for score, k, (x0, y0, x1, y1) in zip(*rows, strict=True):
            box = [x0, y0, x1 - x0, y1 - y0]
            results.append({"image_id": number, "category_id": k, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": images, "annotations": annotations, "categories": [{"id": k} for k in range(4)]}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ours = metric.compute()
    for name, value in zip(AP_NAMES, evaluation.stats[:6], strict=True):
        if value >= 0:
            assert float(ours[name]) == pytest.approx(value, abs=1e-6), name
