"""The tables of a report, built from comparisons and runs; :mod:`batchformer.report.render` writes them out."""

import math
import statistics as stdlib_statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .caveats import caveats
from .paired import PairedDifference, Summary, summarize
from .render import WIDTH, Table, to_text, wrap
from .runs import BASELINE, TREATMENT, Comparison, Run, higher_is_better
from .sentences import arm_text, conclusions, label, multiple_comparisons, points, verdict_text

__all__ = [
    "class_lines",
    "comparison_text",
    "controls_table",
    "cost_table",
    "difference_table",
    "main_table",
    "per_class_table",
    "runs_table",
]

_NONE = "n/a"


def percent(summary: Summary) -> str:
    """Mean ± sample standard deviation in percent; without the deviation for a single value."""
    if summary.n == 0:
        return _NONE
    mean = f"{100 * summary.mean:.2f}"
    return mean if summary.n == 1 else f"{mean} ± {100 * summary.sd:.2f}"


def _points(difference: PairedDifference) -> str:
    return points(difference.mean) if difference.n else _NONE


def _interval(difference: PairedDifference) -> str:
    return f"[{points(difference.low)}, {points(difference.high)}]" if difference.has_interval else "none"


def main_table(comparison: Comparison) -> Table:
    """Arms x metrics: mean ± deviation in percent, difference to plain with interval, verdict on the primary metric.

    Example:
        >>> from pathlib import Path
        >>> runs = (Run(Path(), "r", "plain", 0, {"top1": 0.7}), Run(Path(), "r", "batchformer", 0, {"top1": 0.8}))
        >>> main_table(Comparison(Path(), "r", ("plain", "batchformer"), (0,), "top1", runs)).rows[1]
        ('batchformer', '1 of 1', '80.00', '+10.00', 'none', 'too few seeds')
    """
    primary, *others = comparison.metric_names
    columns = (
        "arm",
        "seeds",
        label(primary),
        "vs plain",
        "95 % interval",
        "verdict",
        *(label(name) for name in others),
    )
    rows = []
    for arm in comparison.arms:
        done = len(comparison.of(arm))
        if arm == BASELINE or not comparison.of(BASELINE):
            compared = ("", "", "")
        else:
            difference = comparison.difference(arm, BASELINE, primary)
            compared = (_points(difference), _interval(difference), verdict_text(difference))
        summaries = [percent(summarize([*comparison.values(arm, name).values()])) for name in (primary, *others)]
        rows.append((arm, f"{done} of {len(comparison.seeds)}", summaries[0], *compared, *summaries[1:]))
    notes = (
        "Percent, mean ± sample standard deviation over seeds; differences in percentage points, paired by seed.",
        *_unpaired_notes(comparison),
    )
    return Table(f"{comparison.recipe}: plain and +BatchFormer", columns, tuple(rows), notes)


def _unpaired_notes(comparison: Comparison) -> list[str]:
    notes = []
    for arm in comparison.arms:
        difference = comparison.difference(arm, BASELINE, comparison.primary)
        if arm != BASELINE and difference.unpaired and difference.n:
            seeds = ", ".join(str(seed) for seed in difference.unpaired)
            notes.append(f"{arm}: difference over {difference.n} pairs; seed {seeds} is finished in one arm only.")
    return notes


def difference_table(comparison: Comparison) -> Table:
    """Differences to plain on the metrics other than the primary one, without verdicts."""
    names = comparison.metric_names[1:]
    rows = []
    for arm in comparison.arms:
        if arm != BASELINE and comparison.of(arm) and comparison.of(BASELINE):
            differences = [comparison.difference(arm, BASELINE, name) for name in names]
            cells = (f"{_points(d)} {_interval(d)}" if d.has_interval else _points(d) for d in differences)
            rows.append((arm, *cells))
    lower = [label(name) for name in names if not higher_is_better(name)]
    notes = ["Percentage points with 95 % intervals, paired by seed, not corrected for their number: descriptive."]
    if lower:
        notes.append(f"Lower is better: {', '.join(lower)}.")
    return Table(
        "Other metrics, difference to plain", ("arm", *(label(name) for name in names)), tuple(rows), tuple(notes)
    )


def controls_table(comparison: Comparison) -> Table:
    """BatchFormer against each control on the primary metric."""
    rows = []
    for arm in comparison.controls:
        difference = comparison.difference(TREATMENT, arm, comparison.primary)
        cells = (_points(difference), _interval(difference), str(difference.n), verdict_text(difference))
        rows.append((arm, *cells, arm_text(comparison, arm)))
    columns = ("control", "BatchFormer minus it", "95 % interval", "pairs", "verdict", "what the control is")
    metric = label(comparison.primary)
    note = f"Percentage points of {metric}; 'improves' means that BatchFormer does better than the control."
    return Table("Controls", columns, tuple(rows), (note,))


_COST_COLUMNS = (
    ("step_ms", "time per step (ms)", "{:.1f}"),
    ("peak_memory_mb", "peak memory (MB)", "{:,.0f}"),
    ("training_memory_mb", "above start of training (MB)", "{:,.0f}"),
    ("parameters_train", "all parameters in training", "{:,.0f}"),
    ("parameters_test", "all parameters at test", "{:,.0f}"),
    ("test_ms_per_image", "test (ms per image)", "{:.3f}"),
    ("train_seconds", "training (s)", "{:,.0f}"),
)


_TIMES = ("step_ms", "test_ms_per_image", "train_seconds")


def cost_table(comparison: Comparison) -> Table:
    """What each arm costs: medians over seeds, and the step time as a multiple of plain's on the same seeds."""
    rows = []
    for arm in comparison.arms:
        runs = comparison.of(arm)
        cells = [_middle(_finite(runs, name), form, spread=name in _TIMES) for name, _, form in _COST_COLUMNS]
        ratio = _middle(_step_ratios(comparison, arm), "{:.2f}", spread=arm != BASELINE)
        rows.append((arm, cells[0], ratio, *cells[1:]))
    titles = [title for _, title, _ in _COST_COLUMNS]
    spread = "lowest to highest in brackets" if len(comparison.seeds) > 1 else "one seed, so no spread is known"
    notes = (
        f"Medians over seeds, {spread}; the ratio is that of runs on the same seed.",
        "Times are wall-clock times of runs one after the other: what else the machine did meanwhile is in them.",
        "Peak memory is that of the whole process, libraries included, on a GPU that of its tensors; above start of "
        "training: without what was there before the first step.",
        "All parameters are those of the network, frozen ones too; the module's are there in training only.",
    )
    return Table("Cost", ("arm", titles[0], "ratio to plain", *titles[1:]), tuple(rows), notes)


def _finite(runs: Sequence[Run], name: str) -> list[float]:
    return [run.cost[name] for run in runs if math.isfinite(run.cost.get(name, math.nan))]


def _middle(values: Sequence[float], form: str, *, spread: bool) -> str:
    if not values:
        return _NONE
    middle = form.format(stdlib_statistics.median(values))
    lowest, highest = form.format(min(values)), form.format(max(values))
    return f"{middle} [{lowest} to {highest}]" if spread and len(values) > 1 else middle


def _step_ratios(comparison: Comparison, arm: str) -> list[float]:
    base = {run.seed: run.cost.get("step_ms", math.nan) for run in comparison.of(BASELINE)}
    ratios = [run.cost.get("step_ms", math.nan) / base[run.seed] for run in comparison.of(arm) if base.get(run.seed)]
    return [ratio for ratio in ratios if math.isfinite(ratio)]


@dataclass(frozen=True)
class _ClassLine:
    name: str
    count: float
    value: dict[str, Summary]  # by arm


def class_lines(comparison: Comparison, arms: Sequence[str]) -> list[_ClassLine]:
    """Per class the mean value of each arm over its seeds; the classes with most training data first."""
    counts: dict[str, list[int]] = {}
    values: dict[str, dict[str, list[float]]] = {}
    for run in comparison.runs:
        for entry in run.per_class:
            counts.setdefault(entry.name, []).append(entry.count)
            values.setdefault(entry.name, {}).setdefault(run.arm, []).append(entry.value)
    lines = [
        _ClassLine(name, sum(found) / len(found), {arm: summarize(values[name].get(arm, [])) for arm in arms})
        for name, found in counts.items()
    ]
    return sorted(lines, key=lambda line: -line.count)


def per_class_table(comparison: Comparison, limit: int = 40) -> Table:
    """The metric of each class, of plain and +BatchFormer.

    Args:
        comparison: Runs without per-class results are passed over.
        limit: With more classes than this, the ones that change most are shown, and the table says so.
    """
    arms = [arm for arm in (BASELINE, TREATMENT) if comparison.of(arm)]
    lines = class_lines(comparison, arms)
    shown, notes = lines, ["Percent, mean ± sample standard deviation over seeds; descriptive, no intervals."]
    if len(lines) > limit:
        by_change = sorted(lines, key=lambda line: -abs(_change(line)) if math.isfinite(_change(line)) else math.inf)
        shown = [line for line in lines if line in by_change[:limit]]
        notes.append(f"{limit} of {len(lines)} classes: those that change most. All are in per_class.csv.")
    rows = []
    for line in shown:
        change = points(_change(line)) if math.isfinite(_change(line)) else _NONE
        cells = [percent(line.value[arm]) for arm in arms]
        rows.append((line.name, f"{line.count:g}", *cells, *([change] if len(arms) == 2 else [])))
    columns = ("class", comparison.class_count, *arms, *(["difference"] if len(arms) == 2 else []))
    metric = label(comparison.class_metric)
    return Table(f"{metric[0].upper()}{metric[1:]} per class", columns, tuple(rows), tuple(notes))


def _change(line: _ClassLine) -> float:
    if BASELINE not in line.value or TREATMENT not in line.value:
        return math.nan
    return line.value[TREATMENT].mean - line.value[BASELINE].mean


def runs_table(runs: Sequence[Run]) -> Table:
    """Unrelated runs, one row each, without paired claims."""
    names = Comparison(runs[0].path, "", (), (), next(iter(runs[0].metrics), ""), tuple(runs)).metric_names
    rows = []
    for run in runs:
        cells = [percent(summarize([run.metrics.get(name, math.nan)])) for name in names]
        rows.append((run.path.name, run.recipe, run.arm, str(run.seed), *cells))
    notes = ["Percent. One row per run: these runs are not a comparison, so no differences are claimed."]
    for what in ("recipe", "split", "selection"):
        values = sorted({str(getattr(run, what)) for run in runs})
        if len(values) > 1:
            notes.append(f"The runs differ in {what} ({', '.join(values)}): their numbers may not be comparable.")
    return Table("Runs", ("run", "recipe", "arm", "seed", *(label(name) for name in names)), tuple(rows), tuple(notes))


def comparison_text(comparison: Comparison, width: int = WIDTH) -> str:
    """A whole comparison for the terminal: conclusions, tables, caveats."""
    parts = [to_text(main_table(comparison), width)]
    if comparison.controls:
        table = controls_table(comparison)
        parts.append(
            to_text(Table(table.title, table.columns[:-1], tuple(r[:-1] for r in table.rows), table.notes), width)
        )
    parts.append(to_text(cost_table(comparison), width))
    for title, lines in (
        ("In words", [*conclusions(comparison), multiple_comparisons(comparison)]),
        ("Caveats", caveats(comparison)),
    ):
        if lines:
            parts.append("\n".join([title, *(wrap(f"- {line}", width, "  ") for line in lines)]) + "\n")
    return "\n".join(parts)
