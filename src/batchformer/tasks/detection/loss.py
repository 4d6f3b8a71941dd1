"""The loss of a detection run."""

from collections.abc import Callable, Sequence

from batchformer.tasks.set_prediction.criterion import SetCriterion, build_criterion
from batchformer.tasks.set_prediction.settings import KINDS, Detector

from .settings import LossSettings

__all__ = ["detection_criterion"]


def detection_criterion(
    settings: LossSettings,
    detector: Detector,
    num_classes: int,
    *,
    two_streams: bool | Callable[[], bool] = False,
    stream_weights: Sequence[float] = (1.0, 1.0),
) -> SetCriterion:
    """Build the criterion of a detection run; see :func:`batchformer.tasks.set_prediction.criterion.build_criterion`.

    Args:
        settings: Weights of the terms and costs of the matching.
        detector: Name of the detector, whose published values replace ``None``.
        num_classes: K, number of classes without "no object".
        two_streams: True if the rows are [plain; mixed], or a function that tells.
        stream_weights: Weights of the plain and of the mixed stream.

    Example:
        >>> detection_criterion(LossSettings(), "conditional_detr", 3).weights
        LossWeights(class_=2.0, l1=5.0, giou=2.0, mask=1.0, dice=1.0)
        >>> detection_criterion(LossSettings(), "detr", 3).kind
        'softmax'
    """
    return build_criterion(
        KINDS[detector], num_classes, **vars(settings), two_streams=two_streams, stream_weights=stream_weights
    )
