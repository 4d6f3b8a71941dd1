"""The result of a run: what its task, its stages and its machine have to say after the test."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

from lightning.pytorch.cli import LightningCLI

from batchformer.core import BatchFormer
from batchformer.tasks.training.task import Task

from .callbacks import Cost
from .environment import environment, peak_memory_mb


def make_result(
    cli: LightningCLI, name: str, unit: str | None, measured: Sequence[Cost], stages: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return the content of result.json.

    Args:
        cli: Last stage of the run, after its test.
        name: Name of the recipe.
        unit: Name of what the run is on beside its seed; ``None`` for the seed alone.
        measured: Costs of the stages that this process has trained.
        stages: Records of all stages.
    """
    task = cast(Task, cli.model)
    module = sum(p.numel() for m in task.network.modules() if isinstance(m, BatchFormer) for p in m.parameters())
    total = sum(p.numel() for p in task.network.parameters())
    host = environment(str(cli.trainer.precision))
    peak = peak_memory_mb(cli.trainer.strategy.root_device)
    return {
        "recipe": name,
        "arm": task.batchformer.arm,
        "seed": task.seed,
        "unit": None if unit is None else {"name": unit},
        "primary": task.primary,
        "measures": [asdict(measure) for measure in task.measures],
        "metrics": tested(cli.trainer.callback_metrics),
        "class_metric": task.class_metric,
        "class_count": task.class_count,
        "per_class": [{**asdict(entry), "value": _defined(entry.value)} for entry in task.class_results()],
        "stages": stages,
        "cost": {
            # A median over the steps of several stages would be a time of neither.
            "step_ms": measured[-1].step_ms() if len(stages) == 1 else None,
            "peak_memory_mb": peak,
            "training_memory_mb": measured[0].memory_over_start_mb(peak),
            "parameters_train": max([total, *(stage["parameters_train"] or 0 for stage in stages)]),
            "parameters_test": total - module,
            "train_seconds": sum(stage["train_seconds"] for stage in stages),
            "test_ms_per_image": 1000 * task.test_seconds / max(1, task.test_images),
        },
        "selection": "last epoch",
        "split": "test",
        "data": task.fingerprints,
        "notes": task.notes(),
        "date": host["date"],
        "host": {**host["hardware"], "precision": host["precision"], "torch": host["versions"].get("torch")},
    }


def tested(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the test metrics by name; ``None`` where they are not defined, since strict JSON has no NaN."""
    named = {name.removeprefix("test_"): float(value) for name, value in metrics.items() if name.startswith("test_")}
    return {name: _defined(value) for name, value in named.items()}


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value  # strict JSON has no NaN
