"""Long-tailed data for training: read, cut to a long tail, checked, counted, and served as batches.

Everything is a function of the data and the seeds in the arguments. Axes: M images, K classes, C channels.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from PIL import Image
from torch import Tensor

from batchformer.data import checks, fetch, images, lists
from batchformer.data.loader import ImageDataset, ImageLoader, TensorLoader
from batchformer.data.samplers import EpochSampler, EvalSampler, SamplerKind
from batchformer.data.transforms import SMALL, BatchAugment, Mix, image_augment, image_eval, image_keep
from batchformer.tasks.image_classification.sources import DatasetName, Part, Source, read_parts

from .imbalance import class_order, long_tail_indices, long_tail_profile, shot_groups, unmet

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "inat18": ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192)),
}
"""Mean and standard deviation per channel, as the published recipes use them."""

_SIZES = ((28, 28), (40, 32), (96, 64))
"""Up to this median short side -> this working size; above, 224."""


class LongTailData(LightningDataModule):
    """Long-tailed training data with its validation and test data, from a known data set or any image folder.

    After ``setup()``: ``counts`` (training images per class, (K,)), ``classes``, ``num_classes``, ``in_channels``,
    ``image_size``, ``groups`` ("many" / "medium" / "few": class indices), ``mean`` and ``std``.

    Small sets are decoded once into one uint8 tensor and augmented batch by batch; larger ones are read by worker
    processes. Fashion-MNIST and CIFAR have no validation split: validation is the test split there, so select
    nothing by it.

    A plain folder is split by class with ``val_fraction`` and ``test_fraction``; a class with few images gives one
    to training first, then one to test, then one to validation. With ``train`` and ``val`` or ``test`` sub-folders
    these are kept.

    Args:
        dataset: Which data set; ``"folder"`` is any folder with one sub-folder per class, or lists of your own.
        root: Where the data lies; ``None`` means the data root (``BATCHFORMER_DATA``, else ``~/.cache/batchformer``).
        n_max: Training images of the most frequent class; ``None`` means as many as there are.
        imbalance_factor: Most over least frequent class after the cut; ``None`` leaves the data as it is. A warning
            says when the classes have too few images for it.
        class_order: Which classes become rare: by class index, or permuted. ``"auto"``: by index for CIFAR (as
            published), else permuted.
        class_order_seed: Seed of that permutation.
        subset_seed: Seed that chooses the images kept, and the split of a plain folder.
        seed: Seed of order, augmentation and mixing. Change it per run.
        epochs: Epochs of the run, for the progressive sampler; ``None`` asks the trainer.
        batch_size: Training images per batch and process.
        eval_batch_size: The same for evaluation.
        sampler: How training images are drawn.
        augment: ``"auto"``, a preset or a list of steps: see :mod:`batchformer.data.transforms`.
        two_views: Give two differently augmented views of every training image (PaCo).
        augment_second: The second view's augmentation.
        mixup_alpha: Mixup's Beta parameter; 0 is off.
        cutmix_alpha: CutMix's Beta parameter; 0 is off.
        image_size: Working size in pixels; ``None`` chooses 28, 32, 64 or 224 by the images themselves.
        normalize: ``"auto"``: the data set's published figures, ImageNet's for colour, the training set's for grey.
        num_workers: Worker processes for image files; ``None`` means one per core, at most 8.
        memory_gib: Up to this size the whole data set is kept in memory, at the working size: evaluation is the same as
            from files, a ``resized_crop`` in training cuts from the centred square instead of the whole file.
        check_images: Decode every image file once before the first step (remembered between runs).
        drop_last: Leave out training images that fill no batch; ``None`` means only if there is a full batch.
        many_over: "Many" means more training images than this.
        few_under: "Few" means fewer than this.
        train_list: List file "relative/path label"; ``None`` means the published name below the root.
        val_list: The same for validation.
        test_list: The same for test.
        val_fraction: Share of a plain folder for validation; 0 uses the test images.
        test_fraction: Share of a plain folder for test; 0 uses the validation images.

    Raises:
        DataError: From ``setup()``, when the data cannot be used; all problems of one kind in one message.
        DataNotFoundError: From ``setup()``, when it is not there; says where it looked and what to do.
    """

    counts: Tensor
    classes: list[str]
    num_classes: int
    in_channels: int
    groups: dict[str, list[int]]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        dataset: DatasetName = "fashion-mnist",
        root: str | Path | None = None,
        *,
        n_max: int | None = None,
        imbalance_factor: float | None = None,
        class_order: Literal["auto", "index", "permuted"] = "auto",
        class_order_seed: int = 0,
        subset_seed: int = 0,
        seed: int = 0,
        epochs: int | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        sampler: SamplerKind = "instance",
        augment: str | list[str] = "auto",
        two_views: bool = False,
        augment_second: str | list[str] = "auto",
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        image_size: int | None = None,
        normalize: Literal["auto", "imagenet", "training"] = "auto",
        num_workers: int | None = None,
        memory_gib: float = 1.0,
        check_images: bool = True,
        drop_last: bool | None = None,
        many_over: int = 100,
        few_under: int = 20,
        train_list: str | Path | None = None,
        val_list: str | Path | None = None,
        test_list: str | Path | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
    ) -> None:
        super().__init__()
        self.dataset, self.root = dataset, root
        self.n_max, self.imbalance_factor = n_max, imbalance_factor
        self.class_order, self.class_order_seed = class_order, class_order_seed
        self.subset_seed, self.seed, self.epochs = subset_seed, seed, epochs
        self.batch_size, self.eval_batch_size, self.sampler = batch_size, eval_batch_size, sampler
        self.augment, self.two_views, self.augment_second = augment, two_views, augment_second
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.image_size, self.normalize = image_size, normalize
        self.num_workers, self.memory_gib = num_workers, memory_gib
        self.check_images, self.drop_last = check_images, drop_last
        self.many_over, self.few_under = many_over, few_under
        given = {"train": train_list, "val": val_list, "test": test_list}
        files = {split: Path(file).expanduser() for split, file in given.items() if file is not None}
        self.source = Source(dataset, root, files, val_fraction, test_fraction, subset_seed)
        self._parts: dict[str, Part] | None = None

    def prepare_data(self) -> None:
        """Fetch Fashion-MNIST if it is absent; with several processes, check the image files once for all of them."""
        if self.dataset == "fashion-mnist":
            fetch.get(self.dataset, self.root)
        elif self._ranks()[1] > 1:
            self._read()

    def setup(self, stage: str | None = None) -> None:
        """Read, cut, check and count. A second call does nothing."""
        if self._parts is not None:
            return
        parts, self.classes, self.counts = self._read()
        self.num_classes = len(self.classes)
        self.groups = shot_groups(self.counts, self.many_over, self.few_under)
        untested = self.num_classes - len(set(parts["test"].labels.tolist()))
        if untested:
            warnings.warn(
                f"{untested} of {self.num_classes} classes have no test image; their accuracy is left out.",
                stacklevel=2,
            )
        self._fix_size(parts)
        self.mean, self.std = self._statistics(parts["train"])
        self._parts = parts

    def _read(self) -> tuple[dict[str, Part], list[str], Tensor]:
        """Return the parts, checked and with the training part cut, the class names and the training counts."""
        parts, classes = read_parts(self.source)
        parts["train"] = self._cut(parts["train"], len(classes))
        counts = torch.bincount(parts["train"].labels, minlength=len(classes))
        checks.check_classes(counts, classes)
        files = [
            part.samples for part in {id(part): part for part in parts.values()}.values() if part.samples is not None
        ]
        if files:
            cache = fetch.data_root() / "checked"
            checks.check_samples(lists.joined(files), what="listed", cache=cache, decode=self.check_images)
        return parts, classes, counts

    def _cut(self, train: Part, num_classes: int) -> Part:
        if self.n_max is None and self.imbalance_factor is None:
            return train
        available = torch.bincount(train.labels, minlength=num_classes)
        by_index = self.class_order == "index" or (
            self.class_order == "auto" and self.dataset in ("cifar10", "cifar100")
        )
        order = class_order(available, None if by_index else self.class_order_seed)
        n_max = int(available.max()) if self.n_max is None else self.n_max
        factor = 1.0 if self.imbalance_factor is None else self.imbalance_factor
        profile = long_tail_profile(num_classes, n_max, factor)
        if words := unmet(profile, available[order].tolist(), factor):
            warnings.warn(words, stacklevel=2)
        counts = [0] * num_classes
        for k, count in zip(order, profile, strict=True):
            counts[k] = count
        return train.subset(long_tail_indices(train.labels, counts, self.subset_seed))

    def _fix_size(self, parts: dict[str, Part]) -> None:
        """Choose the working size and bring everything that fits into memory."""
        train = parts["train"]
        if train.images is not None:
            self.in_channels, native = int(train.images.shape[1]), int(train.images.shape[-1])
        else:
            assert train.samples is not None
            self.in_channels, side = images.probe(train.samples)
            native = next((size for most, size in _SIZES if side <= most), 224)
        self.image_size = size = self.image_size or native
        unique = {id(part): part for part in parts.values()}.values()
        needed = sum(len(part.labels) for part in unique) * self.in_channels * size**2
        for part in unique:
            prepare = image_keep(self._augmentations(), size) if part is train else image_eval(size)
            if part.images is not None and part.images.shape[-1] != size:
                part.images = prepare(part.images)
            elif part.samples is not None and needed <= self.memory_gib * 2**30:
                part.images = images.decode_all(part.samples, prepare, size, self.in_channels)

    def _statistics(self, train: Part) -> tuple[tuple[float, ...], tuple[float, ...]]:
        if self.normalize == "auto" and self.dataset in _STATISTICS:
            return _STATISTICS[self.dataset]
        if self.normalize == "imagenet" or (self.normalize == "auto" and self.in_channels == 3):
            mean, std = IMAGENET
            return (mean, std) if self.in_channels == 3 else ((sum(mean) / 3,), (sum(std) / 3,))
        pixels = train.images
        if pixels is None:
            assert train.samples is not None
            some = train.samples.subset(torch.arange(0, len(train.labels), -(-len(train.labels) // 1000)))
            pixels = images.decode_all(
                some, image_keep(self._augmentations(), self._size()), self._size(), self.in_channels
            )
        sample = pixels[:: -(-len(pixels) // 20000)].float() / 255
        std_C = sample.std((0, 2, 3)).clamp(min=1e-3)
        return tuple(sample.mean((0, 2, 3)).tolist()), tuple(std_C.tolist())

    def train_dataloader(self) -> TensorLoader | ImageLoader:
        """Return the training batches of this process."""
        part, (rank, world) = self._part("train"), self._ranks()
        full = len(part.labels) >= self.batch_size * world
        sampler = EpochSampler(
            part.labels,
            batch_size=self.batch_size,
            kind=self.sampler,
            seed=self.seed,
            epochs=self._epochs(),
            drop_last=full if self.drop_last is None else self.drop_last,
            rank=rank,
            world_size=world,
        )
        mix = None
        if self.mixup_alpha or self.cutmix_alpha:
            mix = Mix(self.num_classes, mixup_alpha=self.mixup_alpha, cutmix_alpha=self.cutmix_alpha)
        size = self._size()
        if part.images is not None:
            views = [BatchAugment(steps, size) for steps in self._augmentations()]
            return TensorLoader(part.images, part.labels, sampler, views, mean=self.mean, std=self.std, mix=mix)
        return self._files(part, sampler, [image_augment(steps, size) for steps in self._augmentations()], mix)

    def val_dataloader(self) -> TensorLoader | ImageLoader:
        """Return the validation batches of this process."""
        return self._evaluation("val")

    def test_dataloader(self) -> TensorLoader | ImageLoader:
        """Return the test batches of this process."""
        return self._evaluation("test")

    def _evaluation(self, name: str) -> TensorLoader | ImageLoader:
        part, (rank, world) = self._part(name), self._ranks()
        sampler = EvalSampler(len(part.labels), batch_size=self.eval_batch_size, rank=rank, world_size=world)
        if part.images is not None:
            return TensorLoader(part.images, part.labels, sampler, mean=self.mean, std=self.std)
        return self._files(part, sampler, [image_eval(self._size())], None)

    def _files(
        self,
        part: Part,
        sampler: EpochSampler | EvalSampler,
        transforms: list[Callable[[Image.Image], Tensor]],
        mix: Mix | None,
    ) -> ImageLoader:
        assert part.samples is not None
        workers = min(8, os.cpu_count() or 1) if self.num_workers is None else self.num_workers
        dataset = ImageDataset(part.samples, transforms, channels=self.in_channels, seed=self.seed)
        return ImageLoader(dataset, sampler, mean=self.mean, std=self.std, num_workers=workers, mix=mix)

    def _part(self, name: str) -> Part:
        self.setup()
        assert self._parts is not None
        return self._parts[name]

    def _size(self) -> int:
        assert self.image_size is not None
        return self.image_size

    def _augmentations(self) -> list[str | list[str]]:
        """Return the steps of the one or two views."""
        first, second, small = self.augment, self.augment_second, self._size() <= SMALL
        if not self.two_views:
            return [first]
        ending = "_small" if small else ""
        return [
            "paco_query" + ending if first == "auto" else first,
            "paco_key" + ending if second == "auto" else second,
        ]

    def _epochs(self) -> int | None:
        if self.epochs is None and self.trainer is not None:
            return self.trainer.max_epochs
        return self.epochs

    def _ranks(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
