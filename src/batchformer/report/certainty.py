"""Certainty beside the interval: the next seed, the seeds won, the worth of pairing, an exact test for few seeds.

All statistics are pure functions on the differences or the values of pairs, in any unit.
"""

import math
from collections.abc import Sequence
from itertools import product

from .measures import ABSENT, as_percent
from .paired import PairedDifference, summarize
from .render import Table
from .runs import TREATMENT, Comparison

__all__ = [
    "EXACT_BELOW",
    "certainty_table",
    "correlation",
    "pairing_ratio",
    "probability_above",
    "seeds_won",
    "sign_flip_p",
    "smallest_p",
]

EXACT_BELOW = 10  # the exact test takes 2^n sums; from this many seeds on the t interval leans little on normality


def probability_above(values: Sequence[float], threshold: float = 0.0) -> float:
    r"""Probability that the next value exceeds a threshold, by the posterior predictive distribution.

    The model is a normal distribution with the prior :math:`1 / \sigma`, so that the next value has Student's t
    distribution with :math:`n - 1` degrees of freedom, centre :math:`\bar d` and scale :math:`s \sqrt{1 + 1 / n}`
    (Gelman et al., Bayesian Data Analysis, section 3.2).

    Args:
        values: Differences of pairs.
        threshold: Threshold in their unit.

    Returns:
        The probability; NaN with fewer than two values, or where they do not differ.

    Example:
        >>> round(probability_above([1.0, 2.0, 3.0]), 3)
        0.887
    """
    summary = summarize(values)
    if summary.n < 2 or summary.sd == 0.0:
        return math.nan
    from scipy.special import stdtr

    scale = summary.sd * math.sqrt(1 + 1 / summary.n)
    return float(stdtr(summary.n - 1, (summary.mean - threshold) / scale))


def seeds_won(difference: PairedDifference) -> int:
    """Number of seeds on which the arm does better than the reference; a tie is not won.

    Example:
        >>> from batchformer.report.paired import paired_difference
        >>> seeds_won(paired_difference({0: 3.0, 1: 2.0, 2: 1.0}, dict.fromkeys(range(3), 2.0)))
        1
    """
    return sum(value != 0 and (value > 0) == difference.higher_is_better for value in difference.differences)


def correlation(one: Sequence[float], two: Sequence[float]) -> float:
    """Pearson's correlation of the values of two arms on the same seeds; NaN where one of them does not vary.

    Example:
        >>> round(correlation([1.0, 2.0, 4.0], [2.0, 3.0, 5.0]), 6)
        1.0
    """
    first, second = summarize(one), summarize(two)
    if first.n < 2 or not first.sd or not second.sd:
        return math.nan
    shared = math.fsum((a - first.mean) * (b - second.mean) for a, b in zip(one, two, strict=True))
    return max(-1.0, min(1.0, shared / (first.n - 1) / (first.sd * second.sd)))


def pairing_ratio(one: Sequence[float], two: Sequence[float]) -> float:
    r"""Seeds that a comparison without pairs would need for each pair, :math:`(s_1^2 + s_2^2) / s_d^2`.

    Without pairs, the variance of the difference of the means is :math:`(s_1^2 + s_2^2) / n`; with pairs it is
    :math:`s_d^2 / n`. A ratio below 1 says that pairing cost precision.

    Returns:
        The ratio; NaN where the pairs do not differ.

    Example:
        >>> round(pairing_ratio([1.0, 2.0, 3.0], [1.5, 2.5, 3.0]), 2)
        19.0
    """
    first, second = summarize(one), summarize(two)
    spread = summarize([a - b for a, b in zip(one, two, strict=True)])
    if spread.n < 2 or not spread.sd:
        return math.nan
    return (first.sd**2 + second.sd**2) / spread.sd**2


def sign_flip_p(differences: Sequence[float]) -> float:
    """Two-sided p value of the exact sign-flip test (paired permutation test; Fisher 1935).

    If the two arms were alike, each difference could as well have the other sign. The p value is the share of all
    ``2^n`` choices of signs whose mean is at least as far from zero as the observed one.

    Args:
        differences: Differences of pairs, at least one.

    Example:
        >>> sign_flip_p([1.0, 2.0, 3.0]), sign_flip_p([1.0, -1.0])
        (0.25, 1.0)
    """
    seen = abs(math.fsum(differences))
    # Sums that are equal but for rounding count as equal.
    least = seen - 1e-9 * math.fsum(abs(value) for value in differences)
    signs = product((1, -1), repeat=len(differences))
    sums = [abs(math.fsum(s * value for s, value in zip(row, differences, strict=True))) for row in signs]
    return sum(value >= least for value in sums) / len(sums)


def smallest_p(n: int) -> float:
    """Smallest p value that the exact test of ``n`` pairs can have: both choices with equal signs, out of ``2^n``.

    Example:
        >>> smallest_p(3), smallest_p(6)
        (0.25, 0.03125)
    """
    return min(1.0, math.ldexp(2.0, -n))


def certainty_table(comparison: Comparison) -> list[Table]:
    """BatchFormer against every other arm: seeds won, the next seed, the worth of pairing, the exact test.

    The list is empty where no pair of runs is finished, and for runs on different data.
    """
    others = [step.reference for step in comparison.steps]
    others += [reference for arm, reference in comparison.beside if arm == TREATMENT]
    pairs = [(other, comparison.difference(TREATMENT, other, comparison.primary)) for other in others]
    pairs = [(other, difference) for other, difference in pairs if difference.n]
    if not pairs or comparison.mixed_splits:
        return []
    rows = tuple(_row(comparison, other, difference) for other, difference in pairs)
    columns = ("reference", "seeds won", "next seed gains", "correlation", "seeds without pairs", "exact p")
    smallest = min(difference.n for _, difference in pairs)
    return [Table("How sure", columns, rows, _notes(*pairs[0], smallest))]


def _row(comparison: Comparison, other: str, difference: PairedDifference) -> tuple[str, ...]:
    values = [comparison.values(arm, comparison.primary) for arm in (TREATMENT, other)]
    one, two = ([found[seed] for seed in difference.seeds] for found in values)
    ratio, together = pairing_ratio(one, two), correlation(one, two)
    return (
        other,
        f"{seeds_won(difference)} of {difference.n}",
        _probability(difference),
        ABSENT if math.isnan(together) else f"{together:+.2f}",
        ABSENT if math.isnan(ratio) or difference.no_spread else f"{ratio * difference.n:,.0f}",
        f"{sign_flip_p(difference.differences):.3g}" if difference.n < EXACT_BELOW else ABSENT,
    )


def _probability(difference: PairedDifference) -> str:
    """Probability that the next seed gains, in words; rounding never makes it certain."""
    sign = 1 if difference.higher_is_better else -1
    found = math.nan if difference.no_spread else probability_above([sign * value for value in difference.differences])
    if math.isnan(found):
        return ABSENT
    if not 0.01 <= found <= 0.99:
        return f"over {as_percent(0.99)}" if found > 0.5 else f"under {as_percent(0.01)}"
    return as_percent(round(found, 2))


def _notes(other: str, difference: PairedDifference, smallest: int) -> tuple[str, ...]:
    ties = sum(value == 0 for value in difference.differences)
    won = f"BatchFormer did better than {other} on {seeds_won(difference)} of {difference.n} seeds"
    equal = f" and equally well on {ties}" if ties else ""
    probable = _probability(difference)
    coming = "."
    if probable != ABSENT:
        coming = (
            f"; the next seed gains with a probability of {probable} (Student's t as the posterior predictive "
            "distribution of normally distributed differences). This is a statement about one more seed, not about the "
            "mean."
        )
    notes = [
        f"{won}{equal}{coming}",
        "Correlation: of the two arms over the seeds. Seeds without pairs: the seeds in each arm that a comparison "
        "without common seeds would need for an interval as narrow; where it is below the number of pairs, pairing "
        "did not help.",
    ]
    if smallest < EXACT_BELOW:
        seeds = "1 seed" if smallest == 1 else f"{smallest} seeds"
        reach = " It takes 6 seeds to reach 0.05." if smallest < 6 else ""
        notes.append(
            "Exact p: sign-flip test, two-sided, which assumes no normal distribution. With "
            f"{seeds} the smallest p value of the exact test is {smallest_p(smallest):.3g}.{reach}"
        )
    return tuple(notes)
