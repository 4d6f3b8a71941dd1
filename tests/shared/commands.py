"""Real `batchformer` processes without the seconds that their imports take: forked off one that has them done."""

import json
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

IMPORTS = [
    "batchformer.tasks.panoptic.task",
    "batchformer.tasks.detection.task",
    "transformers.models.deformable_detr.modeling_deformable_detr",
    "transformers.models.conditional_detr.modeling_conditional_detr",
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Command:
    """`batchformer` processes, and ranks of a process group, forked off a server of tests/shared/prefork.py.

    Args:
        scratch: Folder of what they say, and of data that they fetch.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.outputs = scratch, dict[int, Path]()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "BATCHFORMER_DATA": str(scratch / "data")}
        self.server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("prefork.py")), *IMPORTS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.ended: dict[int, int] = {}

    def _answer(self) -> dict[str, Any]:
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        assert line, "the server ended"
        answer: dict[str, Any] = json.loads(line)
        if "status" in answer:
            self.ended[answer["pid"]] = answer["status"]
        return answer

    def start(self, *argv: str, trap: str = "", environment: Mapping[str, str] | None = None) -> int:
        """Start a process and return its id.

        Args:
            argv: Words of the command line.
            trap: Place where the process kills itself, as ``name:argument``; see prefork.py.
            environment: Variables of this process.
        """
        return self._fork({"argv": argv, "trap": trap, "environment": dict(environment or {})})

    def call(self, check: Callable[..., None], rank: int, world: int, folder: Path, arguments: Any) -> int:
        """Start a process that calls ``check(rank, world, *arguments)`` as a rank of a group; return its id."""
        content = pickle.dumps((check, rank, world, str(folder / "store"), arguments)).hex()
        return self._fork({"call": [sys.path, content], "trap": "", "environment": {"GLOO_SOCKET_IFNAME": "lo"}})

    def _fork(self, order: dict[str, Any]) -> int:
        assert self.server.stdin is not None
        output = self.scratch / f"output{len(self.outputs)}.txt"
        self.server.stdin.write(json.dumps({**order, "output": str(output)}) + "\n")
        self.server.stdin.flush()
        while "status" in (answer := self._answer()):
            pass
        self.outputs[answer["pid"]] = output
        return int(answer["pid"])

    def end(self, pid: int | None = None) -> tuple[int, str]:
        """Wait for a process, or for the one started last; return its exit status and what it said."""
        pid = list(self.outputs)[-1] if pid is None else pid
        while pid not in self.ended:
            self._answer()
        return self.ended[pid], self.outputs[pid].read_text(encoding="utf-8")

    def run(self, *argv: str, trap: str = "") -> tuple[int, str]:
        """Start a process and wait for it; return its exit status and what it said."""
        return self.end(self.start(*argv, trap=trap))

    def run_on_ranks(self, world: int, *argv: str, environment: Mapping[str, str]) -> list[tuple[int, str]]:
        """Run a command in processes that find one another as torchrun's do; return status and words of every rank."""
        everyone = {
            **environment,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": "tests",
        }
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
        started = [self.start(*argv, environment={**everyone, **variables}) for variables in own]
        return [self.end(pid) for pid in started]


@contextmanager
def serving(scratch: Path) -> Iterator[Command]:
    """Serve commands; the server ends when all of its processes have."""
    command = Command(scratch)
    yield command
    with command.server:
        try:
            command.server.communicate(timeout=60)
        except subprocess.TimeoutExpired:  # after a test that failed
            command.server.kill()
