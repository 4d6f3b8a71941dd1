"""One detection run: data, detector, BatchFormer, loss and metrics."""

from typing import Any

from batchformer.tasks.set_prediction.criterion import SetCriterion
from batchformer.tasks.set_prediction.optimizer import DetectorOptimizerSettings
from batchformer.tasks.set_prediction.settings import KINDS
from batchformer.tasks.set_prediction.task import AFTER_THE_FIRST_LAYER, SetPredictionTask
from batchformer.tasks.training.contract import Measure
from batchformer.tasks.training.settings import BatchFormerSettings

from .data import DetectionData
from .loss import detection_criterion
from .metrics import DetectionMetrics
from .model import build_network
from .restore import FORMAT
from .settings import LossSettings, NetworkSettings


class DetectionTask(SetPredictionTask):
    """Train a detector, plain or with BatchFormer after its first encoder layer; test the plain detector.

    Args:
        network: Settings of the detector.
        loss: Settings of the loss.
        batchformer: BatchFormer and the arm of a comparison.
        optimizer: Optimizer and schedule.
        ema: Decay of an exponential moving average of the weights, which is then what is tested; ``None`` for none.
        seed: Seed of initial weights and dropout.

    Raises:
        ValueError: From ``setup()``, for settings that do not go together.
    """

    checkpoint = FORMAT
    data_type = DetectionData
    measures = (
        Measure("AP", "AP"),
        Measure("AP50", "AP50"),
        Measure("AP75", "AP75"),
        Measure("APS", "AP small", part="small objects"),
        Measure("APM", "AP medium", part="medium objects"),
        Measure("APL", "AP large", part="large objects"),
    )
    primary = "AP"
    class_metric = "AP"
    class_count = "training boxes"

    def __init__(
        self,
        network: NetworkSettings = NetworkSettings(),  # noqa: B008  # jsonargparse reads defaults off the signature
        loss: LossSettings = LossSettings(),  # noqa: B008
        batchformer: BatchFormerSettings = AFTER_THE_FIRST_LAYER,
        optimizer: DetectorOptimizerSettings = DetectorOptimizerSettings(),  # noqa: B008
        ema: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(network, batchformer, optimizer, ema=ema, seed=seed)
        self.loss_settings = loss

    def build_network(self) -> Any:
        """Return the plain detector."""
        return build_network(self.network_settings, len(self.facts.classes))

    def build_criterion(self, **streams: Any) -> SetCriterion:
        """Return the criterion, with the weights that were published with the detector."""
        detector = self.network_settings.detector
        return detection_criterion(self.loss_settings, detector, len(self.facts.classes), **streams)

    def build_metrics(self, split: str) -> DetectionMetrics:
        """Return COCO's average precision."""
        return DetectionMetrics(len(self.facts.classes), KINDS[self.network_settings.detector])

    def update_metrics(self, metric: DetectionMetrics, outputs: Any, batch: dict[str, Any], split: str) -> None:
        """Add the boxes of a batch."""
        self.require_finite(outputs.logits, split)
        metric.add(outputs.logits, outputs.pred_boxes, batch["labels"])
