"""One long-tailed run: data, network, plug-in, loss and metrics, wired for Lightning's Trainer."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from batchformer.data.samplers import derive_seed
from batchformer.insertion import Handle, param_groups
from batchformer.tasks.image_classification.network import ImageClassifier
from batchformer.tasks.training.averaging import MovingAverage
from batchformer.tasks.training.contract import ClassResult
from batchformer.tasks.training.schedule import DIVERGED, optimization
from batchformer.tasks.training.settings import BatchFormerSettings, OptimizerSettings, insert_plug_in

from .criterion import Criterion, RIDELoss, build_loss
from .loss_ride import routing
from .metrics import LongTailMetrics
from .paco import PaCoOutput
from .restore import DataFacts, build_network, load_network, second_stage
from .ride import RIDE, RoutedExperts, RoutedOutput, RoutingOutput
from .settings import LossSettings, NetworkSettings, StageSettings


class LongTailTask(LightningModule):
    """Train a network on long-tailed data, plain or with BatchFormer; test the plain network.

    The network is built in ``setup()``, when the data has said how many classes there are. It is the same for all arms
    of a comparison with one seed: the module comes after it and draws its weights apart.

    Args:
        network: The network.
        loss: The loss.
        batchformer: The module and the arm.
        optimizer: Optimizer and schedule.
        stage: Second stage and teacher.
        ema: Decay of an exponential moving average of the weights, which is then what is tested; ``None`` for none.
        channels_last: Memory format of convolutions; ``None``: with bf16.
        compile: Whether the network runs through ``torch.compile``.
        seed: Of initial weights and dropout.

    Raises:
        ValueError: From ``setup()``, for settings that do not go together.
    """

    primary: ClassVar[str] = "top1"
    class_metric: ClassVar[str] = "accuracy"
    class_count: ClassVar[str] = "training images"

    def __init__(
        self,
        network: NetworkSettings = NetworkSettings(),  # noqa: B008  # jsonargparse reads defaults off the signature
        loss: LossSettings = LossSettings(),  # noqa: B008
        batchformer: BatchFormerSettings = BatchFormerSettings(),  # noqa: B008
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008
        stage: StageSettings = StageSettings(),  # noqa: B008
        ema: float | None = None,
        channels_last: bool | None = None,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network_settings, self.loss_settings, self.plug_in = network, loss, batchformer
        self.optimizer_settings, self.stage, self.ema = optimizer, stage, ema
        self.channels_last, self.compiles, self.seed = channels_last, compile, seed
        self.network: nn.Module | None = None
        self.handle: Handle | None = None
        self.facts: DataFacts | None = None
        self.test_seconds, self.test_images = 0.0, 0

    # ---------------------------------------------------------------- building

    def setup(self, stage: str) -> None:
        """Build the network for the data at hand, once."""
        if self.network is not None:
            return
        self.facts = DataFacts.of(self.trainer.datamodule)  # type: ignore[attr-defined]
        self._check()
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            if self.stage.second is not None:
                first = load_network(cast(str, self.stage.start_from))
                self.network_settings = first.settings
                self.network = second_stage(first.network.train(), self.stage.second, self.stage.tau)
            else:
                self.network = build_network(self.network_settings, self.facts)
                torch.manual_seed(derive_seed(self.seed, 1))
                self.handle = self._insert(self.network)
        if self.channels_last or (self.channels_last is None and "bf16" in str(self.trainer.precision)):
            self.network.to(memory_format=torch.channels_last)
        if self.compiles:
            self.network.compile()  # in place: the names in a checkpoint stay
        counts = torch.tensor(self.facts.counts)
        self.criterion: Criterion = build_loss(self.loss_settings.name, counts, **self.loss_settings.settings)
        # In a list, so that the teacher is no part of this module: neither trained nor saved.
        self.teachers = self._load_teachers()
        groups = self.facts.groups
        self.metrics = nn.ModuleDict({s: LongTailMetrics(len(counts), groups) for s in ("val", "test")})

    def _check(self) -> None:
        kind, loss, stage = self.network_settings.kind, self.loss_settings.name, self.stage
        if (loss == "paco") != (kind == "paco"):
            raise ValueError(f"Expected loss and network kind 'paco' together, got loss {loss!r} and kind {kind!r}.")
        if loss == "ride" and kind != "ride":
            raise ValueError(f"Expected network kind 'ride' for the RIDE loss, got {kind!r}.")
        if stage.second is not None and stage.start_from is None:
            raise ValueError(f"Expected stage.start_from=RUN, the first stage's run folder, for {stage.second!r}.")
        if stage.teacher is not None and loss != "ride":
            raise ValueError(f"Expected the RIDE loss for distillation from a teacher, got {loss!r}.")

    def _insert(self, network: ImageClassifier) -> Handle | None:
        heads = network.num_heads if isinstance(network, RIDE) else 4
        return insert_plug_in(network, self.plug_in, num_heads=heads)

    def _load_teachers(self) -> list[nn.Module]:
        if self.stage.teacher is None:
            return []
        return [load_network(self.stage.teacher).network.requires_grad_(False)]

    # ---------------------------------------------------------------- steps

    def forward(self, *inputs: Any) -> Any:
        """What the network returns."""
        return cast(nn.Module, self.network)(*inputs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make dropout a function of (seed, epoch, batch): a resumed run draws what an uninterrupted one drew."""
        torch.manual_seed(derive_seed(self.seed, 2, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean of both streams' losses (or the one stream's)."""
        images, targets = batch
        if isinstance(images, list | tuple):
            images, second = (self._format(view) for view in images)
            loss = self._loss(self(images, second, targets), targets, images)
        else:
            images = self._format(images)
            loss = self._loss(self(images), targets, images)
        if not bool(torch.isfinite(loss)):
            raise FloatingPointError(
                f"Expected a finite loss, got {loss.item()} in epoch {self.current_epoch}, batch {batch_idx}. "
                f"{DIVERGED}"
            )
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(targets), sync_dist=True)
        return loss

    def _loss(self, outputs: Any, targets: Tensor, images: Tensor) -> Tensor:
        if isinstance(outputs, RoutingOutput):
            return routing(outputs.help_logits, outputs.logits, targets)
        extra: dict[str, Any] = {}
        if isinstance(self.criterion, RIDELoss):
            for teacher in self.teachers:
                with torch.no_grad():
                    extra["teacher_logits"] = teacher.to(self.device)(images)

        def criterion(rows: Any, rows_targets: Tensor) -> Tensor:
            return cast(Tensor, self.criterion(rows, rows_targets, self.current_epoch, **extra))

        if self.handle is None:
            return criterion(outputs, targets)
        weights = self.plug_in.stream_weights
        if isinstance(outputs, PaCoOutput):
            # The queries and logits have both streams, the keys only one.
            return self.handle.loss(
                lambda anchors, rows: criterion(outputs.with_anchors(*anchors), rows), outputs.anchors, targets, weights
            )
        return self.handle.loss(criterion, outputs, targets, weights)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Update the test metrics and the time for each image."""
        start = time.perf_counter()
        self._evaluate(batch, "test")
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.test_seconds += time.perf_counter() - start
        self.test_images += len(batch[1])

    def _evaluate(self, batch: Any, split: str) -> None:
        images, targets = batch
        outputs = self(self._format(images))
        if isinstance(outputs, RoutedOutput):
            share = outputs.experts_used / len(cast(RoutedExperts, self.network).network.experts)
            self.log(f"{split}_share_of_experts_used", share, batch_size=len(targets), sync_dist=True)
            outputs = outputs.logits
        logits = outputs.mean(dim=1) if outputs.dim() == 3 else outputs
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError(f"Expected finite logits of the {split} images, got others. {DIVERGED}")
        self.metrics[split].update(logits, targets)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics and keep the accuracy of each class."""
        self._log_metrics("test")

    def _log_metrics(self, split: str) -> None:
        metric = cast(LongTailMetrics, self.metrics[split])
        values = metric.compute()
        metric.reset()
        self.per_class = values.pop("per_class").tolist()
        # The same on every rank; averaging them changes nothing, and Lightning asks for it.
        self.log_dict({f"{split}_{name}": value.float() for name, value in values.items()}, sync_dist=True)

    def class_results(self) -> list[ClassResult]:
        """The accuracy of each class."""
        facts = cast(DataFacts, self.facts)
        return [ClassResult(*entry) for entry in zip(facts.classes, facts.counts, self.per_class, strict=True)]

    def notes(self) -> list[str]:
        """Which classes count as many, medium and few."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        return [
            f"Many: classes with more than {data.many_over} training images; few: with fewer than {data.few_under}; "
            "medium: the others. Each group's value is the mean over its classes."
        ]

    @staticmethod
    def not_comparable(setting: Callable[[str], Any]) -> str | None:
        """A second stage has no arms."""
        if setting("model.stage.second") is None:
            return None
        return "a second stage trains no BatchFormer, so that all arms are alike"

    def _format(self, images: Tensor) -> Tensor:
        if self.channels_last or (self.channels_last is None and "bf16" in str(self.trainer.precision)):
            return images.contiguous(memory_format=torch.channels_last)
        return images

    # ---------------------------------------------------------------- optimization

    def configure_optimizers(self) -> Any:
        """SGD or AdamW with the module's own multipliers; the schedule steps with every batch."""
        settings = self.optimizer_settings
        own = self.handle is not None
        groups = param_groups(
            cast(nn.Module, self.network),
            settings.lr,
            batchformer_lr_mult=self.plug_in.lr_mult if own else 1.0,
            weight_decay=settings.weight_decay,
            batchformer_weight_decay_mult=self.plug_in.weight_decay_mult if own else 1.0,
            decay_norm_and_bias=settings.decay_norm_and_bias,
        )
        return optimization(groups, settings, self.trainer)

    def configure_callbacks(self) -> list[Callback]:
        """The moving average, where it is asked for."""
        return [] if self.ema is None else [MovingAverage(decay=self.ema)]

    # ---------------------------------------------------------------- saving

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what it takes to build the plain network again: plain types, loadable weights-only."""
        checkpoint["longtail"] = {
            "network": asdict(self.network_settings),
            "second": self.stage.second,
            "data": asdict(cast(DataFacts, self.facts)),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with other data: the rest of a run would not be that run.

        Raises:
            ValueError: When classes or counts differ from those that the run was started with.
        """
        before, now = checkpoint["longtail"]["data"], asdict(cast(DataFacts, self.facts))
        for key, what in (("classes", "classes"), ("counts", "training images of each class")):
            if before[key] != now[key]:
                raise ValueError(
                    f"Expected the data that this run was trained on, but the {what} have changed. Bring it back, or "
                    "start another run."
                )
