"""One process at a time in a folder."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_HELD: set[int] = set()


@contextmanager
def alone_in(folder: Path, patience: float = 5.0) -> Iterator[None]:
    """Hold a folder while something writes into it; it is made if absent, and removed in the end if empty.

    The kernel lets go of it however the process ends. On a file system without locks nothing is held.

    Args:
        folder: The folder itself is locked: no file is left in it.
        patience: Seconds to wait for a process that is about to end, as the run of a comparison that was killed.

    Raises:
        BlockingIOError: When another process holds the folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as here:
        ...     with alone_in(Path(here) / "run"):
        ...         (Path(here) / "run").is_dir()
        True
    """
    end = time.monotonic() + patience
    while (held := _hold(folder)) is None:
        if time.monotonic() > end:
            raise BlockingIOError(
                f"Expected {folder} for this process alone, but another one is at work there. Wait for it or end it, "
                "then go on with --resume; or choose another --name."
            )
        time.sleep(0.05)
    _HELD.add(held)
    try:
        yield
    finally:
        with suppress(OSError):
            folder.rmdir()
        _release(held)


def _hold(folder: Path) -> int | None:
    folder.mkdir(parents=True, exist_ok=True)
    here = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(here, fcntl.LOCK_EX | fcntl.LOCK_NB)
        same = folder.exists() and os.path.samestat(os.fstat(here), folder.stat())
    except BlockingIOError:
        same = False
    except OSError:  # no locks here, as on some network file systems
        return here
    if same:
        return here
    os.close(here)  # held by another process, or removed by one meanwhile
    return None


def _release(held: int) -> None:
    if held in _HELD:
        _HELD.remove(held)
        os.close(held)


def _release_all() -> None:
    for held in list(_HELD):
        _release(held)


# A forked worker shares its parent's lock and would keep it for a while after the parent was killed.
os.register_at_fork(after_in_child=_release_all)
