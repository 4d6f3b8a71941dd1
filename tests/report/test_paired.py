import math
import random
import statistics

import pytest
import scipy.stats

from batchformer.report.paired import average_units, paired_difference, summarize, t_quantile

NAN = math.nan


def by_seed(*values: float) -> dict[int, float]:
    return dict(enumerate(values))


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_summary_equals_the_standard_library(n):
    values = [random.Random(n).uniform(0, 1) for _ in range(n)]
    summary = summarize(values)
    assert summary.mean == pytest.approx(statistics.mean(values), abs=1e-15)
    assert summary.sd == pytest.approx(statistics.stdev(values), abs=1e-15)
    assert (summary.n, summary.undefined) == (n, 0)


def test_summary_of_nothing_one_and_undefined_values():
    empty, one, holes = summarize([]), summarize([0.4]), summarize([0.2, NAN, 0.4, math.inf])
    assert empty.n == 0
    assert math.isnan(empty.mean)
    assert (one.n, one.mean) == (1, 0.4)
    assert math.isnan(one.sd)
    assert (holes.n, holes.undefined) == (2, 2)
    assert holes.mean == pytest.approx(0.3)
    assert summarize([NAN, NAN]).undefined == 2


def test_equal_values_have_exactly_no_spread():
    assert summarize([0.1] * 7).sd == 0.0  # the rounded mean of seven 0.1 is not 0.1
    assert summarize([0.1] * 7).mean == 0.1


@pytest.mark.parametrize("n", [3, 4, 5, 12])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_interval_equals_scipys_paired_t_test(n, confidence):
    source = random.Random(10 * n)
    one = [source.uniform(0.7, 0.9) for _ in range(n)]
    two = [value - 0.01 + source.gauss(0, 0.01) for value in one]
    difference = paired_difference(by_seed(*one), by_seed(*two), confidence=confidence)
    oracle = scipy.stats.ttest_rel(one, two)
    interval = oracle.confidence_interval(confidence)
    assert difference.mean == pytest.approx(sum(a - b for a, b in zip(one, two, strict=True)) / n, abs=1e-15)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert (difference.verdict == "no difference shown") == (oracle.pvalue >= 1 - confidence)


@pytest.mark.parametrize(("probability", "degrees"), [(0.975, 1), (0.975, 2), (0.95, 4), (0.995, 30)])
def test_t_quantile_equals_scipy_stats(probability, degrees):
    assert t_quantile(probability, degrees) == pytest.approx(scipy.stats.t.ppf(probability, degrees), rel=1e-10)


def test_interval_covers_the_truth_as_often_as_it_says():
    source = random.Random(0)
    hits = 0
    for _ in range(2000):
        arm = {seed: 0.02 + source.gauss(0, 0.01) for seed in range(5)}
        difference = paired_difference(arm, dict.fromkeys(range(5), 0.0))
        hits += difference.low <= 0.02 <= difference.high
    assert 0.935 <= hits / 2000 <= 0.965  # three standard errors


@pytest.mark.parametrize(
    ("values", "higher", "verdict"),
    [
        ((0.02, 0.03, 0.02, 0.03, 0.02), True, "improves"),
        ((-0.02, -0.03, -0.02, -0.03, -0.02), True, "worsens"),
        ((0.02, 0.03, 0.02, 0.03, 0.02), False, "worsens"),
        ((-0.02, -0.03, -0.02, -0.03, -0.02), False, "improves"),
        ((0.02, -0.03, 0.02, -0.03, 0.02), True, "no difference shown"),
        ((0.02, 0.03), True, "too few seeds"),
        ((0.02,), True, "too few seeds"),
        ((), True, "too few seeds"),
    ],
)
def test_verdicts(values, higher, verdict):
    zero = dict.fromkeys(range(len(values)), 0.0)
    assert paired_difference(by_seed(*values), zero, higher_is_better=higher).verdict == verdict


def test_an_interval_that_touches_zero_includes_it():
    assert paired_difference(by_seed(0.0, 0.0, 0.0), by_seed(0.0, 0.0, 0.0)).verdict == "no difference shown"


def test_two_pairs_have_no_interval_however_clear_they_look():
    difference = paired_difference(by_seed(0.9, 0.9), by_seed(0.1, 0.1))
    assert not difference.has_interval
    assert math.isnan(difference.low)
    assert math.isnan(difference.high)
    assert difference.mean == pytest.approx(0.8)


@pytest.mark.parametrize(("n", "few"), [(2, False), (3, True), (4, True), (5, False)])
def test_few_pairs_are_flagged(n, few):
    assert paired_difference(dict.fromkeys(range(n), 0.5), dict.fromkeys(range(n), 0.4)).few is few


def test_missing_and_undefined_pairs_are_left_out_and_listed():
    arm = {0: 0.5, 1: 0.6, 2: NAN, 3: 0.7, 7: 0.9}
    reference = {0: 0.4, 1: 0.4, 2: 0.4, 3: 0.4, 4: 0.1}
    difference = paired_difference(arm, reference)
    assert difference.seeds == (0, 1, 3)
    assert (difference.unpaired, difference.undefined) == ((4, 7), (2,))
    assert difference.mean == pytest.approx(0.2)


def test_pairs_go_by_seed_and_not_by_order():
    one, two = {3: 0.9, 1: 0.5, 2: 0.7}, {1: 0.4, 2: 0.6, 3: 0.8}
    assert paired_difference(one, two).differences == pytest.approx((0.1, 0.1, 0.1))


def test_no_spread_between_seeds_is_noticed():
    difference = paired_difference(by_seed(0.51, 0.61, 0.71), by_seed(0.5, 0.6, 0.7))
    assert difference.no_spread  # equal up to rounding only
    assert difference.verdict == "improves"
    assert not paired_difference(by_seed(0.51, 0.61, 0.72), by_seed(0.5, 0.6, 0.7)).no_spread
    assert not paired_difference(by_seed(0.51), by_seed(0.5)).no_spread


def test_swapping_the_arms_mirrors_the_interval():
    one, two = by_seed(0.5, 0.6, 0.8), by_seed(0.4, 0.7, 0.6)
    there, back = paired_difference(one, two), paired_difference(two, one)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_outside_the_unit_interval_is_refused(confidence):
    with pytest.raises(ValueError, match=r"Expected a confidence between 0 and 1, got .* Pass 0\.95"):
        paired_difference({}, {}, confidence=confidence)


def test_a_seed_counts_once_with_the_mean_of_all_its_units():
    values = {0: {"a": 1.0, "b": 3.0}, 1: {"a": 1.0}, 2: {"b": 5.0, "a": NAN, "c": 9.0}}
    means = average_units(values, ["a", "b"])
    assert means[0] == 2.0
    assert math.isnan(means[2])  # a mean over fewer units would be another quantity
    assert list(means) == [0, 2]
    assert average_units({7: {"": 0.1}}, [""]) == {7: 0.1}  # to the bit


def test_units_of_a_seed_are_no_further_pairs():
    """Ten units of one seed that agree say no more than one: the interval is that of the means of the seeds."""
    source = random.Random(0)
    arm = {s: {f"u{u}": 0.8 + 0.05 * source.gauss(0, 1) for u in range(10)} for s in range(4)}
    reference = {s: dict.fromkeys(units, 0.8) for s, units in arm.items()}
    names = [f"u{u}" for u in range(10)]
    difference = paired_difference(average_units(arm, names), average_units(reference, names))
    oracle = scipy.stats.ttest_1samp([statistics.mean(units.values()) - 0.8 for units in arm.values()], 0.0)
    interval = oracle.confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert difference.n == 4
