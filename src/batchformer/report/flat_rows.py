"""Everything as flat records for CSV files: fractions, full precision, machine-friendly names."""

from collections.abc import Sequence

from .render import Cell
from .runs import BASELINE, TREATMENT, Comparison, Found, Run

__all__ = ["class_rows", "difference_rows", "result_rows"]


def result_rows(found: Found) -> list[dict[str, Cell]]:
    """One record per run, finished or not, for ``results.csv``."""
    rows = [_result_row(str(c.path), run) for c in found.comparisons for run in c.runs]
    rows += [_result_row("", run) for run in found.runs]
    for comparison in found.comparisons:
        for entry in comparison.left_out:
            who: dict[str, Cell] = {"comparison": str(comparison.path), "recipe": comparison.recipe}
            rows.append({**who, "arm": entry.arm, "seed": entry.seed, "status": entry.reason, "path": str(entry.path)})
    rows += [{"comparison": "", "status": entry.reason, "path": str(entry.path)} for entry in found.left_out]
    return rows


def _result_row(comparison: str, run: Run) -> dict[str, Cell]:
    row: dict[str, Cell] = {"comparison": comparison, "recipe": run.recipe, "arm": run.arm, "seed": run.seed}
    row.update({"status": "finished", "path": str(run.path), "date": run.date, "split": run.split})
    return {
        **row,
        "selection": run.selection,
        **run.metrics,
        **{f"cost_{name}": value for name, value in run.cost.items()},
    }


def difference_rows(comparisons: Sequence[Comparison]) -> list[dict[str, Cell]]:
    """One record per comparison, arm, reference and metric, for ``differences.csv`` (fractions, not percent)."""
    rows: list[dict[str, Cell]] = []
    for comparison in comparisons:
        pairs = [(arm, BASELINE) for arm in comparison.arms if arm != BASELINE]
        if TREATMENT in comparison.arms:
            pairs += [(TREATMENT, arm) for arm in comparison.controls]
        for arm, reference in pairs:
            for metric in comparison.metric_names:
                d = comparison.difference(arm, reference, metric)
                who: dict[str, Cell] = {"comparison": str(comparison.path), "arm": arm, "reference": reference}
                numbers: dict[str, Cell] = {"pairs": d.n, "mean": d.mean, "sd": d.sd, "low": d.low, "high": d.high}
                primary = metric == comparison.primary
                verdict = d.verdict if primary else "descriptive"
                rows.append({**who, "metric": metric, "primary": int(primary), **numbers, "verdict": verdict})
    return rows


def class_rows(found: Found) -> list[dict[str, Cell]]:
    """One record per run and class, for ``per_class.csv``."""
    runs = [(str(c.path), run) for c in found.comparisons for run in c.runs] + [("", run) for run in found.runs]
    rows: list[dict[str, Cell]] = []
    for where, run in runs:
        who: dict[str, Cell] = {"comparison": where, "recipe": run.recipe, "arm": run.arm, "seed": run.seed}
        for entry in run.per_class:
            named: dict[str, Cell] = {"class": entry.name, run.class_count.replace(" ", "_"): entry.count}
            rows.append({**who, **named, run.class_metric: entry.value})
    return rows
