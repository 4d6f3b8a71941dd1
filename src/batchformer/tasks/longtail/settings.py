"""The settings of a long-tailed run, as recipes spell them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from batchformer.core import Arm


@dataclass
class NetworkSettings:
    """The network.

    Attributes:
        backbone: ``small_resnet``, ``resnet32``, ``resnet10``, ``resnet50``, ``resnext50``, ``resnet152`` or any timm
            name.
        kind: One classifier, RIDE's experts, or PaCo's two encoders.
        cosine: Cosine classifier; ``None`` takes the kind's own.
        pretrained: Start from timm's ImageNet weights.
        experts: Of RIDE.
        reduced: RIDE's reduced width.
        train_only: Parts that train, by the beginning of their names (``["backbone.layer4", "classifier"]``); the rest
            keeps its weights, as usual on Places-LT. Empty: all of it trains. BatchFormer always does.
        settings: More arguments of the network (PaCo: ``queue_size``, ``momentum``, ``embed_dim``; else timm's).
    """

    backbone: str = "small_resnet"
    kind: Literal["plain", "ride", "paco"] = "plain"
    cosine: bool | None = None
    pretrained: bool = False
    experts: int = 3
    reduced: bool = True
    train_only: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class LossSettings:
    """The loss.

    Attributes:
        name: Which one.
        settings: Its arguments, for example ``reweight_epoch``; an unknown one is refused with the list of known ones.
    """

    name: Literal["cross_entropy", "balanced_softmax", "class_balanced", "logit_adjusted", "ldam", "ride", "paco"] = (
        "balanced_softmax"
    )
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass
class BatchFormerSettings:
    """The module, and which arm of a comparison this run is.

    Attributes:
        arm: ``plain``, ``batchformer`` or a control.
        before: In front of which module; ``auto`` is the classifier.
        after: Behind which module, instead of ``before`` (BatchFormerV2: ``backbone.blocks.8``).
        num_heads: ``None`` is 4, or RIDE's rule (4 above 128 channels, else 1).
        mlp_ratio: Width of the feed-forward part over the channels.
        drop: Dropout.
        layers: Encoder layers.
        mode: Two streams, or the mixed one alone (as RIDE on ImageNet-LT and iNaturalist was published).
        gather: ``all`` attends over the batches of all ranks.
        layout: Of maps; ``None`` for features and tokens.
        share: One set of weights for several places.
        lr_mult: The module's learning rate over the network's.
        weight_decay_mult: The module's weight decay over the network's.
        stream_weights: Of the plain and the mixed stream's loss.
    """

    arm: Arm = "batchformer"
    before: str | list[str] | None = "auto"
    after: str | list[str] | None = None
    num_heads: int | None = None
    mlp_ratio: float = 1.0
    drop: float = 0.5
    layers: int = 1
    mode: Literal["two_stream", "single_stream"] = "two_stream"
    gather: Literal["none", "all"] = "none"
    layout: Literal["BCHW", "BHWC"] | None = None
    share: bool = True
    lr_mult: float = 1.0
    weight_decay_mult: float = 1.0
    stream_weights: tuple[float, float] = (1.0, 1.0)


@dataclass
class OptimizerSettings:
    """Optimizer and schedule.

    Attributes:
        name: SGD or AdamW.
        lr: Peak learning rate.
        momentum: Of SGD.
        nesterov: Of SGD.
        weight_decay: Of the network.
        decay_norm_and_bias: Whether norms and biases decay too.
        schedule: After the warm-up: cosine to zero, times ``gamma`` at each milestone, or constant.
        milestones: Epochs of ``step``.
        gamma: Factor of ``step``.
        warmup_epochs: Linear warm-up.
        warmup_start: Learning rate at its first step, as a fraction of the peak.
        per_epoch: Change the learning rate at the start of epochs only (as some published code does).
    """

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    decay_norm_and_bias: bool = True
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    warmup_start: float = 0.0
    per_epoch: bool = False


@dataclass
class StageSettings:
    """A second stage on a trained network, or a teacher for the first.

    Attributes:
        second: ``crt`` (new classifier on frozen features), ``lws`` (learned scale for each class), ``tau`` (weights
            over their norm to the power tau, no training) or ``routing`` (RIDE's expert assignment).
        start_from: Run folder of the first stage; needed by every second stage.
        tau: Of ``tau``, in [0, 1] as a rule.
        teacher: Run folder of the network to distil from (RIDE).
    """

    second: Literal["crt", "lws", "tau", "routing"] | None = None
    start_from: str | None = None
    tau: float = 1.0
    teacher: str | None = None
