"""Metrics of long-tailed recognition, accumulated as sums so that they add up over batches and processes.

Axis letters: N samples, K classes, B calibration bins.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["GROUPS", "LongTailMetrics"]

GROUPS = ("many", "medium", "few")


class LongTailMetrics(Metric):
    """Top-1, top-5, many / medium / few, per-class accuracy, macro F1 and expected calibration error.

    A class without test images has no accuracy: its entry in ``per_class`` is NaN and the means leave it out. A group
    without such a class is NaN. ``many``, ``medium`` and ``few`` are means of per-class accuracies; ``macro_f1`` is the
    mean of F1 over the classes with test images; ``ece`` is the expected calibration error of the softmax's
    largest probability (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3).

    Args:
        num_classes: K.
        groups: Class indices under "many", "medium" and "few", from the data module or `profile.shot_groups`.
        bins: Calibration bins of equal width.
        **kwargs: Passed to `torchmetrics.Metric`.

    Raises:
        ValueError: If a group is unknown, a class lies outside 0..K-1 or in two groups.

    Example:
        >>> metrics = LongTailMetrics(3, {"many": [0], "medium": [1], "few": [2]})
        >>> metrics.update(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 1, 1]))
        >>> result = metrics.compute()
        >>> result["many"], result["medium"], result["few"]
        (tensor(1.), tensor(0.5000), tensor(nan))
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False

    correct: Tensor
    total: Tensor
    predicted: Tensor
    correct_top5: Tensor
    bin_total: Tensor
    bin_correct: Tensor
    bin_confidence: Tensor

    def __init__(self, num_classes: int, groups: Mapping[str, Sequence[int]], *, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.bins = num_classes, bins
        self.groups = _check_groups(groups, num_classes)
        for name, size in (("correct", num_classes), ("total", num_classes), ("predicted", num_classes)):
            self.add_state(name, torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("correct_top5", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")
        for name in ("bin_total", "bin_correct"):
            self.add_state(name, torch.zeros(bins, dtype=torch.long), dist_reduce_fx="sum")
        self.add_state("bin_confidence", torch.zeros(bins), dist_reduce_fx="sum")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Add a batch.

        Args:
            logits: ``(N, K)``; of several experts, give their mean.
            target: Class indices ``(N,)``.

        Raises:
            ValueError: If the shapes do not fit, or a target lies outside 0..K-1.
        """
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or target.shape != logits.shape[:1]:
            raise ValueError(
                f"Expected logits (N, {self.num_classes}) and class indices (N,), got {tuple(logits.shape)} and "
                f"{tuple(target.shape)}. Average the logits of several experts over dim 1 first."
            )
        if len(target) == 0:
            return
        if int(target.min()) < 0 or int(target.max()) >= self.num_classes:
            raise ValueError(
                f"Expected targets in 0..{self.num_classes - 1}, got {int(target.min())}..{int(target.max())}."
            )
        rank = _rank(logits, target)
        hit = rank == 0
        self.correct += torch.bincount(target[hit], minlength=self.num_classes)
        self.total += torch.bincount(target, minlength=self.num_classes)
        self.predicted += torch.bincount(logits.argmax(dim=1), minlength=self.num_classes)
        self.correct_top5 += (rank < 5).sum()
        self._update_bins(logits, hit)

    def _update_bins(self, logits: Tensor, hit: Tensor) -> None:
        confidence = logits.float().softmax(dim=1).amax(dim=1)
        # Bins are (lower, upper]: a confidence of exactly 1 belongs to the last.
        edges = torch.linspace(0, 1, self.bins + 1, device=logits.device)[1:-1]
        where = torch.bucketize(confidence, edges)
        self.bin_total += torch.bincount(where, minlength=self.bins)
        self.bin_correct += torch.bincount(where[hit], minlength=self.bins)
        self.bin_confidence.index_add_(0, where, confidence)

    def compute(self) -> dict[str, Tensor]:
        """All metrics as fractions of 1.

        Returns:
            Scalars under "top1", "top5", "many", "medium", "few", "macro_f1" and "ece", and ``(K,)`` under "per_class".
            NaN where there was nothing to measure.
        """
        seen = self.total.sum()
        per_class = self.correct / self.total  # 0 / 0 is NaN: no test images
        f1 = 2 * self.correct / (self.total + self.predicted)
        result = {
            "top1": self.correct.sum() / seen,
            "top5": self.correct_top5 / seen,
            "macro_f1": f1[self.total > 0].mean(),
            "ece": (self.bin_correct - self.bin_confidence).abs().sum() / seen,
            "per_class": per_class,
        }
        for name in GROUPS:
            result[name] = per_class[self.groups[name]].nanmean()  # of nothing: NaN
        return result


def _rank(logits: Tensor, target: Tensor) -> Tensor:
    """How many classes come before the target, ``(N,)``: ties go to the lower class, as in argmax.

    Half precision ties often, and a network that predicts NaN must not be counted as right.
    """
    own = logits.gather(1, target[:, None])
    lower_class = torch.arange(logits.shape[1], device=logits.device)[None, :] < target[:, None]
    before = ~(logits <= own) | ((logits == own) & lower_class)
    return before.sum(dim=1)


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
