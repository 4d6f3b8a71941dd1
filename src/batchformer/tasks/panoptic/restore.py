"""From a run folder to the plain network."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from batchformer.tasks.set_prediction.backbone import IMAGENET_MEAN, IMAGENET_STD, BackboneSettings
from batchformer.tasks.set_prediction.matching import Kind
from batchformer.tasks.set_prediction.settings import KINDS
from batchformer.tasks.training.contract import Exportable

from .model import build_network, with_masks
from .settings import NetworkSettings, PostprocessSettings

__all__ = ["DataFacts", "Restored", "Stored", "exportable", "load_network", "read_checkpoint"]

Part = Literal["detector", "masks"]


@dataclass(frozen=True)
class DataFacts:
    """What the network's user needs to know of its data.

    Attributes:
        classes: Names, by class index.
        category_ids: Of the annotation file, by class index.
        is_thing: By class index.
        counts: Training segments of each class.
        size: Short side of an image in evaluation, in pixels.
        max_size: Of the long side.
        pad_to: Height and width are padded to multiples of it: ``size`` with cached features, else 1.
    """

    classes: list[str]
    category_ids: list[int]
    is_thing: list[bool]
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
            [bool(category.isthing) for category in data.categories],
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


class Stored(NamedTuple):
    """What a checkpoint of a panoptic run holds.

    Attributes:
        part: Which network it is.
        settings: Of the network.
        postprocess: From its queries to a map.
        facts: Of the data.
        detector: State dict of the detector.
        masks: State dict of the mask head; empty with ``part == "detector"``.
        batchformer: State dict of the modules, if there were any.
    """

    part: Part
    settings: NetworkSettings
    postprocess: PostprocessSettings
    facts: DataFacts
    detector: dict[str, Tensor]
    masks: dict[str, Tensor]
    batchformer: dict[str, Tensor]


def read_checkpoint(run: str | Path) -> Stored:
    """Read a run folder or checkpoint file.

    Raises:
        FileNotFoundError: When there is no checkpoint.
        ValueError: When it is no checkpoint of a panoptic run.
    """
    path = Path(run) / "checkpoints" / "last.ckpt" if Path(run).is_dir() else Path(run)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a run folder with checkpoints/last.ckpt, or a checkpoint file, got {run}.")
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if "panoptic" not in checkpoint:
        raise ValueError(f"Expected a checkpoint of a panoptic run, got {path} without the entry 'panoptic'.")
    stored = checkpoint["panoptic"]
    # The checkpoint brings the weights; nothing is to be fetched.
    backbone = BackboneSettings(**{**stored["network"]["backbone"], "pretrained": False})
    state = {k.removeprefix("network."): v for k, v in checkpoint["state_dict"].items() if k.startswith("network.")}
    settings = NetworkSettings(**{**stored["network"], "backbone": backbone})
    parts: dict[str, dict[str, Tensor]] = {"detector": {}, "batchformer": {}, "masks": {}}
    for key, value in state.items():
        head, _, rest = key.partition(".")
        if head == "batchformer":
            parts[head][rest.removeprefix(f"{settings.detector}_")] = value  # of modules named by their places
        elif head == settings.detector:
            parts["detector"][rest] = value
        else:
            parts[stored["part"]][key] = value
    return Stored(
        stored["part"],
        settings,
        PostprocessSettings(**stored["postprocess"]),
        DataFacts.read(stored["data"]),
        parts["detector"],
        parts["masks"],
        parts["batchformer"],
    )


class Restored(NamedTuple):
    """What a run left behind: the plain network, in ``eval()``, and what goes with it."""

    network: Any
    part: Part
    facts: DataFacts
    settings: NetworkSettings
    postprocess: PostprocessSettings

    @property
    def kind(self) -> Kind:
        """How scores follow from logits."""
        return KINDS[self.settings.detector]


def load_network(run: str | Path) -> Restored:
    """The plain network of a run folder or checkpoint file; BatchFormer's weights are left out.

    Raises:
        FileNotFoundError: When there is no checkpoint.
        ValueError: When it is no checkpoint of a panoptic run.
    """
    stored = read_checkpoint(run)
    with torch.random.fork_rng():
        network = build_network(stored.settings, len(stored.facts.classes))
        network.load_state_dict(stored.detector)
        if stored.part == "masks":
            network = with_masks(network)
            absent = network.load_state_dict(stored.masks, strict=False).missing_keys
            assert all(key.startswith(f"{stored.settings.detector}.") for key in absent)
    return Restored(network.eval(), stored.part, stored.facts, stored.settings, stored.postprocess)


class _Outputs(nn.Module):
    """Logits, boxes and masks by position."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> tuple[Tensor, ...]:
        output = self.network(pixel_values=pixel_values, pixel_mask=pixel_mask)
        return tuple(getattr(output, name) for name in self.names)


def exportable(run: Path) -> Exportable:
    """The plain network: normalised images and their mask to logits, boxes and mask logits.

    Raises:
        FileNotFoundError: When the run has no checkpoint.
    """
    network, part, facts, settings, postprocess = load_network(run)
    names = ("logits", "pred_boxes", *(("pred_masks",) if part == "masks" else ()))
    # A square that every image fits into, as it is resized for the test.
    side = facts.max_size
    return Exportable(
        network=network,
        forward=_Outputs(network, names).eval(),
        inputs=(torch.zeros(2, 3, side, side), torch.ones(2, side, side, dtype=torch.int64)),
        input_names=("pixel_values", "pixel_mask"),
        output_names=names,
        facts={
            "network": asdict(settings),
            **asdict(facts),
            "input_side": side,
            "postprocess": asdict(postprocess),
            "input": "short side size, long side at most max_size pixels; (image / 255 - mean) / std; to a square of "
            "input_side pixels by 0 at the right and the bottom, where pixel_mask is 0",
            "scores": KINDS[settings.detector],
            "output": "logits: softmax with 'no object' last, or a sigmoid for each class (focal); pred_boxes: center "
            "x, center y, width, height as shares of the image without its padding; pred_masks: logits over the padded "
            "image",
            "mean": list(IMAGENET_MEAN),
            "std": list(IMAGENET_STD),
        },
    )
