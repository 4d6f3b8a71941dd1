"""What goes over from the detector to the mask head, and settings and checkpoints of earlier versions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchformer.engine import run as engine
from batchformer.engine.recipes import find_recipe
from batchformer.tasks.panoptic.older_versions import translate_entry
from batchformer.tasks.panoptic.task import PanopticTask

WORDS = [
    "--data.size=64", "--data.batch_size=4", "--data.eval_batch_size=4", "--trainer.accelerator=cpu",
    "--stages.detector.epochs=1", "--stages.masks.epochs=1", "--trainer.limit_train_batches=1",
    "--trainer.limit_test_batches=1", "--model.network.d_model=32", "--model.network.ffn_dim=48",
    "--model.network.encoder_layers=2", "--model.network.decoder_layers=1", "--model.network.num_queries=7",
    "--model.network.backbone.pretrained=false",
    "--model.batchformer.after=[model.encoder.layers.0,model.encoder.layers.1]", "--model.batchformer.share=false",
]  # fmt: skip


def test_modules_of_several_layers_go_over_to_the_mask_head(
    write_panoptic: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BATCHFORMER_DATA", str(tmp_path / "cache"))
    words = [f"--data.root={write_panoptic(tmp_path / 'data')}", *WORDS]
    engine.fit(find_recipe("panoptic/folder").path, words, tmp_path / "run", name="x", say=lambda line: None)
    detector, masks = (
        torch.load(tmp_path / "run" / "checkpoints" / f"{stage}.ckpt", weights_only=True)
        for stage in ("detector", "last")
    )
    module = {key: value for key, value in detector["state_dict"].items() if ".batchformer." in key}
    assert len({key.split(".")[2] for key in module}) == 2, "a module for each layer"
    after = {key.replace("conditional_detr_", ""): value for key, value in masks["state_dict"].items()}
    assert all(torch.equal(after[key], value) for key, value in module.items())
    old = {"part": "masks", "data": masks["panoptic"]["facts"], **masks["panoptic"]["settings"]}
    today = {key: value for key, value in masks["panoptic"].items() if key != "data"}  # fingerprints are new
    assert translate_entry(old) == today, "as earlier versions wrote it"


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
