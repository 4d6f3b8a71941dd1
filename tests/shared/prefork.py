"""A process that has the slow imports done and forks a real process for every line that it reads.

Its arguments are further modules to import.

Each line is JSON: ``argv`` of the command line, or ``call``, a function to call on a rank; ``output`` (file of stdout
and stderr); ``trap``, where the process kills itself; and ``environment``. It answers in JSON with ``pid``, and with
``pid`` and ``status`` once the process has ended.
"""

import importlib
import json
import os
import pickle
import signal
import sys
import threading
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from batchformer import cli
from batchformer.engine import run
from batchformer.tasks.training.task import Task


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_step(number: str) -> None:
    """In the middle of a training step, counted over the epochs from 0: after the backward pass, in the update."""
    steps = iter(range(10**9))

    def patch(kind: Any) -> None:
        original = kind.step

        def step(self: Any, closure: Callable[[], Any] | None = None) -> Any:
            loss = original(self, closure)
            if next(steps) == int(number):
                die()
            return loss

        kind.step = step

    patch(torch.optim.SGD)
    patch(torch.optim.AdamW)


def in_checkpoint(number: str) -> None:
    """With half of the checkpoint written."""
    original = torch.save
    saves = iter(range(10**9))

    def save(content: Any, file: Any) -> None:
        original(content, file)
        if next(saves) == int(number):
            file.flush()
            file.truncate(file.tell() // 2)
            die()

    torch.save = save  # type: ignore[assignment]


def in_file(name: str) -> None:
    """With one of the small files written and not yet in its place."""
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if Path(target).name == name:
            die()
        original(source, target)

    os.replace = replace


def in_test(_: str) -> None:
    """While the test images are looked at."""
    Task.test_step = lambda self, batch, batch_idx: die()  # type: ignore[method-assign]


TRAPS = {trap.__name__: trap for trap in (at_step, in_checkpoint, in_file, in_test)}


def serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if (pid := os.fork()) == 0:
            become(order)
        answer({"pid": pid})
        threading.Thread(target=wait, args=(pid,)).start()


def wait(pid: int) -> None:
    answer({"pid": pid, "status": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})


def answer(content: dict[str, int]) -> None:
    # Not through sys.stdout, whose lock a thread may hold while another process is forked off.
    os.write(1, (json.dumps(content) + "\n").encode())


def be_a_rank(path: list[str], content: str) -> None:
    """Call a function in a process group on gloo; warnings are errors."""
    sys.path[:] = path
    warnings.simplefilter("error")
    check, rank, world, store, arguments = pickle.loads(bytes.fromhex(content))
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    check(rank, world, *arguments)
    dist.barrier()
    dist.destroy_process_group()


def become(order: dict[str, Any]) -> None:
    os.setsid()
    os.environ.update(order["environment"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    status = 1
    try:
        if order["trap"]:
            name, _, argument = order["trap"].partition(":")
            TRAPS[name](argument)
        if "call" in order:
            be_a_rank(*order["call"])
            status = 0
        else:
            sys.argv = ["batchformer", *order["argv"]]
            status = cli.main()
    except SystemExit as leave:
        status = int(leave.code or 0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    assert run.DONE
    for name in sys.argv[1:]:
        importlib.import_module(name)
    serve()
