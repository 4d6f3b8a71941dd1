"""Metrics of long-tailed recognition: those of image classification, and the accuracy of each group of classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from batchformer.tasks.image_classification.metrics import ClassificationMetrics
from batchformer.tasks.training.contract import Measure

__all__ = ["GROUPS", "MEASURES", "LongTailMetrics", "RoutedMetrics"]

GROUPS = ("many", "medium", "few")

MEASURES = (
    Measure("top1", "top-1"),
    Measure("top5", "top-5"),
    *(Measure(name, name, part=f"{name}-shot classes") for name in GROUPS),
    Measure("macro_f1", "macro F1"),
    Measure("ece", "ECE", higher_is_better=False),
    Measure("share_of_experts_used", "share of experts used", higher_is_better=False),
    Measure("accuracy", "accuracy"),
)
"""Metrics in the order of tables; "accuracy" is that of each class."""


class LongTailMetrics(ClassificationMetrics):
    """Top-1, top-5, many / medium / few, per-class accuracy, macro F1 and expected calibration error.

    ``many``, ``medium`` and ``few`` are means of per-class accuracies; a group without a class that has test images is
    NaN. The others are described in :class:`~batchformer.tasks.image_classification.metrics.ClassificationMetrics`.

    Args:
        num_classes: K.
        groups: Class indices under "many", "medium" and "few", from the data module or `imbalance.shot_groups`.
        **kwargs: Passed to `ClassificationMetrics`.

    Raises:
        ValueError: If a group is unknown, a class lies outside 0..K-1 or in two groups.

    Example:
        >>> metrics = LongTailMetrics(3, {"many": [0], "medium": [1], "few": [2]})
        >>> metrics.update(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 1, 1]))
        >>> result = metrics.compute()
        >>> result["many"], result["medium"], result["few"]
        (tensor(1.), tensor(0.5000), tensor(nan))
    """

    def __init__(self, num_classes: int, groups: Mapping[str, Sequence[int]], **kwargs: Any) -> None:
        super().__init__(num_classes, **kwargs)
        self.groups = _check_groups(groups, num_classes)

    def compute(self) -> dict[str, Tensor]:
        """Compute all metrics as fractions of 1.

        Returns:
            Those of `ClassificationMetrics` and scalars under "many", "medium" and "few". NaN where there was nothing
            to measure.
        """
        result = super().compute()
        for name in GROUPS:
            result[name] = result["per_class"][self.groups[name]].nanmean()  # the mean of nothing is NaN
        return result


class RoutedMetrics(LongTailMetrics):
    """Metrics of RIDE's routed experts: those of `LongTailMetrics`, and the mean share of the experts that are asked.

    Args:
        num_classes: K.
        groups: Class indices under "many", "medium" and "few".
        **kwargs: Passed to `LongTailMetrics`.

    Example:
        >>> metrics = RoutedMetrics(3, {})
        >>> metrics.update(torch.eye(3), torch.arange(3), torch.tensor(0.5))
        >>> metrics.compute()["share_of_experts_used"]
        tensor(0.5000)
    """

    share: Tensor
    share_rows: Tensor

    def __init__(self, num_classes: int, groups: Mapping[str, Sequence[int]], **kwargs: Any) -> None:
        super().__init__(num_classes, groups, **kwargs)
        self.add_state("share", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("share_rows", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor, share: Tensor) -> None:  # type: ignore[override]
        """Add a batch.

        Args:
            logits: ``(N, K)``.
            target: Class indices ``(N,)``.
            share: Share of the experts that were asked, in 0..1, the mean over the batch.

        Raises:
            ValueError: If the shapes do not fit, or a target lies outside 0..K-1.
        """
        super().update(logits, target)
        self.share += share * len(target)
        self.share_rows += len(target)

    def compute(self) -> dict[str, Tensor]:
        """Compute all metrics as fractions of 1, among them "share_of_experts_used"."""
        return {**super().compute(), "share_of_experts_used": self.share / self.share_rows}


def _check_groups(groups: Mapping[str, Sequence[int]], num_classes: int) -> dict[str, list[int]]:
    if unknown := sorted(set(groups) - set(GROUPS)):
        raise ValueError(f"Unknown class groups {unknown}. There are {', '.join(GROUPS)}.")
    checked = {name: [int(k) for k in groups.get(name, ())] for name in GROUPS}
    members = [k for name in GROUPS for k in checked[name]]
    if outside := sorted(k for k in members if not 0 <= k < num_classes):
        raise ValueError(f"Expected classes in 0..{num_classes - 1}, got {outside[:10]} in the groups.")
    if len(members) != len(set(members)):
        twice = sorted({k for k in members if members.count(k) > 1})
        raise ValueError(f"Expected every class in one group at most; in two: {twice[:10]}.")
    return checked
