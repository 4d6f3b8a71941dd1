"""The way from a checkpoint back to a detector, and out of this library: facts, settings and export."""

from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from batchformer.tasks.training.checkpoint import DataFacts, Restored
from batchformer.tasks.training.contract import Exportable

from .backbone import IMAGENET_MEAN, IMAGENET_STD, BackboneSettings
from .settings import DetectorSettings

__all__ = ["CocoFacts", "detector_export", "stored_settings"]

Settings = TypeVar("Settings", bound=DetectorSettings)


@dataclass(frozen=True)
class CocoFacts(DataFacts):
    """Facts about data in COCO's format that a trained detector needs, and its users with it.

    Attributes:
        category_ids: Id of each class in the annotation file, by class index.
        size: Short side of an image in evaluation, in pixels.
        max_size: Largest long side of an image in evaluation, in pixels.
        pad_to: Number that heights and widths are padded to multiples of: ``size`` with cached features, else 1.
    """

    category_ids: list[int]
    size: int
    max_size: int
    pad_to: int


def stored_settings(kind: type[Settings], stored: dict[str, Any]) -> Settings:
    """Read the network's settings of a checkpoint; the checkpoint brings all weights, so that nothing is fetched.

    Args:
        kind: Class of the settings.
        stored: Settings as ``dataclasses.asdict`` gave them.

    Example:
        >>> stored_settings(DetectorSettings, asdict(DetectorSettings("detr"))).backbone.pretrained
        False
    """
    backbone = BackboneSettings(**{**stored["backbone"], "pretrained": False})
    return kind(**{**stored, "backbone": backbone})


class _Outputs(nn.Module):
    """Outputs of a detector by position instead of by name."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        output = self.network(pixel_values=pixel_values, pixel_mask=pixel_mask)
        return tuple(getattr(output, name) for name in self.names)


def detector_export(
    restored: Restored, network: DetectorSettings, names: tuple[str, ...], output: str, **more: Any
) -> Exportable:
    """Describe a restored detector for export: normalised images and their mask to logits, boxes and perhaps masks.

    Args:
        restored: Network and facts.
        network: Settings of the network.
        names: Names of the outputs.
        output: Sentence about the outputs, for ``model.json``.
        **more: Further entries of ``model.json``.
    """
    # A square that every image fits into, as it is resized for the test.
    side = restored.facts.max_size
    return Exportable(
        network=restored.network,
        forward=_Outputs(restored.network, names).eval(),
        inputs=(torch.zeros(2, 3, side, side), torch.ones(2, side, side, dtype=torch.int64)),
        input_names=("pixel_values", "pixel_mask"),
        output_names=names,
        facts={
            "network": asdict(network),
            **asdict(restored.facts),
            **more,
            "input_side": side,
            "input": "short side size, long side at most max_size pixels; (image / 255 - mean) / std; to a square of "
            "input_side pixels by 0 at the right and the bottom, where pixel_mask is 0",
            "output": output,
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        },
    )
