"""Parametric contrastive loss of PaCo.

Axis letters: A anchors (query rows), K classes, M contrast keys, D embedding width. Dtypes and counts as in loss.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .loss import check_rows, log_prior

__all__ = ["paco"]


def paco(
    logits: Tensor,
    queries: Tensor,
    target: Tensor,
    keys: Tensor,
    key_target: Tensor,
    counts: Tensor,
    *,
    alpha: float = 0.05,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 0.2,
) -> Tensor:
    """Compute the parametric contrastive loss (PaCo).

    Each anchor is compared with the K class centers (its logits plus the log prior), the other queries and the keys.
    The loss is the mean of ``-log softmax`` over the positives, the own center weighted ``beta`` and every query or key
    of the same class ``alpha``; ``gamma`` weighs queries and keys in the softmax's denominator.

    With BatchFormer the anchors of one call may be N (one stream at a time) or 2N (both at once; then the two versions
    of a sample are positives of each other). The keys are those of the plain key encoder either way.

    Source: Cui et al., "Parametric Contrastive Learning", ICCV 2021, eq. 4 to 6.

    Args:
        logits: Logits ``(A, K)`` of the linear classifier (the learnable centers).
        queries: Embeddings of unit length ``(A, D)``.
        target: Class indices ``(A,)``.
        keys: Embeddings of unit length ``(M, D)``: the keys of this batch and those of the queue; no gradient.
        key_target: Class indices of the keys ``(M,)``; -1 marks an empty slot of the queue, which is left out.
        counts: Training images of each class ``(K,)``.
        alpha: Weight of positive queries and keys.
        beta: Weight of the positive center.
        gamma: Weight of queries and keys in the denominator.
        temperature: Divisor of the cosine similarities (not of the logits).

    Returns:
        The loss, a scalar.

    Raises:
        ValueError: If the shapes do not fit or ``target`` holds no class indices.

    Example:
        >>> unit = torch.nn.functional.normalize(torch.ones(1, 2), dim=1)
        >>> paco(torch.zeros(1, 3), unit, torch.tensor([0]), unit, torch.tensor([-1]), torch.ones(3))  # log(3)
        tensor(1.0986)
    """
    if target.ndim != 1 or key_target.ndim != 1:
        raise ValueError(
            f"Expected class indices of shape (anchors,) and (keys,), got {tuple(target.shape)} and "
            f"{tuple(key_target.shape)}. PaCo's positives need classes: switch mixup and cutmix off."
        )
    logits, target = check_rows(logits, target)
    if queries.shape[0] != len(target) or keys.shape != (len(key_target), queries.shape[1]):
        raise ValueError(
            f"Expected queries ({len(target)}, D) and keys ({len(key_target)}, D), got {tuple(queries.shape)} and "
            f"{tuple(keys.shape)}."
        )
    with torch.autocast(logits.device.type, enabled=False):
        queries = queries.to(logits.dtype)
        contrast = torch.cat([queries, keys.detach().to(logits.dtype)])
        similarity = queries @ contrast.T / temperature
    contrast_target = torch.cat([target, key_target])
    present = (contrast_target >= 0)[None, :] & ~_diagonal(similarity)
    centers = logits + log_prior(counts, logits)
    # log(gamma) inside the exponent: gamma = 0 then removes the contrast columns without a 0 * inf.
    log_gamma = math.log(gamma) if gamma > 0 else -math.inf
    columns = torch.cat([centers, (similarity + log_gamma).masked_fill(~present, -math.inf)], dim=1)
    denominator = columns.logsumexp(dim=1, keepdim=True)
    own_center = beta * F.one_hot(target, logits.shape[1]).to(logits.dtype)
    same_class = alpha * ((target[:, None] == contrast_target[None, :]) & present).to(logits.dtype)
    positive = torch.cat([own_center, same_class], dim=1)
    log_probability = torch.cat([centers, similarity], dim=1) - denominator
    total = positive.sum(dim=1).clamp_min(torch.finfo(logits.dtype).tiny)
    return -((positive * log_probability).sum(dim=1) / total).mean()


def _diagonal(matrix: Tensor) -> Tensor:
    """Return a boolean ``(A, M)`` whose main diagonal is true: each anchor against itself."""
    rows, columns = (torch.arange(size, device=matrix.device) for size in matrix.shape)
    return rows[:, None] == columns[None, :]
