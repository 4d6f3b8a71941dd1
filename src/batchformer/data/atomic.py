"""A scratch folder beside its target, and the removal of those that killed processes left."""

import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = ["scratch_beside"]


@contextmanager
def scratch_beside(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, whose content is to be renamed to it; the folder is gone in the end.

    A process that is killed leaves its own. Those of the same target are removed first, unless a process uses them:
    each is locked while it is in use, and the kernel lets go of it however the process ends. On a file system without
    locks they stay.

    Args:
        target: What the content becomes; the folder around it is made if absent.

    Example:
        >>> with tempfile.TemporaryDirectory() as here:
        ...     with scratch_beside(Path(here) / "set") as scratch:
        ...         scratch.is_dir(), scratch.parent == Path(here)
        ...     list(Path(here).iterdir())
        (True, True)
        []
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name that nobody else gives: what matches it is deleted.
    prefix = f".{target.name}.batchformer-"
    for path in list(target.parent.iterdir()):
        if re.fullmatch(re.escape(prefix) + "[a-z0-9_]{8}", path.name):
            _remove_unused(path)
    scratch, held = _new(prefix, target.parent)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if held is not None:
            os.close(held)


def _new(prefix: str, parent: Path) -> tuple[Path, int | None]:
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        try:
            return scratch, _lock(scratch)
        except (BlockingIOError, FileNotFoundError):  # another process saw it before it was locked, and removes it
            continue
        except OSError:  # no locks here
            return scratch, None


def _remove_unused(scratch: Path) -> None:
    with suppress(OSError):  # in use, gone already, somebody else's, or no locks here
        held = _lock(scratch)
        shutil.rmtree(scratch, ignore_errors=True)
        os.close(held)


def _lock(folder: Path) -> int:
    """The lock, which closing lets go of.

    Raises:
        BlockingIOError: Another process holds it.
        FileNotFoundError: The folder is gone.
        OSError: There are no locks here.
    """
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.stat()
    except OSError:
        os.close(held)
        raise
    return held
