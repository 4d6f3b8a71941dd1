"""Panoptic recipes: their stages as runs of their own, their pictures, and what is made of a run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from recipe_runs import fit, rows, weights
from tiny_recipes import tiny

from batchformer import cli
from batchformer.engine import run as engine
from batchformer.engine.recipes import find_recipe
from batchformer.tasks.panoptic.restore import load_network
from batchformer.tasks.panoptic.task import PanopticTask

MakeData = Callable[..., Path]
RECIPE = find_recipe("panoptic/folder")


@pytest.fixture
def root(make_data: MakeData) -> Path:
    return make_data("folder", "panoptic")


def both(root: Path) -> list[str]:
    return tiny(RECIPE, root, epochs={"detector": 1, "masks": 1})


def test_the_stages_as_runs_of_their_own(root: Path, tmp_path: Path) -> None:
    """The detector alone, then mask heads on it with and without the module; the detector stays as it was."""
    words = tiny(RECIPE, root, epochs={})
    alone = [*words, "--stages.detector.epochs=1", "--stages.masks=null"]
    first = fit(RECIPE, alone, tmp_path / "detector")
    assert "PQ" not in first["metrics"] and "box_AP" in first["metrics"]
    detector = weights(tmp_path / "detector")
    start = [*words, "--stages.detector=null", "--stages.masks.epochs=1"]
    start.append(f"--stages.masks.start_from={tmp_path / 'detector'}")
    found = {}
    for label, more in {"with": [], "without": ["--model.masks.batchformer=false"]}.items():
        fit(RECIPE, [*start, *more], tmp_path / label)
        found[label] = weights(tmp_path / label)
        inside = {key.replace("network.conditional_detr.", "network."): value for key, value in found[label].items()}
        kept = [key for key in detector if "batchformer" not in key]
        assert all(inside[key].equal(detector[key]) for key in kept)
    module = [key for key in detector if ".batchformer." in key]
    assert module and all(found["with"][key].equal(detector[key]) for key in module)
    assert not any("batchformer" in key for key in found["without"])
    heads = [key for key in found["with"] if "mask_head" in key]
    assert any(not found["with"][key].equal(found["without"][key]) for key in heads)
    other = [word.replace(str(tmp_path / "detector"), str(tmp_path / "without")) for word in start]
    with pytest.raises(ValueError, match="trained with BatchFormer.*without"):
        fit(RECIPE, other, tmp_path / "refused")


def test_a_run_its_pictures_predictions_and_export(root: Path, tmp_path: Path) -> None:
    result = fit(RECIPE, both(root), tmp_path / "run")
    assert {"SQ", "RQ", "PQ_things", "PQ_stuff", "mask_AP", "box_AP"} <= result["metrics"].keys()
    assert [entry["name"] for entry in result["per_class"]] == ["box", "plate", "sky", "floor"]
    # Without masks there is no panoptic quality.
    assert [bool(row["val_PQ"]) for row in rows(tmp_path / "run")] == [False, True]
    drawn = {path.name for path in (tmp_path / "run" / "pictures").glob("*.png")}
    assert len(drawn) == 2
    assert drawn == {path.name for path in (tmp_path / "run" / "pictures" / "given").glob("*.png")}
    assert engine.test(tmp_path / "run") == result["metrics"]
    restored = load_network(tmp_path / "run")
    assert restored.stage == "masks" and not restored.network.training
    run, images, out = str(tmp_path / "run"), str(root / "val"), tmp_path / "out"
    count = len(list((root / "val").glob("*.jpg")))
    assert cli.main(["predict", run, images, "--out", str(out), "--threshold", "0.01"]) == 0
    with pytest.warns(UserWarning, match=rf"^No segment above 0\.3 in {count} images: lower --threshold"):
        assert cli.main(["predict", run, images, "--out", str(tmp_path / "both"), "--beside", run, run]) == 0
    widths = []
    for folder in (out, tmp_path / "both"):
        with Image.open(next(folder.glob("*.png"))) as picture:
            widths.append(picture.width)
    assert widths[1] > 1.8 * widths[0], "the image and three maps, the image and one"
    listing = json.loads((out / "panoptic.json").read_text(encoding="utf-8"))
    assert len(listing["annotations"]) == len(list((out / "panoptic").glob("*.png"))) == count
    assert {s["category_id"] for entry in listing["annotations"] for s in entry["segments_info"]} <= {3, 17, 90, 184}
    assert cli.main(["export", run, "--out", str(tmp_path / "ex"), "--format", "safetensors"]) == 0
    facts = json.loads((tmp_path / "ex" / "model.json").read_text(encoding="utf-8"))
    assert facts["classes"] == ["box", "plate", "sky", "floor"] and facts["is_thing"] == [True, True, False, False]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stages.detector=null"], "start_from=RUN"),
        (["--data.augment=detr", "--data.cache_features=true"], "augment=flip"),
        (["--model.network.backbone.strides=[16, 32]"], "four maps"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], message: str, root: Path, tmp_path: Path) -> None:
    given = [word for word in both(root) if not ("detector=null" in words[0] and word.startswith("--stages.detector"))]
    with pytest.raises(ValueError, match=message):
        fit(RECIPE, [*given, *words], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_detector_alone_is_not_compared() -> None:
    stages = [{"name": "detector", "epochs": 1}, {"name": "masks", "epochs": 1}]
    assert PanopticTask.not_comparable({"stages": stages}.get) is None
    why = PanopticTask.not_comparable({"stages": stages[:1]}.get)
    assert why == "arms are compared by PQ, which a detector without its mask head has not"
