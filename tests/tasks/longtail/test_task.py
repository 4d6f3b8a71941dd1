"""The wiring of a run: losses of both streams, schedules, optimizer groups, formats, and settings that do not fit."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchformer.tasks.longtail.restore import DataFacts
from batchformer.tasks.longtail.settings import LossSettings, NetworkSettings, StageSettings
from batchformer.tasks.longtail.task import LongTailTask
from batchformer.tasks.training.schedule import learning_rate_factor
from batchformer.tasks.training.settings import BatchFormerSettings, OptimizerSettings

COUNTS = [40, 10, 4]


def data() -> Any:
    groups = {"many": [0], "medium": [1], "few": [2]}
    return SimpleNamespace(
        counts=torch.tensor(COUNTS), classes=["a", "b", "c"], groups=groups, in_channels=1, image_size=16,
        mean=(0.5,), std=(0.5,),
    )  # fmt: skip


def task(precision: str = "32-true", **settings: Any) -> LongTailTask:
    made = LongTailTask(**settings)
    trainer: Any = SimpleNamespace(datamodule=data(), precision=precision, estimated_stepping_batches=20, max_epochs=5)
    made._trainer = trainer
    logged: dict[str, Any] = {}
    made.log = lambda name, value, **_: logged.update({name: value})  # type: ignore[assignment]
    made.logged = logged  # type: ignore[assignment]
    return made


def batch(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 16, 16, generator=generator), torch.arange(n) % 3


def step(made: LongTailTask, of: Any) -> Tensor:
    made.setup("fit")
    made.train()
    made._current_fx_name = None
    type(made).current_epoch = property(lambda self: 0)  # type: ignore[assignment,misc]
    try:
        torch.manual_seed(0)
        return made.training_step(of, 0)
    finally:
        del type(made).current_epoch


def balanced(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits + torch.tensor(COUNTS).log(), targets)


def test_the_loss_is_the_mean_of_both_streams() -> None:
    images, targets = batch()
    made = task()
    loss = step(made, (images, targets))
    torch.manual_seed(0)
    logits = made.network(images)  # type: ignore[misc]
    assert len(logits) == 16
    torch.testing.assert_close(loss, (balanced(logits[:8], targets) + balanced(logits[8:], targets)) / 2)
    weighted = step(task(batchformer=BatchFormerSettings(stream_weights=(3.0, 1.0))), (images, targets))
    torch.testing.assert_close(weighted, 0.75 * balanced(logits[:8], targets) + 0.25 * balanced(logits[8:], targets))


@pytest.mark.parametrize("arm", ["plain", "single_stream"])
def test_one_stream_has_one_loss(arm: str) -> None:
    images, targets = batch()
    made = task(batchformer=BatchFormerSettings(arm=arm))  # type: ignore[arg-type]
    loss = step(made, (images, targets))
    torch.manual_seed(0)
    logits = made.network(images)  # type: ignore[misc]
    torch.testing.assert_close(loss, balanced(logits, targets))


def test_soft_targets_double_too() -> None:
    images, targets = batch()
    soft = 0.7 * F.one_hot(targets, 3) + 0.3 * F.one_hot(targets.flip(0), 3)
    made = task(loss=LossSettings("cross_entropy"))
    loss = step(made, (images, soft))
    torch.manual_seed(0)
    logits = made.network(images)  # type: ignore[misc]
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.cat([soft, soft])))


def test_paco_trains_both_streams_against_the_keys_of_one() -> None:
    images, targets = batch()
    settings = NetworkSettings(kind="paco", settings={"queue_size": 8})
    made = task(network=settings, loss=LossSettings("paco"))
    assert math.isfinite(step(made, ([images, images.flip(-1)], targets)).item())
    with pytest.raises(ValueError, match="two views and class indices"):
        step(task(network=settings, loss=LossSettings("paco")), (images, targets))


def test_a_loss_that_is_not_finite_is_refused_and_so_are_logits() -> None:
    images, targets = batch()
    with pytest.raises(FloatingPointError, match=r"finite loss, got nan in epoch 0, batch 0. Lower model.optimizer.lr"):
        step(task(), (images * math.nan, targets))
    made = task()
    made.setup("test")
    made.eval()
    with pytest.raises(FloatingPointError, match="finite logits of the test images"):
        made.test_step((images * math.inf, targets), 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": LossSettings("paco")}, "loss and network kind 'paco' together, got loss 'paco' and kind 'plain'"),
        ({"network": NetworkSettings(kind="paco")}, "loss 'balanced_softmax' and kind 'paco'"),
        ({"loss": LossSettings("ride")}, "Expected network kind 'ride' for the RIDE loss, got 'plain'"),
        ({"stage": StageSettings(second="crt")}, "stage.start_from=RUN, the first stage's run folder, for 'crt'"),
        ({"stage": StageSettings(teacher="run")}, "RIDE loss for distillation from a teacher, got 'balanced_softmax'"),
        ({"loss": LossSettings("ldam", {"margin": 1})}, "no setting margin. It has: .*max_margin"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task(**settings).setup("fit")


def test_a_missing_first_stage_or_teacher_is_named(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="run folder with checkpoints/last.ckpt"):
        task(stage=StageSettings(second="lws", start_from=missing)).setup("fit")
    ride = {"network": NetworkSettings(kind="ride"), "loss": LossSettings("ride")}
    with pytest.raises(FileNotFoundError, match="run folder with checkpoints/last.ckpt"):
        task(**ride, stage=StageSettings(teacher=missing)).setup("fit")


@pytest.mark.parametrize(("precision", "wanted", "last"), [
    ("bf16-mixed", None, True), ("32-true", None, False), ("32-true", True, True), ("bf16-mixed", False, False),
])  # fmt: skip
def test_channels_last_comes_with_bf16(precision: str, wanted: bool | None, last: bool) -> None:
    made = task(precision, channels_last=wanted)
    made.setup("fit")
    assert made.network is not None
    kernel = next(p for p in made.network.parameters() if p.ndim == 4 and min(p.shape) > 1)
    images = made._format(torch.randn(2, 3, 16, 16))
    for tensor in (kernel, images):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == last
        assert tensor.is_contiguous() != last


def test_the_global_generator_is_left_alone_by_the_build() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    task().setup("fit")
    assert torch.equal(torch.rand(3), expected)


def test_the_module_has_its_own_rate_and_decay() -> None:
    made = task(
        batchformer=BatchFormerSettings(lr_mult=0.1, weight_decay_mult=3.0),
        optimizer=OptimizerSettings(lr=0.2, weight_decay=0.01, schedule="constant"),
    )
    made.setup("fit")
    optimizer = made.configure_optimizers()["optimizer"]
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["network"]["lr"] == pytest.approx(0.2)
    assert groups["batchformer"]["lr"] == pytest.approx(0.02)
    assert groups["network"]["weight_decay"] == pytest.approx(0.01)
    assert groups["batchformer"]["weight_decay"] == pytest.approx(0.03)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(made.parameters()))


def test_schedules() -> None:
    steps = OptimizerSettings(schedule="step", milestones=[2, 4], gamma=0.1)
    assert [learning_rate_factor(s, 25, 5, steps) for s in (0, 9, 10, 19, 20)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    cosine = OptimizerSettings(schedule="cosine", per_epoch=True)
    (within,) = {learning_rate_factor(s, 20, 5, cosine) for s in range(5, 10)}
    assert within == pytest.approx(0.5 * (1 + math.cos(math.pi * 0.25)))
    assert learning_rate_factor(7, 20, 5, OptimizerSettings(schedule="constant")) == 1.0


def test_a_run_does_not_go_on_with_other_data() -> None:
    made = task()
    made.setup("fit")
    checkpoint: dict[str, Any] = {}
    made.on_save_checkpoint(checkpoint)
    made.on_load_checkpoint(checkpoint)
    other = DataFacts.of(data())
    checkpoint["longtail"]["data"] = {**vars(other), "counts": [41, 10, 4]}
    with pytest.raises(ValueError, match="the training images of each class have changed. Bring it back"):
        made.on_load_checkpoint(checkpoint)
