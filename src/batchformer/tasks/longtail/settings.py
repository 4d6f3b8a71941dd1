"""The settings of a long-tailed run, as recipes spell them."""

from dataclasses import dataclass, field
from typing import Any, Literal


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
