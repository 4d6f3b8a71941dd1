"""The loss of a detector, with the weights that it was published with."""

from collections.abc import Callable, Sequence

from batchformer.tasks.set_prediction.criterion import LossWeights, SetCriterion
from batchformer.tasks.set_prediction.matching import MatchCosts

from .settings import PUBLISHED, Detector, LossSettings

__all__ = ["build_criterion"]


def build_criterion(
    settings: LossSettings,
    detector: Detector,
    num_classes: int,
    *,
    two_streams: bool | Callable[[], bool] = False,
    stream_weights: Sequence[float] = (1.0, 1.0),
) -> SetCriterion:
    """The criterion of a run.

    Args:
        settings: The loss.
        detector: Whose published settings fill what is ``None``.
        num_classes: K.
        two_streams: Whether the rows are [plain; mixed], or what tells.
        stream_weights: Of the plain and the mixed stream.

    Source:
        DETR, appendix A.4; Conditional DETR, section 3.5; Deformable DETR, appendix A.4.

    Example:
        >>> build_criterion(LossSettings(), "conditional_detr", 3).weights
        LossWeights(class_=2.0, l1=5.0, giou=2.0, mask=1.0, dice=1.0)
        >>> build_criterion(LossSettings(), "detr", 3).kind
        'softmax'
    """
    kind = PUBLISHED[detector]["kind"]
    usual = 1.0 if kind == "softmax" else 2.0
    return SetCriterion(
        num_classes=num_classes,
        kind=kind,
        weights=LossWeights(
            class_=usual if settings.class_weight is None else settings.class_weight,
            l1=settings.l1_weight,
            giou=settings.giou_weight,
        ),
        costs=MatchCosts(
            kind,
            class_=usual if settings.class_cost is None else settings.class_cost,
            l1=settings.l1_cost,
            giou=settings.giou_cost,
        ),
        eos=settings.no_object_weight,
        alpha=settings.alpha,
        gamma=settings.gamma,
        cardinality=False,
        two_streams=two_streams,
        stream_weights=stream_weights,
    )
