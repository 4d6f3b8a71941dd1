"""Files and folders that are whole or not there; what killed processes leave is removed, and nothing else is."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from batchformer.data import atomic as module
from batchformer.data.atomic import alone_in, atomic_file, atomic_folder, write_json, write_text

AT_WORK = """
import sys, time, pathlib
from batchformer.data.atomic import atomic_folder
with atomic_folder(pathlib.Path(sys.argv[1])) as new:
    (new.parent / "half").write_text("written")
    print(new.parent, flush=True)
    time.sleep(60)
"""


@contextmanager
def at_work(target: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """Another process that makes the target in a scratch folder."""
    with subprocess.Popen([sys.executable, "-c", AT_WORK, str(target)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that has none, such as some network file systems."""

    def refuse(held: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_folder_takes_the_place_of_an_older_one(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "parent" / "set") as new:
            new.mkdir()
            (new.parent / "download").mkdir()  # its surroundings may be used
            (new / content).touch()
        assert os.listdir(tmp_path / "parent") == ["set"]
        assert os.listdir(tmp_path / "parent" / "set") == [content]


def test_nothing_changes_when_the_block_fails(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "file").write_text("old")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "set") as folder:
        shutil.copytree(tmp_path / "missing", folder / "half")
    with pytest.raises(FileNotFoundError), atomic_folder(tmp_path / "other"):
        pass  # no folder was made
    with pytest.raises(UnicodeEncodeError), atomic_file(tmp_path / "file") as file:
        file.write_text("half " * 10000 + "\ud800", encoding="utf-8")
    assert sorted(os.listdir(tmp_path)) == ["file", "set"]
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path / "set") == []


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "parent" / "result.json"
    write_text(path, "old\r\n")
    assert path.read_bytes() == b"old\r\n"

    def broken(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="disk full"):
            write_text(path, "new")
    assert path.read_text() == "old\n"
    write_json(path, {"a": [1]})
    assert path.read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    with atomic_file(path, keep=True) as new:
        new.write_text("too late")
    assert path.read_text().startswith("{")
    assert os.listdir(path.parent) == ["result.json"]


@pytest.mark.parametrize("end", ["kill", "terminate"])
def test_what_a_killed_process_left_is_removed_the_next_time(end: str, tmp_path: Path) -> None:
    target = tmp_path / "set"
    with at_work(target) as (process, theirs):
        with atomic_folder(target) as new:
            assert new.parent != theirs
            new.mkdir()
        assert (theirs / "half").read_text() == "written", "a living process uses it"
        getattr(process, end)()
        process.wait()
        assert theirs.exists()
        write_text(tmp_path / "set.txt", "another target")
        assert theirs.exists()
        with atomic_folder(target) as new:
            assert sorted(os.listdir(tmp_path)) == sorted([new.parent.name, "set", "set.txt"])
            new.mkdir()


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
    write_text(tmp_path / "set+", "")
    assert not (tmp_path / ".set+.batchformer-12345678").exists()
    write_text(tmp_path / "set", "")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, ".set.batchformer-87654321", "set", "set+"])


@pytest.mark.usefixtures("no_locks")
def test_without_locks_nothing_is_held_and_nothing_is_taken_for_left_behind(tmp_path: Path) -> None:
    (tmp_path / ".set.batchformer-12345678").mkdir()
    write_text(tmp_path / "set", "written")
    with alone_in(tmp_path / "run"), alone_in(tmp_path / "run", patience=0):
        (tmp_path / "run" / "result.json").touch()
    assert sorted(os.listdir(tmp_path)) == [".set.batchformer-12345678", "run", "set"]
    assert os.listdir(tmp_path / "run") == ["result.json"]


def test_a_scratch_folder_that_another_process_takes_for_left_behind_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the moment when it is made and the moment when it is locked it looks like that."""
    original, made, others = module.tempfile.mkdtemp, [], []

    def unlucky(**settings: object) -> str:
        made.append(original(**settings))  # type: ignore[call-overload]
        if len(made) == 1:
            others.append(module._lock(Path(made[0])))
        return made[-1]

    monkeypatch.setattr(module.tempfile, "mkdtemp", unlucky)
    with atomic_folder(tmp_path / "set") as new:
        assert [str(new.parent)] == made[1:] and new.parent.is_dir()
        new.mkdir()
    others[0].release()


def test_the_import_needs_no_posix() -> None:
    """Listing data sets and the bare import work on systems without locks and limits of this kind, such as Windows."""
    code = (
        "import sys\n"
        "for name in ('fcntl', 'resource', 'multiprocessing.forkserver', 'multiprocessing.resource_tracker'):\n"
        "    sys.modules[name] = None\n"
        "import batchformer\n"
        "from batchformer import cli\n"
        "sys.argv = ['batchformer', 'ls']\n"
        "sys.exit(cli.main())\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "fashion-mnist" in done.stdout
