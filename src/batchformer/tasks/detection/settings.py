"""The settings of a detection run, as recipes spell them."""

from dataclasses import dataclass, field
from typing import Any, Literal

from batchformer.tasks.set_prediction.backbone import BackboneSettings

Detector = Literal["detr", "conditional_detr", "deformable_detr", "smca"]


@dataclass
class NetworkSettings:
    """The detector. What is ``None`` is as it was published with that detector.

    Attributes:
        detector: Which one.
        backbone: The network in front of it.
        d_model: Width of the transformer.
        encoder_layers: Of the transformer.
        decoder_layers: Of the transformer.
        num_heads: Of all attention in it.
        ffn_dim: Width of its feed-forward parts: 2048, Deformable DETR and multi-scale SMCA 1024.
        num_queries: The most objects of an image: 100 for DETR, 300 for the others.
        dropout: In the transformer.
        feature_levels: Maps that Deformable DETR (4) and SMCA (1) attend over; what the backbone does not give is made
            by convolutions of stride 2.
        with_box_refine: Deformable DETR: each decoder layer refines the boxes of the one before.
        two_stage: Deformable DETR: the encoder proposes the boxes that the decoder starts from.
        prior_scale: SMCA: extent of the Gaussian.
        prior_heads: SMCA: a Gaussian of its own for each head, or one for all.
        checkpointing: Gradient checkpointing: less memory, more time, the same numbers.
    """

    detector: Detector = "conditional_detr"
    backbone: BackboneSettings = field(default_factory=BackboneSettings)
    d_model: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_heads: int = 8
    ffn_dim: int | None = None
    num_queries: int | None = None
    dropout: float = 0.1
    feature_levels: int | None = None
    with_box_refine: bool = False
    two_stage: bool = False
    prior_scale: Literal["fixed", "single", "width_height"] = "width_height"
    prior_heads: Literal["independent", "shared"] = "independent"
    checkpointing: bool = False


@dataclass
class LossSettings:
    """The loss of every decoder layer. What is ``None`` is as it was published with the detector.

    Attributes:
        class_weight: Of the class term: 1 with DETR's softmax, 2 with the others' focal loss.
        l1_weight: Of the boxes' distance.
        giou_weight: Of the boxes' overlap.
        no_object_weight: Of "no object" in DETR's softmax.
        class_cost: Of the class in the matching: 1 for DETR, 2 for the others.
        l1_cost: Of the boxes' distance in the matching.
        giou_cost: Of the boxes' overlap in the matching.
        alpha: Of the focal loss.
        gamma: Of the focal loss.
    """

    class_weight: float | None = None
    l1_weight: float = 5.0
    giou_weight: float = 2.0
    no_object_weight: float = 0.1
    class_cost: float | None = None
    l1_cost: float = 5.0
    giou_cost: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0


PUBLISHED: dict[str, dict[str, Any]] = {
    "detr": {"num_queries": 100, "ffn_dim": 2048, "feature_levels": 1, "kind": "softmax"},
    "conditional_detr": {"num_queries": 300, "ffn_dim": 2048, "feature_levels": 1, "kind": "focal"},
    "deformable_detr": {"num_queries": 300, "ffn_dim": 1024, "feature_levels": 4, "kind": "focal"},
    "smca": {"num_queries": 300, "ffn_dim": None, "feature_levels": 1, "kind": "focal"},
}
"""What the detectors differ in where a setting is ``None``; ``None`` here: the configuration class decides."""


def published(detector: Detector, name: str, given: Any) -> Any:
    """A setting, or the detector's own where it is ``None``.

    Example:
        >>> published("detr", "num_queries", None), published("detr", "num_queries", 30)
        (100, 30)
    """
    return PUBLISHED[detector][name] if given is None else given
