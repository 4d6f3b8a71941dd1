"""Momentum encoders and queues, for contrastive learning: copies that follow a network, and rows of earlier batches.

Axis letters: M rows, Q slots of a queue.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from batchformer.core.distributed import gather_rows

__all__ = ["MomentumEncoder", "RowQueue"]


class MomentumEncoder(nn.Sequential):
    """Copies of modules, run one after another, whose weights follow the originals by momentum.

    Parameters follow; buffers, such as the statistics of batch norm, are the copies' own.

    Source: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", CVPR 2020, eq. 2.

    Args:
        *online: Modules that are trained. They are copied, not held.

    Example:
        >>> online = nn.Linear(2, 1)
        >>> encoder = MomentumEncoder(online)
        >>> nn.init.zeros_(online.weight)
        Parameter containing:
        tensor([[0., 0.]], requires_grad=True)
        >>> encoder.follow(online, momentum=0.0)
        >>> encoder[0].weight
        Parameter containing:
        tensor([[0., 0.]])
    """

    def __init__(self, *online: nn.Module) -> None:
        super().__init__(*(copy.deepcopy(module) for module in online))
        self.requires_grad_(False)

    @torch.no_grad()
    def follow(self, *online: nn.Module, momentum: float) -> None:
        """Move the copies towards the originals: ``copy = momentum * copy + (1 - momentum) * original``.

        Args:
            *online: The originals, in the order of the constructor.
            momentum: Share of the copy that stays, in 0..1. A schedule gives another number at each step.

        Raises:
            ValueError: When the originals are not those of the constructor, or ``momentum`` is out of range.
        """
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"Expected 0 <= momentum <= 1, got {momentum}.")
        for source, target in zip(online, self, strict=True):
            for original, follower in zip(source.parameters(), target.parameters(), strict=True):
                follower.lerp_(original, 1.0 - momentum)

    @torch.no_grad()
    def forward(self, x: Any) -> Any:
        """Run the copies one after another, without gradient."""
        for module in self:
            x = module(x)
        return x


class RowQueue(nn.Module):
    """Rows of the last batches of all processes, in a ring of Q slots, with any number of columns.

    Args:
        **columns: Initial content of each column, (Q, ...): zeros and -1 where empty slots are to be told from full
            ones, random unit vectors in MoCo.

    Attributes:
        position: Next slot to be written, a scalar.

    Raises:
        ValueError: When there is no column or no slot, or the columns differ in length.

    Example:
        >>> queue = RowQueue(keys=torch.zeros(3, 2), targets=torch.full((3,), -1))
        >>> queue.push(keys=torch.ones(2, 2), targets=torch.tensor([5, 6]))
        >>> queue.column("targets"), int(queue.position)
        (tensor([ 5,  6, -1]), 2)
    """

    position: Tensor

    def __init__(self, **columns: Tensor) -> None:
        super().__init__()
        sizes = {len(column) for column in columns.values()}
        if len(sizes) != 1 or 0 in sizes:
            raise ValueError(f"Expected columns of one length of at least 1, got lengths {sorted(sizes) or 'of none'}.")
        (self.size,) = sizes
        self.columns = tuple(columns)
        for name, column in columns.items():
            self.register_buffer(name, column.clone())
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def column(self, name: str) -> Tensor:
        """Return the content of a column, (Q, ...); it changes in place with the next `push`."""
        content: Tensor = getattr(self, name)
        return content

    @torch.no_grad()
    def push(self, **rows: Tensor) -> None:
        """Write the rows of all processes, in the order of their ranks, over the oldest slots.

        Args:
            **rows: New rows of each column, (M, ...). M is the same in all columns and may differ between processes.

        Raises:
            ValueError: When the columns are not those of the queue.
        """
        if set(rows) != set(self.columns):
            raise ValueError(f"Expected rows of {', '.join(self.columns)}, got {', '.join(rows) or 'none'}.")
        gathered = {name: gather_rows(rows[name]) for name in self.columns}
        count = len(gathered[self.columns[0]])
        slots = (self.position + torch.arange(count, device=self.position.device)) % self.size
        end = self.position + count
        for name, new in gathered.items():
            content = self.column(name)
            # More rows than slots: the last ones stay. Writing all would leave the order of equal slots undefined.
            content.index_copy_(0, slots[-self.size :], new[-self.size :].to(content.dtype))
        self.position.copy_(end % self.size)
