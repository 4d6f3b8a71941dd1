"""Average precision as COCO defines it, and the boxes that each detector is scored by.

Axis letters: B images, Q queries, K classes, D detections.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

__all__ = ["AP_NAMES", "DetectionMetrics", "detections"]

AP_NAMES = {
    "AP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "APS": "map_small",
    "APM": "map_medium",
    "APL": "map_large",
}
"""The papers' names of COCO's numbers, and torchmetrics'."""


def detections(
    logits_BQK: Tensor, boxes_BQ4: Tensor, sizes_B2: Tensor, kind: Literal["softmax", "focal"], top: int = 100
) -> list[dict[str, Tensor]]:
    """Scored boxes in pixels, as each detector was published.

    ``"softmax"`` (DETR): one detection for each query, its best class but "no object", which is the last.
    ``"focal"`` (Conditional DETR, Deformable DETR, SMCA): the ``top`` best pairs of query and class.

    Args:
        logits_BQK: (B, Q, K), with softmax (B, Q, K + 1).
        boxes_BQ4: Normalised center x, center y, width, height.
        sizes_B2: Height and width of the images in pixels.
        kind: How scores follow from logits.
        top: Most detections of an image; COCO counts the best 100.

    Returns:
        For each image ``scores`` (D,), best first, ``labels`` (D,) in 0..K-1, and ``boxes`` (D, 4) x1, y1, x2, y2.

    Source:
        DETR, section 3.1 and appendix; Deformable DETR, appendix A.4 (the best pairs of query and class).

    Example:
        >>> logits, boxes = torch.tensor([[[2.0, -3.0], [-3.0, 1.0]]]), torch.tensor([[[0.5, 0.5, 0.5, 0.5]] * 2])
        >>> found = detections(logits, boxes, torch.tensor([[100, 200]]), "focal", top=2)[0]
        >>> found["labels"].tolist(), found["boxes"][0].tolist()
        ([0, 1], [50.0, 25.0, 150.0, 75.0])
    """
    logits_BQK, boxes_BQ4 = logits_BQK.float(), boxes_BQ4.float()
    if kind == "softmax":
        scores_BD, labels_BD = logits_BQK.softmax(-1)[..., :-1].max(-1)
        scores_BD, queries_BD = scores_BD.sort(dim=1, descending=True, stable=True)
        scores_BD, queries_BD = scores_BD[:, :top], queries_BD[:, :top]
        labels_BD = labels_BD.gather(1, queries_BD)
    else:
        classes = logits_BQK.shape[-1]
        pairs_BP = logits_BQK.sigmoid().flatten(1)
        scores_BD, pairs_BD = pairs_BP.topk(min(top, pairs_BP.shape[1]), dim=1)
        queries_BD, labels_BD = pairs_BD // classes, pairs_BD % classes
    boxes_BD4 = boxes_BQ4.gather(1, queries_BD[..., None].expand(-1, -1, 4))
    center, half = boxes_BD4[..., :2], boxes_BD4[..., 2:] / 2
    height, width = sizes_B2.to(boxes_BD4).unbind(1)
    scale_B4 = torch.stack([width, height, width, height], dim=1)
    boxes_BD4 = torch.cat([center - half, center + half], dim=-1) * scale_B4[:, None]
    return [
        {"scores": scores, "labels": labels, "boxes": boxes}
        for scores, labels, boxes in zip(scores_BD, labels_BD, boxes_BD4, strict=True)
    ]


class DetectionMetrics(nn.Module):
    """COCO's AP over all images of all processes, computed by torchmetrics on a fast backend.

    An image is counted once, by its id, however often a process was given it. Values are fractions of 1; a size or a
    class without a box is NaN.

    Args:
        num_classes: K.

    Raises:
        ImportError: From ``compute()``, when torchmetrics' backend is missing.

    Source:
        The COCO detection evaluation: AP over IoU .50:.05:.95, small < 32^2 <= medium <= 96^2 < large pixels, 100
        detections an image, crowd boxes ignored.

    Example:
        >>> metrics = DetectionMetrics(2)
        >>> box = torch.tensor([[10.0, 10.0, 60.0, 60.0]])
        >>> truth = {"image_id": 7, "boxes": box, "labels": torch.tensor([1])}
        >>> metrics.update([{"scores": torch.tensor([0.9]), "labels": torch.tensor([1]), "boxes": box}], [truth])
        >>> metrics.compute()["AP"]
        tensor(1.)
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.images: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}

    def update(self, found: Sequence[dict[str, Tensor]], truths: Sequence[dict[str, Any]]) -> None:
        """Add images.

        Args:
            found: What :func:`detections` returns.
            truths: For each image ``image_id``, ``boxes`` (T, 4) x1, y1, x2, y2 in pixels, ``labels`` (T,), and where
                it is known ``area`` and ``iscrowd`` (T,).
        """
        for one, truth in zip(found, truths, strict=True):
            rest = {name: torch.as_tensor(value).cpu() for name, value in truth.items() if name != "image_id"}
            self.images[int(truth["image_id"])] = ({name: value.cpu() for name, value in one.items()}, rest)

    def reset(self) -> None:
        """Forget all images."""
        self.images.clear()

    def compute(self) -> dict[str, Tensor]:
        """AP of all kinds.

        Returns:
            Scalars under "AP", "AP50", "AP75", "APS", "APM", "APL", and (K,) under "per_class".
        """
        images = self._of_all_processes()
        metric = _average_precision()
        for number in sorted(images):
            found, truth = images[number]
            metric.update([found], [truth])
        values = metric.compute()
        result = {name: _nan_for_absent(values[key]) for name, key in AP_NAMES.items()}
        per_class = torch.full((self.num_classes,), torch.nan)
        classes, precision = torch.atleast_1d(values["classes"]), torch.atleast_1d(values["map_per_class"])
        if len(precision) == len(classes):
            per_class[classes.long()] = _nan_for_absent(precision.float())
        return {**result, "per_class": per_class}

    def _of_all_processes(self) -> dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]]:
        # Not torchmetrics' own gathering: with lists of unequal length on the ranks it waits for ever.
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self.images
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self.images)
        return {number: image for part in parts for number, image in part.items()}


def _average_precision() -> Any:
    try:
        from torchmetrics.detection import MeanAveragePrecision

        return MeanAveragePrecision(
            box_format="xyxy", iou_type="bbox", class_metrics=True, backend="faster_coco_eval", sync_on_compute=False
        )
    except (ImportError, ModuleNotFoundError) as error:
        raise ImportError("COCO's AP needs faster-coco-eval: pip install 'batchformer[detection]'") from error


def _nan_for_absent(values: Tensor) -> Tensor:
    """COCO says -1 where there was nothing to measure."""
    values = values.float()
    return torch.where(values < 0, torch.full_like(values, torch.nan), values)
