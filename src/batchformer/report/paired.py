"""The arithmetic of a comparison: pure functions on plain numbers.

Values are those of the run folders, in any unit; nothing here rounds or formats. Values that are not finite (the
accuracy of an empty group of classes is NaN) are left out of every average and counted, never replaced.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = [
    "CONFIDENCE",
    "FEW_SEEDS",
    "MIN_SEEDS",
    "Decision",
    "PairedDifference",
    "Summary",
    "Verdict",
    "average_units",
    "paired_difference",
    "summarize",
    "t_quantile",
]

Verdict = Literal["improves", "worsens", "no difference shown", "too few seeds", "no verdict"]
Decision = Literal["better", "worse", "practically equal", "undecided", "too few seeds"]

CONFIDENCE = 0.95
MIN_SEEDS = 3  # below this there is no interval worth the name: with two pairs the t factor is 12.7
FEW_SEEDS = 4  # up to this many pairs an interval is given, and flagged


@dataclass(frozen=True)
class Summary:
    """Mean and spread of one metric over the seeds of one arm.

    Attributes:
        n: Number of finite values.
        mean: Mean of the finite values; NaN when ``n == 0``.
        sd: Sample standard deviation (divisor ``n - 1``); NaN when ``n < 2``.
        undefined: Number of values that were not finite and were left out.
    """

    n: int
    mean: float
    sd: float
    undefined: int


def summarize(values: Sequence[float]) -> Summary:
    """Mean and sample standard deviation of the finite values.

    Args:
        values: One number for each seed, in any unit.

    Returns:
        The :class:`Summary`, in the unit of ``values``.

    Example:
        >>> summarize([0.25, 0.75, float("nan")])
        Summary(n=2, mean=0.5, sd=0.3535533905932738, undefined=1)
    """
    finite = [float(value) for value in values if math.isfinite(value)]
    n = len(finite)
    mean = math.fsum(finite) / n if n else math.nan
    # Equal values have no spread: their rounded mean may differ in the last bit, which would leave a spread of 1e-17.
    if n >= 2 and min(finite) == max(finite):
        mean, sd = finite[0], 0.0
    else:
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (n - 1)) if n >= 2 else math.nan
    return Summary(n=n, mean=mean, sd=sd, undefined=len(values) - n)


def average_units(values: Mapping[int, Mapping[str, float]], units: Sequence[str]) -> dict[int, float]:
    """Mean over the units of each seed, for seeds that have a value for every unit.

    Runs of one seed on several units (target domains, splits) are not independent, so a seed counts once, with its
    mean. A value that is not finite makes the mean of its seed undefined: a mean over fewer units would be another
    quantity.

    Args:
        values: Seed -> unit -> value.
        units: Names of the units that every seed must have.

    Returns:
        Seed -> mean.

    Example:
        >>> average_units({0: {"photo": 0.5, "sketch": 0.25}, 1: {"photo": 0.5}}, ["photo", "sketch"])
        {0: 0.375}
    """
    return {
        seed: math.fsum(found[unit] for unit in units) / len(units)
        for seed, found in values.items()
        if all(unit in found for unit in units)
    }


def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution.

    Args:
        probability: Probability below the quantile, in (0, 1).
        degrees: Degrees of freedom, at least 1.

    Raises:
        ImportError: scipy is not installed.

    Example:
        >>> round(t_quantile(0.975, 4), 3)
        2.776
    """
    try:
        # scipy.special, not scipy.stats: the same function, and a tenth of the import time.
        from scipy.special import stdtrit
    except ImportError as error:
        raise ImportError("The intervals of a report need scipy: pip install 'batchformer[plots]'") from error
    return float(stdtrit(degrees, probability))


@dataclass(frozen=True)
class PairedDifference:
    """Difference of two arms, paired by seed: ``arm - reference``.

    Attributes:
        seeds: Seeds for which both arms have a finite value, in ascending order.
        differences: One difference for each seed of ``seeds``.
        mean: Mean difference; NaN without a pair.
        sd: Sample standard deviation of the differences; NaN with fewer than two pairs.
        low, high: Ends of the t-interval; NaN with fewer than ``MIN_SEEDS`` pairs.
        unpaired: Seeds that only one of the two arms has.
        undefined: Seeds that both arms have, with a value that is not finite in at least one.
        higher_is_better: False for errors such as the calibration error.
        confidence: Confidence of the interval, in (0, 1).
        margin: Smallest difference that matters, above 0, in the unit of the values; None where nobody named one.
        same_data: False where the runs were made on different data, which allows no verdict.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    sd: float
    low: float
    high: float
    unpaired: tuple[int, ...] = ()
    undefined: tuple[int, ...] = ()
    higher_is_better: bool = True
    confidence: float = CONFIDENCE
    margin: float | None = None
    same_data: bool = True

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.seeds)

    @property
    def has_interval(self) -> bool:
        """True when there are enough pairs for an interval."""
        return self.n >= MIN_SEEDS

    @property
    def few(self) -> bool:
        """True when there is an interval and it rests on few seeds."""
        return MIN_SEEDS <= self.n <= FEW_SEEDS

    @property
    def no_spread(self) -> bool:
        """True when two or more seeds gave the same difference to rounding: perhaps the seed changes nothing."""
        return self.n >= 2 and self.sd <= 1e-12 * max(1.0, abs(self.mean))

    @property
    def verdict(self) -> Verdict:
        """Verdict that the interval allows; an interval that touches zero includes it."""
        if not self.same_data:
            return "no verdict"
        if not self.has_interval:
            return "too few seeds"
        if self.low <= 0.0 <= self.high:
            return "no difference shown"
        return "improves" if (self.mean > 0) == self.higher_is_better else "worsens"

    @property
    def words(self) -> Verdict | Decision:
        """The answer in the words of the report: measured by the margin where there is one."""
        return self.decision or self.verdict

    @property
    def decision(self) -> Decision | None:
        r"""Answer to the question whether the difference is large enough to matter; None without a margin.

        With the interval :math:`[l, u]` and the margin :math:`m`: better when :math:`l > m`, worse when :math:`u < -m`,
        practically equal when :math:`-m < l` and :math:`u < m`, otherwise undecided; for errors better and worse change
        places. "Practically equal" is the result of two one-sided tests (Schuirmann 1987; Lakens 2017), and the four
        answers together are those of a region of practical equivalence (Kruschke 2018; Bouthillier et al. 2021 ask for
        such a region in benchmarks). All answers use the interval that the report prints, at the confidence 0.95: the
        answer can be checked against it by eye, and whatever the true difference is, the answer is wrong in at most
        1 of 20 comparisons, since it can only be wrong when the interval misses the truth. Two one-sided tests at the
        level 0.05 each would use an interval at 0.90; the one here is stricter (0.025 each).

        Example:
            >>> flat = paired_difference({0: 0.801, 1: 0.8, 2: 0.799}, dict.fromkeys(range(3), 0.8), margin=0.005)
            >>> flat.verdict, flat.decision
            ('no difference shown', 'practically equal')
        """
        if self.margin is None or not self.same_data:
            return None
        if not self.has_interval:
            return "too few seeds"
        if -self.margin < self.low and self.high < self.margin:
            return "practically equal"
        if self.low > self.margin or self.high < -self.margin:
            return "better" if (self.mean > 0) == self.higher_is_better else "worse"
        return "undecided"


def paired_difference(
    arm: Mapping[int, float],
    reference: Mapping[int, float],
    *,
    higher_is_better: bool = True,
    confidence: float = CONFIDENCE,
    margin: float | None = None,
) -> PairedDifference:
    r"""Mean difference over seeds with Student's t-interval, :math:`\bar d \pm t_{n-1} s_d / \sqrt n`.

    Both arms of a comparison share initial weights and data order, so the effect of a seed on both cancels in a pair.
    Seeds that one arm lacks, or whose value is not finite, are left out and listed.

    Args:
        arm: Seed -> value of the arm in question.
        reference: Seed -> value of the arm it is compared with.
        higher_is_better: False for errors; it changes the verdict, not the sign of the difference.
        confidence: Confidence of the two-sided interval, in (0, 1).
        margin: Smallest difference that matters, above 0, in the unit of the values.

    Returns:
        The :class:`PairedDifference`, in the unit of the values.

    Raises:
        ValueError: ``confidence`` is outside (0, 1), or ``margin`` is not a number above 0.

    Example:
        >>> d = paired_difference({0: 0.84, 1: 0.83, 2: 0.85, 3: 0.84}, {0: 0.82, 1: 0.82, 2: 0.83, 4: 0.8})
        >>> d.seeds, d.unpaired, d.verdict, d.few
        ((0, 1, 2), (3, 4), 'improves', True)
    """
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"Expected a confidence between 0 and 1, got {confidence}. Pass 0.95, for example.")
    if margin is not None and not 0.0 < margin < math.inf:
        raise ValueError(f"Expected a margin above 0, got {margin}. Name the smallest difference that matters.")
    shared = sorted(set(arm) & set(reference))
    seeds = tuple(seed for seed in shared if math.isfinite(arm[seed]) and math.isfinite(reference[seed]))
    differences = tuple(float(arm[seed]) - float(reference[seed]) for seed in seeds)
    summary = summarize(differences)
    half = math.nan
    if summary.n >= MIN_SEEDS:
        half = t_quantile(0.5 + confidence / 2, summary.n - 1) * summary.sd / math.sqrt(summary.n)
    return PairedDifference(
        seeds=seeds,
        differences=differences,
        mean=summary.mean,
        sd=summary.sd,
        low=summary.mean - half,
        high=summary.mean + half,
        unpaired=tuple(sorted(set(arm) ^ set(reference))),
        undefined=tuple(seed for seed in shared if seed not in seeds),
        higher_is_better=higher_is_better,
        confidence=confidence,
        margin=margin,
    )
