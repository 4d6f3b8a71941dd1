"""Panoptic data: COCO's panoptic JSON and PNG files as masks for training and as true maps for evaluation.

Axis letters: H, W pixels, T segments.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from batchformer.data.coco import CocoSplit, Kind
from batchformer.data.detection_transforms import CocoDetection, Transform, eval_transform
from batchformer.tasks.set_prediction.cached_data import resized_label
from batchformer.tasks.set_prediction.coco_data import CocoData

from .maps import PanopticMap

__all__ = ["PanopticData", "true_map"]


class PanopticData(CocoData):
    """Batches with boxes and masks of all segments, things and stuff alike; see `CocoData`.

    Training labels also have ``masks``. Evaluation labels also have ``truth``, the panoptic map at the size of the
    file; ``truth_boxes``, the segments' boxes at that size; and ``file``, the image file.
    """

    kind: ClassVar[Kind] = "panoptic"

    def _dataset(self, part: str, transform: Transform) -> Any:
        train = part == "train"
        dataset = CocoDetection(self._splits[part], transform, crowds=not train, masks=train, seed=self.seed)
        return dataset if train else _WithTruth(dataset)

    def _cached_labels(self, part: str) -> Sequence[dict[str, Any]]:
        train = part == "train"
        dataset = CocoDetection(self._splits[part], eval_transform(self.size, self.size), crowds=not train)
        return SegmentLabels(dataset, self.size) if train else _TrueLabels(dataset, self.size)


def true_map(split: CocoSplit, index: int) -> PanopticMap:
    """Read the true panoptic map of an image; a segment that the policy has dropped is void.

    Args:
        split: Panoptic split.
        index: Index of the image in the split.

    Raises:
        DataError: When the PNG cannot be read or has another size.
    """
    found, ids_HW = split.annotations[index], split.segment_map(index)
    ids_HW = torch.where(torch.isin(ids_HW, found.ids), ids_HW, 0)
    return PanopticMap.of(ids_HW, found.ids.tolist(), found.labels.tolist(), found.iscrowd.tolist())


def _truth(split: CocoSplit, index: int) -> dict[str, Any]:
    found, record = split.annotations[index], split.images[index]
    boxes = {"boxes": found.boxes, "labels": found.labels, "area": found.areas, "iscrowd": found.iscrowd.int()}
    return {
        "truth": true_map(split, index),
        "truth_boxes": {"image_id": record.id, **boxes},
        "file": str(record.file),
    }


class _WithTruth:
    """Samples whose labels have the truth for evaluation too."""

    def __init__(self, dataset: CocoDetection) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Any]]:
        pixels, label = self.dataset[key]
        return pixels, {**label, **_truth(self.dataset.split, key[1])}


class SegmentLabels(Sequence[dict[str, Any]]):
    """Labels with masks for a split with cached features, as `CocoDetection` gives them, without decoding images.

    An image's PNG is read once; after that its segments stay in memory, as one map of small numbers.

    Args:
        dataset: Samples of the split.
        size: Long side of the resized images, in pixels.
    """

    def __init__(self, dataset: CocoDetection, size: int) -> None:
        self.dataset, self.size = dataset, size
        self._maps: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        """Return the label of an image, with masks (T, H, W) of its resized size; empty segments are dropped."""
        label = resized_label(self.dataset, index, self.size)
        if index not in self._maps:
            self._maps[index] = self._small_map(index, label["size"].tolist())
        numbers = torch.arange(1, len(label["boxes"]) + 1, dtype=torch.int16)
        masks_THW = self._maps[index][None] == numbers[:, None, None]
        keep_T = masks_THW.flatten(1).any(1)
        rows = {name: label[name][keep_T] for name in ("class_labels", "boxes", "area", "iscrowd")}
        return {**label, **rows, "masks": masks_THW[keep_T]}

    def _small_map(self, index: int, size: list[int]) -> Tensor:
        """Return the number of the segment at every pixel of the resized image, from 1; 0 for none."""
        split, found = self.dataset.split, self.dataset.split.annotations[index]
        kept = found.ids if self.dataset.crowds else found.ids[~found.iscrowd]
        ids_HW = split.segment_map(index)
        ids_HW = torch.where(torch.isin(ids_HW, kept), ids_HW, 0)
        numbers = PanopticMap.of(ids_HW, kept.tolist(), [0] * len(kept)).ids_HW
        small: Tensor = TF.resize(tv_tensors.Mask(numbers[None].to(torch.int16)), size).as_subclass(Tensor)[0]
        return small


class _TrueLabels(Sequence[dict[str, Any]]):
    """Labels for a split with cached features, with the truth for evaluation."""

    def __init__(self, dataset: CocoDetection, size: int) -> None:
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return {**resized_label(self.dataset, index, self.size), **_truth(self.dataset.split, index)}
