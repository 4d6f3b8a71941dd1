"""Metrics as the command line shows them while runs go on; reports have their own, longer way."""

from collections.abc import Mapping, Sequence

from batchformer.tasks.training.contract import Measure


def shown(name: str, value: float | None, measures: Sequence[Measure]) -> str:
    """Return a metric as text: its name, its value and its unit.

    Args:
        name: Name of the metric; one on a further test split has the split in front, as in ``unseen_AP``.
        value: Its value; ``None`` where it is not defined.
        measures: Measures of the task.

    Example:
        >>> measures = [Measure("top1", "top-1"), Measure("mae", "mean absolute error", unit="years")]
        >>> shown("top1", 0.8247, measures), shown("unseen_mae", 3.2, measures)
        ('top1 82.47 %', 'unseen_mae 3.2 years')
    """
    if value is None:
        return f"{name} undefined"
    fitting = [one for one in measures if name == one.name or name.endswith(f"_{one.name}")]
    # The longest name fits best: `mask_AP` is no `AP` of a split `mask`.
    unit = max(fitting, key=lambda one: len(one.name)).unit if fitting else ""
    if unit == "%":
        return f"{name} {100 * value:.2f} %"
    return f"{name} {value:.4g} {unit}".rstrip()


def line(metrics: Mapping[str, float | None], measures: Sequence[Measure]) -> str:
    """Return all metrics of a run in one line."""
    return ", ".join(shown(name, value, measures) for name, value in metrics.items())
