"""One process at a time in a run folder, whatever happens to the process."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from batchformer.data.atomic import alone_in
from batchformer.engine import compare, run
from batchformer.engine.recipes import find_recipe

RECIPE = find_recipe("longtail/folder").path
HOLD = (
    "import os, sys, time\nfrom pathlib import Path\nfrom batchformer.data.atomic import alone_in\n"
    "with alone_in(Path(sys.argv[1])):\n"
    "    if sys.argv[2] == 'forks' and os.fork() == 0:\n        time.sleep(60)\n        os._exit(0)\n"
    "    print('held', flush=True)\n    time.sleep(60)\n"
)


@pytest.fixture
def holder() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    started = []

    def hold(folder: Path, how: str = "alone") -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_held_folder_is_refused_and_let_go(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "run"
    with alone_in(folder):
        refused = pytest.raises(BlockingIOError, match="for this process alone, but another process is working there")
        with refused, alone_in(folder, patience=0.1):
            pass
        (folder / "result.json").touch()
    assert os.listdir(folder) == ["result.json"]  # no lock file is left
    with alone_in(folder, patience=0):
        pass


def test_an_empty_folder_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(KeyError), alone_in(tmp_path / "run"):
        raise KeyError
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", ["alone", "forks"])
def test_a_killed_holder_holds_no_longer(
    how: str, tmp_path: Path, holder: Callable[..., "subprocess.Popen[str]"]
) -> None:
    """The lock is free at once, also when a forked worker outlives its parent."""
    process = holder(tmp_path / "run", how)
    with pytest.raises(BlockingIOError), alone_in(tmp_path / "run", patience=0.1):
        pass
    os.kill(process.pid, signal.SIGKILL)
    assert os.listdir(tmp_path / "run") == [".lock"]
    with alone_in(tmp_path / "run"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_second_process_in_a_run_or_a_comparison_is_refused(
    small: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (run, compare):
        monkeypatch.setattr(module, "alone_in", partial(alone_in, patience=0.1))
    held = tmp_path / "held"
    with alone_in(held):
        (held / "config.yaml").write_text("model: {}\n")
        with pytest.raises(BlockingIOError, match="go on with --resume"):
            run.fit(RECIPE, small(), held, name="longtail/folder", resume=True)
        with pytest.raises(BlockingIOError, match="go on with --resume"):
            compare.compare(RECIPE, small(), held, name="longtail/folder", seeds=[0], resume=True)
        assert sorted(os.listdir(held)) == [".lock", "config.yaml"]
        assert (held / "config.yaml").read_text() == "model: {}\n"
