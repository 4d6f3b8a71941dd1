"""Power of the paired t test against simulations and against SciPy's distributions."""

import math

import numpy as np
import pytest
import scipy.stats

from batchformer.report.paired import paired_difference
from batchformer.report.power import (
    MOST_SEEDS,
    detectable_difference,
    equality_power,
    paired_power,
    sd_interval,
    seeds_to_detect,
    seeds_to_equal,
)


def simulated(effect, n, *, sd=1.0, times=40_000, seed=0):
    """Means, standard deviations and half widths of the interval of many made-up comparisons."""
    values = np.random.default_rng([seed, n, round(100 * effect)]).normal(effect, sd, (times, n))
    spread = values.std(axis=1, ddof=1)
    return values.mean(axis=1), scipy.stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n), spread


@pytest.mark.parametrize("n", [3, 5, 10, 30])
@pytest.mark.parametrize("effect", [0.0, 0.5, 1.0, 3.0])
def test_power_is_that_of_a_simulation(n, effect):
    mean, half, _ = simulated(effect, n)
    share = (abs(mean) > half).mean()
    assert paired_power(effect, 1.0, n) == pytest.approx(share, abs=4 * math.sqrt(0.25 / 40_000))
    assert paired_power(-2 * effect, 2.0, n) == pytest.approx(paired_power(effect, 1.0, n), abs=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4, 10, 50, 400])
@pytest.mark.parametrize("effect", [0.1, 0.7, 2.0, 8.0])
def test_power_is_that_of_the_noncentral_distribution(n, effect):
    t, shift = scipy.stats.t.ppf(0.975, n - 1), effect * math.sqrt(n)
    both = scipy.stats.ncf.sf(t**2, 1, n - 1, shift**2)  # the square of a noncentral t is a noncentral F
    assert paired_power(effect, 1.0, n) == pytest.approx(both, abs=2e-6)


@pytest.mark.parametrize("n", [3, 4, 5, 8, 20, 100])
@pytest.mark.parametrize("sd", [0.003, 1.0, 40.0])
def test_the_detectable_difference_has_the_wanted_power(n, sd):
    assert paired_power(detectable_difference(sd, n), sd, n) == pytest.approx(0.8, abs=1e-6)
    assert detectable_difference(sd, n) > detectable_difference(sd, n + 1)
    assert detectable_difference(0.0, n) == 0.0


@pytest.mark.parametrize("effect", [0.2, 0.5, 1.0, 2.0, 30.0])
def test_the_number_of_seeds_is_the_smallest_with_the_wanted_power(effect):
    n = seeds_to_detect(effect, 1.0)
    assert n >= 3
    assert paired_power(effect, 1.0, n) >= 0.8
    assert n == 3 or paired_power(effect, 1.0, n - 1) < 0.8
    equal = seeds_to_equal(effect, 1.0)
    assert equality_power(effect, 1.0, equal) >= 0.8
    assert equal == 3 or equality_power(effect, 1.0, equal - 1) < 0.8


def test_the_search_for_seeds_ends():
    assert seeds_to_detect(1e-6, 1.0) is None
    assert seeds_to_equal(1e-6, 1.0) is None
    assert seeds_to_detect(0.031, 1.0) <= MOST_SEEDS
    assert (seeds_to_detect(1.0, 0.0), seeds_to_equal(1.0, 0.0)) == (3, 3)


@pytest.mark.parametrize(("n", "margin"), [(3, 2.0), (5, 1.0), (10, 1.0), (20, 0.6)])
def test_the_power_of_practically_equal_is_that_of_a_simulation(n, margin):
    mean, half, _ = simulated(0.0, n, seed=1)
    share = ((mean + half < margin) & (mean - half > -margin)).mean()
    assert equality_power(margin, 1.0, n) == pytest.approx(share, abs=0.012)
    one = paired_difference(dict(enumerate([0.01, -0.01, 0.0])), dict.fromkeys(range(3), 0.0), margin=margin)
    assert one.decision == "practically equal"


@pytest.mark.parametrize("n", [3, 5, 20])
def test_the_interval_of_the_deviation_covers_the_truth(n):
    _, _, spread = simulated(0.0, n, sd=1.0, seed=2)
    low, high = sd_interval(1.0, n)
    assert ((low * spread <= 1.0) & (high * spread >= 1.0)).mean() == pytest.approx(0.95, abs=0.005)
    oracle = [math.sqrt((n - 1) / scipy.stats.chi2.ppf(p, n - 1)) for p in (0.975, 0.025)]
    assert (low, high) == pytest.approx(oracle)
