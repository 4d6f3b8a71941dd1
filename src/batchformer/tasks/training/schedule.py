"""The optimizer of a run and its learning rate at each step."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from .settings import OptimizerSettings

DIVERGED = (
    "Lower model.optimizer.lr, raise model.optimizer.warmup_epochs, clip with trainer.gradient_clip_val, or run with "
    "precision=32-true."
)
"""Advice at the end of the error about a loss or outputs that are not finite."""


def optimization(
    groups: Sequence[dict[str, Any]],
    settings: OptimizerSettings,
    *,
    steps: int,
    epochs: int,
) -> dict[str, Any]:
    """Return what ``configure_optimizers`` returns: SGD or AdamW, and the schedule, which moves on with every batch.

    Args:
        groups: Parameter groups with their own ``lr`` and ``weight_decay`` (:func:`batchformer.param_groups`).
        settings: Optimizer, warm-up and schedule.
        steps: Optimizer steps that the schedule runs over.
        epochs: Epochs that these steps are.

    Raises:
        ValueError: For a group without parameters, which would train nothing.

    Example:
        >>> groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.1, "name": "network"}]
        >>> optimization(groups, OptimizerSettings(), steps=20, epochs=5)["lr_scheduler"]["interval"]
        'step'
    """
    if empty := [str(group.get("name", place)) for place, group in enumerate(groups) if not group["params"]]:
        raise ValueError(
            f"Expected parameters to train in every group, got none in {', '.join(empty)}. Leave the group out, or see "
            "that its part of the network is not frozen."
        )
    optimizer: torch.optim.Optimizer
    if settings.name == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov)
    else:
        optimizer = torch.optim.AdamW(groups)
    steps = max(1, steps)
    epoch_steps = max(1, steps // max(1, epochs))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, epoch_steps, settings)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_factor(step: int, steps: int, epoch_steps: int, settings: OptimizerSettings) -> float:
    """Return the learning rate at a step as a fraction of its peak.

    Args:
        step: Optimizer steps that are done, from 0.
        steps: Optimizer steps of the whole schedule.
        epoch_steps: Optimizer steps of an epoch.
        settings: Warm-up and schedule.

    Example:
        >>> [round(learning_rate_factor(s, 10, 2, OptimizerSettings(warmup_epochs=1)), 3) for s in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    warmup = round(settings.warmup_epochs * epoch_steps)
    stride = epoch_steps if settings.per_epoch else 1
    step = step // stride * stride
    if step < warmup:
        return settings.warmup_start + (1 - settings.warmup_start) * min(1.0, (step + stride) / warmup)
    if settings.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warmup) / max(1, steps - warmup))))
    if settings.schedule == "step":
        return float(settings.gamma ** sum(step >= epoch * epoch_steps for epoch in settings.milestones))
    return 1.0
