"""Runs side by side: the same numbers, a failure that stops nobody else, and room on devices and in memory."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchformer.data.errors import DataNotFoundError
from batchformer.engine import jobs
from batchformer.engine.callbacks import Progress
from batchformer.engine.compare import compare
from batchformer.engine.config import ConfigError
from batchformer.engine.display import Display, seconds_left
from batchformer.engine.environment import free_memory_mb
from batchformer.engine.errors import RunsFailed
from batchformer.engine.job_process import Job, epochs_of, portable, settle
from batchformer.engine.recipes import find_recipe

RECIPE = find_recipe("longtail/folder").path
Small = Callable[..., list[str]]
pytestmark = pytest.mark.timeout(300)


def compared(small: Small, folder: Path, *more: str, epochs: int = 2, **arguments: Any) -> list[str]:
    said: list[str] = []
    settings = {"seeds": [0], "name": "longtail/folder", "say": said.append, **arguments}
    compare(RECIPE, small(*more, epochs=epochs), folder, **settings)
    return said


def records(run: Path) -> tuple[Any, ...]:
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    result = json.loads((run / "result.json").read_text())
    weights = {name: value.numpy().tobytes() for name, value in state.items()}
    return weights, result["metrics"], result["per_class"], (run / "metrics.csv").read_bytes()


# Real processes; those that are killed are in test_kills.py.


def test_the_numbers_are_the_same_whatever_the_number_of_jobs_is(small: Small, tmp_path: Path) -> None:
    lines = {n: compared(small, tmp_path / str(n), controls=["frozen"], jobs=n) for n in (1, 2)}
    for run in ("plain/seed0", "batchformer/seed0", "frozen/seed0"):
        assert records(tmp_path / "1" / run) == records(tmp_path / "2" / run)
        host = json.loads((tmp_path / "2" / run / "environment.json").read_text())["hardware"]
        assert host["threads"] == 1
    for n, said in lines.items():
        plan = json.loads((tmp_path / str(n) / "compare.json").read_text())
        assert (plan["threads"], plan["jobs"]) == (1, n)
        ended = [line for line in said if line.startswith("[")]
        assert [line.partition("]")[0] for line in ended] == ["[1/3", "[2/3", "[3/3"]
        assert {line.split()[1] for line in ended} == {"plain,", "batchformer,", "frozen,"}
        assert sum(line.endswith("minutes to go.") for line in said) == 1


def test_another_number_of_threads_is_refused_in_a_comparison(small: Small, tmp_path: Path) -> None:
    compared(small, tmp_path / "both", threads=2, epochs=1)
    environment = tmp_path / "both/plain/seed0/environment.json"
    assert json.loads(environment.read_text())["hardware"]["threads"] == 2
    plan = (tmp_path / "both/compare.json").read_text()
    with pytest.raises(ConfigError, match=r"Expected --threads=2, with which the runs in .* were made, got 1"):
        compared(small, tmp_path / "both", threads=1, seeds=[0, 1], resume=True, epochs=1)
    assert (tmp_path / "both/compare.json").read_text() == plan
    said = compared(small, tmp_path / "both", resume=True, epochs=1)  # without the option it stays as it was
    assert all("(kept)" in line for line in said)
    assert json.loads((tmp_path / "both/compare.json").read_text())["threads"] == 2
    # A comparison of an earlier version says it in the records of its runs alone.
    older = {key: value for key, value in json.loads(plan).items() if key not in ("threads", "jobs")}
    (tmp_path / "both/compare.json").write_text(json.dumps(older))
    with pytest.raises(ConfigError, match="Expected --threads=2"):
        compared(small, tmp_path / "both", threads=1, resume=True, epochs=1)


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(small: Small, tmp_path: Path) -> None:
    folder, settings = tmp_path / "both", ("--model.batchformer.lr_mult=1e30",)
    said: list[str] = []
    with pytest.raises(RunsFailed, match=r"(?s)4 finished runs, 2 did not finish:\n  batchformer, seed 0 diverged: "):
        compared(small, folder, *settings, seeds=[0, 1], jobs=2, say=said.append)
    assert sorted(line.partition("] ")[2].partition(":")[0] for line in said if line.startswith("[")) == sorted(
        f"{arm}, seed {seed}" for arm in ("plain", "batchformer") for seed in (0, 1)
    )
    assert [line.endswith(" diverged") for line in said if "batchformer, seed" in line] == [True, True]
    assert all((folder / f"plain/seed{seed}/done").exists() for seed in (0, 1))
    failure = json.loads((folder / "batchformer/seed1/failed.json").read_text())
    assert failure["reason"] == "diverged" and "finite loss" in failure["message"]
    assert "FloatingPointError" in failure["details"]
    # It is tried again, and what is finished is kept.
    said.clear()
    with pytest.raises(RunsFailed):
        compared(small, folder, *settings, seeds=[0, 1], jobs=2, say=said.append, resume=True)
    assert sum("(kept)" in line for line in said) == 2
    assert (folder / "batchformer/seed0/failed.json").exists()


def test_a_comparison_with_a_failure_has_its_report_and_exit_status_2(small: Small, tmp_path: Path) -> None:
    words = ["compare", "longtail/folder", "--seeds=1", f"--out={tmp_path}", "--name=both", "--jobs=2"]
    settings = small("--model.batchformer.lr_mult=1e30", epochs=1)
    done = subprocess.run(
        [sys.executable, "-m", "batchformer", *words, *settings], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 2, done.stderr
    assert "batchformer, seed 0 diverged: Expected a finite loss" in done.stderr and "Traceback" not in done.stderr
    assert "batchformer/seed0: diverged (Expected a finite loss" in done.stdout
    assert (tmp_path / "both/report/report.md").exists()


def test_a_wrong_setting_ends_the_command_before_others_start(small: Small, tmp_path: Path) -> None:
    started: list[str] = []
    with pytest.raises(ConfigError, match=r"Did you mean model.optimizer.lr"):
        compared(small, tmp_path / "both", "--model.optimizer.lrr=1", jobs=2, say=started.append)
    with pytest.raises(DataNotFoundError, match="Could not find the image folder"):  # all runs would fail by it
        compared(small, tmp_path / "both", f"--data.root={tmp_path}/nowhere", jobs=2, say=started.append)
    assert started == []
    assert not (tmp_path / "both").exists()


@pytest.mark.parametrize(("option", "number"), [("jobs", 0), ("threads", -1)])
def test_numbers_below_one_are_refused(option: str, number: int, small: Small, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"Expected --{option} to be at least 1, got {number}"):
        compared(small, tmp_path / "both", **{option: number})


# The choice of devices, jobs and memory, without the devices.


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("four_gpus")
def test_each_run_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs.gpus(None) == jobs.gpus("auto") == jobs.gpus("gpu") == ["0", "1", "2", "3"]
    assert jobs.default_jobs("auto", jobs.gpus("auto"), threads=1) == 4
    assert jobs.gpus("cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7,GPU-3a,6")  # of a batch system
    assert jobs.gpus("auto") == ["5", "7", "GPU-3a", "6"]


def test_on_a_processor_there_are_as_many_runs_as_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(jobs, "_cores", lambda: 6)
    assert jobs.gpus("auto") == []
    assert [jobs.default_jobs("auto", [], threads=n) for n in (1, 2, 4, 8)] == [6, 3, 1, 1]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (jobs.default_jobs("auto", [], 1), jobs.default_jobs("cpu", [], 1)) == (1, 6)


class FakeChild:
    """A process of a run that says what it is told to say."""

    def __init__(self, job: Job, threads: int, device: str | None) -> None:
        self.job, self.threads, self.device, self.kept, self.seconds = job, threads, device, False, 1.0
        self.progress: Progress | None = None
        self.failure: Any = None
        self.said: list[Any] = []
        self.answers = self

    def recv(self) -> Any:
        return self.said.pop(0)

    def exit_code(self) -> int:
        return 0

    def end(self) -> None:
        pass

    def tidy(self, failure: Any = None) -> None:
        self.failure = failure


@pytest.fixture
def crew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    def make(count: int, most: int, devices: list[str], ended: Callable[[Any], None] = lambda one: None) -> Any:
        planned = [Job(f"run {n}", RECIPE, (), tmp_path / str(n), "longtail/folder") for n in range(count)]
        return jobs._Crew(planned, most, 1, devices, ended)

    monkeypatch.setattr(jobs, "_Child", FakeChild)
    monkeypatch.setattr(jobs, "free_memory_mb", lambda: 1e6)
    return make


def told(crew: Any, place: int, *said: Any) -> Any:
    child = crew.running[place]
    child.said += said
    for _ in said:
        crew.hear(child)
    return child


def trained(memory: float = 500.0) -> Progress:
    return Progress(0, 4, part=0.5, peak_mb=memory, memory_mb=memory)


def test_the_first_run_goes_alone_until_it_trains_and_devices_are_shared_out(crew: Callable[..., Any]) -> None:
    crew = crew(5, 4, ["0", "1"])
    crew.start()
    assert [child.device for child in crew.running] == ["0"]
    told(crew, 0, trained())
    crew.start()
    assert [child.device for child in crew.running] == ["0", "1", "0", "1"]
    told(crew, 1, ({"metrics": {}}, None))
    crew.start()
    assert [child.device for child in crew.running] == ["0", "0", "1", "1"]
    assert crew.waiting == []


def test_no_more_runs_than_fit_into_the_free_memory(crew: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    crew = crew(4, 4, [])
    crew.start()
    told(crew, 0, trained(1000.0))
    monkeypatch.setattr(jobs, "free_memory_mb", lambda: 2000.0)
    crew.start()  # of the second, nothing is in use yet: 1000 of the 2000 belong to it
    assert len(crew.running) == 2
    monkeypatch.setattr(jobs, "free_memory_mb", lambda: 10.0)
    told(crew, 0, ({"metrics": {}}, None))
    told(crew, 0, ({"metrics": {}}, None))
    crew.start()  # one at a time goes on, whatever the memory is
    assert len(crew.running) == 1
    monkeypatch.setattr(jobs, "free_memory_mb", lambda: None)
    crew.start()
    assert len(crew.running) == 2
    assert (free_memory_mb() or 1) > 0


def test_errors_before_any_training_end_all_and_later_ones_one_run(crew: Callable[..., Any]) -> None:
    ended: list[Any] = []
    first = crew(3, 2, [])
    first.start()
    with pytest.raises(ImportError, match="timm"):
        told(first, 0, (None, ImportError("timm is missing")))
    second = crew(3, 2, [], ended.append)
    second.start()
    told(second, 0, trained())
    second.start()
    child = told(second, 0, (None, ImportError("timm is missing")))
    assert (child.failure.kind, child.failure.message) == ("failed", "timm is missing")
    with pytest.raises(ConfigError):
        told(second, 0, (None, ConfigError("wrong")))
    third = crew(3, 2, [], ended.append)
    third.start()
    child = told(third, 0, (None, FloatingPointError("Expected a finite loss, got nan.")))
    assert child.failure.kind == "diverged"
    assert [one.failure.kind for one in ended] == ["failed", "diverged"]


def test_an_error_that_no_other_process_can_read_still_says_what_it_was() -> None:
    class Local(Exception):
        pass

    error = Local("a word")
    error.add_note("where")
    same = pickle.loads(pickle.dumps(portable(error)))
    assert str(same) == "Local: a word" and same.__notes__ == ["where"]
    plain = ValueError("a word")
    assert portable(plain) is plain


def test_a_process_gets_its_threads_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "9")
    try:
        settle(2, None)
        assert (torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"]) == (
            2,
            "2",
            "9",
        )
        settle(1, "GPU-3a")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-3a"
    finally:
        torch.set_num_threads(before)


# How far it is.


def test_epochs_of_a_run_are_those_of_all_its_stages(tmp_path: Path) -> None:
    assert epochs_of(tmp_path) == 1
    (tmp_path / "config.yaml").write_text("trainer: {max_epochs: 7}\nstages: null\n")
    assert epochs_of(tmp_path) == 7
    (tmp_path / "config.yaml").write_text("trainer: {max_epochs: null}\nstages: [{epochs: 3}, {epochs: 2}]\n")
    assert epochs_of(tmp_path) == 5


def test_the_time_to_go_is_of_the_work_that_is_left() -> None:
    assert seconds_left([], [(1.0, 0.0)], waiting=3) is None
    assert seconds_left([], [(10.0, 0.5), (10.0, 0.25)], waiting=0) == (0.5 * 30 + 0.75 * 30) / 2
    assert seconds_left([20.0, 40.0], [], waiting=0) == 0


class Terminal:
    def __init__(self) -> None:
        self.text = ""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_the_display_has_a_line_for_each_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    display = Display(6)
    display.show({"plain, seed 0": Progress(2, 30, 0.5), "frozen, seed 1": None}, finished=3, seconds_left=204)
    assert "plain, seed 0: epoch 3 of 30" in terminal.text and "frozen, seed 1: starting" in terminal.text
    assert "3 of 6 runs ended, about 3.4 minutes to go" in terminal.text
    display.show({"frozen, seed 1": Progress(30, 30, testing=True)}, finished=4, seconds_left=None)
    assert "frozen, seed 1: testing" in terminal.text
    with display.paused():
        print("[4/6] plain")
    display.close()
    assert "[4/6] plain" in capsys.readouterr().out


def test_without_a_terminal_nothing_is_displayed(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(6)
    display.show({"plain, seed 0": None}, finished=0, seconds_left=None)
    with display.paused():
        time.sleep(0)
    display.close()
    assert capsys.readouterr().err == ""
