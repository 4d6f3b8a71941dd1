"""One panoptic run: data, the two networks, plug-in, loss and metrics, wired for Lightning's Trainer."""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from batchformer.data.detection_transforms import read_image
from batchformer.data.samplers import derive_seed
from batchformer.insertion import Handle
from batchformer.tasks.set_prediction.backbone import Backbone
from batchformer.tasks.set_prediction.from_transformers import Installed, use_criterion
from batchformer.tasks.set_prediction.optimizer import DetectorOptimizerSettings, parameter_groups
from batchformer.tasks.set_prediction.postprocess import detections
from batchformer.tasks.set_prediction.settings import KINDS
from batchformer.tasks.training.contract import ClassResult
from batchformer.tasks.training.schedule import optimization
from batchformer.tasks.training.settings import BatchFormerSettings, insert_plug_in

from .balance import balance
from .drawing import draw, side_by_side
from .loss import stage_criterion
from .maps import PanopticMap
from .matched import MatchedQueries
from .metrics import PanopticMetrics
from .model import build_network
from .postprocess import Frame, instances, panoptic_map
from .restore import DataFacts, Part
from .settings import LossSettings, NetworkSettings, PostprocessSettings, StageSettings
from .stages import add_mask_head, detector_of

DIVERGED = (
    "Lower model.optimizer.lr or model.stage.lr, raise model.optimizer.warmup_epochs, clip with "
    "trainer.gradient_clip_val, or run with precision=32-true."
)
AFTER_THE_FIRST_LAYER = BatchFormerSettings(before=None, after=["model.encoder.layers.0"])


class PanopticTask(LightningModule):
    """Train a detector on things and stuff, then a mask head on the frozen detector; test the plain network.

    BatchFormer goes behind layers of the detector's encoder (``batchformer.after`` names them as in the detector).
    While the mask head learns it stays there, frozen with the detector, so that the mask head sees both streams; with
    ``stage.batchformer=False`` the mask head learns on the plain detector.

    The networks are built in ``setup()``, when the data has said how many classes there are. They are the same for all
    arms of a comparison with one seed: the module draws its weights apart.

    Args:
        network: The network.
        loss: The loss.
        batchformer: The module and the arm.
        optimizer: Optimizer and schedule of the detector; the mask head has a learning rate and milestones of its own.
        stage: Detector, mask head, or one after the other.
        postprocess: From queries to a map.
        pictures: So many of the first test images are drawn, with their predicted map into the run folder's
            ``pictures/`` and with their true one into ``pictures/given/``; a report shows image, truth and all arms
            in a row.
        seed: Of initial weights and dropout.

    Raises:
        ValueError: From ``setup()``, for settings that do not go together.
    """

    primary: ClassVar[str] = "PQ"
    class_metric: ClassVar[str] = "PQ"
    class_count: ClassVar[str] = "training segments"

    def __init__(
        self,
        network: NetworkSettings = NetworkSettings(),  # noqa: B008  # jsonargparse reads defaults off the signature
        loss: LossSettings = LossSettings(),  # noqa: B008
        batchformer: BatchFormerSettings = AFTER_THE_FIRST_LAYER,
        optimizer: DetectorOptimizerSettings = DetectorOptimizerSettings(),  # noqa: B008
        stage: StageSettings = StageSettings(),  # noqa: B008
        postprocess: PostprocessSettings = PostprocessSettings(),  # noqa: B008
        pictures: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network_settings, self.loss_settings, self.plug_in = network, loss, batchformer
        self.optimizer_settings, self.stage, self.postprocess, self.seed = optimizer, stage, postprocess, seed
        self.pictures = pictures
        self.network: nn.Module | None = None
        self.part: Part = "detector"
        self.unbalanced = False
        self.handle: Handle | None = None
        self.facts: DataFacts | None = None
        self.test_seconds, self.test_images = 0.0, 0
        self.per_class: list[float] = []
        self.drawn: list[tuple[str, PanopticMap, PanopticMap]] = []

    # ---------------------------------------------------------------- building

    def setup(self, stage: str) -> None:
        """Build the detector for the data at hand, once, and the mask head where the run begins with it."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if self.network is None:
            self.facts = DataFacts.of(data)
            self._check()
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                if self.stage.name == "masks":
                    plug_in = self.plug_in if self.stage.batchformer else None
                    start = cast(str, self.stage.start_from)
                    self.network_settings, self.network, self.handle = detector_of(start, self.facts, plug_in)
                else:
                    self.network = build_network(self.network_settings, len(self.facts.classes))
                    torch.manual_seed(derive_seed(self.seed, 1))
                    self.handle = insert_plug_in(self.network, self.plug_in)
            self._use_criterion()
            if self.stage.name == "masks":
                self._begin_masks()
            splits = ("val", *data.test_splits)
            self.metrics = nn.ModuleDict({name: PanopticMetrics(self.facts.is_thing) for name in splits})
        data.prepare_features(self._backbone(), stage)

    def _check(self) -> None:
        stage, epochs = self.stage, self.trainer.max_epochs
        if stage.name == "masks" and stage.start_from is None:
            raise ValueError("Expected model.stage.start_from=RUN, the detector's run folder, for stage.name=masks.")
        if stage.name == "both" and not 0 < stage.detector_epochs < (epochs or 0):
            raise ValueError(
                f"Expected stage.detector_epochs between 0 and trainer.max_epochs={epochs}, which both parts share, "
                f"got {stage.detector_epochs}. Take stage.name=detector to train the detector alone."
            )
        if stage.name == "both" and self.trainer.world_size > 1:
            raise ValueError(
                f"Expected one process for stage.name=both, got {self.trainer.world_size}. Train with "
                "stage.name=detector, then with stage.name=masks and stage.start_from=RUN."
            )

    def _begin_masks(self) -> None:
        """Go over to the mask head; the detector and the module in it are frozen."""
        self.installed.remove()
        plug_in = self.plug_in if self.stage.batchformer else None
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.seed, 3))
            self.network, self.handle = add_mask_head(cast(nn.Module, self.network), self.handle, plug_in)
        self.part, self.unbalanced = "masks", self.stage.start == "balanced"
        self._use_criterion()
        # After the insertion, whose hooks double the labels.
        MatchedQueries(self.network, self.installed.criterion.match_costs)

    def _use_criterion(self) -> None:
        criterion = stage_criterion(
            self.loss_settings,
            self.network_settings.detector,
            len(cast(DataFacts, self.facts).classes),
            self.part,
            two_streams=lambda: self.handle is not None and self.handle.doubles,
            stream_weights=self.plug_in.stream_weights,
        )
        self.installed: Installed = use_criterion(cast(nn.Module, self.network), criterion)

    def _backbone(self) -> Backbone:
        return next(module for module in cast(nn.Module, self.network).modules() if isinstance(module, Backbone))

    # ---------------------------------------------------------------- steps

    def forward(self, batch: dict[str, Any], labels: Any = None) -> Any:
        """What the network returns for a batch of `PanopticData`."""
        with self._backbone().serving(batch.get("features")):
            return cast(nn.Module, self.network)(
                pixel_values=batch["pixel_values"], pixel_mask=batch["pixel_mask"], labels=labels
            )

    def on_train_epoch_start(self) -> None:
        """Go over to the mask head when its time has come, with an optimizer of its own."""
        if self.stage.name == "both" and self.part == "detector" and self.current_epoch >= self.stage.detector_epochs:
            self._begin_masks()
            self.trainer.strategy.setup_optimizers(self.trainer)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Make dropout a function of (seed, epoch, batch): a resumed run draws what an uninterrupted one drew.

        The first batch of the mask head balances its initial weights.
        """
        if self.unbalanced:
            balance(self.network, lambda: self(batch), self.trainer.strategy.reduce)
            self.unbalanced = False
        torch.manual_seed(derive_seed(self.seed, 2, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The mean of both streams' losses (or the one stream's)."""
        try:
            output = self(batch, batch["labels"])
        except FloatingPointError as error:
            raise FloatingPointError(
                f"{error} This was in epoch {self.current_epoch}, batch {batch_idx}. {DIVERGED}"
            ) from error
        size = len(batch["labels"])
        self.log("train_loss", output.loss, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        return cast(Tensor, output.loss)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update the validation metrics."""
        self._evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics of a test split and the time for each image."""
        self._evaluate(batch, list(self.metrics)[1 + dataloader_idx])

    def _evaluate(self, batch: dict[str, Any], split: str) -> None:
        start = time.perf_counter()
        output, facts, labels = self(batch), cast(DataFacts, self.facts), batch["labels"]
        if not bool(torch.isfinite(output.logits).all()):
            raise FloatingPointError(f"Expected finite logits of the {split} images, got others. {DIVERGED}")
        is_thing, kind = torch.tensor(facts.is_thing, device=self.device), KINDS[self.network_settings.detector]
        predicted, found = [], []
        for row in range(len(labels) if self.part == "masks" else 0):
            frame = Frame.of(batch, row)
            masks, logits = output.pred_masks[row], output.logits[row]
            predicted.append(panoptic_map(logits, masks, frame, is_thing, kind=kind, **asdict(self.postprocess)))
            found.append(instances(logits, masks, frame, is_thing, kind=kind))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if self.trainer.testing:
            self.test_seconds += time.perf_counter() - start
            self.test_images += len(labels)
        metrics = cast(PanopticMetrics, self.metrics[split])
        sizes = torch.stack([label["orig_size"] for label in labels])
        metrics.update_boxes(
            detections(output.logits, output.pred_boxes, sizes, kind), [label["truth_boxes"] for label in labels]
        )
        if predicted:
            ids, truth = [int(label["image_id"]) for label in labels], [label["truth"] for label in labels]
            metrics.update_maps(predicted, found, truth, image_ids=ids)
            if split == "test":
                self.drawn += zip([label["file"] for label in labels], truth, predicted, strict=True)
                del self.drawn[self.pictures :]

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log_metrics("val", "val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics of every split, keep the PQ of each class on the first, and draw pictures of it."""
        for split in list(self.metrics)[:0:-1]:
            self._log_metrics(split, "test" if split == "test" else f"test_{split}")
        if self.trainer.is_global_zero:
            self._draw(Path(self.trainer.default_root_dir) / "pictures")
        self.drawn.clear()

    def _draw(self, folder: Path) -> None:
        facts = cast(DataFacts, self.facts)
        for file, truth, predicted in self.drawn:
            (folder / "given").mkdir(parents=True, exist_ok=True)
            image = read_image(file)
            true, found = (draw(image, x, facts.classes, facts.is_thing) for x in (truth, predicted))
            name = f"{Path(file).stem}.png"
            side_by_side([("image", image), ("truth", true)]).save(folder / "given" / name)
            side_by_side([(self.plug_in.arm, found)]).save(folder / name)

    def _log_metrics(self, split: str, prefix: str) -> None:
        metric = cast(PanopticMetrics, self.metrics[split])
        values = metric.compute()
        metric.reset()
        unknown = torch.full((len(cast(DataFacts, self.facts).classes),), torch.nan)
        self.per_class = values.pop("per_class", unknown).tolist()
        # The same on every rank; averaging them changes nothing, and Lightning asks for it.
        named = {f"{prefix}_{name}": value.float().to(self.device) for name, value in values.items()}
        self.log_dict(named, sync_dist=True)

    # ---------------------------------------------------------------- optimization

    def configure_optimizers(self) -> Any:
        """AdamW for the part that trains now, with its own share of the epochs; the schedule steps with every batch."""
        settings, epochs = self.optimizer_settings, cast(int, self.trainer.max_epochs)
        share = epochs
        if self.stage.name == "both":
            share = self.stage.detector_epochs if self.part == "detector" else epochs - self.stage.detector_epochs
        if self.part == "masks":
            settings = replace(settings, lr=self.stage.lr, milestones=self.stage.milestones, warmup_epochs=0.0)
        steps = int(self.trainer.estimated_stepping_batches) * share // epochs
        groups = parameter_groups(cast(nn.Module, self.network), settings, self.plug_in)
        of_this_part: Any = SimpleNamespace(estimated_stepping_batches=steps, max_epochs=share)
        return optimization(groups, settings, of_this_part)

    # ---------------------------------------------------------------- records

    def class_results(self) -> list[ClassResult]:
        """Each class after the test."""
        facts = cast(DataFacts, self.facts)
        return [ClassResult(*row) for row in zip(facts.classes, facts.counts, self.per_class, strict=True)]

    def notes(self) -> list[str]:
        """What trained last, and what the data's policy did."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        network = cast(nn.Module, self.network)
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        part = "the mask head on the frozen detector" if self.part == "masks" else "the detector"
        return [f"Trained last: {part}, {trained:,} parameters.", self._backbone().note(), *data.notes()]

    @staticmethod
    def not_comparable(setting: Callable[[str], Any]) -> str | None:
        """A detector alone has no masks, and so no PQ to compare."""
        if setting("model.stage.name") == "detector":
            return "arms are compared by PQ, which a detector without its mask head has not"
        return None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what it takes to build the plain network again: plain types, loadable weights-only."""
        checkpoint["panoptic"] = {
            "part": self.part,
            "network": asdict(self.network_settings),
            "postprocess": asdict(self.postprocess),
            "data": asdict(cast(DataFacts, self.facts)),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go over to the mask head if the run had; refuse to go on with other data.

        Raises:
            ValueError: When classes or counts differ from those that the run was started with.
        """
        stored = checkpoint["panoptic"]
        before, now = asdict(DataFacts.read(stored["data"])), asdict(cast(DataFacts, self.facts))
        for key, what in (("classes", "classes"), ("counts", "training segments of each class")):
            if before[key] != now[key]:
                raise ValueError(
                    f"Expected the data that this run was trained on, but the {what} have changed. Bring it back, or "
                    "start another run."
                )
        if stored["part"] == "masks" and self.part == "detector":
            self._begin_masks()
        self.unbalanced = False  # whatever is loaded has been
