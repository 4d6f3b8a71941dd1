"""Panoptic recipes: header, settings, and whole runs of both stages on tiny data in COCO's format."""

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
from PIL import Image
from torch import Tensor

from batchformer import cli
from batchformer.engine import run as engine
from batchformer.engine.config import parse
from batchformer.engine.recipes import Recipe, find_recipe, recipes
from batchformer.tasks.panoptic.restore import load_network
from batchformer.tasks.panoptic.task import PanopticTask

Write = Callable[..., Path]
RECIPES = ["panoptic/coco-detr-r50", "panoptic/folder", "panoptic/scenes"]
RESUMED = {"panoptic/coco-detr-r50": [2], "panoptic/folder": [1]}
"""In which epoch a run is stopped; ``scenes`` is ``folder`` with other images."""
every_recipe = pytest.mark.parametrize("name", RECIPES)
NETWORK = ["d_model=32", "ffn_dim=48", "encoder_layers=2", "decoder_layers=2", "num_queries=7"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "cache"))


def settings_of(recipe: Recipe) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(recipe.path.read_text(encoding="utf-8"))
    return content


def tiny(root: Path, *, epochs: int = 2) -> list[str]:
    """Two steps of four images in each epoch: one epoch of the detector, the rest of the mask head."""
    words = [f"--data.root={root}", "--data.dataset=folder", "--data.size=64", "--data.batch_size=4"]
    words += ["--data.train_images=null"]
    words += ["--data.eval_batch_size=4", "--trainer.accelerator=cpu", "--precision=32-true"]
    words += [
        "--trainer.check_val_every_n_epoch=1",
        f"--trainer.max_epochs={epochs}",
        "--model.stage.detector_epochs=1",
    ]
    words += ["--trainer.limit_train_batches=2", "--model.pictures=2", "--data.num_workers=0"]
    words += ["--model.network.backbone.name=efficientnet_lite0", "--model.network.backbone.pretrained=false"]
    return words + [f"--model.network.{word}" for word in NETWORK]


def header_commands(recipe: Recipe) -> list[list[str]]:
    commands: list[list[str]] = []
    inside = False
    for line in recipe.header:
        if line.startswith("batchformer "):
            commands.append(line.split()[1:])
        elif inside and line.startswith("--"):
            commands[-1] += line.split()
        inside = bool(commands) and line.startswith(("batchformer ", "--"))
    return commands


def fit(recipe: Recipe, words: list[str], folder: Path, **more: Any) -> dict[str, Any]:
    return engine.fit(recipe.path, words, folder, name=recipe.name, say=lambda line: None, **more)


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_all_recipes_are_in_the_table() -> None:
    assert sorted(recipe.name for recipe in recipes() if recipe.name.startswith("panoptic/")) == RECIPES


@every_recipe
def test_header_and_its_commands(name: str) -> None:
    recipe = find_recipe(name)
    assert recipe.header[0].endswith(".") and recipe.header[1] == ""
    assert header_commands(recipe)[0][:2] == ["compare", name]
    text = " ".join(recipe.header)
    assert "Hardware and time: " in text and "result: " in text.lower()
    assert max(len(line) for line in recipe.path.read_text(encoding="utf-8").splitlines()) <= 120
    for verb, other, *words in header_commands(recipe):
        assert verb in ("fit", "compare")
        task = parse(find_recipe(other).path, [w for w in words if not w.startswith("--name=")], logger=False).model
        assert isinstance(task, PanopticTask) and task.plug_in.arm == "batchformer"


def test_published_settings() -> None:
    task = parse(find_recipe("panoptic/coco-detr-r50").path, logger=False).model
    network, stage, optimizer = task.network_settings, task.stage, task.optimizer_settings
    assert (network.d_model, network.encoder_layers, network.decoder_layers, network.num_queries) == (256, 6, 6, 100)
    assert (stage.detector_epochs, stage.milestones, stage.lr) == (250, [15], 1e-4)
    assert (optimizer.lr, optimizer.backbone_lr, optimizer.weight_decay) == (1e-4, 1e-5, 1e-4)
    assert (task.plug_in.after, task.plug_in.share, task.plug_in.drop) == (["model.encoder.layers.*"], True, 0.5)
    assert task.postprocess.threshold == 0.85 and task.loss_settings.no_object_weight == 0.1


class Stopped(Exception):
    """Stands for whatever ends a run."""


def check_that_it_resumes(recipe: Recipe, words: list[str], whole: Path, epoch: int, patch: pytest.MonkeyPatch) -> None:
    broken = whole.with_name(f"broken-{epoch}")
    original = PanopticTask.on_train_batch_start

    def stop(self: PanopticTask, batch: Any, batch_idx: int) -> None:
        if (self.current_epoch, batch_idx) == (epoch, 1):
            raise Stopped
        original(self, batch, batch_idx)

    with patch.context() as patched:
        patched.setattr(PanopticTask, "on_train_batch_start", stop)
        with pytest.raises(Stopped):
            fit(recipe, words, broken)
    assert not (broken / "done").exists()
    resumed = fit(recipe, words, broken, resume=True)
    result = json.loads((whole / "result.json").read_text(encoding="utf-8"))
    assert resumed["metrics"] == result["metrics"] and resumed["per_class"] == result["per_class"]
    assert rows(broken) == rows(whole)
    expected = weights(whole)
    found = weights(broken)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@every_recipe
def test_both_stages_train_record_and_resume(
    name: str, write_panoptic: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first epoch of the mask head, or in its second: the same end, bit for bit."""
    recipe, words = find_recipe(name), tiny(write_panoptic(tmp_path / "data"), epochs=3)
    result = fit(recipe, words, tmp_path / "whole")
    assert result["primary"] == "PQ" and 0 <= result["metrics"]["PQ"] <= 1
    assert {"SQ", "RQ", "PQ_things", "PQ_stuff", "mask_AP", "box_AP"} <= result["metrics"].keys()
    assert [entry["name"] for entry in result["per_class"]] == ["box", "plate", "sky", "floor"]
    assert result["cost"]["parameters_train"] > result["cost"]["parameters_test"]
    history = rows(tmp_path / "whole")
    assert [row["step"] for row in history] == ["2", "4", "6"]
    assert all(math.isfinite(float(row["train_loss"])) for row in history)
    assert history[0]["val_PQ"] == "" and all(row["val_PQ"] for row in history[1:])
    drawn = {path.name for path in (tmp_path / "whole" / "pictures").glob("*.png")}
    assert len(drawn) == 2
    assert drawn == {path.name for path in (tmp_path / "whole" / "pictures" / "given").glob("*.png")}
    for epoch in RESUMED.get(name, ()):
        check_that_it_resumes(recipe, words, tmp_path / "whole", epoch, monkeypatch)


def test_the_stages_as_runs_of_their_own(
    write_panoptic: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The detector alone, then mask heads on it with and without the module; the detector stays as it was."""
    recipe, words = find_recipe("panoptic/folder"), tiny(write_panoptic(tmp_path / "data"), epochs=1)
    first = fit(recipe, [*words, "--model.stage.name=detector"], tmp_path / "detector")
    assert "PQ" not in first["metrics"] and "box_AP" in first["metrics"]
    detector = weights(tmp_path / "detector")
    start = [*words, "--model.stage.name=masks", f"--model.stage.start_from={tmp_path / 'detector'}"]
    found = {}
    for label, more in {"with": [], "without": ["--model.stage.batchformer=false"]}.items():
        fit(recipe, [*start, *more], tmp_path / label)
        found[label] = weights(tmp_path / label)
        inside = {key.replace("network.conditional_detr.", "network."): value for key, value in found[label].items()}
        kept = [key for key in detector if "batchformer" not in key]
        assert all(torch.equal(inside[key], detector[key]) for key in kept)
    module = [key for key in detector if ".batchformer." in key]
    assert module and all(torch.equal(found["with"][key], detector[key]) for key in module)
    assert not any("batchformer" in key for key in found["without"])
    heads = [key for key in found["with"] if "mask_head" in key]
    assert any(not torch.equal(found["with"][key], found["without"][key]) for key in heads)
    with pytest.raises(ValueError, match="trained with BatchFormer.*without"):
        fit(recipe, [word.replace(str(tmp_path / "detector"), str(tmp_path / "without")) for word in start],
            tmp_path / "refused")  # fmt: skip


def test_arms_start_from_the_same_weights(write_panoptic: Write, tmp_path: Path) -> None:
    """Without learning, detector and mask head of both arms are the same, whatever the module draws."""
    words = [*tiny(write_panoptic(tmp_path / "data")), "--model.optimizer.lr=0", "--model.stage.lr=0"]
    words += ["--model.optimizer.weight_decay=0"]
    recipe = find_recipe("panoptic/folder")
    for arm in ("plain", "batchformer", "self_only"):
        fit(recipe, [*words, f"--model.batchformer.arm={arm}"], tmp_path / arm)
    plain = weights(tmp_path / "plain")
    for arm in ("batchformer", "self_only"):
        own = weights(tmp_path / arm)
        assert all(torch.equal(own[key], value) for key, value in plain.items())
        assert set(own) - set(plain), "the module's own weights"


def test_predict_export_and_test_of_a_run(
    write_panoptic: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_panoptic(tmp_path / "data")
    result = fit(find_recipe("panoptic/folder"), tiny(root), tmp_path / "run")
    assert engine.test(tmp_path / "run") == result["metrics"]
    restored = load_network(tmp_path / "run")
    assert restored.part == "masks" and not restored.network.training
    out = tmp_path / "out"
    images = str(root / "test")
    assert cli.main(["predict", str(tmp_path / "run"), images, "--out", str(out), "--threshold", "0.01"]) == 0
    run = str(tmp_path / "run")
    with pytest.warns(UserWarning, match=r"^No segment above 0\.3 in 8 images: lower --threshold"):
        assert cli.main(["predict", run, images, "--out", str(tmp_path / "both"), "--beside", run, run]) == 0
    widths = []
    for folder in (out, tmp_path / "both"):
        with Image.open(folder / "000000002001.png") as picture:
            widths.append(picture.width)
    assert widths[1] > 1.8 * widths[0], "the image and three maps, the image and one"
    listing = json.loads((out / "panoptic.json").read_text(encoding="utf-8"))
    assert len(listing["annotations"]) == len(list((out / "panoptic").glob("*.png"))) == 8
    assert {s["category_id"] for entry in listing["annotations"] for s in entry["segments_info"]} <= {3, 17, 90, 184}
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "ex"), "--format", "safetensors"]) == 0
    facts = json.loads((tmp_path / "ex" / "model.json").read_text(encoding="utf-8"))
    assert facts["classes"] == ["box", "plate", "sky", "floor"] and facts["is_thing"] == [True, True, False, False]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.stage.name=masks"], "start_from=RUN"),
        (["--model.stage.detector_epochs=2"], "between 0 and trainer.max_epochs=2"),
        (["--data.augment=detr", "--data.cache_features=true"], "augment=flip"),
        (["--model.network.backbone.strides=[16, 32]"], "four maps"),
    ],
)
def test_settings_that_do_not_go_together(
    words: list[str], message: str, write_panoptic: Write, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit(find_recipe("panoptic/folder"), [*tiny(write_panoptic(tmp_path / "data")), *words], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_detector_alone_is_not_compared() -> None:
    assert PanopticTask.not_comparable({"model.stage.name": "both"}.get) is None
    why = PanopticTask.not_comparable({"model.stage.name": "detector"}.get)
    assert why == "arms are compared by PQ, which a detector without its mask head has not"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_two_ranks_train_either_stage_and_count_every_image_once(write_panoptic: Write, tmp_path: Path) -> None:
    words = tiny(write_panoptic(tmp_path / "data"), epochs=1)
    first = ["--model.stage.name=detector"]
    second = ["--model.stage.name=masks", f"--model.stage.start_from={tmp_path / 'first'}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    for name, stage in {"first": first, "second": second}.items():
        command = [*launcher, f"--master-port={free_port()}", "-m", "batchformer", "fit", "panoptic/folder"]
        command += [*words, *stage, "--data.batch_size=2", "--model.batchformer.gather=all", f"--out={tmp_path}"]
        command += [f"--name={name}", "--trainer.devices=2", "--trainer.strategy=ddp"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Warning" not in done.stderr
        result = json.loads((tmp_path / name / "result.json").read_text(encoding="utf-8"))
        assert result["metrics"] == pytest.approx(engine.test(tmp_path / name), abs=1e-6, nan_ok=True)
    refused = [*launcher, f"--master-port={free_port()}", "-m", "batchformer", "fit", "panoptic/folder"]
    refused += [*tiny(tmp_path / "data"), f"--out={tmp_path}", "--name=both", "--trainer.devices=2"]
    done = subprocess.run(refused, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert done.returncode != 0 and "Expected one process for stage.name=both" in done.stderr
