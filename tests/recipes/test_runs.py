"""Recipes as whole runs on tiny data in the real format of their data set: trained, recorded, broken and resumed.

One for each kind of network, loss and source: the table in tests/shared/tiny_recipes.py says which stands for which.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recipe_runs import check_that_it_resumes, fit, result_of, rows, settings_of, weights
from tiny_recipes import RECIPES, STANDS_FOR, broken_in, epochs_of, tiny

from batchformer.engine import run as engine
from batchformer.engine.config import task_of
from batchformer.engine.recipes import Recipe, find_recipe
from batchformer.engine.tasks import task_class

MakeData = Callable[..., Path]
FILES = ("config.yaml", "environment.json", "metrics.csv", "result.json", "done", "checkpoints/last.ckpt")


def data_of(recipe: Recipe, make_data: MakeData) -> Path:
    settings = settings_of(recipe)
    return make_data(settings["data"]["dataset"], settings["task"])


@pytest.mark.parametrize("name", STANDS_FOR)
def test_trains_records_and_resumes_to_the_same_end(
    name: str, make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, run, stages = find_recipe(name), tmp_path / "whole", epochs_of(find_recipe(name))
    overrides = tiny(recipe, data_of(recipe, make_data))
    result = fit(recipe, overrides, run)
    for file in FILES:
        assert (run / file).is_file(), file
    assert result_of(run) == result
    assert result["recipe"] == name
    task = task_class(task_of(recipe.path))
    assert result["primary"] == task.primary
    assert 0 <= result["metrics"][task.primary] <= 1
    assert {entry["name"]: entry["epochs"] for entry in result["stages"]} == stages
    assert all(entry["step_ms"] > 0 for entry in result["stages"])
    assert result["cost"]["parameters_train"] > result["cost"]["parameters_test"]
    history = rows(run)
    assert [row["epoch"] for row in history] == [str(epoch) for epoch in range(sum(stages.values()))]
    assert [row["step"] for row in history] == [str(2 * epoch + 2) for epoch in range(sum(stages.values()))]
    assert all(math.isfinite(float(row["train_loss"])) for row in history)
    assert all(0 <= float(row[f"val_{task.primary}"]) <= 1 for row in history[-2:])
    assert {path.stem for path in (run / "checkpoints").glob("*.ckpt")} == {*list(stages)[:-1], "last"}
    for epoch in broken_in(recipe):
        check_that_it_resumes(recipe, overrides, run, epoch, monkeypatch)


def test_moving_average_is_saved_tested_and_resumed(
    make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = find_recipe("longtail/fashion-mnist-lt")
    overrides = tiny(recipe, make_data("fashion-mnist"))
    fit(recipe, overrides, tmp_path / "last")
    averaging = [*overrides, "--model.ema=0.5"]
    result = fit(recipe, averaging, tmp_path / "whole")
    last, average = weights(tmp_path / "last"), weights(tmp_path / "whole")
    assert last.keys() == average.keys()
    assert not torch.equal(last["network.classifier.weight"], average["network.classifier.weight"])
    assert engine.test(tmp_path / "whole") == result["metrics"]
    check_that_it_resumes(recipe, averaging, tmp_path / "whole", 1, monkeypatch)


@pytest.mark.parametrize("name", ["longtail/fashion-mnist-lt", "longtail/cifar100-lt-paco"])
def test_checkpoint_holds_every_weight_once(name: str, make_data: MakeData, tmp_path: Path) -> None:
    recipe = find_recipe(name)
    fit(recipe, tiny(recipe, data_of(recipe, make_data)), tmp_path / "run")
    state = weights(tmp_path / "run")
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    assert {key.split(".")[0] for key in state} == {"network"}


STILL = ["--model.optimizer.lr=0", "--model.optimizer.weight_decay=0"]
ARMS = {
    "longtail/fashion-mnist-lt": ("plain", "batchformer"),
    "longtail/imagenet-lt-r10-ride": ("plain", "batchformer"),
    "panoptic/folder": ("plain", "batchformer", "self_only"),
}


@pytest.mark.parametrize("name", ARMS)
def test_arms_start_from_the_same_weights(name: str, make_data: MakeData, tmp_path: Path) -> None:
    """Without learning, the plain network of every arm is the same after all stages, whatever the module draws."""
    recipe = find_recipe(name)
    words = [*tiny(recipe, data_of(recipe, make_data), epochs=dict.fromkeys(epochs_of(recipe), 1)), *STILL]
    words += [f"--stages.{stage}.settings.model.optimizer.lr=0" for stage in epochs_of(recipe) if stage != "train"]
    for arm in ARMS[name]:
        fit(recipe, [*words, f"--model.batchformer.arm={arm}"], tmp_path / arm)
    plain, *others = (weights(tmp_path / arm) for arm in ARMS[name])
    learned = [key for key in plain if name.startswith("panoptic/") or key.endswith("weight")]
    for own in others:
        assert [key for key in learned if not own[key].equal(plain[key])] == []
        assert set(own) - set(plain), "the module's own weights"


def test_arms_learn_other_weights(make_data: MakeData, tmp_path: Path) -> None:
    recipe = find_recipe("longtail/imagenet-lt-r10-ride")
    words = tiny(recipe, data_of(recipe, make_data), epochs={"train": 1})
    for arm in ("plain", "batchformer"):
        fit(recipe, [*words, f"--model.batchformer.arm={arm}"], tmp_path / arm)
    plain, mixed = (weights(tmp_path / arm) for arm in ("plain", "batchformer"))
    assert not all(mixed[key].equal(value) for key, value in plain.items() if key.endswith("weight"))


def test_places_trains_the_last_block_and_the_classifier_alone(make_data: MakeData, tmp_path: Path) -> None:
    recipe = find_recipe("longtail/places-lt-r152-balanced-softmax")
    words = tiny(recipe, make_data("places-lt"))
    fit(recipe, words, tmp_path / "trained")
    fit(recipe, [*words, "--model.optimizer.lr=0", "--trainer.max_epochs=1"], tmp_path / "start")
    before, after = weights(tmp_path / "start"), weights(tmp_path / "trained")
    learned = [key for key in before if "running" not in key and "num_batches" not in key]
    network = {key.removeprefix("network.") for key in learned if not before[key].equal(after[key])}
    assert {name.split(".")[0] for name in network} == {"backbone", "classifier", "batchformer"}
    assert {name.split(".")[1] for name in network if name.startswith("backbone")} == {"layer4"}


def test_train_only_that_names_nothing_is_refused(make_data: MakeData, tmp_path: Path) -> None:
    recipe = find_recipe("longtail/fashion-mnist-lt")
    words = [*tiny(recipe, make_data("fashion-mnist")), "--model.network.train_only=[backbone.layer9]"]
    with pytest.raises(ValueError, match=r"train_only to name parts out of backbone\.bn1.*got backbone\.layer9"):
        fit(recipe, words, tmp_path / "run")


# ------------------------------------------------------------------ the published networks


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_published_network(name: str, make_data: MakeData, tmp_path: Path) -> None:
    recipe = find_recipe(name)
    epochs = dict.fromkeys(epochs_of(recipe), 1)
    result = fit(recipe, tiny(recipe, data_of(recipe, make_data), own_network=True, epochs=epochs), tmp_path / "run")
    assert math.isfinite(result["metrics"][result["primary"]])
