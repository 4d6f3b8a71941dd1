"""Settings of a long-tailed run, as recipes spell them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from batchformer.tasks.training.contract import Stage


@dataclass
class NetworkSettings:
    """Settings of the network.

    Attributes:
        backbone: ``small_resnet``, ``resnet32``, ``resnet10``, ``resnet50``, ``resnext50``, ``resnet152`` or any name
            that timm knows.
        kind: ``plain``: one classifier. ``ride``: RIDE's experts. ``paco``: PaCo's two encoders.
        cosine: Whether the classifiers are cosine classifiers; ``None`` takes the kind's own.
        pretrained: Whether training starts from timm's ImageNet weights.
        experts: Number of RIDE's experts, at least 1.
        reduced: Whether RIDE's experts have their stages at reduced width.
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
    """Settings of the loss.

    Attributes:
        name: Name of the loss.
        settings: Arguments of the loss, for example ``reweight_epoch``; an unknown one is refused with the list of
            known ones.
    """

    name: Literal["cross_entropy", "balanced_softmax", "class_balanced", "logit_adjusted", "ldam", "ride", "paco"] = (
        "balanced_softmax"
    )
    settings: dict[str, Any] = field(default_factory=dict)


def refuse_mismatch(network: NetworkSettings, loss: LossSettings, stage: Stage, teacher: str | None) -> None:
    """Refuse settings that do not go together.

    Args:
        network: Settings of the network.
        loss: Settings of the loss.
        stage: Stage of the run, and the checkpoint that it starts from.
        teacher: Run folder of the network to distil from; ``None`` for none.

    Raises:
        ValueError: Says what was expected, what came and the way out.

    Example:
        >>> refuse_mismatch(NetworkSettings(kind="ride"), LossSettings("ride"), Stage("train"), teacher=None)
    """
    if stage.name != "train" and stage.start is None:
        raise ValueError(
            f"Expected a trained network for the stage {stage.name!r}. List the stage train before it, or start from "
            f"a run: --stages.{stage.name}.start_from=RUN."
        )
    if stage.name in ("crt", "lws") and loss.name == "paco":
        raise ValueError(
            f"Expected a loss of logits in the stage {stage.name!r}, which trains the classifier alone, got 'paco'. "
            f"Set --stages.{stage.name}.settings.model.loss.name=cross_entropy."
        )
    paco, ride = (loss.name == kind for kind in ("paco", "ride"))
    if stage.name == "train" and (paco != (network.kind == "paco") or (ride and network.kind != "ride")):
        raise ValueError(
            "Expected the loss 'paco' together with network kind 'paco', and the loss 'ride' with network kind 'ride' "
            f"alone, got loss {loss.name!r} and kind {network.kind!r}."
        )
    if teacher is not None and not ride:
        raise ValueError(f"Expected the RIDE loss for distillation from a teacher, got {loss.name!r}.")
