"""Images with class labels for training: read, checked, counted, brought to one size, and served as batches.

Everything is a function of the data and the seeds in the arguments. Axes: M images, K classes, C channels.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor

from batchformer.data import checks, fetch, fingerprints, images, lists
from batchformer.data.loader import ImageLoader, TensorLoader
from batchformer.data.samplers import EpochSampler, EvalSampler, SamplerKind
from batchformer.data.transforms import SMALL, BatchAugment, Mix, image_eval, image_keep
from batchformer.tasks.training.data import TaskData

from .normalization import Normalize, Statistics, known_statistics, measured_statistics
from .sources import DatasetName, Part, Source, read_parts

_SIZES = ((28, 28), (40, 32), (96, 64))
"""Working size in pixels for a median short side of at most so many pixels; above the last, 224."""


class ImageData(TaskData):
    """Training images with class labels, their validation and test images, from a known data set or any image folder.

    After ``setup()``: ``counts`` (training images of each class, (K,)), ``classes``, ``num_classes``, ``in_channels``,
    ``image_size``, ``mean`` and ``std``. A task that trains on part of the images overrides :meth:`choose`.

    Small sets are decoded once into one uint8 tensor and augmented batch by batch; larger ones are read by worker
    processes. Fashion-MNIST and CIFAR have no validation split: validation is the test split there, so select
    nothing by it.

    A plain folder is split by class with ``val_fraction`` and ``test_fraction``; a class with few images gives one
    to training first, then one to test, then one to validation. With ``train`` and ``val`` or ``test`` sub-folders
    these are kept.

    Args:
        dataset: Name of a data set; ``"folder"`` is any folder with one sub-folder for each class, or your own lists.
        root: Folder of the data; ``None`` means the data root (``BATCHFORMER_DATA``, else ``~/.cache/batchformer``).
        subset_seed: Seed that chooses the images of the run: the split of a plain folder, and a task's subset.
        seed: Seed of order, augmentation and mixing. Change it for each run.
        epochs: Epochs of the run, for the progressive sampler; ``None`` asks the trainer.
        batch_size: Training images in a batch of one process.
        eval_batch_size: Images in a batch of one process in validation and test.
        sampler: Rule by which training images are drawn.
        augment: ``"auto"``, a preset or a list of steps: see :mod:`batchformer.data.transforms`.
        two_views: Give two differently augmented views of every training image (contrastive learning).
        augment_second: Augmentation of the second view.
        mixup_alpha: Parameter of mixup's Beta distribution; 0 is off.
        cutmix_alpha: Parameter of CutMix's Beta distribution; 0 is off.
        image_size: Working size in pixels; ``None`` chooses 28, 32, 64 or 224 by the images themselves.
        normalize: ``"auto"``: the data set's published figures, ImageNet's for colour, the training set's for grey.
        num_workers: Worker processes for image files; ``None`` means one for each core, at most 8.
        memory_gib: Largest size in GiB up to which the whole data set is kept in memory, at the working size.
            Results do not depend on it, with one exception: a ``resized_crop`` in training cuts from the centred
            square that is kept in memory, or from the whole picture in its file.
        check_images: Decode every image file once before the first step (remembered between runs).
        drop_last: Leave out training images that fill no batch; ``None`` means only if there is a full batch.
        train_list: List file with lines "relative/path label"; ``None`` means the published name below the root.
        val_list: List file of the validation images.
        test_list: List file of the test images.
        val_fraction: Share of a plain folder for validation; 0 uses the test images.
        test_fraction: Share of a plain folder for test; 0 uses the validation images.

    Raises:
        DataError: From ``setup()``, when the data cannot be used; all problems of one kind in one message.
        DataNotFoundError: From ``setup()``, when the data is not there; names where it looked and the way out.
    """

    counts: Tensor
    classes: list[str]
    num_classes: int
    in_channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        dataset: DatasetName = "fashion-mnist",
        root: str | Path | None = None,
        *,
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
        normalize: Normalize = "auto",
        num_workers: int | None = None,
        memory_gib: float = 1.0,
        check_images: bool = True,
        drop_last: bool | None = None,
        train_list: str | Path | None = None,
        val_list: str | Path | None = None,
        test_list: str | Path | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
    ) -> None:
        super().__init__(
            seed=seed,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            drop_last=drop_last,
        )
        self.dataset, self.root = dataset, root
        self.subset_seed, self.epochs, self.sampler = subset_seed, epochs, sampler
        self.augment, self.two_views, self.augment_second = augment, two_views, augment_second
        self.mixup_alpha, self.cutmix_alpha = mixup_alpha, cutmix_alpha
        self.image_size, self.normalize = image_size, normalize
        self.memory_gib, self.check_images = memory_gib, check_images
        given = {"train": train_list, "val": val_list, "test": test_list}
        files = {split: Path(file).expanduser() for split, file in given.items() if file is not None}
        self.source = Source(dataset, root, files, val_fraction, test_fraction, subset_seed)
        self._parts: dict[str, Part] | None = None
        self._fingerprints: dict[str, str] = {}
        self._shared: str | None = None

    def choose(self, train: Part, num_classes: int) -> Part:
        """Return the training images of this run: all of them, unless a task overrides this.

        Args:
            train: All training images.
            num_classes: K.
        """
        return train

    def fingerprints(self) -> dict[str, str]:
        """Return a fingerprint of each split: of names, bytes and labels of its files, or of its pixels and labels."""
        if not self._fingerprints:
            self._read()
        return dict(self._fingerprints)

    def notes(self) -> list[str]:
        """Return the sentence about test images that are training images as well, if there are any."""
        return [] if self._shared is None else [self._shared]

    def prepare_data(self) -> None:
        """Fetch Fashion-MNIST if it is absent; with several processes, check the image files once for all of them."""
        if self.dataset == "fashion-mnist":
            fetch.get(self.dataset, self.root)
        elif self.ranks()[1] > 1:
            self._read()

    def setup(self, stage: str | None = None) -> None:
        """Read, check, count and size the images. A second call does nothing."""
        if self._parts is not None:
            return
        parts, self.classes, self.counts = self._read()
        self.num_classes = len(self.classes)
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
        """Return the parts, checked and with the chosen training images, the class names and the training counts."""
        parts, classes = read_parts(self.source)
        parts["train"] = self.choose(parts["train"], len(classes))
        counts = torch.bincount(parts["train"].labels, minlength=len(classes))
        checks.check_classes(counts, classes)
        self._identify(parts, classes)
        return parts, classes, counts

    def _identify(self, parts: dict[str, Part], classes: list[str]) -> None:
        """Check the image files, and keep the fingerprints of all splits and the word on images in two of them."""
        distinct, contents = _distinct(parts), {}
        files = [part.samples for part in distinct if part.samples is not None]
        if files:
            listed, cache = lists.joined(files), fetch.data_root() / "checked"
            hashes = checks.check_samples(listed, what="listed", cache=cache, decode=self.check_images)
            rest = iter(listed.paths)
            contents = {id(samples): [hashes[next(rest)] for _ in samples.paths] for samples in files}
        digests = {}
        for part in distinct:
            images = part.images if part.samples is None else [part.samples.paths, contents[id(part.samples)]]
            digests[id(part)] = fingerprints.fingerprint(classes, part.labels, images)
        self._fingerprints = {name: digests[id(part)] for name, part in parts.items()}
        train, test = parts["train"].samples, parts["test"].samples
        if train is not None and test is not None:
            self._shared = fingerprints.shared_images(contents[id(train)], contents[id(test)], "test")
        if self._shared is not None:
            warnings.warn(self._shared, stacklevel=2)

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
        needed = sum(len(part.labels) for part in _distinct(parts)) * self.in_channels * size**2
        for part in _distinct(parts):
            prepare = image_keep(self._augmentations(), size) if part is train else image_eval(size)
            if part.images is not None and part.images.shape[-1] != size:
                part.images = prepare(part.images)
            elif part.samples is not None and needed <= self.memory_gib * 2**30:
                part.images = images.decode_all(part.samples, prepare, size, self.in_channels)

    def _statistics(self, train: Part) -> Statistics:
        known = known_statistics(self.dataset, self.normalize, self.in_channels)
        if known is not None:
            return known
        pixels = train.images
        if pixels is None:
            assert train.samples is not None
            some = train.samples.subset(torch.arange(0, len(train.labels), -(-len(train.labels) // 1000)))
            keep = image_keep(self._augmentations(), self._size())
            pixels = images.decode_all(some, keep, self._size(), self.in_channels)
        return measured_statistics(pixels)

    def train_dataloader(self) -> TensorLoader | ImageLoader:
        """Return the training batches of this process."""
        part = self._part("train")
        sampler = self.train_sampler(part.labels, kind=self.sampler, epochs=self._epochs())
        mix = None
        if self.mixup_alpha or self.cutmix_alpha:
            mix = Mix(self.num_classes, mixup_alpha=self.mixup_alpha, cutmix_alpha=self.cutmix_alpha)
        views = [BatchAugment(steps, self._size()) for steps in self._augmentations()]
        return self._loader(part, sampler, views, mix)

    def val_dataloader(self) -> TensorLoader | ImageLoader:
        """Return the validation batches of this process."""
        return self._evaluation("val")

    def test_dataloader(self) -> TensorLoader | ImageLoader:
        """Return the test batches of this process."""
        return self._evaluation("test")

    def _evaluation(self, name: str) -> TensorLoader | ImageLoader:
        part = self._part(name)
        return self._loader(part, self.eval_sampler(len(part.labels)), [], None)

    def _loader(
        self, part: Part, sampler: EpochSampler | EvalSampler, views: list[BatchAugment], mix: Mix | None
    ) -> TensorLoader | ImageLoader:
        if part.images is not None:
            return TensorLoader(part.images, part.labels, sampler, views, mean=self.mean, std=self.std, mix=mix)
        assert part.samples is not None
        return ImageLoader(
            part.samples,
            sampler,
            views,
            size=self._size(),
            channels=self.in_channels,
            mean=self.mean,
            std=self.std,
            num_workers=self.workers(),
            mix=mix,
        )

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


def _distinct(parts: dict[str, Part]) -> list[Part]:
    """Return each part once, where validation and test are one."""
    return list({id(part): part for part in parts.values()}.values())
