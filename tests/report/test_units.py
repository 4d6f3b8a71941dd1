"""Comparisons whose seeds run on several units (target domains, splits), and runs of several stages."""

import csv
import io

import pytest

from batchformer.report import ReportError, comparison_text, find_runs, read_comparison, to_csv
from batchformer.report.caveats import caveats
from batchformer.report.costs import cost_table
from batchformer.report.flat_rows import class_rows, difference_rows, result_rows
from batchformer.report.runs import LeftOut, Unit
from batchformer.report.tables import main_table, per_class_table, units_table

UNITS = ("photo", "sketch")
# (photo, sketch) by seed.
TOP1 = {
    "plain": ((0.80, 0.40), (0.82, 0.42), (0.81, 0.44), (0.80, 0.40)),
    "batchformer": ((0.82, 0.46), (0.82, 0.48), (0.83, 0.46), (0.84, 0.42)),
}


@pytest.fixture
def folder(folders, tmp_path):
    path = folders.comparison(tmp_path / "cmp", tuple(TOP1), range(4), units=UNITS)
    for arm, seeds in TOP1.items():
        for seed, values in enumerate(seeds):
            for unit, top1 in zip(UNITS, values, strict=True):
                folders.run(path / arm / f"seed{seed}-{unit}", arm, seed, unit=unit, metrics={"top1": top1})
    return path


def test_seeds_are_paired_by_their_means_over_the_units(folder):
    comparison = read_comparison(folder)
    assert comparison.units == (Unit("photo", "Photo"), Unit("sketch", "Sketch"))
    assert comparison.values("plain", "top1") == pytest.approx({0: 0.60, 1: 0.62, 2: 0.625, 3: 0.60})
    difference = comparison.difference("batchformer", "plain", "top1")
    assert difference.n == 4
    assert difference.differences == pytest.approx((0.04, 0.03, 0.02, 0.03))
    table = main_table(comparison)
    assert table.rows[1][1:4] == ("4 of 4", "64.12 ± 0.85", "+3.00")
    assert any("with its mean over Photo and Sketch" in note for note in table.notes)


def test_each_unit_stands_beside_with_its_own_differences(folder):
    table = units_table(read_comparison(folder))
    assert table.title == "Top-1 on each unit"
    assert [row[:5] for row in table.rows] == [
        ("Photo", "plain", "4 of 4", "80.75 ± 0.96", ""),
        ("Photo", "batchformer", "4 of 4", "82.75 ± 0.96", "+2.00"),
        ("Sketch", "plain", "4 of 4", "41.50 ± 1.91", ""),
        ("Sketch", "batchformer", "4 of 4", "45.50 ± 2.52", "+4.00"),
    ]
    assert table.rows[1][5] == "[-0.60, +4.60]"  # 2, 0, 2, 4: sd 1.633, times 3.182 / sqrt(4)
    assert "\nTop-1 on each unit\n" in comparison_text(read_comparison(folder))


def test_a_seed_counts_when_all_its_units_are_finished_in_both_arms(folder):
    (folder / "plain" / "seed1-sketch" / "done").unlink()
    comparison = read_comparison(folder)
    assert comparison.seeds_of("plain") == (0, 2, 3)
    assert comparison.difference("batchformer", "plain", "top1").seeds == (0, 2, 3)
    assert comparison.difference("batchformer", "plain", "top1", "photo").seeds == (0, 1, 2, 3)
    assert main_table(comparison).rows[0][1] == "3 of 4"
    assert [row[2] for row in units_table(comparison).rows] == ["4 of 4", "4 of 4", "3 of 4", "4 of 4"]
    (entry,) = comparison.left_out
    assert (entry.arm, entry.seed, entry.unit, entry.name) == ("plain", 1, "sketch", "plain/seed1-sketch")
    lines = caveats(comparison)
    assert lines[0] == "Missing from the tables: 1 of 16 planned runs."
    assert lines[1].startswith("plain/seed1-sketch: unfinished")


def test_a_metric_without_a_value_on_one_unit_has_none_for_the_seed(folders, folder):
    folders.run(folder / "plain" / "seed0-photo", "plain", 0, unit="photo", metrics={"few": None, "top1": 0.8})
    comparison = read_comparison(folder)
    assert comparison.difference("batchformer", "plain", "few").undefined == (0,)
    assert comparison.difference("batchformer", "plain", "few", "sketch").seeds == (0, 1, 2, 3)
    assert caveats(comparison)[-1].startswith("few is undefined in plain/seed0-photo")


def test_classes_are_averaged_over_the_units_of_a_seed(folders, folder):
    for seed in range(4):
        for unit, value in (("photo", 0.8), ("sketch", None if seed == 3 else 0.4)):
            classes = [{"name": "a", "count": 7, "value": value}, {"name": unit, "count": 1, "value": 0.5}]
            path = folder / "plain" / f"seed{seed}-{unit}"
            folders.run(path, "plain", seed, unit=unit, result={"per_class": classes})
    rows = {row[0]: row for row in per_class_table(read_comparison(folder)).rows}
    assert rows["a"][1:3] == ("7", "65.00 ± 10.00")  # 60, 60, 60, 80
    assert rows["photo"][1:3] == ("1", "50.00 ± 0.00")


def test_the_files_have_a_column_of_units(folder):
    (folder / "plain" / "seed1-sketch" / "done").unlink()
    comparison = read_comparison(folder)
    rows = list(csv.DictReader(io.StringIO(to_csv(result_rows(find_runs([folder]))))))
    assert [row["unit"] for row in rows[:2]] == ["photo", "sketch"]
    assert (rows[-1]["unit"], rows[-1]["status"][:10]) == ("sketch", "unfinished")
    rows = difference_rows([comparison])
    first = [(row["unit"], row["pairs"], row["verdict"]) for row in rows if row["metric"] == "top1"]
    assert first == [("", 3, "improves"), ("photo", 4, "descriptive"), ("sketch", 3, "descriptive")]
    assert {row["unit"] for row in class_rows(find_runs([folder]))} == set(UNITS)


def test_a_run_on_another_unit_than_planned_is_left_out(folders, folder):
    folders.run(folder / "plain" / "seed0-photo", "plain", 0, unit="sketch")
    folders.run(folder / "plain" / "seed0", "plain", 0)
    reasons = {entry.path.name: entry.reason for entry in read_comparison(folder).left_out}
    expected = "expected arm plain, seed 0, unit photo here, but result.json says arm plain, seed 0, unit sketch"
    assert reasons["seed0-photo"].startswith(expected)
    assert reasons["seed0"].startswith("not part of compare.json")


@pytest.mark.parametrize("name", ["../photo", "a/b"])
def test_a_unit_whose_name_is_no_folder_is_refused(folders, folder, name):
    folders.comparison(folder, units=UNITS, plan={"units": [{"name": name}]})
    with pytest.raises(ReportError, match="its unit .* is no name of a folder"):
        read_comparison(folder)


def test_without_units_there_is_one_without_a_name(folders, tmp_path):
    for name, plan in (("none", {}), ("empty", {"units": []}), ("null", {"units": None})):
        comparison = read_comparison(folders.comparison(tmp_path / name, seeds=(0,), plan=plan))
        assert comparison.units == (Unit(),)
        assert not comparison.has_units
        assert "unit" not in main_table(comparison).columns
    assert LeftOut(tmp_path, "x").name == str(tmp_path)


def stages(step_ms, seconds):
    names = ("detector", "masks")
    pairs = zip(names, step_ms, seconds, strict=True)
    return [{"name": name, "epochs": 4, "step_ms": ms, "train_seconds": s} for name, ms, s in pairs]


def test_each_stage_has_its_own_time(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(3))
    times = {"plain": (10.0, 20.0, 40.0), "batchformer": (11.0, 24.0, 40.0)}
    for arm, steps in times.items():
        for seed, step in enumerate(steps):
            result = {"stages": stages((step, 5.0), (100.0, 10.0)), "cost": {"step_ms": None, "train_seconds": 110.0}}
            folders.run(folder / arm / f"seed{seed}", arm, seed, result=result)
    table = cost_table(read_comparison(folder))
    rows = {row[:2]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert list(rows) == [(arm, stage) for arm in times for stage in ("detector", "masks", "all")]
    detector, masks, whole = (rows["batchformer", stage] for stage in ("detector", "masks", "all"))
    assert detector["time per step (ms)"] == "24.0 [11.0 to 40.0]"
    assert detector["ratio to plain"] == "1.10 [1.00 to 1.20]"
    assert masks["ratio to plain"] == "1.00 [1.00 to 1.00]"
    assert [row["training (s)"] for row in (detector, masks, whole)] == [
        "100 [100 to 100]",
        "10 [10 to 10]",
        "110 [110 to 110]",
    ]
    assert whole["time per step (ms)"] == ""  # a median over the steps of two stages would be a time of neither
    assert "Each stage has its own time per step." in table.notes[0]
    row = result_rows(find_runs([folder]))[0]
    assert (row["cost_detector_step_ms"], row["cost_masks_train_seconds"]) == (10.0, 10.0)


def test_one_stage_needs_no_column_and_older_results_say_so_of_their_test_time(folders, tmp_path):
    today, older = (
        cost_table(read_comparison(folders.comparison(tmp_path / name, seeds=(0,), older=name == "older")))
        for name in ("today", "older")
    )
    assert today.rows == older.rows
    assert "stage" not in today.columns
    assert "Test time is that of the forward passes alone." in today.notes[1]
    assert "may have timed more than forward passes" in older.notes[1]


def test_units_pair_their_times_too(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=(0,), units=UNITS)
    for arm, steps in (("plain", (10.0, 100.0)), ("batchformer", (20.0, 110.0))):
        for unit, step in zip(UNITS, steps, strict=True):
            folders.run(folder / arm / f"seed0-{unit}", arm, 0, unit=unit, result={"cost": {"step_ms": step}})
    table = cost_table(read_comparison(folder))
    assert table.rows[1][2] == "1.55 [1.10 to 2.00]"
    assert "same seed and unit" in table.notes[0]
