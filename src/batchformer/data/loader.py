"""Batches: from images in memory (:class:`TensorLoader`) or from image files (:class:`ImageLoader`).

Both give ``(images float32 (N, C, H, W), labels (N,))``, or ``([view 1, view 2], labels)`` with two augmentations,
or soft labels (N, K) with a :class:`~batchformer.data.transforms.Mix`. All randomness is a pure function of the
seed, the epoch and the batch (in memory) or the image (files), never of what ran before. Both know where they are
(``state_dict``), so a run that stopped inside an epoch goes on with the next batch; trainers such as Lightning use
that by themselves.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from .errors import DataError
from .images import decode
from .lists import Samples
from .samplers import EpochSampler, EvalSampler, derive_seed, generator
from .transforms import BatchAugment, Mix, normalize, seeded

Batch = tuple[Tensor | list[Tensor], Tensor]


class _Loader:
    """Where an epoch stands. Sub-classes yield the batches of an epoch from a given one on."""

    sampler: EpochSampler | EvalSampler
    batch_sampler = None  # Lightning looks for one beside the sampler

    def __init__(self, sampler: EpochSampler | EvalSampler, mean: Sequence[float], std: Sequence[float]) -> None:
        self.sampler, self.mean, self.std = sampler, list(mean), list(std)
        self._position = {"epoch": 0, "batch": 0}
        self._resume: dict[str, int] | None = None

    def __len__(self) -> int:
        return -(-len(self.sampler) // self.sampler.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        # A generator on purpose: the epoch is read at the first batch. Trainers call iter() before set_epoch().
        epoch, resume = self.sampler.epoch, self._resume
        self._resume = None
        first = resume["batch"] if resume and resume["epoch"] == epoch else 0
        for number, batch in enumerate(self._batches(epoch, first), first):
            self._position = {"epoch": epoch, "batch": number + 1}
            yield batch

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and the number of its batches handed out so far."""
        return dict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on inside the saved epoch, once the sampler is set to it; any other epoch starts at its first batch."""
        self._resume = {"epoch": int(state["epoch"]), "batch": int(state["batch"])}
        self._position = dict(self._resume)

    def _seed(self, epoch: int, batch: int, view: int = 0) -> int:
        return derive_seed(self.sampler.seed, epoch, batch, self.sampler.rank, view)

    def _split(self, epoch: int, first: int) -> Iterator[tuple[int, Tensor]]:
        for number, rows in enumerate(torch.split(self.sampler.indices(epoch), self.sampler.batch_size)):
            if number >= first:
                yield number, rows


class TensorLoader(_Loader):
    """Batches from images that all lie in one uint8 tensor, augmented batch by batch.

    Args:
        images: uint8, shape (M, C, H, W).
        labels: Class indices, shape (M,).
        sampler: Order, batch size, seed and rank.
        augment: One augmentation, or two for two views; ``None`` for evaluation.
        mean: Per channel, in 0..1.
        std: Per channel, in 0..1.
        mix: Mixup or CutMix on top, giving soft labels (N, K).

    Raises:
        DataError: Shapes, types or lengths do not fit together.

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
        augment: BatchAugment | Sequence[BatchAugment] | None = None,
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
        super().__init__(sampler, mean, std)
        self.images, self.labels, self.mix = images, labels, mix
        self.views = _views(augment, mix)

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        for number, rows in self._split(epoch, first):
            plain, labels = self.images.index_select(0, rows), self.labels[rows]
            images = [
                normalize(augment(plain, generator(self._seed(epoch, number, view))), self.mean, self.std)
                for view, augment in enumerate(self.views)
            ] or [normalize(plain, self.mean, self.std)]
            yield _finish(images, labels, self.mix, self._seed(epoch, number, -1))


class ImageDataset(Dataset[tuple[list[Tensor], int]]):
    """Image files decoded one by one; item ``(epoch, index)`` is always the same tensor, in whatever process.

    Args:
        samples: Files and labels.
        transforms: One pipeline per view: Pillow image in, uint8 (C, H, W) out.
        channels: 1 or 3.
        seed: Seed of the augmentation.
    """

    def __init__(
        self,
        samples: Samples,
        transforms: Sequence[Callable[[Image.Image], Tensor]],
        *,
        channels: int = 3,
        seed: int = 0,
    ) -> None:
        self.root: Path = samples.root
        self.paths, self.labels = samples.paths, samples.labels
        self.transforms, self.channels, self.seed = list(transforms), channels, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> tuple[list[Tensor], int]:
        epoch, index = key
        image = decode(self.root / self.paths[index], self.channels)
        views = []
        for view, transform in enumerate(self.transforms):
            with seeded(self.seed, epoch, index, view):
                views.append(transform(image))
        return views, int(self.labels[index])


class ImageLoader(_Loader):
    """Batches from image files, decoded and augmented in worker processes.

    Args:
        dataset: The files.
        sampler: Order, batch size, seed and rank.
        mean: Per channel, in 0..1.
        std: Per channel, in 0..1.
        num_workers: Processes; 0 decodes in this one.
        mix: Mixup or CutMix on top, giving soft labels (N, K).
        start_method: How worker processes start: ``"fork"``, ``"spawn"``, ``"forkserver"``, or ``None`` for
            Python's default.

    Raises:
        DataError: Two views together with ``mix``.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        sampler: EpochSampler | EvalSampler,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        num_workers: int = 0,
        mix: Mix | None = None,
        start_method: str | None = None,
    ) -> None:
        super().__init__(sampler, mean, std)
        if mix is not None and len(dataset.transforms) > 1:
            raise DataError("Expected one view with mixup or cutmix, got two. Switch one of them off.")
        self.dataset, self.mix = dataset, mix
        self._keys = _Keys()
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._keys,
            num_workers=num_workers,
            collate_fn=default_collate,
            persistent_workers=num_workers > 0,
            generator=torch.Generator(),  # else every epoch would take a number from the global stream
            multiprocessing_context=start_method if num_workers > 0 else None,
        )

    def _batches(self, epoch: int, first: int) -> Iterator[Batch]:
        self._keys.batches = [[(epoch, i) for i in rows.tolist()] for _, rows in self._split(epoch, first)]
        for number, (views, labels) in enumerate(self._loader, first):
            images = [normalize(view, self.mean, self.std) for view in views]
            yield _finish(images, labels, self.mix, self._seed(epoch, number, -1))


class _Keys(Sampler[list[tuple[int, int]]]):
    """The (epoch, index) keys of the batches to come, set anew for every epoch."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def _views(augment: BatchAugment | Sequence[BatchAugment] | None, mix: Mix | None) -> list[BatchAugment]:
    views = [] if augment is None else [augment] if isinstance(augment, BatchAugment) else list(augment)
    if mix is not None and len(views) > 1:
        raise DataError("Expected one view with mixup or cutmix, got two. Switch one of them off.")
    return views


def _finish(images: list[Tensor], labels: Tensor, mix: Mix | None, seed: int) -> Batch:
    if mix is not None:
        return mix(images[0], labels, seed=seed)
    return (images[0] if len(images) == 1 else images), labels
