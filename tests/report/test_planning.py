"""The table of the number of seeds: by hand, in any unit, and where there is nothing to say."""

import dataclasses
from pathlib import Path

import pytest

from batchformer.report import Comparison, Measure, Run, comparison_text, read_comparison, write_report
from batchformer.report.paired import paired_difference
from batchformer.report.planning import duration, planning_table, seconds_per_seed
from batchformer.report.power import detectable_difference, seeds_to_detect, seeds_to_equal

PLAIN = (0.80, 0.81, 0.79, 0.80, 0.82, 0.78, 0.80, 0.81, 0.79, 0.80)
MORE = (0.02, 0.01, 0.00, 0.03, 0.01, 0.02, 0.00, 0.01, 0.02, 0.03)
YEARS = Measure("mae", "mean error", "years", higher_is_better=False)


def comparison(pairs, *, seconds=60.0, measure=None, margin=None):
    metric, cost = (measure.name if measure else "top1"), {"train_seconds": seconds} if seconds else {}
    arms = {"plain": PLAIN[:pairs], "batchformer": [a + b for a, b in zip(PLAIN, MORE, strict=True)][:pairs]}
    runs = [
        Run(Path(), "r", arm, seed, {metric: value}, cost=cost, **({"measures": (measure,)} if measure else {}))
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]
    return Comparison(Path(), "r", tuple(arms), tuple(range(pairs)), metric, tuple(runs), margin=margin)


@pytest.mark.parametrize("pairs", [1, 2])
def test_one_or_two_seeds_tell_no_spread(pairs):
    assert planning_table(comparison(pairs)) == []


def test_the_table_by_hand():
    (table,) = planning_table(comparison(5))
    sd = paired_difference(dict(enumerate(MORE[:5])), dict.fromkeys(range(5), 0.0)).sd
    assert [row[0] for row in table.rows] == ["5", "10", "20"]
    assert [row[1] for row in table.rows] == [f"{100 * detectable_difference(sd, n):.2f}" for n in (5, 10, 20)]
    assert [row[3] for row in table.rows] == ["0", "10 minutes", "30 minutes"]  # two arms, a minute each
    assert table.columns[1] == "detectable difference (percentage points)"
    assert "5 seeds tell only roughly" in table.notes[0]
    assert "--margin" in table.notes[1]
    assert [row[0] for row in planning_table(comparison(10))[0].rows] == ["10", "20"]


def test_the_seeds_of_a_margin_and_their_time():
    shown = comparison(5, margin=0.5)
    (table,) = planning_table(shown)
    difference = shown.difference("batchformer", "plain", "top1")
    detect, equal = seeds_to_detect(0.005, difference.sd), seeds_to_equal(0.005, difference.sd)
    assert table.rows[-1][0] == str(detect)
    assert f"the margin of 0.5 points takes {detect} seeds to be shown" in table.notes[1]
    assert (
        f"practically equal when nothing differs takes {equal} seeds, {equal - 5} more than now: about"
        in table.notes[1]
    )
    assert duration(120 * (equal - 5)) in table.notes[1]
    tiny = planning_table(dataclasses.replace(shown, margin=1e-4))[0].notes[1]
    assert "takes more than 10,000 seeds" in tiny


def test_another_unit_and_unknown_times():
    (table,) = planning_table(comparison(4, seconds=None, measure=YEARS, margin=0.25))
    assert "margin of 0.25 years" in table.notes[1]
    assert "of training" not in table.notes[1]
    assert {row[3] for row in table.rows} == {"n/a"}
    assert table.columns[1] == "detectable difference (years)"


def test_equal_differences_tell_nothing_about_seeds(folders, tmp_path):
    values = {"plain": [0.5, 0.5, 0.5], "batchformer": [0.75, 0.75, 0.75]}
    assert planning_table(read_comparison(folders.comparison(tmp_path / "c", top1=values))) == []


def test_a_seed_takes_the_time_of_all_arms_and_units(folders, tmp_path):
    arms, cost = ("plain", "batchformer", "frozen"), {"result": {"cost": {"train_seconds": 7.0}}}
    folder = folders.comparison(tmp_path / "c", arms, units=("photo", "sketch"), **cost)
    assert seconds_per_seed(read_comparison(folder)) == 42.0
    assert "How many seeds" in comparison_text(read_comparison(folder))
    assert "### How many seeds" in write_report([folder], tmp_path / "out").report.read_text()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1, "1 second"), (59.4, "59 seconds"), (59.7, "1 minute"), (3599, "1.0 hours"), (47 * 3600, "47.0 hours")],
)
def test_times_in_words(seconds, words):
    assert duration(seconds) == words
