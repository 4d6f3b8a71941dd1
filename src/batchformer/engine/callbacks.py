"""Callbacks that record a run: a row of metrics for each epoch, the cost of training, and how far the run is."""

import csv
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from batchformer.data.atomic import write_text

from .environment import memory_mb, peak_memory_mb


class History(Callback):
    """Write metrics.csv with one row for each epoch.

    The rows are part of the checkpoint, so that a resumed run has each epoch once. One object may record several stages
    in turn.

    Args:
        path: File to write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, float]] = []
        self._validated = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation metrics at hand, if any, are those of an earlier epoch."""
        self._validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the validation metrics at hand are those of this epoch."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the row of the epoch and write the file."""
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
        """Write all rows; a metric that an epoch lacks is an empty cell."""
        names = list(dict.fromkeys(["epoch", "step", *(name for row in self.rows for name in row)]))
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())

    def state_dict(self) -> dict[str, Any]:
        """Return the rows."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the rows of the epochs before the interruption."""
        self.rows = list(state_dict["rows"])


class Cost(Callback):
    """Measure one stage: the time of a training step with its data, the time of all training, the memory at the start.

    At most 2,048 step times are kept, so that checkpoints stay small: when there are more, every other one is dropped.

    Attributes:
        train_seconds: Time of all training epochs so far, without validation.
        parameters: Number of the network's parameters, those of BatchFormer included; ``None`` before the training.
    """

    skip = 3  # first steps of an epoch, which start workers and caches and are left out
    most = 2048

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self.stride = 1
        self.steps = 0
        self.train_seconds = 0.0
        self.memory_before_mb: float | None = None
        self.parameters: int | None = None
        self._last = 0.0
        self._epoch_start = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the memory in use before the first step, with data and network loaded."""
        self.memory_before_mb = memory_mb(trainer.strategy.root_device)
        self.parameters = sum(parameter.numel() for parameter in pl_module.parameters())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks of the epoch and of its first step."""
        self._epoch_start = self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the time since the last step."""
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
        """Add the time from the start of the epoch to its last step; validation, which comes after it, is left out."""
        self.train_seconds += self._last - self._epoch_start

    def state_dict(self) -> dict[str, Any]:
        """Return the measurements."""
        kept = {"step_seconds": self.step_seconds, "stride": self.stride, "steps": self.steps}
        return {**kept, "train_seconds": self.train_seconds, "parameters": self.parameters}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the measurements before the interruption."""
        self.step_seconds = list(state_dict["step_seconds"])
        self.stride = int(state_dict.get("stride", 1))
        self.steps = int(state_dict.get("steps", len(self.step_seconds)))
        self.train_seconds = float(state_dict["train_seconds"])
        self.parameters = state_dict.get("parameters")

    def step_ms(self) -> float | None:
        """Return the median time of a step in milliseconds, or ``None`` if no step was timed."""
        if not self.step_seconds:
            return None
        return 1000 * sorted(self.step_seconds)[len(self.step_seconds) // 2]

    def memory_over_start_mb(self, peak: float | None) -> float | None:
        """Return how far a peak lies above the memory before the first step, in MB; ``None`` if that is unknown.

        Args:
            peak: Highest memory of the process in MB, if known.
        """
        if peak is None or self.memory_before_mb is None:
            return None
        return max(0.0, peak - self.memory_before_mb)


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        epoch: Number of finished epochs.
        epochs: Number of epochs of the whole run, at least 1.
        part: Finished part of the running epoch, 0 to 1.
        peak_mb: Highest resident memory of the process so far, in MB; 0 if it is unknown.
        memory_mb: Its resident memory now.
        testing: Whether the training is over and the test goes on.
    """

    epoch: int
    epochs: int
    part: float = 0.0
    peak_mb: float = 0.0
    memory_mb: float = 0.0
    testing: bool = False

    @property
    def fraction(self) -> float:
        """Finished part of the whole run, 0 to 1."""
        return 1.0 if self.testing else min(1.0, (self.epoch + self.part) / max(1, self.epochs))

    @property
    def words(self) -> str:
        """Epoch of epochs.

        Example:
            >>> Progress(epoch=2, epochs=30).words
            'epoch 3 of 30'
        """
        return "testing" if self.testing else f"epoch {min(self.epoch + 1, self.epochs)} of {self.epochs}"


class TellProgress(Callback):
    """Tell another process how far the run is, after the first steps and then twice a second.

    Args:
        tell: Takes the progress.
        epochs: Gives the number of epochs of the whole run, which may have several stages.
    """

    first_steps = 3
    every_seconds = 0.5

    def __init__(self, tell: Callable[[Progress], None], epochs: Callable[[], int]) -> None:
        self.tell, self._epochs = tell, epochs
        self._steps = 0
        self._last = -1e9

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Tell how far the training is."""
        self._steps += 1
        if self._steps >= self.first_steps and time.monotonic() - self._last > self.every_seconds:
            self._last = time.monotonic()
            self._tell(trainer, part=(batch_idx + 1) / max(1, trainer.num_training_batches))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell how far the training is; short epochs have no other occasion."""
        self._tell(trainer, part=1.0)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell that the test has begun."""
        self._tell(trainer, testing=True)

    def _tell(self, trainer: Trainer, part: float = 0.0, testing: bool = False) -> None:
        here = torch.device("cpu")  # free memory is looked at on the host
        peak, now = peak_memory_mb(here) or 0.0, memory_mb(here) or 0.0
        self.tell(Progress(trainer.current_epoch, max(1, self._epochs()), part, peak, now, testing))
