"""The number of seeds: the difference that some seeds can show, and the seeds and the time that a margin takes."""

import math
from statistics import median

from .measures import ABSENT, INTERVAL, Measure, as_percent
from .paired import PairedDifference
from .power import MOST_SEEDS, POWER, detectable_difference, sd_interval, seeds_to_detect, seeds_to_equal
from .render import Table
from .runs import BASELINE, TREATMENT, Comparison

__all__ = ["duration", "planning_table", "seconds_per_seed"]

_ROUND_NUMBERS = (5, 10, 20)


def duration(seconds: float) -> str:
    """A time in words, with two digits.

    Example:
        >>> duration(40), duration(750), duration(9000), duration(200_000)
        ('40 seconds', '12 minutes', '2.5 hours', '2.3 days')
    """
    for size, name, decimals in ((1.0, "seconds", 0), (60.0, "minutes", 0), (3600.0, "hours", 1)):
        following = {"seconds": 60.0, "minutes": 3600.0, "hours": 48 * 3600.0}[name]
        if round(seconds / size, decimals) * size < following:
            number = f"{seconds / size:.{decimals}f}"
            return f"{number} {name[:-1] if number == '1' else name}"
    return f"{seconds / 86400:.1f} days"


def seconds_per_seed(comparison: Comparison) -> float:
    """Training time of one more seed: the median of the finished runs of each arm, over all arms and units.

    Returns:
        Seconds, when runs are trained one after another; NaN when no run of an arm has its time.
    """
    total = 0.0
    for arm in comparison.arms:
        times = [run.cost.get("train_seconds", math.nan) for run in comparison.of(arm)]
        known = [time for time in times if math.isfinite(time)]
        total += median(known) * len(comparison.units) if known else math.nan
    return total


def planning_table(comparison: Comparison) -> list[Table]:
    """The difference between BatchFormer and plain that 3, 5, 10, ... seeds can show, and the time they take.

    The list is empty below three pairs, from which no spread is known, where all pairs are equal, and for runs on
    different data.
    """
    difference = comparison.difference(TREATMENT, BASELINE, comparison.primary)
    if not difference.has_interval or difference.no_spread or comparison.mixed_splits:
        return []
    measure, each = comparison.measure(comparison.primary), seconds_per_seed(comparison)
    wanted = seeds_to_detect(difference.margin, difference.sd) if difference.margin is not None else None
    counts = sorted({difference.n, *(n for n in (*_ROUND_NUMBERS, wanted or 0) if n > difference.n)})
    low, high = sd_interval(difference.sd, difference.n)
    rows = []
    for n in counts:
        cells = [measure.number(detectable_difference(sd, n)) for sd in (difference.sd, low, high)]
        more = (n - len(comparison.seeds_of(TREATMENT))) * each
        rows.append((str(n), cells[0], f"{cells[1]} to {cells[2]}", _time(more)))
    unit = f" ({measure.difference_unit})" if measure.difference_unit else ""
    columns = ("seeds", f"detectable difference{unit}", "for the lowest and highest likely spread", "more training")
    notes = [_shown_now(difference, measure), *_for_the_margin(difference, measure, (low, high), each)]
    notes.append(
        "Training times are those of these runs, all arms, one run after another. Decide on the number of seeds "
        "once: with every further look at the same comparison, a gain by luck alone becomes likelier."
    )
    return [Table("How many seeds", columns, tuple(rows), tuple(notes))]


def _time(seconds: float) -> str:
    return ABSENT if math.isnan(seconds) else "0" if seconds <= 0 else duration(seconds)


def _shown_now(difference: PairedDifference, measure: Measure) -> str:
    low, high = (measure.amount(end) for end in sd_interval(difference.sd, difference.n))
    detectable = measure.amount(detectable_difference(difference.sd, difference.n))
    rough = " only roughly" if difference.n < 10 else ""
    return (
        f"Detectable difference: the true difference between BatchFormer and plain that so many seeds show in "
        f"{as_percent(POWER)} of comparisons (paired t test). With {difference.n} seeds it is {detectable}: a smaller "
        f"one is missed more often. The differences of the seeds have a standard deviation of "
        f"{measure.amount(difference.sd)}, which {difference.n} seeds tell{rough}: {low} to {high} ({INTERVAL}, "
        "chi-square)."
    )


def _for_the_margin(
    difference: PairedDifference, measure: Measure, spreads: tuple[float, float], each: float
) -> list[str]:
    """Seeds for the margin, at the observed spread and at both ends of its interval."""
    if difference.margin is None:
        return ["Name the smallest difference that matters with --margin, and the seeds that it takes stand here."]
    margin = measure.amount(difference.margin)
    best, (low, high) = (
        _count(seeds_to_detect(difference.margin, difference.sd)),
        (_count(seeds_to_detect(difference.margin, sd)) for sd in spreads),
    )
    equal = seeds_to_equal(difference.margin, difference.sd)
    lines = (
        f"A true difference as large as the margin of {margin} takes {best} seeds to be shown ({low} to {high} for the "
        "lowest and highest likely spread). To show that the two are practically equal when nothing differs takes "
        f"{_count(equal)} seeds"
    )
    further = (equal or 0) - difference.n
    if further > 0 and math.isfinite(each):
        lines += f", {further} more than now: about {duration(further * each)} of training"
    return [f"{lines}."]


def _count(seeds: int | None) -> str:
    return f"more than {MOST_SEEDS:,}" if seeds is None else f"{seeds:,}"
