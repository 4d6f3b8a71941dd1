"""The process of one run: it gets its threads and its device, trains, and tells another process how far it is."""

import io
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from .callbacks import TellProgress
from .config import RUN_CONFIG
from .run import fit


@dataclass(frozen=True)
class Job:
    """One run to be made.

    Attributes:
        title: Words that name the run to the user, such as "plain, seed 0".
        recipe: YAML file.
        overrides: ``--key=value`` settings.
        folder: Folder of the run.
        name: Name of the recipe, for the records.
        unit: Name of what the run is on beside its seed, for the records.
        command: Command that the user typed, for the records.
    """

    title: str
    recipe: Path
    overrides: tuple[str, ...]
    folder: Path
    name: str
    unit: str | None = None
    command: str | None = None


class _NoTerminal(io.TextIOWrapper):
    """Stderr without progress bars: the display of all runs has the terminal."""

    def isatty(self) -> bool:
        return False


def serve(sender: Any, job: Job, threads: int, device: str | None) -> None:
    """Run a job in this process, which another one has started.

    Args:
        sender: End of a pipe. It is sent :class:`Progress` while the run goes on, then the result and its error, one of
            which is ``None``.
        job: The run.
        threads: Threads of the run.
        device: GPU of the run; ``None`` for what the process sees.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # From here on as in a process of its own: what a run starts (loaders) is not made by the server's rules, and names
    # no semaphores that are left over when the run is killed.
    multiprocessing.set_start_method(None, force=True)
    sys.stderr = _NoTerminal(io.FileIO(2, "w", closefd=False), write_through=True)
    settle(threads, device)
    watch = TellProgress(sender.send, lambda: epochs_of(job.folder))
    try:
        result = fit(
            job.recipe, job.overrides, job.folder, name=job.name, unit=job.unit, resume=job.folder.exists(),
            command=job.command, say=_silent, callbacks=[watch],
        )  # fmt: skip
    except KeyboardInterrupt:  # SIGTERM; the parent sees the end of the process
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))  # for BATCHFORMER_TRACEBACK
        sender.send((None, portable(error)))
    else:
        sender.send((result, None))


def settle(threads: int, device: str | None) -> None:
    """Give this process its threads and its device.

    The number of threads is a setting of the comparison, since sums over several threads round differently.

    Args:
        threads: Number of threads, at least 1.
        device: GPU that alone is seen; ``None`` changes nothing.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    torch.set_num_threads(threads)
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device


def portable(error: Exception) -> Exception:
    """Return an error as it is, or one that says as much, if another process could not read it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        same = RuntimeError(f"{type(error).__name__}: {error}")
        same.__notes__ = list(getattr(error, "__notes__", ()))
        return same
    return error


def epochs_of(folder: Path) -> int:
    """Return the epochs of all stages of a run, by its config; 1 if they are not known."""
    try:
        config = yaml.safe_load((folder / RUN_CONFIG).read_text(encoding="utf-8"))
        stages = config.get("stages")
        return int(sum(stage["epochs"] for stage in stages) if stages else config["trainer"]["max_epochs"])
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError):
        return 1


def _end_with_parent() -> None:
    """End this process with its parent, since a run that went on alone would be in the way of the next attempt."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _silent(line: str) -> None:
    """Say nothing, since the comparison prints lines of its own."""
