"""Metrics of image classification, accumulated as sums so that they add up over batches and processes.

Axis letters: N samples, K classes, B calibration bins.
"""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["ClassificationMetrics"]


class ClassificationMetrics(Metric):
    """Top-1 and top-5 accuracy, accuracy of each class, macro F1 and expected calibration error.

    A class without test images has no accuracy: its entry in ``per_class`` is NaN and the means leave it out.
    ``macro_f1`` is the mean of F1 over the classes with test images; ``ece`` is the expected calibration error of the
    softmax's largest probability (Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, eq. 3).

    Of equal logits the lowest class counts as the prediction, in top-1 and top-5 alike, and a NaN is never right.
    torchmetrics' own classes answer both otherwise, and its calibration error keeps the confidence of every sample.

    Args:
        num_classes: K.
        bins: B, calibration bins of equal width.
        **kwargs: Passed to `torchmetrics.Metric`.

    Example:
        >>> metrics = ClassificationMetrics(3)
        >>> metrics.update(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 1, 1]))
        >>> metrics.compute()["per_class"]
        tensor([1.0000, 0.5000,    nan])
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

    def __init__(self, num_classes: int, *, bins: int = 15, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes, self.bins = num_classes, bins
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
        """Compute all metrics as fractions of 1.

        Returns:
            Scalars under "top1", "top5", "macro_f1" and "ece", and ``(K,)`` under "per_class". NaN where there was
            nothing to measure.
        """
        seen = self.total.sum()
        f1 = 2 * self.correct / (self.total + self.predicted)
        return {
            "top1": self.correct.sum() / seen,
            "top5": self.correct_top5 / seen,
            "macro_f1": f1[self.total > 0].mean(),
            "ece": (self.bin_correct - self.bin_confidence).abs().sum() / seen,
            "per_class": self.correct / self.total,  # 0 / 0 is NaN: no test images
        }


def _rank(logits: Tensor, target: Tensor) -> Tensor:
    """Count the classes before the target, ``(N,)``: of equal logits the lower class comes first, as in argmax.

    Half precision ties often, and a network that predicts NaN must not be counted as right.
    """
    own = logits.gather(1, target[:, None])
    lower_class = torch.arange(logits.shape[1], device=logits.device)[None, :] < target[:, None]
    before = ~(logits <= own) | ((logits == own) & lower_class)
    return before.sum(dim=1)
