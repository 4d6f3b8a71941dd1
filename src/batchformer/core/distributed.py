"""Attention over the batch of all ranks, with exact gradients.

The queries of a rank are its own samples; the keys and values are the samples of every rank. The backward pass returns
to each sample the gradient of the losses of *all* ranks: a gather that keeps the own rank's gradient alone gives wrong
gradients without any error. Batches may differ in size between ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class RankRows:
    """Distribution of the rows of a gathered batch over the ranks.

    Attributes:
        rows: Number of samples on each rank, in rank order.
        rank: Number of the own rank.
    """

    rows: tuple[int, ...]
    rank: int

    @property
    def offset(self) -> int:
        """Index of the own first row in the gathered batch."""
        return sum(self.rows[: self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """Gather the rows of every rank in rank order, (N, ...) -> (sum of rows, ...); differentiable in ``x``."""
        out: Tensor = _GatherRows.apply(x, self)
        return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def exchange_rows(x: Tensor, *, masked: bool = False) -> RankRows | None:
    """Tell every rank how many samples the other ranks hold.

    A compiled model leaves its graph here and nowhere else, as the numbers of the other ranks must be known.

    Args:
        x: Samples of the own rank, (N, T, C).
        masked: True if the samples come with a mask. The mask is gathered too, so a rank without one would make the
            others wait forever.

    Returns:
        The numbers of samples, or ``None`` with a single process.

    Raises:
        ValueError: On every rank alike, if any rank has no sample, or if the ranks differ in tokens, in channels or in
            having a mask.
    """
    if _world_size() == 1:
        return None
    shapes = _exchange_numbers(torch.tensor([*x.shape, masked], device=x.device))
    rows = tuple(shape[0] for shape in shapes)
    if 0 in rows:
        raise ValueError(
            f"Expected at least one sample on every rank, got {list(rows)} samples by rank. "
            "Drop the last incomplete batch (drop_last=True) or use gather='none'."
        )
    if len({shape[3] for shape in shapes}) > 1:
        raise ValueError(
            f"Expected a mask on every rank or on none for gather='all', got {[bool(s[3]) for s in shapes]} by rank. "
            "Pass a mask of False where nothing is padded."
        )
    if len({shape[1:3] for shape in shapes}) > 1:
        raise ValueError(
            f"Expected the same tokens and channels on every rank for gather='all', got {[s[1:3] for s in shapes]} by "
            "rank. Pad to one size, or use gather='none'."
        )
    return RankRows(rows, dist.get_rank())


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows of all processes in rank order, equal on every rank and without gradient.

    Args:
        rows: Rows of the own rank, (n, ...); n may differ between ranks and may be 0.

    Returns:
        All rows, (sum of n, ...); ``rows`` itself with a single process.

    Example:
        >>> gather_rows(torch.tensor([1, 2]))
        tensor([1, 2])
    """
    if _world_size() == 1:
        return rows
    return _gather_padded(rows, [n for (n,) in _exchange_numbers(torch.tensor([len(rows)], device=rows.device))])


class _GatherRows(torch.autograd.Function):
    """All-gather of uneven batches; its backward pass sums every rank's gradient of the own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: RankRows) -> Tensor:
        ctx.sizes = sizes
        return _gather_padded(x, sizes.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        sizes: RankRows = ctx.sizes
        total = grads[0].contiguous().clone()
        # A reduce-scatter would move less data, but it needs even sizes and not every backend has it.
        dist.all_reduce(total)
        return total[sizes.offset : sizes.offset + sizes.rows[sizes.rank]], None


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _exchange_numbers(own: Tensor) -> list[tuple[int, ...]]:
    every = [torch.empty_like(own) for _ in range(_world_size())]
    dist.all_gather(every, own)
    return [tuple(numbers.tolist()) for numbers in every]


def _gather_padded(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Gather by padding every rank's rows to the longest rank, as all_gather takes equal shapes only."""
    padded = x.new_zeros(max(counts), *x.shape[1:])
    padded[: x.shape[0]] = x
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
