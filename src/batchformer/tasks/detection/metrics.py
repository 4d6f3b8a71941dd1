"""COCO's average precision of batches of predictions."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from batchformer.tasks.set_prediction.average_precision import AP_NAMES, AveragePrecision
from batchformer.tasks.set_prediction.postprocess import detections

__all__ = ["AP_NAMES", "DetectionMetrics", "detections"]


class DetectionMetrics(AveragePrecision):
    """COCO's AP of batches of `DetectionData`.

    Args:
        num_classes: K, number of classes.
        kind: Rule by which logits become scores: see `detections`.

    Example:
        >>> metrics = DetectionMetrics(2, "focal")
        >>> label = {"image_id": torch.tensor(7), "orig_size": torch.tensor([100, 200])}
        >>> label |= {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}
        >>> metrics.add(torch.tensor([[[-5.0, 5.0]]]), torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]), [label])
        >>> metrics.compute()["AP"]
        tensor(1.)
    """

    def __init__(self, num_classes: int, kind: Literal["softmax", "focal"]) -> None:
        super().__init__(num_classes)
        self.kind = kind

    def add(self, logits_BQK: Tensor, boxes_BQ4: Tensor, labels: Sequence[dict[str, Any]]) -> None:
        """Add a batch.

        Args:
            logits_BQK: Class logits (B, Q, K), with "softmax" (B, Q, K + 1).
            boxes_BQ4: Center x, center y, width and height, as shares of the image.
            labels: Labels of the B images, which may have crowds.
        """
        sizes_B2 = torch.stack([label["orig_size"] for label in labels])
        found = detections(logits_BQK, boxes_BQ4, sizes_B2, self.kind)
        self.update(found, [_truth(label) for label in labels])


def _truth(label: dict[str, Any]) -> dict[str, Any]:
    height, width = label["orig_size"].tolist()
    center, half = label["boxes"][:, :2], label["boxes"][:, 2:] / 2
    scale = label["boxes"].new_tensor([width, height, width, height])
    boxes = torch.cat([center - half, center + half], dim=1) * scale
    extra = {"iscrowd": label["iscrowd"]} if "iscrowd" in label else {}
    if "area" in label:  # in the resized image; COCO sorts objects by their size in the file
        extra["area"] = label["area"] * (height * width) / label["size"].prod()
    return {"image_id": label["image_id"], "labels": label["class_labels"], "boxes": boxes, **extra}
