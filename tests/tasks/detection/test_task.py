"""The wiring of a run: losses of both streams, groups, initial weights, records, and settings that do not fit."""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import Trainer

from batchformer.tasks.detection.data import DetectionData
from batchformer.tasks.detection.model import build_network
from batchformer.tasks.detection.restore import load_network
from batchformer.tasks.detection.settings import NetworkSettings
from batchformer.tasks.detection.task import DetectionTask
from batchformer.tasks.set_prediction.detector import backbone_of
from batchformer.tasks.set_prediction.from_transformers import set_outputs
from batchformer.tasks.set_prediction.optimizer import DetectorOptimizerSettings
from batchformer.tasks.set_prediction.smca.decoder import SpatialPrior
from batchformer.tasks.training.settings import BatchFormerSettings

DETECTORS = ["detr", "conditional_detr", "deformable_detr", "smca"]
Make = Callable[..., Any]


def inserted(arm: Any = "batchformer", **settings: Any) -> BatchFormerSettings:
    return BatchFormerSettings(arm, before=None, after=["model.encoder.layers.0"], **settings)


@pytest.fixture
def ready(small: Make, data: Make, trainer: Make) -> Callable[..., tuple[DetectionTask, DetectionData]]:
    """A task that is set up, with its data."""

    def make(detector: str = "conditional_detr", arm: str = "batchformer", **settings: Any) -> Any:
        module = data(cache_features=True, augment="flip")
        task = DetectionTask(small(detector), batchformer=inserted(arm, **settings))
        runner: Trainer = trainer()
        runner.datamodule = module
        module.trainer = task.trainer = runner
        module.setup()
        task.setup("fit")
        return task.train(), module

    return make


def first_batch(module: DetectionData) -> dict[str, Any]:
    batch: dict[str, Any] = next(iter(module.train_dataloader()))
    return batch


def loss_of(task: DetectionTask, batch: dict[str, Any]) -> torch.Tensor:
    return task.loss(task.run(batch), batch)


@pytest.mark.parametrize("detector", DETECTORS)
def test_the_loss_is_the_mean_of_both_streams(detector: str, ready: Make) -> None:
    task, module = ready(detector)
    batch = first_batch(module)
    output = task.run(batch)
    assert len(output.logits) == 2 * len(batch["labels"])
    criterion = task.network.loss_function.criterion
    halves = []
    for half in (slice(0, 4), slice(4, 8)):
        whole = set_outputs(output)
        part = type(whole)(whole.logits_LNQK[:, half], whole.boxes_LNQ4[:, half])
        halves.append(criterion(part, batch["labels"])["loss"])
    torch.testing.assert_close(task.loss(output, batch), (halves[0] + halves[1]) / 2)


@pytest.mark.parametrize("detector", DETECTORS)
def test_gradients_reach_all_that_trains(detector: str, ready: Make) -> None:
    task, module = ready(detector)
    loss_of(task, first_batch(module)).backward()
    without = [name for name, p in task.network.named_parameters() if p.requires_grad and p.grad is None]
    # The first decoder layer has no use for what turns the content into the scale of positions.
    assert not without


@pytest.mark.parametrize("arm", ["plain", "single_stream", "self_only", "duplicate", "frozen"])
def test_arms(arm: str, ready: Make) -> None:
    task, module = ready("conditional_detr", arm)
    batch = first_batch(module)
    output = task.run(batch)
    assert len(output.logits) == (4 if arm in ("plain", "single_stream") else 8)
    assert math.isfinite(task.loss(output, batch).item())
    names = {group["name"] for group in task.param_groups()}
    assert names == ({"network", "batchformer"} if arm in ("single_stream", "self_only") else {"network"})


@pytest.mark.parametrize("detector", DETECTORS)
def test_arms_start_from_the_same_network(detector: str, ready: Make) -> None:
    plain, mixed = ready(detector, "plain")[0].network, ready(detector)[0].network
    state = mixed.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in plain.state_dict().items())


def test_streams_may_weigh_differently(ready: Make) -> None:
    task, module = ready(stream_weights=(1.0, 0.0))
    plain, _ = ready(arm="plain")
    batch = first_batch(module)
    torch.testing.assert_close(loss_of(task, batch), loss_of(plain, batch))


def test_evaluation_is_the_plain_network_with_pixels_as_with_cached_maps(ready: Make, data: Make) -> None:
    task, module = ready()
    task.eval()
    cached, files = next(iter(module.val_dataloader())), next(iter(data(max_size=64).val_dataloader()))
    height, width = files["pixel_values"].shape[2:]
    pixels = torch.zeros(3, 3, 64, 64)
    pixels[:, :, :height, :width] = files["pixel_values"]
    with torch.no_grad():
        found, wanted = task.run(cached), task.run({**cached, "features": None, "pixel_values": pixels})
    assert len(found.logits) == 3
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found.pred_boxes, wanted.pred_boxes, rtol=1e-2, atol=1e-2)


def test_a_loss_that_is_not_finite_names_the_way_out(ready: Make) -> None:
    task, module = ready()
    batch = first_batch(module)
    batch["features"] = [x * math.nan for x in batch["features"]]
    with pytest.raises(FloatingPointError, match=r"in epoch 0, batch 7. Lower model.optimizer.lr"):
        task.training_step(batch, 7)
    task.eval()
    with pytest.raises(FloatingPointError, match="finite outputs for the val images"), torch.no_grad():
        task.validation_step(batch, 0)


def test_the_global_generator_is_left_alone_by_the_build(ready: Make) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ready()
    assert torch.equal(torch.rand(3), expected)


# ------------------------------------------------------------------ whole runs


def run(small: Make, data: Make, trainer: Make, detector: str = "conditional_detr", **settings: Any) -> Any:
    task = DetectionTask(
        small(detector, trains=settings.pop("trains", "nothing"), checkpointing=settings.pop("checkpointing", False)),
        batchformer=inserted(settings.pop("arm", "batchformer")),
        optimizer=DetectorOptimizerSettings(lr=1e-3, schedule="constant"),
        ema=settings.pop("ema", None),
    )
    module = data(**{"augment": "flip", **settings})
    runner = trainer(max_epochs=2)
    runner.fit(task, module)
    return task, module, runner


@pytest.mark.parametrize("detector", DETECTORS)
def test_a_run_on_images_with_a_backbone_that_trains(detector: str, small: Make, data: Make, trainer: Make) -> None:
    task, module, runner = run(small, data, trainer, detector, augment="detr", trains="from_stride_8")
    runner.test(task, module, verbose=False)
    metrics = runner.callback_metrics
    assert {"test_AP", "test_AP50", "test_APL", "test_unseen_AP", "test_unseen_APS"} <= metrics.keys()
    assert 0 <= float(metrics["test_AP"]) <= 1
    assert task.test_images == 7
    results = task.class_results()
    assert [entry.name for entry in results] == ["kind 3", "kind 7", "kind 90"]
    assert [entry.count for entry in results] == module.counts.tolist()
    assert task.notes()[0].startswith("Backbone: 2,621,440 of 2,782,784 parameters train")


def test_checkpoints_of_activations_change_no_number(small: Make, data: Make, trainer: Make) -> None:
    if int(transformers.__version__.split(".")[0]) < 5:
        with pytest.raises(ValueError, match="no gradient checkpointing in this version of transformers"):
            build_network(small(checkpointing=True), 3)
        return
    first = run(small, data, trainer)[0].state_dict()
    second = run(small, data, trainer, checkpointing=True)[0].state_dict()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], msg=name)


@pytest.mark.parametrize("detector", DETECTORS)
def test_what_is_saved_is_restored_without_the_module(
    detector: str, small: Make, data: Make, trainer: Make, tmp_path: Any
) -> None:
    task, module, runner = run(small, data, trainer, detector, cache_features=True)
    runner.save_checkpoint(tmp_path / "it.ckpt")
    restored = load_network(tmp_path / "it.ckpt")
    assert not any("batchformer" in name for name in restored.network.state_dict())
    assert restored.facts.category_ids == [3, 7, 90]
    batch = next(iter(module.val_dataloader()))
    task.eval()
    with torch.no_grad(), backbone_of(restored.network).serving(batch["features"]):
        found = restored.network(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"])
        assert torch.equal(found.logits, task.run(batch).logits)


def test_other_data_is_refused_on_resumption(ready: Make) -> None:
    task, _ = ready()
    checkpoint: dict[str, Any] = {}
    task.on_save_checkpoint(checkpoint)
    task.on_load_checkpoint(checkpoint)
    checkpoint["detection"]["facts"]["counts"] = [1, 2, 3]
    with pytest.raises(ValueError, match="the training boxes of each class have changed. Bring that data back"):
        task.on_load_checkpoint(checkpoint)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Any) -> None:
    torch.save({"state_dict": {}}, tmp_path / "it.ckpt")
    with pytest.raises(ValueError, match="a checkpoint of the task 'detection'"):
        load_network(tmp_path / "it.ckpt")
    with pytest.raises(FileNotFoundError, match="run folder with checkpoints/last.ckpt"):
        load_network(tmp_path)


def test_the_moving_average_is_tested(small: Make, data: Make, trainer: Make) -> None:
    task, module, runner = run(small, data, trainer, ema=0.5, cache_features=True)
    runner.test(task, module, verbose=False)
    assert "test_AP" in runner.callback_metrics


# ------------------------------------------------------------------ settings that do not go together


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"detector": "detr", "feature_levels": 2}, "one map for detr, got feature_levels=2"),
        ({"detector": "conditional_detr", "two_stage": True}, "two_stage and with_box_refine with deformable_detr"),
        ({"detector": "detr", "num_heads": 5}, "d_model to be a multiple of num_heads=5, got 32"),
    ],
)
def test_wrong_networks(settings: dict[str, Any], message: str, small: Make) -> None:
    with pytest.raises(ValueError, match=message):
        build_network(small(**settings), 3)


@pytest.mark.parametrize("refine", [False, True])
def test_one_decoder_layer_of_deformable_detr_needs_the_proposals_head(refine: bool, small: Make) -> None:
    one = {"decoder_layers": 1, "with_box_refine": refine}
    if int(transformers.__version__.split(".")[0]) < 5:
        build_network(small("deformable_detr", **one), 3)
    else:
        with pytest.raises(ValueError, match="at least 2 for deformable_detr, got 1.*Give 2, or two_stage=true"):
            build_network(small("deformable_detr", **one), 3)
    network = build_network(small("deformable_detr", two_stage=True, **one), 3).eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 3, 64, 64)).logits.shape == (1, 8, 3)


@pytest.mark.parametrize(("settings", "numbers"), [({}, [8, 8]), ({"prior_heads": "shared"}, [2])])
def test_smca_shares_its_gaussian_where_asked(settings: dict[str, Any], numbers: list[int], small: Make) -> None:
    """Four heads with an offset and an extent each, of two numbers; or one extent around the query's own centre."""
    priors = [m for m in build_network(small("smca", **settings), 3).modules() if isinstance(m, SpatialPrior)]
    assert [[part.out_features for part in prior.children()] for prior in priors] == [numbers] * 2


def test_stored_settings_from_before_smca_could_share_its_gaussian(small: Make) -> None:
    stored = asdict(small("smca"))
    del stored["prior_heads"]
    assert NetworkSettings(**stored).prior_heads == "independent"


@pytest.mark.parametrize(
    ("detector", "queries", "ffn_dim", "levels"),
    [
        ("detr", 100, 2048, 1),
        ("conditional_detr", 300, 2048, 1),
        ("deformable_detr", 300, 1024, 4),
        ("smca", 300, 2048, 1),
    ],
)
def test_published_settings_fill_what_is_left_out(
    detector: str, queries: int, ffn_dim: int, levels: int, small: Make
) -> None:
    config = build_network(small(detector, num_queries=None, ffn_dim=None, feature_levels=None), 3).config
    assert (config.num_queries, config.encoder_ffn_dim, config.decoder_ffn_dim) == (queries, ffn_dim, ffn_dim)
    assert getattr(config, "num_feature_levels", 1) == levels
