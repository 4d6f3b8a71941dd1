import dataclasses
from pathlib import Path

import pytest

from batchformer.report import Comparison, Run, paired_difference
from batchformer.report.measures import Measure
from batchformer.report.sentences import (
    arm_text,
    conclusions,
    control_sentence,
    gain_sentence,
    multiple_comparisons,
    verdict_text,
)
from batchformer.report.tables import controls_table

TOP1 = Measure("top1", "top-1")
YEARS = Measure("mae", "mean error", "years", higher_is_better=False)
UP = (0.02, 0.03, 0.02, 0.03, 0.02)
DOWN = tuple(-value for value in UP)
MIXED = (0.02, -0.03, 0.02, -0.03, 0.03)
CASES = {"better": UP, "open": MIXED, "worse": DOWN, "few": UP[:2]}

# What each case must say, and what none of the others may say.
WORDING = {
    "self_only": {
        "better": "relations between samples matter here.",
        "open": "self_only did about as well; these runs do not show that relations between samples matter.",
        "worse": "relations between samples do not explain a gain here.",
    },
    "frozen": {
        "better": "so what the module learns matters here.",
        "open": "frozen did about as well; these runs do not show that what the module learns matters.",
        "worse": "what the module learns does not explain a gain here.",
    },
    "duplicate": {
        "better": "so the layer itself matters here.",
        "open": "duplicate did about as well; these runs do not show that the layer itself matters.",
        "worse": "the layer itself does not explain a gain here.",
    },
    "single_stream": {
        "better": "keeping the plain stream matters here.",
        "open": "single_stream did about as well; these runs do not show that the plain stream is needed.",
        "worse": "the plain stream is not needed here.",
    },
    "my_arm": {
        "better": "the difference between the two matters here.",
        "open": "my_arm did about as well; these runs do not show that the difference between the two matters.",
        "worse": "the difference between the two does not explain a gain here.",
    },
}


def difference(values):
    return paired_difference(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0))


def comparison(**arms):
    """Arm -> one value per seed, as a comparison in memory."""
    runs = [Run(Path(), "r", arm, seed, {"top1": v}) for arm, values in arms.items() for seed, v in enumerate(values)]
    return Comparison(Path(), "r", tuple(arms), tuple(range(5)), "top1", tuple(runs))


SINGLE = "model:\n  batchformer:\n    mode: single_stream\n"


def test_what_the_arms_are_follows_the_settings():
    two = comparison(plain=UP, batchformer=UP, duplicate=UP, single_stream=UP)
    assert arm_text(two, "batchformer") == "BatchFormer: trained, two streams, every sample attends to the whole batch"
    assert arm_text(two, "duplicate") == "a second stream with dropout only, no layer"
    one = dataclasses.replace(two, runs=tuple(dataclasses.replace(run, config=SINGLE) for run in two.runs))
    assert "the mixed stream alone" in arm_text(one, "batchformer")
    assert "two streams" not in arm_text(one, "batchformer")
    assert "a plain stream and a second one" in arm_text(one, "duplicate")
    assert arm_text(one, "duplicate") in [row[-1] for row in controls_table(one).rows]
    assert arm_text(one, "my_arm") == "not described"


def test_two_streams_with_dropout_differ_from_a_single_one_in_more_than_the_layer():
    runs = {"plain": DOWN, "batchformer": UP, "duplicate": DOWN, "frozen": DOWN}
    two = comparison(**runs)
    one = dataclasses.replace(two, runs=tuple(dataclasses.replace(run, config=SINGLE) for run in two.runs))
    assert any("so the layer itself matters here" in line for line in conclusions(two))
    assert not any("the layer itself" in line for line in conclusions(one))
    assert sum("the difference between the two matters here" in line for line in conclusions(one)) == 1
    assert sum("so what the module learns matters here" in line for line in conclusions(one)) == 1


@pytest.mark.parametrize("control", WORDING)
@pytest.mark.parametrize("case", ["better", "open", "worse"])
def test_each_control_says_what_its_numbers_allow(control, case):
    sentence = control_sentence(control, difference(CASES[case]), TOP1)
    assert sentence.endswith(WORDING[control][case])
    assert ("do not show" in sentence) == (case == "open")
    assert sentence.startswith(f"BatchFormer minus {control}: {'-' if case in ('worse',) else '+'}")


@pytest.mark.parametrize("control", WORDING)
def test_with_too_few_seeds_no_control_says_anything(control):
    end = "There are too few seeds to say more."
    assert control_sentence(control, difference(CASES["few"]), TOP1).endswith(f"2 pairs. {end}")
    assert control_sentence(control, difference(()), TOP1).endswith(f"no pair of seeds. {end}")


@pytest.mark.parametrize(
    ("case", "start"),
    [
        (
            "better",
            "BatchFormer improves top-1 over the plain network (+2.40 points, 95 % interval +1.72 to +3.08, 5 pairs).",
        ),
        ("worse", "BatchFormer worsens top-1 against the plain network (-2.40 points"),
        ("open", "These runs show no difference in top-1 between BatchFormer and the plain network (+0.20 points"),
        (
            "few",
            "There are too few seeds to say whether BatchFormer changes top-1 (+2.50 points, no interval, 2 pairs)",
        ),
    ],
)
def test_the_main_sentence(case, start):
    sentence = gain_sentence(difference(CASES[case]), TOP1)
    assert sentence.startswith(start)
    assert ("improves" in sentence) == (case == "better")
    if case == "open":
        assert "neither a gain nor a proof of no effect" in sentence


def test_few_seeds_and_lack_of_spread_are_said():
    few = gain_sentence(difference(UP[:4]), TOP1)
    assert few.endswith("With 4 seeds the interval is only rough.")
    assert verdict_text(difference(UP[:4])) == "improves (few seeds)"
    assert verdict_text(difference(UP)) == "improves"
    assert verdict_text(difference(UP[:2])) == "too few seeds"
    assert "check that the seeds change anything" in gain_sentence(difference((0.01,) * 5), TOP1)


def test_a_gain_without_self_only_leaves_its_source_open():
    plain = (0.8,) * 5
    gain = tuple(0.8 + value for value in UP)
    assert (
        "cannot tell whether the gain comes from relations"
        in conclusions(comparison(plain=plain, batchformer=gain))[-1]
    )
    sentences = conclusions(comparison(plain=plain, batchformer=gain, self_only=plain))
    assert not any("cannot tell" in sentence for sentence in sentences)
    assert "relations between samples matter here" in sentences[-1]


def test_a_gain_that_self_only_reaches_too_is_not_put_down_to_relations():
    plain = (0.8,) * 5
    gain = tuple(0.8 + value for value in UP)
    same = tuple(value - shift for value, shift in zip(gain, MIXED, strict=True))
    sentences = conclusions(comparison(plain=plain, batchformer=gain, self_only=same))
    assert sentences[0].startswith("BatchFormer improves top-1")
    assert "these runs do not show that relations between samples matter" in sentences[1]


def test_without_a_gain_the_controls_have_nothing_to_explain():
    plain = (0.8,) * 5
    open_gain = tuple(0.8 + value for value in MIXED)
    sentences = conclusions(comparison(plain=plain, batchformer=open_gain, frozen=plain))
    assert sentences[1] == "These runs show no gain over the plain network, so the controls have no gain to explain."
    gain = tuple(0.8 + value for value in UP)
    assert not any("no gain" in s for s in conclusions(comparison(plain=plain, batchformer=gain, frozen=plain)))


def test_absent_arms_are_said():
    assert conclusions(comparison(plain=(0.8,) * 5)) == [
        "No run with BatchFormer is finished, so nothing can be said about it yet."
    ]
    assert conclusions(comparison(batchformer=(0.8,) * 5))[0].startswith("No plain run is finished")


@pytest.mark.parametrize(
    ("case", "start"),
    [
        (
            "better",
            "BatchFormer worsens mean error against the plain network (+0.02400 years, 95 % interval +0.01720 to",
        ),
        ("worse", "BatchFormer improves mean error over the plain network (-0.02400 years"),
    ],
)
def test_a_lower_error_is_an_improvement_in_its_own_unit(case, start):
    arm = dataclasses.replace(difference(CASES[case]), higher_is_better=False)
    sentence = gain_sentence(arm, YEARS.fitted([0.05]))
    assert sentence.startswith(start)
    assert "pairs; lower is better)." in sentence
    assert "points" not in sentence
    assert control_sentence("frozen", arm, YEARS).endswith(WORDING["frozen"]["better" if case == "worse" else "worse"])


def test_the_number_of_intervals_is_counted():
    runs = dict.fromkeys(("plain", "batchformer", "frozen", "self_only"), (0.8, 0.81, 0.83))
    text = multiple_comparisons(comparison(**runs))
    assert " 1 question was asked in sequence, each with its full 95 % interval: by luck alone, at most one" in text
    assert " 2 other intervals against plain or a control, each at 97.5 %: all of them hold at once in 19 of 20" in text
    assert "other metric" not in text  # there are none
    runs["frozen"] = runs["self_only"] = (0.8,)
    assert "other interval" not in multiple_comparisons(comparison(**runs))
    few = {name: values[:2] for name, values in runs.items()}
    assert "There are no intervals: they take at least 3 paired seeds." in multiple_comparisons(comparison(**few))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123, "+1.23"),
        (-0.5, "-50.00"),
        (0.000004, "+0.0004"),
        (-0.00004, "-0.004"),
        (0.0, "+0.00"),
        (-1e-17, "+0.00"),
    ],
)
def test_rounding_never_hides_a_sign(value, text):
    assert TOP1.signed(value) == text


def test_an_interval_just_above_zero_does_not_read_as_if_it_held_zero():
    arm = difference((-0.0005, 0.0019, 0.006, 0.0066, 0.0075))
    assert arm.verdict == "improves"
    assert "interval +0.003 to +0.86" in gain_sentence(arm, TOP1)
