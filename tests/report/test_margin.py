"""The margin: the four answers by hand, against an oracle and in a simulation, and on its way to the report."""

import dataclasses
import json
import random

import pytest
import scipy.stats

from batchformer import cli
from batchformer.engine.compare import _joined_plan, _write_plan
from batchformer.engine.errors import ConfigError
from batchformer.engine.recipes import find_recipe
from batchformer.report import ReportError, paired_difference, read_comparison, write_report
from batchformer.report.measures import Measure
from batchformer.report.sentences import control_sentence, gain_sentence, verdict_text
from batchformer.report.tables import main_table

TOP1 = Measure("top1", "top-1")


def decided(*values, margin=0.005, higher=True):
    reference = dict.fromkeys(range(len(values)), 0.0)
    return paired_difference(dict(enumerate(values)), reference, higher_is_better=higher, margin=margin)


UP, FLAT, OPEN = (0.020, 0.021, 0.019), (0.0003, -0.0002, 0.0001), (0.02, -0.02, 0.01)
SMALL_GAIN = (0.0020, 0.0021, 0.0019)
OPEN_GAIN = (0.005, 0.0045, 0.0052)


@pytest.mark.parametrize(
    ("values", "higher", "decision"),
    [
        (UP, True, "better"),
        (UP, False, "worse"),
        (tuple(-value for value in UP), True, "worse"),
        (tuple(-value for value in UP), False, "better"),
        (FLAT, True, "practically equal"),
        (SMALL_GAIN, True, "practically equal"),
        (OPEN, True, "undecided"),
        (OPEN_GAIN, True, "undecided"),
        (UP[:2], True, "too few seeds"),
    ],
)
def test_the_four_answers(values, higher, decision):
    assert decided(*values, higher=higher).decision == decision
    assert decided(*values, margin=None).decision is None
    assert verdict_text(decided(*values, higher=higher)).startswith(decision)


@pytest.mark.parametrize("seed", range(60))
def test_practically_equal_is_the_result_of_two_one_sided_tests(seed):
    source = random.Random(seed)
    values = [source.gauss(0.0, 0.004) for _ in range(6)]
    p_low = scipy.stats.ttest_1samp(values, -0.005, alternative="greater").pvalue
    p_high = scipy.stats.ttest_1samp(values, 0.005, alternative="less").pvalue
    assert (decided(*values).decision == "practically equal") == (max(p_low, p_high) < 0.025)


@pytest.mark.parametrize("truth", [-0.006, -0.005, -0.004, 0.0, 0.0049, 0.005, 0.0051])
def test_answers_are_wrong_in_at_most_one_of_twenty_comparisons(truth):
    source, wrong = random.Random(int(1e4 * truth)), 0
    right = {"undecided", "better" if truth > 0.005 else "worse" if truth < -0.005 else "practically equal"}
    right |= {"better", "practically equal"} if abs(truth) == 0.005 and truth > 0 else set()
    for _ in range(1500):
        answer = decided(*(truth + source.gauss(0, 0.002) for _ in range(5))).decision
        wrong += answer not in right
    assert wrong / 1500 <= 0.05 + 3 * (0.05 * 0.95 / 1500) ** 0.5


def test_sentences_say_what_the_margin_decides():
    assert gain_sentence(decided(*UP), TOP1).startswith(
        "BatchFormer is better in top-1 than the plain network by more than the margin of 0.5 points (+2.00 points,"
    )
    assert "is worse in top-1" in gain_sentence(decided(*(-value for value in UP)), TOP1)
    assert "practically equal in top-1" in gain_sentence(decided(*FLAT), TOP1)
    assert "A gain is shown, but it is smaller than the margin." in gain_sentence(decided(*SMALL_GAIN), TOP1)
    assert "do not decide whether the difference in top-1" in gain_sentence(decided(*OPEN), TOP1)
    assert "A gain is shown, but its size is open." in gain_sentence(decided(*OPEN_GAIN), TOP1)
    assert "is shown, but" not in gain_sentence(decided(*OPEN), TOP1)
    assert "too few seeds" in gain_sentence(decided(*UP[:2]), TOP1)
    assert "Measured by the margin of 0.5 points: undecided." in control_sentence("frozen", decided(*OPEN), TOP1)


def test_a_margin_is_a_number_above_zero(folders, tmp_path):
    with pytest.raises(ValueError, match="Expected a margin above 0, got -1"):
        decided(0.1, 0.2, margin=-1)
    folder = folders.comparison(tmp_path / "c", plan={"margin": "wide"})
    with pytest.raises(ReportError, match="Expected a margin above 0, got 'wide'"):
        read_comparison(folder)
    good = folders.comparison(tmp_path / "good")
    assert cli.main(["report", str(good), "--margin", "nan"]) == 2
    assert cli.main(["compare", "--margin=-1"]) == 2


def test_the_margin_of_the_plan_judges_the_primary_metric_in_points(folders, tmp_path):
    values = {"plain": [0.8, 0.81, 0.82], "batchformer": [0.8201, 0.83, 0.84]}
    comparison = read_comparison(folders.comparison(tmp_path / "c", top1=values, plan={"margin": 0.5}))
    assert main_table(comparison).rows[1][5] == "better (few seeds)"
    assert comparison.difference("batchformer", "plain", "ece").margin is None
    wide = dataclasses.replace(comparison, margin=3.0)
    assert main_table(wide).rows[1][5] == "practically equal (few seeds)"
    assert any("Verdicts use the margin of 3 points." in note for note in main_table(wide).notes)
    text = write_report([comparison.path], tmp_path / "out").report.read_text()
    assert "Margin: 0.5 points, written down before the runs" in text
    assert "after the runs" not in text


def test_a_report_takes_a_margin_for_an_older_comparison_and_says_so(folders, tmp_path):
    values = {"plain": [3.0, 3.1, 3.2], "batchformer": [2.5, 2.6, 2.71]}
    metrics = {arm: [{"mae": value} for value in row] for arm, row in values.items()}
    folder = tmp_path / "c"
    for arm, rows in metrics.items():
        for seed, row in enumerate(rows):
            folders.run(folder / arm / f"seed{seed}", arm, seed, metrics=row, result={"measures": [folders.error]})
    plan = {"recipe": "longtail/fashion-mnist-lt", "arms": list(values), "seeds": [0, 1, 2], "primary": "mae"}
    folders.json(folder / "compare.json", plan)
    assert cli.main(["report", str(folder), "--margin", "0.25", "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.md").read_text()
    assert "is better in mean error than the plain network by more than the margin of 0.25 years" in text
    assert "The margin was named with the report, after the runs." in text
    assert "--margin 0.25`" in text
    assert "better (few seeds)" in text
    assert ",better" in (tmp_path / "out/differences.csv").read_text()


RECIPE = find_recipe("longtail/folder").path


def test_a_comparison_keeps_the_margin_that_was_written_down_first(tmp_path):
    def write(folder, asked):
        _write_plan(folder, _joined_plan(RECIPE, (), folder, asked), 1)

    plan = {"recipe": "r", "arms": ["plain"], "seeds": [0], "units": [], "data": {}, "primary": "top1"}
    write(tmp_path, {**plan, "margin": 0.5})
    write(tmp_path, {**plan, "seeds": [1]})
    assert json.loads((tmp_path / "compare.json").read_text())["margin"] == 0.5
    write(tmp_path, {**plan, "margin": 0.5})
    with pytest.raises(ConfigError, match=r"written down before the runs \(0.5\), got 0.2.*report .* --margin 0.2"):
        write(tmp_path, {**plan, "margin": 0.2})
    other = tmp_path / "other"
    other.mkdir()
    write(other, plan)
    with pytest.raises(ConfigError, match=r"before the runs \(none\), got 0.2"):
        write(other, {**plan, "margin": 0.2})
