"""The settings of a detection run, as recipes spell them."""

from dataclasses import dataclass
from typing import Literal

from batchformer.tasks.set_prediction.settings import Detector, DetectorSettings, SetLossSettings

__all__ = ["LossSettings", "NetworkSettings"]


@dataclass
class NetworkSettings(DetectorSettings):
    """The detector; ``None`` stands for the value that was published with it.

    Attributes:
        detector: Name of the detector.
        feature_levels: Number of maps that Deformable DETR (as published 4) and SMCA (1) attend over. Convolutions of
            stride 2 make the maps that the backbone does not give.
        with_box_refine: Whether each decoder layer of Deformable DETR refines the boxes of the layer before it.
        two_stage: Whether the encoder of Deformable DETR proposes the boxes that its decoder starts from.
        prior_scale: Extent of SMCA's Gaussian: one cell, one number that SMCA predicts, or one for each axis.
        prior_heads: Whether each head of SMCA has a Gaussian of its own, or all share one.
    """

    detector: Detector = "conditional_detr"
    feature_levels: int | None = None
    with_box_refine: bool = False
    two_stage: bool = False
    prior_scale: Literal["fixed", "single", "width_height"] = "width_height"
    prior_heads: Literal["independent", "shared"] = "independent"


@dataclass
class LossSettings(SetLossSettings):
    """The loss of every decoder layer, and the costs of the matching.

    Attributes:
        class_cost: Weight of the class in the matching; ``None`` is the published one, 1 for DETR and 2 for the other
            detectors.
        l1_cost: Weight of the L1 distance of the boxes in the matching.
        giou_cost: Weight of the generalised IoU of the boxes in the matching.
    """

    class_cost: float | None = None
    l1_cost: float = 5.0
    giou_cost: float = 2.0
