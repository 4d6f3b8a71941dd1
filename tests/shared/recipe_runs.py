"""Runs of recipes, for tests of any task: fitted, stopped anywhere, resumed, and read back."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from batchformer.engine import run as engine
from batchformer.engine.config import task_of
from batchformer.engine.recipes import Recipe
from batchformer.engine.tasks import task_class


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """Return the settings of a recipe as its file spells them."""
    content: dict[str, Any] = yaml.safe_load(recipe.path.read_text(encoding="utf-8"))
    return content


def header_commands(recipe: Recipe) -> list[list[str]]:
    """Return the commands of a header, each as words; a line that begins with -- goes on with the one before."""
    commands: list[list[str]] = []
    inside = False
    for line in recipe.header:
        if line.startswith("batchformer "):
            commands.append(line.split()[1:])
        elif inside and line.startswith("--"):
            commands[-1] += line.split()
        inside = bool(commands) and line.startswith(("batchformer ", "--"))
    return commands


def fit(recipe: Recipe, words: Sequence[str], folder: Path, **more: Any) -> dict[str, Any]:
    return engine.fit(recipe.path, words, folder, name=recipe.name, say=lambda line: None, **more)


def result_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return content


def weights(folder: Path, stage: str = "last") -> dict[str, Tensor]:
    """Return the state dict of the checkpoint of a run, or of one of its finished stages."""
    state: dict[str, Tensor] = torch.load(folder / "checkpoints" / f"{stage}.ckpt", weights_only=True)["state_dict"]
    return state


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the epochs of a run, as metrics.csv has them."""
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Stopped(Exception):
    """Stands for whatever ends a run."""


@contextmanager
def stopped(recipe: Recipe, epoch: int, patch: pytest.MonkeyPatch, *, batch: int = 1) -> Iterator[None]:
    """Stop every run of the recipe's task before a batch of an epoch, counted over all stages; expect that it does."""
    task = task_class(task_of(recipe.path))
    original = task.on_train_batch_start

    def on_train_batch_start(self: Any, given: Any, batch_idx: int) -> None:
        if (self.current_epoch, batch_idx) == (epoch, batch):
            raise Stopped
        original(self, given, batch_idx)

    with patch.context() as patched:
        patched.setattr(task, "on_train_batch_start", on_train_batch_start)
        with pytest.raises(Stopped):
            yield


def check_that_it_resumes(
    recipe: Recipe, words: Sequence[str], whole: Path, epoch: int, patch: pytest.MonkeyPatch
) -> None:
    """Check that a run stopped in ``epoch`` and resumed ends where the whole one did, bit for bit.

    Compared are metrics, those of every class, the history of epochs, and the weights at the end of every stage.
    """
    broken = whole.with_name(f"broken-{epoch}")
    with stopped(recipe, epoch, patch):
        fit(recipe, words, broken)
    assert not (broken / "done").exists()
    assert len(rows(broken)) == epoch if epoch else not (broken / "checkpoints" / "last.ckpt").exists()
    resumed, expected = fit(recipe, words, broken, resume=True), result_of(whole)
    for key in ("metrics", "per_class"):
        assert resumed[key] == expected[key]
    for key in ("name", "epochs"):
        assert [stage[key] for stage in resumed["stages"]] == [stage[key] for stage in expected["stages"]]
    assert rows(broken) == rows(whole)
    checkpoints = sorted(path.stem for path in (whole / "checkpoints").glob("*.ckpt"))
    assert sorted(path.stem for path in (broken / "checkpoints").glob("*.ckpt")) == checkpoints
    for stage in checkpoints:
        one, other = weights(whole, stage), weights(broken, stage)
        assert one.keys() == other.keys()
        assert [key for key, value in one.items() if not torch.equal(value, other[key])] == []
