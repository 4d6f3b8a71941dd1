"""Losses of RIDE: of the experts, of distillation from a larger ensemble, and of the routers.

Axis letters: N samples (rows), E experts, K classes. Dtypes, soft targets and counts of zero as in loss.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss import at_least_fp32, at_least_one, ldam

__all__ = ["distillation", "diversity_temperature", "ride", "routing"]


def diversity_temperature(counts: Tensor, factor: float = 0.05) -> Tensor:
    """Compute the temperatures of RIDE's diversity term, ``K * n / sum(n) * factor + 1 - factor`` over its maximum.

    Source: Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", ICLR 2021, section 3
    (the normalisation by the maximum is the published code's).

    Args:
        counts: Training images of each class ``(K,)``.
        factor: Number in [0, 1); 0 gives temperature 1 for all. Published: .02 ImageNet-LT, .015 iNaturalist 2018,
            .05 CIFAR-100-LT.

    Returns:
        Temperatures ``(K,)`` in (0, 1], fp32.

    Raises:
        ValueError: If ``factor`` is out of range or ``counts`` is not a vector.

    Example:
        >>> diversity_temperature(torch.tensor([30, 10]), factor=0.5)
        tensor([1.0000, 0.6000])
    """
    if not 0.0 <= factor < 1.0:
        raise ValueError(f"Expected 0 <= factor < 1, got {factor}. Published values lie between 0.015 and 0.05.")
    images = at_least_one(counts).float()
    temperature = len(images) * images / images.sum() * factor + 1.0 - factor
    return temperature / temperature.max()


def ride(
    logits: Tensor,
    target: Tensor,
    counts: Tensor,
    *,
    diversity: float = -0.2,
    temperature: Tensor | float = 1.0,
    weight: Tensor | None = None,
    max_margin: float = 0.5,
    scale: float = 30.0,
) -> Tensor:
    """Compute RIDE's loss: LDAM and a diversity term for each expert, summed over the experts.

    ``sum_e [ ldam(z_e, y) + diversity * T**2 * KL(softmax(mean / T) || softmax(z_e / T)) ]``, with the mean over the
    experts not carrying gradient and ``T**2`` the square of the mean temperature. ``diversity < 0`` drives the
    experts apart. From the reweighting epoch on, ``weight`` and ``temperature`` are per class.

    Source: Wang et al., ICLR 2021, eq. 3 and 4, with the KL against the mean as in the published code.

    Args:
        logits: Cosine logits times ``scale``, ``(N, E, K)``.
        target: Class indices ``(N,)`` or probabilities ``(N, K)``.
        counts: Training images of each class ``(K,)``.
        diversity: Weight of the diversity term; -0.2 for ImageNet-LT and iNaturalist, -0.45 for CIFAR-100-LT.
        temperature: One number, or one for each class ``(K,)`` from `diversity_temperature`.
        weight: Class weights ``(K,)`` from `class_balanced_weights`; ``None`` for none.
        max_margin: Largest margin of LDAM.
        scale: Factor that the logits carry.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> logits = torch.zeros(2, 3, 4)  # three experts that agree: no diversity term
        >>> ride(logits, torch.tensor([0, 1]), torch.ones(4), max_margin=0.0)  # 3 * log(4)
        tensor(4.1589)
    """
    if logits.ndim != 3:
        raise ValueError(
            f"Expected logits of shape (N, experts, K), got {tuple(logits.shape)}. RIDE needs a network with several "
            "experts: build_model(..., experts=3)."
        )
    logits = at_least_fp32(logits)
    tempered = logits / torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    mean = tempered.mean(dim=1).detach().log_softmax(dim=-1)
    mean_temperature = temperature.to(logits.dtype).mean() if isinstance(temperature, Tensor) else temperature
    loss = logits.new_zeros(())
    for expert in range(logits.shape[1]):
        loss = loss + ldam(logits[:, expert], target, counts, max_margin=max_margin, scale=scale, weight=weight)
        divergence = _divergence(mean, tempered[:, expert].log_softmax(dim=-1))
        loss = loss + diversity * mean_temperature**2 * divergence
    return loss


def distillation(student: Tensor, teacher: Tensor, *, temperature: float = 1.5) -> Tensor:
    """Compute RIDE's self-distillation, ``T**2 * KL(softmax(teacher / T) || softmax(student / T))`` of the means.

    Source: Wang et al., ICLR 2021, section 3 (a model with more experts teaches one with fewer); Hinton et al. 2015.

    Args:
        student: Logits ``(N, K)`` or ``(N, E, K)``; experts are averaged.
        teacher: Logits ``(N, K)`` or ``(N, E', K)``; experts are averaged, no gradient flows.
        temperature: T, published 1.5.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the averaged shapes differ, as when the student's rows were doubled and the teacher's were not.

    Example:
        >>> logits = torch.randn(2, 5)
        >>> float(distillation(logits, logits))
        0.0
    """
    student, teacher = (_mean_of_experts(at_least_fp32(x)) for x in (student, teacher))
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected student and teacher logits of one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}. "
            "The teacher's rows are not doubled: call this once for each stream."
        )
    teacher = (teacher.detach() / temperature).log_softmax(dim=-1)
    return temperature**2 * _divergence(teacher, (student / temperature).log_softmax(dim=-1))


def routing(help_logits: Tensor, logits: Tensor, target: Tensor, *, pos_weight: float = 100.0) -> Tensor:
    """Compute the loss of RIDE's expert assignment: a router asks for the next expert where it would help.

    Router ``i`` has the label 1 where the mean of the first ``i + 1`` experts is wrong and the mean of some longer row
    of experts is right. Binary cross-entropy, averaged over samples and routers.

    Source: Wang et al., ICLR 2021, eq. 5 and 6.

    Args:
        help_logits: Logits of asking the next expert ``(N, E - 1)``, from `RoutedExperts` in training.
        logits: Logits ``(N, E, K)`` of the (frozen) experts.
        target: Class indices ``(N,)``.
        pos_weight: Weight of the label 1; published 100.

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the shapes do not fit.

    Example:
        >>> logits = torch.tensor([[[0.0, 1.0], [5.0, 0.0]]])  # the first expert errs, both together do not
        >>> routing(torch.zeros(1, 1), logits, torch.tensor([0]), pos_weight=1.0)
        tensor(0.6931)
    """
    samples, experts, _ = logits.shape
    if help_logits.shape != (samples, experts - 1):
        raise ValueError(f"Expected help_logits of shape {(samples, experts - 1)}, got {tuple(help_logits.shape)}.")
    help_logits = at_least_fp32(help_logits)
    # argmax of the running sum and of the running mean agree.
    correct = at_least_fp32(logits).cumsum(dim=1).argmax(dim=-1) == target[:, None]
    later = correct.flip(1).cummax(dim=1).values.flip(1)[:, 1:]
    wanted = (~correct[:, :-1] & later).to(help_logits.dtype)
    return F.binary_cross_entropy_with_logits(help_logits, wanted, pos_weight=help_logits.new_tensor(pos_weight))


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Compute KL(p || q), summed over classes, averaged over samples."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _mean_of_experts(logits: Tensor) -> Tensor:
    return logits.mean(dim=1) if logits.ndim == 3 else logits
