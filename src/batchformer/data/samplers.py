"""Order of the images in training and evaluation, as a pure function of the seed and the epoch.

A run that was killed and resumed, and the two arms of a paired comparison, therefore see the same batches. The samplers
shard by rank themselves: rank r of W takes every W-th index, so that batch b is the same set of images for every W of
equal ``batch_size * W``.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from .errors import DataError

SamplerKind = Literal["instance", "class_balanced", "square_root", "progressive"]


def derive_seed(*parts: int) -> int:
    """Mix integers (seed, epoch, batch, ...) into one 63-bit seed, equal on every platform and in every process.

    Example:
        >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(1, 0)
        (True, False)
    """
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*parts: int) -> torch.Generator:
    """Return a CPU generator seeded with :func:`derive_seed`, so that torch's global stream is never touched."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def class_probabilities(
    counts: Tensor, kind: SamplerKind = "instance", *, epoch: int = 0, epochs: int | None = None
) -> Tensor:
    """Compute the probability that the next training image is of class j.

    ``p_j = n_j^q / sum_i n_i^q`` with q = 1 (instance-balanced), 1/2 (square-root) and 0 (class-balanced), and the
    progressively balanced mixture ``(1 - t/T) p_instance + t/T p_class``: Kang et al., "Decoupling Representation and
    Classifier for Long-Tailed Recognition", ICLR 2020, eq. 1 to 3. Epochs count from 0 and T is the last one, so that
    the first epoch is instance-balanced and the last class-balanced. Classes without images get probability 0.

    Args:
        counts: Training images of each class n_j, shape (K,).
        kind: Sampling rule.
        epoch: Current epoch t, used by ``"progressive"`` alone.
        epochs: Number of epochs of the whole run, used by ``"progressive"`` alone.

    Returns:
        Probabilities, float64, shape (K,), summing to 1.

    Raises:
        DataError: The kind is unknown, or ``"progressive"`` is without ``epochs``.

    Example:
        >>> class_probabilities(torch.tensor([9, 1]), "square_root")
        tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    n_K = counts.to(torch.float64)
    if kind == "instance":
        return n_K / n_K.sum()
    if kind == "square_root":
        return n_K.sqrt() / n_K.sqrt().sum()
    present_K = (n_K > 0).to(torch.float64)
    if kind == "class_balanced":
        return present_K / present_K.sum()
    if kind == "progressive":
        if epochs is None:
            raise DataError("Expected the number of epochs for the progressive sampler, got None. Pass epochs=...")
        share = min(1.0, epoch / max(1, epochs - 1))
        return (1 - share) * n_K / n_K.sum() + share * present_K / present_K.sum()
    raise DataError(f"Expected sampler instance, class_balanced, square_root or progressive; got {kind!r}.")


class EpochSampler(DistributedSampler[int]):
    """Indices of one epoch of training, as a pure function of (seed, epoch).

    ``"instance"`` is a plain shuffle without repetition; the other kinds draw with replacement according to
    :func:`class_probabilities`. It is a ``DistributedSampler`` so that trainers leave it in place under DDP.

    Args:
        labels: Class of every training image, shape (M,).
        batch_size: Images in a batch of one rank.
        kind: Sampling rule.
        seed: Seed of the order.
        epochs: Epochs of the whole run; only ``"progressive"`` needs it.
        drop_last: Leave out the images that do not fill a batch on every rank. Otherwise the last batch is smaller,
            and the order is filled up from its start until every rank has the same number of images.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        DataError: There are no labels, the batch size is below 1, the rank is out of range, ``drop_last`` leaves no
            batch, or ``"progressive"`` is without ``epochs``.

    Example:
        >>> sampler = EpochSampler([0, 0, 0, 1], batch_size=2, seed=1)
        >>> sampler.set_epoch(3)
        >>> list(sampler) == list(sampler), sorted(sampler)
        (True, [0, 1, 2, 3])
    """

    def __init__(
        self,
        labels: Tensor | Sequence[int],
        *,
        batch_size: int,
        kind: SamplerKind = "instance",
        seed: int = 0,
        epochs: int | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        size = len(self.labels)
        _check(size, batch_size, rank, world_size)
        if drop_last and size < batch_size * world_size:
            raise DataError(
                f"Expected at least one batch of {batch_size} on {world_size} rank(s), got {size} training images. "
                "Use a smaller batch_size or drop_last=False."
            )
        super().__init__(range(size), num_replicas=world_size, rank=rank, seed=seed, drop_last=drop_last)  # type: ignore[arg-type]
        self.batch_size, self.kind, self.epochs = batch_size, kind, epochs
        self.counts = torch.bincount(self.labels)
        class_probabilities(self.counts, kind, epochs=epochs)  # so that a wrong argument fails here and not in an epoch

    def indices(self, epoch: int | None = None) -> Tensor:
        """Return this rank's indices of an epoch (the current one by default), shape (len(self),)."""
        epoch = self.epoch if epoch is None else epoch
        order = self._order(epoch)
        total = len(self) * self.num_replicas
        if total > len(order):
            order = order.repeat(-(-total // len(order)))
        return order[:total][self.rank :: self.num_replicas]

    def _order(self, epoch: int) -> Tensor:
        """Return the indices of an epoch over all ranks, shape (M,)."""
        size, stream = len(self.labels), generator(self.seed, epoch)
        if self.kind == "instance":
            return torch.randperm(size, generator=stream)
        p_K = class_probabilities(self.counts, self.kind, epoch=epoch, epochs=self.epochs)
        classes_M = torch.multinomial(p_K, size, replacement=True, generator=stream)
        place_M = (torch.rand(size, generator=stream, dtype=torch.float64) * self.counts[classes_M]).long()
        by_class = torch.argsort(self.labels, stable=True)
        starts_K = self.counts.cumsum(0) - self.counts
        return by_class[starts_K[classes_M] + place_M]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices().tolist())

    def __len__(self) -> int:
        size, world = len(self.labels), self.num_replicas
        if self.drop_last:
            return size // (self.batch_size * world) * self.batch_size
        return -(-size // world)


class EvalSampler(DistributedSampler[int]):
    """Indices for evaluation, in order and without repetition: rank r of W takes r, r + W, r + 2W, ...

    Ranks may differ by one image, so that no image is counted twice; only a rank that would get none takes image 0.

    Args:
        size: Number of images.
        batch_size: Images in a batch of one rank.
        rank: Number of this process.
        world_size: Number of processes.

    Raises:
        DataError: There are no images, the batch size is below 1, or the rank is out of range.

    Example:
        >>> [list(EvalSampler(5, batch_size=2, rank=r, world_size=2)) for r in (0, 1)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, size: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        _check(size, batch_size, rank, world_size)
        super().__init__(range(size), num_replicas=world_size, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.size, self.batch_size = size, batch_size

    def indices(self, epoch: int | None = None) -> Tensor:
        """Return this rank's indices; they do not depend on the epoch."""
        own = torch.arange(self.size)[self.rank :: self.num_replicas]
        return own if len(own) else torch.zeros(1, dtype=torch.int64)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices().tolist())

    def __len__(self) -> int:
        return max(1, -(-(self.size - self.rank) // self.num_replicas))


def _check(size: int, batch_size: int, rank: int, world_size: int) -> None:
    if size < 1:
        raise DataError("Expected at least one image, got none.")
    if batch_size < 1:
        raise DataError(f"Expected a batch_size of at least 1, got {batch_size}.")
    if not 0 <= rank < world_size:
        raise DataError(f"Expected a rank from 0 to world_size - 1 = {world_size - 1}, got {rank}.")
