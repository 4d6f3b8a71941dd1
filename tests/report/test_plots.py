import sys
from itertools import combinations, pairwise

import numpy as np
import pytest

from batchformer.report import ReportError, read_comparison
from batchformer.report.plots import _spread, curve_columns, plot_classes, plot_curves, plot_differences, plot_groups

pytest.importorskip("matplotlib")
ALL = [plot_differences, plot_classes, plot_curves, plot_groups]


@pytest.fixture
def full(folders, tmp_path):
    return read_comparison(folders.comparison(tmp_path / "cmp", folders.all_arms, range(5)))


@pytest.mark.parametrize("plot", ALL)
def test_nothing_is_cut_off_and_no_annotation_covers_another(full, plot):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    fig, ax = plot(full)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()
    box = fig.get_tightbbox(canvas.get_renderer())
    width, height = fig.get_size_inches()
    assert box.x0 >= -0.01
    assert box.y0 >= -0.01
    assert box.x1 <= width + 0.01
    assert box.y1 <= height + 0.01
    texts = [Text.get_window_extent(text, canvas.get_renderer()) for text in ax.texts]
    assert not any(one.overlaps(two) for one, two in combinations(texts, 2))
    assert ax.get_ylabel() or ax.get_xlabel()


@pytest.mark.parametrize("plot", ALL)
def test_matplotlibs_global_state_is_left_alone(full, plot):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot(full)
    assert dict(matplotlib.rcParams) == before
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_differences_are_drawn_where_the_numbers_are(full):
    _, ax = plot_differences(full)
    difference = full.difference("batchformer", "plain", "top1")
    drawn = [np.sort(line.get_xdata()) for line in ax.get_lines()]
    seeds = np.sort([100 * value for value in difference.differences])
    assert any(len(x) == 5 and np.allclose(x, seeds) for x in drawn)
    assert any(len(x) == 2 and np.allclose(x, [100 * difference.low, 100 * difference.high]) for x in drawn)
    assert [label.get_text() for label in ax.get_yticklabels()] == list(full.arms[1:])
    assert "percentage points" in ax.get_xlabel()


def test_with_two_seeds_no_interval_is_drawn(folders, tmp_path):
    _, ax = plot_differences(read_comparison(folders.comparison(tmp_path / "cmp", seeds=(0, 1))))
    assert len(ax.get_lines()) == 3  # zero, the seeds, the mean
    assert any("too few seeds" in text.get_text() for text in ax.texts)


def test_curves_are_the_mean_over_seeds(full):
    from batchformer.report.curves import read_curves

    _, ax = plot_curves(full, "val_top1")
    curves = [list(read_curves(run.path)["val_top1"].values()) for run in full.of("plain")]
    assert np.allclose(ax.get_lines()[0].get_ydata(), 100 * np.mean(curves, axis=0))
    assert {text.get_text(): text.xy[1] for text in ax.texts}["plain"] == ax.get_lines()[0].get_ydata()[-1]
    assert "%" in ax.get_ylabel()
    assert "%" not in plot_curves(full)[1].get_ylabel()


def test_curves_of_unequal_length_average_what_is_there(folders, tmp_path):
    folder = folders.comparison(tmp_path / "cmp", ("plain",), (0, 1))
    (folder / "plain" / "seed0" / "metrics.csv").write_text("epoch,step,train_loss\n0,1,2.0\n1,2,1.0\n")
    (folder / "plain" / "seed1" / "metrics.csv").write_text("epoch,step,train_loss\n0,1,4.0\n")
    _, ax = plot_curves(read_comparison(folder))
    assert list(ax.get_lines()[0].get_ydata()) == [3.0, 1.0]


def test_one_epoch_is_a_point_inside_the_axes(folders, tmp_path):
    _, ax = plot_curves(read_comparison(folders.comparison(tmp_path / "cmp", seeds=(0,), epochs=1)))
    low, high = ax.get_xlim()
    assert low < 1 < high


def test_curve_columns(full, folders, tmp_path):
    assert curve_columns(full) == ["val_top1", "train_loss"]
    folder = folders.comparison(tmp_path / "bare", seeds=(0,))
    for path in folder.rglob("metrics.csv"):
        path.unlink()
    assert curve_columns(read_comparison(folder)) == []


def test_classes_stand_by_frequency(full):
    fig, ax = plot_classes(full)
    names = [label.get_text() for label in fig.axes[1].get_xticklabels()]
    assert (names[0], names[-1]) == ("Sneaker", "Shirt")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["plain", "batchformer"]


def test_a_thousand_classes_have_no_thousand_names(folders, tmp_path):
    names = [f"class {index}" for index in range(1000)]
    counts = [int(1280 * 0.004 ** (index / 999)) for index in range(1000)]
    fig, _ = plot_classes(read_comparison(folders.comparison(tmp_path / "cmp", seeds=(0,), names=names, counts=counts)))
    assert fig.axes[1].get_xlabel() == "1000 classes, sorted by training images"
    assert len(fig.axes[1].get_xticklabels()) < 20


def test_groups_have_a_bar_per_arm_from_zero_and_a_dot_per_seed(full):
    _, ax = plot_groups(full)
    assert len(ax.patches) == 18
    assert all(bar.get_y() == 0 for bar in ax.patches)
    assert sum(len(line.get_xdata()) for line in ax.get_lines()) == 18 * 5


def test_an_empty_group_is_left_out(folders, tmp_path):
    runs = {"result": {"metrics": {"top1": 0.5, "many": 0.5, "few": None}}}
    _, ax = plot_groups(read_comparison(folders.comparison(tmp_path / "cmp", seeds=(0,), **runs)))
    assert [label.get_text() for label in ax.get_xticklabels()] == ["many-shot classes"]


def test_plots_without_their_data_say_what_they_need(folders, tmp_path):
    bare = {"result": {"metrics": {"top1": 0.5}, "per_class": []}}
    comparison = read_comparison(folders.comparison(tmp_path / "cmp", ("plain",), (0,), **bare))
    with pytest.raises(ReportError, match="Expected plain and another arm"):
        plot_differences(comparison)
    with pytest.raises(ReportError, match="Expected per-class results"):
        plot_classes(comparison)
    with pytest.raises(ReportError, match="Expected metrics of groups, such as few-shot classes"):
        plot_groups(comparison)
    with pytest.raises(ReportError, match="Expected a column 'val_map'"):
        plot_curves(comparison, "val_map")


@pytest.mark.parametrize("plot", ALL)
def test_without_matplotlib_the_extra_is_named(full, plot, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'batchformer\[plots\]'"):
        plot(full)


@pytest.mark.parametrize("seed", range(20))
def test_labels_are_spread_inside_the_axes_in_order(seed):
    values = sorted(np.random.default_rng(seed).uniform(0, 1, 6).tolist())
    heights = _spread(values, 0.1, 0.0, 1.0)
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(heights))
    assert heights[0] >= -1e-9
    assert heights[-1] <= 1 + 1e-9


def test_labels_that_do_not_touch_stay_where_they_are():
    assert _spread([0.1, 0.5, 0.9], 0.1, 0.0, 1.0) == [0.1, 0.5, 0.9]
    assert _spread([], 0.1, 0.0, 1.0) == []
