"""Checks of all classes and image files before the first step; all problems of one kind are in one message."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from .errors import MOST_SHOWN, DataError, DataNotFoundError, listing
from .fingerprints import FileMemory, Seen, file_hash, stamps
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


def check_samples(
    samples: Samples, *, what: str = "training", cache: Path | None = None, decode: bool = True
) -> dict[str, str]:
    """Check that every file is there and, on request, that every image can be decoded to its end; hash all files.

    Files are read in threads. Those that passed are remembered by path, size and times of change, with their hashes, so
    that later starts need not read them again.

    Args:
        samples: Image files and labels to check.
        what: Word for this part of the data in the message.
        cache: Folder in which to remember the files that passed; ``None`` remembers nothing.
        decode: Also decode every image.

    Returns:
        Hash of the bytes of each file, by path.

    Raises:
        DataNotFoundError: Files are missing; the message lists all of them.
        DataError: Images cannot be read or decoded; the message lists all of them with the reason.
    """
    check_labels(samples)
    unique = sorted(set(samples.paths))
    found = stamps(samples.root, unique, "looking for images")
    missing = [path for path in unique if path not in found]
    if missing:
        left = f"{len(missing) - MOST_SHOWN} more are missing. " if len(missing) > MOST_SHOWN else ""
        raise DataNotFoundError(
            f"{len(missing)} of {len(unique)} {what} images",
            [samples.root / path for path in missing[:MOST_SHOWN]],
            [f"{left}Point root to the folder that the paths are relative to, or take these images out of the list."],
        )
    memory = FileMemory(samples.root, cache)
    seen = {path: memory.known(path, now) for path, now in found.items()}
    unseen = [(path, known) for path, known in seen.items() if not known.digest or (decode and not known.decoded)]
    looks = in_threads(partial(_look, samples.root, decode), unseen, f"checking {what} images")
    good = {path: now for (path, _), (now, problem) in zip(unseen, looks, strict=True) if not problem}
    memory.remember({path: (found[path], now) for path, now in good.items()})
    corrupt = [f"{path}: {problem}" for (path, _), (_, problem) in zip(unseen, looks, strict=True) if problem]
    if corrupt:
        raise DataError(
            f"Expected images that can be {'decoded' if decode else 'read'} in {samples.root}, "
            f"{len(corrupt)} of {len(unique)} {what} images cannot:{listing(corrupt)}\nReplace them or take them out."
        )
    return {path: known.digest for path, known in {**seen, **good}.items()}


def _look(root: Path, decode: bool, entry: tuple[str, Seen]) -> tuple[Seen, str]:
    """Hash and decode a file as far as that was not done before; return what is known now, and the problem."""
    path, known = entry
    try:
        # Hashing comes first: the decoder then finds the file in memory.
        digest = known.digest or file_hash(root / path)
    except OSError as error:
        return known, error.strerror or str(error)
    problem = _decoding_problem(root, path) if decode and not known.decoded else ""
    return Seen(digest, known.decoded or decode), problem


def _decoding_problem(root: Path, path: str) -> str:
    try:
        with Image.open(root / path) as image:
            image.draft("RGB", (64, 64))  # a JPEG is read to its end all the same, at a fraction of the time
            image.load()
    except Exception as problem:
        return str(problem) or type(problem).__name__
    return ""
