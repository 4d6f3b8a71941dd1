"""The loss of both stages: the terms of set prediction that the stage can learn from."""

from collections.abc import Callable, Sequence

from batchformer.tasks.set_prediction.criterion import SetCriterion, build_criterion
from batchformer.tasks.set_prediction.settings import KINDS

from .settings import Detector, LossSettings

__all__ = ["stage_criterion"]


def stage_criterion(
    settings: LossSettings,
    detector: Detector,
    num_classes: int,
    stage: str,
    *,
    two_streams: bool | Callable[[], bool] = False,
    stream_weights: Sequence[float] = (1.0, 1.0),
) -> SetCriterion:
    """Build the criterion of a stage.

    The mask head learns from the masks' focal and dice loss alone: the detector inside is frozen, and its own terms
    would be constants in the sum. Both stages match queries and segments alike.

    Args:
        settings: Weights of the terms; those of class and boxes are the costs of the matching too.
        detector: Name of the detector.
        num_classes: K, number of classes, things and stuff together.
        stage: Name of the stage, ``detector`` or ``masks``.
        two_streams: True if the rows are [plain; mixed], or a function that tells.
        stream_weights: Weights of the plain and of the mixed stream.

    Source:
        Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, sections 3.1 and 4.4, and
        appendix A.2 for the dice loss.

    Example:
        >>> stage_criterion(LossSettings(), "detr", 7, "masks").weights
        LossWeights(class_=0.0, l1=0.0, giou=0.0, mask=1.0, dice=1.0)
    """
    return build_criterion(
        KINDS[detector],
        num_classes,
        **vars(settings),
        class_cost=settings.class_weight,
        l1_cost=settings.l1_weight,
        giou_cost=settings.giou_weight,
        masks_alone=stage == "masks",
        two_streams=two_streams,
        stream_weights=stream_weights,
    )
