"""Power of the paired t test: the difference that some seeds can show, and the seeds that a difference takes.

Power is the probability that the interval of a comparison excludes zero when there is a true difference. All functions
are pure, on plain numbers in any unit.
"""

import math
from collections.abc import Callable

from .paired import CONFIDENCE, MIN_SEEDS, t_quantile

__all__ = [
    "MOST_SEEDS",
    "POWER",
    "detectable_difference",
    "equality_power",
    "paired_power",
    "sd_interval",
    "seeds_to_detect",
    "seeds_to_equal",
]

POWER = 0.8
MOST_SEEDS = 10_000  # a search for the number of seeds ends here


def paired_power(effect: float, sd: float, n: int, *, confidence: float = CONFIDENCE) -> float:
    r"""Probability that the t-interval of ``n`` pairs excludes zero, on either side.

    With :math:`\nu = n - 1`, :math:`\delta = \text{effect} \sqrt n / \text{sd}` and the quantile :math:`t` of Student's
    distribution, it is :math:`1 - F(t; \nu, \delta) + F(-t; \nu, \delta)`, where :math:`F` is the noncentral t
    distribution (Cohen 1988, chapter 2; Colas et al. 2018 for seeds).

    Args:
        effect: True difference.
        sd: True standard deviation of the differences of pairs, above 0.
        n: Number of pairs, at least 2.
        confidence: Confidence of the interval, in (0, 1).

    Example:
        >>> round(paired_power(1.0, 1.0, 10), 3)
        0.803
    """
    from scipy.special import nctdtr

    shift, t = abs(effect) * math.sqrt(n) / sd, t_quantile(0.5 + confidence / 2, n - 1)
    # The far tail is F(-t; d) = 1 - F(t; -d); SciPy has it with a loss of digits where it is next to nothing.
    far = float(nctdtr(n - 1, shift, -t)) if shift < 5 else 0.0
    return min(1.0, max(0.0, 1.0 - float(nctdtr(n - 1, shift, t)) + far))


def detectable_difference(sd: float, n: int, *, power: float = POWER, confidence: float = CONFIDENCE) -> float:
    """Smallest true difference that ``n`` pairs show with the given power (minimal detectable difference).

    It solves :func:`paired_power` for the difference by bisection.

    Args:
        sd: Standard deviation of the differences of pairs; 0 gives 0.
        n: Number of pairs, at least 2.
        power: Wanted probability, in (0.05, 1).
        confidence: Confidence of the interval, in (0, 1).

    Returns:
        The difference, in the unit of ``sd``.

    Example:
        >>> round(detectable_difference(1.0, 10), 2), round(detectable_difference(1.0, 3), 2)
        (1.0, 3.26)
    """
    low, high = 0.0, 1.0
    while paired_power(high, 1.0, n, confidence=confidence) < power:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if paired_power(middle, 1.0, n, confidence=confidence) >= power else (middle, high)
    return high * sd


def equality_power(margin: float, sd: float, n: int, *, confidence: float = CONFIDENCE) -> float:
    r"""Probability that ``n`` pairs are called practically equal when the true difference is zero.

    The interval lies within the margin :math:`m` when :math:`|\bar d| < m - t s / \sqrt n`. The mean and the deviation
    :math:`s` are independent, so the probability is the mean of
    :math:`2 \Phi((m - t s / \sqrt n) \sqrt n / \sigma) - 1` over the chi-square distribution of :math:`s` (power of two
    one-sided tests: Schuirmann 1987; Lakens 2017), taken here at 200 of its quantiles.

    Args:
        margin: Margin, above 0.
        sd: True standard deviation of the differences of pairs, above 0.
        n: Number of pairs, at least 2.
        confidence: Confidence of the interval, in (0, 1).

    Example:
        >>> equality_power(1.0, 1.0, 5) < 0.2 < 0.9 < equality_power(1.0, 1.0, 20)
        True
    """
    from scipy.special import chdtri, ndtr

    t, steps = t_quantile(0.5 + confidence / 2, n - 1), 200
    room = margin * math.sqrt(n) / sd
    found = 0.0
    for step in range(steps):
        spread = math.sqrt(float(chdtri(n - 1, (step + 0.5) / steps)) / (n - 1))
        found += max(0.0, 2 * float(ndtr(room - t * spread)) - 1)
    return found / steps


def seeds_to_detect(effect: float, sd: float, *, power: float = POWER) -> int | None:
    """Smallest number of pairs that show a true difference with the given power; None above ``MOST_SEEDS``.

    Args:
        effect: True difference, not 0.
        sd: Standard deviation of the differences of pairs, at least 0.
        power: Wanted probability, in (0.05, 1).

    Example:
        >>> seeds_to_detect(1.0, 1.0), seeds_to_detect(0.5, 1.0)
        (10, 34)
    """
    return _smallest(lambda n: paired_power(effect, sd, n) >= power) if sd > 0 else MIN_SEEDS


def seeds_to_equal(margin: float, sd: float, *, power: float = POWER) -> int | None:
    """Smallest number of pairs that are called practically equal, with the given power, when nothing differs.

    Args:
        margin: Margin, above 0.
        sd: Standard deviation of the differences of pairs, at least 0.
        power: Wanted probability, in (0, 1).

    Returns:
        The number; None above ``MOST_SEEDS``.

    Example:
        >>> seeds_to_equal(1.0, 1.0)
        13
    """
    return _smallest(lambda n: equality_power(margin, sd, n) >= power) if sd > 0 else MIN_SEEDS


def _smallest(enough: Callable[[int], bool]) -> int | None:
    """Smallest number of seeds for which ``enough`` holds, which holds for all larger ones."""
    high = MIN_SEEDS
    while not enough(high):
        if high == MOST_SEEDS:
            return None
        high = min(2 * high, MOST_SEEDS)
    low = max(MIN_SEEDS, high // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


def sd_interval(sd: float, n: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    r"""Interval of the true standard deviation, :math:`s \sqrt{\nu / \chi^2_{\nu}}` with :math:`\nu = n - 1`.

    Args:
        sd: Sample standard deviation of ``n`` values that are normally distributed.
        n: Number of values, at least 2.
        confidence: Confidence of the interval, in (0, 1).

    Example:
        >>> [round(end, 2) for end in sd_interval(1.0, 3)]
        [0.52, 6.28]
    """
    from scipy.special import chdtri

    tail = (1 - confidence) / 2
    low, high = (sd * math.sqrt((n - 1) / float(chdtri(n - 1, p))) for p in (tail, 1 - tail))
    return low, high
