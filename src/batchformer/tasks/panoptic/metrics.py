"""Panoptic quality, in sums that add up over batches and processes, and the AP of things.

Axis letters: K classes, T true segments of an image, S predicted ones; 0 along T and S is void.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from batchformer.tasks.set_prediction.average_precision import AveragePrecision
from batchformer.tasks.training.contract import Measure

from .maps import PanopticMap
from .postprocess import Instances

__all__ = ["MEASURES", "PanopticMetrics", "PanopticQuality", "segment_matches"]

MEASURES = (
    *(Measure(name, name) for name in ("PQ", "SQ", "RQ")),
    Measure("PQ_things", "PQ things", part="things"),
    *(Measure(f"{name}_things", f"{name} things") for name in ("SQ", "RQ")),
    Measure("PQ_stuff", "PQ stuff", part="stuff"),
    *(Measure(f"{name}_stuff", f"{name} stuff") for name in ("SQ", "RQ")),
    Measure("mask_AP", "mask AP"),
    Measure("mask_AP50", "mask AP50"),
    Measure("box_AP", "box AP"),
    Measure("box_AP50", "box AP50"),
)
"""All figures of a panoptic run, in the order of tables."""


class Matches(dict[str, Tensor]):
    """Counts of each class in one image, ``(K,)`` each: ``iou`` (sum over matched pairs), ``tp``, ``fp``, ``fn``."""


def segment_matches(predicted: PanopticMap, truth: PanopticMap, num_classes: int) -> Matches:
    """Match the segments of one image: those of one class whose intersection over union is above one half.

    Pixels of a predicted segment where the truth is void do not belong to the union. Crowds are never matched and never
    missed. A predicted segment without a match is no error when more than half of it lies on void and on the crowd of
    its class (with several such crowds on the last one, as in the reference evaluator).

    Args:
        predicted: Predicted map of the file's size; every segment has pixels.
        truth: True map of the same size.
        num_classes: K, number of classes.

    Raises:
        ValueError: When the sizes differ, or a predicted segment has no pixel.

    Source:
        Kirillov et al., "Panoptic Segmentation", CVPR 2019, section 4; void and crowds as in section 4.2.

    Example:
        >>> truth = PanopticMap.of(torch.tensor([[1, 1, 2, 2]]), [1, 2], [0, 1])
        >>> guess = PanopticMap.of(torch.tensor([[1, 1, 1, 2]]), [1, 2], [0, 1])
        >>> found = segment_matches(guess, truth, 2)
        >>> found["tp"].tolist(), [round(x, 3) for x in found["iou"].tolist()], found["fn"].tolist()
        ([1, 0], [0.667, 0.0], [0, 1])
    """
    if predicted.ids_HW.shape != truth.ids_HW.shape:
        raise ValueError(
            f"Expected a predicted map of the truth's size {tuple(truth.ids_HW.shape)}, got "
            f"{tuple(predicted.ids_HW.shape)}. Bring the masks to the size of the file first."
        )
    pairs_TS = _intersections(truth, predicted)
    area_S, area_T = pairs_TS.sum(0)[1:], pairs_TS.sum(1)[1:]
    if bool((area_S == 0).any()):
        raise ValueError("Expected pixels of every predicted segment, got a segment without any. Leave it out.")
    void_S, both_TS = pairs_TS[0, 1:], pairs_TS[1:, 1:]
    union_TS = area_S[None] + area_T[:, None] - both_TS - void_S[None]
    same_TS = truth.labels_S[:, None] == predicted.labels_S[None]
    # In whole numbers. Above one half a segment has at most one partner.
    match_TS = same_TS & ~truth.iscrowd_S[:, None] & (2 * both_TS > union_TS)
    ignored_S = void_S + _on_crowd(both_TS, same_TS & truth.iscrowd_S[:, None])
    false_S = ~match_TS.any(0) & (2 * ignored_S <= area_S)
    missed_T = ~match_TS.any(1) & ~truth.iscrowd_S
    true_T = match_TS.any(1)
    iou_T = (match_TS * both_TS / union_TS.clamp(min=1).double()).sum(1)
    return Matches(
        iou=torch.bincount(truth.labels_S, iou_T, minlength=num_classes),
        tp=torch.bincount(truth.labels_S[true_T], minlength=num_classes),
        fp=torch.bincount(predicted.labels_S[false_S], minlength=num_classes),
        fn=torch.bincount(truth.labels_S[missed_T], minlength=num_classes),
    )


def _intersections(truth: PanopticMap, predicted: PanopticMap) -> Tensor:
    """Count the pixels of every pair of segments, ``(T + 1, S + 1)`` with void first, in one pass over the image."""
    rows, columns = len(truth.labels_S) + 1, len(predicted.labels_S) + 1
    pairs = (truth.ids_HW * columns + predicted.ids_HW).flatten()
    return torch.bincount(pairs, minlength=rows * columns).view(rows, columns)


def _on_crowd(both_TS: Tensor, crowd_TS: Tensor) -> Tensor:
    """Count the pixels of each predicted segment on the last crowd of its class."""
    if len(both_TS) == 0:
        return both_TS.sum(0)
    last_S = (crowd_TS * torch.arange(1, len(both_TS) + 1, device=both_TS.device)[:, None]).amax(0)
    pixels_S = both_TS.gather(0, (last_S - 1).clamp(min=0)[None])[0]
    return torch.where(last_S > 0, pixels_S, 0)


class PanopticQuality(Metric):
    """PQ, SQ and RQ over all classes, things and stuff, equal to the reference evaluator's (panopticapi).

    ``PQ = SQ * RQ`` in each class: ``SQ`` is the mean intersection over union of the matched pairs, ``RQ`` is
    ``tp / (tp + fp / 2 + fn / 2)``. The figures are means over the classes that occur in the truth or in the
    predictions, and NaN where none does.

    Args:
        is_thing: For each class, by index, True for things and False for stuff.
        **kwargs: Arguments of `torchmetrics.Metric`.

    Source:
        Kirillov et al., "Panoptic Segmentation", CVPR 2019, equation 2.

    Example:
        >>> truth = PanopticMap.of(torch.tensor([[1, 1, 2, 2]]), [1, 2], [0, 1])
        >>> metric = PanopticQuality([True, False])
        >>> metric.update([truth], [truth])
        >>> {name: float(value) for name, value in metric.compute().items() if name != "per_class"}["PQ"]
        1.0
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    iou: Tensor
    tp: Tensor
    fp: Tensor
    fn: Tensor

    def __init__(self, is_thing: Sequence[bool], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.is_thing = torch.tensor(list(is_thing), dtype=torch.bool)
        classes = len(self.is_thing)
        self.add_state("iou", torch.zeros(classes, dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("tp", "fp", "fn"):
            self.add_state(name, torch.zeros(classes, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predicted: Sequence[PanopticMap], truth: Sequence[PanopticMap]) -> None:
        """Add images: predicted and true maps of equal sizes, pair by pair.

        Raises:
            ValueError: When the sizes differ, or a predicted segment has no pixel.
        """
        for guess, answer in zip(predicted, truth, strict=True):
            for name, counts_K in segment_matches(guess, answer, len(self.is_thing)).items():
                setattr(self, name, getattr(self, name) + counts_K.to(self.tp.device))

    def compute(self) -> dict[str, Tensor]:
        """Compute the figures, as fractions in 0..1.

        Returns:
            ``PQ``, ``SQ``, ``RQ``, each also with ``_things`` and ``_stuff``, and ``per_class``: PQ of each class
            ``(K,)``, NaN for a class that does not occur.
        """
        errors_K = self.tp + (self.fp + self.fn).double() / 2
        met_K = errors_K > 0
        sq_K = self.iou / self.tp.clamp(min=1)
        values = {"PQ": self.iou / errors_K, "SQ": sq_K, "RQ": self.tp / errors_K}
        things_K = self.is_thing.to(met_K.device)
        groups = {"": met_K, "_things": met_K & things_K, "_stuff": met_K & ~things_K}
        result = {f"{name}{end}": value_K[at].mean() for end, at in groups.items() for name, value_K in values.items()}
        return {**result, "per_class": values["PQ"]}


class PanopticMetrics(Metric):
    """Metrics of a split: panoptic quality, and COCO's AP of the masks and boxes of things.

    Args:
        is_thing: For each class, by index, True for things and False for stuff.

    Example:
        >>> metrics = PanopticMetrics([True, False])
        >>> truth = PanopticMap.of(torch.tensor([[1, 1, 2, 2]]), [1, 2], [0, 1])
        >>> things = Instances(truth.masks_SHW[:1], torch.ones(1), torch.zeros(1, dtype=torch.long))
        >>> box = {"boxes": torch.tensor([[0.0, 0.0, 2.0, 1.0]]), "labels": torch.tensor([0])}
        >>> metrics.update([{**box, "scores": torch.ones(1)}], [{**box, "image_id": 7}], [(truth, things, truth)])
        >>> values = metrics.compute()
        >>> float(values["PQ"]), round(float(values["mask_AP"]), 3), round(float(values["box_AP"]), 3)
        (1.0, 1.0, 1.0)
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    def __init__(self, is_thing: Sequence[bool]) -> None:
        # The parts gather over processes by themselves.
        super().__init__(sync_on_compute=False)
        self.is_thing = list(is_thing)
        self.quality = PanopticQuality(is_thing)
        self.boxes = AveragePrecision(len(self.is_thing))
        self.masks = AveragePrecision(len(self.is_thing), "masks")

    def update(
        self,
        boxes: Sequence[dict[str, Tensor]],
        true_boxes: Sequence[dict[str, Any]],
        maps: Sequence[tuple[PanopticMap, Instances, PanopticMap]] = (),
    ) -> None:
        """Add images.

        Args:
            boxes: Detections of each image, with ``scores``, ``labels`` and ``boxes``, from
                :func:`batchformer.tasks.set_prediction.postprocess.detections`; boxes of stuff are left out here.
            true_boxes: Targets of each image: ``image_id``, ``labels``, ``boxes``, and where known ``area`` and
                ``iscrowd``.
            maps: Predicted map, instances and true map of each image; empty for a detector alone.
        """
        self.boxes.update([self._things(one) for one in boxes], [self._things(one) for one in true_boxes])
        if not maps:
            return
        self.quality.update([predicted for predicted, _, _ in maps], [truth for _, _, truth in maps])
        names = ("masks", "scores", "labels")
        truths = []
        for image, (_, _, truth) in zip(true_boxes, maps, strict=True):
            whole = {"masks": truth.masks_SHW, "labels": truth.labels_S, "iscrowd": truth.iscrowd_S.int()}
            truths.append({"image_id": image["image_id"], **self._things(whole)})
        self.masks.update([dict(zip(names, things, strict=True)) for _, things, _ in maps], truths)

    def _things(self, image: dict[str, Any]) -> dict[str, Any]:
        keep = torch.tensor(self.is_thing, device=image["labels"].device)[image["labels"]]
        return {name: value if name == "image_id" else value[keep] for name, value in image.items()}

    def compute(self) -> dict[str, Tensor]:
        """Compute the figures.

        Returns:
            All figures of `PanopticQuality.compute`, and ``mask_AP``, ``mask_AP50``, ``box_AP``, ``box_AP50`` of
            things; without figures of maps where no image had one.
        """
        values = self.quality.compute() if self.masks.ids else {}
        for kind, metric in (("mask", self.masks), ("box", self.boxes)):
            if metric.ids:
                found = metric.compute()
                values |= {f"{kind}_AP": found["AP"], f"{kind}_AP50": found["AP50"]}
        return values

    def reset(self) -> None:
        """Forget all images."""
        super().reset()
        for part in (self.quality, self.boxes, self.masks):
            part.reset()
