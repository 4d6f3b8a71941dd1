"""The loss of both stages: set prediction's, with the terms that the stage can learn from."""

from collections.abc import Callable, Sequence
from typing import Literal

from batchformer.tasks.set_prediction.criterion import LossWeights, SetCriterion
from batchformer.tasks.set_prediction.matching import MatchCosts

from .settings import KINDS, Detector, LossSettings

__all__ = ["stage_criterion"]


def stage_criterion(
    settings: LossSettings,
    detector: Detector,
    num_classes: int,
    stage: Literal["detector", "masks"],
    *,
    two_streams: bool | Callable[[], bool] = False,
    stream_weights: Sequence[float] = (1.0, 1.0),
) -> SetCriterion:
    """The criterion of a stage.

    The mask head learns from the masks' focal and dice loss alone: the detector under it is frozen, its own terms would
    be constants in the sum. Matching is the same in both stages.

    Args:
        settings: Weights.
        detector: Whose loss it is.
        num_classes: K, things and stuff together.
        stage: Which.
        two_streams: Whether the rows are [plain; mixed], or what tells.
        stream_weights: Of the plain and the mixed stream.

    Source:
        Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, sections 3.1 and 4.4, and
        appendix A.2 for the dice loss.

    Example:
        >>> stage_criterion(LossSettings(), "detr", 7, "masks").weights
        LossWeights(class_=0.0, l1=0.0, giou=0.0, mask=1.0, dice=1.0)
    """
    kind = KINDS[detector]
    class_weight = settings.class_weight
    if class_weight is None:
        class_weight = 1.0 if kind == "softmax" else 2.0
    if stage == "masks":
        weights = LossWeights(class_=0.0, l1=0.0, giou=0.0, mask=settings.mask_weight, dice=settings.dice_weight)
    else:
        weights = LossWeights(class_weight, settings.l1_weight, settings.giou_weight)
    return SetCriterion(
        num_classes,
        kind,
        weights,
        MatchCosts(kind, class_weight, settings.l1_weight, settings.giou_weight),
        eos=settings.no_object_weight,
        alpha=settings.alpha,
        gamma=settings.gamma,
        cardinality=False,
        two_streams=two_streams,
        stream_weights=stream_weights,
    )
