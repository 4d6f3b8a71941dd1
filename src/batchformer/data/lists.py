"""Which images there are and of which class: folders with one sub-folder per class, and list files "relative/path
label".

:func:`check_samples` looks at everything before the first step and reports all problems of one kind in one message.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm  # type: ignore[import-untyped]

from .errors import DataError, DataNotFoundError, listing

EXTENSIONS = frozenset([".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"])
"""File name endings that count as images; everything else in a folder is ignored."""

SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
"""Folder names that are read as ready-made splits, in lower case."""

_T = TypeVar("_T")
_R = TypeVar("_R")


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
        raise DataNotFoundError("The image folder", [root], ["Give a folder with one sub-folder per class."])
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
            "The list file", [file], ["Give the path of a text file with 'relative/path label' lines."]
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


def check_classes(counts: Tensor, classes: Sequence[str]) -> None:
    """Check that every class has a training image.

    Args:
        counts: Training images per class, shape (K,).
        classes: Class names.

    Raises:
        DataError: Classes without one, all of them in one message.
    """
    empty = [f"{k} ({classes[k]})" for k in (counts == 0).nonzero().squeeze(1).tolist()]
    if empty:
        raise DataError(
            f"Expected at least one training image per class, {len(empty)} of {len(classes)} classes have none:"
            f"{listing(empty)}"
        )


def check_samples(samples: Samples, *, what: str = "training", cache: Path | None = None, decode: bool = True) -> None:
    """Check that every file is there and, on request, that every image can be decoded to its end.

    Decoding runs in threads; files that passed are remembered by (path, size, time of change), so later starts only
    look at the files' metadata.

    Args:
        samples: What to check.
        what: Which part of the data this is, for the message.
        cache: Folder in which to remember what passed; ``None`` remembers nothing.
        decode: Also decode every image.

    Raises:
        DataNotFoundError: Missing files, all of them in one message.
        DataError: Images that cannot be decoded, all of them in one message with the reason.
    """
    check_labels(samples)
    unique = sorted(set(samples.paths))
    stamps = dict(zip(unique, _in_threads(partial(_stamp, samples.root), unique, "looking for images"), strict=True))
    missing = [path for path in unique if stamps[path] is None]
    if missing:
        raise DataNotFoundError(
            f"{len(missing)} of {len(unique)} {what} images{listing(missing)}\n",
            [samples.root],
            ["Point root to the folder that the paths are relative to.", "Or take the missing images out of the list."],
        )
    if not decode:
        return
    memory = (
        cache / f"{hashlib.blake2b(str(samples.root.resolve()).encode(), digest_size=8).hexdigest()}.json"
        if cache
        else None
    )
    known = _remembered(memory)
    unseen = [path for path in unique if known.get(path) != stamps[path]]
    problems = _in_threads(partial(_decoding_problem, samples.root), unseen, f"checking {what} images")
    good = {path: stamps[path] for path, problem in zip(unseen, problems, strict=True) if not problem}
    if memory and good:
        _remember(memory, known | good)
    corrupt = [f"{path}: {problem}" for path, problem in zip(unseen, problems, strict=True) if problem]
    if corrupt:
        raise DataError(
            f"Expected images that can be decoded in {samples.root}, "
            f"{len(corrupt)} of {len(unique)} {what} images cannot:{listing(corrupt)}\nReplace them or take them out."
        )


def _stamp(root: Path, path: str) -> list[int] | None:
    try:
        status = (root / path).stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def _decoding_problem(root: Path, path: str) -> str:
    try:
        with Image.open(root / path) as image:
            image.draft("RGB", (64, 64))  # a JPEG is read to its end all the same, at a fraction of the time
            image.load()
    except Exception as problem:
        return str(problem) or type(problem).__name__
    return ""


def _remembered(memory: Path | None) -> dict[str, list[int] | None]:
    try:
        known = json.loads(memory.read_text("utf-8")) if memory else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, known: dict[str, list[int] | None]) -> None:
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=memory.parent, delete=False, encoding="utf-8") as out:
            json.dump(known, out)
        os.replace(out.name, memory)
    except OSError:  # a read-only home only costs the time of the next check
        return


def _in_threads(function: Callable[[_T], _R], items: Sequence[_T], title: str) -> list[_R]:
    """Map in threads, in order, with a progress bar on a terminal."""
    with ThreadPoolExecutor(max_workers=min(32, 4 * (os.cpu_count() or 1))) as pool:
        return list(tqdm(pool.map(function, items), title, len(items), disable=None, leave=False))


def decode(path: Path, channels: int) -> Image.Image:
    """Open an image of any kind as 8-bit grey (``channels=1``) or RGB (3), upright and opaque.

    Transparent pixels become white, 16-bit grey is scaled down, camera orientation is applied, the first frame counts.

    Raises:
        OSError: Pillow cannot decode the file.
    """
    with Image.open(path) as opened:
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I") or image.mode == "F":
            pixels = np.asarray(image, dtype=np.float64)
            image = Image.fromarray((pixels / (257 if pixels.max() > 255 else 1)).clip(0, 255).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("L" if channels == 1 else "RGB")


def probe(samples: Samples, most: int = 2000) -> tuple[int, int]:
    """Look at the headers of up to ``most`` evenly spaced images.

    Returns:
        The channels (1 if all are grey, else 3) and the median of the images' short sides in pixels.
    """
    step = -(-len(samples) // most)
    headers = _in_threads(partial(_header, samples.root), samples.paths[::step], "reading image sizes")
    grey = all(is_grey for is_grey, _ in headers)
    return (1 if grey else 3), int(np.median([side for _, side in headers]))


def _header(root: Path, path: str) -> tuple[bool, int]:
    with Image.open(root / path) as image:
        return image.mode[0] in "1LIF" and image.mode != "LAB", min(image.size)


def decode_all(samples: Samples, size: int, channels: int) -> Tensor:
    """Decode all images once, short side resized to ``size`` and the centre cut out.

    Returns:
        uint8 images of shape (M, channels, size, size).
    """
    images = torch.empty(len(samples), channels, size, size, dtype=torch.uint8)

    def fill(index: int) -> None:
        image = ImageOps.fit(
            decode(samples.root / samples.paths[index], channels), (size, size), Image.Resampling.BILINEAR
        )
        images[index] = torch.from_numpy(np.array(image)).view(size, size, channels).permute(2, 0, 1)

    _in_threads(fill, range(len(samples)), "decoding images")
    return images
