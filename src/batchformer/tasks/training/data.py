"""The base of every task's data module: ranks, worker processes and samplers."""

import os
from collections.abc import Mapping, Sequence
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

    def fingerprints(self) -> dict[str, str]:
        """Return a fingerprint of each split, a short text that changes with its content: files, labels, boxes, order.

        It does not depend on the place of the data and on the way in which it is read. Runs on data with other
        fingerprints are neither resumed nor compared. It may be asked for before ``setup()``; ``prepare_data()`` was
        called. Without fingerprints, as here, data is known by its classes and their counts alone.
        """
        return {}

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


def changed_splits(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return the splits whose fingerprints differ; none where one side has no fingerprints.

    Example:
        >>> changed_splits({"train": "1f", "test": "2e"}, {"train": "1f", "test": "3d"}), changed_splits({}, {"a": "0"})
        (['test'], [])
    """
    if not before or not now:
        return []
    return [name for name in {**before, **now} if before.get(name) != now.get(name)]


def in_words(splits: Sequence[str]) -> str:
    """Return changed splits as the beginning of a sentence's part.

    Example:
        >>> in_words(["train"]), in_words(["train", "test"])
        ('its split train has changed', 'its splits train and test have changed')
    """
    if len(splits) == 1:
        return f"its split {splits[0]} has changed"
    return f"its splits {', '.join(splits[:-1])} and {splits[-1]} have changed"
