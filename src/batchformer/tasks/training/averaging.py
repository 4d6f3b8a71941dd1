"""Moving average of the weights."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging


class MovingAverage(EMAWeightAveraging):
    """Lightning's, on a network that a task's ``setup()`` builds: callbacks are set up before the module."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the network built, then copy it."""
        pl_module.setup(stage)
        super().setup(trainer, pl_module, stage)
