"""The engine, the report and the command line know no task: one of another package goes all the way through them.

The package `counting_package` is a complete task in under 200 lines, found by its entry point: two stages, an error
with a unit of its own of which less is better, and comparisons paired by seed and split.
"""

import csv
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs_here import in_this_process
from PIL import Image

from batchformer import cli
from batchformer.engine import compare, run, tasks

PACKAGE = Path(__file__).with_name("counting_package")
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def dots(tmp_path: Path) -> Path:
    """36 pictures of 12 px with 3 to 30 dots, and their numbers in the format of the task."""
    random, rows = np.random.default_rng(0), [("file", "number")]
    (tmp_path / "dots").mkdir()
    for index in range(36):
        number = int(random.integers(3, 31))
        pixels = np.zeros(144, np.uint8)
        pixels[random.choice(144, number, replace=False)] = 255
        Image.fromarray(pixels.reshape(12, 12)).save(tmp_path / "dots" / f"{index}.png")
        rows.append((f"{index}.png", str(number)))
    with (tmp_path / "dots" / "numbers.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return tmp_path / "dots"


@pytest.fixture
def command(dots: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line where the package is installed; the runs of a comparison stay in this process."""
    monkeypatch.syspath_prepend(str(PACKAGE))
    tasks.tasks.cache_clear()
    names = ("counting", *(f"counting.{path.stem}" for path in (PACKAGE / "counting").glob("*.py")))

    monkeypatch.setattr(compare, "run_jobs", in_this_process)
    monkeypatch.chdir(tmp_path)

    def outcome(*words: str) -> tuple[int, str, str]:
        status = cli.main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    yield outcome
    tasks.tasks.cache_clear()
    for name in names:
        sys.modules.pop(name, None)


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def weights(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def test_the_task_is_small() -> None:
    lines = [line for path in PACKAGE.rglob("*.*") if path.is_file() for line in path.read_text().splitlines()]
    assert len(lines) < 200


def test_its_recipes_are_listed(command: Cli) -> None:
    status, out, err = command("ls")
    assert status == 0, err
    [line] = [line for line in out.splitlines() if line.startswith("counting/")]
    assert line.split()[:3] == ["counting/dots", "folder", "--data.root"]
    status, out, _ = command("ls", "counting/dots")
    assert (status, out.splitlines()[0][:16]) == (0, "Pictures of dots")


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|in eval mode at the start).*")
def test_a_run_of_any_task(command: Cli, tmp_path: Path) -> None:
    status, out, err = command("fit", "counting/dots", "--data.root=dots", "--name=run")
    assert status == 0, err
    folder = tmp_path / "runs" / "run"
    result = json.loads((folder / "result.json").read_text())
    assert f"error {result['metrics']['error']:.4g} dots" in out and "%" not in out
    assert result["metrics"]["error"] > 1 and result["primary"] == "error" and result["unit"] is None
    assert result["measures"] == [
        {"name": "error", "label": "counting error", "unit": "dots", "higher_is_better": False, "part": ""}
    ]
    # Two stages, each with its checkpoint and its cost, in one table of epochs.
    assert [(stage["name"], stage["epochs"]) for stage in result["stages"]] == [("train", 3), ("last_layer", 2)]
    assert all(stage["step_ms"] > 0 for stage in result["stages"]) and result["cost"]["step_ms"] is None
    assert result["cost"]["train_seconds"] == sum(stage["train_seconds"] for stage in result["stages"])
    rows = table(folder / "metrics.csv")
    assert [row["epoch"] for row in rows] == list("01234")
    assert [float(row["lr_network"]) for row in rows] == [0.002] * 3 + [0.0005] * 2
    first, last = (
        torch.load(folder / "checkpoints" / name, weights_only=True)["state_dict"]
        for name in ("train.ckpt", "last.ckpt")
    )
    changed = [name for name, value in last.items() if not value.equal(first[name])]
    assert changed == ["network.3.weight", "network.3.bias"]
    assert any("batchformer" in name for name in first) and not any("batchformer" in name for name in last)
    # Tested, asked about pictures that it has not seen, and exported.
    assert run.test(folder) == result["metrics"]
    status, out, err = command("test", str(folder))
    assert (status, out) == (0, f"error {result['metrics']['error']:.4g} dots\n"), err
    status, out, err = command("predict", str(folder), "dots/0.png", "dots/7.png", "--out=seen")
    assert (status, out) == (0, "seen/numbers.json\n"), err
    numbers = json.loads((tmp_path / "seen" / "numbers.json").read_text())
    assert set(numbers) == {"0.png", "7.png"}
    status, out, err = command("export", str(folder), "--format=safetensors")
    assert status == 0, err
    assert [Path(line).name for line in out.splitlines()] == ["model.safetensors", "model.json"]
    assert json.loads((folder / "export" / "model.json").read_text()) == {"side": 12}


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|in eval mode at the start).*")
@pytest.mark.parametrize("stopped_in", [1, 2, 3, 4])
def test_a_run_stopped_in_any_stage_resumes_to_the_same_end(
    stopped_in: int, command: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("fit", "counting/dots", "--data.root=dots")
    assert command(*words, "--name=whole")[0] == 0

    cls = tasks.task_class("counting")
    before = cls.on_train_batch_start

    def stop(self: Any, batch: Any, batch_idx: int) -> None:
        if self.current_epoch == stopped_in and batch_idx == 1:
            raise RuntimeError("stopped")
        before(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(cls, "on_train_batch_start", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            command(*words, "--name=broken")
    # A run that stopped can be tested, in whatever stage that was.
    status, out, err = command("test", "runs/broken")
    assert status == 0 and re.search(r"^error [\d.]+ dots$", out, re.MULTILINE), err
    status, out, err = command(*words, "--name=broken", "--resume")
    assert status == 0, err
    assert "Resuming runs/broken" in out
    whole, broken = tmp_path / "runs" / "whole", tmp_path / "runs" / "broken"
    for name in ("train.ckpt", "last.ckpt"):
        one, other = (weights(folder / "checkpoints" / name) for folder in (whole, broken))
        assert one.keys() == other.keys() and all(value.equal(other[key]) for key, value in one.items())
    assert (whole / "metrics.csv").read_text() == (broken / "metrics.csv").read_text()
    one, other = (json.loads((f / "result.json").read_text()) for f in (whole, broken))
    assert one["metrics"] == other["metrics"]
    assert [stage["name"] for stage in other["stages"]] == ["train", "last_layer"]
    # A finished run says so, also after it was moved.
    shutil.move(broken, tmp_path / "moved")
    status, out, _ = command("fit", "moved", "--resume")
    assert status == 0 and "finished already" in out
    assert run.test(tmp_path / "moved") == other["metrics"]


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|in eval mode at the start).*")
def test_a_stage_starts_from_another_run(command: Cli, tmp_path: Path) -> None:
    assert command("fit", "counting/dots", "--data.root=dots", "--stages.last_layer=null", "--name=first")[0] == 0
    second = ["--stages.train=null", "--stages.last_layer.start_from=runs/first", "--stages.last_layer.epochs=1"]
    status, _, err = command("fit", "counting/dots", "--data.root=dots", *second, "--name=second")
    assert status == 0, err
    result = json.loads((tmp_path / "runs/second/result.json").read_text())
    assert [(stage["name"], stage["epochs"]) for stage in result["stages"]] == [("last_layer", 1)]
    # What it started from is not needed any more once it has a checkpoint.
    shutil.rmtree(tmp_path / "runs" / "first")
    assert run.test(tmp_path / "runs" / "second") == result["metrics"]
    status, _, err = command("fit", "counting/dots", "--data.root=dots", *second, "--name=third")
    assert status == 2 and "Expected a run folder with checkpoints/last.ckpt" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages.tail.epochs=2"], "Expected stages out of train, last_layer, got tail."),
        (["--stages.train.epochs=-1"], "Expected at least 0 epochs in every stage, got train: -1."),
        (["--stages.train.name=tail"], "Expected stages out of train, last_layer, got tail."),
        (["--stages.last_layer.name=train"], "Expected every stage once, got train, train."),
        (["--stages.last_layer.start_from=runs/x"], "Expected start_from in the first stage of the list alone"),
        (["--trainer.max_epochs=3"], "Expected the epochs of each stage, got trainer.max_epochs beside stages."),
        (["--stages.train.epochs=many"], "stages: expected"),
        (["--stages.last_layer.model.optimizer.rate=2"], "stages: expected"),
        (["--stages.last_layer.settings.model.optimizer.rate=2"], "Unknown setting model.optimizer.rate"),
    ],
)
def test_wrong_stages_are_refused_before_the_first(
    words: list[str], message: str, command: Cli, tmp_path: Path
) -> None:
    status, _, err = command("fit", "counting/dots", "--data.root=dots", *words)
    assert status == 2 and message in err, err
    assert not (tmp_path / "runs").exists()


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|in eval mode at the start).*")
def test_a_comparison_of_any_task(command: Cli, tmp_path: Path) -> None:
    words = ("compare", "counting/dots", "--data.root=dots", "--stages.train.epochs=5", "--seeds=3", "--name=both")
    status, out, err = command(*words)
    assert status == 0, err
    assert "[1/12] plain, seed 0, split0: error " in out and " dots (" in out
    plan = json.loads((tmp_path / "runs/both/compare.json").read_text())
    assert plan["primary"] == "error" and plan["units"] == [{"name": "split0"}, {"name": "split1"}]
    results = {
        path.parent.relative_to(tmp_path / "runs/both").as_posix(): json.loads(path.read_text())
        for path in (tmp_path / "runs/both").glob("*/*/result.json")
    }
    assert len(results) == 12 and results["plain/seed1-split0"]["unit"] == {"name": "split0"}
    # Averaged over splits within a seed, paired over seeds; in dots, and less is better.
    means = {
        arm: [
            np.mean([results[f"{arm}/seed{seed}-split{split}"]["metrics"]["error"] for split in (0, 1)])
            for seed in range(3)
        ]
        for arm in ("plain", "batchformer")
    }
    difference = np.subtract(means["batchformer"], means["plain"])
    rows = table(tmp_path / "runs/both/report/differences.csv")
    [row] = [row for row in rows if row["metric"] == "error" and row["reference"] == "plain" and not row.get("unit")]
    assert float(row["mean"]) == pytest.approx(difference.mean())
    assert float(row["sd"]) == pytest.approx(difference.std(ddof=1)) and row["pairs"] == "3"
    per_split = [row for row in rows if row.get("unit") in ("split0", "split1") and row["metric"] == "error"]
    assert len(per_split) == 2
    report = (tmp_path / "runs/both/report/report.md").read_text(encoding="utf-8")
    assert "counting error" in report and "dots" in report and "split1" in report
    assert not any(word in report for word in ("accuracy", "top-1", "percentage points"))
    # It goes on where it was, over the same splits only.
    status, out, err = command(*words[:-2], "--seeds=4", "--name=both", "--resume")
    assert status == 0 and "(kept)" in out and "[16/16]" in out, err
    status, _, err = command(*words, "--data.split=1", "--resume")
    assert status == 2 and "Expected compare to set data.split in each run" in err


def test_an_option_that_the_task_has_not_is_refused(command: Cli, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("task: counting\n")
    (tmp_path / "a.png").touch()
    status, _, err = command("predict", "run", "a.png", "--threshold=0.5")
    assert status == 2
    assert "This task's predict has no option --threshold." in err
    status, _, err = command("predict", "run", "nothing.png", "b.png")
    assert status == 2
    assert err.count("does not exist") == 2


def test_a_missing_package_names_the_extra_of_the_task(command: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.tasks(), "longtail", "batchformer_missing.task:Task")
    status, _, err = command("fit", "longtail/folder")
    assert status == 2
    assert "batchformer_missing" in err and "[longtail]" in err


@pytest.mark.parametrize(
    ("place", "got"),
    [
        ("counting.task:Nothing", "got nothing"),
        ("counting.data:CountingData", "got <class"),
        ("counting.task", "nothing"),
    ],
)
def test_an_entry_point_to_no_task_is_named(
    place: str, got: str, command: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tasks.tasks(), "counting", place)
    status, _, err = command("fit", "counting/dots")
    assert status == 2
    assert "Expected a subclass of batchformer.tasks.training.task.Task" in err and got in err, err


def test_two_tasks_of_one_name_are_refused(command: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site" / "other-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (folder / "entry_points.txt").write_text("[batchformer.tasks]\ncounting = other.task:Task\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    tasks.tasks.cache_clear()
    status, _, err = command("ls")
    assert status == 2 and "calls itself 'counting'" in err


def test_recipes_of_one_task_import_no_other(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom batchformer.engine.config import parse\nfrom batchformer.engine.recipes import find_recipe\n"
        "parse(find_recipe('longtail/folder').path, logger=False)\n"
        "print(sorted({name.split('.')[2] for name in sys.modules if name.startswith('batchformer.tasks.')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "longtail" in done.stdout and not {"detection", "panoptic"} & set(done.stdout.split("'")), done.stderr
