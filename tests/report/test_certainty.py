"""Certainty beside the interval, against SciPy and in simulations, and its table."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from batchformer.report import Comparison, Measure, Run, comparison_text, paired_difference, read_comparison
from batchformer.report import write_report as write
from batchformer.report.certainty import (
    certainty_table,
    correlation,
    pairing_ratio,
    probability_above,
    seeds_won,
    sign_flip_p,
    smallest_p,
)

YEARS = Measure("mae", "mean error", "years", higher_is_better=False)


def comparison(plain, arm, *more, measure=None):
    metric = measure.name if measure else "top1"
    arms = {"plain": plain, "batchformer": arm, **dict(more)}
    described = {"measures": (measure,)} if measure else {}
    runs = [
        Run(Path(), "r", name, seed, {metric: value}, **described)
        for name, values in arms.items()
        for seed, value in enumerate(values)
    ]
    return Comparison(Path(), "r", tuple(arms), tuple(range(len(plain))), metric, tuple(runs))


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_the_next_value_falls_where_the_predictive_distribution_says(n):
    source = np.random.default_rng(n)
    ranks = [1 - probability_above(row[:-1], row[-1]) for row in source.normal(0.3, 2.0, (4000, n + 1)).tolist()]
    assert scipy.stats.kstest(ranks, "uniform").pvalue > 0.001


@pytest.mark.parametrize("n", [2, 4, 9])
def test_the_predictive_distribution_is_students(n):
    values = np.random.default_rng(n).normal(1.0, 1.0, n).tolist()
    scale = np.std(values, ddof=1) * math.sqrt(1 + 1 / n)
    assert probability_above(values) == pytest.approx(scipy.stats.t.sf(0, n - 1, np.mean(values), scale))
    assert math.isnan(probability_above([1.0]))
    assert math.isnan(probability_above([1.0, 1.0]))


@pytest.mark.parametrize("n", [2, 3, 5, 8])
@pytest.mark.parametrize("seed", range(4))
def test_the_exact_test_is_scipys(n, seed):
    source = random.Random(10 * n + seed)
    values = [round(source.gauss(0.5, 1.0), 2) for _ in range(n)]
    oracle = scipy.stats.permutation_test(
        (np.array(values),), lambda x, axis: x.mean(axis=axis), permutation_type="samples", n_resamples=np.inf
    )
    # SciPy doubles the smaller tail, which here is the same: the distribution is symmetric about zero.
    assert sign_flip_p(values) == pytest.approx(min(1.0, oracle.pvalue))
    assert sign_flip_p([abs(value) + 0.1 for value in values]) == smallest_p(n)


def test_the_exact_test_rejects_as_often_as_it_says():
    source, rejected = np.random.default_rng(0), 0
    for row in source.standard_cauchy((1500, 6)).tolist():  # far from normal
        rejected += sign_flip_p(row) <= 0.05
    assert rejected / 1500 <= 0.05 + 3 * (0.05 * 0.95 / 1500) ** 0.5


def test_rounding_does_not_split_equal_sums():
    assert sign_flip_p([0.1, 0.2, 0.3, 0.30000000000000004]) == 2 / 16
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1.0
    assert sign_flip_p([0.1]) == smallest_p(1) == 1.0


@pytest.mark.parametrize("n", [2, 3, 10])
def test_correlation_and_pairing_are_those_of_numpy(n):
    source = np.random.default_rng(n)
    shared = source.normal(0, 2, n)
    one, two = ((shared + source.normal(0, 1, n)).tolist() for _ in range(2))
    assert correlation(one, two) == pytest.approx(np.corrcoef(one, two)[0, 1])
    difference = np.subtract(one, two)
    oracle = (np.var(one, ddof=1) + np.var(two, ddof=1)) / np.var(difference, ddof=1)
    assert pairing_ratio(one, two) == pytest.approx(oracle)
    assert math.isnan(correlation(one, [1.0] * n))
    assert math.isnan(pairing_ratio(one, one))


def test_as_many_seeds_without_pairs_give_the_same_precision():
    source, n = np.random.default_rng(1), 4000
    shared = source.normal(0, 2, n)
    ratio = pairing_ratio((shared + source.normal(0, 1, n)).tolist(), (shared + source.normal(0, 1, n)).tolist())
    assert ratio == pytest.approx(10 / 2, rel=0.1)  # variances 5 and 5 against 2
    means = source.normal(0, math.sqrt(5), (2, 5000, 50)).mean(axis=2)  # 50 seeds in each arm without pairs
    assert (means[0] - means[1]).var() == pytest.approx(2 / 10, rel=0.1)  # that of 10 pairs


def test_ties_are_not_won_and_errors_are_won_by_being_lower():
    values = paired_difference({0: 3.0, 1: 2.0, 2: 1.0, 3: 5.0}, dict.fromkeys(range(4), 2.0))
    assert seeds_won(values) == 2
    lower = paired_difference({0: 3.0, 1: 2.0, 2: 1.0}, dict.fromkeys(range(3), 2.0), higher_is_better=False)
    assert seeds_won(lower) == 1


def test_the_table_by_hand():
    shown = comparison((0.80, 0.81, 0.82), (0.81, 0.83, 0.85), ("frozen", (0.81, 0.83, 0.85)))
    (table,) = certainty_table(shown)
    gains, same = table.rows
    assert gains[:2] == ("plain", "3 of 3")
    assert gains[2] == "89 %"
    assert gains[3] == "+1.00"
    assert gains[5] == "0.25"
    assert same == ("frozen", "0 of 3", "n/a", "+1.00", "n/a", "1")
    notes = " ".join(table.notes)
    assert "on 3 of 3 seeds; the next seed gains with a probability of 89 %" in notes
    assert "With 3 seeds the smallest p value of the exact test is 0.25. It takes 6 seeds to reach 0.05." in notes


def test_an_error_that_falls_is_a_gain():
    (table,) = certainty_table(comparison((3.0, 3.1, 3.3), (2.0, 2.0, 2.4), measure=YEARS))
    assert table.rows[0][1:3] == ("3 of 3", "over 99 %")


@pytest.mark.parametrize("pairs", [0, 1, 2, 10])
def test_few_and_many_seeds(pairs):
    plain = tuple(0.8 + 0.01 * (seed % 3) for seed in range(pairs))
    tables = certainty_table(comparison(plain, tuple(value + 0.01 * (1 + i % 2) for i, value in enumerate(plain))))
    if not pairs:
        assert tables == []
        return
    row, notes = tables[0].rows[0], " ".join(tables[0].notes)
    assert row[1] == f"{pairs} of {pairs}"
    assert (row[2] == "n/a") == (pairs < 2)
    assert (row[5] == "n/a") == (pairs == 10)
    assert ("smallest p value" in notes) == (pairs < 10)


def test_both_reports_have_the_table(folders, tmp_path):
    folder = folders.comparison(tmp_path / "c")
    assert "\nHow sure\n" in comparison_text(read_comparison(folder))
    assert "### How sure" in write([folder], tmp_path / "out").report.read_text()
