"""Parameter groups: backbone, transformer, sampling points and BatchFormer have separate learning rates."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from batchformer.core import BatchFormer
from batchformer.tasks.training.settings import BatchFormerSettings, OptimizerSettings

from .backbone import Backbone

__all__ = ["DetectorOptimizerSettings", "parameter_groups"]

_SAMPLING = ("sampling_offsets", "reference_points")


@dataclass
class DetectorOptimizerSettings(OptimizerSettings):
    """Optimizer and schedule of a detector; the defaults are DETR's for 50 epochs.

    Attributes:
        backbone_lr: Peak learning rate of the backbone, at least 0.
        sampling_lr_mult: Learning rate of Deformable DETR's sampling offsets and reference points, as a multiple of
            ``lr``.
    """

    name: Literal["sgd", "adamw"] = "adamw"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "step", "constant"] = "step"
    backbone_lr: float = 1e-5
    sampling_lr_mult: float = 0.1


def parameter_groups(
    network: nn.Module, settings: DetectorOptimizerSettings, batchformer: BatchFormerSettings
) -> list[dict[str, Any]]:
    """Sort the parameters that train into groups for the optimizer; each is in exactly one.

    Args:
        network: Network with or without BatchFormer in it.
        settings: Learning rates and weight decay.
        batchformer: Multipliers of BatchFormer's learning rate and weight decay.

    Returns:
        Those of the groups ``network``, ``backbone``, ``sampling`` and ``batchformer`` that the network has; where
        norms and biases do not decay, they are in groups of their own, such as ``network_no_decay``.

    Raises:
        ValueError: When a backbone that should train has nothing to train, or nothing trains at all.

    Source:
        DETR, section 4 (backbone 1e-5, transformer 1e-4); Deformable DETR, section 5 (sampling times 0.1).

    Example:
        >>> network = nn.ModuleDict({"bbox": nn.Linear(4, 4), "sampling_offsets": nn.Linear(4, 4)})
        >>> groups = parameter_groups(network, DetectorOptimizerSettings(), BatchFormerSettings())
        >>> [(group["name"], round(group["lr"], 6), len(group["params"])) for group in groups]
        [('network', 0.0001, 2), ('sampling', 1e-05, 2)]
    """
    backbones = [module for module in network.modules() if isinstance(module, Backbone)]
    for backbone in backbones:
        if backbone.trains != "nothing" and not any(p.requires_grad for p in backbone.parameters()):
            raise ValueError(
                f"Expected parameters to train in the backbone (trains={backbone.trains!r}), but all are frozen. Set "
                "model.network.backbone.trains=nothing, or remove the code that froze them."
            )
    owners = {id(p): "backbone" for module in backbones for p in module.parameters()}
    owners |= {id(p): "batchformer" for m in network.modules() if isinstance(m, BatchFormer) for p in m.parameters()}
    rates = {
        "network": settings.lr,
        "backbone": settings.backbone_lr,
        "sampling": settings.lr * settings.sampling_lr_mult,
        "batchformer": settings.lr * batchformer.lr_mult,
    }
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = owners.get(id(parameter), "sampling" if any(word in name for word in _SAMPLING) else "network")
        decays = settings.decay_norm_and_bias or parameter.dim() > 1
        decay = settings.weight_decay * (batchformer.weight_decay_mult if owner == "batchformer" else 1.0) * decays
        key = owner if decays else f"{owner}_no_decay"
        group = groups.setdefault(key, {"name": key, "params": [], "lr": rates[owner], "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise ValueError("Expected parameters to train, but all of the network's are frozen.")
    return list(groups.values())
