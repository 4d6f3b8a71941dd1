"""Settings that recipes of every task spell alike."""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from batchformer.insertion import Handle
from batchformer.tasks.training.arms import Arm, insert_arm


@dataclass
class BatchFormerSettings:
    """The module, and which arm of a comparison this run is.

    Attributes:
        arm: ``plain``, ``batchformer`` or a control.
        before: In front of which module; ``auto`` is the classifier.
        after: Behind which module, instead of ``before`` (BatchFormerV2: ``backbone.blocks.8``,
            ``model.encoder.layers.0``).
        num_heads: ``None`` leaves it to the task: 4, or RIDE's rule (4 above 128 channels, else 1).
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


def insert_plug_in(network: nn.Module, settings: BatchFormerSettings, *, num_heads: int = 4) -> Handle | None:
    """Put into a network what the settings say.

    Args:
        network: Changed in place.
        settings: The module, its place and the arm.
        num_heads: Where the settings leave it open.

    Returns:
        The handle, ``None`` for the plain arm.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> insert_plug_in(network, BatchFormerSettings(drop=0.1)).modules[0].num_heads
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
