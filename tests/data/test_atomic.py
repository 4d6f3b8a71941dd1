"""Scratch folders: gone in the end, and those of killed processes gone at the next start, but no others."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchformer.data import atomic as module
from batchformer.data.atomic import scratch_beside

AT_WORK = """
import sys, time, pathlib
from batchformer.data.atomic import scratch_beside
with scratch_beside(pathlib.Path(sys.argv[1])) as scratch:
    (scratch / "half").write_text("written")
    print(scratch, flush=True)
    time.sleep(60)
"""


@contextmanager
def at_work(target: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process with a scratch folder."""
    with subprocess.Popen([sys.executable, "-c", AT_WORK, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def test_it_is_gone_in_the_end_and_after_an_error(tmp_path: Path) -> None:
    with scratch_beside(tmp_path / "new" / "set") as scratch:
        (scratch / "set").mkdir()
        (scratch / "set").rename(tmp_path / "new" / "set")
    assert os.listdir(tmp_path / "new") == ["set"]
    with pytest.raises(FileNotFoundError), scratch_beside(tmp_path / "new" / "set") as scratch:
        (scratch / "half").rename(scratch / "missing" / "half")
    assert os.listdir(tmp_path / "new") == ["set"]


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_what_a_killed_process_left_goes_at_the_next_start(end: str, tmp_path: Path) -> None:
    target = tmp_path / "set"
    with at_work(target) as (process, theirs):
        with scratch_beside(target) as ours:
            assert ours != theirs
        assert (theirs / "half").read_text() == "written", "a living process uses it"
        getattr(process, end)()
        process.wait()
        assert theirs.exists()
        with scratch_beside(target) as ours:
            assert os.listdir(tmp_path) == [ours.name]


def test_what_is_not_its_own_stays(tmp_path: Path) -> None:
    kept = [
        ".set.batchformer-",
        ".set.batchformer-1234567",
        ".set.batchformer-1234567-",
        ".set-12345678",
        ".set.2.batchformer-12345678",
        "set.batchformer-12345678",
    ]
    for name in (*kept, ".set.batchformer-12345678", ".set+.batchformer-12345678"):
        (tmp_path / name).mkdir()
    (tmp_path / ".set.batchformer-87654321").symlink_to(tmp_path / kept[0])
    with scratch_beside(tmp_path / "set+"):
        pass
    assert not (tmp_path / ".set+.batchformer-12345678").exists()
    with scratch_beside(tmp_path / "set"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, ".set.batchformer-87654321"])


def test_without_locks_nothing_is_taken_for_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(held: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", none)
    (tmp_path / ".set.batchformer-12345678").mkdir()
    with scratch_beside(tmp_path / "set") as scratch:
        assert scratch.is_dir()
    assert os.listdir(tmp_path) == [".set.batchformer-12345678"]


def test_a_folder_that_another_process_took_for_stale_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the moment when it is made and that when it is locked."""
    original, made = module.tempfile.mkdtemp, []

    def unlucky(**settings: object) -> str:
        made.append(original(**settings))  # type: ignore[call-overload]
        if len(made) == 1:
            shutil.rmtree(made[0])
        return made[-1]

    monkeypatch.setattr(module.tempfile, "mkdtemp", unlucky)
    with scratch_beside(tmp_path / "set") as scratch:
        assert [str(scratch)] == made[1:] and scratch.is_dir()
