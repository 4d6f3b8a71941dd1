"""The tables of a report, built from comparisons and runs; :mod:`batchformer.report.render` writes them out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .measures import (
    INTERVAL,
    as_percent,
    difference_units,
    find_measure,
    heads,
    lower_is_better_note,
    order_metrics,
    units_note,
)
from .paired import CONFIDENCE, PairedDifference, Summary, summarize
from .render import Table, in_words
from .runs import BASELINE, TREATMENT, Comparison, Run
from .sentences import arm_text, stop_sentence, verdict_text

__all__ = [
    "class_lines",
    "controls_table",
    "difference_table",
    "main_table",
    "per_class_table",
    "runs_table",
    "units_table",
]


def main_table(comparison: Comparison) -> Table:
    """Arms x metrics: mean ± deviation, difference to plain with interval, verdict on the primary metric.

    Example:
        >>> from pathlib import Path
        >>> runs = (Run(Path(), "r", "plain", 0, {"top1": 0.7}), Run(Path(), "r", "batchformer", 0, {"top1": 0.8}))
        >>> main_table(Comparison(Path(), "r", ("plain", "batchformer"), (0,), "top1", runs)).rows[1]
        ('batchformer', '1 of 1', '80.00', '+10.00', 'none', 'too few seeds')
    """
    names = comparison.metric_names
    measures = [comparison.measure(name) for name in names]
    rows = []
    for arm in comparison.arms:
        if arm == BASELINE or not comparison.of(BASELINE):
            compared = ("", "", "")
        else:
            difference = comparison.difference(arm, BASELINE, names[0])
            compared = (measures[0].mean(difference), measures[0].interval(difference), verdict_text(difference))
        first, *others = (
            measure.spread(summarize([*comparison.values(arm, name).values()]))
            for name, measure in zip(names, measures, strict=True)
        )
        done = f"{len(comparison.seeds_of(arm))} of {len(comparison.seeds)}"
        rows.append((arm, done, first, *compared, *others))
    head, *other_heads = heads(measures)
    columns = ("arm", "seeds", head, "vs plain", INTERVAL, "verdict", *other_heads)
    notes = (
        f"{units_note(measures)}, mean ± sample standard deviation over seeds; differences in "
        f"{difference_units(measures[:1])}, paired by seed.",
        *lower_is_better_note(measures),
        *_simultaneous_notes(comparison),
        *_margin_notes(comparison),
        *_units_notes(comparison),
        *_unpaired_notes(comparison),
    )
    return Table(f"{comparison.recipe}: plain and +BatchFormer", columns, tuple(rows), notes)


def _margin_notes(comparison: Comparison) -> list[str]:
    if comparison.margin is None:
        return []
    measure = comparison.measure(comparison.primary)
    margin = measure.amount(measure.unscaled(comparison.margin))
    return [
        f"Verdicts use the margin of {margin}. Better or worse: the whole interval lies beyond the margin. Practically "
        "equal: the whole interval is closer to zero than the margin (two one-sided tests, each at the level 0.025). "
        f"Undecided: the interval reaches from one of these regions into another. The {INTERVAL} is used for all."
    ]


def _units_notes(comparison: Comparison) -> list[str]:
    if not comparison.has_units:
        return []
    names = in_words([unit.label for unit in comparison.units])
    return [
        f"A seed counts once, with its mean over {names}, and only when all of these runs are finished: runs of one "
        "seed are not independent."
    ]


def _unpaired_notes(comparison: Comparison) -> list[str]:
    notes = []
    for arm in comparison.arms:
        difference = comparison.difference(arm, BASELINE, comparison.primary)
        if arm != BASELINE and difference.unpaired and difference.n:
            one = len(difference.unpaired) == 1
            seeds = ", ".join(str(seed) for seed in difference.unpaired)
            notes.append(
                f"{arm}: the difference is over {difference.n} {'pair' if difference.n == 1 else 'pairs'}, since "
                f"{'seed' if one else 'seeds'} {seeds} {'is' if one else 'are'} finished in one arm only."
            )
    return notes


def difference_table(comparison: Comparison) -> Table:
    """Differences to plain on the metrics other than the primary one, without verdicts."""
    names = comparison.metric_names[1:]
    measures = [comparison.measure(name) for name in names]
    rows = []
    for arm in comparison.arms:
        if arm != BASELINE and comparison.of(arm) and comparison.of(BASELINE):
            cells = []
            for name, measure in zip(names, measures, strict=True):
                difference = comparison.difference(arm, BASELINE, name)
                interval = f" {measure.interval(difference)}" if difference.has_interval else ""
                cells.append(measure.mean(difference) + interval)
            rows.append((arm, *cells))
    units = difference_units(measures)
    notes = (
        f"{units[0].upper()}{units[1:]} with {INTERVAL}s, paired by seed. These intervals are descriptive and not "
        "corrected for their number.",
        *lower_is_better_note(measures),
    )
    return Table("Other metrics, difference to plain", ("arm", *heads(measures)), tuple(rows), notes)


def units_table(comparison: Comparison) -> Table:
    """The primary metric on each unit (target domain, split) with its differences to plain, paired by seed."""
    measure = comparison.measure(comparison.primary)
    rows = []
    for unit in comparison.units:
        for arm in comparison.arms:
            values = comparison.values(arm, comparison.primary, unit.name)
            compared = ("", "")
            if arm != BASELINE and comparison.of(BASELINE):
                difference = comparison.difference(arm, BASELINE, comparison.primary, unit.name)
                compared = (measure.mean(difference), measure.interval(difference))
            done = f"{len(values)} of {len(comparison.seeds)}"
            rows.append((unit.label, arm, done, measure.spread(summarize([*values.values()])), *compared))
    columns = ("unit", "arm", "seeds", *heads([measure]), "vs plain", INTERVAL)
    notes = (
        f"{units_note([measure])}, mean ± sample standard deviation over seeds; differences in "
        f"{difference_units([measure])}, paired by seed on the same unit. They are descriptive and carry no verdict.",
        *lower_is_better_note([measure]),
    )
    return Table(f"{_capital(measure.label)} on each unit", columns, tuple(rows), notes, leading=2)


def controls_table(comparison: Comparison) -> Table:
    """The questions of the sequence in their order, and the comparisons of BatchFormer beside it."""
    measure = comparison.measure(comparison.primary)
    rows = []
    for number, step in enumerate(comparison.steps, 1):
        words = verdict_text(step.difference) if step.asked else "not asked"
        rows.append((step.reference, str(number), *_against(comparison, step.difference, step.reference, words)))
    for arm, reference in comparison.beside:
        if arm == TREATMENT:
            difference = comparison.difference(arm, reference, comparison.primary)
            rows.append((reference, "beside", *_against(comparison, difference, reference, verdict_text(difference))))
    columns = ("reference", "question", "BatchFormer minus it", INTERVAL, "pairs", "verdict", "what the reference is")
    units = difference_units([measure])
    notes = (
        f"{_capital(units)} of {measure.label}; 'improves' and 'better' mean that BatchFormer does better than the "
        "reference.",
        *lower_is_better_note([measure]),
        "Each question is asked only when the one before it showed a gain, with an interval that excludes zero. So "
        f"each keeps its full {INTERVAL}, and all together claim a false gain in at most 1 of 20 comparisons. Numbers "
        "of a question that was not asked are descriptive.",
        stop_sentence(comparison.steps),
    )
    return Table("Where a gain comes from", columns, tuple(rows), notes)


def _against(comparison: Comparison, difference: PairedDifference, reference: str, words: str) -> tuple[str, ...]:
    measure = comparison.measure(comparison.primary)
    cells = (measure.mean(difference), measure.interval(difference), str(difference.n), words)
    return (*cells, arm_text(comparison, reference))


def _simultaneous_notes(comparison: Comparison) -> list[str]:
    differences = [comparison.difference(*pair, comparison.primary) for pair in comparison.beside]
    if len(differences) < 2 or not any(difference.has_interval for difference in differences):
        return []
    each = as_percent(comparison.beside_confidence)
    return [
        f"Intervals of controls are wider, at {each} each, so that all {len(comparison.beside)} comparisons beside the "
        f"main questions hold at once in {as_percent(CONFIDENCE)} of cases (Bonferroni)."
    ]


@dataclass(frozen=True)
class ClassLine:
    """One class in all arms.

    Attributes:
        name: Name of the class.
        count: Mean amount of training data over the runs.
        value: Arm -> summary over seeds of the class's values, in the unit of the class measure.
    """

    name: str
    count: float
    value: dict[str, Summary]

    @property
    def change(self) -> float:
        """Mean of BatchFormer minus mean of plain; NaN without both."""
        if BASELINE not in self.value or TREATMENT not in self.value:
            return math.nan
        return self.value[TREATMENT].mean - self.value[BASELINE].mean


def class_lines(comparison: Comparison, arms: Sequence[str]) -> list[ClassLine]:
    """Values of each class over the seeds of each arm; the classes with most training data first.

    A seed counts with the mean over those of its units in which the class has a value.
    """
    counts: dict[str, list[int]] = {}
    values: dict[str, dict[str, dict[int, list[float]]]] = {}
    for run in (run for arm in comparison.arms for run in comparison.complete(arm)):
        for entry in run.per_class:
            counts.setdefault(entry.name, []).append(entry.count)
            values.setdefault(entry.name, {}).setdefault(run.arm, {}).setdefault(run.seed, []).append(entry.value)
    lines = []
    for name, found in counts.items():
        seeds = {arm: values[name].get(arm, {}).values() for arm in arms}
        summaries = {arm: summarize([summarize(units).mean for units in seeds[arm]]) for arm in arms}
        lines.append(ClassLine(name, sum(found) / len(found), summaries))
    return sorted(lines, key=lambda line: -line.count)


def per_class_table(comparison: Comparison, limit: int = 40) -> Table:
    """The metric of each class, of plain and +BatchFormer.

    Args:
        comparison: Runs without per-class results are passed over.
        limit: Number of classes above which only those that change most are shown, and the table says so.
    """
    arms = [arm for arm in (BASELINE, TREATMENT) if comparison.of(arm)]
    lines, measure = class_lines(comparison, arms), comparison.class_measure
    unit = "" if measure.is_fraction or not measure.unit else f" ({measure.unit})"
    first = "Percent" if measure.is_fraction else _capital(measure.unit or "numbers without a unit")
    notes = [
        f"{first}, mean ± sample standard deviation over seeds. The numbers are descriptive and have no intervals.",
        *lower_is_better_note([measure]),
    ]
    shown = lines
    if len(lines) > limit:
        by_change = sorted(lines, key=lambda line: -abs(line.change) if math.isfinite(line.change) else math.inf)
        shown = [line for line in lines if line in by_change[:limit]]
        notes.append(f"These are the {limit} of {len(lines)} classes that change most. All are in per_class.csv.")
    rows = []
    for line in shown:
        cells = [measure.spread(line.value[arm]) for arm in arms]
        change = measure.signed(line.change, keep_sign=False)
        rows.append((line.name, f"{line.count:g}", *cells, *([change] if len(arms) == 2 else [])))
    columns = ("class", comparison.class_count, *arms, *(["difference"] if len(arms) == 2 else []))
    return Table(f"{_capital(measure.label)}{unit} per class", columns, tuple(rows), tuple(notes))


def _capital(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}"


def runs_table(runs: Sequence[Run]) -> Table:
    """Unrelated runs, one row each, without paired claims."""
    described = [measure for run in runs for measure in run.measures]
    names = order_metrics({name for run in runs for name in run.metrics}, described)
    values = {name: [run.metrics.get(name, math.nan) for run in runs] for name in names}
    measures = [find_measure(name, described).fitted(values[name]) for name in names]
    rows = []
    for index, run in enumerate(runs):
        cells = (measure.number(values[name][index]) for name, measure in zip(names, measures, strict=True))
        rows.append((run.path.name, run.recipe, run.arm, str(run.seed), *cells))
    notes = [
        f"{units_note(measures)}. These runs are not a comparison, so the table claims no differences.",
        *lower_is_better_note(measures),
    ]
    for what in ("recipe", "split", "selection"):
        found = sorted({str(getattr(run, what)) for run in runs})
        if len(found) > 1:
            notes.append(f"The runs differ in {what} ({', '.join(found)}): their numbers may not be comparable.")
    return Table("Runs", ("run", "recipe", "arm", "seed", *heads(measures)), tuple(rows), tuple(notes))
