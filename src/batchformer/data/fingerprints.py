"""Identity of data: hashes of files, remembered between runs, and the fingerprint of a split that is made of them.

A fingerprint is a function of content alone: names relative to the root, labels, order and bytes. The place of the data
on the disk, the times of its files and the way in which it is read do not change it.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from .atomic import write_text
from .errors import DataError, listing
from .images import in_threads

__all__ = ["FileMemory", "Seen", "Stamp", "file_hash", "file_hashes", "fingerprint", "shared_images", "stamps"]

SETTLED_NS = 2_000_000_000
"""Age in nanoseconds from which the times of a file tell that it has not changed; file systems count in steps."""


_AT_ONCE = 256
"""Files that a thread looks for at once."""


class Stamp(NamedTuple):
    """Size in bytes of a file, and the times in nanoseconds at which its content and its entry were changed last."""

    size: int
    modified: int
    changed: int


class Seen(NamedTuple):
    """Knowledge about a file of a certain stamp: the hash of its bytes ("" if unknown), and whether it was decoded."""

    digest: str = ""
    decoded: bool = False


class FileMemory:
    """Knowledge about the files below a folder, kept in a file between runs.

    Args:
        root: Folder that the paths of the files are relative to.
        folder: Folder of the memory; ``None`` remembers nothing.

    Example:
        >>> FileMemory(Path("images"), None).known("a.jpg", Stamp(3, 0, 0))
        Seen(digest='', decoded=False)
    """

    def __init__(self, root: Path, folder: Path | None) -> None:
        name = hashlib.blake2b(str(root.resolve()).encode(), digest_size=8).hexdigest()
        self._file = None if folder is None else folder / f"{name}.json"
        self._entries = self._read()

    def known(self, path: str, now: Stamp) -> Seen:
        """Return what is known of a file, nothing if its stamp has changed."""
        entry = self._entries.get(path)
        if not isinstance(entry, list) or len(entry) != 5 or entry[:3] != [*now]:
            return Seen()
        return Seen(str(entry[3]), bool(entry[4]))

    def remember(self, seen: Mapping[str, tuple[Stamp, Seen]]) -> None:
        """Add files. The hash of one that has changed just now is not kept, since the next change may look alike."""
        if self._file is None or not seen:
            return
        settled = time.time_ns() - SETTLED_NS
        entries = {
            path: [*now, found.digest if max(now.modified, now.changed) < settled else "", int(found.decoded)]
            for path, (now, found) in seen.items()
        }
        with suppress(OSError):  # a read-only home only costs the time of the next look
            write_text(self._file, json.dumps({**self._read(), **entries}))

    def _read(self) -> dict[str, Any]:
        try:
            known = json.loads(self._file.read_text("utf-8")) if self._file else {}
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def stamps(root: Path, paths: Sequence[str], title: str) -> dict[str, Stamp]:
    """Return size and times of each file that is there, by path; files are looked for in threads."""
    parts = [paths[start : start + _AT_ONCE] for start in range(0, len(paths), _AT_ONCE)]
    found = (stamp for part in in_threads(partial(_stamps, root), parts, title) for stamp in part)
    return {path: stamp for path, stamp in zip(paths, found, strict=True) if stamp is not None}


def _stamps(root: Path, paths: Sequence[str]) -> list[Stamp | None]:
    return [_stamp(os.path.join(root, path)) for path in paths]


def _stamp(file: str) -> Stamp | None:
    try:
        status = os.stat(file)
    except OSError:
        return None
    return Stamp(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def file_hash(file: Path) -> str:
    """Return the hash of the bytes of a file (BLAKE2b of 128 bits, hexadecimal).

    Raises:
        OSError: The file cannot be read.
    """
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def file_hashes(root: Path, paths: Sequence[str], title: str, *, cache: Path | None = None) -> dict[str, str]:
    """Return the hash of the bytes of each file, by path. Files are read in threads, and only those that changed.

    Args:
        root: Folder that the paths are relative to.
        paths: Files; a path may come more than once.
        title: Title of the progress bar.
        cache: Folder in which hashes are remembered by path, size and times; ``None`` remembers nothing.

    Raises:
        DataError: Files cannot be read; the message lists all of them.
    """
    memory, unique = FileMemory(root, cache), sorted(set(paths))
    found = stamps(root, unique, "looking for files")
    seen = {path: memory.known(path, found[path]) if path in found else Seen() for path in unique}
    unknown = [path for path, found in seen.items() if not found.digest]
    read = dict(zip(unknown, in_threads(partial(_hash_or_problem, root), unknown, title), strict=True))
    if wrong := [f"{path}: {problem}" for path, (digest, problem) in read.items() if not digest]:
        raise DataError(f"Expected files that can be read in {root}, {len(wrong)} cannot:{listing(wrong)}")
    hashed = {path: seen[path]._replace(digest=digest) for path, (digest, _) in read.items()}
    memory.remember({path: (found[path], now) for path, now in hashed.items()})
    return {path: now.digest for path, now in {**seen, **hashed}.items()}


def _hash_or_problem(root: Path, path: str) -> tuple[str, str]:
    try:
        return file_hash(root / path), ""
    except OSError as error:
        return "", error.strerror or str(error)


def fingerprint(*parts: Any) -> str:
    """Return the fingerprint of values in their order, 16 hexadecimal digits.

    Args:
        *parts: Tensors of any shape, and plain values that JSON can hold.

    Example:
        >>> fingerprint(["cat", "dog"], [0, 1])
        'd974974e3c59505b'
    """
    whole = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Tensor):
            array = np.ascontiguousarray(part.detach().cpu().numpy())
            whole.update(f"{array.dtype} {array.shape}\n".encode())
            whole.update(array.reshape(-1).view(np.uint8).data)
        else:
            text = json.dumps(part, sort_keys=True).encode()
            whole.update(f"{len(text)}\n".encode() + text)
    return whole.hexdigest()


def shared_images(train: Sequence[str], tested: Sequence[str], split: str) -> str | None:
    """Return the sentence about images of a test split that are training images as well; ``None`` if there are none.

    Args:
        train: Hashes of the training images.
        tested: Hashes of the images of the test split.
        split: Name of the test split.

    Example:
        >>> print(shared_images(["a", "b"], ["b", "c"], "test"))
        1 of 2 images of the split test is a training image as well (the same bytes): results on it show what the \
network remembers. Take it out of one of the two splits.
    """
    known = set(train)
    shared = sum(digest in known for digest in tested)
    if not shared:
        return None
    are, it = ("is a training image", "it") if shared == 1 else ("are training images", "them")
    return (
        f"{shared} of {len(tested)} images of the split {split} {are} as well (the same bytes): results on {it} show "
        f"what the network remembers. Take {it} out of one of the two splits."
    )
