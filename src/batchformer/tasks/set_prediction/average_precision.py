"""COCO's average precision of boxes or masks.

Axis letters: B images, Q queries, K classes, D detections, T targets, H, W pixels.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

__all__ = ["AP_NAMES", "AveragePrecision"]

AP_NAMES = {
    "AP": "map",
    "AP50": "map_50",
    "AP75": "map_75",
    "APS": "map_small",
    "APM": "map_medium",
    "APL": "map_large",
}
"""Names of COCO's figures in papers -> names in torchmetrics."""


class AveragePrecision(Metric):
    """COCO's AP over all images of all processes, computed by torchmetrics on a fast backend.

    An image is counted once, by its id, however often processes add it. Values are fractions in 0..1; the value of a
    size or a class without a target is NaN. Masks are kept run-length encoded.

    Args:
        num_classes: K, number of classes.
        iou: Objects whose intersection over union is taken, ``boxes`` or ``masks``.

    Raises:
        ImportError: When torchmetrics' backend is missing.

    Source:
        The COCO detection evaluation: AP over IoU .50:.05:.95, small < 32^2 <= medium <= 96^2 < large pixels, 100
        detections an image, crowds ignored.

    Example:
        >>> metric = AveragePrecision(2)
        >>> box = torch.tensor([[10.0, 10.0, 60.0, 60.0]])
        >>> truth = {"image_id": 7, "boxes": box, "labels": torch.tensor([1])}
        >>> metric.update([{"scores": torch.tensor([0.9]), "labels": torch.tensor([1]), "boxes": box}], [truth])
        >>> metric.compute()["AP"]
        tensor(1.)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self, num_classes: int, iou: Literal["boxes", "masks"] = "boxes") -> None:
        # Processes gather by themselves in compute(), see _of_all_processes().
        super().__init__(sync_on_compute=False)
        self.num_classes, self.iou = num_classes, iou
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        self.ids: dict[int, None] = {}
        # In a list: no part of the module, so that nobody moves or gathers it.
        self._metric = [_average_precision(self.iou)]

    def update(self, found: Sequence[dict[str, Tensor]], truths: Sequence[dict[str, Any]]) -> None:
        """Add images.

        Args:
            found: Detections of each image, from :func:`.postprocess.detections`; with ``iou="masks"`` they have
                ``masks`` (D, H, W) bool instead of ``boxes``.
            truths: Targets of each image: ``image_id``; ``boxes`` (T, 4), x1, y1, x2, y2 in pixels, or ``masks``
                (T, H, W) bool; ``labels`` (T,); and where they are known ``area`` and ``iscrowd`` (T,).
        """
        for one, truth in zip(found, truths, strict=True):
            number = int(truth["image_id"])
            if number not in self.ids:
                self.ids[number] = None
                rest = {name: torch.as_tensor(value).cpu() for name, value in truth.items() if name != "image_id"}
                self._metric[0].update([{name: value.cpu() for name, value in one.items()}], [rest])

    def compute(self) -> dict[str, Tensor]:
        """Compute AP over all thresholds, at two of them, by size and by class.

        Returns:
            Scalars under "AP", "AP50", "AP75", "APS", "APM", "APL", and (K,) under "per_class".
        """
        values = self._of_all_processes().compute()
        result = {name: _nan_for_absent(values[key]) for name, key in AP_NAMES.items()}
        per_class = torch.full((self.num_classes,), torch.nan)
        classes, precision = torch.atleast_1d(values["classes"]), torch.atleast_1d(values["map_per_class"])
        if len(precision) == len(classes):
            per_class[classes.long()] = _nan_for_absent(precision.float())
        return {**result, "per_class": per_class}

    def _of_all_processes(self) -> Any:
        """Return a metric that holds every image once, in the order of their ids."""
        # Not torchmetrics' own gathering: with lists of unequal length on the ranks it waits for ever.
        parts: list[Any] = [(list(self.ids), self._metric[0].metric_state)]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            mine, parts = parts[0], [None] * dist.get_world_size()
            dist.all_gather_object(parts, mine)
        places = {number: (part, index) for part, (ids, _) in enumerate(parts) for index, number in enumerate(ids)}
        whole = _average_precision(self.iou)
        for name in whole.metric_state:
            # Either the list of boxes or the list of masks is empty.
            kept = [parts[part][1][name][index] for _, (part, index) in sorted(places.items()) if parts[part][1][name]]
            setattr(whole, name, kept)
        whole._update_count = 1
        if not any(len(labels) for labels in whole.detection_labels):
            self._add_a_miss(whole)
        return whole

    def _add_a_miss(self, whole: Any) -> None:
        """Add a false detection: without any detection the evaluator measures nothing, and this one changes no AP."""
        wanted = [labels for labels in whole.groundtruth_labels if len(labels)]
        if wanted:
            empty = {"masks": torch.zeros(1, 8, 8, dtype=torch.bool), "boxes": torch.zeros(1, 4)}[self.iou]
            miss = {self.iou: empty, "scores": torch.zeros(1), "labels": wanted[0][:1]}
            whole.update([miss], [{self.iou: empty[:0], "labels": wanted[0][:0]}])


def _average_precision(iou: Literal["boxes", "masks"]) -> Any:
    try:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(
            iou_type="bbox" if iou == "boxes" else "segm",
            class_metrics=True,
            backend="faster_coco_eval",
            sync_on_compute=False,
            # COCO's own, in fp64. torchmetrics' are rounded to fp32, and a recall of exactly 0.6 lies below 0.60000002.
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0.0, 1.0, 101).tolist(),
        )
    except (ImportError, ModuleNotFoundError) as error:
        raise ImportError("COCO's AP needs faster-coco-eval: pip install 'batchformer[detection]'") from error
    metric.warn_on_many_detections = False  # COCO counts the best hundred on purpose
    return metric


def _nan_for_absent(values: Tensor) -> Tensor:
    """Replace COCO's -1, which stands where there was nothing to measure, by NaN."""
    values = values.float()
    return torch.where(values < 0, torch.full_like(values, torch.nan), values)
