"""Recipe settings that detection and panoptic segmentation share, and the published values of each detector."""

from dataclasses import dataclass, field
from typing import Any, Literal

from .backbone import BackboneSettings
from .matching import Kind

__all__ = ["KINDS", "PUBLISHED", "Detector", "DetectorSettings", "SetLossSettings"]

Detector = Literal["detr", "conditional_detr", "deformable_detr", "smca"]

KINDS: dict[str, Kind] = {
    "detr": "softmax",
    "conditional_detr": "focal",
    "deformable_detr": "focal",
    "smca": "focal",
}
"""Detector -> rule by which its logits become scores, as published: see :class:`.matching.MatchCosts`."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "detr": {"num_queries": 100, "ffn_dim": 2048, "feature_levels": 1},
    "conditional_detr": {"num_queries": 300, "ffn_dim": 2048, "feature_levels": 1},
    "deformable_detr": {"num_queries": 300, "ffn_dim": 1024, "feature_levels": 4},
    "smca": {"num_queries": 300, "ffn_dim": None, "feature_levels": 1},
}
"""Detector -> values of the settings that are ``None``; a ``None`` here leaves the value to the configuration class."""


@dataclass
class DetectorSettings:
    """The detector; ``None`` stands for the value that was published with it.

    Attributes:
        detector: Name of the detector.
        backbone: Network that computes the detector's feature maps.
        d_model: Width of the transformer.
        encoder_layers: Number of encoder layers.
        decoder_layers: Number of decoder layers.
        num_heads: Number of heads of every attention in the transformer.
        ffn_dim: Width of the transformer's feed-forward layers.
        num_queries: Largest number of objects that the detector can find in an image.
        dropout: Dropout rate in the transformer, in 0..1.
        checkpointing: Whether the backward pass computes activations again: less memory, more time, the same numbers.
    """

    detector: Detector = "detr"
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    d_model: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_heads: int = 8
    ffn_dim: int | None = None
    num_queries: int | None = None
    dropout: float = 0.1
    checkpointing: bool = False


@dataclass
class SetLossSettings:
    """The loss of every decoder layer.

    Attributes:
        class_weight: Weight of the class term; ``None`` is the published one, 1 for DETR and 2 for the other detectors.
        l1_weight: Weight of the L1 distance of the boxes.
        giou_weight: Weight of 1 minus the generalised IoU of the boxes.
        no_object_weight: Weight of the class "no object" in DETR's cross-entropy.
        alpha: Weight of a hit in the focal loss of the other detectors, in 0..1.
        gamma: Exponent of the focal loss, at least 0.
    """

    class_weight: float | None = None
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    no_object_weight: float = 0.1
    alpha: float = 0.25
    gamma: float = 2.0
