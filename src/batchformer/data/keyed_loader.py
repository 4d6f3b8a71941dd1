"""Batches of a dataset whose items are a pure function of (epoch, index): detection and panoptic training.

As with the other loaders (:mod:`batchformer.data.loader`), what a batch holds follows from seed and epoch alone, and a
run that stopped inside an epoch goes on with the next batch.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from .loader import _Keys, _Loader
from .samplers import EpochSampler, EvalSampler


class KeyedLoader(_Loader):
    """Items ``dataset[epoch, index]`` in the order of a sampler, collated.

    Args:
        dataset: Its items are the same in whatever process.
        sampler: Order, batch size, seed and rank.
        collate: List of items to batch.
        num_workers: Processes; 0 loads in this one.
        start_method: How worker processes start; ``None`` for Python's default.

    Example:
        >>> class Squares(Dataset):
        ...     def __getitem__(self, key):
        ...         return key[1] ** 2
        >>> loader = KeyedLoader(Squares(), EvalSampler(5, batch_size=2), collate=list)
        >>> list(loader)
        [[0, 1], [4, 9], [16]]
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: EpochSampler | EvalSampler,
        collate: Callable[[list[Any]], Any],
        *,
        num_workers: int = 0,
        start_method: str | None = None,
    ) -> None:
        super().__init__(sampler, (), ())
        self.dataset = dataset
        self._keys = _Keys()
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._keys,
            num_workers=num_workers,
            collate_fn=collate,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else every epoch would take a number from the global stream
            multiprocessing_context=start_method if num_workers > 0 else None,
        )

    def _batches(self, epoch: int, first: int) -> Iterator[Any]:
        self._keys.batches = [[(epoch, i) for i in rows.tolist()] for _, rows in self._split(epoch, first)]
        yield from self._loader
