"""The task: its error is counted in dots, lies above 1, and less of it is better."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import MeanAbsoluteError, Metric

from batchformer.insertion import Handle
from batchformer.tasks.training.contract import Measure, Unit
from batchformer.tasks.training.settings import BatchFormerSettings, OptimizerSettings
from batchformer.tasks.training.task import Task

from .data import CountingData
from .restore import CHECKPOINT, build, rebuild


class CountingError(MeanAbsoluteError):
    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        return {"error": super().compute()}


class CountingTask(Task):
    checkpoint, data_type = CHECKPOINT, CountingData
    measures = (Measure("error", "counting error", unit="dots", higher_is_better=False),)
    primary = class_metric = "error"
    stages: ClassVar = {"train": "All of the network is trained.", "last_layer": "Its last layer is trained alone."}
    follows: ClassVar = {"last_layer": "train"}

    def __init__(
        self,
        batchformer: BatchFormerSettings = BatchFormerSettings(),  # noqa: B008
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008
        seed: int = 0,
    ) -> None:
        super().__init__(batchformer, optimizer, seed=seed)

    def build_network(self) -> nn.Module:
        if self.stage.start is None:
            return build(self.facts.side)
        network: Any = rebuild(self.checkpoint.read(self.stage.start)).network.train().requires_grad_(False)
        network[3].requires_grad_(True)
        return network  # type: ignore[no-any-return]

    def insert(self, network: nn.Module) -> Handle | None:
        return super().insert(network) if self.stage.name == "train" else None

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        numbers = batch[1] if self.handle is None else self.handle.expand(batch[1])
        return F.mse_loss(outputs[:, 0], numbers)

    def build_metrics(self, split: str) -> Metric:
        return CountingError()

    def update_metrics(self, metric: Any, outputs: Tensor, batch: Any, split: str) -> None:
        metric.update(outputs[:, 0], batch[1])

    @classmethod
    def units(cls, setting: Callable[[str], Any]) -> Sequence[Unit]:
        return [Unit(f"split{split}", {"data.split": split}) for split in range(2)]
