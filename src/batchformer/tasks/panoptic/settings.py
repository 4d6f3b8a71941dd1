"""The settings of a panoptic run, as recipes spell them."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from batchformer.tasks.set_prediction.backbone import BackboneSettings
from batchformer.tasks.set_prediction.settings import DetectorSettings, SetLossSettings

Detector = Literal["detr", "conditional_detr"]


@dataclass
class NetworkSettings(DetectorSettings):
    """The network: a detector, and later DETR's mask head on it.

    Attributes:
        detector: Name of the detector. Panoptic segmentation was published with ``detr``; ``conditional_detr`` was
            published to converge 6.7 to 10 times as fast.
        backbone: Network that computes four maps; the detector attends over the last, the mask head uses all.
        d_model: Width of the transformer, a multiple of 16.
        num_heads: Number of heads of every attention in the transformer; ``d_model + num_heads`` is a multiple of 8.
        ffn_dim: Width of the transformer's feed-forward layers.
        num_queries: Largest number of segments that the network can find in an image.
    """

    detector: Detector = "detr"
    backbone: BackboneSettings = field(default_factory=lambda: BackboneSettings(strides=[4, 8, 16, 32]))
    ffn_dim: int | None = 2048
    num_queries: int | None = 100


@dataclass
class LossSettings(SetLossSettings):
    """Weights of the loss; the matching uses those of class and boxes.

    Attributes:
        mask_weight: Weight of the focal loss of the masks.
        dice_weight: Weight of the dice loss of the masks.
    """

    mask_weight: float = 1.0
    dice_weight: float = 1.0


@dataclass
class MaskSettings:
    """The second stage, in which a mask head learns on the frozen detector of the first.

    Attributes:
        batchformer: Whether BatchFormer, frozen with the detector, stays in place while the mask head learns: then the
            mask head sees both streams.
        start: Initial weights of the mask head: ``published``, from which it learns in hundreds of thousands of steps,
            or ``balanced`` on the first batch, from which it learns in hundreds: see `balance`.
    """

    batchformer: bool = True
    start: Literal["published", "balanced"] = "balanced"


@dataclass
class PostprocessSettings:
    """The way from queries to a panoptic map.

    Attributes:
        threshold: Least confidence of a query, in 0..1.
        smallest: Number of pixels up to which a segment is dropped.
    """

    threshold: float = 0.85
    smallest: int = 4


class PanopticSettings(NamedTuple):
    """Settings of a trained network, and of the way from its queries to a map."""

    network: NetworkSettings
    postprocess: PostprocessSettings
