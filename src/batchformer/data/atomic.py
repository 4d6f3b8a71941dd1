"""Files and folders that are whole or not there, and folders that belong to one process at a time.

Only the standard library is imported at the top, so that listing data sets stays quick.
"""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["alone_in", "atomic_file", "atomic_folder", "write_json", "write_text"]

_LOCK = ".lock"


@contextmanager
def atomic_file(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """Give a path to write a file to, which takes the place of ``path`` when the block ends without an error.

    A reader sees the old file or the new one, never half of it, even if the process is killed. The leftovers of a
    killed process are removed when the same file is written the next time.

    Args:
        path: File to write; its folder is made if it is absent.
        keep: Keep a file that is there already, or that another process writes meanwhile.

    Example:
        >>> with tempfile.TemporaryDirectory() as here:
        ...     with atomic_file(Path(here) / "names.txt") as new:
        ...         length = new.write_text("red, green")
        ...     os.listdir(here), (Path(here) / "names.txt").read_text()
        (['names.txt'], 'red, green')
    """
    with _scratch_folder(path) as scratch:
        new = scratch / f"new{path.suffix}"
        yield new
        with new.open("rb+") as written:
            os.fsync(written.fileno())
        if keep:
            with suppress(FileExistsError):
                os.link(new, path)
        else:
            os.replace(new, path)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file with :func:`atomic_file`; line ends are kept as they are."""
    with atomic_file(path) as new, new.open("w", encoding="utf-8", newline="") as file:
        file.write(text)


def write_json(path: Path, content: Any) -> None:
    """Write an indented JSON file with :func:`atomic_file`."""
    write_text(path, json.dumps(content, indent=2) + "\n")


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a path to make a folder at, which takes the place of ``target`` when the block ends without an error.

    The folder around it is empty, belongs to this process and is removed at the end, so that the block may work there.
    The leftovers of a killed process are removed when the same target is made the next time.

    Args:
        target: Folder to make; one that is there already is replaced.

    Example:
        >>> with tempfile.TemporaryDirectory() as here:
        ...     with atomic_folder(Path(here) / "set") as new:
        ...         new.mkdir()
        ...         length = (new / "names.txt").write_text("red, green")
        ...     os.listdir(here), os.listdir(Path(here) / "set")
        (['set'], ['names.txt'])
    """
    with _scratch_folder(target) as scratch:
        new = scratch / "new"
        yield new
        if target.exists():  # os.replace cannot overwrite a folder that has files
            os.replace(target, scratch / "replaced")
        os.replace(new, target)


@contextmanager
def alone_in(folder: Path, patience: float = 5.0) -> Iterator[None]:
    """Hold a folder while this process writes into it; the folder is made if absent and removed at the end if empty.

    The hidden lock file inside is gone afterwards. When the process is killed the file stays, but the operating system
    releases the lock at once. On a file system without locks nothing is held.

    Args:
        folder: Folder to hold.
        patience: Seconds to wait for another process that is about to end, such as a run that was just killed.

    Raises:
        BlockingIOError: Another process holds the folder.

    Example:
        >>> with tempfile.TemporaryDirectory() as here:
        ...     with alone_in(Path(here) / "run"):
        ...         (Path(here) / "run").is_dir()
        ...     os.listdir(here)
        True
        []
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = _lock(folder, patience)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / _LOCK).unlink()  # while it is held: a process that waits for this very file then looks again
        lock.release()
        with suppress(OSError):
            folder.rmdir()


@contextmanager
def _scratch_folder(target: Path) -> Iterator[Path]:
    """Make an empty folder beside ``target``, removed at the end, and remove those that killed processes left.

    Each is locked while it is in use, so that those of living processes stay. On a file system without locks all stay.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    # Nobody else gives such a name: a folder that matches it is deleted.
    prefix = f".{target.name}.batchformer-"
    for path in list(target.parent.iterdir()):
        if re.fullmatch(re.escape(prefix) + "[a-z0-9_]{8}", path.name) and path.is_dir() and not path.is_symlink():
            with suppress(BlockingIOError):
                _remove_and_release(path, _lock(path))
    while True:
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
        with suppress(BlockingIOError):  # another process takes it for one that was left behind
            lock = _lock(scratch)
            break
    try:
        yield scratch
    finally:
        _remove_and_release(scratch, lock, even_without_lock=True)


def _remove_and_release(scratch: Path, lock: "BaseFileLock", *, even_without_lock: bool = False) -> None:
    if lock.is_locked or even_without_lock:
        shutil.rmtree(scratch, ignore_errors=True)
    lock.release()


def _lock(folder: Path, patience: float = 0.0) -> "BaseFileLock":
    """Lock a folder by a file inside it; on a file system without locks the result is not locked.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    from filelock import FileLock, Timeout

    # Not the library's soft lock, which would outlive a killed process. Forked processes do not inherit this one.
    lock = FileLock(folder / _LOCK, timeout=patience, fallback_to_soft=False)
    while True:
        try:
            lock.acquire(poll_interval=0.05)
        except Timeout:
            raise BlockingIOError(
                f"Expected {folder} for this process alone, but another process is working there. Wait for it or end "
                "it, then go on with --resume; or choose another --name."
            ) from None
        except FileNotFoundError:  # the process that held the folder has just removed it; the next attempt makes it
            continue
        except OSError:  # this file system has no locks, or the folder cannot be written to
            pass
        return lock
