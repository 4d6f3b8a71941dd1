"""Stages of recipes: the commands of their headers in order, and runs of several stages broken in each of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recipe_runs import check_that_it_resumes, fit, header_commands, result_of, settings_of, weights
from tiny_recipes import tiny

from batchformer import cli
from batchformer.engine import run as engine
from batchformer.engine.recipes import find_recipe

MakeData = Callable[..., Path]
STAGED = ["cifar10-lt-balanced-softmax", "cifar100-lt-balanced-softmax", "fashion-mnist-lt-paco", "cifar100-lt-ride"]


def made_small(given: dict[str, str]) -> list[str]:
    """Return words that make the stages which a command lists last at most an epoch of few steps, or the run itself."""
    epochs = {key: number for key, number in given.items() if key.startswith("stages.") and key.endswith(".epochs")}
    words = [f"--{key}={min(1, int(number))}" for key, number in epochs.items()] or ["--trainer.max_epochs=1"]
    return words + [f"--{key}=4" for key in given if key.endswith(".settings.data.batch_size")]


@pytest.mark.parametrize("name", [f"longtail/{name}" for name in STAGED])
def test_stages_and_distillation_as_the_header_says(
    name: str, make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header's own commands, in order, made tiny: the words that follow the command's win over it."""
    recipe = find_recipe(name)
    root = make_data(settings_of(recipe)["data"]["dataset"])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", name, *tiny(recipe, root), "--name=FIRST"]) == 0
    first, seen = weights(Path("runs/FIRST")), set()
    for _, other, *words in header_commands(recipe)[1:]:
        given = dict(word.removeprefix("--").split("=", 1) for word in words)
        words = [word.replace("=FIRST", "=runs/FIRST") for word in words]
        assert cli.main(["fit", other, *words, *tiny(find_recipe(other), root, epochs={}), *made_small(given)]) == 0
        folder = Path("runs") / given["name"]
        result = result_of(folder)
        # What was saved is what was tested, whatever the stage.
        assert engine.test(folder) == result["metrics"]
        stage = result["stages"][-1]["name"]
        seen.add(stage)
        if stage in ("crt", "lws", "tau"):
            kept = {key: value for key, value in weights(folder).items() if "backbone" in key}
            assert kept and all(value.equal(first[key]) for key, value in kept.items())
    assert seen - {"train"}, "a second stage"


SECOND = {
    "crt": ("fashion-mnist-lt", [1, 2, 3]),
    "lws": ("fashion-mnist-lt", [3]),
    "routing": ("fashion-mnist-lt-ride", [2, 3]),
}
"""Second stages, a recipe that can have each, and the epochs in which its run is broken; 0 and 1 are the first's."""


@pytest.mark.parametrize("stage", SECOND)
def test_a_run_of_two_stages_is_broken_and_resumed(
    stage: str, make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, epochs = SECOND[stage]
    recipe = find_recipe(f"longtail/{name}")
    words = tiny(recipe, make_data("fashion-mnist"), epochs={})
    words += ["--stages.train.epochs=2", f"--stages.{stage}.epochs=2", "--data.sampler=class_balanced"]
    words += ["--stages.train.settings.data.sampler=instance", f"--stages.{stage}.settings.model.optimizer.lr=0.05"]
    result = fit(recipe, words, tmp_path / "whole")
    assert [entry["name"] for entry in result["stages"]] == ["train", stage]
    before, after = weights(tmp_path / "whole", "train"), weights(tmp_path / "whole")
    changed = {key for key, value in after.items() if key not in before or not value.equal(before[key])}
    assert changed and not any("backbone" in key or "batchformer" in key for key in changed)
    for epoch in epochs:
        check_that_it_resumes(recipe, words, tmp_path / "whole", epoch, monkeypatch)


def test_a_stage_without_epochs_is_the_same_in_one_run_and_in_two(make_data: MakeData, tmp_path: Path) -> None:
    recipe = find_recipe("longtail/fashion-mnist-lt")
    words = tiny(recipe, make_data("fashion-mnist"), epochs={})
    fit(recipe, [*words, "--trainer.max_epochs=1"], tmp_path / "first")
    start = f"--stages.tau.start_from={tmp_path / 'first'}"
    two = fit(recipe, [*words, "--stages.tau.epochs=0", start], tmp_path / "second")
    one = fit(recipe, [*words, "--stages.train.epochs=1", "--stages.tau.epochs=0"], tmp_path / "both")
    assert one["metrics"] == two["metrics"]
    first, inside = weights(tmp_path / "first"), weights(tmp_path / "both", "train")
    assert first.keys() == inside.keys() and all(torch.equal(first[key], inside[key]) for key in first)
    assert [entry["epochs"] for entry in one["stages"]] == [1, 0]
    assert [entry["epochs"] for entry in two["stages"]] == [0]
    found, expected = weights(tmp_path / "both"), weights(tmp_path / "second")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
