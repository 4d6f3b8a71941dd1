"""The way from a run folder back to the plain detector."""

from pathlib import Path
from typing import Any

import torch

from batchformer.tasks.set_prediction.restore import CocoFacts, detector_export, stored_settings
from batchformer.tasks.training.checkpoint import CheckpointFormat, Restored, Stored
from batchformer.tasks.training.contract import Exportable

from .model import build_network
from .settings import NetworkSettings

__all__ = ["FORMAT", "exportable", "load_network", "rebuild"]


def translate(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's entry of an earlier version in today's form."""
    return {"stage": "train", "settings": {"network": entry["network"]}, "facts": entry["data"]}


FORMAT = CheckpointFormat("detection", CocoFacts, translate)


def rebuild(stored: Stored) -> Restored:
    """Build the plain detector of a checkpoint; BatchFormer's weights are left out."""
    settings = stored_settings(NetworkSettings, stored.settings["network"])
    with torch.random.fork_rng(devices=[]):
        network = build_network(settings, len(stored.facts.classes))
    network.load_state_dict(stored.plain)
    return Restored(network.eval(), stored.facts, settings, stored.stage)


def load_network(run: str | Path) -> Restored:
    """Restore the plain detector of a run folder or checkpoint file.

    Raises:
        FileNotFoundError: When there is no checkpoint.
        ValueError: When it is no checkpoint of a detection run.
    """
    return rebuild(FORMAT.read(run))


def exportable(run: Path) -> Exportable:
    """Describe the plain detector of a run for export.

    Raises:
        FileNotFoundError: When the run has no checkpoint.
    """
    restored = load_network(run)
    scores = (
        "softmax, the last class is 'no object'" if restored.settings.detector == "detr" else "sigmoid of each class"
    )
    output = f"pred_boxes: center x, center y, width, height as shares of the image without its padding; {scores}"
    return detector_export(restored, restored.settings, ("logits", "pred_boxes"), output)
