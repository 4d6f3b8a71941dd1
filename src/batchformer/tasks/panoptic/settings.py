"""The settings of a panoptic run, as recipes spell them."""

from dataclasses import dataclass, field
from typing import Literal

from batchformer.tasks.set_prediction.backbone import BackboneSettings
from batchformer.tasks.set_prediction.matching import Kind

Detector = Literal["detr", "conditional_detr"]
KINDS: dict[str, Kind] = {"detr": "softmax", "conditional_detr": "focal"}
"""How each detector's logits become scores, as published."""


@dataclass
class NetworkSettings:
    """The network: a detector, and DETR's mask head.

    Attributes:
        detector: Which one. Panoptic segmentation was published with ``detr``; ``conditional_detr`` was published to
            converge 6.7 to 10 times as fast.
        backbone: Its maps; four of them, finest first. The detector takes the last, the mask head all.
        d_model: Width of the transformer, a multiple of 16.
        encoder_layers: Of the transformer.
        decoder_layers: Of the transformer.
        num_heads: Of all attention in it; ``d_model + num_heads`` is a multiple of 8.
        ffn_dim: Width of its feed-forward parts.
        num_queries: The most segments of an image.
        dropout: In the transformer.
        checkpointing: Gradient checkpointing: less memory, more time, the same numbers.
    """

    detector: Detector = "detr"
    backbone: BackboneSettings = field(default_factory=lambda: BackboneSettings(strides=[4, 8, 16, 32]))
    d_model: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_heads: int = 8
    ffn_dim: int = 2048
    num_queries: int = 100
    dropout: float = 0.1
    checkpointing: bool = False


@dataclass
class LossSettings:
    """Weights of the loss; the matching has the same for class and boxes.

    Attributes:
        class_weight: Of the class term; ``None`` is 1 for DETR and 2 for Conditional DETR, as published.
        l1_weight: Of the boxes' distance.
        giou_weight: Of the boxes' overlap.
        no_object_weight: Of "no object" in the cross-entropy (DETR).
        alpha: Of the focal loss (Conditional DETR).
        gamma: Of the focal loss.
        mask_weight: Of the masks' focal loss.
        dice_weight: Of their dice loss.
    """

    class_weight: float | None = None
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    no_object_weight: float = 0.1
    alpha: float = 0.25
    gamma: float = 2.0
    mask_weight: float = 1.0
    dice_weight: float = 1.0


@dataclass
class StageSettings:
    """The detector, the mask head on the frozen detector, or one after the other in one run.

    Attributes:
        name: ``detector``, ``masks``, or ``both``.
        detector_epochs: Of ``both``: so many of ``trainer.max_epochs`` go to the detector, the rest to the mask head.
        start_from: Of ``masks``: run folder or checkpoint of the detector.
        batchformer: Whether the module, frozen with the detector, stays in place while the mask head learns: then the
            mask head sees both streams.
        start: The mask head's initial weights: as ``published``, for hundreds of thousands of steps, or ``balanced`` on
            the first batch, for hundreds: see `balance`.
        lr: Of the mask head.
        milestones: Of the mask head, with the schedule ``step``: epochs from its start at which the rate falls.
    """

    name: Literal["both", "detector", "masks"] = "both"
    detector_epochs: int = 1
    start_from: str | None = None
    batchformer: bool = True
    start: Literal["published", "balanced"] = "balanced"
    lr: float = 1e-4
    milestones: list[int] = field(default_factory=list)


@dataclass
class PostprocessSettings:
    """From queries to a panoptic map.

    Attributes:
        threshold: Least confidence of a query, in 0..1.
        smallest: Segments of so many pixels or fewer are dropped.
    """

    threshold: float = 0.85
    smallest: int = 4
