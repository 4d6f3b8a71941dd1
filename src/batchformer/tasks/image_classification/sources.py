"""Sources of images with class labels: arrays, list files or a folder, each read as training, validation and test part.

Axes: M images, K classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from batchformer.data import fetch, formats, lists
from batchformer.data.errors import DataError, DataNotFoundError
from batchformer.data.samplers import generator

DatasetName = Literal["fashion-mnist", "cifar10", "cifar100", "imagenet-lt", "places-lt", "inat18", "folder"]


@dataclass
class Part:
    """One split: the labels of its images, and the images in memory or as files.

    Attributes:
        labels: Class index of each image, (M,).
        images: Pixels, uint8, (M, C, H, W); ``None`` while the images are files.
        samples: Image files; ``None`` where the data comes as arrays.
    """

    labels: Tensor
    images: Tensor | None = None
    samples: lists.Samples | None = None

    def subset(self, indices: Tensor) -> "Part":
        """Return the part with the images at ``indices`` alone."""
        images = None if self.images is None else self.images[indices]
        samples = None if self.samples is None else self.samples.subset(indices)
        return Part(self.labels[indices], images, samples)


@dataclass(frozen=True)
class Source:
    """Settings of the reading: a data set, its place on the disk, and the split of data that has none.

    Attributes:
        dataset: A known data set, or ``"folder"``.
        root: The data root or the data's own folder; ``None`` means the default data root.
        lists: List files by split, for data given by lists.
        val_fraction: Share of unsplit data for validation, in [0, 1).
        test_fraction: Share of unsplit data for test, in [0, 1).
        seed: Seed of that split.
    """

    dataset: DatasetName
    root: str | Path | None
    lists: dict[str, Path]
    val_fraction: float
    test_fraction: float
    seed: int


def read_parts(source: Source) -> tuple[dict[str, Part], list[str]]:
    """Read the labels (and the images, where they come as arrays) of all three parts; fetch nothing.

    Where there is no validation part the test part takes its role, and the other way round.

    Args:
        source: Data set, folder, lists and split.

    Returns:
        The parts "train", "val" and "test", and the class names.

    Raises:
        DataNotFoundError: When the data is not there.
        DataError: When it is there and cannot be used.
    """
    if source.dataset in ("fashion-mnist", "cifar10", "cifar100"):
        return _read_arrays(source)
    if source.dataset == "folder" and "train" not in source.lists:
        if source.root is None:
            raise DataNotFoundError("the image folder", [], ["Give it: --data.root PATH, one sub-folder per class."])
        found = lists.read_folder(source.root)
        return _complete(found, source), next(iter(found.values())).classes
    return _read_lists(source)


def _read_arrays(source: Source) -> tuple[dict[str, Part], list[str]]:
    folder = fetch.require(source.dataset, source.root)
    read = formats.read_fashion_mnist if source.dataset == "fashion-mnist" else formats.read_cifar
    train, test = read(folder, train=True), read(folder, train=False)
    k = len(train.classes)
    for part in (train, test):
        wrong = sorted(set(part.labels[(part.labels < 0) | (part.labels >= k)].tolist()))
        if wrong:
            raise DataError(f"Expected labels from 0 to {k - 1} in {folder}, got {wrong}. Get the data again.")
    tested = Part(test.labels, test.images)
    return {"train": Part(train.labels, train.images), "val": tested, "test": tested}, train.classes


def _read_lists(source: Source) -> tuple[dict[str, Part], list[str]]:
    folder, files = _list_files(source)
    train = lists.read_list(files["train"], folder)
    found = {"all" if len(files) == 1 else "train": train}
    for split in ("val", "test"):
        if split in files:
            found[split] = lists.read_list(files[split], folder, classes=train.classes)
    return _complete(found, source), train.classes


def _list_files(source: Source) -> tuple[Path, dict[str, Path]]:
    """Return the folder that the paths in the lists are relative to, and the list files."""
    if source.dataset == "folder":
        return Path(source.root or source.lists["train"].parent).expanduser(), source.lists
    published = dict(zip(("train", "val", "test"), fetch.describe(source.dataset).files, strict=False))
    if set(published) <= set(source.lists):
        return Path(source.root or fetch.data_root()).expanduser(), source.lists
    folder = fetch.require(source.dataset, source.root)
    return folder, {split: folder / name for split, name in published.items()} | source.lists


def _complete(found: dict[str, lists.Samples], source: Source) -> dict[str, Part]:
    """Split data that has no split, and use validation for test or test for validation where one of them is missing."""
    parts = {name: Part(samples.labels, samples=samples) for name, samples in found.items()}
    if "all" in parts:
        whole = parts["all"]
        split = stratified_split(whole.labels, source.val_fraction, source.test_fraction, source.seed)
        parts = {name: whole.subset(indices) for name, indices in split.items()}
    parts = {name: part for name, part in parts.items() if len(part.labels)}
    if "train" not in parts or len(parts) < 2:
        raise DataError(
            f"Expected images for training and for validation or test, got only {', '.join(parts) or 'none'}. "
            "Raise val_fraction or test_fraction, or add images."
        )
    parts.setdefault("test", parts.get("val", parts["train"]))
    parts.setdefault("val", parts["test"])
    return parts


def stratified_split(labels: Tensor, val_fraction: float, test_fraction: float, seed: int) -> dict[str, Tensor]:
    """Split every class into training, validation and test images.

    A class with few images is served in this order: one image for training, one for test, one for validation, and
    only then the fractions. So a class of one image is trained on and never tested.

    Args:
        labels: Class of every image, (M,).
        val_fraction: Share for validation, 0 for none.
        test_fraction: Share for test, 0 for none.
        seed: Seed of the split.

    Returns:
        Ascending indices for "train", "val" and "test".

    Raises:
        DataError: When a fraction is negative, or when the two leave nothing to train on.

    Example:
        >>> parts = stratified_split(torch.tensor([0] * 10 + [1] * 2), 0.1, 0.2, seed=0)
        >>> [len(parts[name]) for name in ("train", "val", "test")]
        [8, 1, 3]
    """
    if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
        raise DataError(
            "Expected non-negative val_fraction and test_fraction with a sum below 1, got "
            f"{val_fraction} and {test_fraction}."
        )
    parts: dict[str, list[Tensor]] = {"train": [], "val": [], "test": []}
    for k in torch.unique(labels).tolist():
        own = (labels == k).nonzero().squeeze(1)
        own = own[torch.randperm(len(own), generator=generator(seed, int(k)))]
        n_test = _share(len(own), test_fraction, spare=2 if val_fraction and len(own) > 2 else 1)
        n_val = _share(len(own), val_fraction, spare=1 + n_test)
        parts["test"].append(own[:n_test])
        parts["val"].append(own[n_test : n_test + n_val])
        parts["train"].append(own[n_test + n_val :])
    return {name: torch.cat(indices).sort().values for name, indices in parts.items()}


def _share(n: int, fraction: float, *, spare: int) -> int:
    return min(max(1, round(n * fraction)), max(0, n - spare)) if fraction else 0
