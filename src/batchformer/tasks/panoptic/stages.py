"""From one stage to the next: the detector of another run, and a mask head on a detector."""

from dataclasses import replace
from typing import Any

from torch import nn

from batchformer.insertion import Handle
from batchformer.tasks.training.settings import BatchFormerSettings, insert_plug_in

from .model import build_network, detector_inside, with_masks
from .restore import DataFacts, read_checkpoint
from .settings import NetworkSettings

__all__ = ["add_mask_head", "detector_of"]


def detector_of(
    run: str, facts: DataFacts, plug_in: BatchFormerSettings | None
) -> tuple[NetworkSettings, nn.Module, Handle | None]:
    """The detector that another run trained, with its BatchFormer where it is wanted.

    Args:
        run: Run folder or checkpoint.
        facts: Of the data at hand.
        plug_in: The module and the arm; ``None`` for the plain detector.

    Returns:
        Settings, detector and handle.

    Raises:
        FileNotFoundError: When there is no checkpoint.
        ValueError: When it is of other classes, or has no BatchFormer and should.
    """
    stored = read_checkpoint(run)
    if stored.facts.classes != facts.classes:
        raise ValueError(
            f"Expected a detector of the {len(facts.classes)} classes of the data, got one of "
            f"{len(stored.facts.classes)} or others. Take the run that was trained on this data."
        )
    detector = build_network(stored.settings, len(facts.classes))
    detector.load_state_dict(stored.detector)
    handle = None if plug_in is None else insert_plug_in(detector, plug_in)
    if handle is not None:
        module = detector.get_submodule("batchformer")
        if module.state_dict() and not stored.batchformer:
            raise ValueError(
                f"Expected a detector that was trained with BatchFormer, got {run} without. Set "
                "model.stage.batchformer=false, or take model.batchformer.arm=plain."
            )
        module.load_state_dict(stored.batchformer)
    return stored.settings, detector, handle


def add_mask_head(
    detector: nn.Module, handle: Handle | None, plug_in: BatchFormerSettings | None
) -> tuple[Any, Handle | None]:
    """Freeze a detector and put a new mask head on it.

    Args:
        detector: With the module in it or not; becomes a part of the network.
        handle: Of the module; it is taken out of the detector.
        plug_in: Puts the module, as it was trained and frozen, at the same places of the network; ``None``: without it.

    Returns:
        The network, in training mode, where the detector was; and the handle.
    """
    like, trained = next(detector.parameters()), []
    if handle is not None:
        trained = handle.modules
        handle.remove()
        handle = None
    network = with_masks(detector)
    if trained and plug_in is not None:
        after = [plug_in.after] if isinstance(plug_in.after, str) else plug_in.after or []
        inside = replace(plug_in, after=[f"{detector_inside(network)}.{name}" for name in after])
        handle = insert_plug_in(network, inside)
    for module, before in zip(handle.modules if handle else [], trained, strict=False):
        module.load_state_dict(before.state_dict())
        module.freeze()
    return network.to(device=like.device, dtype=like.dtype), handle
