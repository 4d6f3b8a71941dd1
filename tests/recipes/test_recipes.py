"""Every recipe: its header, its settings, and a whole run on tiny data in the real format of its data set.

Those of panoptic segmentation, which train in two parts, are in test_panoptic_recipes.py.
"""

import csv
import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from torch import Tensor

from batchformer import cli
from batchformer.engine import run as engine
from batchformer.engine.config import parse, task_of
from batchformer.engine.recipes import Recipe, find_recipe, recipes
from batchformer.engine.tasks import task_classes
from batchformer.tasks.training.schedule import learning_rate_factor
from batchformer.tasks.training.settings import OptimizerSettings

MakeData = Callable[..., Path]

RECIPES = [
    "detection/coco-conditional-detr-r50",
    "detection/coco-deformable-detr-r50",
    "detection/coco-detr-r50",
    "detection/coco-smca-r50",
    "detection/folder",
    "detection/scenes",
    "longtail/cifar10-lt-balanced-softmax",
    "longtail/cifar100-lt-balanced-softmax",
    "longtail/cifar100-lt-paco",
    "longtail/cifar100-lt-ride",
    "longtail/fashion-mnist-lt",
    "longtail/fashion-mnist-lt-paco",
    "longtail/fashion-mnist-lt-ride",
    "longtail/folder",
    "longtail/imagenet-lt-r10-balanced-softmax",
    "longtail/imagenet-lt-r10-ride",
    "longtail/imagenet-lt-r50-balanced-softmax",
    "longtail/imagenet-lt-r50-paco",
    "longtail/imagenet-lt-r50-ride",
    "longtail/imagenet-lt-x50-ride",
    "longtail/inat18-r50-ride",
    "longtail/places-lt-r152-balanced-softmax",
]
BIG = ("resnet50", "resnext50", "resnet152")
ARRAYS = ("fashion-mnist", "cifar10", "cifar100")
MEASURED = ("fashion-mnist", "folder", "scenes")
every_recipe = pytest.mark.parametrize("name", RECIPES)


def settings_of(recipe: Recipe) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(recipe.path.read_text(encoding="utf-8"))
    return content


def tiny(recipe: Recipe, root: Path, *, own_network: bool = False) -> list[str]:
    """Overrides that make a run of any recipe last a second: two steps of four images in each of two epochs."""
    settings = settings_of(recipe)
    data, network = settings["data"], settings["model"]["network"]
    words = [f"--data.root={root}", "--data.batch_size=4", "--data.eval_batch_size=8", "--data.num_workers=0"]
    words += ["--trainer.max_epochs=2", "--trainer.limit_train_batches=2"]
    words += ["--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu", "--precision=32-true"]
    if settings["task"] != "longtail":
        some = ["--data.train_images=16"] if "train_images" in data else []
        return words + some + tiny_detector(own_network)
    words += ["--data.many_over=5", "--data.few_under=3"]
    if data["dataset"] in ARRAYS:
        words += ["--data.n_max=5", "--data.imbalance_factor=2"]
    else:
        # Read through the loader of large images, as the real data is.
        words += ["--data.image_size=32", "--data.memory_gib=0"]
    if network["backbone"] in BIG and not own_network:
        words.append("--model.network.backbone=resnet10")
    if "train_only" in network and not own_network:
        words.append("--model.network.train_only=[backbone.layer4, classifier]")
    if network.get("pretrained"):
        words.append("--model.network.pretrained=false")
    if network.get("kind") == "paco":
        words.append("--model.network.settings.queue_size=16")
    if network.get("kind") == "ride":
        words.append("--model.loss.settings.reweight_epoch=1")
    return words


def tiny_detector(own_network: bool) -> list[str]:
    words = ["--data.size=64", "--model.network.backbone.pretrained=false", "--model.network.num_queries=8"]
    if own_network:
        return words
    sizes = {"backbone.name": "resnet18", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "ffn_dim": 32}
    return words + [f"--model.network.{name}={value}" for name, value in sizes.items()]


def data_of(recipe: Recipe, make_data: MakeData) -> Path:
    settings = settings_of(recipe)
    return make_data(settings["data"]["dataset"], settings["task"])


def header_commands(recipe: Recipe) -> list[list[str]]:
    """The commands of a header, each as words; a line that begins with -- goes on with the one before."""
    commands: list[list[str]] = []
    inside = False
    for line in recipe.header:
        if line.startswith("batchformer "):
            commands.append(line.split()[1:])
        elif inside and line.startswith("--"):
            commands[-1] += line.split()
        inside = bool(commands) and line.startswith(("batchformer ", "--"))
    return commands


def fit(recipe: Recipe, overrides: list[str], folder: Path, **more: Any) -> dict[str, Any]:
    return engine.fit(recipe.path, overrides, folder, name=recipe.name, say=lambda line: None, **more)


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_all_recipes_are_in_the_table() -> None:
    assert sorted(recipe.name for recipe in recipes() if not recipe.name.startswith("panoptic/")) == RECIPES


# ------------------------------------------------------------------ header and settings


@every_recipe
def test_header(name: str) -> None:
    recipe = find_recipe(name)
    header = recipe.header
    text = " ".join(header)
    assert header[0].endswith("."), "the first line says what it is, in one sentence"
    assert header[1] == ""
    assert header_commands(recipe)[0][:2] == ["compare", name]
    assert "Hardware and time: " in text
    assert "result: " in text.lower()
    if not name.partition("/")[2].startswith(MEASURED):
        assert "Published result: " in text
        assert "Differs from the published setting: " in text
        assert "not measured here" in text
    assert max(len(line) for line in recipe.path.read_text(encoding="utf-8").splitlines()) <= 120


@every_recipe
def test_parses_and_so_do_the_commands_of_its_header(name: str) -> None:
    recipe = find_recipe(name)
    settings = settings_of(recipe)
    task = parse(recipe.path, logger=False).model
    if "loss" in settings["model"]:
        assert task.loss_settings.name == settings["model"]["loss"]["name"]
    assert task.plug_in.arm == "batchformer"
    for verb, other, *words in header_commands(recipe):
        overrides = [word for word in words if not word.startswith("--name=")]
        assert verb in ("fit", "compare")
        assert parse(find_recipe(other).path, overrides, logger=False).model.loss_settings is not None


def test_an_override_of_one_loss_setting_keeps_the_others() -> None:
    recipe = find_recipe("longtail/cifar100-lt-ride")
    task = parse(recipe.path, ["--model.loss.settings.diversity=-0.2"], logger=False).model
    assert task.loss_settings.settings == {"reweight_epoch": 160, "diversity": -0.2, "reweight_factor": 0.05}


def rate(name: str, step: int, epochs: int, epoch_steps: int) -> float:
    settings = OptimizerSettings(**settings_of(find_recipe(name))["model"]["optimizer"])
    return settings.lr * learning_rate_factor(step, epochs * epoch_steps, epoch_steps, settings)


def test_schedules_are_the_published_ones() -> None:
    """A few points of each, worked out by hand from the published descriptions."""
    balanced = "longtail/cifar100-lt-balanced-softmax"  # 800 steps from .05 to .1, then a cosine
    assert rate(balanced, 0, 620, 21) == pytest.approx(0.05, abs=1e-4)
    assert rate(balanced, 399, 620, 21) == pytest.approx(0.075)
    assert rate(balanced, 799, 620, 21) == pytest.approx(0.1)
    assert rate(balanced, 800 + 6110, 620, 21) == pytest.approx(0.05, abs=1e-4)
    ride = "longtail/cifar100-lt-ride"  # by epoch: 1/5 .. 5/5, x.01 from 160, x.0001 from 180
    for epoch, expected in ((0, 0.02), (1, 0.04), (4, 0.1), (159, 0.1), (160, 1e-3), (179, 1e-3), (180, 1e-5)):
        for step in (0, 83):
            assert rate(ride, epoch * 84 + step, 200, 84) == pytest.approx(expected)
    paco = "longtail/imagenet-lt-r50-paco"  # by epoch: ten of warm-up, then a cosine
    assert rate(paco, 9 * 905 + 7, 400, 905) == pytest.approx(0.02)
    assert rate(paco, 205 * 905 + 7, 400, 905) == pytest.approx(0.01)
    steps = "longtail/imagenet-lt-r10-ride"
    assert [rate(steps, epoch * 226, 120, 226) for epoch in (59, 60, 80)] == pytest.approx([0.1, 0.01, 0.001])
    cosine = "longtail/imagenet-lt-r10-balanced-softmax"  # set at the start of each epoch, without warm-up
    assert [rate(cosine, s, 90, 905) for s in (0, 904, 905)] == pytest.approx(
        [0.05, 0.05, 0.025 * (1 + math.cos(math.pi / 90))]
    )


# ------------------------------------------------------------------ runs


class Stopped(Exception):
    """Stands for whatever ends a run in the middle of its second epoch."""


def stop_in_second_epoch(task: type[LightningModule], patch: pytest.MonkeyPatch) -> None:
    original = task.on_train_batch_start

    def on_train_batch_start(self: LightningModule, batch: Any, batch_idx: int) -> None:
        if (self.current_epoch, batch_idx) == (1, 1):
            raise Stopped
        original(self, batch, batch_idx)

    patch.setattr(task, "on_train_batch_start", on_train_batch_start)


def check_that_it_resumes(recipe: Recipe, overrides: list[str], whole: Path, patch: pytest.MonkeyPatch) -> None:
    """A run that is stopped and resumed ends where the whole one did: metrics, history and weights, bit for bit."""
    broken = whole.with_name("broken")
    with patch.context() as patched:
        stop_in_second_epoch(task_classes(task_of(recipe.path))[0], patched)
        with pytest.raises(Stopped):
            fit(recipe, overrides, broken)
    assert not (broken / "done").exists()
    assert len(rows(broken)) == 1
    resumed = fit(recipe, overrides, broken, resume=True)
    result = json.loads((whole / "result.json").read_text(encoding="utf-8"))
    assert resumed["metrics"] == result["metrics"]
    assert resumed["per_class"] == result["per_class"]
    assert rows(broken) == rows(whole)
    expected = weights(whole)
    assert weights(broken).keys() == expected.keys()
    for key, value in weights(broken).items():
        assert torch.equal(value, expected[key]), key


@every_recipe
def test_trains_records_and_resumes_to_the_same_end(
    name: str, make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = find_recipe(name)
    overrides = tiny(recipe, data_of(recipe, make_data))
    run = tmp_path / "whole"
    result = fit(recipe, overrides, run)
    for file in ("config.yaml", "environment.json", "metrics.csv", "result.json", "done", "checkpoints/last.ckpt"):
        assert (run / file).is_file(), file
    assert json.loads((run / "result.json").read_text(encoding="utf-8")) == result
    assert result["recipe"] == name
    primary = {"longtail": "top1", "detection": "AP"}[task_of(recipe.path)]
    assert result["primary"] == primary
    assert 0 <= result["metrics"][primary] <= 1
    assert result["cost"]["parameters_train"] > result["cost"]["parameters_test"]
    history = rows(run)
    assert [row["epoch"] for row in history] == ["0", "1"]
    assert [row["step"] for row in history] == ["2", "4"]
    assert all(math.isfinite(float(row["train_loss"])) for row in history)
    assert all(0 <= float(row[f"val_{primary}"]) <= 1 for row in history)
    check_that_it_resumes(recipe, overrides, run, monkeypatch)


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
    check_that_it_resumes(recipe, averaging, tmp_path / "whole", monkeypatch)


@pytest.mark.parametrize("name", ["longtail/fashion-mnist-lt", "longtail/cifar100-lt-paco"])
def test_checkpoint_holds_every_weight_once(name: str, make_data: MakeData, tmp_path: Path) -> None:
    recipe = find_recipe(name)
    fit(recipe, tiny(recipe, make_data(settings_of(recipe)["data"]["dataset"])), tmp_path / "run")
    state = weights(tmp_path / "run")
    assert len({value.data_ptr() for value in state.values()}) == len(state)
    assert {key.split(".")[0] for key in state} == {"network"}


@pytest.mark.parametrize("name", ["longtail/fashion-mnist-lt", "longtail/imagenet-lt-r10-ride"])
def test_plain_arm_starts_from_the_same_weights_and_learns_other_ones(
    name: str, make_data: MakeData, tmp_path: Path
) -> None:
    recipe = find_recipe(name)
    overrides = tiny(recipe, make_data(settings_of(recipe)["data"]["dataset"]))
    still = [*overrides, "--model.optimizer.lr=0", "--model.optimizer.weight_decay=0"]
    folders = {}
    for label, words in (("still", still), ("moved", overrides)):
        for arm in ("plain", "batchformer"):
            folders[label, arm] = tmp_path / f"{label}-{arm}"
            fit(recipe, [*words, f"--model.batchformer.arm={arm}"], folders[label, arm])
    plain, mixed = (weights(folders["still", arm]) for arm in ("plain", "batchformer"))
    learned = [key for key in plain if key.endswith("weight")]
    assert all(torch.equal(plain[key], mixed[key]) for key in learned)
    assert set(mixed) - set(plain), "the module's own weights"
    plain, mixed = (weights(folders["moved", arm]) for arm in ("plain", "batchformer"))
    assert not all(torch.equal(plain[key], mixed[key]) for key in learned)


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


# ------------------------------------------------------------------ what the headers promise beside the first stage


STAGED = ["cifar10-lt-balanced-softmax", "cifar100-lt-balanced-softmax", "fashion-mnist-lt-paco", "cifar100-lt-ride"]


@pytest.mark.parametrize("name", [f"longtail/{name}" for name in STAGED])
def test_second_stages_and_distillation_as_the_header_says(
    name: str, make_data: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header's own commands, in order, made tiny: the words that follow the command's win over it."""
    recipe = find_recipe(name)
    root = make_data(settings_of(recipe)["data"]["dataset"])
    monkeypatch.chdir(tmp_path)
    assert cli.main(["fit", name, *tiny(recipe, root), "--name=FIRST"]) == 0
    first = weights(Path("runs/FIRST"))
    for _, other, *words in header_commands(recipe)[1:]:
        given = dict(word.removeprefix("--").split("=", 1) for word in words)
        epochs = min(1, int(given.get("trainer.max_epochs", "1")))
        made_small = [*tiny(find_recipe(other), root), f"--trainer.max_epochs={epochs}"]
        words = [word.replace("=FIRST", "=runs/FIRST") for word in words]
        assert cli.main(["fit", other, *words, *made_small]) == 0
        folder = Path("runs") / given["name"]
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        # What was saved is what was tested, whatever the stage.
        assert engine.test(folder) == result["metrics"]
        if given.get("model.stage.second") in ("crt", "lws"):
            assert all(value.equal(first[key]) for key, value in weights(folder).items() if "backbone" in key)


# ------------------------------------------------------------------ two ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


TWO_RANKS = {
    "detection/folder": ["--model.batchformer.gather=all"],
    "longtail/fashion-mnist-lt": ["--model.batchformer.gather=all"],
    "longtail/cifar100-lt-paco": [],
}


@pytest.mark.parametrize("name", TWO_RANKS)
def test_two_ranks(name: str, make_data: MakeData, tmp_path: Path) -> None:
    recipe = find_recipe(name)
    overrides = [*tiny(recipe, data_of(recipe, make_data)), *TWO_RANKS[name]]
    launcher = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}", "-m"]
    command = [sys.executable, "-m", *launcher, "batchformer", "fit", name, *overrides]
    command += [f"--out={tmp_path}", "--name=run", "--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Run: ") == 1, "one rank speaks for both"
    assert "Warning" not in done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert [row["step"] for row in rows(tmp_path / "run")] == ["2", "4"]
    # Counted over both ranks, every test image once: one process alone finds the same.
    alone = engine.test(tmp_path / "run")
    assert result["metrics"] == pytest.approx(alone, abs=1e-6, nan_ok=True)


# ------------------------------------------------------------------ the published networks


@pytest.mark.slow
@every_recipe
def test_published_network(name: str, make_data: MakeData, tmp_path: Path) -> None:
    recipe = find_recipe(name)
    overrides = tiny(recipe, data_of(recipe, make_data), own_network=True)
    result = fit(recipe, [*overrides, "--trainer.max_epochs=1"], tmp_path / "run")
    assert math.isfinite(result["metrics"][result["primary"]])
