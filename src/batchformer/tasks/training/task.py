"""The base of every task: a network is built from the data, trained with BatchFormer in it, and tested without it.

A task subclasses :class:`Task`, fills in a few hooks and keeps to what its problem needs; everything that is the same
in every task happens here, in the order of a run: build, train, evaluate, record, save.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import Metric

from batchformer.data.samplers import derive_seed
from batchformer.insertion import Handle, param_groups

from .averaging import MovingAverage
from .checkpoint import CheckpointFormat, DataFacts
from .contract import ClassResult, Measure, Stage, Unit
from .data import TaskData, changed_splits, in_words
from .schedule import DIVERGED, optimization
from .settings import BatchFormerSettings, OptimizerSettings, insert_from_settings


class Task(LightningModule):
    """Train a network, plain or with BatchFormer, and test the plain network.

    The network is built in ``setup()``, when the data has said what it holds. It is the same for all arms of a
    comparison with one seed, since BatchFormer comes after it and draws its weights from a seed of its own.

    A task is a subclass in ``tasks/<name>/task.py``. It sets the class attributes, takes its settings in its
    constructor, and overrides the hooks :meth:`check`, :meth:`build_network`, :meth:`insert`, :meth:`run`,
    :meth:`loss`, :meth:`build_metrics`, :meth:`update_metrics`, :meth:`param_groups`, :meth:`settings`, :meth:`notes`,
    :meth:`units`, :meth:`not_comparable` and :meth:`translate_settings` as far as it needs them.

    Args:
        batchformer: BatchFormer and the arm of a comparison.
        optimizer: Optimizer and schedule.
        ema: Decay of an exponential moving average of the weights, which is then what is tested; ``None`` for none.
        channels_last: Whether images lie in memory with channels last; ``None`` means only with bf16.
        compile: Whether the network runs through ``torch.compile``.
        seed: Seed of initial weights and dropout.

    Attributes:
        checkpoint: Name of the task, and how its checkpoints are read.
        data_type: Class of the task's data module.
        measures: All metrics, in the order of tables.
        primary: Name of the metric that a comparison's verdict is about.
        class_metric: Name of the metric that ``compute()["per_class"]`` holds for each class.
        class_count: What ``DataFacts.counts`` counts, such as "training images".
        stages: Name of each stage that a recipe can list, and a sentence about it. The first is the default.
        follows: Stage -> the stage that it starts from, for stages that are not the first of a training.
        loss_is_checked: Whether :meth:`loss` itself raises ``FloatingPointError`` when it is not finite, so that it
            need not be looked at once more.
        divergence_advice: What a user can do about a loss or outputs that are not finite.
        stage: The stage that this run is in; set by the engine.
        facts: What the network and its users need to know of the data; ``None`` before ``setup()``.
        fingerprints: Fingerprint of each split of the data; empty before ``setup()``, and where the data has none.
        network: The network, with BatchFormer in it; ``None`` before ``setup()``.
        handle: Handle of the insertion; ``None`` for the plain arm and before ``setup()``.
        test_seconds: Seconds that the forward passes of the test took.
        test_images: Number of test samples that went through them.
    """

    checkpoint: ClassVar[CheckpointFormat]
    data_type: ClassVar[type[TaskData]]
    measures: ClassVar[tuple[Measure, ...]]
    primary: ClassVar[str]
    class_metric: ClassVar[str]
    class_count: ClassVar[str] = "training images"
    stages: ClassVar[dict[str, str]] = {"train": "The network is trained."}
    follows: ClassVar[dict[str, str]] = {}
    loss_is_checked: ClassVar[bool] = False
    divergence_advice: ClassVar[str] = DIVERGED

    def __init__(
        self,
        batchformer: BatchFormerSettings,
        optimizer: OptimizerSettings,
        *,
        ema: float | None = None,
        channels_last: bool | None = None,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batchformer, self.optimizer_settings, self.ema, self.seed = batchformer, optimizer, ema, seed
        self.channels_last, self.compiles = channels_last, compile
        self.stage = Stage(next(iter(self.stages)))
        self.facts: Any = None
        self.fingerprints: dict[str, str] = {}
        self.network: Any = None
        self.handle: Handle | None = None
        self.metrics = nn.ModuleDict()
        self.per_class: dict[str, list[float]] = {}
        self.test_seconds, self.test_images = 0.0, 0

    # ---------------------------------------------------------------- hooks of a task

    def check(self) -> None:
        """Refuse settings that do not go together. ``self.facts`` and ``self.stage`` are known.

        Raises:
            ValueError: Says what was expected, what came and the way out.
        """

    def build_network(self) -> nn.Module:
        """Build the plain network of this stage from ``self.facts``, and from ``self.stage.start`` in later stages."""
        raise NotImplementedError(f"{type(self).__name__} needs build_network(): it returns the plain network.")

    def insert(self, network: nn.Module) -> Handle | None:
        """Put BatchFormer into the network as the settings say; ``None`` for the plain arm."""
        return insert_from_settings(network, self.batchformer)

    def prepare(self) -> None:
        """Make what the loss needs, when the network is there with BatchFormer in it."""

    def run(self, batch: Any) -> Any:
        """Pass a batch through the network. By default the batch is ``(images, targets)``."""
        return self.network(self.formatted(batch[0]))

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the training loss, a scalar, from what :meth:`run` returned. It logs nothing and needs no trainer."""
        raise NotImplementedError(f"{type(self).__name__} needs loss(outputs, batch): it returns a scalar.")

    def build_metrics(self, split: str) -> Metric:
        """Return the metric of a split; its ``compute()`` gives scalars by name, and optionally ``per_class`` (K,)."""
        raise NotImplementedError(
            f"{type(self).__name__} needs build_metrics(split): it returns a torchmetrics.Metric."
        )

    def update_metrics(self, metric: Any, outputs: Any, batch: Any, split: str) -> None:
        """Add the outputs of a batch of ``split`` to its metric."""
        raise NotImplementedError(f"{type(self).__name__} needs update_metrics(metric, outputs, batch, split).")

    def rows(self, batch: Any) -> int:
        """Return the number of samples in a batch."""
        return len(batch[1])

    def param_groups(self) -> list[dict[str, Any]]:
        """Return parameter groups with their learning rates and weight decays."""
        settings, own = self.optimizer_settings, self.handle is not None
        return param_groups(
            self.network,
            settings.lr,
            batchformer_lr_mult=self.batchformer.lr_mult if own else 1.0,
            weight_decay=settings.weight_decay,
            batchformer_weight_decay_mult=self.batchformer.weight_decay_mult if own else 1.0,
            decay_norm_and_bias=settings.decay_norm_and_bias,
        )

    def settings(self) -> dict[str, Any]:
        """Return, in plain types, the settings that it takes to build the plain network again."""
        return {}

    def notes(self) -> list[str]:
        """Return sentences for the run's record: what trained and what was frozen, what was left out of the data."""
        return self._data().notes()

    @classmethod
    def units(cls, setting: Callable[[str], Any]) -> Sequence[Unit]:
        """Return what each seed of a comparison is run on beside the seed itself, such as target domains or splits.

        Args:
            setting: Gives the value of a key such as ``"data.split"`` as recipe and overrides say it, ``None`` where
                they are silent.
        """
        return (Unit(),)

    @classmethod
    def not_comparable(cls, setting: Callable[[str], Any]) -> str | None:
        """Return why the arms of a comparison would all be alike with these settings; ``None`` where they differ.

        Args:
            setting: As for :meth:`units`.
        """
        return None

    @classmethod
    def translate_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return settings of an earlier version in today's terms; the same dictionary where nothing is old.

        Args:
            settings: Dotted key to value, of a recipe with its overrides.
        """
        return settings

    # ---------------------------------------------------------------- building

    def setup(self, stage: str) -> None:
        """Build the network for the data at hand, once."""
        if self.network is not None:
            return
        self.facts = self.checkpoint.facts.of(self._data())
        self.fingerprints = self._data().fingerprints()
        self.check()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = self.build_network()
            # BatchFormer draws its weights apart, so that the network is the same in all arms.
            torch.manual_seed(derive_seed(self.seed, 1))
            self.handle = self.insert(network)
        self.network = network
        if self._formats():
            self.network.to(memory_format=torch.channels_last)
        if self.compiles:
            self.network.compile()  # in place, so that the names in a checkpoint stay
        self.prepare()
        for split in ("val", *self._data().test_splits):
            self.metrics[split] = self.build_metrics(split)

    def formatted(self, images: Tensor) -> Tensor:
        """Return images in the memory format of the network."""
        return images.contiguous(memory_format=torch.channels_last) if self._formats() else images

    def _formats(self) -> bool:
        if self.channels_last is None:
            return "bf16" in str(self.trainer.precision)
        return self.channels_last

    def _data(self) -> TaskData:
        return cast(TaskData, self.trainer.datamodule)  # type: ignore[attr-defined]

    # ---------------------------------------------------------------- training

    @property
    def stage_epoch(self) -> int:
        """Number of epochs of this stage that are done; ``current_epoch`` counts those of earlier stages too."""
        return int(self.current_epoch) - self.stage.first_epoch

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the network."""
        return self.network(*inputs, **named)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make dropout a function of seed, epoch and batch: a resumed run draws what an uninterrupted one drew."""
        torch.manual_seed(derive_seed(self.seed, 2, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch.

        Raises:
            FloatingPointError: When it is not finite; says where that was and what to do.
        """
        try:
            loss = self.loss(self.run(batch), batch)
            if not self.loss_is_checked and not bool(torch.isfinite(loss)):
                raise FloatingPointError(f"Expected a finite loss, got {loss.item()}.")
        except FloatingPointError as error:
            where = f"This was in epoch {self.current_epoch}, batch {batch_idx}."
            raise FloatingPointError(f"{error} {where} {self.divergence_advice}") from error
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=self.rows(batch), sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        """Return optimizer and schedule of this stage; the schedule moves on with every batch."""
        of_all_stages = self.trainer.max_epochs or 1
        epochs = of_all_stages if self.stage.epochs is None else self.stage.epochs
        steps = int(self.trainer.estimated_stepping_batches) * epochs // of_all_stages
        return optimization(self.param_groups(), self.optimizer_settings, steps=steps, epochs=epochs)

    def configure_callbacks(self) -> list[Callback]:
        """Return the moving average of weights, where it is asked for."""
        return [] if self.ema is None else [MovingAverage(decay=self.ema)]

    # ---------------------------------------------------------------- evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        self.update_metrics(self.metrics["val"], self.run(batch), batch, "val")

    def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add a batch to the metrics of its test split, and time the forward pass alone."""
        split = self._data().test_splits[dataloader_idx]
        start = time.perf_counter()
        outputs = self.run(batch)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.test_seconds += time.perf_counter() - start
        self.test_images += self.rows(batch)
        self.update_metrics(self.metrics[split], outputs, batch, split)

    def require_finite(self, outputs: Tensor, split: str) -> None:
        """Raise when the outputs for images of a split are not finite: metrics of them would look like numbers.

        Raises:
            FloatingPointError: Says what to do.
        """
        if not bool(torch.isfinite(outputs).all()):
            raise FloatingPointError(
                f"Expected finite outputs for the {split} images, got others. {self.divergence_advice}"
            )

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val", "val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of every test split."""
        for split in self._data().test_splits:
            self._log_metrics(split, "test" if split == "test" else f"test_{split}")

    def _log_metrics(self, split: str, prefix: str) -> None:
        metric = cast(Metric, self.metrics[split])
        values = metric.compute()
        metric.reset()
        if "per_class" in values:
            self.per_class[split] = values.pop("per_class").reshape(-1).tolist()  # of one class it is a scalar
        # The same on every rank; averaging them changes nothing, and Lightning asks for it.
        named = {f"{prefix}_{name}": value.float().to(self.device) for name, value in values.items()}
        self.log_dict(named, sync_dist=True)

    def class_results(self) -> list[ClassResult]:
        """Return each class of the first test split after the test; its value is NaN where nothing was measured."""
        unknown = [float("nan")] * len(self.facts.classes)
        values = self.per_class.get(self._data().test_splits[0], unknown)
        return [ClassResult(*row) for row in zip(self.facts.classes, self.facts.counts, values, strict=True)]

    # ---------------------------------------------------------------- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what it takes to build the plain network again, in plain types that load weights-only."""
        entry = {"stage": self.stage.name, "settings": self.settings(), "facts": asdict(self.facts)}
        checkpoint[self.checkpoint.task] = entry | ({"data": self.fingerprints} if self.fingerprints else {})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with other data, since the rest of the run would not belong to its beginning.

        A test on other data of the same classes is not refused: it warns that its numbers belong to other data.
        Checkpoints without fingerprints are compared by classes and counts alone.

        Raises:
            ValueError: When the fingerprint of a split, the classes or their counts differ from those that the run was
                started with; says which.
        """
        entry = self.checkpoint.entry(checkpoint)
        before, now = self.checkpoint.facts.read(entry["facts"]), cast(DataFacts, self.facts)
        splits = changed_splits(entry.get("data") or {}, self.fingerprints)
        if splits and before.classes == now.classes and self.trainer.state.fn == TrainerFn.TESTING:
            warnings.warn(
                f"This is not the data that the run was trained on: {in_words(splits)}. The results belong to the data "
                "that is there now; they cannot be compared with those of the run.",
                stacklevel=2,
            )
            return
        others = {"classes": "classes", "counts": f"{self.class_count} of each class"}
        facts = [f"the {what} have changed" for name, what in others.items() if _differ(name, before, now)]
        if splits or facts:
            changed = ", and ".join(([in_words(splits)] if splits else []) + facts[:1])
            raise ValueError(
                f"Expected the data that this run was trained on, but {changed}. Bring that data back, or start "
                "another run."
            )


def _differ(name: str, before: DataFacts, now: DataFacts) -> bool:
    return bool(getattr(before, name) != getattr(now, name))
