"""Runs on different data in one comparison: a caveat that comes first, and no verdict anywhere."""

import json
import re

import pytest

from batchformer.report import comparison_text, read_comparison, write_report
from batchformer.report.caveats import caveats
from batchformer.report.convergence import convergence_sentence
from batchformer.report.first_screen import first_screen
from batchformer.report.reading import with_margin
from batchformer.report.runs import Run
from batchformer.report.sentences import DIFFERENT_DATA, conclusions
from batchformer.report.settings import setting_differences
from batchformer.report.tables import controls_table, main_table

DATA = {"train": "1f", "val": "2e", "test": "2e"}
ARMS = ("plain", "batchformer", "self_only")


def with_data(folders, path, plan=DATA, **changed):
    """A comparison on ``DATA`` of five seeds, in which the runs in ``changed`` (arm and seed) have other entries."""
    folder = folders.comparison(path, ARMS, range(5), result={"data": DATA}, plan={"data": {"": plan}} if plan else {})
    for name, data in changed.items():
        arm, _, seed = name.rpartition("_")
        result = folder / arm / f"seed{seed}" / "result.json"
        folders.json(result, {**json.loads(result.read_text()), "data": data})
    return folder


def test_one_data_set_is_not_mentioned(folders, tmp_path):
    comparison = read_comparison(with_data(folders, tmp_path / "cmp"))
    assert comparison.mixed_splits == {}
    assert caveats(comparison) == []
    assert comparison.difference("batchformer", "plain", "top1").verdict != "no verdict"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"plain_3": {**DATA, "test": "9"}},
            "split test is not the same data in all runs: 2e in the plan, .*; 9 in plain/",
        ),
        ({"plain_3": {"train": "1f", "val": "2e"}}, "split test .* absent in plain/seed3"),
    ],
)
def test_a_run_on_other_data_leaves_no_verdict(folders, tmp_path, changed, said):
    folder = with_data(folders, tmp_path / "cmp", **changed)
    comparison = read_comparison(folder)
    first, second = caveats(comparison)
    assert first == f"{DIFFERENT_DATA} Delete the runs that do not belong and go on with --resume."
    assert re.search(said, second)
    assert conclusions(comparison) == [DIFFERENT_DATA]
    assert convergence_sentence(comparison) is None
    verdicts = [row[5] for row in main_table(comparison).rows[1:]] + [row[5] for row in controls_table(comparison).rows]
    assert "no verdict" in verdicts and not {"improves", "worsens", "no difference shown"} & set(verdicts)
    text = comparison_text(comparison)
    assert DIFFERENT_DATA in text
    assert "improves " not in text.partition("Conclusions")[2]
    written = write_report([folder], tmp_path / "report").report.read_text()
    assert DIFFERENT_DATA in written
    assert "no verdict" in (tmp_path / "report" / "differences.csv").read_text()


def test_the_first_screen_and_a_margin_give_no_verdict_either(folders, tmp_path):
    folder = with_data(folders, tmp_path / "cmp", plain_3={**DATA, "test": "9"})
    comparison = with_margin(read_comparison(folder), 0.5)
    shown = first_screen(comparison)
    assert shown.answer.startswith("The runs were made on different data") and "no verdict" in shown.answer
    assert shown.advice.startswith("Delete the runs on other data") and " --resume" in shown.command
    difference = comparison.difference("batchformer", "plain", "top1")
    assert (difference.words, difference.decision) == ("no verdict", None)
    assert "How sure" not in comparison_text(comparison) and "How many seeds" not in comparison_text(comparison)


def test_runs_that_differ_from_the_plan_leave_no_verdict(folders, tmp_path):
    comparison = read_comparison(with_data(folders, tmp_path / "cmp", plan={**DATA, "train": "0"}))
    assert caveats(comparison)[0].startswith(DIFFERENT_DATA)


def test_the_data_comes_before_all_other_caveats(folders, tmp_path):
    folder = with_data(folders, tmp_path / "cmp", plain_3={**DATA, "test": "9"})
    (folder / "self_only/seed1/done").unlink()
    assert caveats(read_comparison(folder))[0].startswith(DIFFERENT_DATA)


def test_older_results_without_fingerprints_say_nothing(folders, tmp_path):
    comparison = read_comparison(with_data(folders, tmp_path / "cmp", plan=None, plain_3={}, batchformer_0=None))
    assert caveats(comparison) == []


def test_units_have_data_of_their_own(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(5), units=("photo", "sketch"))
    for unit in ("photo", "sketch"):
        for result in folder.glob(f"*/*-{unit}/result.json"):
            folders.json(result, {**json.loads(result.read_text()), "data": {"train": unit}})
    assert not read_comparison(folder).mixed_splits
    folders.json(result, {**json.loads(result.read_text()), "data": {"train": "other"}})
    assert list(read_comparison(folder).mixed_splits) == [("sketch", "train")]


def test_fingerprints_that_are_no_object_make_a_result_unreadable(folders, tmp_path):
    comparison = read_comparison(with_data(folders, tmp_path / "cmp", plain_3=["x"]))
    assert "data holds a list, expected an object" in comparison.left_out[0].reason


@pytest.mark.parametrize(("fingerprints", "lines"), [(DATA, 0), ({}, 2)])
def test_the_place_of_the_data_is_free_where_fingerprints_show_that_it_is_the_same(
    folders, tmp_path, fingerprints, lines
):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(5), result={"data": fingerprints})
    config = folder / "plain/seed4/config.yaml"
    moved = config.read_text().replace("data:\n", "data:\n  root: /new\n  num_workers: 3\n")
    config.write_text(moved)
    assert isinstance(read_comparison(folder).runs[0], Run)
    assert len(setting_differences(read_comparison(folder))) == lines
