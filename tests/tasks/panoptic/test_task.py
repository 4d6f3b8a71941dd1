"""Both stages of a panoptic run: from detector to mask head, what stays frozen, settings of earlier versions."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from batchformer import cli
from batchformer.engine import run as engine
from batchformer.engine.config import parse
from batchformer.engine.recipes import find_recipe
from batchformer.engine.stages import plan
from batchformer.tasks.panoptic.older_versions import translate_entry
from batchformer.tasks.panoptic.restore import load_network
from batchformer.tasks.panoptic.task import PanopticTask

Write = Callable[..., Path]
NETWORK = ["d_model=32", "ffn_dim=48", "encoder_layers=2", "decoder_layers=2", "num_queries=7"]
DETECTOR_ALONE = ["--stages.masks=null"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "cache"))


def tiny(root: Path) -> list[str]:
    """One epoch of two steps of four images in each stage."""
    words = [f"--data.root={root}", "--data.size=64", "--data.batch_size=4", "--data.eval_batch_size=4"]
    words += ["--trainer.accelerator=cpu", "--precision=32-true", "--trainer.check_val_every_n_epoch=1"]
    words += ["--stages.detector.epochs=1", "--stages.masks.epochs=1", "--trainer.limit_train_batches=2"]
    words += ["--model.pictures=2", "--data.num_workers=0", "--model.network.backbone.pretrained=false"]
    return words + [f"--model.network.{word}" for word in NETWORK]


def masks_alone(start: Path) -> list[str]:
    return ["--stages.detector=null", f"--stages.masks.start_from={start}"]


def fit(words: list[str], folder: Path) -> dict[str, Any]:
    recipe = find_recipe("panoptic/folder")
    return engine.fit(recipe.path, words, folder, name=recipe.name, say=lambda line: None)


def weights(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def test_published_settings() -> None:
    read = parse(find_recipe("panoptic/coco-detr-r50").path, logger=False)
    task, (detector, masks) = read.model, plan(read.config.stages, PanopticTask.stages)
    network, optimizer = task.network_settings, task.optimizer_settings
    assert (network.d_model, network.encoder_layers, network.decoder_layers, network.num_queries) == (256, 6, 6, 100)
    assert (detector.stage.epochs, masks.stage.epochs, masks.stage.first_epoch) == (250, 25, 250)
    assert (optimizer.lr, optimizer.backbone_lr, optimizer.weight_decay) == (1e-4, 1e-5, 1e-4)
    assert {"--model.optimizer.lr=0.0001", "--model.optimizer.milestones=[15]"} < set(masks.overrides)
    assert (task.batchformer.after, task.batchformer.share) == (["model.encoder.layers.*"], True)
    assert (task.masks.start, task.postprocess.threshold, task.loss_settings.no_object_weight) == (
        "published",
        0.85,
        0.1,
    )


def test_the_stages_as_runs_of_their_own(write_panoptic: Write, tmp_path: Path) -> None:
    """The detector alone, then mask heads on it with and without the module; the detector stays as it was."""
    words = tiny(write_panoptic(tmp_path / "data"))
    first = fit([*words, *DETECTOR_ALONE], tmp_path / "detector")
    assert "PQ" not in first["metrics"] and "box_AP" in first["metrics"]
    detector = weights(tmp_path / "detector")
    start = [*words, *masks_alone(tmp_path / "detector")]
    found = {}
    for label, more in {"with": [], "without": ["--model.masks.batchformer=false"]}.items():
        fit([*start, *more], tmp_path / label)
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
        fit([*words, *masks_alone(tmp_path / "without")], tmp_path / "refused")


def test_modules_of_several_layers_go_over_to_the_mask_head_without_sharing(
    write_panoptic: Write, tmp_path: Path
) -> None:
    more = [
        "--model.batchformer.after=[model.encoder.layers.0,model.encoder.layers.1]",
        "--model.batchformer.share=false",
    ]
    words = [*tiny(write_panoptic(tmp_path / "data")), *more]
    fit(words, tmp_path / "both")
    detector = torch.load(tmp_path / "both" / "checkpoints" / "detector.ckpt", weights_only=True)["state_dict"]
    module = {key: value for key, value in detector.items() if ".batchformer." in key}
    after = {key.replace("conditional_detr_", ""): value for key, value in weights(tmp_path / "both").items()}
    assert len({key.split(".")[2] for key in module}) == 2
    assert all(torch.equal(after[key], value) for key, value in module.items())


def test_arms_start_from_the_same_weights(write_panoptic: Write, tmp_path: Path) -> None:
    """Without learning, detector and mask head of all arms are the same, whatever the module draws."""
    words = [*tiny(write_panoptic(tmp_path / "data")), "--model.optimizer.lr=0", "--model.optimizer.weight_decay=0"]
    words += ["--stages.masks.settings.model.optimizer.lr=0"]
    for arm in ("plain", "batchformer", "self_only"):
        fit([*words, f"--model.batchformer.arm={arm}"], tmp_path / arm)
    plain = weights(tmp_path / "plain")
    for arm in ("batchformer", "self_only"):
        own = weights(tmp_path / arm)
        assert all(torch.equal(own[key], value) for key, value in plain.items())
        assert set(own) - set(plain), "the module's own weights"


def test_predict_export_and_test_of_a_run(write_panoptic: Write, tmp_path: Path) -> None:
    root = write_panoptic(tmp_path / "data")
    result = fit(tiny(root), tmp_path / "run")
    assert {"SQ", "RQ", "PQ_things", "PQ_stuff", "mask_AP", "box_AP"} <= result["metrics"].keys()
    assert [entry["name"] for entry in result["per_class"]] == ["box", "plate", "sky", "floor"]
    assert [stage["name"] for stage in result["stages"]] == ["detector", "masks"]
    assert result["notes"][0].startswith("The mask head learns on the frozen detector. Trained last: ")
    drawn = {path.name for path in (tmp_path / "run" / "pictures").glob("*.png")}
    assert len(drawn) == 2
    assert drawn == {path.name for path in (tmp_path / "run" / "pictures" / "given").glob("*.png")}
    assert engine.test(tmp_path / "run") == result["metrics"]
    restored = load_network(tmp_path / "run")
    assert restored.stage == "masks" and not restored.network.training
    run, images = str(tmp_path / "run"), str(root / "test")
    out = tmp_path / "out"
    assert cli.main(["predict", run, images, "--out", str(out), "--threshold", "0.01"]) == 0
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
    assert cli.main(["export", run, "--out", str(tmp_path / "ex"), "--format", "safetensors"]) == 0
    facts = json.loads((tmp_path / "ex" / "model.json").read_text(encoding="utf-8"))
    assert facts["classes"] == ["box", "plate", "sky", "floor"] and facts["is_thing"] == [True, True, False, False]
    entry = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["panoptic"]
    old = {"part": entry["stage"], "data": entry["facts"], **entry["settings"]}
    assert translate_entry(old) == entry, "as earlier versions wrote it"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages.detector=null"], "start_from=RUN"),
        (["--data.augment=detr", "--data.cache_features=true"], "augment=flip"),
        (["--model.network.backbone.strides=[16, 32]"], "four maps"),
    ],
)
def test_settings_that_do_not_go_together(
    words: list[str], message: str, write_panoptic: Write, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        fit([*tiny(write_panoptic(tmp_path / "data")), *words], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_detector_alone_is_not_compared() -> None:
    detector, masks = {"name": "detector", "epochs": 1}, {"name": "masks", "epochs": 1}
    assert PanopticTask.not_comparable({"stages": [detector, masks]}.get) is None
    for stages in (None, [detector]):
        why = PanopticTask.not_comparable({"stages": stages}.get)
        assert why == "arms are compared by PQ, which a detector without its mask head has not"


# ------------------------------------------------------------------ settings of earlier versions

OLD_RECIPE = {
    "model.stage.name": "both", "model.stage.detector_epochs": 20, "model.stage.lr": 1e-3, "trainer.max_epochs": 25
}  # fmt: skip
TODAY = {
    "stages": [
        {"name": "detector", "epochs": 20},
        {"name": "masks", "epochs": 5, "settings": {"model.optimizer.lr": 1e-3, "model.optimizer.warmup_epochs": 0}},
    ]
}


def translated(**settings: Any) -> tuple[list[tuple[str, int]], dict[str, Any], dict[str, Any]]:
    """Stages with their epochs, the settings of the last, and the other settings."""
    found = PanopticTask.translate_settings({key.replace("__", "."): value for key, value in settings.items()})
    stages = found.pop("stages")
    return [(stage["name"], stage["epochs"]) for stage in stages], stages[-1], found


@pytest.mark.parametrize("before", [OLD_RECIPE, {**TODAY, "model.stage.detector_epochs": 20, "trainer.max_epochs": 25}])
def test_one_run_of_both_stages(before: dict[str, Any]) -> None:
    stages, masks, rest = translated(**before)
    assert stages == [("detector", 20), ("masks", 5)]
    assert masks["settings"]["model.optimizer.lr"] == 1e-3 and masks["settings"]["model.optimizer.warmup_epochs"] == 0
    assert rest == {}


@pytest.mark.parametrize("before", [OLD_RECIPE, TODAY])
def test_old_words_on_an_old_recipe_and_on_todays(before: dict[str, Any]) -> None:
    alone = {**before, "model.stage.name": "detector", "trainer.max_epochs": 2, "model.stage.start": "published"}
    assert translated(**alone)[0] == [("detector", 2)]
    assert translated(**alone)[2] == {"model.masks.start": "published"}
    masks = {**before, "model.stage.name": "masks", "model.stage.start_from": "run", "trainer.max_epochs": 3}
    stages, last, rest = translated(**masks, model__stage__milestones=[2], model__stage__batchformer=False)
    assert stages == [("masks", 3)] and last["start_from"] == "run"
    assert last["settings"]["model.optimizer.milestones"] == [2] and last["settings"]["model.optimizer.lr"] == 1e-3
    assert rest == {"model.masks.batchformer": False}
    without = {key: value for key, value in before.items() if key != "trainer.max_epochs"}
    if "stages" in without:
        assert translated(**without, model__stage__name="detector")[0] == [("detector", 25)], "as the recipe says"


def test_what_is_not_old_stays_as_it_is() -> None:
    assert PanopticTask.translate_settings(TODAY) is TODAY
    with pytest.raises(ValueError, match="between 0 and trainer.max_epochs=25.*--stages.detector.epochs"):
        translated(**{**OLD_RECIPE, "model.stage.detector_epochs": 25})


# ------------------------------------------------------------------ two processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_two_ranks_train_both_stages_and_count_every_image_once(write_panoptic: Write, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["-m", "batchformer", "fit", "panoptic/folder", *tiny(write_panoptic(tmp_path / "data"))]
    command += ["--data.batch_size=2", "--model.batchformer.gather=all", f"--out={tmp_path}", "--name=run"]
    command += ["--trainer.devices=2", "--trainer.strategy=ddp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert [stage["name"] for stage in result["stages"]] == ["detector", "masks"]
    assert result["metrics"] == pytest.approx(engine.test(tmp_path / "run"), abs=1e-6, nan_ok=True)
