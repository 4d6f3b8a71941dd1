"""Data of detection and panoptic segmentation: a folder in COCO's format as batches of images, or of cached maps.

Everything is a function of the data and the seeds in the arguments. Axes: M images, K classes, C channels.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from batchformer.data import coco, fetch
from batchformer.data.coco_identity import split_fingerprint, split_hashes
from batchformer.data.detection_transforms import CocoDetection, Transform, collate, eval_transform, train_transform
from batchformer.data.errors import DataError
from batchformer.data.fingerprints import shared_images
from batchformer.data.loader import KeyedLoader
from batchformer.data.samplers import EpochSampler, EvalSampler, generator
from batchformer.tasks.training.data import TaskData

from .backbone import Backbone
from .cached_data import CachedDetection, cached, collate_cached

__all__ = ["CocoData"]


class CocoData(TaskData):
    """Batches with labels as transformers has them, from a folder in COCO's format or from the scenes that are fetched.

    Splits are ``train``, ``val`` (or ``valid``) and ``test``. Without ``val`` validation is on ``test``; without
    ``test`` (as on COCO, whose test boxes are not public) the test is on ``val``, so that nothing should be selected by
    it. A split ``unseen`` is tested as well, separately.

    Args:
        dataset: ``coco`` and ``folder`` are read from ``root``; ``scenes`` are fetched and written on first use.
        root: Folder of the data; for ``scenes`` the data root, where ``None`` stands for the environment variable
            ``BATCHFORMER_DATA``, else ``~/.cache/batchformer``.
        size: Short side of an image in pixels; with cached features the long side, so that all maps have one size.
        max_size: Largest long side in pixels; ``None``: DETR's 1333 for 800, in proportion.
        augment: Augmentation of training images. ``detr``: mirror images, scales from 0.6 to 1 times ``size``, and
            cuts. ``flip``: mirror images alone. ``nothing``: none.
        cache_features: Whether the maps of a frozen backbone are computed once for every image and its mirror image,
            and read in training; ``augment`` must then be ``flip`` or ``nothing``.
        train_images: Number of training images, chosen by ``subset_seed``; ``None`` takes all.
        subset_seed: Seed of the choice of ``train_images``.
        policy: Handling of boxes outside their image or without area: ``tolerant`` counts and mends them, ``strict``
            raises an error.
        seed: Seed of order and augmentation, one for each run.
        batch_size: Training images of a batch, for each process.
        eval_batch_size: Images of a batch in validation and test, for each process.
        num_workers: Worker processes that read files; ``None`` means one for each core, at most 8.
        drop_last: Whether training images that fill no batch are left out; ``None`` means only if there is a full
            batch.

    Attributes:
        pad_to: Number that heights and widths of batches are multiples of: ``size`` with cached features, else 1.
        categories: Categories of the annotation files, after ``setup()``.
        counts: Training boxes of each class, (K,), after ``setup()``.

    Raises:
        DataError: From ``setup()``, when the data cannot be used; one message has all problems of one kind.
        DataNotFoundError: From ``setup()``, when the data is not there; says where it looked and what to do.
    """

    kind: ClassVar[coco.Kind] = "instances"

    categories: tuple[coco.Category, ...]
    counts: Tensor

    def __init__(
        self,
        dataset: Literal["coco", "folder", "scenes"] = "scenes",
        root: str | Path | None = None,
        *,
        size: int = 800,
        max_size: int | None = None,
        augment: Literal["detr", "flip", "nothing"] = "detr",
        cache_features: bool = False,
        train_images: int | None = None,
        subset_seed: int = 0,
        policy: Literal["tolerant", "strict"] = "tolerant",
        seed: int = 0,
        batch_size: int = 2,
        eval_batch_size: int = 2,
        num_workers: int | None = None,
        drop_last: bool | None = None,
    ) -> None:
        super().__init__(
            seed=seed,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            drop_last=drop_last,
        )
        if cache_features and augment == "detr":
            raise ValueError(
                "Expected data.augment=flip or nothing with data.cache_features: maps of scaled and cut images cannot "
                "be computed once for all epochs."
            )
        self.dataset, self.root, self.size, self.augment = dataset, root, size, augment
        self.max_size = size if cache_features else round(size * 1333 / 800) if max_size is None else max_size
        self.pad_to = size if cache_features else 1
        self.cache_features, self.train_images, self.subset_seed = cache_features, train_images, subset_seed
        self.policy = policy
        self._splits: dict[str, coco.CocoSplit] = {}
        self._fingerprints: dict[str, str] = {}
        self._shared: list[str] = []
        self._cached: dict[str, CachedDetection] = {}

    # ---------------------------------------------------------------- reading

    def prepare_data(self) -> None:
        """Fetch and write the scenes if they are absent."""
        if self.dataset == "scenes":
            fetch.get("scenes", self.root)
        if self.ranks()[1] > 1:
            self.fingerprints()  # one process reads all files, the others find the hashes

    def setup(self, stage: str | None = None) -> None:
        """Read and count. A second call does nothing."""
        if self._splits:
            return
        root = self._folder()
        names = coco.splits(root, self.kind) or ["train"]  # reading `train` then says what is missing
        val = next((name for name in ("val", "valid") if name in names), None)
        parts = {"train": "train", "val": val or "test", "test": "test" if "test" in names else val or "test"}
        parts |= {"unseen": "unseen"} if "unseen" in names else {}
        read = {
            name: coco.open_split(root, name, kind=self.kind, policy=self.policy)
            for name in dict.fromkeys(parts.values())
        }
        splits = {part: read[name] for part, name in parts.items()}
        self.categories = splits["train"].categories
        for split in read.values():
            if split.categories != self.categories:
                theirs, ours = ([f"{c.id} {c.name}" for c in s.categories][:5] for s in (split, splits["train"]))
                raise DataError(
                    f"Expected the same categories in all splits of {root}, but those of {split.name!r} are {theirs} "
                    f"and those of 'train' {ours}. Give all annotation files the same list of categories."
                )
        splits["train"] = self._cut(splits["train"])
        self.counts = splits["train"].counts()
        if not int(self.counts.sum()):
            raise DataError(
                f"Expected boxes in the training images of {root}, got none. See its annotation file of train."
            )
        self.test_splits = ["test", *(["unseen"] if "unseen" in splits else [])]
        self._splits = splits

    def fingerprints(self) -> dict[str, str]:
        """Return a fingerprint of each split: of its files, boxes and classes, and of the PNG files of segments."""
        if not self._fingerprints:
            self.setup()
            root, cache = self._folder(), fetch.data_root() / "checked"
            hashes = split_hashes(root, list(self._splits.values()), cache=cache)
            self._fingerprints = {part: split_fingerprint(root, split, hashes) for part, split in self._splits.items()}
            images = {part: [hashes[record.file] for record in split.images] for part, split in self._splits.items()}
            shared = (shared_images(images["train"], images[part], part) for part in self.test_splits)
            self._shared = [sentence for sentence in shared if sentence is not None]
            for sentence in self._shared:
                warnings.warn(sentence, stacklevel=2)
        return dict(self._fingerprints)

    def _folder(self) -> Path:
        if self.dataset == "scenes":
            return fetch.get("scenes", self.root)
        if self.root is None:
            raise DataError(
                "Expected the folder of the data, got none. Give --data.root=PATH, with "
                f"annotations/{self.kind}_train.json and train/, and the same of val or test, with or without the year "
                "that COCO's names have."
            )
        return Path(self.root).expanduser()

    def _cut(self, train: coco.CocoSplit) -> coco.CocoSplit:
        if self.train_images is None:
            return train
        if not 1 <= self.train_images <= len(train):
            raise DataError(f"Expected data.train_images in 1..{len(train)}, got {self.train_images}.")
        chosen = torch.randperm(len(train), generator=generator(self.subset_seed))[: self.train_images].sort().values
        return replace(
            train,
            images=tuple(train.images[i] for i in chosen),
            annotations=tuple(train.annotations[i] for i in chosen),
        )

    @property
    def classes(self) -> list[str]:
        """Name of each class, by class index."""
        return [category.name for category in self.categories]

    @property
    def category_ids(self) -> list[int]:
        """Id of each class in the annotation file, by class index."""
        return [int(category.id) for category in self.categories]

    @property
    def is_thing(self) -> list[bool]:
        """Kind of each class, by class index: True for countable things, False for stuff."""
        return [bool(category.isthing) for category in self.categories]

    def notes(self) -> list[str]:
        """Return what was read of each split, and what was done to its annotations."""
        seen: dict[int, str] = {}
        for part, split in self._splits.items():
            cut = f"; {len(split)} of the images are used" if len(split) != split.findings.images else ""
            seen.setdefault(id(split.findings), f"Data, {part}: {split.findings}{cut}.")
        return [*seen.values(), *self._shared]

    # ---------------------------------------------------------------- cached features

    def prepare_features(self, backbone: Backbone, stage: str) -> None:
        """Compute the maps of a frozen backbone that ``fit``, ``validate`` or ``test`` needs, if they are cached.

        Raises:
            ValueError: When the backbone trains.
        """
        if not self.cache_features:
            return
        if backbone.trains != "nothing":
            raise ValueError(
                f"Expected a frozen backbone with data.cache_features, got trains={backbone.trains!r}. Set "
                "model.network.backbone.trains=nothing, or data.cache_features=false."
            )
        parts = {"fit": ["train", "val"], "validate": ["val"], "test": self.test_splits}.get(stage, [])
        rank, world = self.ranks()
        for part in parts:
            if part not in self._cached:
                mirrored = part == "train" and self.augment == "flip"
                device = None if self.trainer is None else self.trainer.strategy.root_device
                self._cached[part] = cached(
                    CocoDetection(self._splits[part], eval_transform(self.size, self.size), crowds=part != "train"),
                    backbone, self.size, mirrored=mirrored, seed=self.seed, rank=rank, world_size=world, device=device,
                    folder=fetch.data_root() / "features", labels=self._cached_labels(part),
                )  # fmt: skip
        if world > 1 and self.trainer is not None:
            self.trainer.strategy.barrier("features")

    # ---------------------------------------------------------------- batches

    def train_dataloader(self) -> KeyedLoader:
        """Return the training batches of this process."""
        self.setup()
        return self._loader("train", self.train_sampler(len(self._splits["train"])))

    def val_dataloader(self) -> KeyedLoader:
        """Return the validation batches of this process."""
        return self._evaluation("val")

    def test_dataloader(self) -> list[KeyedLoader]:
        """Return the test batches of this process, one loader for each of ``test_splits``."""
        self.setup()
        return [self._evaluation(part) for part in self.test_splits]

    def _evaluation(self, part: str) -> KeyedLoader:
        self.setup()
        return self._loader(part, self.eval_sampler(len(self._splits[part])))

    def _loader(self, part: str, sampler: EpochSampler | EvalSampler) -> KeyedLoader:
        if self.cache_features:
            return KeyedLoader(self._cached[part], sampler, collate_cached(self._cached[part]))
        transform = self._augmentation() if part == "train" else eval_transform(self.size, self.max_size)
        return KeyedLoader(self._dataset(part, transform), sampler, collate, num_workers=self.workers())

    def _dataset(self, part: str, transform: Transform) -> Any:
        """Return the items of a split, read from files; a task that needs more in its labels overrides this."""
        return CocoDetection(self._splits[part], transform, crowds=part != "train", seed=self.seed)

    def _cached_labels(self, part: str) -> Sequence[dict[str, Any]] | None:
        """Return the labels that go with cached maps; ``None`` for those of boxes."""
        return None

    def _augmentation(self) -> Transform:
        if self.augment == "nothing":
            return eval_transform(self.size, self.max_size)
        if self.augment == "flip":
            return train_transform([self.size], self.max_size, crop=None)
        return train_transform(
            self._scaled(480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
            self.max_size,
            crop=(self._scaled(384)[0], self._scaled(600)[0]),
            crop_scales=self._scaled(400, 500, 600),
        )

    def _scaled(self, *published: int) -> list[int]:
        """Scale DETR's sizes, which are for a short side of 800 pixels, to this one."""
        return [round(pixels * self.size / 800) for pixels in published]
