"""Everything as flat records for CSV files: values as in the run folders, full precision, machine-friendly names."""

from collections.abc import Sequence

from .render import Cell
from .runs import BASELINE, TREATMENT, Comparison, Found, Run

__all__ = ["class_rows", "difference_rows", "result_rows"]


def result_rows(found: Found) -> list[dict[str, Cell]]:
    """One record for each run, finished or not, for ``results.csv``."""
    rows = [_result_row(str(c.path), run) for c in found.comparisons for run in c.runs]
    rows += [_result_row("", run) for run in found.runs]
    for comparison in found.comparisons:
        for entry in comparison.left_out:
            who: dict[str, Cell] = {"comparison": str(comparison.path), "recipe": comparison.recipe}
            who |= {"arm": entry.arm, "seed": entry.seed, "unit": entry.unit}
            rows.append({**who, "status": entry.reason, "path": str(entry.path)})
    rows += [{"comparison": "", "status": entry.reason, "path": str(entry.path)} for entry in found.left_out]
    return rows


def _identity(comparison: str, run: Run) -> dict[str, Cell]:
    return {"comparison": comparison, "recipe": run.recipe, "arm": run.arm, "seed": run.seed, "unit": run.unit}


def _result_row(comparison: str, run: Run) -> dict[str, Cell]:
    row = _identity(comparison, run)
    row.update({"status": "finished", "path": str(run.path), "date": run.date, "split": run.split})
    stages: dict[str, Cell] = {}
    if len(run.stages) > 1:
        for stage in run.stages:
            stages[f"cost_{stage.name}_step_ms"] = stage.step_ms
            stages[f"cost_{stage.name}_train_seconds"] = stage.train_seconds
    return {
        **row,
        "selection": run.selection,
        **run.metrics,
        **{f"cost_{name}": value for name, value in run.cost.items()},
        **stages,
    }


def difference_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Cell]]:
    """One record for each comparison, arm, reference, metric and unit, for ``differences.csv``.

    The record with an empty unit is the mean over all units of a seed; where a comparison has units, those of each
    stand beside it.
    """
    rows: list[dict[str, Cell]] = []
    for comparison in comparisons:
        pairs = [(arm, BASELINE) for arm in comparison.arms if arm != BASELINE]
        if TREATMENT in comparison.arms:
            pairs += [(TREATMENT, arm) for arm in comparison.controls]
        units = [None, *(unit.name for unit in comparison.units)] if comparison.has_units else [None]
        for arm, reference in pairs:
            for metric in comparison.metric_names:
                rows += [_difference_row(comparison, arm, reference, metric, unit) for unit in units]
    return rows


def _difference_row(comparison: Comparison, arm: str, reference: str, metric: str, unit: str | None) -> dict[str, Cell]:
    d = comparison.difference(arm, reference, metric, unit)
    primary = metric == comparison.primary
    skipped = arm == TREATMENT and reference in [step.reference for step in comparison.steps if not step.asked]
    return {
        "comparison": str(comparison.path),
        "arm": arm,
        "reference": reference,
        "unit": unit or "",
        "metric": metric,
        "primary": int(primary),
        "pairs": d.n,
        "mean": d.mean,
        "sd": d.sd,
        "low": d.low,
        "high": d.high,
        "confidence": d.confidence,
        "verdict": "descriptive" if not primary or unit is not None else "not asked" if skipped else d.words,
    }


def class_rows(found: Found) -> list[dict[str, Cell]]:
    """One record for each run and class, for ``per_class.csv``."""
    runs = [(str(c.path), run) for c in found.comparisons for run in c.runs] + [("", run) for run in found.runs]
    rows: list[dict[str, Cell]] = []
    for where, run in runs:
        for entry in run.per_class:
            named: dict[str, Cell] = {"class": entry.name, run.class_count.replace(" ", "_"): entry.count}
            rows.append({**_identity(where, run), **named, run.class_metric: entry.value})
    return rows
