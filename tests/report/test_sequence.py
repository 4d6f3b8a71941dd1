"""The sequence of questions: where it stops, what that means, and that neither it nor what stands beside it lies."""

from pathlib import Path

import numpy as np
import pytest

from batchformer.report import Comparison, Run, paired_difference
from batchformer.report.flat_rows import difference_rows
from batchformer.report.paired import MIN_SEEDS
from batchformer.report.sentences import conclusions, stop_sentence
from batchformer.report.sequence import ORDER, beside, references, simultaneous, walk
from batchformer.report.tables import controls_table, main_table

PLAIN = (0.80, 0.81, 0.79, 0.80, 0.82)
NOISE = (0.002, -0.001, 0.001, -0.002, 0.001)


def shifted(points):
    return tuple(value + points / 100 + noise for value, noise in zip(PLAIN, NOISE, strict=True))


def comparison(**arms):
    runs = [Run(Path(), "r", arm, seed, {"top1": v}) for arm, values in arms.items() for seed, v in enumerate(values)]
    return Comparison(Path(), "r", tuple(arms), tuple(range(5)), "top1", tuple(runs))


GAIN, NOTHING = shifted(3), shifted(0)


@pytest.mark.parametrize(
    ("arms", "asked", "sentence"),
    [
        ({"batchformer": NOTHING, "self_only": NOTHING, "frozen": NOTHING}, 1, "at plain: no gain is shown, so self_"),
        ({"batchformer": GAIN, "self_only": GAIN, "frozen": PLAIN}, 2, "not shown to come from relations between"),
        (
            {"batchformer": GAIN, "self_only": PLAIN, "frozen": GAIN, "duplicate": PLAIN},
            3,
            "from what the module learns",
        ),
        ({"batchformer": GAIN, "self_only": PLAIN, "frozen": PLAIN, "duplicate": GAIN}, 4, "asked to its end"),
        ({"batchformer": GAIN, "frozen": PLAIN}, 2, "asked to its end"),
        ({"batchformer": GAIN[:2], "frozen": PLAIN}, 1, "too few seeds for an answer, so frozen was not asked"),
        ({"batchformer": GAIN, "self_only": (), "frozen": PLAIN}, 2, "at self_only: there are too few seeds"),
    ],
)
def test_the_sequence_stops_at_the_first_question_without_a_yes(arms, asked, sentence):
    shown = comparison(plain=PLAIN, **arms)
    assert sum(step.asked for step in shown.steps) == asked
    assert sentence in stop_sentence(shown.steps)
    table = controls_table(shown)
    assert [row[0] for row in table.rows] == [arm for arm in ORDER if arm in shown.arms]
    assert [row[5] == "not asked" for row in table.rows] == [not step.asked for step in shown.steps]
    assert sentence in table.notes[-1]
    told = conclusions(shown)
    assert any(sentence in line for line in told) == (asked < len(shown.steps))
    for step in shown.steps[1:]:
        assert any(line.startswith(f"BatchFormer minus {step.reference}:") for line in told) == step.asked
    rows = {row["reference"]: row for row in difference_rows([shown]) if row["arm"] == "batchformer"}
    assert [rows[step.reference]["verdict"] == "not asked" for step in shown.steps] == [
        not s.asked for s in shown.steps
    ]


def test_what_stands_beside_the_sequence_has_simultaneous_intervals():
    shown = comparison(plain=PLAIN, batchformer=GAIN, single_stream=NOTHING, self_only=NOTHING, mine=NOTHING)
    assert len(shown.beside) == 5
    assert shown.beside_confidence == pytest.approx(0.99)
    for arm, reference in shown.beside:
        assert shown.difference(arm, reference, "top1").confidence == shown.beside_confidence
    assert shown.difference("batchformer", "plain", "top1").confidence == 0.95
    assert shown.difference("batchformer", "self_only", "top1").confidence == 0.95
    assert "at 99 % each, so that all 5 comparisons" in " ".join(main_table(shown).notes)
    assert [row[:2] for row in controls_table(shown).rows] == [
        ("plain", "1"),
        ("self_only", "2"),
        ("single_stream", "beside"),
        ("mine", "beside"),
    ]


def test_one_comparison_beside_keeps_its_confidence():
    shown = comparison(plain=PLAIN, batchformer=GAIN, self_only=NOTHING)
    assert shown.beside == (("self_only", "plain"),)
    assert shown.beside_confidence == 0.95
    assert simultaneous(0) == 0.95
    assert references(["plain", "self_only"]) == ()
    assert beside(["batchformer", "frozen"]) == ()


@pytest.mark.parametrize(
    "means",
    [
        {},  # nothing differs
        {"batchformer": 0.01, "self_only": 0.01, "frozen": 0.01, "duplicate": 0.01},  # a gain, all of it elsewhere
        {"batchformer": 0.01, "frozen": 0.01},  # relations matter, learning does not
        {"frozen": 0.01},
    ],
)
def test_the_sequence_makes_a_false_claim_in_at_most_one_of_twenty_comparisons(means):
    source, false, times = np.random.default_rng(len(means)), 0, 1200
    for _ in range(times):
        shared = source.normal(0.8, 0.01, 5)
        arms = {a: shared + source.normal(means.get(a, 0.0), 0.004, 5) for a in ("batchformer", *ORDER)}
        by_seed = {arm: dict(enumerate(values.tolist())) for arm, values in arms.items()}
        steps = walk({arm: paired_difference(by_seed["batchformer"], by_seed[arm]) for arm in ORDER})
        truth = means.get("batchformer", 0.0)
        false += any(step.passed and truth <= means.get(step.reference, 0.0) for step in steps)
    assert false / times <= 0.05 + 3 * (0.05 * 0.95 / times) ** 0.5


@pytest.mark.parametrize("seeds", [MIN_SEEDS, 5, 10])
def test_intervals_beside_the_sequence_hold_all_at_once(seeds):
    arms = ["plain", "batchformer", "self_only", "frozen", "duplicate", "single_stream"]
    pairs = beside(arms)
    source, held, times = np.random.default_rng(seeds), 0, 1000
    for _ in range(times):
        shared = source.normal(0.8, 0.01, seeds)
        values = {arm: dict(enumerate((shared + source.normal(0, 0.004, seeds)).tolist())) for arm in arms}
        found = [
            paired_difference(values[arm], values[other], confidence=simultaneous(len(pairs))) for arm, other in pairs
        ]
        held += all(difference.low <= 0.0 <= difference.high for difference in found)
    assert held / times >= 0.95 - 3 * (0.05 * 0.95 / times) ** 0.5
