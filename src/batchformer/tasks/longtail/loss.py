"""Losses of long-tailed recognition: pure functions of logits, targets and the training counts per class.

Axis letters: N samples (rows), K classes. RIDE's losses are in loss_ride.py, PaCo's in loss_paco.py.

``target`` is either class indices ``(N,)`` or, after mixup or cutmix, probabilities ``(N, K)``. ``counts`` is the
number of training images per class ``(K,)``; a class without images counts as one image in all losses, which keeps
every prior, margin and weight finite. Everything is computed in fp32 or better, whatever autocast is active.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "balanced_softmax",
    "class_balanced_weights",
    "cross_entropy",
    "ldam",
    "ldam_margins",
    "logit_adjusted",
]


def cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Compute cross-entropy, for class indices or soft targets, with optional class weights.

    With weights the mean is a weighted one: the sum of the weighted losses over the sum of the weights of the targets.
    For class indices this is torch's definition; soft targets follow the same rule (torch divides them by N instead),
    so that a one-hot matrix and its indices give the same number.

    Args:
        logits: Logits ``(N, K)``.
        target: Class indices ``(N,)`` or probabilities ``(N, K)``.
        weight: Class weights ``(K,)``, for example from `class_balanced_weights`.
        label_smoothing: Share of the target spread evenly over the classes, 0 to 1.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> cross_entropy(torch.zeros(4, 10), torch.tensor([0, 3, 5, 9]))
        tensor(2.3026)
    """
    logits, target = check_rows(logits, target)
    if weight is None:
        return F.cross_entropy(logits, target, label_smoothing=label_smoothing)
    weight = check_counts(weight, logits, "weight").to(logits.dtype)
    total = F.cross_entropy(logits, target, weight=weight, reduction="sum", label_smoothing=label_smoothing)
    # A product and a sum, not a matmul: autocast would take that to half precision.
    return total / (weight[target] if target.ndim == 1 else target * weight).sum()


def balanced_softmax(logits: Tensor, target: Tensor, counts: Tensor, *, weight: Tensor | None = None) -> Tensor:
    """Compute Balanced Softmax: cross-entropy of ``logits + log(counts)``.

    Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, eq. 3.

    Args:
        logits: Logits ``(N, K)``.
        target: Class indices ``(N,)`` or probabilities ``(N, K)``.
        counts: Training images of each class ``(K,)``.
        weight: Class weights ``(K,)``; ``None`` for none.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> balanced_softmax(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([3, 1]))  # -log(1 / 4)
        tensor(1.3863)
    """
    return logit_adjusted(logits, target, counts, tau=1.0, weight=weight)


def logit_adjusted(
    logits: Tensor, target: Tensor, counts: Tensor, *, tau: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    """Compute cross-entropy of ``logits + tau * log(prior)``, the logit-adjusted loss (``tau=1``: Balanced Softmax).

    Source: Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10.

    Args:
        logits: Logits ``(N, K)``.
        target: Class indices ``(N,)`` or probabilities ``(N, K)``.
        counts: Training images of each class ``(K,)``.
        tau: Strength of the adjustment; 0 is plain cross-entropy.
        weight: Class weights ``(K,)``; ``None`` for none.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> logit_adjusted(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([3, 1]), tau=0.0)
        tensor(0.6931)
    """
    logits, target = check_rows(logits, target)
    return cross_entropy(logits + tau * log_prior(counts, logits), target, weight=weight)


def class_balanced_weights(counts: Tensor, beta: float = 0.9999) -> Tensor:
    """Compute class weights by effective number, ``(1 - beta) / (1 - beta ** n)``, scaled to sum to K.

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, eq. 2 and section 4.

    Args:
        counts: Training images of each class ``(K,)``.
        beta: Parameter in [0, 1): 0 weighs all classes alike, towards 1 the weights approach the inverse counts.

    Returns:
        Weights ``(K,)``, fp32.

    Raises:
        ValueError: If ``beta`` is out of range or ``counts`` is not a vector.

    Example:
        >>> class_balanced_weights(torch.tensor([1000, 10]), beta=0.0)
        tensor([1., 1.])
    """
    if not 0.0 <= beta < 1.0:
        raise ValueError(f"Expected 0 <= beta < 1, got {beta}. Values near 1, such as 0.9999, reweight most.")
    images = at_least_one(counts).double()
    # 1 - beta**n loses its digits for beta near 1; expm1 keeps them.
    effective = -torch.expm1(images * math.log(beta)) if beta > 0 else torch.ones_like(images)
    weights = 1.0 / effective
    return (weights / weights.sum() * len(weights)).float()


def ldam_margins(counts: Tensor, max_margin: float = 0.5) -> Tensor:
    """Compute the margins of LDAM, proportional to ``counts ** -1/4``, the largest equal to ``max_margin``.

    Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, eq. 11.

    Args:
        counts: Training images of each class ``(K,)``.
        max_margin: Margin of the rarest class, in units of the unscaled (cosine) logit.

    Returns:
        Margins ``(K,)``, fp32.

    Raises:
        ValueError: If ``counts`` is not a vector.

    Example:
        >>> ldam_margins(torch.tensor([16, 1]))
        tensor([0.2500, 0.5000])
    """
    margins = at_least_one(counts).float().pow(-0.25)
    return margins * (max_margin / margins.max())


def ldam(
    logits: Tensor,
    target: Tensor,
    counts: Tensor,
    *,
    max_margin: float = 0.5,
    scale: float = 30.0,
    weight: Tensor | None = None,
) -> Tensor:
    """Compute LDAM: cross-entropy after ``scale * margin`` is taken off the logit of the target class.

    The logits are expected to be scaled already (`CosineClassifier` multiplies by 30); ``scale`` brings the margins to
    the same units. Deferred reweighting (DRW) passes ``weight=class_balanced_weights(counts)`` from some epoch on;
    `build_loss("ldam", reweight_epoch=...)` does that. A soft target takes its share of each class's margin.

    Source: Cao et al., NeurIPS 2019, eq. 12 and algorithm 1.

    Args:
        logits: Cosine logits times ``scale``, ``(N, K)``.
        target: Class indices ``(N,)`` or probabilities ``(N, K)``.
        counts: Training images of each class ``(K,)``.
        max_margin: Margin of the rarest class.
        scale: Factor that the logits carry.
        weight: Class weights ``(K,)``; ``None`` for none.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> ldam(torch.zeros(1, 2), torch.tensor([1]), torch.tensor([16, 1]), scale=1.0)  # -log_softmax([0, -.5])[1]
        tensor(0.9741)
    """
    logits, target = check_rows(logits, target)
    margins = ldam_margins(check_counts(counts, logits), max_margin).to(logits.dtype)
    share = target if target.ndim == 2 else F.one_hot(target, logits.shape[1])
    return cross_entropy(logits - scale * margins * share, target, weight=weight)


def log_prior(counts: Tensor, logits: Tensor) -> Tensor:
    """Compute the logarithm of each class's share of the training images, in the dtype and device of ``logits``."""
    images = at_least_one(check_counts(counts, logits)).to(logits.dtype)
    return (images / images.sum()).log()


def at_least_fp32(x: Tensor) -> Tensor:
    """Raise half precision to fp32; return fp32 and fp64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def at_least_one(counts: Tensor) -> Tensor:
    """Count a class without images as one image, which keeps logarithms and inverses finite."""
    if counts.ndim != 1:
        raise ValueError(f"Expected counts of shape (K,), one number of images per class, got {tuple(counts.shape)}.")
    return counts.clamp_min(1)


def check_counts(counts: Tensor, logits: Tensor, name: str = "counts") -> Tensor:
    """Return one number for each class on the device of ``logits``, or raise an error that names both shapes."""
    if counts.shape != logits.shape[-1:]:
        raise ValueError(
            f"Expected {name} of shape ({logits.shape[-1]},) for logits {tuple(logits.shape)}, got "
            f"{tuple(counts.shape)}. Give one number per class of the classifier."
        )
    return counts.to(logits.device)


def check_rows(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits in fp32 or better and the target with them, or raise an error that names both shapes."""
    if logits.ndim != 2:
        raise ValueError(
            f"Expected logits of shape (N, K), got {tuple(logits.shape)}. Logits of several experts go to ride(), or "
            "average them over dim 1."
        )
    if target.shape not in ((logits.shape[0],), tuple(logits.shape)):
        raise ValueError(
            f"Expected target of shape ({logits.shape[0]},) or {tuple(logits.shape)}, got {tuple(target.shape)}. With "
            "BatchFormer inserted the rows double in training: use handle.expand(target), or handle.split(logits)."
        )
    logits = at_least_fp32(logits)
    return logits, target.to(logits.dtype) if target.ndim == 2 else target
