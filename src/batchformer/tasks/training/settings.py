"""Settings that the recipes of every task share."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from batchformer.insertion import Handle
from batchformer.tasks.training.arms import Arm, insert_arm


@dataclass
class BatchFormerSettings:
    """BatchFormer, where it goes, and which arm of a comparison this run is.

    Attributes:
        arm: ``plain``, ``batchformer`` or a control.
        before: Name or names of the modules whose input is mixed; ``auto`` is the classifier.
        after: Name or names of the modules whose output is mixed, in place of ``before`` (BatchFormerV2:
            ``backbone.blocks.8``, ``model.encoder.layers.0``).
        num_heads: Attention heads; ``None`` leaves them to the task: 4, and in RIDE 1 up to 128 channels.
        mlp_ratio: Width of the feed-forward part as a multiple of the channels, above 0.
        drop: Dropout probability in BatchFormer, in 0..1.
        layers: Number of encoder layers, at least 1.
        mode: ``two_stream``, or ``single_stream`` with the mixed stream alone (as RIDE on ImageNet-LT and iNaturalist
            was published).
        gather: ``all`` attends over the batches of all ranks, ``none`` over this rank's own.
        layout: Order of the axes of maps; ``None`` for features and tokens.
        share: Whether several points of insertion use one set of weights.
        lr_mult: Learning rate of BatchFormer as a multiple of the network's, at least 0.
        weight_decay_mult: Weight decay of BatchFormer as a multiple of the network's, at least 0.
        stream_weights: Weights of the plain and the mixed stream's loss.
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


def insert_from_settings(network: nn.Module, settings: BatchFormerSettings, *, num_heads: int = 4) -> Handle | None:
    """Insert BatchFormer, or the control that the arm asks for, into a network.

    Args:
        network: Network, changed in place.
        settings: Settings of BatchFormer and the arm.
        num_heads: Attention heads where the settings leave them open.

    Returns:
        The handle; ``None`` for the plain arm.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> insert_from_settings(network, BatchFormerSettings(drop=0.1)).modules[0].num_heads
        4
    """
    place: dict[str, Any] = {"before": settings.before} if settings.after is None else {"after": settings.after}
    names = ("mlp_ratio", "drop", "layers", "mode", "gather", "share")
    layer = {name: getattr(settings, name) for name in names}
    if settings.layout is not None:
        layer["layout"] = settings.layout
    return insert_arm(network, settings.arm, num_heads=settings.num_heads or num_heads, **place, **layer)


@dataclass
class OptimizerSettings:
    """Optimizer and schedule.

    Attributes:
        name: SGD or AdamW.
        lr: Peak learning rate of the network, at least 0.
        momentum: Momentum of SGD, in 0..1.
        nesterov: Whether SGD uses Nesterov's momentum.
        weight_decay: Weight decay of the network, at least 0.
        decay_norm_and_bias: Whether norms and biases decay too.
        schedule: Learning rate after the warm-up: ``cosine`` to zero, ``step`` times ``gamma`` at each milestone, or
            ``constant``.
        milestones: Epochs at which ``step`` lowers the learning rate.
        gamma: Factor of ``step``.
        warmup_epochs: Epochs of linear warm-up.
        warmup_start: Learning rate at the first step of the warm-up, as a fraction of the peak.
        per_epoch: Whether the learning rate changes at the start of epochs only, as in some published code.
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
