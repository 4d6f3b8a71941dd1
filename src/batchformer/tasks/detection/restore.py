"""From a run folder to the plain detector."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchformer.tasks.set_prediction.backbone import IMAGENET_MEAN, IMAGENET_STD, BackboneSettings
from batchformer.tasks.set_prediction.settings import KINDS
from batchformer.tasks.training.contract import Exportable

from .model import build_network
from .settings import NetworkSettings

__all__ = ["DataFacts", "Restored", "exportable", "load_network"]


@dataclass(frozen=True)
class DataFacts:
    """What a detector's user needs to know of its data.

    Attributes:
        classes: Names, by class index.
        category_ids: Of the annotation file, by class index.
        counts: Training boxes of each class.
        size: Short side of an image in evaluation, in pixels.
        max_size: Of the long side.
        pad_to: Height and width are padded to multiples of it: ``size`` with cached features, else 1.
    """

    classes: list[str]
    category_ids: list[int]
    counts: list[int]
    size: int
    max_size: int
    pad_to: int

    @classmethod
    def of(cls, data: Any) -> "DataFacts":
        """Read them off a data module after its ``setup()``."""
        return cls(
            [category.name for category in data.categories],
            [int(category.id) for category in data.categories],
            [int(n) for n in data.counts],
            int(data.size),
            int(data.max_size),
            int(data.pad_to),
        )

    @classmethod
    def read(cls, stored: dict[str, Any]) -> "DataFacts":
        """From a checkpoint.

        Raises:
            ValueError: When it is of an earlier state of this library, whose networks were others.
        """
        try:
            return cls(**stored)
        except TypeError:
            raise ValueError(
                "Expected a run of this version of batchformer, got one of an earlier version, whose network computed "
                "something else. Use that version for it, or train it again."
            ) from None


class Restored(NamedTuple):
    """What a run left behind: the plain detector, in ``eval()``, and what it was built from."""

    network: Any
    facts: DataFacts
    settings: NetworkSettings

    @property
    def kind(self) -> Any:
        """How scores follow from logits, see `detections`."""
        return KINDS[self.settings.detector]


def load_network(run: str | Path) -> Restored:
    """The plain detector of a run folder or checkpoint file; BatchFormer's weights are left out.

    Raises:
        FileNotFoundError: When there is no checkpoint.
        ValueError: When it is no checkpoint of a detection run.
    """
    path = Path(run) / "checkpoints" / "last.ckpt" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a run folder with checkpoints/last.ckpt, or a checkpoint file, got {run}.")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "detection" not in checkpoint:
        raise ValueError(f"Expected a checkpoint of a detection run, got {path} without the entry 'detection'.")
    stored = checkpoint["detection"]
    backbone = BackboneSettings(**{**stored["network"]["backbone"], "pretrained": False})
    settings = NetworkSettings(**{**stored["network"], "backbone": backbone})
    facts = DataFacts.read(stored["data"])
    with torch.random.fork_rng():
        network = build_network(settings, len(facts.classes))
    prefix = "network."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    network.load_state_dict({k: v for k, v in state.items() if not k.startswith("batchformer.")})
    return Restored(network.eval(), facts, settings)


class _Boxes(nn.Module):
    """Logits and boxes by position."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(pixel_values=pixel_values, pixel_mask=pixel_mask)
        return output.logits, output.pred_boxes


def exportable(run: Path) -> Exportable:
    """The plain detector: normalised images and their mask to logits and boxes.

    Raises:
        FileNotFoundError: When the run has no checkpoint.
    """
    network, facts, settings = load_network(run)
    # A square that every image fits into, as it is resized for the test.
    side = facts.max_size
    return Exportable(
        network=network,
        forward=_Boxes(network).eval(),
        inputs=(torch.zeros(2, 3, side, side), torch.ones(2, side, side, dtype=torch.int64)),
        input_names=("pixel_values", "pixel_mask"),
        output_names=("logits", "pred_boxes"),
        facts={
            "network": asdict(settings),
            **asdict(facts),
            "input_side": side,
            "input": "short side size, long side at most max_size pixels; (image / 255 - mean) / std; to a square of "
            "input_side pixels by 0 at the right and the bottom, where pixel_mask is 0",
            "output": "pred_boxes: center x, center y, width, height as shares of the image without its padding; "
            + ("softmax, the last class is 'no object'" if settings.detector == "detr" else "sigmoid of each class"),
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        },
    )
