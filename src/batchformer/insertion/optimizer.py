"""Parameter groups for an optimizer, with multipliers for the parameters of BatchFormer."""

from typing import Any

from torch import nn

from batchformer.core.streams import MixedStream


def param_groups(
    model: nn.Module,
    lr: float,
    *,
    batchformer_lr_mult: float = 1.0,
    weight_decay: float = 0.0,
    batchformer_weight_decay_mult: float = 1.0,
    decay_norm_and_bias: bool = True,
) -> list[dict[str, Any]]:
    """Make parameter groups for any optimizer, with multipliers for the parameters of BatchFormer.

    The author's advice against overfitting "the pattern of sample relationships" is a smaller learning rate or a
    larger weight decay for the module (the Balanced Softmax runs used a tenth of the learning rate).

    Args:
        model: Model with BatchFormer inserted or built in.
        lr: Learning rate of the network, at least 0.
        batchformer_lr_mult: Learning rate of the module divided by ``lr``, at least 0.
        weight_decay: Weight decay of the network, at least 0.
        batchformer_weight_decay_mult: Weight decay of the module divided by ``weight_decay``, at least 0.
        decay_norm_and_bias: True if vectors (norms, biases) decay as matrices do.

    Returns:
        Groups named ``network`` and ``batchformer``, and with ``decay_norm_and_bias=False`` also
        ``network_no_decay`` and ``batchformer_no_decay``. Each trained parameter is in exactly one group; empty groups
        are left out.

    Raises:
        ValueError: For a negative number, for a multiplier with a model without BatchFormer, or for a model without
            trained parameters.

    Example:
        >>> from batchformer import BatchFormer
        >>> model = nn.Sequential(nn.Linear(4, 8), BatchFormer(8))
        >>> [(g["name"], g["lr"]) for g in param_groups(model, lr=1.0, batchformer_lr_mult=0.1)]
        [('network', 1.0), ('batchformer', 0.1)]
    """
    numbers = {
        "lr": lr,
        "batchformer_lr_mult": batchformer_lr_mult,
        "weight_decay": weight_decay,
        "batchformer_weight_decay_mult": batchformer_weight_decay_mult,
    }
    if wrong := [f"{name}={value}" for name, value in numbers.items() if not value >= 0]:
        raise ValueError(f"Expected rates and multipliers of at least 0, got {', '.join(wrong)}.")
    modules = [m for m in model.modules() if isinstance(m, MixedStream)]
    own = {id(p) for m in modules for p in m.parameters()}
    if not modules and (batchformer_lr_mult, batchformer_weight_decay_mult) != (1.0, 1.0):
        raise ValueError("Expected a model with a BatchFormer for these multipliers, found none. Call insert() first.")
    groups: dict[str, dict[str, Any]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        mine = id(parameter) in own
        decays = decay_norm_and_bias or parameter.dim() > 1
        name = ("batchformer" if mine else "network") + ("" if decays else "_no_decay")
        decay = weight_decay * (batchformer_weight_decay_mult if mine else 1.0) if decays else 0.0
        rate = lr * (batchformer_lr_mult if mine else 1.0)
        group = groups.setdefault(name, {"name": name, "params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise ValueError("Expected trained parameters, but all of the model's are frozen (requires_grad=False).")
    return list(groups.values())
