"""Stages of a run: a recipe lists them, they are fitted in turn, and each has its own checkpoint and cost.

A stage is a run of its own inside the run folder: a new task, data module and trainer, with the settings that the
recipe gives this stage on top of the others. Epochs go on counting from stage to stage, so that ``metrics.csv`` is one
table, and every random number belongs to one epoch. ``checkpoints/last.ckpt`` is that of the stage that runs, or of the
last one; a stage that is followed by another leaves ``checkpoints/<name>.ckpt``.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer

from batchformer.tasks.training.checkpoint import CheckpointFormat, checkpoint_of
from batchformer.tasks.training.contract import Stage

from .callbacks import Cost, History
from .errors import ConfigError

PREFIX = "stages."
OPEN = ("data.", "model.", "trainer.")
"""Beginnings of the settings that a stage may have of its own."""
KEPT = (
    "data.seed",
    "model.seed",
    "model.batchformer.arm",
    "trainer.max_epochs",
    "trainer.max_steps",
    "trainer.max_time",
)
"""Settings below :data:`OPEN` that belong to the whole run, or that the epochs of a stage say."""


@dataclass
class StageSettings:
    """A stage as recipes list it.

    Attributes:
        name: Name of the stage, one that the task knows.
        epochs: Epochs of this stage, at least 0.
        start_from: Run folder or checkpoint of another run to start from; the first stage of a list alone can have it.
        settings: Settings of this stage alone, by dotted key: ``{"model.optimizer.lr": 0.01}``.
    """

    name: str
    epochs: int
    start_from: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def _check_order(listed: Sequence[StageSettings], follows: Mapping[str, str]) -> None:
    if later := [one.name for one in listed[1:] if one.start_from is not None]:
        raise ConfigError(
            f"Expected start_from in the first stage of the list alone, got it in {', '.join(later)}: a later stage "
            "starts from the one before it. Leave start_from out there, or leave the stages before it out."
        )
    if not follows:
        return
    first = listed[0]
    if first.start_from is not None and first.name not in follows:
        raise ConfigError(
            f"Expected no start_from in the stage {first.name}, which trains from the beginning, got "
            f"{first.start_from}. Stages that start from a run: {', '.join(follows)}."
        )
    if first.start_from is None and first.name in follows:
        raise ConfigError(
            f"Expected the stage {follows[first.name]} before the stage {first.name}, or a run to start from: "
            f"--{PREFIX}{first.name}.start_from=RUN."
        )
    for before, one in pairwise(listed):
        if follows.get(one.name) != before.name:
            place = f"after the stage {follows[one.name]}" if one.name in follows else "as the first one"
            raise ConfigError(f"Expected the stage {one.name} {place}, got it after the stage {before.name}.")


def _check_settings(one: StageSettings) -> None:
    """Refuse settings of a stage that belong to the whole run: they would be ignored, or make runs unlike.

    Raises:
        ConfigError: Names them.
    """
    keys = [key for key, _ in leaves(one.settings)]
    if wrong := [key for key in keys if not key.startswith(OPEN) or key in KEPT]:
        raise ConfigError(
            f"Expected settings of the stage {one.name} below data, model or trainer that a stage can have of its own, "
            f"got {', '.join(wrong)}. Set {'it' if len(wrong) == 1 else 'them'} for the whole run; the length of a "
            "stage is its epochs."
        )


def leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return the dotted keys and values of nested mappings.

    Example:
        >>> leaves({"a": {"b": 1}, "c": {}})
        [('a.b', 1), ('c', {})]
    """
    found: list[tuple[str, Any]] = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            found += leaves(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


@dataclass(frozen=True)
class PlannedStage:
    """A stage and what it takes to run it.

    Attributes:
        stage: Name, epochs and place among the epochs of the run; its ``start`` is filled in by :func:`with_start`.
        start_from: Another run to start from.
        overrides: ``--key=value`` words that this stage adds to those of the run.
        last: Whether no stage comes after it.
    """

    stage: Stage
    start_from: str | None = None
    overrides: tuple[str, ...] = ()
    last: bool = True


def plan(
    listed: Sequence[StageSettings] | None, known: Mapping[str, str], follows: Mapping[str, str] | None = None
) -> list[PlannedStage]:
    """Lay the stages of a run out over its epochs.

    Args:
        listed: Stages of the recipe; none is one stage, the task's first, with the trainer's epochs.
        known: Stages of the task, by name.
        follows: Stage -> the stage that it starts from, for the task's later stages.

    Raises:
        ConfigError: For an unknown or repeated stage, an order that the task cannot follow, negative epochs, settings
            that belong to the whole run, or ``start_from`` where it has no use or is missing.

    Example:
        >>> stages = [StageSettings("train", 20), StageSettings("crt", 5)]
        >>> [(one.stage.name, one.stage.first_epoch, one.overrides) for one in plan(stages, {"train": "", "crt": ""})]
        [('train', 0, ('--trainer.max_epochs=20',)), ('crt', 20, ('--trainer.max_epochs=25',))]
    """
    if not listed:
        return [PlannedStage(Stage(next(iter(known))))]
    names = [one.name for one in listed]
    if unknown := [name for name in names if name not in known]:
        raise ConfigError(f"Expected stages out of {', '.join(known)}, got {', '.join(unknown)}.")
    if len(set(names)) != len(names):
        raise ConfigError(f"Expected every stage once, got {', '.join(names)}.")
    if wrong := [f"{one.name}: {one.epochs}" for one in listed if one.epochs < 0]:
        raise ConfigError(f"Expected at least 0 epochs in every stage, got {', '.join(wrong)}.")
    _check_order(listed, follows or {})
    for one in listed:
        _check_settings(one)
    planned, epochs = [], 0
    for one in listed:
        end = epochs + one.epochs
        words = [word(key, value) for key, value in one.settings.items()]
        stage = Stage(one.name, one.epochs, epochs)
        overrides = (*words, f"--trainer.max_epochs={end}")
        planned.append(PlannedStage(stage, one.start_from, overrides, last=one is listed[-1]))
        epochs = end
    return planned


def word(key: str, value: Any) -> str:
    """Return a setting as a ``--key=value`` word.

    Example:
        >>> word("data.sampler", "class_balanced"), word("model.optimizer.milestones", [3, 4])
        ('--data.sampler=class_balanced', '--model.optimizer.milestones=[3, 4]')
    """
    return f"--{key}={value if isinstance(value, str) else json.dumps(value, default=vars)}"


def fold(words: Sequence[str], listed: Any) -> list[str]:
    """Put ``--stages.<name>.<key>=value`` words into one ``--stages=`` word.

    A stage that is not listed yet is appended; ``--stages.<name>=null`` leaves one out.

    Args:
        words: ``--key=value`` words of the user.
        listed: Stages of the recipe, a list of mappings.

    Example:
        >>> fold(["--stages.crt.epochs=2"], [{"name": "train", "epochs": 9}, {"name": "crt", "epochs": 5}])
        ['--stages=[{"name": "train", "epochs": 9}, {"name": "crt", "epochs": 2}]']
    """
    rest, changes = [], []
    for given in words:
        key, _, value = given.removeprefix("--").partition("=")
        if key == "stages":
            listed = yaml.safe_load(value)
        elif key.startswith(PREFIX):
            changes.append((*key.removeprefix(PREFIX).partition(".")[::2], yaml.safe_load(value)))
        else:
            rest.append(given)
    named = isinstance(listed, list) and all(isinstance(one, Mapping) and "name" in one for one in listed)
    if listed is not None and not named:
        raise ConfigError(f"Expected stages as a list, each with a name and epochs, got {listed!r}.")
    if not changes:
        return list(words)
    stages = {str(one["name"]): dict(one) for one in listed or ()}
    for name, key, value in changes:
        if not key and (value is not None or name not in stages):
            raise ConfigError(
                f"Expected --{PREFIX}NAME.KEY=VALUE, or --{PREFIX}NAME=null to leave out a stage of the recipe "
                f"({', '.join(stages) or 'none'}), got --{PREFIX}{name}={value}."
            )
        if not key:
            del stages[name]
            continue
        stage = stages.setdefault(name, {"name": name})
        inside = key.removeprefix("settings.")
        if inside == key:
            stage[key] = value
        else:
            stage["settings"] = {**(stage.get("settings") or {}), inside: value}
    return [*rest, f"--stages={json.dumps(list(stages.values()))}"]


def last_checkpoint(folder: Path) -> Path:
    """Return the place of the checkpoint of the stage that runs, or of the last one."""
    return folder / "checkpoints" / "last.ckpt"


def finished_checkpoint(folder: Path, stage: Stage) -> Path:
    """Return the place of the checkpoint of a stage that is finished and followed by another."""
    return folder / "checkpoints" / f"{stage.name}.ckpt"


def remaining(folder: Path, stages: Sequence[PlannedStage], task: CheckpointFormat) -> list[PlannedStage]:
    """Return the stages of a run that are not finished, by the checkpoints in its folder."""
    reached = 0
    for place, planned in enumerate(stages):
        if not planned.last and finished_checkpoint(folder, planned.stage).exists():
            reached = place + 1
    if last_checkpoint(folder).exists():
        reached = max(reached, stages.index(stage_of(last_checkpoint(folder), stages, task)))
    return list(stages[reached:])


def stage_of(checkpoint: Path, stages: Sequence[PlannedStage], task: CheckpointFormat) -> PlannedStage:
    """Return the stage of a run that a checkpoint was written in; the first one where it does not say."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    name = task.entry(content)["stage"] if task.task in content else None
    return next((planned for planned in stages if planned.stage.name == name), stages[0])


def with_start(folder: Path, stages: Sequence[PlannedStage], planned: PlannedStage) -> Stage:
    """Return a stage with the checkpoint that its network is built from.

    That is the one of the stage before, or of another run; where it is gone, the run's own, which has all that the
    network needs.

    Raises:
        FileNotFoundError: When ``start_from`` has no checkpoint, and the run has none either.
    """
    place, own = list(stages).index(planned), last_checkpoint(folder)
    if place:
        start = finished_checkpoint(folder, stages[place - 1].stage)
    elif planned.start_from is not None:
        try:
            start = checkpoint_of(planned.start_from)
        except FileNotFoundError:
            if not own.exists():
                raise
            start = own
    else:
        return planned.stage
    if not start.exists():
        return replace(planned.stage, start=own)
    # The stage before may have stopped early, and epochs go on counting from where it did.
    first = epochs_done(start) if place else planned.stage.first_epoch
    return replace(planned.stage, start=start, first_epoch=first)


def epochs_done(checkpoint: Path) -> int:
    """Return the number of epochs that a checkpoint has behind it."""
    loops = torch.load(checkpoint, map_location="cpu", weights_only=True)["loops"]
    return int(loops["fit_loop"]["epoch_progress"]["current"]["processed"])


def continue_counting(stage: Stage, trainer: Trainer, history: History) -> None:
    """Set a trainer to the epochs of the stages before, so that it goes on counting; the optimizer starts anew."""
    if not stage.first_epoch or stage.start is None:
        return
    before = torch.load(stage.start, map_location="cpu", weights_only=True)
    trainer.fit_loop.load_state_dict(before["loops"]["fit_loop"])
    history.load_state_dict(before["callbacks"][history.state_key])


def finish(folder: Path, planned: PlannedStage, trainer: Trainer) -> None:
    """Give the checkpoint of a finished stage its own name, where another stage follows."""
    if planned.last:
        return
    if trainer.is_global_zero:
        os.replace(last_checkpoint(folder), finished_checkpoint(folder, planned.stage))
    trainer.strategy.barrier("stage")


def costs(folder: Path, stages: Sequence[PlannedStage], now: Cost) -> list[dict[str, Any]]:
    """Return the cost of every stage, one record each; those of earlier stages come from their checkpoints.

    The epochs are those that were trained, which early stopping can make fewer than the planned ones.
    """
    records, before = [], 0
    for planned in stages:
        path, cost = last_checkpoint(folder), now
        if not planned.last:
            path, cost = finished_checkpoint(folder, planned.stage), Cost()
            if not path.exists():
                before = planned.stage.first_epoch + (planned.stage.epochs or 0)
                continue
            cost.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["callbacks"][cost.state_key])
        done = epochs_done(path)
        records.append(
            {
                "name": planned.stage.name,
                "epochs": done - before,
                "step_ms": cost.step_ms(),
                "train_seconds": cost.train_seconds,
                "parameters_train": cost.parameters,
            }
        )
        before = done
    return records
