"""Stages of a run as plain values; runs with stages are in test_any_task.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from batchformer.engine.errors import ConfigError
from batchformer.engine.stages import PlannedStage, StageSettings, fold, plan, remaining, with_start

KNOWN = {"one": "", "two": "", "three": ""}


def listed(*stages: tuple[str, int]) -> list[StageSettings]:
    return [StageSettings(name, epochs) for name, epochs in stages]


def names(stages: list[PlannedStage]) -> list[str]:
    return [planned.stage.name for planned in stages]


def write(folder: Path, name: str, entry: Any = None) -> Path:
    path = folder / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({} if entry is None else {"toy": entry}, path)
    return path


def test_without_a_list_there_is_the_first_stage_with_the_trainers_epochs() -> None:
    [only] = plan(None, KNOWN)
    assert (only.stage.name, only.stage.epochs, only.stage.first_epoch, only.overrides, only.last) == (
        "one", None, 0, (), True,
    )  # fmt: skip


def test_epochs_go_on_counting_and_settings_become_words() -> None:
    stages = listed(("one", 3), ("two", 0), ("three", 2))
    stages[2].settings = {"data.sampler": "class_balanced", "model.optimizer.milestones": [1], "model.ema": None}
    planned = plan(stages, KNOWN)
    assert [(one.stage.epochs, one.stage.first_epoch, one.last) for one in planned] == [
        (3, 0, False), (0, 3, False), (2, 3, True),
    ]  # fmt: skip
    assert [one.overrides[-1] for one in planned] == [f"--trainer.max_epochs={end}" for end in (3, 3, 5)]
    assert planned[2].overrides[:-1] == (
        "--data.sampler=class_balanced", "--model.optimizer.milestones=[1]", "--model.ema=null",
    )  # fmt: skip


def test_a_later_stage_starts_from_the_one_before_and_from_nothing_else() -> None:
    stages = listed(("one", 1), ("two", 1))
    stages[1].start_from = "runs/other"
    with pytest.raises(ConfigError, match="start_from in the first stage of the list alone, got it in two"):
        plan(stages, KNOWN)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--seed=1"], ["--seed=1"]),
        (["--stages=[{name: two, epochs: 1}]"], ["--stages=[{name: two, epochs: 1}]"]),
        (["--stages.one=null", "--seed=1"], ["--seed=1", '--stages=[{"name": "two", "epochs": 5}]']),
        (
            ["--stages.two.model.lr=3", "--stages.two.settings.data.sampler=class_balanced"],
            [
                '--stages=[{"name": "one", "epochs": 9}, '
                '{"name": "two", "epochs": 5, "model.lr": 3, "settings": {"data.sampler": "class_balanced"}}]'
            ],
        ),
        (["--stages=[]", "--stages.three.epochs=4"], ['--stages=[{"name": "three", "epochs": 4}]']),
    ],
)
def test_words_about_one_stage_become_a_list(words: list[str], expected: list[str]) -> None:
    assert fold(words, [{"name": "one", "epochs": 9}, {"name": "two", "epochs": 5}]) == expected


def test_the_stages_that_remain_follow_from_the_checkpoints(tmp_path: Path) -> None:
    stages = plan(listed(("one", 1), ("two", 1), ("three", 1)), KNOWN)
    assert names(remaining(tmp_path, stages, "toy")) == ["one", "two", "three"]
    write(tmp_path, "last.ckpt", {"stage": "one"})
    assert names(remaining(tmp_path, stages, "toy")) == ["one", "two", "three"]
    (tmp_path / "checkpoints" / "last.ckpt").rename(tmp_path / "checkpoints" / "one.ckpt")
    assert names(remaining(tmp_path, stages, "toy")) == ["two", "three"]
    write(tmp_path, "last.ckpt", {"stage": "two"})
    assert names(remaining(tmp_path, stages, "toy")) == ["two", "three"]
    # An earlier version had one file for all stages, and called them parts.
    (tmp_path / "checkpoints" / "one.ckpt").unlink()
    write(tmp_path, "last.ckpt", {"part": "three"})
    assert names(remaining(tmp_path, stages, "toy")) == ["three"]


def test_a_stage_starts_from_the_one_before_or_from_the_runs_own_checkpoint(tmp_path: Path) -> None:
    stages = plan(listed(("one", 1), ("two", 1)), KNOWN)
    assert with_start(tmp_path, stages, stages[0]).start is None
    last = write(tmp_path, "last.ckpt", {"stage": "two"})
    assert with_start(tmp_path, stages, stages[1]).start == last
    one = write(tmp_path, "one.ckpt", {"stage": "one"})
    assert with_start(tmp_path, stages, stages[1]).start == one


def test_another_run_to_start_from_must_be_there_until_this_one_has_a_checkpoint(tmp_path: Path) -> None:
    other = write(tmp_path / "other", "last.ckpt")
    stages = plan([StageSettings("two", 1, start_from=str(tmp_path / "other"))], KNOWN)
    assert with_start(tmp_path / "run", stages, stages[0]).start == other
    other.unlink()
    with pytest.raises(FileNotFoundError, match="with checkpoints/last.ckpt"):
        with_start(tmp_path / "run", stages, stages[0])
    own = write(tmp_path / "run", "last.ckpt")
    assert with_start(tmp_path / "run", stages, stages[0]).start == own
