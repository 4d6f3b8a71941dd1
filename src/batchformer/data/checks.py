"""Checks of all classes and image files before the first step; all problems of one kind are in one message."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from .atomic import write_text
from .errors import MOST_SHOWN, DataError, DataNotFoundError, listing
from .images import in_threads
from .lists import Samples, check_labels


def check_classes(counts: Tensor, classes: Sequence[str]) -> None:
    """Check that every class has a training image.

    Args:
        counts: Training images of each class, shape (K,).
        classes: Class names.

    Raises:
        DataError: Classes have no training image; the message lists all of them.
    """
    empty = [f"{k} ({classes[k]})" for k in (counts == 0).nonzero().squeeze(1).tolist()]
    if empty:
        raise DataError(
            f"Expected at least one training image per class, {len(empty)} of {len(classes)} classes have none:"
            f"{listing(empty)}"
        )


def check_samples(samples: Samples, *, what: str = "training", cache: Path | None = None, decode: bool = True) -> None:
    """Check that every file is there and, on request, that every image can be decoded to its end.

    Decoding runs in threads. Files that passed are remembered by path, size and time of change, so that later starts
    need not decode them again.

    Args:
        samples: Image files and labels to check.
        what: Word for this part of the data in the message.
        cache: Folder in which to remember the files that passed; ``None`` remembers nothing.
        decode: Also decode every image.

    Raises:
        DataNotFoundError: Files are missing; the message lists all of them.
        DataError: Images cannot be decoded; the message lists all of them with the reason.
    """
    check_labels(samples)
    unique = sorted(set(samples.paths))
    stamps = dict(zip(unique, in_threads(partial(_stamp, samples.root), unique, "looking for images"), strict=True))
    missing = [path for path in unique if stamps[path] is None]
    if missing:
        left = f"{len(missing) - MOST_SHOWN} more are missing. " if len(missing) > MOST_SHOWN else ""
        raise DataNotFoundError(
            f"{len(missing)} of {len(unique)} {what} images",
            [samples.root / path for path in missing[:MOST_SHOWN]],
            [f"{left}Point root to the folder that the paths are relative to, or take these images out of the list."],
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
    problems = in_threads(partial(_decoding_problem, samples.root), unseen, f"checking {what} images")
    good = {path: stamps[path] for path, problem in zip(unseen, problems, strict=True) if not problem}
    if memory and good:
        with suppress(OSError):  # a read-only home only costs the time of the next check
            write_text(memory, json.dumps(known | good))
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
