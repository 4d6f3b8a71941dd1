"""One detection run: data, detector, plug-in, loss and metrics, wired for Lightning's Trainer."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from batchformer.data.samplers import derive_seed
from batchformer.insertion import Handle
from batchformer.tasks.set_prediction.detector import backbone_of
from batchformer.tasks.set_prediction.from_transformers import use_criterion
from batchformer.tasks.set_prediction.optimizer import DetectorOptimizerSettings, parameter_groups
from batchformer.tasks.training.averaging import MovingAverage
from batchformer.tasks.training.contract import ClassResult
from batchformer.tasks.training.schedule import DIVERGED, optimization
from batchformer.tasks.training.settings import BatchFormerSettings, insert_plug_in

from .loss import detection_criterion
from .metrics import DetectionMetrics
from .model import build_network
from .restore import DataFacts
from .settings import LossSettings, NetworkSettings

AFTER_THE_FIRST_LAYER = BatchFormerSettings(before=None, after=["model.encoder.layers.0"])


class DetectionTask(LightningModule):
    """Train a detector, plain or with BatchFormer behind its first encoder layer; test the plain detector.

    The network is built in ``setup()``, when the data has said how many classes there are. It is the same for all arms
    of a comparison with one seed: the module comes after it and draws its weights apart.

    Args:
        network: The detector.
        loss: The loss.
        batchformer: The module and the arm.
        optimizer: Optimizer and schedule.
        ema: Decay of an exponential moving average of the weights, which is then what is tested; ``None`` for none.
        seed: Of initial weights and dropout.

    Raises:
        ValueError: From ``setup()``, for settings that do not go together.
    """

    primary: ClassVar[str] = "AP"
    class_metric: ClassVar[str] = "AP"
    class_count: ClassVar[str] = "training boxes"

    def __init__(
        self,
        network: NetworkSettings = NetworkSettings(),  # noqa: B008  # jsonargparse reads defaults off the signature
        loss: LossSettings = LossSettings(),  # noqa: B008
        batchformer: BatchFormerSettings = AFTER_THE_FIRST_LAYER,
        optimizer: DetectorOptimizerSettings = DetectorOptimizerSettings(),  # noqa: B008
        ema: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network_settings, self.loss_settings, self.plug_in = network, loss, batchformer
        self.optimizer_settings, self.ema, self.seed = optimizer, ema, seed
        self.network: nn.Module | None = None
        self.handle: Handle | None = None
        self.facts: DataFacts | None = None
        self.test_seconds, self.test_images = 0.0, 0

    # ---------------------------------------------------------------- building

    def setup(self, stage: str) -> None:
        """Build the network for the data at hand, once; with cached features, have the data hold them."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.network is None:
            self.facts = DataFacts.of(data)
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                self.network = build_network(self.network_settings, len(self.facts.classes))
                torch.manual_seed(derive_seed(self.seed, 1))
                self.handle = insert_plug_in(self.network, self.plug_in)
            criterion = detection_criterion(
                self.loss_settings,
                self.network_settings.detector,
                len(self.facts.classes),
                two_streams=self._doubles,
                stream_weights=self.plug_in.stream_weights,
            )
            use_criterion(self.network, criterion)
            self.metrics = nn.ModuleDict(
                {
                    split: DetectionMetrics(len(self.facts.classes), criterion.kind)
                    for split in ("val", *data.test_splits)
                }
            )
        data.prepare_features(backbone_of(self.network), stage)

    def _doubles(self) -> bool:
        return self.handle is not None and self.handle.doubles

    # ---------------------------------------------------------------- steps

    def forward(self, batch: dict[str, Any], labels: Any = None) -> Any:
        """What the detector returns for a batch of `DetectionData`."""
        network = cast(nn.Module, self.network)
        with backbone_of(network).serving(batch.get("features")):
            return network(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"], labels=labels)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make dropout a function of (seed, epoch, batch): a resumed run draws what an uninterrupted one drew."""
        torch.manual_seed(derive_seed(self.seed, 2, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The mean of both streams' losses (or the one stream's)."""
        try:
            output = self(batch, batch["labels"])
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error} This was in epoch {self.current_epoch}, batch {batch_idx}. {DIVERGED}"
            ) from error
        rows = len(batch["labels"])
        self.log("train_loss", output.loss, on_step=False, on_epoch=True, batch_size=rows, sync_dist=True)
        return cast(Tensor, output.loss)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of a test split and the time for each image."""
        start = time.perf_counter()
        split = list(self.metrics)[1 + dataloader_idx]
        self._evaluate(batch, split)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.test_seconds += time.perf_counter() - start
        self.test_images += len(batch["labels"])

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        output = self(batch)
        if not bool(torch.isfinite(output.logits).all()):
            raise FloatingPointError(f"Expected finite logits of the {split} images, got others. {DIVERGED}")
        cast(DetectionMetrics, self.metrics[split]).add(output.logits, output.pred_boxes, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val", "val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics, of every split, and keep the AP of each class on the first."""
        for split in list(self.metrics)[:0:-1]:
            self._log_metrics(split, "test" if split == "test" else f"test_{split}")

    def _log_metrics(self, split: str, prefix: str) -> None:
        metric = cast(DetectionMetrics, self.metrics[split])
        values = metric.compute()
        metric.reset()
        self.per_class = values.pop("per_class").tolist()
        # The same on every rank; averaging them changes nothing, and Lightning asks for it.
        self.log_dict({f"{prefix}_{name}": value.to(self.device) for name, value in values.items()}, sync_dist=True)

    # ---------------------------------------------------------------- optimization

    def configure_optimizers(self) -> Any:
        """AdamW with a slower backbone and the module's own multipliers; the schedule steps with every batch."""
        groups = parameter_groups(cast(nn.Module, self.network), self.optimizer_settings, self.plug_in)
        return optimization(groups, self.optimizer_settings, self.trainer)

    def configure_callbacks(self) -> list[Callback]:
        """The moving average, where it is asked for."""
        return [] if self.ema is None else [MovingAverage(decay=self.ema)]

    # ---------------------------------------------------------------- records

    def class_results(self) -> list[ClassResult]:
        """Each class after the test."""
        facts = cast(DataFacts, self.facts)
        return [ClassResult(*row) for row in zip(facts.classes, facts.counts, self.per_class, strict=True)]

    def notes(self) -> list[str]:
        """What trains, and what the data's policy did."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return [backbone_of(cast(nn.Module, self.network)).note(), *data.notes()]

    @staticmethod
    def not_comparable(setting: Callable[[str], Any]) -> str | None:
        """All settings compare."""
        return None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what it takes to build the plain network again: plain types, loadable weights-only."""
        checkpoint["detection"] = {
            "network": asdict(self.network_settings),
            "data": asdict(cast(DataFacts, self.facts)),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with other data: the rest of a run would not be that run.

        Raises:
            ValueError: When classes or counts differ from those that the run was started with.
        """
        before = asdict(DataFacts.read(checkpoint["detection"]["data"]))
        now = asdict(cast(DataFacts, self.facts))
        for key, what in (("classes", "classes"), ("counts", "training boxes of each class")):
            if before[key] != now[key]:
                raise ValueError(
                    f"Expected the data that this run was trained on, but the {what} have changed. Bring it back, or "
                    "start another run."
                )
