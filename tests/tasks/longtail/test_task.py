"""The hooks of the task: losses of both streams, stages, optimizer groups, metrics, and settings that do not fit."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchformer.tasks.longtail.older_versions import translate_settings
from batchformer.tasks.longtail.restore import LongTailFacts, load_network
from batchformer.tasks.longtail.ride import RoutedExperts
from batchformer.tasks.longtail.settings import LossSettings, NetworkSettings
from batchformer.tasks.longtail.task import LongTailTask
from batchformer.tasks.training.contract import Stage
from batchformer.tasks.training.settings import BatchFormerSettings, OptimizerSettings

COUNTS = [40, 10, 4]
FACTS = LongTailFacts(
    classes=["a", "b", "c"], counts=COUNTS, groups={"many": [0], "medium": [1], "few": [2]},
    in_channels=1, image_size=16, mean=[0.5], std=[0.5],
)  # fmt: skip
RIDE: dict[str, Any] = {"network": NetworkSettings(kind="ride", experts=2), "loss": LossSettings("ride")}


def built(stage: Stage | None = None, **settings: Any) -> LongTailTask:
    """A task with its network, as the base builds it, without data and trainer."""
    made = LongTailTask(channels_last=False, **settings)
    made.facts, made.stage = FACTS, stage or made.stage
    made.check()
    torch.manual_seed(0)
    network = made.build_network()
    made.handle = made.insert(network)
    made.network = network
    made.prepare()
    return made


def saved(made: LongTailTask, folder: Path) -> Path:
    """The checkpoint of a task, as a run folder has it."""
    checkpoint: dict[str, Any] = {"state_dict": {f"network.{k}": v for k, v in made.network.state_dict().items()}}
    made.on_save_checkpoint(checkpoint)
    (folder / "checkpoints").mkdir(parents=True)
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    return folder / "checkpoints" / "last.ckpt"


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 16, 16, generator=generator), torch.arange(n) % 3


def balanced(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits + torch.tensor(COUNTS).log(), targets)


# ------------------------------------------------------------------ losses


def test_the_loss_is_the_weighted_mean_of_both_streams() -> None:
    _, targets = batch()
    logits = torch.randn(16, 3)
    plain, mixed = balanced(logits[:8], targets), balanced(logits[8:], targets)
    made = built()
    assert len(made.run(batch())) == 16
    torch.testing.assert_close(made.loss(logits, batch()), (plain + mixed) / 2)
    weighted = built(batchformer=BatchFormerSettings(stream_weights=(3.0, 1.0)))
    weighted.run(batch())
    torch.testing.assert_close(weighted.loss(logits, batch()), 0.75 * plain + 0.25 * mixed)


@pytest.mark.parametrize("arm", ["plain", "single_stream"])
def test_one_stream_has_one_loss(arm: str) -> None:
    made = built(batchformer=BatchFormerSettings(arm=arm))  # type: ignore[arg-type]
    outputs = made.run(batch())
    assert len(outputs) == 8
    torch.testing.assert_close(made.loss(outputs, batch()), balanced(outputs, batch()[1]))


def test_soft_targets_double_too() -> None:
    images, targets = batch()
    soft = 0.7 * F.one_hot(targets, 3) + 0.3 * F.one_hot(targets.flip(0), 3)
    made = built(loss=LossSettings("cross_entropy"))
    outputs = made.run((images, soft))
    torch.testing.assert_close(made.loss(outputs, (images, soft)), F.cross_entropy(outputs, torch.cat([soft, soft])))


def test_paco_trains_both_streams_against_the_keys_of_one() -> None:
    images, targets = batch()
    settings = NetworkSettings(kind="paco", settings={"queue_size": 8})
    made = built(network=settings, loss=LossSettings("paco"))
    views = ([images, images.flip(-1)], targets)
    assert math.isfinite(made.loss(made.run(views), views).item())
    with pytest.raises(ValueError, match="two views and class indices"):
        made.run((images, targets))
    with pytest.raises(ValueError, match=r"one view of each image.*data.two_views=false"):
        built().run(views)


def test_a_teacher_adds_its_term_and_is_no_part_of_the_task(tmp_path: Path) -> None:
    teacher = saved(built(**RIDE), tmp_path / "teacher")
    plain: dict[str, Any] = {**RIDE, "batchformer": BatchFormerSettings("plain")}
    student, alone = built(**plain, teacher=str(teacher)), built(**plain)
    logits = torch.randn(8, 2, 3)
    assert student.loss(logits, batch()) > alone.loss(logits, batch())
    assert list(student.state_dict()) == list(alone.state_dict())
    assert not any(p.requires_grad for p in student.teachers[0].parameters())


def test_logits_that_are_not_finite_are_refused() -> None:
    made = built()
    made.eval()
    images, targets = batch()
    outputs = made.run((images * math.inf, targets))
    with pytest.raises(FloatingPointError, match=r"finite outputs for the test images.*Lower model.optimizer.lr"):
        made.update_metrics(made.build_metrics("test"), outputs, (images, targets), "test")


# ------------------------------------------------------------------ stages


@pytest.mark.parametrize(
    ("stage", "trained"), [("crt", {"classifier.weight", "classifier.bias"}), ("lws", {"classifier.scale"})]
)
def test_a_later_stage_trains_the_classifier_of_the_network_before(
    stage: str, trained: set[str], tmp_path: Path
) -> None:
    first = built()
    start = saved(first, tmp_path / "first")
    # The second stage has the network of the first, whatever its own settings say of it.
    second = built(Stage(stage, start=start), network=NetworkSettings("resnet32"))
    assert second.handle is None
    assert {name for name, p in second.network.named_parameters() if p.requires_grad} == trained
    assert second.settings() == first.settings()
    now = second.network.state_dict()
    features = {key: value for key, value in first.network.state_dict().items() if key.startswith("backbone")}
    assert features
    assert all(torch.equal(value, now[key]) for key, value in features.items())
    again = built(Stage(stage, start=saved(second, tmp_path / "second")))
    assert all(torch.equal(value, again.network.state_dict()[key]) for key, value in now.items())
    assert {name for name, p in again.network.named_parameters() if p.requires_grad} == trained


def test_tau_is_a_stage_that_trains_nothing(tmp_path: Path) -> None:
    start = saved(built(), tmp_path / "first")
    lengths = built(Stage("tau", epochs=0, start=start), tau=1.0).network.classifier.weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(3))
    kept = built(Stage("tau", epochs=0, start=start), tau=0.0).network.classifier.weight
    assert torch.equal(kept, load_network(start).network.classifier.weight)


def test_routing_counts_the_experts_that_are_asked(tmp_path: Path) -> None:
    made = built(Stage("routing", start=saved(built(**RIDE), tmp_path / "first")), **RIDE)
    assert isinstance(made.network, RoutedExperts)
    made.train()
    assert math.isfinite(made.loss(made.run(batch()), batch()).item())
    made.eval()
    metric = made.build_metrics("val")
    outputs = made.run(batch())
    made.update_metrics(metric, outputs, batch(), "val")
    assert float(metric.compute()["share_of_experts_used"]) == pytest.approx(float(outputs.experts_used) / 2)


def test_stages_without_training_cannot_be_compared() -> None:
    stages = [{"name": "routing", "epochs": 5, "start_from": "runs/a"}]
    reason = LongTailTask.not_comparable({"stages": stages}.get)
    assert reason == "BatchFormer is not trained in the stage routing, so every arm would be identical"
    assert LongTailTask.not_comparable({"stages": [{"name": "train", "epochs": 5}, *stages]}.get) is None
    assert LongTailTask.not_comparable({}.get) is None


def test_every_measure_is_computed_but_the_accuracy_of_classes() -> None:
    made = built()
    metric = made.build_metrics("test")
    made.update_metrics(metric, made.eval().run(batch()), batch(), "test")
    computed = metric.compute().keys() - {"per_class"}
    assert {measure.name for measure in made.measures} == computed | {"share_of_experts_used", "accuracy"}
    assert made.primary in computed
    assert "share_of_experts_used" not in computed


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("settings", "stage", "message"),
    [
        ({"loss": LossSettings("paco")}, "train", "got loss 'paco' and kind 'plain'"),
        ({"network": NetworkSettings(kind="paco")}, "train", "got loss 'balanced_softmax' and kind 'paco'"),
        ({"loss": LossSettings("ride")}, "train", "'ride' with network kind 'ride' alone, got loss 'ride' and kind 'p"),
        ({}, "crt", r"trained network for the stage 'crt'.*--stages.crt.start_from=RUN"),
        ({"teacher": "run"}, "train", "RIDE loss for distillation from a teacher, got 'balanced_softmax'"),
        ({"loss": LossSettings("ldam", {"margin": 1})}, "train", "no setting margin. It has: .*max_margin"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], stage: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(Stage(stage), **settings)


def test_the_loss_of_paco_has_no_second_stage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss of logits in the stage 'crt'.*model.loss.name=cross_entropy"):
        built(Stage("crt", start=tmp_path), loss=LossSettings("paco"))


def test_a_missing_first_stage_or_teacher_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run folder with checkpoints/last.ckpt"):
        built(Stage("lws", start=tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="run folder with checkpoints/last.ckpt"):
        built(**RIDE, teacher=str(tmp_path / "none"))


def test_settings_of_an_earlier_version_are_translated() -> None:
    old = {
        "model.stage.second": "tau",
        "model.stage.start_from": "runs/first",
        "model.stage.tau": 0.5,
        "model.stage.teacher": None,
        "trainer.max_epochs": 0,
        "seed": 1,
    }
    assert translate_settings(old) == {
        "seed": 1,
        "model.tau": 0.5,
        "model.teacher": None,
        "stages": [{"name": "tau", "epochs": 0, "start_from": "runs/first"}],
    }
    without = {**old, "model.stage.second": None, "model.stage.teacher": "runs/t"}
    assert translate_settings(without) == {
        "seed": 1,
        "model.tau": 0.5,
        "model.teacher": "runs/t",
        "trainer.max_epochs": 0,
    }
    today = {"stages": [], "model.tau": 1.0, "trainer.max_epochs": 3}
    assert translate_settings(today) == LongTailTask.translate_settings(today) == today


def test_the_module_has_its_own_rate_and_decay() -> None:
    made = built(
        batchformer=BatchFormerSettings(lr_mult=0.1, weight_decay_mult=3.0),
        optimizer=OptimizerSettings(lr=0.2, weight_decay=0.01, schedule="constant"),
    )
    groups = {group["name"]: group for group in made.param_groups()}
    assert groups["network"]["lr"] == pytest.approx(0.2)
    assert groups["batchformer"]["lr"] == pytest.approx(0.02)
    assert groups["network"]["weight_decay"] == pytest.approx(0.01)
    assert groups["batchformer"]["weight_decay"] == pytest.approx(0.03)
    assert sum(len(group["params"]) for group in groups.values()) == len(list(made.network.parameters()))


@pytest.mark.parametrize(("kind", "heads"), [("plain", 4), ("ride", 1)])
def test_heads_follow_the_network_where_the_settings_leave_them_open(kind: Any, heads: int) -> None:
    more: dict[str, Any] = RIDE if kind == "ride" else {}
    (module,) = built(**more).handle.modules  # type: ignore[union-attr]
    assert module.num_heads == heads


# ------------------------------------------------------------------ on the base of every task


def set_up(precision: str = "32-true", **settings: Any) -> LongTailTask:
    """A task after its ``setup()``, which asks a trainer for data and precision."""
    made = LongTailTask(**settings)
    facts: dict[str, Any] = {
        **vars(FACTS),
        "counts": torch.tensor(COUNTS),
        "test_splits": ["test"],
        "fingerprints": dict,
    }
    made.trainer = SimpleNamespace(datamodule=SimpleNamespace(**facts), precision=precision)  # type: ignore[assignment]
    made.setup("fit")
    return made


@pytest.mark.parametrize(("precision", "wanted", "last"), [
    ("bf16-mixed", None, True), ("32-true", None, False), ("32-true", True, True), ("bf16-mixed", False, False),
])  # fmt: skip
def test_channels_last_comes_with_bf16(precision: str, wanted: bool | None, last: bool) -> None:
    made = set_up(precision, channels_last=wanted)
    kernel = next(p for p in made.network.parameters() if p.ndim == 4 and min(p.shape) > 1)
    images = made.formatted(torch.randn(2, 3, 16, 16))
    for tensor in (kernel, images):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == last
        assert tensor.is_contiguous() != last


def test_the_build_leaves_the_global_generator_alone_and_is_the_same_in_all_arms() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    mixed = set_up()
    assert torch.equal(torch.rand(3), expected)
    plain: nn.Module = set_up(batchformer=BatchFormerSettings("plain")).network
    assert all(torch.equal(value, mixed.network.state_dict()[key]) for key, value in plain.state_dict().items())


def test_a_run_does_not_go_on_with_other_data() -> None:
    made = set_up()
    checkpoint: dict[str, Any] = {}
    made.on_save_checkpoint(checkpoint)
    made.on_load_checkpoint(checkpoint)
    checkpoint["longtail"]["facts"]["counts"] = [41, 10, 4]
    with pytest.raises(ValueError, match="the training images of each class have changed. Bring that data back"):
        made.on_load_checkpoint(checkpoint)
