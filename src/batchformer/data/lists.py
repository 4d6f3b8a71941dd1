"""Image files and their classes, read from folders with one sub-folder for each class or from list files."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import DataError, DataNotFoundError, listing

EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"])
"""Endings of the file names that count as images; all other files in a folder are ignored."""

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Folder names that are read as ready-made splits, in lower case."""


@dataclass(frozen=True)
class Samples:
    """Image files with their classes.

    Attributes:
        root: Folder that ``paths`` are relative to.
        paths: Path of each image, M of them.
        labels: Class indices, shape (M,), int64.
        classes: Class names, K of them.
    """

    root: Path
    paths: list[str]
    labels: Tensor
    classes: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def counts(self) -> Tensor:
        """Number of images of each class, shape (K,)."""
        return torch.bincount(self.labels, minlength=len(self.classes))

    def subset(self, indices: Tensor) -> "Samples":
        """Return the samples at ``indices``, in that order."""
        return Samples(self.root, [self.paths[i] for i in indices.tolist()], self.labels[indices], self.classes)


def joined(parts: Sequence[Samples]) -> Samples:
    """Join several parts of one data set; paths are then relative to the folder that their roots share.

    Args:
        parts: Parts with the same classes, at least one.
    """
    root = Path(os.path.commonpath([part.root.absolute() for part in parts]))
    paths = [(part.root.absolute() / path).relative_to(root).as_posix() for part in parts for path in part.paths]
    return Samples(root, paths, torch.cat([part.labels for part in parts]), parts[0].classes)


def read_folder(root: str | Path) -> dict[str, Samples]:
    """Read a folder with one sub-folder for each class, inside which images may lie at any depth.

    Ready-made splits are kept: ``train`` with ``val`` or ``test`` or both below the root, under the names in
    :data:`SPLITS`. Their classes are those of ``train``. Hidden files and files that are not images are ignored.

    Args:
        root: Folder of the data set.

    Returns:
        ``{"all": samples}``, or the splits that are there: ``{"train": ..., "val": ..., "test": ...}``.

    Raises:
        DataNotFoundError: The folder does not exist.
        DataError: It has fewer than two classes, a class has no (training) image, or a split has a class that the
            training split lacks.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise DataNotFoundError("the image folder", [root], ["Give a folder with one sub-folder per class."])
    splits = _split_folders(root)
    if set(splits) == {"train"}:
        return {"all": _read_classes(splits["train"], None)}
    if len(splits) < 2:
        return {"all": _read_classes(root, None)}
    if "train" not in splits:
        raise DataError(
            f"Expected a train folder beside {', '.join(splits)} in {root}, found none. Add it or rename one."
        )
    train = _read_classes(splits["train"], None)
    return {
        split: train if split == "train" else _read_classes(folder, train.classes) for split, folder in splits.items()
    }


def _split_folders(root: Path) -> dict[str, Path]:
    """Return the split folders, if *all* visible folders of the root are splits that hold folders themselves."""
    inside = {folder.name.lower(): folder for folder in _folders(root)}
    names = {alias: split for split, aliases in SPLITS.items() for alias in aliases}
    if not inside or not all(name in names and _folders(folder) for name, folder in inside.items()):
        return {}
    found = {names[name]: folder for name, folder in inside.items()}
    return {split: found[split] for split in SPLITS if split in found} if len(found) == len(inside) else {}


def _folders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__")))


def _read_classes(root: Path, classes: list[str] | None) -> Samples:
    folders = _folders(root)
    found = [folder.name for folder in folders]
    if classes is not None and (unknown := [name for name in found if name not in set(classes)]):
        raise DataError(
            f"Expected in {root} only classes of the training split, got others:{listing(unknown)}\n"
            "Add them to the training split, or remove them here."
        )
    if classes is None and len(found) < 2:
        loose = sum(entry.suffix.lower() in EXTENSIONS for entry in root.iterdir())
        raise DataError(
            f"Expected at least two sub-folders, one per class, in {root}; found {len(found)} and "
            f"{loose} image(s) directly in it. Sort the images into one folder per class."
        )
    classes = found if classes is None else classes
    paths: list[str] = []
    labels: list[int] = []
    for folder in folders:
        images = [path.relative_to(root).as_posix() for path in _images(folder)]
        paths += images
        labels += [classes.index(folder.name)] * len(images)
    samples = Samples(root, paths, torch.tensor(labels, dtype=torch.int64), classes)
    empty = [folder.name for folder, n in zip(folders, samples.counts.tolist(), strict=False) if n == 0]
    if found == classes and empty:
        raise DataError(f"Expected images in every class folder of {root}; {len(empty)} have none:{listing(empty)}")
    return samples


def _images(folder: Path) -> Iterable[Path]:
    for place, inner, files in os.walk(folder, followlinks=True):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield Path(place, name)


def image_files(paths: Sequence[str | Path]) -> list[Path]:
    """List image files and the images inside folders, in order.

    Args:
        paths: Files, which are taken whatever their names, and folders, which are searched for :data:`EXTENSIONS`.

    Raises:
        DataError: Paths do not exist, or folders hold no image; the message lists all of them.

    Example:
        >>> image_files(["no/such/folder"])
        Traceback (most recent call last):
        batchformer.data.errors.DataError: Expected image files, or folders with images, got:
          no/such/folder: does not exist
    """
    found: list[Path] = []
    problems = []
    for path in map(Path, paths):
        inside = sorted(_images(path)) if path.is_dir() else [path] if path.exists() else []
        if not inside:
            problems.append(f"{path}: {'has no image' if path.exists() else 'does not exist'}")
        found += inside
    if problems:
        raise DataError(f"Expected image files, or folders with images, got:{listing(problems)}")
    return found


def read_list(file: str | Path, root: str | Path, *, classes: Sequence[str] | int | None = None) -> Samples:
    """Read a list file with a line ``relative/path label`` for each image.

    ImageNet-LT, Places-LT and iNaturalist are published with such files.
    The label is the last word of the line, so that paths may contain blanks. Empty lines are skipped, and a ``/`` at
    the start of a path is ignored.

    Args:
        file: List file in UTF-8.
        root: Folder that its paths are relative to.
        classes: Class names, or their number; ``None`` takes the largest label of the file.

    Raises:
        DataNotFoundError: The list file does not exist.
        DataError: Lines cannot be read, labels are out of range, or the file is empty; the message lists all lines.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise DataNotFoundError(
            "the list file", [file], ["Give the path of a text file with 'relative/path label' lines."]
        )
    rows = [(n, line.rsplit(None, 1)) for n, line in enumerate(file.read_text("utf-8").splitlines(), 1) if line.strip()]
    wrong = [f"line {n}: {' '.join(row)!r}" for n, row in rows if len(row) != 2 or not row[1].lstrip("-").isdigit()]
    if wrong:
        raise DataError(f"Expected 'relative/path label' in every line of {file}, got:{listing(wrong)}")
    if not rows:
        raise DataError(f"Expected 'relative/path label' lines in {file}, got an empty file.")
    labels = torch.tensor([int(row[1]) for _, row in rows], dtype=torch.int64)
    if classes is None:
        classes = max(int(labels.max()) + 1, 1)
    names = [str(k) for k in range(classes)] if isinstance(classes, int) else list(classes)
    samples = Samples(Path(root).expanduser(), [row[0].lstrip("/") for _, row in rows], labels, names)
    check_labels(samples, [f"{file.name}, line {n}" for n, _ in rows])
    return samples


def check_labels(samples: Samples, places: Sequence[str] | None = None) -> None:
    """Check that all labels are in 0 .. K-1.

    Args:
        samples: Samples to check.
        places: Place where each sample was read, for the message.

    Raises:
        DataError: Labels are out of range; the message lists all of them.
    """
    k = len(samples.classes)
    wrong = ((samples.labels < 0) | (samples.labels >= k)).nonzero().squeeze(1).tolist()
    if wrong:
        lines = [f"{places[i] + ': ' if places else ''}{samples.paths[i]} has {int(samples.labels[i])}" for i in wrong]
        raise DataError(
            f"Expected labels from 0 to {k - 1} ({k} classes), got {len(wrong)} out of range:{listing(lines)}"
        )
