"""The base of tasks whose network is a detector of transformers on data in COCO's format."""

from dataclasses import asdict
from typing import Any, ClassVar

from torch import Tensor

from batchformer.tasks.training.settings import BatchFormerSettings
from batchformer.tasks.training.task import Task

from .criterion import SetCriterion
from .detector import backbone_of
from .from_transformers import use_criterion
from .optimizer import DetectorOptimizerSettings, parameter_groups
from .settings import DetectorSettings

__all__ = ["AFTER_THE_FIRST_LAYER", "SetPredictionTask"]

AFTER_THE_FIRST_LAYER = BatchFormerSettings(before=None, after=["model.encoder.layers.0"])


class SetPredictionTask(Task):
    """Train a detector with set prediction's loss; a subclass gives its network, its criterion and its metrics.

    Args:
        network: Settings of the detector.
        batchformer: BatchFormer and the arm of a comparison.
        optimizer: Optimizer and schedule.
        ema: Decay of an exponential moving average of the weights, which is then what is tested; ``None`` for none.
        seed: Seed of initial weights and dropout.
    """

    # The matching looks at the predictions anyway, and raises where they are not finite.
    loss_is_checked: ClassVar[bool] = True
    optimizer_settings: DetectorOptimizerSettings

    def __init__(
        self,
        network: DetectorSettings,
        batchformer: BatchFormerSettings,
        optimizer: DetectorOptimizerSettings,
        *,
        ema: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batchformer, optimizer, ema=ema, channels_last=False, seed=seed)
        self.network_settings: Any = network

    def build_criterion(self, **streams: Any) -> SetCriterion:
        """Return the criterion of this stage; ``streams`` are its arguments ``two_streams`` and ``stream_weights``."""
        raise NotImplementedError(f"{type(self).__name__} needs build_criterion(**streams): it returns a SetCriterion.")

    def setup(self, stage: str) -> None:
        """Build the network for the data at hand, once; have the data hold the maps of a frozen backbone."""
        super().setup(stage)
        data: Any = self._data()
        data.prepare_features(backbone_of(self.network), stage)

    def prepare(self) -> None:
        """Install the criterion in the network, which calls it when it is given labels."""
        criterion = self.build_criterion(
            two_streams=lambda: self.handle is not None and self.handle.doubles,
            stream_weights=self.batchformer.stream_weights,
        )
        self.installed = use_criterion(self.network, criterion)

    def run(self, batch: dict[str, Any]) -> Any:
        """Pass a batch through the detector, on cached maps where the batch has them; with labels in training alone."""
        labels = batch["labels"] if self.network.training else None
        with backbone_of(self.network).serving(batch.get("features")):
            return self.network(pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"], labels=labels)

    def loss(self, outputs: Any, batch: dict[str, Any]) -> Tensor:
        """Return the loss that the installed criterion has computed: the mean over the streams."""
        loss: Tensor = outputs.loss
        return loss

    def rows(self, batch: dict[str, Any]) -> int:
        """Return the number of images in a batch."""
        return len(batch["labels"])

    def param_groups(self) -> list[dict[str, Any]]:
        """Return groups for backbone, transformer, sampling points and BatchFormer."""
        return parameter_groups(self.network, self.optimizer_settings, self.batchformer)

    def settings(self) -> dict[str, Any]:
        """Return the settings of the network."""
        return {"network": asdict(self.network_settings)}

    def notes(self) -> list[str]:
        """Return what of the backbone trains, and what was done to the data."""
        return [backbone_of(self.network).note(), *super().notes()]
