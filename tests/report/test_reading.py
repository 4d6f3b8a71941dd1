import math
import shutil

import pytest

from batchformer.report import LeftOut, ReportError, Run, find_runs, read_comparison, read_run
from batchformer.report.curves import read_curves


def test_a_run_folder_is_read_whole(folders, tmp_path):
    run = read_run(folders.run(tmp_path / "run", "batchformer", 3, metrics={"few": None, "top1": 0.8125}))
    assert isinstance(run, Run)
    assert (run.recipe, run.arm, run.seed) == ("longtail/fashion-mnist-lt", "batchformer", 3)
    assert run.metrics["top1"] == 0.8125
    assert math.isnan(run.metrics["few"])  # null in strict JSON
    assert (run.per_class[0].name, run.per_class[0].count) == ("Sneaker", 2000)
    assert run.cost["parameters_test"] == 391498
    assert (run.selection, run.split) == ("last epoch", "test")
    assert run.environment["precision"] == "32-true"
    assert "augment" in run.config


def test_the_nan_literal_of_pythons_json_is_read(folders, tmp_path):
    run = read_run(folders.run(tmp_path / "run", metrics={"few": math.nan}))
    assert math.isnan(run.metrics["few"])


def test_an_unfinished_run_says_how_far_it_came(folders, tmp_path):
    entry = read_run(folders.run(tmp_path / "run", done=False, epochs=4))
    assert isinstance(entry, LeftOut)
    assert entry.reason == (
        "unfinished (it has no file named done): it stopped after epoch 3; continue it with --resume"
    )
    (tmp_path / "run" / "metrics.csv").unlink()
    assert "before the first epoch ended" in read_run(tmp_path / "run").reason


def test_a_run_that_failed_says_why(folders, tmp_path):
    folder = folders.run(tmp_path / "run", done=False, epochs=4)
    (tmp_path / "run" / "failed.json").write_text('{"reason": "diverged", "message": "Got nan.\\nLower the rate."}')
    assert read_run(folder).reason == (
        "diverged (Got nan. Lower the rate): it stopped after epoch 3; continue it with --resume"
    )
    (tmp_path / "run" / "failed.json").write_text("{")
    assert read_run(folder).reason.startswith("unfinished")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "unreadable: result.json is not valid JSON"),
        ("[]", "unreadable: result.json holds a list, expected an object"),
        ("{}", "unreadable: result.json has no 'recipe'"),
        ('{"recipe": "r", "arm": "plain", "seed": 0, "metrics": {"top1": "high"}}', "'high' as top1 where a number"),
        ('{"recipe": "r", "arm": "plain", "seed": 0, "metrics": {"top1": true}}', "True as top1 where a number"),
        ('{"recipe": "r", "arm": "plain", "seed": 0, "metrics": [1]}', "unreadable: "),
        (None, "unreadable: result.json is missing"),
    ],
)
def test_a_broken_result_is_left_out_with_its_reason(folders, tmp_path, text, reason):
    folder = folders.run(tmp_path / "run")
    (folder / "result.json").unlink()
    if text is not None:
        (folder / "result.json").write_text(text)
    entry = read_run(folder)
    assert isinstance(entry, LeftOut)
    assert reason in entry.reason
    assert entry.reason.endswith("run it again, or delete the folder")


def test_curves_are_sparse_and_the_last_value_of_an_epoch_counts(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,loss,top1\n0,9,,0.1\n0,9,2.0,\n1,19,1.5,\n,20,9.9,\n1,19,1.25,\n")
    assert read_curves(tmp_path) == {"loss": {0: 2.0, 1: 1.25}, "top1": {0: 0.1}}
    (tmp_path / "metrics.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(ReportError, match="Expected a column `epoch`"):
        read_curves(tmp_path)


def test_a_comparison_keeps_its_plan_and_its_runs(folders, tmp_path):
    comparison = read_comparison(folders.comparison(tmp_path / "cmp", folders.all_arms, (4, 2)))
    assert comparison.arms == folders.all_arms
    assert comparison.controls == ("frozen", "self_only", "duplicate", "single_stream")
    assert len(comparison.runs) == 12
    assert [run.seed for run in comparison.of("frozen")] == [2, 4]
    assert list(comparison.values("plain", "top1")) == [2, 4]
    assert comparison.metric_names == ("top1", "top5", "many", "medium", "few", "macro_f1", "ece")
    assert comparison.difference("frozen", "plain", "ece").higher_is_better is False
    assert not comparison.left_out


def test_missing_unfinished_broken_and_foreign_runs_of_a_comparison_are_listed(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", ("plain", "batchformer"), (0, 1, 2))
    shutil.rmtree(folder / "plain" / "seed1")
    (folder / "plain" / "seed2" / "done").unlink()
    (folder / "batchformer" / "seed0" / "result.json").write_text("{")
    folders.run(folder / "batchformer" / "seed1", "batchformer", 9)
    folders.run(folder / "plain" / "seed9", "plain", 9)
    comparison = read_comparison(folder)
    assert [(run.arm, run.seed) for run in comparison.runs] == [("plain", 0), ("batchformer", 2)]
    reasons = {f"{entry.path.parent.name}/{entry.path.name}": entry.reason for entry in comparison.left_out}
    assert reasons["plain/seed1"] == "missing: it was never started; start it with --resume"
    assert reasons["plain/seed2"].startswith("unfinished")
    assert reasons["batchformer/seed0"].startswith("unreadable")
    assert (
        "expected arm batchformer, seed 1 here, but result.json says arm batchformer, seed 9"
        in (reasons["batchformer/seed1"])
    )
    assert reasons["plain/seed9"].startswith("not part of compare.json")


@pytest.mark.parametrize("what", ["recipe", "split", "selection"])
def test_mixed_runs_in_one_comparison_are_refused(folders, tmp_path, what):
    folder = folders.comparison(tmp_path / "cmp")
    folders.run(folder / "plain" / "seed1", "plain", 1, result={what: "another"})
    with pytest.raises(
        ReportError, match=rf"Expected one {what} .* found .*'another' in plain/seed1.*\. Delete the runs"
    ):
        read_comparison(folder)


def test_a_comparison_whose_runs_all_have_another_recipe_is_refused(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", plan={"recipe": "longtail/other"})
    with pytest.raises(ReportError, match=r"Expected one recipe .*'longtail/other' in compare\.json"):
        read_comparison(folder)


def test_an_unknown_primary_metric_is_refused(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", plan={"primary": "mAP"})
    with pytest.raises(ReportError, match=r"Expected the primary metric 'mAP' .* found ece, few, .*top1"):
        read_comparison(folder)


@pytest.mark.parametrize(
    ("text", "match"),
    [("{", "not valid JSON"), ("{}", "it has no 'arms'"), ('{"arms": 3}', "not iterable")],
)
def test_a_broken_plan_is_refused(folders, tmp_path, text, match):
    folder = folders.comparison(tmp_path / "cmp")
    (folder / "compare.json").write_text(text)
    with pytest.raises(ReportError, match=rf"Expected .*compare\.json to hold recipe, arms.*{match}.*--resume"):
        read_comparison(folder)


def test_folders_are_found_recursively_once_and_by_pattern(folders, tmp_path):
    folders.comparison(tmp_path / "runs" / "deep" / "cmp", seeds=(0,))
    folders.run(tmp_path / "runs" / "single", "plain", 0)
    folders.run(tmp_path / "runs" / "stopped", "plain", 1, done=False)
    (tmp_path / "runs" / "notes").mkdir()
    found = find_runs(
        [tmp_path / "runs", str(tmp_path / "runs" / "deep" / "cmp" / "plain" / "seed0"), tmp_path / "run*"]
    )
    assert [comparison.path.name for comparison in found.comparisons] == ["cmp"]
    assert [run.path.name for run in found.runs] == ["single"]
    assert [entry.path.name for entry in found.left_out] == ["stopped"]
    assert [run.path.name for run in find_runs([tmp_path / "runs" / "s*"]).runs] == ["single"]


def test_a_run_inside_a_comparison_can_be_read_alone(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=(0,))
    found = find_runs([folder / "plain" / "seed0"])
    assert not found.comparisons
    assert found.runs[0].arm == "plain"


def test_nothing_found_says_what_was_expected(folders, tmp_path):
    with pytest.raises(ReportError, match="at least one run or comparison folder, got none"):
        find_runs([])
    with pytest.raises(ReportError, match=r"nowhere does not exist\. Name a folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(ReportError, match=r"found neither\. `batchformer fit` and `batchformer compare` write them"):
        find_runs([tmp_path])
    folders.run(tmp_path / "stopped", done=False)
    with pytest.raises(ReportError, match=r"(?s)at least one finished run .*stopped: unfinished"):
        find_runs([tmp_path])
