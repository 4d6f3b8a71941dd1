"""Stages of a run as plain values; runs with stages are in test_any_task.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from batchformer.engine.errors import ConfigError
from batchformer.engine.stages import PlannedStage, StageSettings, fold, plan, remaining, with_start
from batchformer.tasks.training.checkpoint import CheckpointFormat

KNOWN = {"one": "", "two": "", "three": ""}


def listed(*stages: tuple[str, int]) -> list[StageSettings]:
    return [StageSettings(name, epochs) for name, epochs in stages]


def names(stages: list[PlannedStage]) -> list[str]:
    return [planned.stage.name for planned in stages]


TOY = CheckpointFormat("toy", translate=lambda old: {"stage": old["part"]})


def write(folder: Path, name: str, entry: Any = None, epochs: int = 1) -> Path:
    path = folder / "checkpoints" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    loops = {"fit_loop": {"epoch_progress": {"current": {"processed": epochs}}}}
    torch.save({"loops": loops} | ({} if entry is None else {"toy": entry}), path)
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
    assert names(remaining(tmp_path, stages, TOY)) == ["one", "two", "three"]
    write(tmp_path, "last.ckpt", {"stage": "one", "facts": {}})
    assert names(remaining(tmp_path, stages, TOY)) == ["one", "two", "three"]
    (tmp_path / "checkpoints" / "last.ckpt").rename(tmp_path / "checkpoints" / "one.ckpt")
    assert names(remaining(tmp_path, stages, TOY)) == ["two", "three"]
    write(tmp_path, "last.ckpt", {"stage": "two", "facts": {}})
    assert names(remaining(tmp_path, stages, TOY)) == ["two", "three"]
    # An earlier version had one file for all stages, and called them parts.
    (tmp_path / "checkpoints" / "one.ckpt").unlink()
    write(tmp_path, "last.ckpt", {"part": "three"})
    assert names(remaining(tmp_path, stages, TOY)) == ["three"]


def test_a_stage_starts_from_the_one_before_or_from_the_runs_own_checkpoint(tmp_path: Path) -> None:
    stages = plan(listed(("one", 1), ("two", 1)), KNOWN)
    assert with_start(tmp_path, stages, stages[0]).start is None
    last = write(tmp_path, "last.ckpt", {"stage": "two", "facts": {}})
    assert with_start(tmp_path, stages, stages[1]).start == last
    one = write(tmp_path, "one.ckpt", {"stage": "one", "facts": {}})
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


def test_epochs_go_on_from_where_the_stage_before_stopped_early(tmp_path: Path) -> None:
    stages = plan(listed(("one", 30), ("two", 3)), KNOWN)
    write(tmp_path, "one.ckpt", {"stage": "one", "facts": {}}, epochs=5)
    assert with_start(tmp_path, stages, stages[1]).first_epoch == 5


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([("two", 1)], "Expected the stage one before the stage two, or a run to start from: --stages.two.start_from"),
        (
            [("one", 1), ("three", 1), ("two", 1)],
            "Expected the stage two after the stage one, got it after the stage three",
        ),
        ([("two", 1, "runs/x"), ("one", 1)], "Expected the stage one as the first one, got it after the stage two"),
        ([("one", 1, "runs/x")], "Expected no start_from in the stage one, which trains from the beginning"),
    ],
)
def test_an_order_that_the_task_cannot_follow_is_refused(stages: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan([StageSettings(*one) for one in stages], KNOWN, {"two": "one", "three": "one"})


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 3},
        {"model.batchformer.arm": "plain"},
        {"model": {"batchformer": {"arm": "plain"}}},
        {"data.seed": 1},
        {"trainer.max_epochs": 9},
        {"task": "detection"},
        {"stages": []},
    ],
)
def test_settings_of_the_whole_run_are_refused_in_a_stage(settings: dict[str, Any]) -> None:
    [key] = {"model.batchformer.arm"} if "model" in settings else set(settings)
    with pytest.raises(ConfigError, match=f"settings of the stage one below data, model or trainer .*, got {key}"):
        plan([StageSettings("one", 1, settings=settings)], KNOWN)


@pytest.mark.parametrize("words", [["--stages={one: 3}"], ["--stages=[3]"], ["--stages=[{epochs: 3}]"], ["--stages=x"]])
def test_stages_that_are_no_list_of_stages_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="Expected stages as a list, each with a name and epochs"):
        fold(words, None)


@pytest.mark.parametrize("words", [["--stages.mask=null"], ["--stages.one.=3"], ["--stages.one=3"]])
def test_a_word_about_no_stage_is_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"Expected --stages.NAME.KEY=VALUE, or --stages.NAME=null"):
        fold(words, [{"name": "one", "epochs": 9}])
