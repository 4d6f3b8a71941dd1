"""Several real processes on one machine that reduce over gloo, as ranks of a training run do."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import Command

processes = pytest.mark.xdist_group("processes")
"""Mark of tests that start processes of their own and wait for them: one worker runs all of these, one by one."""


def run_on_ranks(command: Command, world: int, check: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Run ``check(rank, world, *arguments)`` in so many processes that form a process group.

    Args:
        command: Server that the processes are forked off.
        world: Number of processes.
        check: A function of a module.
        folder: Folder where the processes meet.
        arguments: Further arguments of ``check``.

    Raises:
        AssertionError: With what every rank said. Warnings are errors there too.
    """
    ranks = [command.call(check, rank, world, folder, arguments) for rank in range(world)]
    ended = [command.end(pid) for pid in ranks]
    assert not any(status for status, _ in ended), "\n".join(said for _, said in ended)


def torchrun(*words: str, ranks: int = 2) -> "subprocess.CompletedProcess[str]":
    """Run ``python`` with these words in so many processes that torchrun starts; it finds a free port by itself."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*launcher, *words], capture_output=True, text=True, timeout=500, env=environment, check=False
    )
