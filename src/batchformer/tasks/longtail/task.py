"""The task of long-tailed recognition: its settings, stages, losses and metrics on the base of every task."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from batchformer.insertion import Handle
from batchformer.tasks.training.settings import BatchFormerSettings, OptimizerSettings, insert_from_settings
from batchformer.tasks.training.task import Task

from .criterion import build_loss, loss_of_streams
from .data import LongTailData
from .loss_ride import routing
from .metrics import MEASURES, LongTailMetrics, RoutedMetrics
from .model import build_network, build_stage, final_logits
from .older_versions import translate_settings
from .paco import PaCo
from .restore import FORMAT, load_network
from .ride import RIDE, RoutedOutput, RoutingOutput
from .settings import LossSettings, NetworkSettings, refuse_mismatch


class LongTailTask(Task):
    """Train a classifier on long-tailed data, plain or with BatchFormer; test the plain classifier.

    Args:
        network: Settings of the network.
        loss: Settings of the loss.
        batchformer: Settings of BatchFormer and the arm.
        optimizer: Settings of optimizer and schedule.
        tau: Exponent of the stage ``tau``, in [0, 1] as a rule: 0 keeps the lengths of the classes' weights, 1 makes
            them equal.
        teacher: Run folder of the network to distil from (RIDE); ``None`` for none.
        ema: Decay of an exponential moving average of the weights, which is then what is tested; ``None`` for none.
        channels_last: Whether images lie in memory with channels last; ``None`` means only with bf16.
        compile: Whether the network runs through ``torch.compile``.
        seed: Seed of initial weights and dropout.

    Raises:
        ValueError: From ``setup()``, for settings that do not go together.
    """

    checkpoint, data_type, measures = FORMAT, LongTailData, MEASURES
    primary, class_metric = "top1", "accuracy"
    stages = {
        "train": "The network is trained, with BatchFormer in it.",
        "crt": "A new classifier is trained on the frozen features of the stage before (cRT).",
        "lws": "One factor for each class is trained on the frozen classifier of the stage before (LWS).",
        "tau": "Each class's weights are divided by their length to the power model.tau; nothing is trained.",
        "routing": "Routers are trained that ask for as many of RIDE's experts as an image needs.",
    }

    follows = dict.fromkeys(("crt", "lws", "tau", "routing"), "train")

    def __init__(
        self,
        network: NetworkSettings = NetworkSettings(),  # noqa: B008  # jsonargparse reads defaults off the signature
        loss: LossSettings = LossSettings(),  # noqa: B008
        batchformer: BatchFormerSettings = BatchFormerSettings(),  # noqa: B008
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008
        tau: float = 1.0,
        teacher: str | None = None,
        ema: float | None = None,
        channels_last: bool | None = None,
        compile: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batchformer, optimizer, ema=ema, channels_last=channels_last, compile=compile, seed=seed)
        self.network_settings, self.loss_settings, self.tau, self.teacher = network, loss, tau, teacher

    def check(self) -> None:
        """Refuse a loss that the network or the stage has no outputs for, and a stage without a start."""
        refuse_mismatch(self.network_settings, self.loss_settings, self.stage, self.teacher)

    def build_network(self) -> Any:
        """Build the network from the settings, or out of that of the stage before."""
        if self.stage.name == "train":
            return build_network(self.network_settings, len(self.facts.classes), self.facts.in_channels)
        before = load_network(self.stage.start)  # type: ignore[arg-type]  # check() refuses None
        self.network_settings, network = before.settings, before.network.train()
        # Where the run to start from is gone, a run that goes on starts from its own checkpoint.
        return network if before.stage == self.stage.name else build_stage(network, self.stage.name, self.tau)

    def insert(self, network: nn.Module) -> Handle | None:
        """Put BatchFormer in front of the classifiers in the stage train; the others train none."""
        if self.stage.name != "train":
            return None
        heads = network.num_heads if isinstance(network, RIDE) else 4
        return insert_from_settings(network, self.batchformer, num_heads=heads)

    def prepare(self) -> None:
        """Make the loss, and load the teacher."""
        loss, counts = self.loss_settings, torch.tensor(self.facts.counts)
        self.criterion = build_loss(loss.name, counts, **loss.settings)
        teachers = [] if self.teacher is None else [load_network(self.teacher).network.requires_grad_(False)]
        self.teachers: list[nn.Module] = teachers  # a list: no part of this module, neither trained nor saved

    def run(self, batch: Any) -> Any:
        """Pass the images through the network, or both views and the targets, which PaCo needs in training."""
        images, targets = batch
        if not isinstance(images, list | tuple):
            return self.network(self.formatted(images))
        if not isinstance(self.network, PaCo):
            raise ValueError("Expected one view of each image, since PaCo alone takes two. Set data.two_views=false.")
        return self.network(*(self.formatted(view) for view in images), targets)

    def loss(self, outputs: Any, batch: Any) -> Tensor:
        """Return the weighted mean of both streams' losses, or the loss of the one stream."""
        images, targets = batch
        if isinstance(outputs, RoutingOutput):
            return routing(outputs.help_logits, outputs.logits, targets)
        more: dict[str, Tensor] = {}
        for teacher in self.teachers:
            with torch.no_grad():
                more["teacher_logits"] = teacher.to(self.device)(self.formatted(images))
        criterion = partial(self.criterion, epoch=self.stage_epoch, **more)
        return loss_of_streams(criterion, outputs, targets, self.handle, self.batchformer.stream_weights)

    def build_metrics(self, split: str) -> LongTailMetrics:
        """Return the metrics of a split; routed experts also count how many of them are asked."""
        metrics = RoutedMetrics if self.stage.name == "routing" else LongTailMetrics
        return metrics(len(self.facts.classes), self.facts.groups)

    def update_metrics(self, metric: Any, outputs: Any, batch: Any, split: str) -> None:
        """Add a batch of logits, the mean of several experts'."""
        logits = final_logits(outputs)
        self.require_finite(logits, split)
        routed = isinstance(outputs, RoutedOutput)
        metric.update(logits, batch[1], *([outputs.experts_used / len(self.network.network.experts)] if routed else []))

    def settings(self) -> dict[str, Any]:
        """Return the settings of the network."""
        return {"network": asdict(self.network_settings)}

    @classmethod
    def not_comparable(cls, setting: Callable[[str], Any]) -> str | None:
        """Return the reason why stages without the stage train cannot be compared."""
        names = [stage["name"] for stage in setting("stages") or ()]
        if not names or "train" in names:
            return None
        return f"BatchFormer is not trained in the stage {' or '.join(names)}, so every arm would be identical"

    @classmethod
    def translate_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return settings of an earlier version (``model.stage``) in today's terms."""
        return translate_settings(settings)
