"""One panoptic run: data, the networks of both stages, BatchFormer, loss and metrics."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchformer.insertion import Handle
from batchformer.tasks.set_prediction.criterion import SetCriterion
from batchformer.tasks.set_prediction.optimizer import DetectorOptimizerSettings
from batchformer.tasks.set_prediction.postprocess import detections
from batchformer.tasks.set_prediction.settings import KINDS
from batchformer.tasks.set_prediction.task import AFTER_THE_FIRST_LAYER, SetPredictionTask
from batchformer.tasks.training.settings import BatchFormerSettings

from .balance import balance
from .data import PanopticData
from .drawing import KeptMaps
from .loss import stage_criterion
from .matched import MatchedQueries
from .metrics import MEASURES, PanopticMetrics
from .model import build_network
from .older_versions import translate_settings
from .postprocess import batch_maps
from .restore import FORMAT
from .settings import LossSettings, MaskSettings, NetworkSettings, PostprocessSettings
from .stages import STAGES, insert_frozen, mask_network


class PanopticTask(SetPredictionTask):
    """Train a detector on things and stuff, then a mask head on the frozen detector; test the plain network.

    Args:
        network: Settings of the detector.
        loss: Settings of the loss.
        batchformer: BatchFormer and the arm of a comparison; ``after`` names layers as in the detector.
        optimizer: Optimizer and schedule, which recipes change for the mask head.
        masks: Settings of the second stage.
        postprocess: Settings of the way from queries to a map.
        pictures: Number of the first test images whose maps are drawn into ``pictures/`` of the run folder.
        seed: Seed of initial weights and dropout.
    """

    checkpoint, data_type, measures = FORMAT, PanopticData, MEASURES
    primary, class_metric = "PQ", "PQ"
    class_count = "training segments"
    stages, follows = STAGES, {"masks": "detector"}

    def __init__(
        self,
        network: NetworkSettings = NetworkSettings(),  # noqa: B008  # jsonargparse reads defaults off the signature
        loss: LossSettings = LossSettings(),  # noqa: B008
        batchformer: BatchFormerSettings = AFTER_THE_FIRST_LAYER,
        optimizer: DetectorOptimizerSettings = DetectorOptimizerSettings(),  # noqa: B008
        masks: MaskSettings = MaskSettings(),  # noqa: B008
        postprocess: PostprocessSettings = PostprocessSettings(),  # noqa: B008
        pictures: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(network, batchformer, optimizer, seed=seed)
        self.loss_settings, self.masks, self.postprocess = loss, masks, postprocess
        self.pictures, self.unbalanced = KeptMaps(pictures), False

    def build_network(self) -> Any:
        """Return the detector, or a new mask head on the detector that ``stage.start`` holds."""
        if self.stage.name == "detector":
            return build_network(self.network_settings, len(self.facts.classes))
        self.network_settings, network, self.trained = mask_network(self.stage.start, self.facts.classes, self.seed)
        return network

    def insert(self, network: nn.Module) -> Handle | None:
        """Put BatchFormer into the detector; under a mask head as it was trained and frozen, or not at all."""
        if self.stage.name == "detector":
            return super().insert(network)
        return insert_frozen(network, self.batchformer, self.trained) if self.masks.batchformer else None

    def build_criterion(self, **streams: Any) -> SetCriterion:
        """Return the criterion of this stage."""
        detector, classes = self.network_settings.detector, len(self.facts.classes)
        return stage_criterion(self.loss_settings, detector, classes, self.stage.name, **streams)

    def prepare(self) -> None:
        """Install the criterion; run the mask head on matched queries alone."""
        super().prepare()
        if self.stage.name == "masks":
            # After the insertion, whose hooks double the labels.
            MatchedQueries(self.network, self.installed.criterion.match_costs)
            self.unbalanced = self.masks.start == "balanced"

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Balance the mask head's initial weights on its first batch; seed the dropout."""
        if self.unbalanced:
            balance(self.network, lambda: self.run(batch), self.trainer.strategy.reduce)
            self.unbalanced = False
        super().on_train_batch_start(batch, batch_idx)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with other data; the weights of a checkpoint are balanced already."""
        super().on_load_checkpoint(checkpoint)
        self.unbalanced = False

    def build_metrics(self, split: str) -> PanopticMetrics:
        """Return panoptic quality, and COCO's average precision of things."""
        return PanopticMetrics(self.facts.is_thing)

    def update_metrics(self, metric: PanopticMetrics, outputs: Any, batch: dict[str, Any], split: str) -> None:
        """Add the boxes of a batch, and its maps where there is a mask head."""
        self.require_finite(outputs.logits, split)
        kind, labels, maps = KINDS[self.network_settings.detector], batch["labels"], []
        if self.stage.name == "masks":
            is_thing = torch.tensor(self.facts.is_thing, device=self.device)
            found = batch_maps(outputs, batch, is_thing, kind=kind, **asdict(self.postprocess))
            maps = [(*one, label["truth"]) for one, label in zip(found, labels, strict=True)]
        sizes = torch.stack([label["orig_size"] for label in labels])
        boxes = detections(outputs.logits, outputs.pred_boxes, sizes, kind)
        metric.update(boxes, [label["truth_boxes"] for label in labels], maps)
        if split == "test":
            self.pictures.add([label["file"] for label in labels], maps)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of every test split, and draw pictures of the first."""
        super().on_test_epoch_end()
        if self.trainer.is_global_zero:
            self.pictures.write(Path(self.trainer.default_root_dir) / "pictures", self.facts, self.batchformer.arm)

    def settings(self) -> dict[str, Any]:
        """Return the settings of network and post-processing."""
        return {**super().settings(), "postprocess": asdict(self.postprocess)}

    def notes(self) -> list[str]:
        """Return what the last stage trained, what of the backbone trains, and what was done to the data."""
        trained = sum(p.numel() for p in self.network.parameters() if p.requires_grad)
        return [f"{self.stages[self.stage.name]} Trained last: {trained:,} parameters.", *super().notes()]

    @classmethod
    def not_comparable(cls, setting: Callable[[str], Any]) -> str | None:
        """Return why a detector alone is not compared: it has no masks, and so no PQ."""
        if any(stage["name"] == "masks" for stage in setting("stages") or ()):
            return None
        return "arms are compared by PQ, which a detector without its mask head has not"

    @classmethod
    def translate_settings(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """Return settings of an earlier version (``model.stage``) in today's terms."""
        return translate_settings(settings)
