"""Where long-tailed data comes from: arrays, list files or a folder, each as training, validation and test part."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from batchformer.data import fetch, formats, lists
from batchformer.data.errors import DataError, DataNotFoundError
from batchformer.tasks.longtail.imbalance import stratified_split

DatasetName = Literal["fashion-mnist", "cifar10", "cifar100", "imagenet-lt", "places-lt", "inat18", "folder"]


@dataclass
class Part:
    """One split: images in memory, or files."""

    labels: Tensor
    images: Tensor | None = None
    samples: lists.Samples | None = None

    def subset(self, indices: Tensor) -> "Part":
        """Return the images at ``indices``."""
        images = None if self.images is None else self.images[indices]
        samples = None if self.samples is None else self.samples.subset(indices)
        return Part(self.labels[indices], images, samples)


@dataclass(frozen=True)
class Source:
    """What to read.

    Attributes:
        dataset: A data set, or ``"folder"``.
        root: The data root or the data's own folder; ``None`` means the default data root.
        lists: List files by split, for data given by lists.
        val_fraction: Share of unsplit data for validation.
        test_fraction: Share of unsplit data for test.
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

    A part that is missing is stood in for: validation by test, test by validation.

    Returns:
        The parts "train", "val" and "test", and the class names.

    Raises:
        DataNotFoundError: The data is not there.
        DataError: It is there and cannot be used.
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
    """Split what has no split, and let validation and test stand in for each other where one is missing."""
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
