"""The second stage: a mask head on the detector of the first stage, and the BatchFormer that was trained with it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchformer.data.samplers import derive_seed
from batchformer.insertion import Handle
from batchformer.tasks.set_prediction.restore import stored_settings
from batchformer.tasks.training.settings import BatchFormerSettings, insert_from_settings

from .model import build_network, detector_inside, with_masks
from .restore import FORMAT
from .settings import NetworkSettings

__all__ = ["STAGES", "MaskNetwork", "insert_frozen", "mask_network"]


STAGES = {
    "detector": "The detector learns the boxes of all segments.",
    "masks": "The mask head learns on the frozen detector.",
}
"""Stages that a recipe can list."""


class MaskNetwork(NamedTuple):
    """A detector that a first stage has trained, with a new mask head on it.

    Attributes:
        settings: Settings of the detector.
        network: Plain network; only the mask head trains.
        batchformer: State dict of the BatchFormer modules, named as in the detector; empty for the plain arm.
    """

    settings: NetworkSettings
    network: Any
    batchformer: dict[str, Tensor]


def mask_network(start: Path | None, classes: list[str], seed: int) -> MaskNetwork:
    """Put a new mask head on a trained detector.

    Args:
        start: Checkpoint of the detector, or of a mask head on it that is left out.
        classes: Classes of the data at hand.
        seed: Seed of the run, from which the mask head's initial weights follow.

    Raises:
        ValueError: When there is no detector, or one of other classes.
    """
    if start is None:
        raise ValueError(
            "Expected a detector for the stage 'masks', got none. Put the stage 'detector' before it, or set "
            "start_from=RUN in its entry of stages, the detector's run folder."
        )
    stored = FORMAT.read(start)
    if stored.facts.classes != classes:
        raise ValueError(
            f"Expected a detector of the {len(classes)} classes of the data, got one of {len(stored.facts.classes)} or "
            "others. Take the run that was trained on this data."
        )
    settings = stored_settings(NetworkSettings, stored.settings["network"])
    detector = build_network(settings, len(classes))
    inside = f"{settings.detector}."
    own = {key: value for key, value in stored.plain.items() if not key.startswith(("mask_head.", "bbox_attention."))}
    detector.load_state_dict({key.removeprefix(inside): value for key, value in own.items()})
    # Modules that share no weights are named by their layers, which have longer names inside a network with masks.
    modules = {key.removeprefix(f"{settings.detector}_"): value for key, value in stored.batchformer.items()}
    torch.manual_seed(derive_seed(seed, 3))
    return MaskNetwork(settings, with_masks(detector), modules)


def insert_frozen(network: nn.Module, settings: BatchFormerSettings, trained: Mapping[str, Tensor]) -> Handle | None:
    """Put BatchFormer where it was in the detector, as it was trained, and freeze it.

    Args:
        network: Network with a mask head, changed in place.
        settings: Settings of BatchFormer, whose ``after`` names layers of the detector.
        trained: State dict of the modules, from :func:`mask_network`.

    Returns:
        The handle; ``None`` for the plain arm.

    Raises:
        ValueError: When the detector was trained without BatchFormer.
    """
    inside = detector_inside(network)
    after = [settings.after] if isinstance(settings.after, str) else settings.after or []
    handle = insert_from_settings(network, replace(settings, after=[f"{inside}.{name}" for name in after]))
    if handle is None:
        return None
    modules = network.get_submodule("batchformer")
    wanted = modules.state_dict()
    if wanted and not trained:
        raise ValueError(
            "Expected a detector that was trained with BatchFormer, got one that was trained without. Set "
            "model.masks.batchformer=false, or take model.batchformer.arm=plain."
        )
    names = {key: key.removeprefix(f"{inside}_") for key in wanted}
    modules.load_state_dict({key: trained[name] for key, name in names.items() if name in trained})
    for module in handle.modules:
        module.freeze()
    return handle
