"""The way from a run folder back to the plain network: a detector, or a detector with a mask head."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from batchformer.tasks.set_prediction.restore import CocoFacts, detector_export, stored_settings
from batchformer.tasks.set_prediction.settings import KINDS
from batchformer.tasks.training.checkpoint import CheckpointFormat, Restored, Stored
from batchformer.tasks.training.contract import Exportable

from .model import build_network, with_masks
from .older_versions import translate_entry
from .settings import NetworkSettings, PanopticSettings, PostprocessSettings

__all__ = ["FORMAT", "PanopticFacts", "exportable", "load_network", "rebuild"]


@dataclass(frozen=True)
class PanopticFacts(CocoFacts):
    """Facts about panoptic data.

    Attributes:
        is_thing: For each class, by index, True for things and False for stuff.
    """

    is_thing: list[bool]


FORMAT = CheckpointFormat("panoptic", PanopticFacts, translate_entry)


def rebuild(stored: Stored) -> Restored:
    """Build the plain network of a checkpoint, without BatchFormer's weights."""
    settings = stored_settings(NetworkSettings, stored.settings["network"])
    with torch.random.fork_rng(devices=[]):
        network = build_network(settings, len(stored.facts.classes))
        if stored.stage == "masks":
            network = with_masks(network)
    network.load_state_dict(stored.plain)
    both = PanopticSettings(settings, PostprocessSettings(**stored.settings["postprocess"]))
    return Restored(network.eval(), stored.facts, both, stored.stage)


def load_network(run: str | Path) -> Restored:
    """Restore the plain network of a run folder or checkpoint file.

    Raises:
        FileNotFoundError: When there is no checkpoint.
        ValueError: When it is no checkpoint of a panoptic run.
    """
    return rebuild(FORMAT.read(run))


def exportable(run: Path) -> Exportable:
    """Describe the plain network of a run for export."""
    restored = load_network(run)
    network, postprocess = restored.settings
    output = (
        "logits: softmax with 'no object' last, or a sigmoid for each class (focal); pred_boxes: center x, center y, "
        "width, height as shares of the image without its padding; pred_masks: logits over the padded image"
    )
    more = {"postprocess": asdict(postprocess), "scores": KINDS[network.detector]}
    names = ("logits", "pred_boxes", "pred_masks")[: 3 if restored.stage == "masks" else 2]
    return detector_export(restored, network, names, output, **more)
