"""Who learns how fast: the backbone slower than the transformer, Deformable DETR's sampling points slower too."""

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
    """Optimizer and schedule of a detector; the values are DETR's for 50 epochs.

    Attributes:
        backbone_lr: Peak learning rate of the backbone.
        sampling_lr_mult: Learning rate of Deformable DETR's sampling offsets and reference points over the rest's.
    """

    name: Literal["sgd", "adamw"] = "adamw"
    lr: float = 1e-4
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "step", "constant"] = "step"
    backbone_lr: float = 1e-5
    sampling_lr_mult: float = 0.1


def parameter_groups(
    network: nn.Module, settings: DetectorOptimizerSettings, plug_in: BatchFormerSettings
) -> list[dict[str, Any]]:
    """Groups for the optimizer; every parameter that trains is in exactly one.

    Args:
        network: With the module in it or not.
        settings: Learning rates and decay.
        plug_in: The module's multipliers.

    Returns:
        Out of ``network``, ``backbone``, ``sampling`` and ``batchformer``, those that the network has.

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
                "backbone.trains='nothing', or see what froze them."
            )
    owners = {id(p): "backbone" for module in backbones for p in module.parameters()}
    owners |= {id(p): "batchformer" for m in network.modules() if isinstance(m, BatchFormer) for p in m.parameters()}
    rates = {
        "network": settings.lr,
        "backbone": settings.backbone_lr,
        "sampling": settings.lr * settings.sampling_lr_mult,
        "batchformer": settings.lr * plug_in.lr_mult,
    }
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        owner = owners.get(id(parameter), "sampling" if any(word in name for word in _SAMPLING) else "network")
        decays = settings.decay_norm_and_bias or parameter.dim() > 1
        decay = settings.weight_decay * (plug_in.weight_decay_mult if owner == "batchformer" else 1.0) * decays
        key = owner if decays else f"{owner}_no_decay"
        group = groups.setdefault(key, {"name": key, "params": [], "lr": rates[owner], "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise ValueError("Expected parameters to train, but all of the network's are frozen.")
    return list(groups.values())
