"""Early or in the end: where on the way through the epochs an arm is ahead of plain.

Users of the published code report faster early convergence without a final gain. These are the numbers that tell the
two apart: the primary metric on the validation data, epoch by epoch.
"""

import math
import statistics as stdlib_statistics
from collections.abc import Mapping

from .paired import PairedDifference, paired_difference
from .reading import read_curves
from .render import Table
from .runs import BASELINE, TREATMENT, Comparison, higher_is_better
from .sentences import describe_difference, label, points

__all__ = ["convergence_sentence", "convergence_table"]

_SHARE = 0.9  # of plain's final value, counted as "nearly there"
_MOMENTS = (0.25, 0.5, 1.0)  # of the epochs: early, half way, the end
_FEWEST = 4  # validated epochs below which there is no way to speak of
Curves = Mapping[str, Mapping[int, Mapping[int, float]]]  # arm -> seed -> epochs done -> value


def _curves(comparison: Comparison) -> Curves:
    column = f"val_{comparison.primary}"
    found: dict[str, dict[int, dict[int, float]]] = {}
    for run in comparison.runs:
        curve = read_curves(run.path).get(column, {}) if (run.path / "metrics.csv").is_file() else {}
        defined = {epoch + 1: value for epoch, value in curve.items() if math.isfinite(value)}
        if len(defined) >= _FEWEST:
            found.setdefault(run.arm, {})[run.seed] = defined
    return found


def _moment(curves: Curves, share: float) -> int:
    """The first validated epoch with at least this share of the training behind it."""
    epochs = sorted({epoch for curve in curves[BASELINE].values() for epoch in curve})
    return next(epoch for epoch in epochs if epoch >= share * epochs[-1])


def _difference(curves: Curves, arm: str, epoch: int, metric: str) -> PairedDifference:
    at = {name: {seed: c[epoch] for seed, c in curves[name].items() if epoch in c} for name in (arm, BASELINE)}
    return paired_difference(at[arm], at[BASELINE], higher_is_better=higher_is_better(metric))


def _cell(difference: PairedDifference) -> str:
    if not difference.n:
        return "n/a"
    ends = f" [{points(difference.low)}, {points(difference.high)}]" if difference.has_interval else ""
    return points(difference.mean) + ends


def _epochs_to_share(curves: Curves, arm: str) -> str:
    """Median over the seeds of the first epoch that comes up to a share of plain's final value on the same seed."""
    reached, never = [], 0
    for seed, curve in curves[arm].items():
        if seed in curves[BASELINE]:
            plain = curves[BASELINE][seed]
            goal = _SHARE * plain[max(plain)]
            epoch = next((epoch for epoch in sorted(curve) if curve[epoch] >= goal), None)
            never += epoch is None
            reached += [] if epoch is None else [epoch]
    if not reached:
        return "never" if never else "n/a"
    text = f"{stdlib_statistics.median(reached):g}"
    if min(reached) != max(reached):
        text += f" ({min(reached)} to {max(reached)})"
    return f"{text}, never in {never} of {never + len(reached)}" if never else text


def convergence_table(comparison: Comparison) -> Table | None:
    """The primary metric on the validation data on the way: when an arm comes near plain's end, and how far it leads.

    Returns:
        The table; None where the metric falls with quality, or there are too few validated epochs to speak of a way.
    """
    curves = _curves(comparison)
    if BASELINE not in curves or not higher_is_better(comparison.primary):
        return None
    moments = list(dict.fromkeys(_moment(curves, share) for share in _MOMENTS))
    rows = []
    for arm in (arm for arm in comparison.arms if arm in curves):
        leads = (
            "" if arm == BASELINE else _cell(_difference(curves, arm, epoch, comparison.primary)) for epoch in moments
        )
        rows.append((arm, _epochs_to_share(curves, arm), *leads))
    metric = label(comparison.primary)
    columns = (
        "arm",
        f"epochs to {100 * _SHARE:.0f} % of plain's end",
        *(f"vs plain, epoch {epoch} of {moments[-1]}" for epoch in moments),
    )
    notes = (
        f"Validation {metric}: epochs as median (range) over seeds, measured against plain's last epoch on the same "
        "seed; differences in percentage points with 95 % intervals, paired by seed: descriptive, no verdict.",
    )
    return Table("On the way", columns, tuple(rows), notes)


def convergence_sentence(comparison: Comparison) -> str | None:
    """Whether BatchFormer leads early, in the end, or both; None without curves of both arms.

    Raises:
        ReportError: A file of curves is broken.
    """
    curves = _curves(comparison)
    if not {BASELINE, TREATMENT} <= set(curves) or not higher_is_better(comparison.primary):
        return None
    epochs = [_moment(curves, share) for share in (_MOMENTS[0], 1.0)]
    early, end = (_difference(curves, TREATMENT, epoch, comparison.primary) for epoch in epochs)
    meaning = {
        ("improves", "improves"): "ahead early and in the end",
        ("improves", "no difference shown"): "ahead early, and not shown to be in the end: faster, not better",
        ("improves", "worsens"): "ahead early and behind in the end",
        ("no difference shown", "improves"): "not shown to be ahead early, and ahead in the end",
        ("no difference shown", "no difference shown"): "not shown to be ahead early, nor in the end",
        ("worsens", "improves"): "behind early and ahead in the end: slower, and better",
        ("worsens", "no difference shown"): "behind early, and no difference is shown in the end",
    }.get((early.verdict, end.verdict))
    if "too few seeds" in (early.verdict, end.verdict):
        meaning = "too few seeds to say whether it is ahead early or in the end"
    return (
        f"BatchFormer on the validation data: {meaning or 'behind in the end'} (epoch {epochs[0]}: "
        f"{describe_difference(early)}; epoch {epochs[1]}: {describe_difference(end)})."
    )
