"""Attention over the batch of all ranks, with exact gradients.

Each rank asks with its own samples and sees the samples of every rank. The backward pass returns to each sample the
gradient of *all* ranks' losses; keeping only the own part would be silently wrong. Batches may differ in size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class RankRows:
    """How the rows of a gathered batch are spread over the ranks.

    Attributes:
        rows: Samples on each rank, in rank order.
        rank: The own rank within the group.
        group: Process group; ``None`` is the default one.
    """

    rows: tuple[int, ...]
    rank: int
    group: dist.ProcessGroup | None = None

    @property
    def offset(self) -> int:
        """Place of the own first row in the gathered batch."""
        return sum(self.rows[: self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """Rows of every rank in rank order, (N, ...) -> (sum of rows, ...); differentiable in ``x``."""
        out: Tensor = _GatherRows.apply(x, self)
        return out


@torch.compiler.disable  # type: ignore[untyped-decorator]
def exchange_rows(x: Tensor, *, masked: bool = False, group: dist.ProcessGroup | None = None) -> RankRows | None:
    """Tell every rank how many samples the others hold.

    The one place where a compiled model leaves its graph: the numbers of the other ranks must be known here.

    Args:
        x: The own samples, (N, T, C).
        masked: Whether they come with a mask, which is gathered too: a rank without one would leave the others waiting.
        group: Process group; ``None`` is the default one.

    Returns:
        The sizes, or ``None`` where there is one process only.

    Raises:
        ValueError: On every rank alike, when any rank has no sample or the ranks differ in tokens, in channels or in
            having a mask.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return None
    own = torch.tensor([*x.shape, masked], dtype=torch.int64, device=x.device)
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    shapes = [tuple(shape.tolist()) for shape in every]
    if any(shape[0] == 0 for shape in shapes):
        raise ValueError(
            f"Expected at least one sample on every rank, got {[shape[0] for shape in shapes]} samples by rank. "
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
    return RankRows(tuple(shape[0] for shape in shapes), dist.get_rank(group), group)


class _GatherRows(torch.autograd.Function):
    """All-gather of uneven batches whose backward sums every rank's gradient of the own rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: RankRows) -> Tensor:
        ctx.sizes = sizes
        longest = max(sizes.rows)
        padded = x.new_zeros(longest, *x.shape[1:])
        padded[: x.shape[0]] = x
        parts = [torch.empty_like(padded) for _ in sizes.rows]
        dist.all_gather(parts, padded, group=sizes.group)
        return torch.cat([part[:rows] for part, rows in zip(parts, sizes.rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        sizes: RankRows = ctx.sizes
        total = grads[0].contiguous().clone()
        # A reduce-scatter would move less, but needs even sizes and is not there on every backend.
        dist.all_reduce(total, group=sizes.group)
        return total[sizes.offset : sizes.offset + sizes.rows[sizes.rank]], None
