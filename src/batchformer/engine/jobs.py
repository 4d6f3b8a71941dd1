"""Runs side by side, each in a process of its own, so that no run disturbs another and all can be ended at any moment.

Every process is forked off a server that has the slow imports done. A process ends with this one, however this one
ends, and what it leaves can be resumed.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from multiprocessing import connection, forkserver, resource_tracker
from typing import Any

import torch

from batchformer.data.atomic import alone_in, write_json

from .callbacks import Progress
from .config import task_of
from .display import Display, seconds_left
from .environment import free_memory_mb
from .errors import ConfigError
from .job_process import Job, serve
from .resuming import DONE
from .run import discard, first_rank
from .tasks import tasks

FAILED = "failed.json"
_HEADROOM = 1.1  # a run may still grow beyond the highest memory that was seen so far


@dataclass(frozen=True)
class Failure:
    """The reason for which a run did not finish.

    Attributes:
        kind: "diverged" (its loss was not finite), "failed" (an error), or "killed" (its process was ended).
        message: A sentence or more.
        details: Traceback of an error.
    """

    kind: str
    message: str
    details: str = ""


@dataclass(frozen=True)
class Ended:
    """A job that has ended.

    Attributes:
        job: The job.
        result: Content of result.json; empty for a run that failed.
        failure: The reason of a run that failed; ``None`` for one that finished.
        kept: Whether the run was finished before.
        seconds_left: Estimate of the time that the other jobs need; ``None`` while it is not known.
    """

    job: Job
    result: dict[str, Any]
    failure: Failure | None = None
    kept: bool = False
    seconds_left: float | None = None


def gpus(accelerator: Any) -> list[str]:
    """Return the names of the GPUs that runs can be spread over, as in ``CUDA_VISIBLE_DEVICES``.

    Args:
        accelerator: The setting ``trainer.accelerator``; ``None`` is Lightning's own choice.
    """
    if accelerator not in (None, "auto", "gpu", "cuda") or not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index in range(torch.cuda.device_count())]
    return [name.strip() for name in visible.split(",")][: torch.cuda.device_count()]


def default_jobs(accelerator: Any, devices: Sequence[str], threads: int) -> int:
    """Return how many runs go on side by side: one on each GPU, else as many as the processor has cores for.

    Args:
        accelerator: The setting ``trainer.accelerator``.
        devices: GPUs.
        threads: Threads of each run.
    """
    if devices:
        return len(devices)
    on_processor = accelerator == "cpu" or (
        accelerator in (None, "auto") and not torch.cuda.is_available() and not torch.backends.mps.is_available()
    )
    return max(1, _cores() // threads) if on_processor else 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def fits(running_mb: Sequence[float], peak_mb: float, free_mb: float | None) -> bool:
    """Return whether the free memory is enough for one more run when all that go on have grown to their peak.

    Args:
        running_mb: Memory of each run that goes on, now.
        peak_mb: Highest memory of a run so far.
        free_mb: Free memory; ``None`` if it is unknown, and then it is enough.

    Example:
        >>> fits([600.0], 1000.0, free_mb=1600.0), fits([600.0], 1000.0, free_mb=1400.0)
        (True, False)
    """
    if free_mb is None:
        return True
    return free_mb - sum(max(0.0, peak_mb - memory) for memory in running_mb) >= _HEADROOM * peak_mb


def run_jobs(
    jobs: Sequence[Job], most: int, threads: int, devices: Sequence[str], ended: Callable[[Ended], None]
) -> None:
    """Run all jobs, several at a time. A job that fails is recorded in its folder, and the others go on.

    The first job trains alone until it has taken some steps, so that a wrong setting is found before others waste time,
    and the memory of a run is known before more are started.

    Args:
        jobs: Runs to be made; a run that is finished already is kept.
        most: Largest number of runs at a time, at least 1.
        threads: Threads of each run, at least 1.
        devices: GPUs; each run sees one of them alone. Without any, every run sees what this process sees.
        ended: Takes every job when it has ended, in whatever order that is.

    Raises:
        KeyboardInterrupt: After Ctrl-C or SIGTERM.
        ConfigError: For a wrong setting; so does any other error before a run has trained, in which all runs are alike.
    """
    crew = _Crew(jobs, most, threads, list(devices), ended)
    with _requests_to_stop() as stop:
        try:
            while crew.waiting or crew.running:
                if not stop:
                    crew.start()
                ready = connection.wait([child.answers for child in crew.running], timeout=0.2)
                if stop:
                    raise KeyboardInterrupt
                for child in [child for child in crew.running if child.answers in ready]:
                    crew.hear(child)
                crew.show()
        finally:
            crew.end()


@contextmanager
def _requests_to_stop() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM, so that they are answered when all processes are known and can be ended."""
    asked: list[int] = []
    before: dict[signal.Signals, Any] = {}
    with suppress(ValueError):  # not in the main thread, which alone gets signals
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, lambda given, _: asked.append(given))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked and sys.exc_info()[0] is None:
            raise KeyboardInterrupt


class _Child:
    """A process that runs a job."""

    def __init__(self, job: Job, threads: int, device: str | None) -> None:
        self.job, self.device = job, device
        self.kept = (job.folder / DONE).exists()
        self.started = time.monotonic()
        self.progress: Progress | None = None
        (job.folder / FAILED).unlink(missing_ok=True)
        # The server process has the slow imports done; every run forks off it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["batchformer.engine.job_process", tasks()[task_of(job.recipe)].partition(":")[0]]
        )
        self.answers, sender = context.Pipe(duplex=False)
        self.process = context.Process(target=serve, args=(sender, job, threads, device))
        _start_server()
        self.process.start()
        sender.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def exit_code(self) -> int | None:
        self.process.join(10)  # it tidies up after itself
        return self.process.exitcode

    def end(self) -> None:
        """End the process; killing is safe at any moment, and the only way that always works."""
        if self.process.pid is not None and self.process.exitcode in (None, 255):
            with suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)  # not process.kill(), which fails without the server
        self.process.join()
        self.process.close()
        self.answers.close()

    def tidy(self, failure: Failure | None = None) -> None:
        """Remove the records of a run that saved nothing, and record a failure."""
        if first_rank() and (failure is not None or self.job.folder.exists()):
            with suppress(BlockingIOError), alone_in(self.job.folder):  # also removes the lock of a killed process
                if failure is not None:
                    date = datetime.now().astimezone().isoformat(timespec="seconds")
                    record = {"reason": failure.kind, "message": failure.message, "date": date}
                    write_json(self.job.folder / FAILED, {**record, "details": failure.details})
                discard(self.job.folder)


class _Crew:
    """The processes that go on, and the jobs that wait for them."""

    def __init__(
        self, jobs: Sequence[Job], most: int, threads: int, devices: list[str], ended: Callable[[Ended], None]
    ) -> None:
        self.most, self.threads, self.devices, self.ended = most, threads, devices, ended
        self.waiting = list(jobs)
        self.running: list[_Child] = []
        self.done_seconds: list[float] = []
        self.done = 0
        self.peak_mb = 0.0
        self.trained = False
        self.display = Display(len(jobs))

    def start(self) -> None:
        """Start as many jobs as there is room for."""
        while self.waiting and len(self.running) < self.most and self._room():
            busy = [child.device for child in self.running]
            device = min(self.devices, key=busy.count) if self.devices else None
            self.running.append(_Child(self.waiting.pop(0), self.threads, device))

    def _room(self) -> bool:
        if not self.running:
            return True
        memory = [child.progress.memory_mb if child.progress else 0.0 for child in self.running]
        return self.trained and fits(memory, self.peak_mb, free_memory_mb())

    def hear(self, child: _Child) -> None:
        """Take what a process has to say."""
        try:
            said = child.answers.recv()
        except (EOFError, OSError):
            said = (None, _killed(child.exit_code()))
        if isinstance(said, Progress):
            child.progress, self.trained = said, True
            self.peak_mb = max(self.peak_mb, said.peak_mb)
            return
        result, error = said
        if isinstance(error, ConfigError):
            raise error
        if isinstance(error, Exception) and not self.trained and not isinstance(error, FloatingPointError):
            raise error
        self._finish(child, result, _failure(error) if isinstance(error, Exception) else error)

    def _finish(self, child: _Child, result: dict[str, Any] | None, failure: Failure | None) -> None:
        child.exit_code()
        self.running.remove(child)
        child_seconds, self.done = child.seconds, self.done + 1
        child.end()
        child.tidy(failure)
        if result is not None and not child.kept:
            self.done_seconds.append(child_seconds)
        with self.display.paused():
            self.ended(Ended(child.job, result or {}, failure, child.kept, self.seconds_left()))

    def seconds_left(self) -> float | None:
        running = [(child.seconds, child.progress.fraction if child.progress else 0.0) for child in self.running]
        # Jobs that are about to be started are as good as running.
        coming = min(len(self.waiting), self.most - len(running))
        return seconds_left(self.done_seconds, [*running, *[(0.0, 0.0)] * coming], len(self.waiting) - coming)

    def show(self) -> None:
        """Draw the display."""
        self.display.show({c.job.title: c.progress for c in self.running}, self.done, self.seconds_left())

    def end(self) -> None:
        """End all processes."""
        self.display.close()
        for child in self.running:
            if child.process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.process.pid, signal.SIGKILL)  # all at once, before any is waited for
        for child in self.running:
            child.end()
            child.tidy()


def _killed(exit_code: int | None) -> Failure:
    why = f"exit code {exit_code}" + ("; -9 may be a lack of memory" if exit_code == -9 else "")
    return Failure("killed", f"Expected the run to end by itself, but its process was ended from outside ({why}).")


def _failure(error: Exception) -> Failure:
    details = "".join(getattr(error, "__notes__", ()))
    if isinstance(error, FloatingPointError):
        return Failure("diverged", str(error), details)
    expected = isinstance(error, ValueError | OSError | ImportError)
    return Failure("failed", str(error) if expected else f"{type(error).__name__}: {error}", details)


def _start_server() -> None:
    """Start the server that runs fork from, with Ctrl-C blocked: the terminal sends it to all, this process answers."""
    resource_tracker.ensure_running()  # it unblocks Ctrl-C after its own start, so that comes first
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
