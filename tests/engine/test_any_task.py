"""The engine, the report and the command line know no task: one of the tests' own goes all the way through them."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchformer import cli
from batchformer.engine import compare, run, tasks
from batchformer.tasks.training.contract import TaskModule

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line in a folder with a recipe of the task ``toy``; the runs of a comparison stay in this process."""
    spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
    assert spec is not None and spec.loader is not None
    toy = importlib.util.module_from_spec(spec)
    for name in ("toy", "batchformer.tasks.toy.restore", "batchformer.tasks.toy.predict"):
        monkeypatch.setitem(sys.modules, name, toy)
    spec.loader.exec_module(toy)
    monkeypatch.setitem(tasks.TASKS, "toy", ("toy:ToyTask", "toy:ToyData"))

    def here(recipe: Path, overrides: list[str], folder: Path, name: str, words: str | None) -> dict[str, Any]:
        return run.fit(recipe, overrides, folder, name=name, resume=folder.exists(), say=lambda line: None)

    monkeypatch.setattr(compare, "_apart", here)
    (tmp_path / "toy.yaml").write_text("task: toy\ntrainer:\n  max_epochs: 5\n  accelerator: cpu\nprecision: 32-true\n")
    monkeypatch.chdir(tmp_path)

    def outcome(*words: str) -> tuple[int, str, str]:
        status = cli.main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return outcome


@pytest.mark.filterwarnings("ignore:.*(LeafSpec|in eval mode at the start).*")
def test_a_run_of_any_task(command: Cli, tmp_path: Path) -> None:
    status, out, err = command("fit", "toy.yaml", "--name=run")
    assert status == 0, err
    assert "AP " in out and "unseen_AP " in out
    assert isinstance(sys.modules["toy"].ToyTask(), TaskModule)
    folder = tmp_path / "runs" / "run"
    result = json.loads((folder / "result.json").read_text())
    assert (result["primary"], result["class_metric"], result["class_count"]) == ("AP", "AP", "training boxes")
    assert set(result["metrics"]) == {"AP", "unseen_AP", "APS"}
    assert 0 <= result["metrics"]["unseen_AP"] <= result["metrics"]["AP"] <= 1
    assert result["metrics"]["APS"] is None
    assert [entry["name"] for entry in result["per_class"]] == ["cat", "dog", "owl"]
    assert result["per_class"][0].keys() == {"name", "count", "value"}
    assert result["notes"] == ["everything trains"]
    assert (folder / "predictions.json").is_file()
    assert run.test(folder) == result["metrics"]
    # Exported as the task says.
    status, _, err = command("export", str(folder))
    assert (status, err) == (2, "batchformer export: Expected safetensors, got ONNX.\n")
    status, out, err = command("export", str(folder), "--format=safetensors")
    assert status == 0, err
    assert [Path(line).name for line in out.splitlines()] == ["model.safetensors", "model.json", "README.txt"]
    # And asked about images that it has not seen.
    for name in ("b.png", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    status, out, err = command("predict", str(folder), ".", "notes.txt", "--out=seen", "--threshold=0.3")
    assert (status, out) == (0, "seen/predictions.json\n"), err
    count, threshold = json.loads((tmp_path / "seen" / "predictions.json").read_text())
    assert (count, threshold) == (4, 0.3)  # a.jpg, b.png, the run's own picture, and the file that was named


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_a_comparison_of_any_task(command: Cli, tmp_path: Path) -> None:
    status, out, err = command("compare", "toy.yaml", "--data.root", "somewhere", "--seeds=3", "--name=both")
    assert status == 0, err
    assert "[1/6] plain, seed 0: AP " in out
    plan = json.loads((tmp_path / "runs/both/compare.json").read_text())
    assert plan["primary"] == "AP"
    report = (tmp_path / "runs/both/report/report.md").read_text(encoding="utf-8")
    assert "| arm | seeds | AP | vs plain | 95 % interval | verdict | AP small | unseen AP |" in report
    assert "### AP per class\n\n| class | training boxes | plain | batchformer | difference |" in report
    assert "### On the way" in report and "vs plain, epoch 5 of 5" in report
    assert "| first | ![first.png](<../plain/seed0/pictures/first.png>) | ![first.png](<../batchformer/seed0" in report
    assert "Note: everything trains" in report
    assert {path.name for path in (tmp_path / "runs/both/report").glob("*.png")} >= {"curves.png", "classes.png"}
    assert not any(word in report for word in ("accuracy", "top-1", "training images"))


def test_the_task_says_what_is_not_to_be_compared(command: Cli, tmp_path: Path) -> None:
    status, _, err = command("compare", "toy.yaml", "--model.second=true")
    assert (status, err) == (
        2,
        "batchformer compare: Expected settings in which the arms differ, but the second stage has no module.\n",
    )
    assert not (tmp_path / "runs").exists()


def test_an_option_that_the_task_has_not_is_refused(command: Cli, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("task: longtail\n")
    (tmp_path / "a.png").touch()
    status, _, err = command("predict", "run", "a.png", "--threshold=0.5")
    assert status == 2
    assert "options that predictions of this task have, got --threshold" in err
    status, _, err = command("predict", "run", "nothing.png", "b.png")
    assert status == 2
    assert err.count("does not exist") == 2


def test_a_missing_package_names_the_extra_of_the_task(command: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tasks.TASKS, "toy", ("no_such_package.task:Task", "toy:ToyData"))
    status, _, err = command("fit", "toy.yaml")
    assert status == 2
    assert "no_such_package is missing: pip install 'batchformer[toy]'" in err


def test_recipes_of_one_task_import_no_other(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys\nfrom batchformer.engine.config import parse\nfrom batchformer.engine.recipes import find_recipe\n"
        "parse(find_recipe('longtail/folder').path, logger=False)\n"
        "print(sorted({name.split('.')[2] for name in sys.modules if name.startswith('batchformer.tasks.')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "['longtail', 'training']", done.stderr
