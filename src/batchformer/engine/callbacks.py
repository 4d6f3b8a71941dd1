"""Callbacks that record a run: one row of metrics for each epoch, and what the training costs."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from batchformer.data.atomic import write_text

from .environment import memory_mb


class History(Callback):
    """One row for each epoch in metrics.csv; the rows travel in the checkpoint, so a resumed run has each once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._validated = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The Trainer keeps the validation metrics of the epochs before."""
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """These are new."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}
        if not self._validated:
            values = {name: value for name, value in values.items() if not name.startswith("val_")}
        rates = {
            f"lr_{group.get('name', i)}": group["lr"] for i, group in enumerate(trainer.optimizers[0].param_groups)
        }
        self.rows.append({"epoch": trainer.current_epoch, "step": trainer.global_step, **values, **rates})
        if trainer.is_global_zero:
            self.write()

    def write(self) -> None:
        """Write all rows; a metric that an epoch has not is an empty cell."""
        names = list(dict.fromkeys(["epoch", "step", *(name for row in self.rows for name in row)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        """The rows."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The rows of the epochs before the interruption."""
        self.rows = list(state_dict["rows"])


class Cost(Callback):
    """Time of training steps, data included, and of the whole training, and the memory that was there before it.

    Of many steps every second one is kept, then every fourth, and so on: checkpoints stay small, however long the run.
    """

    skip = 3  # the first steps of an epoch start workers and caches
    most = 2048  # times that are kept

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.stride = 1
        self.steps = 0
        self.train_seconds = 0.0
        self.memory_before_mb: float | None = None
        self._last = 0.0
        self._epoch_start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Data and network are there, and nothing has been trained."""
        self.memory_before_mb = memory_mb(trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._epoch_start = self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time since the last step."""
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if batch_idx >= min(self.skip, trainer.num_training_batches - 1):
            self._keep(now - self._last)
        self._last = now

    def _keep(self, seconds: float) -> None:
        if self.steps % self.stride == 0:
            self.step_seconds.append(seconds)
        self.steps += 1
        if len(self.step_seconds) > self.most:
            del self.step_seconds[1::2]
            self.stride *= 2

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch's time (without validation, which comes before this hook, as the last step's)."""
        self.train_seconds += self._last - self._epoch_start

    def state_dict(self) -> dict[str, Any]:
        """The measurements."""
        kept = {"step_seconds": self.step_seconds, "stride": self.stride, "steps": self.steps}
        return {**kept, "train_seconds": self.train_seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The measurements before the interruption."""
        self.step_seconds = list(state_dict["step_seconds"])
        self.stride = int(state_dict.get("stride", 1))
        self.steps = int(state_dict.get("steps", len(self.step_seconds)))
        self.train_seconds = float(state_dict["train_seconds"])

    def step_ms(self) -> float | None:
        """Median step in milliseconds."""
        if not self.step_seconds:
            return None
        return 1000 * sorted(self.step_seconds)[len(self.step_seconds) // 2]

    def memory_over_start_mb(self, peak: float) -> float | None:
        """What training took of a peak, in MB; ``None`` where it is not known."""
        return None if self.memory_before_mb is None else max(0.0, peak - self.memory_before_mb)
