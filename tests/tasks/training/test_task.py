"""The base of every task: its hooks, and what it does the same way in each of them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from batchformer.tasks.training.checkpoint import CheckpointFormat, DataFacts
from batchformer.tasks.training.contract import Measure, Stage
from batchformer.tasks.training.data import TaskData
from batchformer.tasks.training.settings import BatchFormerSettings, OptimizerSettings
from batchformer.tasks.training.task import Task


class Sums(Metric):
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        self.total += logits.detach().sum(0)

    def compute(self) -> dict[str, Tensor]:
        return {"sum": self.total.sum().double(), "per_class": self.total}


@dataclass(frozen=True)
class Facts(DataFacts):
    width: int


class Tiny(Task):
    checkpoint, data_type = CheckpointFormat("tiny", Facts), TaskData
    measures = (Measure("sum", "sum", unit=""),)
    primary = class_metric = "sum"
    stages: ClassVar[dict[str, str]] = {"train": "All of it.", "head": "The head."}

    def build_network(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.facts.width, 8), nn.ReLU(), nn.Linear(8, 2))

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return outputs.square().mean()

    def build_metrics(self, split: str) -> Metric:
        return Sums()

    def update_metrics(self, metric: Any, outputs: Tensor, batch: Any, split: str) -> None:
        metric.update(outputs)


class Data(TaskData):
    def __init__(self, counts: tuple[int, ...] = (3, 5)) -> None:
        super().__init__()
        self.classes, self.counts, self.width = ("a", "b"), counts, 4
        self.test_splits = ["test", "unseen"]


def task(arm: Any = "batchformer", data: Data | None = None, **arguments: Any) -> Tiny:
    made = Tiny(BatchFormerSettings(arm=arm), OptimizerSettings(), **arguments)
    made.trainer = SimpleNamespace(  # type: ignore[assignment]
        datamodule=data or Data(), precision="32-true", max_epochs=6, estimated_stepping_batches=60
    )
    made.setup("fit")
    return made


def state(made: Tiny) -> dict[str, Tensor]:
    return {name: value for name, value in made.network.state_dict().items() if "batchformer" not in name}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(value.equal(other[name]) for name, value in one.items())


def test_arms_of_one_seed_start_from_one_network_and_leave_the_global_stream_alone() -> None:
    before = torch.get_rng_state()
    plain, mixed = task("plain"), task()
    assert torch.get_rng_state().equal(before)
    assert plain.handle is None and mixed.handle is not None
    assert same(state(plain), state(mixed))
    assert not same(state(mixed), state(task(seed=1)))
    assert list(plain.metrics) == ["val", "test", "unseen"]


def test_the_loss_needs_no_trainer() -> None:
    made = task("plain")
    outputs, batch = torch.tensor([[1.0, 2.0]]), (torch.zeros(1, 4), torch.zeros(1))
    made._trainer = None
    assert made.loss(outputs, batch).item() == 2.5


def test_a_loss_that_is_not_finite_says_where_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    made = task("plain")
    monkeypatch.setattr(Tiny, "current_epoch", 3)
    monkeypatch.setattr(made, "loss", lambda outputs, batch: torch.tensor(torch.nan))
    with pytest.raises(FloatingPointError, match=r"got nan. This was in epoch 3, batch 7. Lower model.optimizer.lr"):
        made.training_step((torch.zeros(2, 4), torch.zeros(2)), 7)


def test_dropout_follows_from_seed_epoch_and_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made = task()
    monkeypatch.setattr(Tiny, "global_rank", 0)

    def drawn(epoch: int, batch: int) -> float:
        monkeypatch.setattr(Tiny, "current_epoch", epoch)
        made.on_train_batch_start(None, batch)
        return torch.rand(()).item()

    assert drawn(0, 0) == drawn(0, 0)
    assert len({drawn(0, 0), drawn(0, 1), drawn(1, 0)}) == 3


@pytest.mark.parametrize(("stage", "steps"), [(Stage("train"), 60), (Stage("head", epochs=2, first_epoch=4), 20)])
def test_the_schedule_is_that_of_the_stage(stage: Stage, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made = task()
    made.stage = stage
    configured = made.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for _ in range(steps):
        assert optimizer.param_groups[0]["lr"] > 0
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)  # cosine ends with the stage
    monkeypatch.setattr(Tiny, "current_epoch", 5)
    assert made.stage_epoch == 5 - stage.first_epoch


def test_test_metrics_carry_their_split_and_time_counts_forward_passes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = task("plain").eval()
    logged: dict[str, float] = {}
    monkeypatch.setattr(made, "log_dict", lambda values, **_: logged.update({k: float(v) for k, v in values.items()}))
    clock = iter(range(100))
    monkeypatch.setattr("batchformer.tasks.training.task.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(made, "run", lambda batch: batch[0])
    monkeypatch.setattr(made, "update_metrics", lambda metric, outputs, *_: (next(clock), metric.update(outputs)))
    batch = (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2))
    made.test_step(batch, 0)
    made.test_step(batch, 1, dataloader_idx=1)
    assert (made.test_seconds, made.test_images) == (2, 4)
    made.on_test_epoch_end()
    assert logged == {"test_sum": 10, "test_unseen_sum": 10}
    assert [(one.name, one.count, one.value) for one in made.class_results()] == [("a", 3, 4.0), ("b", 5, 6.0)]


def test_other_data_is_refused() -> None:
    checkpoint: dict[str, Any] = {}
    task().on_save_checkpoint(checkpoint)
    assert checkpoint["tiny"] == {
        "stage": "train",
        "settings": {},
        "facts": {"classes": ["a", "b"], "counts": [3, 5], "width": 4},
    }
    task().on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="the training images of each class have changed. Bring that data back"):
        task(data=Data((3, 6))).on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    "call",
    [
        lambda made: made.build_network(),
        lambda made: made.loss(None, None),
        lambda made: made.build_metrics("val"),
        lambda made: made.update_metrics(None, None, None, "val"),
    ],
)
def test_a_task_without_its_hooks_says_which(call: Callable[[Task], Any]) -> None:
    with pytest.raises(NotImplementedError, match=r"Bare needs \w+\("):
        call(type("Bare", (Task,), {})(BatchFormerSettings(), OptimizerSettings()))
