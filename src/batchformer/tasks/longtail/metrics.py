"""Metrics of long-tailed recognition: those of image classification, and the accuracy of each group of classes."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from batchformer.tasks.image_classification.metrics import ClassificationMetrics

__all__ = ["GROUPS", "LongTailMetrics"]

GROUPS = ("many", "medium", "few")


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
        >>> import torch
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
