"""Pictures and COCO results of a run, and its export."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from batchformer.tasks.detection.predict import draw, predict
from batchformer.tasks.detection.restore import exportable, load_network
from batchformer.tasks.detection.settings import NetworkSettings
from batchformer.tasks.detection.task import DetectionTask
from batchformer.tasks.set_prediction.postprocess import detections

Make = Callable[..., Any]


@pytest.fixture
def run(small: Make, data: Make, trainer: Make, tmp_path: Path) -> Callable[..., Path]:
    """A run folder with a checkpoint."""

    def make(detector: str = "conditional_detr", **settings: Any) -> Path:
        task, module, runner = DetectionTask(small(detector)), data(augment="flip", **settings), trainer()
        runner.fit(task, module)
        runner.save_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
        return tmp_path / "run"

    return make


@pytest.mark.parametrize("detector", ["detr", "conditional_detr", "deformable_detr", "smca"])
def test_results_are_coco_s(detector: str, run: Make, folder: Path, tmp_path: Path) -> None:
    images = sorted((folder / "val").glob("*.jpg"))
    written = predict(run(detector), images, tmp_path / "out", threshold=0.0)
    assert [path.name for path in written] == [*(f"{image.stem}.png" for image in images), "detections.json"]
    results = json.loads(written[-1].read_text(encoding="utf-8"))
    per_image = 8 if detector == "detr" else 8 * 3
    assert len(results) == 4 * per_image
    assert {entry["image_id"] for entry in results} == {int(image.stem) for image in images}
    assert {entry["category_id"] for entry in results} <= {3, 7, 90}
    truth = COCO(str(folder / "annotations" / "instances_val.json"))
    assert len(truth.loadRes(str(written[-1])).getAnnIds()) == len(results)


def test_boxes_are_those_that_the_test_scores(run: Make, data: Make, folder: Path, tmp_path: Path) -> None:
    where = run()
    network, facts, _, _ = load_network(where)
    batch = next(iter(data(eval_batch_size=1).val_dataloader()))
    with torch.no_grad():
        output = network(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
    (wanted,) = detections(output.logits, output.pred_boxes, batch["labels"][0]["orig_size"][None], "focal")
    image = folder / "val" / f"{int(batch['labels'][0]['image_id']):012d}.jpg"
    results = json.loads(predict(where, [image], tmp_path / "out", threshold=0.0)[-1].read_text(encoding="utf-8"))
    assert [entry["category_id"] for entry in results] == [facts.category_ids[int(k)] for k in wanted["labels"]]
    boxes = torch.tensor([entry["bbox"] for entry in results])
    boxes[:, 2:] += boxes[:, :2]
    torch.testing.assert_close(boxes, wanted["boxes"], rtol=0, atol=0.02)


@pytest.mark.parametrize("cached", [False, True])
def test_trained_on_squares_it_predicts_on_squares(
    cached: bool, run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = run(cache_features=True) if cached else run(max_size=64)  # long sides of at most 64 pixels either way
    Image.new("RGB", (200, 100)).save(tmp_path / "wide.png")
    sizes: list[tuple[int, ...]] = []
    restored = load_network(where)
    restored.network.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(tuple(kwargs["pixel_values"].shape[2:])), with_kwargs=True
    )
    monkeypatch.setattr("batchformer.tasks.detection.predict.load_network", lambda run: restored)
    predict(where, [tmp_path / "wide.png"], tmp_path / "out", threshold=0.0)
    assert sizes == [(64, 64) if cached else (32, 64)]


def test_the_threshold_and_equal_names(run: Make, folder: Path, tmp_path: Path) -> None:
    where = run()
    twice = tmp_path / "other" / "cat.jpg"
    twice.parent.mkdir()
    first = folder / "val" / "cat.jpg"
    for path in (twice, first):
        Image.new("L", (50, 40), 128).save(path)
    with pytest.warns(UserWarning, match=r"score of 1 or more in 2 images"):
        written = predict(where, [first, twice], tmp_path / "out", threshold=1.0)
    assert [path.name for path in written] == ["cat.png", "cat-2.png", "detections.json"]
    assert json.loads(written[-1].read_text(encoding="utf-8")) == []
    with pytest.raises(ValueError, match=r"threshold in 0..1, got 1.5"):
        predict(where, [first], tmp_path / "out", threshold=1.5)


def test_boxes_are_drawn_where_they_are() -> None:
    found = {
        "boxes": torch.tensor([[10.0, 20.0, 40.0, 50.0]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])
    }  # fmt: skip
    picture = np.asarray(draw(Image.new("RGB", (480, 480)), found, ["cat", "dog"]))
    rows, columns = np.nonzero(picture.sum(2))
    assert (columns.min(), rows.min()) == (10, 20)
    assert rows.max() == 50
    assert tuple(picture[45, 10]) == (0x3C, 0xB4, 0x4B), "the second colour, for the second class"
    small = draw(Image.new("RGB", (48, 48)), {name: value for name, value in found.items() if name != "scores"}, "ab")
    assert small.size == (480, 480)


@pytest.mark.parametrize("detector", ["detr", "conditional_detr", "deformable_detr", "smca"])
def test_the_exported_network_is_the_plain_one(detector: str, run: Make) -> None:
    where = run(detector)
    made = exportable(where)
    assert not any("batchformer" in name for name in made.network.state_dict())
    logits, boxes = made.forward(*made.inputs)
    assert logits.shape[:2] == (2, 8) and boxes.shape == (2, 8, 4)
    assert made.facts["classes"] == ["kind 3", "kind 7", "kind 90"]
    assert made.facts["input_side"] == made.inputs[0].shape[-1] == 107, "64 times 1333 / 800: every image fits in"


@pytest.mark.slow
@pytest.mark.parametrize("detector", ["detr", "conditional_detr", "deformable_detr", "smca"])
def test_onnx(detector: str, run: Make, tmp_path: Path) -> None:
    import onnxruntime

    from batchformer.engine.export import export

    where = run(detector)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pixels, mask = torch.randn(3, 3, 107, 107), torch.ones(3, 107, 107, dtype=torch.int64)
    mask[0, 40:], mask[1, :, 48:] = 0, 0
    (where / "config.yaml").write_text("task: detection\n", encoding="utf-8")
    export(where, tmp_path / "out")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    found = session.run(None, {"pixel_values": pixels.numpy(), "pixel_mask": mask.numpy()})
    with torch.no_grad():
        wanted = load_network(where).network(pixel_values=pixels, pixel_mask=mask)
    np.testing.assert_allclose(found[0], wanted.logits.numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found[1], wanted.pred_boxes.numpy(), rtol=1e-3, atol=1e-4)


def test_a_run_of_an_earlier_version_is_not_read(run: Make) -> None:
    where = run()
    path = where / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["detection"]["facts"]["pad_to"]
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r"older version of batchformer.*train it again"):
        load_network(where)
    task = DetectionTask(NetworkSettings())
    with pytest.raises(ValueError, match=r"older version of batchformer.*train it again"):
        task.on_load_checkpoint(checkpoint)


def test_a_run_from_before_stages_is_read(run: Make) -> None:
    where = run()
    path = where / "checkpoints" / "last.ckpt"
    checkpoint, before = torch.load(path, weights_only=True), load_network(where)
    today = checkpoint["detection"]
    checkpoint["detection"] = {"network": today["settings"]["network"], "data": today["facts"]}
    torch.save(checkpoint, path)
    after = load_network(where)
    assert (after.facts, after.settings, after.stage) == (before.facts, before.settings, "train")
    DetectionTask.checkpoint.read(where)
