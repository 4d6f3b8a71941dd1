"""Which images there are and of which class: folders with one sub-folder per class, and list files "relative/path
label".
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import DataError, DataNotFoundError, listing

EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"])
"""File name endings that count as images; everything else in a folder is ignored."""

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
        root: The folder that ``paths`` are relative to.
        paths: One path per image, M of them.
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
        """Images per class, shape (K,)."""
        return torch.bincount(self.labels, minlength=len(self.classes))

    def subset(self, indices: Tensor) -> "Samples":
        """Return the samples at ``indices``, in that order."""
        return Samples(self.root, [self.paths[i] for i in indices.tolist()], self.labels[indices], self.classes)


def joined(parts: Sequence[Samples]) -> Samples:
    """Several parts of one data set as one, with paths below the folder that their roots share.

    Args:
        parts: At least one; of the same classes.
    """
    root = Path(os.path.commonpath([part.root.absolute() for part in parts]))
    paths = [(part.root.absolute() / path).relative_to(root).as_posix() for part in parts for path in part.paths]
    return Samples(root, paths, torch.cat([part.labels for part in parts]), parts[0].classes)


def read_folder(root: str | Path) -> dict[str, Samples]:
    """Read a folder with one sub-folder per class; a class's images may lie deeper inside it.

    Ready-made splits (``train`` and ``val`` and/or ``test`` below the root, under the names in :data:`SPLITS`) are
    kept; their classes are those of ``train``. Anything hidden and every file that is not an image is ignored.

    Args:
        root: The folder.

    Returns:
        ``{"all": samples}``, or the splits found: ``{"train": ..., "val": ..., "test": ...}``.

    Raises:
        DataNotFoundError: The folder does not exist.
        DataError: It holds no class folders, fewer than two classes, classes without (training) images, or a split
            has classes that the training split lacks.
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
            f"Expected in {root} only classes of the training split; these are not there:{listing(unknown)}"
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
    """Image files, and those below folders, in order.

    Args:
        paths: Files are taken whatever they are called, folders are searched by :data:`EXTENSIONS`.

    Raises:
        DataError: For paths that do not exist and folders without an image, all in one message.

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
    """Read a list file with one ``relative/path label`` a line, as published for ImageNet-LT, Places-LT and
    iNaturalist.

    The label is the last word of the line, so paths may hold blanks; empty lines are skipped; a leading ``/`` is
    ignored.

    Args:
        file: The list file (UTF-8).
        root: The folder that its paths are relative to.
        classes: Class names, or their number; ``None`` takes the largest label of the file.

    Raises:
        DataNotFoundError: The list file does not exist.
        DataError: Lines that cannot be read, labels out of range, or nothing in the file; all offending lines in
            one message.
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
        samples: What to check.
        places: Where each sample was read, for the message.

    Raises:
        DataError: Labels out of range, all of them in one message.
    """
    k = len(samples.classes)
    wrong = ((samples.labels < 0) | (samples.labels >= k)).nonzero().squeeze(1).tolist()
    if wrong:
        lines = [f"{places[i] + ': ' if places else ''}{samples.paths[i]} has {int(samples.labels[i])}" for i in wrong]
        raise DataError(
            f"Expected labels from 0 to {k - 1} ({k} classes), got {len(wrong)} out of range:{listing(lines)}"
        )
