"""Early or at the end: where in the course of the epochs an arm is ahead of plain.

Users of the published code report faster early convergence without a final gain. The numbers that tell the two apart
are those of the primary metric on the validation data, epoch by epoch.
"""

from statistics import median

from .curves import Curves, seed_curves
from .measures import ABSENT, INTERVAL, Measure, as_percent
from .paired import PairedDifference, paired_difference
from .render import Table
from .runs import BASELINE, TREATMENT, Comparison

__all__ = ["convergence_sentence", "convergence_table"]

_SHARE = (
    0.9  # of plain's final score, which counts as nearly there; for an error it is 2 - 0.9 = 1.1 times the final one
)
_MOMENTS = (0.25, 0.5, 1.0)  # of the epochs: early, half way, the end
_FEWEST = 4  # validated epochs below which a curve says nothing about early and late

_MEANING = {
    ("improves", "improves"): "is ahead early and at the end",
    ("improves", "no difference shown"): "is ahead early, but no lead is shown at the end: faster, not better",
    ("improves", "worsens"): "is ahead early and behind at the end",
    ("no difference shown", "improves"): "shows no early lead, but is ahead at the end",
    ("no difference shown", "no difference shown"): "shows no lead, neither early nor at the end",
    ("worsens", "improves"): "is behind early and ahead at the end: slower, but better",
    ("worsens", "no difference shown"): "is behind early, and no difference is shown at the end",
}


def _curves(comparison: Comparison) -> dict[str, dict[int, dict[int, float]]]:
    every = seed_curves(comparison, f"val_{comparison.primary}")
    long = {arm: {seed: c for seed, c in seeds.items() if len(c) >= _FEWEST} for arm, seeds in every.items()}
    return {arm: seeds for arm, seeds in long.items() if seeds}


def _moment(curves: Curves, share: float) -> int:
    """The first validated epoch at or after this share of the training."""
    epochs = sorted({epoch for curve in curves[BASELINE].values() for epoch in curve})
    return next(epoch for epoch in epochs if epoch >= share * epochs[-1])


def _difference(curves: Curves, arm: str, epoch: int, measure: Measure) -> PairedDifference:
    at = {name: {seed: c[epoch] for seed, c in curves[name].items() if epoch in c} for name in (arm, BASELINE)}
    return paired_difference(at[arm], at[BASELINE], higher_is_better=measure.higher_is_better)


def _cell(difference: PairedDifference, measure: Measure) -> str:
    interval = f" {measure.interval(difference)}" if difference.has_interval else ""
    return measure.mean(difference) + interval


def _share(measure: Measure) -> float:
    return _SHARE if measure.higher_is_better else 2 - _SHARE


def _epochs_to_share(curves: Curves, arm: str, measure: Measure) -> str:
    """Median over seeds of the first epoch that comes as near to plain's final value of the same seed as asked.

    A final value of zero or below has no share, and its seed is left out.
    """
    reached, never = [], 0
    sign = 1 if measure.higher_is_better else -1
    for seed, curve in curves[arm].items():
        plain = curves[BASELINE].get(seed, {})
        final = plain[max(plain)] if plain else 0.0
        if final <= 0:
            continue
        goal = _share(measure) * final
        epoch = next((epoch for epoch in sorted(curve) if sign * curve[epoch] >= sign * goal), None)
        never += epoch is None
        reached += [] if epoch is None else [epoch]
    if not reached:
        return "never" if never else ABSENT
    text = f"{median(reached):g}"
    if min(reached) != max(reached):
        text += f" ({min(reached)} to {max(reached)})"
    return f"{text}, never in {never} of {never + len(reached)}" if never else text


def convergence_table(comparison: Comparison) -> Table | None:
    """The primary metric on the validation data: when an arm comes near plain's final value, and how far it leads.

    Where higher is better, near means 90 percent of plain's final score. For an error it means at most 110 percent of
    plain's final error: the goal lies a tenth of the final value on the worse side in both cases.

    Returns:
        The table; None with too few validated epochs.

    Raises:
        ReportError: A file of curves is broken.
    """
    curves, measure = _curves(comparison), comparison.measure(comparison.primary)
    if BASELINE not in curves:
        return None
    moments = list(dict.fromkeys(_moment(curves, share) for share in _MOMENTS))
    rows = []
    for arm in (arm for arm in comparison.arms if arm in curves):
        leads = (
            "" if arm == BASELINE else _cell(_difference(curves, arm, epoch, measure), measure) for epoch in moments
        )
        rows.append((arm, _epochs_to_share(curves, arm, measure), *leads))
    final = "score" if measure.higher_is_better else "error"
    columns = (
        "arm",
        f"epochs to {as_percent(_share(measure))} of plain's final {final}",
        *(f"vs plain, epoch {epoch} of {moments[-1]}" for epoch in moments),
    )
    unit = f" in {measure.difference_unit}" if measure.difference_unit else ""
    direction = f" ({measure.direction})" if measure.direction else ""
    notes = (
        f"Validation {measure.label}{direction}. Epochs are the median (and range) over seeds, measured against the "
        "last epoch of plain on the same seed.",
        f"Differences are{unit} with {INTERVAL}s, paired by seed; they are descriptive and carry no verdict.",
    )
    return Table("Convergence", columns, tuple(rows), notes)


def convergence_sentence(comparison: Comparison) -> str | None:
    """One sentence on whether BatchFormer leads early, at the end, or both.

    It is None without curves of both arms, and when the runs were made on different data.

    Raises:
        ReportError: A file of curves is broken.
    """
    curves, measure = _curves(comparison), comparison.measure(comparison.primary)
    if not {BASELINE, TREATMENT} <= set(curves) or comparison.mixed_splits:
        return None
    epochs = [_moment(curves, share) for share in (_MOMENTS[0], 1.0)]
    early, end = (_difference(curves, TREATMENT, epoch, measure) for epoch in epochs)
    numbers = f"(epoch {epochs[0]}: {measure.described(early)}; epoch {epochs[1]}: {measure.described(end)})"
    if "too few seeds" in (early.verdict, end.verdict):
        return f"There are too few seeds to say whether BatchFormer is ahead early or at the end {numbers}."
    meaning = _MEANING.get((early.verdict, end.verdict), "is behind at the end")
    return f"On the validation data, BatchFormer {meaning} {numbers}."
