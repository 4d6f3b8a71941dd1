"""Plots of a comparison: each function returns ``(fig, ax)`` and leaves matplotlib's global state alone.

Axes show values as the tables do: fractions times 100, numbers with another unit as they are.

Figures are made without pyplot, so no window, backend or list of open figures is involved; ``fig.savefig`` writes one.
Colours are Okabe and Ito's, which people with any colour vision can tell apart; arms also differ in marker.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .curves import seed_curves
from .measures import INTERVAL, Measure
from .paired import PairedDifference, summarize
from .render import one_line
from .runs import BASELINE, TREATMENT, Comparison, ReportError
from .sentences import verdict_text
from .tables import class_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["curve_columns", "has_groups", "plot_classes", "plot_curves", "plot_differences", "plot_groups"]

_COLOURS = {
    "plain": "#4d4d4d",
    "batchformer": "#0072b2",
    "frozen": "#e69f00",
    "self_only": "#d55e00",
    "duplicate": "#009e73",
    "single_stream": "#cc79a7",
}
_OTHER = ("#8c510a", "#56b4e9")
_MARKERS = {"plain": "o", "batchformer": "D", "frozen": "s", "self_only": "^", "duplicate": "v", "single_stream": "P"}
_GREY = "#767676"
_TEXT = "#333333"


def _colour(comparison: Comparison, arm: str) -> str:
    return _COLOURS.get(arm) or _OTHER[comparison.arms.index(arm) % len(_OTHER)]


def _figure(width: float, height: float) -> "Figure":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Plots need matplotlib: pip install 'batchformer[plots]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _plain_axes(ax: "Axes") -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(labelsize=9)


def _arms(comparison: Comparison) -> list[str]:
    return [arm for arm in comparison.arms if comparison.of(arm)]


def plot_differences(comparison: Comparison) -> tuple["Figure", "Axes"]:
    """Difference to plain on the primary metric: the mean, its interval and a dot for each seed, a line for each arm.

    Raises:
        ReportError: There is no pair of finished runs to compare.
        ImportError: matplotlib is not installed.

    Example:
        >>> from pathlib import Path
        >>> from batchformer.report import Run
        >>> runs = (Run(Path(), "r", "plain", 0, {"top1": 0.7}), Run(Path(), "r", "batchformer", 0, {"top1": 0.8}))
        >>> fig, ax = plot_differences(Comparison(Path(), "r", ("plain", "batchformer"), (0,), "top1", runs))
        >>> ax.get_xlabel()  # fig.savefig("differences.png") writes it
        'difference to plain in top-1 (percentage points)'
    """
    measure = comparison.measure(comparison.primary)
    arms = [arm for arm in _arms(comparison) if arm != BASELINE]
    pairs = [(arm, comparison.difference(arm, BASELINE, comparison.primary)) for arm in arms]
    pairs = [(arm, difference) for arm, difference in pairs if difference.n]
    if not pairs:
        raise ReportError(
            "Expected plain and another arm finished on the same seed, found none. Finish more runs (--resume)."
        )
    fig = _figure(8.5, 1.5 + 0.62 * len(pairs))
    ax = fig.subplots()
    ax.axvline(0.0, color=_GREY, linewidth=1, zorder=1)
    for row, (arm, difference) in enumerate(pairs):
        _difference_row(ax, row, difference, measure, (_colour(comparison, arm), _MARKERS.get(arm, "X")))
    ax.set_yticks(range(len(pairs)), [arm for arm, _ in pairs])
    ax.set_ylim(len(pairs) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    brackets = "; ".join(filter(None, (measure.difference_unit, measure.direction)))
    ax.set_xlabel(_plain_text(f"difference to plain in {measure.label}" + (f" ({brackets})" if brackets else "")))
    bar = INTERVAL if len(comparison.beside) < 2 else f"{INTERVAL}, wider for controls so that all hold at once"
    ax.set_title(f"small dot: one seed; large mark: mean; bar: {bar}", fontsize=9, color=_GREY, loc="left")
    _plain_axes(ax)
    ax.spines["left"].set_visible(False)
    return fig, ax


def _difference_row(
    ax: "Axes", row: int, difference: PairedDifference, measure: Measure, look: tuple[str, str]
) -> None:
    colour, marker = look
    seeds = [measure.scaled(value) for value in difference.differences]
    ax.plot(seeds, [row + 0.2] * len(seeds), "o", color=colour, alpha=0.45, markersize=5, markeredgewidth=0)
    numbers = measure.mean(difference)
    if difference.has_interval:
        ends = [measure.scaled(difference.low), measure.scaled(difference.high)]
        ax.plot(ends, [row - 0.1] * 2, color=colour, linewidth=2.5, zorder=3)
        numbers += f"  {measure.interval(difference)}"
    ax.plot(measure.scaled(difference.mean), row - 0.1, marker, color=colour, markersize=8, zorder=4)
    text = f"{numbers}\n{verdict_text(difference)}"
    ax.annotate(text, (1.02, row), xycoords=("axes fraction", "data"), va="center", fontsize=8.5, color=_TEXT)


def _plain_text(text: str) -> str:
    """Text of the data for matplotlib, which takes what stands between two dollars for a formula."""
    return one_line(text).replace("$", r"\$")


def plot_classes(comparison: Comparison) -> tuple["Figure", "Axes"]:
    """The metric of each class, of plain and +BatchFormer, above its training data; the most frequent class is first.

    Returns:
        The figure, and the axes of the metric; the axes of the counts are ``fig.axes[1]``.

    Raises:
        ReportError: No run of either arm holds per-class results.
        ImportError: matplotlib is not installed.
    """
    arms = [arm for arm in (BASELINE, TREATMENT) if comparison.of(arm)]
    lines = class_lines(comparison, arms)
    if not lines or not arms:
        raise ReportError("Expected per-class results of plain or batchformer, found none in result.json.")
    measure = comparison.class_measure
    fig = _figure(8.5, 5.2)
    ax, counts = fig.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    ranks = np.arange(len(lines))
    many = len(lines) > 30
    for arm in arms:
        colour, marker = _colour(comparison, arm), _MARKERS[arm]
        mean = np.array([measure.scaled(line.value[arm].mean) for line in lines])
        if many:  # single classes are noise for the eye: draw them faint, and their running mean on top
            ax.plot(ranks, mean, marker, color=colour, alpha=0.25, markersize=3, markeredgewidth=0)
            ax.plot(ranks, _running_mean(mean, max(3, len(lines) // 20)), color=colour, linewidth=2, label=arm)
        else:
            sd = np.nan_to_num([measure.scaled(line.value[arm].sd) for line in lines])
            shift = -0.1 if arm == BASELINE else 0.1
            ax.errorbar(ranks + shift, mean, sd, fmt=marker, color=colour, markersize=5, linewidth=1.2, label=arm)
    spread = "class; running mean" if many else "mean ± deviation over seeds"
    ax.set_ylabel(_plain_text(f"test {measure.axis}") + f"\n{spread}")
    _keep_inside(ax, measure)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, frameon=False, fontsize=9, borderaxespad=0.2)
    images = [line.count for line in lines]
    if many:
        counts.fill_between(ranks, images, color="#bdbdbd")
    else:
        counts.bar(ranks, images, 0.9, color="#bdbdbd")
    counts.set_yscale("log")
    counts.set_ylim(bottom=max(0.5, 0.5 * min(images)), top=2.5 * max(1, *images))
    counts.set_ylabel(f"{_plain_text(comparison.class_count)}\nper class")
    for axes in (ax, counts):
        _plain_axes(axes)
    _class_ticks(counts, [line.name for line in lines], images, comparison.class_count)
    return fig, ax


def _keep_inside(ax: "Axes", measure: Measure) -> None:
    """No axis of fractions goes further than its possible values, with a margin for the marks at its ends."""
    (low, high), (least, most) = ax.get_ylim(), measure.bounds
    margin = 0.03 * (most - least) if math.isfinite(most - least) else 0.0
    ax.set_ylim(max(low, least - margin), min(high, most + margin))


def _class_ticks(ax: "Axes", names: Sequence[str], images: Sequence[float], sorted_by: str) -> None:
    if len(names) > 30:
        ax.set_xlabel(f"{len(names)} classes, sorted by {_plain_text(sorted_by)}")
        return
    for rank, count in enumerate(images):
        ax.annotate(f"{count:g}", (rank, count), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
    short = [_plain_text(name if len(name) <= 16 else f"{name[:8]}…{name[-7:]}") for name in names]
    upright = len(names) <= 12 and max(len(name) for name in short) <= 8
    ax.set_xticks(
        range(len(names)),
        short,
        rotation=0 if upright else 35,
        ha="center" if upright else "right",
        rotation_mode="anchor",
    )
    ax.set_xlabel(f"class, sorted by {_plain_text(sorted_by)}")


def _running_mean(values: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]", window: int) -> list[float]:
    half = window // 2
    pieces = (values[max(0, index - half) : index + half + 1] for index in range(len(values)))
    return [float(np.nanmean(piece)) if np.isfinite(piece).any() else math.nan for piece in pieces]


def curve_columns(comparison: Comparison) -> list[str]:
    """The columns of ``metrics.csv`` worth a plot that the runs have: the primary metric and the training loss."""
    return [name for name in (f"val_{comparison.primary}", "train_loss") if seed_curves(comparison, name)]


def plot_curves(comparison: Comparison, column: str = "train_loss") -> tuple["Figure", "Axes"]:
    """One column of ``metrics.csv`` over the epochs: mean over seeds, and a band of one standard deviation.

    Args:
        comparison: Its runs need the file ``metrics.csv``.
        column: Name of a column; one that belongs to no measure (``train_loss``) is drawn without a unit.

    Raises:
        ReportError: No run has this column.
        ImportError: matplotlib is not installed.
    """
    measure = comparison.measure(column)
    fig = _figure(8.5, 4.4)
    ax = fig.subplots()
    ends: list[tuple[str, float, float]] = []
    drawn: set[int] = set()
    for arm, seeds in seed_curves(comparison, column).items():
        epochs = sorted({epoch for curve in seeds.values() for epoch in curve})
        summaries = [summarize([curve[epoch] for curve in seeds.values() if epoch in curve]) for epoch in epochs]
        mean = np.array([measure.scaled(summary.mean) for summary in summaries])
        sd = np.nan_to_num([measure.scaled(summary.sd) for summary in summaries])
        colour = _colour(comparison, arm)
        ax.plot(epochs, mean, color=colour, linewidth=1.8, marker="o" if len(epochs) == 1 else None)
        ax.fill_between(epochs, mean - sd, mean + sd, color=colour, alpha=0.15, linewidth=0)
        ends.append((arm, float(epochs[-1]), float(mean[-1])))
        drawn.update(epochs)
    if not ends:
        raise ReportError(f"Expected a column {column!r} in some metrics.csv of {comparison.path}, found none.")
    _plain_axes(ax)
    ax.locator_params(axis="x", integer=True)
    if len(drawn) == 1:
        ax.set_xticks([*drawn])
    ax.set_xlim(right=max(drawn) + (0.05 if len(drawn) == 1 else 0))
    ax.set_xlabel("epoch")
    ax.set_ylabel(_plain_text(measure.axis) + "\nmean ± deviation over seeds")
    _keep_inside(ax, measure)
    _end_labels(comparison, ax, ends)
    return fig, ax


def _end_labels(comparison: Comparison, ax: "Axes", ends: Sequence[tuple[str, float, float]]) -> None:
    """Names at the ends of the lines, pushed apart so that none covers another."""
    low, high = ax.get_ylim()
    placed = sorted((value, arm, epoch) for arm, epoch, value in ends if math.isfinite(value))
    heights = _spread([value for value, _, _ in placed], 0.06 * (high - low), low, high)
    for height, (value, arm, epoch) in zip(heights, placed, strict=True):
        colour = _colour(comparison, arm)
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 2, "relpos": (0.0, 0.5)}
        ax.annotate(
            arm, (epoch, value), xytext=(1.04, height), textcoords=("axes fraction", "data"),
            color=_TEXT, fontsize=9, va="center", arrowprops=arrow,
        )  # fmt: skip
    ax.set_ylim(low, high)


def _spread(values: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Heights for ascending values, at least ``step`` apart, near the values and in [low, high] where they fit."""
    if not values:
        return []
    clusters: list[list[float]] = []  # the values of labels that touch one another; each cluster is centred on its mean
    for value in values:
        clusters.append([value])
        while len(clusters) > 1 and _bottom(clusters[-1], step) < _bottom(clusters[-2], step) + step * len(
            clusters[-2]
        ):
            touching = clusters.pop()
            clusters[-1] += touching
    heights = [_bottom(cluster, step) + step * index for cluster in clusters for index in range(len(cluster))]
    shift = min(0.0, high - heights[-1]) or max(0.0, low - heights[0])
    return [height + shift for height in heights]


def _bottom(cluster: Sequence[float], step: float) -> float:
    return sum(cluster) / len(cluster) - step * (len(cluster) - 1) / 2


def _groups(comparison: Comparison) -> list[Measure]:
    """Measures that are the primary one on a part of the classes or objects, as far as there are values."""
    arms = _arms(comparison)
    groups = [measure for name in comparison.metric_names if (measure := comparison.measure(name)).part]
    return [group for group in groups if any(_finite(comparison, arm, group) for arm in arms)]


def _finite(comparison: Comparison, arm: str, measure: Measure) -> list[float]:
    return [value for value in comparison.values(arm, measure.name).values() if math.isfinite(value)]


def has_groups(comparison: Comparison) -> bool:
    """True when :func:`plot_groups` has something to show."""
    return bool(_groups(comparison))


def plot_groups(comparison: Comparison) -> tuple["Figure", "Axes"]:
    """The primary metric on groups of classes or objects (many, medium, few): a bar for each arm, a dot for each seed.

    Raises:
        ReportError: No run has such metrics.
        ImportError: matplotlib is not installed.
    """
    arms = _arms(comparison)
    groups = _groups(comparison)
    if not groups:
        raise ReportError("Expected metrics of groups, such as few-shot classes or small objects, found none.")
    fig = _figure(max(5.5, 2.2 + 0.5 * len(groups) * (len(arms) + 1)), 4.2)
    ax = fig.subplots()
    width = 0.86 / len(arms)
    for index, arm in enumerate(arms):
        offset = (index - (len(arms) - 1) / 2) * width
        name: str | None = arm  # once in the legend, with the first bar that the arm has
        for place, group in enumerate(groups):
            values = _finite(comparison, arm, group)
            if not values:
                continue
            x, mean = place + offset, summarize(values).mean
            dots = [group.scaled(value) for value in values]
            ax.bar(x, group.scaled(mean), 0.92 * width, color=_colour(comparison, arm), alpha=0.55, label=name)
            name = None
            spread = np.linspace(-0.25, 0.25, len(values)) * width if len(values) > 1 else [0.0]
            ax.plot(x + np.asarray(spread), dots, "o", color="black", markersize=2.6, alpha=0.75)
            text, top = group.short(mean), (x, max(dots))
            ax.annotate(text, top, xytext=(0, 3), textcoords="offset points", ha="center", fontsize=7.5)
    ax.set_xticks(range(len(groups)), [_plain_text(group.part) for group in groups])
    ax.tick_params(axis="x", length=0)
    measure = comparison.measure(comparison.primary)
    ax.set_ylabel(_plain_text(f"test {measure.axis}"))
    _plain_axes(ax)
    fig.legend(loc="outside upper left", ncols=min(len(arms), 6), frameon=False, fontsize=9)
    return fig, ax
