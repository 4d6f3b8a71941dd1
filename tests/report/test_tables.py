import csv
import io
import math
import re

import pytest

from batchformer.report import Run, Table, comparison_text, find_runs, read_comparison, to_csv, to_markdown, to_text
from batchformer.report.costs import cost_table
from batchformer.report.flat_rows import class_rows, difference_rows, result_rows
from batchformer.report.tables import (
    controls_table,
    difference_table,
    main_table,
    per_class_table,
    runs_table,
)

TOP1 = {
    "plain": (0.80, 0.81, 0.82, 0.80, 0.81),
    "batchformer": (0.82, 0.84, 0.84, 0.82, 0.84),
    "self_only": (0.81, 0.85, 0.83, 0.83, 0.83),
}
OTHERS = {"top5": None, "many": None, "medium": None, "few": None, "macro_f1": None, "ece": None}

GOLDEN = """\
longtail/fashion-mnist-lt: plain and +BatchFormer
arm           seeds         top-1  vs plain   95 % interval  verdict
-----------  ------  ------------  --------  --------------  --------------------
plain        3 of 3  81.00 ± 1.00
batchformer  3 of 3  83.33 ± 1.15     +2.33  [+0.90, +3.77]  improves (few seeds)
"""


@pytest.fixture
def comparison(folders, tmp_path):
    return read_comparison(folders.comparison(tmp_path / "cmp", tuple(TOP1), range(5), top1=TOP1))


def parse_markdown(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def parse_text(text: str) -> list[list[str]]:
    """The blocks of an aligned table, cut where the dashes stand: [header, row, ...] of the whole table."""
    rows: dict[int, list[str]] = {}
    lines = text.splitlines()[1:]
    for at, line in enumerate(lines):
        if re.fullmatch(r"-+(  -+)*", line):
            spans = [match.span() for match in re.finditer("-+", line)]
            body = [lines[at - 1]]
            for following in lines[at + 1 :]:
                if not following:
                    break
                body.append(following)
            for index, row in enumerate(body):
                cells = [row[start:end].strip() for start, end in spans]
                rows[index] = [*rows[index], *cells[1:]] if index in rows else cells
    return list(rows.values())


def test_main_table_by_hand(comparison):
    table = main_table(comparison)
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert rows["plain"]["top-1"] == "80.80 ± 0.84"
    assert (rows["plain"]["vs plain"], rows["plain"]["verdict"]) == ("", "")
    assert rows["batchformer"]["vs plain"] == "+2.40"  # 2, 3, 2, 2, 3: sd 0.548, times 2.776 / sqrt(5)
    assert rows["batchformer"]["95 % interval"] == "[+1.72, +3.08]"
    assert rows["batchformer"]["verdict"] == "improves"
    assert rows["batchformer"]["seeds"] == "5 of 5"


def test_controls_table_by_hand(comparison):
    plain, self_only = controls_table(comparison).rows
    assert plain[:6] == ("plain", "1", "+2.40", "[+1.72, +3.08]", "5", "improves")
    assert self_only[:6] == ("self_only", "2", "+0.20", "[-1.16, +1.56]", "5", "no difference shown")


def test_the_text_is_golden_and_parses_back(folders, tmp_path):
    folder = tmp_path / "cmp"
    folders.comparison(folder, seeds=range(3))
    for arm in ("plain", "batchformer"):
        for seed in range(3):
            metrics = {"metrics": {"top1": TOP1[arm][seed]}}
            folders.run(folder / arm / f"seed{seed}", arm, seed, result=metrics)
    table = main_table(read_comparison(folder))
    text = to_text(Table(table.title, table.columns, table.rows))
    assert text == GOLDEN
    assert parse_text(text) == [list(table.columns), *map(list, table.rows)]


@pytest.mark.parametrize("build", [main_table, difference_table, controls_table, cost_table, per_class_table])
def test_every_table_survives_both_renderings(folders, tmp_path, build):
    comparison = read_comparison(folders.comparison(tmp_path / "cmp", folders.all_arms, range(5)))
    table = build(comparison)
    assert len(table.rows) >= 4
    header, aligns, *rows = parse_markdown(to_markdown(table))
    assert all(re.fullmatch("---:?", cell) for cell in aligns)
    assert [header, *rows] == [list(table.columns), *map(list, table.rows)]
    text = to_text(table)
    assert max(len(line) for line in text.splitlines()) < 120
    assert parse_text(text.removesuffix("".join(f"{note}\n" for note in table.notes)))[0] == list(table.columns)


def test_a_pipe_or_a_line_break_in_a_cell_does_not_break_markdown():
    table = Table("t", ("class", "n"), (("a|b\nc", "1"),))
    assert parse_markdown(to_markdown(table))[2] == [r"a\|b c", "1"]


def test_a_row_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"Expected 2 cells \(a, b\), got 1"):
        Table("t", ("a", "b"), (("1",),))


def test_a_narrow_terminal_gets_blocks_that_repeat_the_first_column(comparison):
    table = main_table(comparison)
    text = to_text(Table(table.title, table.columns, table.rows), 60)
    assert max(len(line) for line in text.splitlines()) <= 60
    assert text.count("self_only") > 1
    assert parse_text(text) == [list(table.columns), *map(list, table.rows)]


def test_undefined_and_single_values(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=(0,))
    folders.run(folder / "plain" / "seed0", "plain", 0, metrics={"few": None, "top1": 0.5})
    table = main_table(read_comparison(folder))
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["top-1"], row["few"]) == ("50.00", "n/a")
    treated = dict(zip(table.columns, table.rows[1], strict=True))
    assert (treated["95 % interval"], treated["verdict"]) == ("none", "too few seeds")


def test_an_unfinished_arm_keeps_its_row_and_a_missing_pair_its_note(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", ("plain", "batchformer", "frozen"), range(4))
    for seed in range(4):
        (folder / "frozen" / f"seed{seed}" / "done").unlink()
    (folder / "plain" / "seed2" / "done").unlink()
    comparison = read_comparison(folder)
    table = main_table(comparison)
    assert table.rows[2][:6] == ("frozen", "0 of 4", "n/a", "n/a", "none", "too few seeds")
    assert "batchformer: the difference is over 3 pairs, since seed 2 is finished in one arm only." in table.notes
    text = comparison_text(comparison)
    assert "Missing from the tables: 5 of 12 planned runs." in text
    assert "plain/seed2: unfinished" in text


def test_without_plain_runs_no_difference_is_claimed(folders, tmp_path):
    comparison = read_comparison(folders.comparison(tmp_path / "cmp", ("batchformer",), range(5)))
    assert main_table(comparison).rows[0][3:6] == ("", "", "")
    assert difference_table(comparison).rows == ()
    assert "No plain run is finished" in comparison_text(comparison)


def test_costs_are_medians_and_ratios_pair_by_seed(folders, tmp_path):
    folder = tmp_path / "cmp"
    folders.comparison(folder, seeds=range(3))
    for arm, times in (("plain", (10.0, 20.0, 40.0)), ("batchformer", (11.0, 24.0, 40.0))):
        for seed, time in enumerate(times):
            folders.run(
                folder / arm / f"seed{seed}", arm, seed, result={"cost": {"step_ms": time, "peak_memory_mb": None}}
            )
    table = cost_table(read_comparison(folder))
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    assert [row["time per step (ms)"] for row in rows] == ["20.0 [10.0 to 40.0]", "24.0 [11.0 to 40.0]"]
    assert [row["ratio to plain"] for row in rows] == ["1.00", "1.10 [1.00 to 1.20]"]
    assert [row["peak memory (MB)"] for row in rows] == ["n/a", "n/a"]
    assert [row["training (s)"] for row in rows] == ["n/a", "n/a"]


def test_costs_say_what_their_times_are(folders, tmp_path):
    cost = {"step_ms": 10.0, "peak_memory_mb": 900.0, "training_memory_mb": 300.0}
    for name, seeds, words in (
        ("one", (0,), "one run of each arm, so no spread"),
        ("two", (0, 1), "lowest and the highest"),
    ):
        folder = folders.comparison(tmp_path / name, seeds=seeds, result={"cost": cost})
        table = cost_table(read_comparison(folder))
        assert words in table.notes[0]
        assert table.notes[1].startswith("Times are wall-clock times")
        assert "Test time is that of the forward passes alone." in table.notes[1]
        assert "the memory that training added" in table.notes[2]
        row = dict(zip(table.columns, table.rows[1], strict=True))
        assert row["time per step (ms)"] == ("10.0" if name == "one" else "10.0 [10.0 to 10.0]")
        assert row["peak memory (MB)"] == "900"
        assert row["above start (MB)"] == "300"


def test_costs_say_which_parameters_they_count(folders, tmp_path):
    table = cost_table(read_comparison(folders.comparison(tmp_path / "cmp", seeds=(0,))))
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    counts = [(row["parameters in training"], row["parameters at test"]) for row in rows]
    assert counts == [("391,498", "391,498"), ("416,650", "391,498")]
    assert "Counts include frozen parameters; BatchFormer's exist only in training." in table.notes


def test_classes_are_sorted_by_training_images_and_matched_by_name(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=(0,))
    for arm, accuracies in (("plain", (0.5, 0.9)), ("batchformer", (0.75, 0.8))):
        order = [("rare", 5, accuracies[0]), ("common", 50, accuracies[1])]
        entries = [{"name": n, "count": c, "value": a} for n, c, a in order]
        entries = entries if arm == "plain" else entries[::-1]
        folders.run(folder / arm / "seed0", arm, 0, result={"per_class": entries})
    assert per_class_table(read_comparison(folder)).rows == (
        ("common", "50", "90.00", "80.00", "-10.00"),
        ("rare", "5", "50.00", "75.00", "+25.00"),
    )


def test_many_classes_are_cut_to_those_that_change_most_and_it_is_said(folders, tmp_path):
    names = [f"class {index}" for index in range(60)]
    folder = folders.comparison(tmp_path / "cmp", seeds=(0,), names=names, counts=range(100, 40, -1))
    table = per_class_table(read_comparison(folder), limit=5)
    assert len(table.rows) == 5
    assert "These are the 5 of 60 classes that change most. All are in per_class.csv." in table.notes
    changes = [abs(float(row[-1])) for row in per_class_table(read_comparison(folder), limit=60).rows]
    assert sorted(changes)[-5:] == pytest.approx(sorted(abs(float(row[-1])) for row in table.rows))


def test_unrelated_runs_get_one_table_and_no_claims(folders, tmp_path):
    folders.run(tmp_path / "a", "plain", 0)
    folders.run(tmp_path / "b", "batchformer", 1, recipe="longtail/cifar100-lt", result={"split": "val"})
    runs = find_runs([tmp_path]).runs
    table = runs_table(runs)
    assert [row[:4] for row in table.rows] == [
        ("a", "longtail/fashion-mnist-lt", "plain", "0"),
        ("b", "longtail/cifar100-lt", "batchformer", "1"),
    ]
    assert "the table claims no differences" in table.notes[0]
    assert "differ in recipe (longtail/cifar100-lt, longtail/fashion-mnist-lt)" in table.notes[2]
    assert "differ in split (test, val)" in table.notes[3]


def test_costs_of_runs_side_by_side_are_called_rough(folders, tmp_path):
    alone = cost_table(read_comparison(folders.comparison(tmp_path / "alone")))
    crowd = cost_table(read_comparison(folders.comparison(tmp_path / "crowd", plan={"jobs": 3})))
    assert not any("side by side" in note for note in alone.notes)
    [note] = [note for note in crowd.notes if "side by side" in note]
    assert "Up to 3 runs" in note and "ratios are rough" in note


def test_results_csv_keeps_every_digit_and_every_run(folders, tmp_path):
    folders.comparison(tmp_path / "cmp", top1={"plain": (1 / 3,) * 3, "batchformer": (0.1 + 0.2,) * 3})
    folders.run(tmp_path / "cmp" / "plain" / "seed2", "plain", 2, metrics={"few": math.nan})
    (tmp_path / "cmp" / "plain" / "seed1" / "done").unlink()
    folders.run(tmp_path / "single", metrics={"top1": 2 / 3})
    folders.run(tmp_path / "stopped", done=False)
    rows = list(csv.DictReader(io.StringIO(to_csv(result_rows(find_runs([tmp_path]))))))
    assert len(rows) == 8
    assert all(re.fullmatch("[a-z0-9_]+", name) for name in rows[0])
    finished = [row for row in rows if row["status"] == "finished"]
    assert {float(row["top1"]) for row in finished} >= {1 / 3, 0.1 + 0.2, 2 / 3}
    assert [row["few"] for row in finished if row["arm"] == "plain"][1] == "nan"
    assert [row["path"][-5:] for row in rows if row["status"].startswith("unfinished")] == ["seed1", "opped"]
    assert all(float(row["cost_step_ms"]) > 0 for row in finished)


def test_differences_csv_gives_a_verdict_on_the_primary_metric_only(comparison):
    rows = difference_rows([comparison])
    assert len(rows) == 3 * 7  # batchformer and self_only against plain, batchformer against self_only; seven metrics
    assert {row["verdict"] for row in rows if row["primary"]} == {"improves", "no difference shown"}
    assert {row["verdict"] for row in rows if not row["primary"]} == {"descriptive"}
    oracle = sum(a - b for a, b in zip(TOP1["batchformer"], TOP1["plain"], strict=True)) / 5
    assert rows[0]["mean"] == pytest.approx(oracle, abs=1e-15)
    assert {row["unit"] for row in rows} == {""}


def test_class_csv_has_a_record_per_run_and_class(folders, tmp_path):
    folders.comparison(tmp_path / "cmp", seeds=(0, 1))
    rows = class_rows(find_runs([tmp_path]))
    assert len(rows) == 2 * 2 * 10
    assert rows[0]["class"] == "Sneaker"


def test_the_terminal_text_stays_under_120_columns(folders, tmp_path):
    comparison = read_comparison(folders.comparison(tmp_path / "cmp", folders.all_arms, range(4)))
    text = comparison_text(comparison)
    command = next(line for line in text.splitlines() if line.startswith("  batchformer "))  # it can be copied
    assert max(len(line) for line in text.splitlines() if line != command) < 120
    for part in ("Where a gain comes from", "Cost", "Conclusions", "Caveats"):
        assert f"\n{part}\n" in text


def test_runs_without_a_metric_show_it_as_absent(tmp_path):
    runs = (Run(tmp_path / "a", "r", "plain", 0, {"top1": 0.5}), Run(tmp_path / "b", "r", "plain", 1, {"AP": 0.25}))
    assert [row[4:] for row in runs_table(runs).rows] == [("50.00", "n/a"), ("n/a", "25.00")]
