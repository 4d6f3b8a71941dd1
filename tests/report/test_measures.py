"""Labels, units and directions come with the results, and nothing else in the report knows a metric."""

import re
from pathlib import Path

import pytest

import batchformer.report
from batchformer.report import LeftOut, Measure, ReportError, comparison_text, read_comparison, read_run
from batchformer.report.measures import find_measure, heads, order_metrics
from batchformer.report.older_results import OLDER_MEASURES
from batchformer.report.paired import paired_difference, summarize
from batchformer.report.plots import plot_classes, plot_curves, plot_differences, plot_groups
from batchformer.report.tables import controls_table, difference_table, main_table, per_class_table

SOURCE = Path(batchformer.report.__file__).parent
AP, YEARS = Measure("AP", "AP"), Measure("mae", "mean error", "years", higher_is_better=False)
# The error of a made-up task: (plain, batchformer, self_only) by seed.
ERRORS = {
    "plain": (4.0, 5.0, 6.0, 4.5, 5.5),
    "batchformer": (3.0, 4.1, 5.1, 3.4, 4.4),
    "self_only": (4.1, 5.0, 6.1) * 2,
}


@pytest.fixture
def errors(folders, tmp_path):
    """A comparison of a task whose error has a unit of its own, lies above 1 and is better when it is low."""
    measures = [
        folders.error,
        {**folders.error, "name": "young", "label": "young", "part": "young people"},
        {"name": "near", "label": "within 5 years", "unit": "%", "higher_is_better": True},
        {"name": "slope", "label": "slope", "unit": "", "higher_is_better": True},
    ]
    plan = {"primary": "mae"}
    folder = folders.comparison(tmp_path / "cmp", tuple(ERRORS), range(5), plan=plan, epochs=8)
    for arm, values in ERRORS.items():
        for seed, value in enumerate(values[:5]):
            metrics = {"slope": 0.9, "near": 0.5, "mae": value, "young": value / 2, "unseen_mae": value + 1}
            classes = [{"name": name, "count": 9, "value": value + i} for i, name in enumerate(("a", "b"))]
            result = {"metrics": metrics, "measures": measures, "class_metric": "mae", "per_class": classes}
            path = folders.run(folder / arm / f"seed{seed}", arm, seed, result=result)
            (path / "metrics.csv").write_text(f"epoch,train_loss,val_mae\n0,1.5,{value + 3}\n1,1.25,{value}\n")
    return read_comparison(folder)


def test_an_error_is_shown_as_it_is_and_lower_is_better(errors):
    table = main_table(errors)
    assert table.columns[2] == "mean error (years)"
    row = dict(zip(table.columns, table.rows[1], strict=True))
    assert row["mean error (years)"] == "4.000 ± 0.828"
    assert (row["vs plain"], row["verdict"]) == ("-1.000", "improves")
    assert "differences in years" in table.notes[0]
    assert table.notes[1] == "Lower is better: mean error; young; unseen mean error."
    text = comparison_text(errors)
    assert "BatchFormer improves mean error over the plain network (-1.000 years, 95 % interval -1." in text
    assert "percentage" not in text
    assert controls_table(errors).notes[0].startswith("Years of mean error")


def test_tables_of_mixed_units_name_each(errors):
    columns = ("mean error (years)", "young (years)", "within 5 years (%)", "slope", "unseen mean error (years)")
    table = main_table(errors)
    assert (table.columns[2], *table.columns[6:]) == columns
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["within 5 years (%)"], row["slope"]) == ("50.00 ± 0.00", "0.9000 ± 0.0000")
    others = difference_table(errors)
    assert others.columns[1:] == columns[1:]
    assert others.notes[0].startswith("Years, percentage points and plain numbers with 95 % intervals")


def test_classes_are_in_the_unit_of_their_measure(errors):
    table = per_class_table(errors)
    assert table.title == "Mean error (years) per class"
    assert table.rows[0] == ("a", "9", "5.000 ± 0.791", "4.000 ± 0.828", "-1.000")
    assert table.notes[0].startswith("Years, mean")


def test_pictures_of_an_error_have_its_unit(errors):
    pytest.importorskip("matplotlib")
    _, ax = plot_differences(errors)
    assert ax.get_xlabel() == "difference to plain in mean error (years; lower is better)"
    low, high = ax.get_xlim()
    assert -2 < low < -1
    assert 0 < high < 2
    for plot in (plot_classes, plot_groups):
        _, ax = plot(errors)
        assert ax.get_ylabel().startswith("test mean error (years), lower is better")
        assert ax.get_ylim()[1] < 9  # and no hundredfold
    _, ax = plot_groups(errors)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["young people"]
    _, ax = plot_curves(errors, "val_mae")
    assert ax.get_ylabel().startswith("validation mean error (years), lower is better")
    assert list(ax.get_lines()[0].get_ydata()) == [8.0, 5.0]


def test_axes_of_fractions_end_at_their_bounds(folders, tmp_path):
    pytest.importorskip("matplotlib")
    folder = folders.comparison(tmp_path / "cmp", seeds=(0, 1))
    for arm in ("plain", "batchformer"):
        for seed in (0, 1):
            classes = [{"name": "a", "count": 9, "value": float(seed)}]  # 50 ± 71 percent
            folders.run(folder / arm / f"seed{seed}", arm, seed, result={"per_class": classes})
    _, ax = plot_classes(read_comparison(folder))
    assert ax.get_ylim() == pytest.approx((-3, 103))


def test_older_results_are_shown_as_before(folders, tmp_path):
    older = read_comparison(folders.comparison(tmp_path / "older", seeds=range(3), older=True))
    today = read_comparison(folders.comparison(tmp_path / "today", seeds=range(3)))
    assert main_table(older) == main_table(today)
    assert per_class_table(older) == per_class_table(today)
    panoptic = ("PQ", "SQ", "RQ", "PQ_things", "box_AP", "unseen_PQ", "unseen_mask_AP50")
    assert order_metrics(sorted(panoptic), OLDER_MEASURES) == list(panoptic)
    labels = [find_measure(name, OLDER_MEASURES).label for name in ("unseen_APS", "SQ_stuff", "unseen_mask_AP50")]
    assert labels == ["unseen AP small", "SQ stuff", "unseen mask AP50"]
    lower = [measure.name for measure in OLDER_MEASURES if not measure.higher_is_better]
    assert lower == ["ece", "share_of_experts_used"]
    assert len({measure.name for measure in OLDER_MEASURES}) == len(OLDER_MEASURES)


def test_a_comparison_may_have_results_of_both_kinds(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=range(3), older=True)
    folders.run(folder / "plain" / "seed2", "plain", 2)
    assert [measure.label for measure in map(read_comparison(folder).measure, ("top1", "ece"))] == ["top-1", "ECE"]


def test_an_undescribed_metric_is_a_number_and_comes_last(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=(0,), result={"metrics": {"top1": 0.5, "a_count": 12.0}})
    table = main_table(read_comparison(folder))
    assert table.columns[-1] == "a count"
    assert table.rows[0][-1] == "12.00"


def test_a_primary_metric_without_a_direction_is_refused(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=(0,), result={"metrics": {"new": 1.0}}, plan={"primary": "new"})
    with pytest.raises(
        ReportError, match="whether higher is better of the primary metric 'new', found measures of top1"
    ):
        read_comparison(folder)


def test_runs_that_disagree_about_a_unit_are_refused(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", seeds=(0, 1))
    measures = [{"name": "top1", "label": "top-1", "unit": "", "higher_is_better": True}]
    folders.run(folder / "plain" / "seed1", "plain", 1, result={"measures": measures, "metrics": {"top1": 1.0}})
    with pytest.raises(ReportError, match=r"Expected one unit and direction of top1 .*'no unit' in plain/seed1"):
        read_comparison(folder)


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"name": "top1", "label": "top-1", "unit": "%"}, "None as higher_is_better of a measure, expected a bool"),
        (
            {"name": "top1", "label": 1, "unit": "%", "higher_is_better": True},
            "1 as label of a measure, expected a str",
        ),
        ("top1", "unreadable: "),
    ],
)
def test_a_broken_measure_makes_a_run_unreadable(folders, tmp_path, entry, reason):
    run = read_run(folders.run(tmp_path / "run", result={"measures": [entry]}))
    assert isinstance(run, LeftOut)
    assert reason in run.reason


def test_numbers_in_both_kinds_of_units():
    difference = paired_difference({0: 0.9, 1: 0.8, 2: 0.85}, {0: 0.5, 1: 0.5, 2: 0.5})
    assert AP.described(difference) == "+35.00 points, 95 % interval +22.58 to +47.42, 3 pairs"
    assert YEARS.described(difference) == "+0.35 years, 95 % interval +0.23 to +0.47, 3 pairs"
    assert Measure("n", "n", "").described(difference).startswith("+0.35, 95 % interval")
    assert (AP.number(float("nan")), AP.signed(float("nan"))) == ("n/a", "n/a")
    assert (AP.short(0.5), YEARS.short(0.5)) == ("50.0", "0.5")
    assert YEARS.spread(summarize([float("nan")])) == "n/a"
    assert (AP.signed(4e-10), AP.signed(-0.0000003), AP.signed(-0.0000003, keep_sign=False)) == (
        "+0.00",
        "-0.00003",
        "+0.00",
    )


@pytest.mark.parametrize(
    ("values", "text"), [((1234.5, 2.0), "1234"), ((0.01234,), "0.01234"), ((81.0,), "81.00"), ((0.0,), "0.00")]
)
def test_numbers_with_a_unit_show_four_digits_of_the_largest(values, text):
    assert Measure("m", "m", "px").fitted(values).number(values[0]) == text


def test_heads_name_the_units_unless_all_is_percent():
    assert heads([AP, Measure("ece", "ECE", higher_is_better=False)]) == ["AP", "ECE"]
    assert heads([YEARS]) == ["mean error (years)"]


def test_one_module_makes_numbers_into_text():
    """Percent is a unit among others: nothing outside measures.py multiplies by 100 or writes the sign."""
    for path in SOURCE.rglob("*.py"):
        if path.name != "measures.py":
            found = re.findall(r".*(?:\b100 \*|\* 100\b|%(?! len)).*", path.read_text(encoding="utf-8"))
            assert not found, f"{path.name}: {found}"


def test_no_metric_of_a_task_is_named_outside_the_table_for_older_results():
    names = {measure.name for measure in OLDER_MEASURES} - {"accuracy"}
    for path in SOURCE.rglob("*.py"):
        if path.name != "older_results.py":
            code = re.sub(r'""".*?"""', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            assert not names & set(re.findall(r"[\"'](\w+)[\"']", code)), path.name
