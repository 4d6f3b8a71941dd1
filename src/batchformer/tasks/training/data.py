"""The base of every task's data module: ranks, worker processes and samplers."""

import os
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

from batchformer.data.samplers import EpochSampler, EvalSampler


class TaskData(LightningDataModule):
    """Training, validation and test batches that depend on the seed and the epoch alone.

    A subclass reads its data in ``setup()``, after which ``counts`` and what its
    :class:`~batchformer.tasks.training.checkpoint.DataFacts` name are there, and gives loaders.

    Args:
        seed: Seed of order and augmentation.
        batch_size: Training samples of a batch, for each process.
        eval_batch_size: Samples of a batch in validation and test, for each process.
        num_workers: Worker processes that read files; ``None`` means one for each core, at most 8.
        drop_last: Whether training samples that fill no batch are left out; ``None`` means only if there is a full
            batch.

    Attributes:
        test_splits: Names of the splits that are tested, in the order of the test loaders. The first is ``test``; the
            metrics of another one are logged with its name, as ``test_unseen_AP``.
    """

    test_splits: list[str]

    def __init__(
        self,
        *,
        seed: int = 0,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        num_workers: int | None = None,
        drop_last: bool | None = None,
    ) -> None:
        super().__init__()
        self.seed, self.batch_size, self.eval_batch_size = seed, batch_size, eval_batch_size
        self.num_workers, self.drop_last = num_workers, drop_last
        self.test_splits = ["test"]

    def notes(self) -> list[str]:
        """Return sentences about the data for the run's record."""
        return []

    def ranks(self) -> tuple[int, int]:
        """Return the rank of this process and the number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def workers(self) -> int:
        """Return the number of worker processes that read files."""
        return min(8, os.cpu_count() or 1) if self.num_workers is None else self.num_workers

    def train_sampler(self, labels: Tensor | int, **more: Any) -> EpochSampler:
        """Return the order of the training samples of this process.

        Args:
            labels: Class index of each sample, (M,); or M, where classes do not matter to the order.
            **more: Further arguments of :class:`~batchformer.data.samplers.EpochSampler`.
        """
        if isinstance(labels, int):
            labels = torch.zeros(labels, dtype=torch.int64)
        rank, world = self.ranks()
        full = len(labels) >= self.batch_size * world
        return EpochSampler(
            labels,
            batch_size=self.batch_size,
            seed=self.seed,
            drop_last=full if self.drop_last is None else self.drop_last,
            rank=rank,
            world_size=world,
            **more,
        )

    def eval_sampler(self, count: int) -> EvalSampler:
        """Return the order of ``count`` samples of a validation or test split, this process's share."""
        rank, world = self.ranks()
        return EvalSampler(count, batch_size=self.eval_batch_size, rank=rank, world_size=world)
