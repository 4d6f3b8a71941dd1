"""Several real processes on one machine that reduce over gloo, as ranks of a training run do."""

import datetime
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

processes = pytest.mark.xdist_group("processes")
"""Mark of tests that start processes of their own and wait for them: one worker runs all of these, one by one."""


def _rank(rank: int, world: int, folder: str, check: Callable[..., None], arguments: Sequence[Any]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(str(Path(folder) / "store"), world)
        limit = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
        check(rank, world, *arguments)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"failed{rank}.txt").write_text(traceback.format_exc(), encoding="utf-8")
        raise


def run_on_ranks(world: int, check: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Run ``check(rank, world, *arguments)`` in so many processes that form a process group.

    Args:
        world: Number of processes.
        check: A function of a module.
        folder: Empty folder, where the processes meet.
        arguments: Further arguments of ``check``.

    Raises:
        AssertionError: With the traceback of every rank that failed. Warnings are errors there too.
    """
    try:
        mp.spawn(_rank, (world, str(folder), check, arguments), nprocs=world)
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        told = "\n".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("failed*.txt")))
        raise AssertionError(told or str(error)) from None


def torchrun(*words: str, ranks: int = 2) -> "subprocess.CompletedProcess[str]":
    """Run ``python`` with these words in so many processes that torchrun starts; it finds a free port by itself."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [*launcher, *words], capture_output=True, text=True, timeout=500, env=environment, check=False
    )
