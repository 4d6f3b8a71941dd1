"""Batches of images in memory (:class:`TensorLoader`), of image files (:class:`ImageLoader`), of anything else.

The first two give ``(images float32 (N, C, H, W), labels (N,))``, or ``([view 1, view 2], labels)`` with two
augmentations, or soft labels (N, K) with a :class:`~batchformer.data.transforms.Mix`. Both augment a batch by the same
functions with the same random numbers, so that it does not matter whether images fit into memory. The one exception is
a ``resized_crop``, which sees more of a file: see :class:`~batchformer.data.transforms.BatchAugment`.

A batch is a pure function of the seed, the epoch, its number and the rank, never of what ran before. Loaders know where
they are in an epoch (``state_dict``), so that a run that was saved in the middle of one, by a trainer of your own or by
a batch system's signal, goes on with the next batch; Lightning uses this by itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from .errors import DataError
from .images import decode
from .lists import Samples
from .samplers import EpochSampler, EvalSampler, derive_seed, generator
from .transforms import BatchAugment, Mix, cut_file, image_keep, normalize

Batch = tuple[Tensor | list[Tensor], Tensor]
_Augment = BatchAugment | Sequence[BatchAugment] | None


class _Loader:
    """Batches ``make(epoch, number, indices)`` in the order of a sampler, made here or in worker processes."""

    batch_sampler = None  # Lightning looks for one beside the sampler

    def __init__(
        self,
        make: Callable[[int, int, Tensor], Any],
        sampler: EpochSampler | EvalSampler,
        num_workers: int = 0,
        start_method: str | None = None,
    ) -> None:
        self.sampler = sampler
        self._position = {"epoch": 0, "batch": 0}
        self._resumed = False
        self._keys: list[tuple[int, int, list[int]]] = []
        self._batches: DataLoader[Any] = DataLoader(
            _Batches(make),
            batch_size=None,
            sampler=self._keys,
            num_workers=num_workers,
            collate_fn=_unchanged,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else every epoch would take a number from the global stream
            multiprocessing_context=start_method if num_workers > 0 else None,
        )

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.sampler.batch_size)

    def __iter__(self) -> Iterator[Any]:
        # A generator, so that the epoch is read at the first batch: trainers call iter() before set_epoch().
        epoch = self.sampler.epoch
        first = self._position["batch"] if self._resumed and self._position["epoch"] == epoch else 0
        self._resumed = False
        parts = torch.split(self.sampler.indices(epoch), self.sampler.batch_size)
        self._keys[:] = [(epoch, number, indices.tolist()) for number, indices in enumerate(parts)][first:]
        for done, batch in enumerate(self._batches, first + 1):
            self._position = {"epoch": epoch, "batch": done}
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches handed out so far."""
        return dict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on inside the saved epoch, once the sampler is set to it; any other epoch starts at its first batch."""
        self._position, self._resumed = {"epoch": int(state["epoch"]), "batch": int(state["batch"])}, True


class _Batches(Dataset[Any]):
    def __init__(self, make: Callable[[int, int, Tensor], Any]) -> None:
        self.make = make

    def __getitem__(self, key: tuple[int, int, list[int]]) -> Any:
        epoch, number, indices = key
        return self.make(epoch, number, torch.tensor(indices))


def _unchanged(batch: Any) -> Any:
    return batch


class KeyedLoader(_Loader):
    """Batches of the items ``dataset[epoch, index]`` in the order of a sampler.

    Args:
        dataset: Gives the same item for the same key in every process.
        sampler: Order, batch size, seed and rank.
        collate: Function of a list of items that returns a batch.
        num_workers: Worker processes; 0 loads in this process.
        start_method: Way to start worker processes (``"fork"``, ``"spawn"``, ``"forkserver"``); ``None`` is Python's
            default.

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
        super().__init__(partial(_collated, dataset, collate), sampler, num_workers, start_method)
        self.dataset = dataset


def _collated(dataset: Any, collate: Callable[[list[Any]], Any], epoch: int, number: int, indices: Tensor) -> Any:
    return collate([dataset[epoch, index] for index in indices.tolist()])


class _ImageBatches(_Loader):
    """Augmented uint8 views of images, normalised and mixed."""

    def __init__(
        self,
        read: "_Memory | _Files",
        sampler: EpochSampler | EvalSampler,
        mean: Sequence[float],
        std: Sequence[float],
        mix: Mix | None,
        num_workers: int = 0,
        start_method: str | None = None,
    ) -> None:
        if mix is not None and len(read.views) > 1:
            raise DataError("Expected one view with mixup or cutmix, got two. Switch one of them off.")
        super().__init__(read, sampler, num_workers, start_method)
        self.mean, self.std, self.mix = list(mean), list(std), mix

    def __iter__(self) -> Iterator[Batch]:
        for views, labels, mix_seed in super().__iter__():
            images = [normalize(view, self.mean, self.std) for view in views]
            if self.mix is not None:
                yield self.mix(images[0], labels, seed=mix_seed)
            else:
                yield (images[0] if len(images) == 1 else images), labels


class TensorLoader(_ImageBatches):
    """Batches of images that all lie in one uint8 tensor.

    Args:
        images: Pixels of all images, uint8, shape (M, C, H, W).
        labels: Class indices, shape (M,).
        sampler: Order, batch size, seed and rank.
        augment: One augmentation, or two for two views; ``None`` for evaluation.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, in 0..1.
        mix: Mixup or CutMix of the augmented images, giving soft labels (N, K).

    Raises:
        DataError: Shapes, types or lengths do not fit together, or there are two views together with ``mix``.

    Example:
        >>> images, labels = torch.zeros(10, 1, 8, 8, dtype=torch.uint8), torch.arange(10) % 2
        >>> loader = TensorLoader(images, labels, EpochSampler(labels, batch_size=4), BatchAugment(["flip"], 8))
        >>> [tuple(x.shape) for x, y in loader]
        [(4, 1, 8, 8), (4, 1, 8, 8), (2, 1, 8, 8)]
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        sampler: EpochSampler | EvalSampler,
        augment: _Augment = None,
        *,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        mix: Mix | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or len(images) != len(labels):
            raise DataError(
                f"Expected uint8 images (M, C, H, W) and M labels, got {images.dtype} {tuple(images.shape)} "
                f"and {len(labels)} labels."
            )
        channels = images.shape[1]
        if {len(mean), len(std)} - {1, channels}:
            raise DataError(f"Expected mean and std for {channels} channel(s), got {len(mean)} and {len(std)} numbers.")
        read = _Memory(_views(augment), sampler.seed, sampler.rank, labels, images)
        super().__init__(read, sampler, mean, std, mix)


class ImageLoader(_ImageBatches):
    """Batches of image files, decoded and augmented in worker processes.

    Args:
        samples: Files and labels.
        sampler: Order, batch size, seed and rank.
        augment: One augmentation, or two for two views; ``None`` for evaluation.
        size: Working size in pixels.
        channels: 1 or 3.
        mean: Mean of each channel, in 0..1.
        std: Standard deviation of each channel, in 0..1.
        num_workers: Worker processes; 0 decodes in this process.
        mix: Mixup or CutMix of the augmented images, giving soft labels (N, K).
        start_method: Way to start worker processes (``"fork"``, ``"spawn"``, ``"forkserver"``); ``None`` is Python's
            default.

    Raises:
        DataError: There are two views together with ``mix``.
    """

    def __init__(
        self,
        samples: Samples,
        sampler: EpochSampler | EvalSampler,
        augment: _Augment = None,
        *,
        size: int,
        channels: int = 3,
        mean: Sequence[float],
        std: Sequence[float],
        num_workers: int = 0,
        mix: Mix | None = None,
        start_method: str | None = None,
    ) -> None:
        read = _Files(_views(augment), sampler.seed, sampler.rank, samples.labels, samples, size, channels)
        super().__init__(read, sampler, mean, std, mix, num_workers, start_method)


@dataclass
class _Source:
    """Views (N, C, H, W) and labels of a batch, and the seed of its mixing."""

    views: list[BatchAugment]
    seed: int
    rank: int
    labels: Tensor

    def __call__(self, epoch: int, number: int, indices: Tensor) -> tuple[list[Tensor], Tensor, int]:
        *seeds, mix_seed = [
            derive_seed(self.seed, epoch, number, self.rank, view) for view in (*range(len(self.views)), -1)
        ]
        return self.augmented(indices, [generator(seed) for seed in seeds]), self.labels[indices], mix_seed

    def augmented(self, indices: Tensor, streams: list[torch.Generator]) -> list[Tensor]:
        raise NotImplementedError


@dataclass
class _Memory(_Source):
    images: Tensor

    def augmented(self, indices: Tensor, streams: list[torch.Generator]) -> list[Tensor]:
        plain = self.images.index_select(0, indices)
        return [view(plain, stream) for view, stream in zip(self.views, streams, strict=True)] or [plain]


@dataclass
class _Files(_Source):
    samples: Samples
    size: int
    channels: int

    def augmented(self, indices: Tensor, streams: list[torch.Generator]) -> list[Tensor]:
        windows = [view.windows(len(indices), stream) for view, stream in zip(self.views, streams, strict=True)]
        keep = image_keep([view.steps for view in self.views], self.size)
        needed = windows or [None]
        views: list[list[Tensor]] = [[] for _ in needed]
        for row, index in enumerate(indices.tolist()):
            image = decode(self.samples.root / self.samples.paths[index], self.channels)
            for view, window in zip(views, needed, strict=True):
                view.append(keep(image) if window is None else cut_file(image, window[row], self.size))
        plain = [torch.stack(view) for view in views]
        return [view.finish(x, stream) for view, x, stream in zip(self.views, plain, streams, strict=False)] or plain


def _views(augment: _Augment) -> list[BatchAugment]:
    if isinstance(augment, BatchAugment):
        return [augment]
    return list(augment or ())
