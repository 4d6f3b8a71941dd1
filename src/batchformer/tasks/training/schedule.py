"""The optimizer of a run and its learning rate at each step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer

from .settings import OptimizerSettings

DIVERGED = (
    "Lower model.optimizer.lr, raise model.optimizer.warmup_epochs, clip with trainer.gradient_clip_val, or run with "
    "precision=32-true."
)
"""What to do about a loss or logits that are not finite; ends the error that reports them."""


def optimization(groups: Sequence[dict[str, Any]], settings: OptimizerSettings, trainer: Trainer) -> dict[str, Any]:
    """What ``configure_optimizers`` returns: SGD or AdamW, and the schedule, which steps with every batch.

    Args:
        groups: Parameter groups with their own ``lr`` and ``weight_decay`` (:func:`batchformer.param_groups`).
        settings: Optimizer, warm-up and schedule.
        trainer: Knows the number of steps.

    Raises:
        ValueError: For a group without parameters, which would train nothing.

    Example:
        >>> from types import SimpleNamespace
        >>> groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": 0.1, "name": "network"}]
        >>> trainer = SimpleNamespace(estimated_stepping_batches=20, max_epochs=5)
        >>> optimization(groups, OptimizerSettings(), trainer)["lr_scheduler"]["interval"]
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
    steps = max(1, int(trainer.estimated_stepping_batches))
    epoch_steps = max(1, steps // max(1, trainer.max_epochs or 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, epoch_steps, settings)
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def learning_rate_factor(step: int, steps: int, epoch_steps: int, settings: OptimizerSettings) -> float:
    """Learning rate over its peak at a step (from 0).

    Args:
        step: Optimizer steps done.
        steps: Of the whole run.
        epoch_steps: Of an epoch.
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
