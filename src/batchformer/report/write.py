"""Write a report: Markdown, CSV and PNG files that read on their own."""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from batchformer.data.atomic import atomic_file, write_text

from . import plots
from .contents import contents
from .finding import find_runs
from .flat_rows import class_rows, difference_rows, result_rows
from .markdown import to_markdown
from .reading import with_margin
from .render import to_csv
from .runs import Comparison, ReportError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[[Comparison], tuple[Figure, Axes]]

__all__ = ["ReportPaths", "write_report"]


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report.

    Attributes:
        report: The file ``report.md``.
        results: The file ``results.csv``.
        per_class: The file ``per_class.csv``; None without results of classes.
        differences: The file ``differences.csv``; None without a comparison.
        plots: PNG files, in the order of the report.
        notes: Sentences about files that could not be written, with the reason.
    """

    report: Path
    results: Path
    per_class: Path | None
    differences: Path | None
    plots: tuple[Path, ...]
    notes: tuple[str, ...]


def write_report(
    paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, margin: float | None = None
) -> ReportPaths:
    """Read run and comparison folders and write a report about them.

    Comparisons get paired differences, verdicts and plots; runs outside comparisons get one table without claims. Each
    file is replaced as a whole, so that a reader never sees half of one.

    Args:
        paths: Run folders, comparison folders, folders that hold such folders, or patterns.
        out: Folder to write to; made when absent.
        margin: Smallest difference of the primary metric that matters, in points for a metric in percent and otherwise
            in its own unit, for all comparisons; None for the margins of their plans.

    Returns:
        The :class:`ReportPaths`. Without matplotlib there are no plots, and ``notes`` says so.

    Raises:
        ReportError: Nothing usable was found; see :func:`batchformer.report.find_runs`.

    Example:
        >>> import json, tempfile
        >>> result = {"recipe": "my/recipe", "arm": "plain", "seed": 0, "metrics": {"top1": 0.5}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "result.json").write_text(json.dumps(result))
        ...     (Path(folder) / "done").touch()
        ...     write_report([folder], Path(folder) / "report").report.read_text().splitlines()[0]
        '# Report: my/recipe'
    """
    found = find_runs(paths)
    found = replace(found, comparisons=tuple(with_margin(comparison, margin) for comparison in found.comparisons))
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    notes: list[str] = []
    prefixes = _prefixes(found.comparisons)
    drawn = [
        _write_plots(comparison, folder, prefix, notes)
        for comparison, prefix in zip(found.comparisons, prefixes, strict=True)
    ]
    page = contents(paths, found, drawn, folder, notes, margin)
    results = _write(folder / "results.csv", to_csv(result_rows(found)))
    classes, differences = class_rows(found), difference_rows(found.comparisons)
    per_class = _write(folder / "per_class.csv", to_csv(classes)) if classes else None
    compared = _write(folder / "differences.csv", to_csv(differences)) if differences else None
    report = _write(folder / "report.md", to_markdown(page))
    written = tuple(path for paths in drawn for path in paths)
    return ReportPaths(report, results, per_class, compared, written, tuple(page.notes))


def _write(path: Path, text: str) -> Path:
    """Write UTF-8; a sign that has none, out of the name of a file, becomes a question mark."""
    write_text(path, text.encode("utf-8", errors="replace").decode("utf-8"))
    return path


def _prefixes(comparisons: Sequence[Comparison]) -> list[str]:
    """File name prefixes that keep the plots of several comparisons apart."""
    if len(comparisons) == 1:
        return [""]
    names = [re.sub(r"[^\w-]+", "-", comparison.path.name) or "comparison" for comparison in comparisons]
    return [f"{name}-{index}-" if names.count(name) > 1 else f"{name}-" for index, name in enumerate(names, 1)]


def _write_plots(comparison: Comparison, folder: Path, prefix: str, notes: list[str]) -> list[Path]:
    drawings: list[tuple[str, Draw]] = [
        ("differences", plots.plot_differences),
        *([("groups", plots.plot_groups)] if plots.has_groups(comparison) else []),
        ("classes", plots.plot_classes),
    ]
    try:
        for column in plots.curve_columns(comparison):
            name = "loss" if column == "train_loss" else "curves"
            drawings.append((name, partial(plots.plot_curves, column=column)))
    except (ReportError, ValueError) as error:
        notes.append(f"No training curves for {comparison.path}: {error}")
    pictures = []
    for name, draw in drawings:
        try:
            fig, _ = draw(comparison)
        except ImportError as error:
            notes.append(f"No plots: {error}")
            break
        except ReportError as error:
            notes.append(f"No plot of {name} for {comparison.path}: {error}")
            continue
        path = folder / f"{prefix}{name}.png"
        with atomic_file(path) as temporary, warnings.catch_warnings(record=True) as caught:
            warnings.filterwarnings("always", message=".*missing from font")
            fig.savefig(temporary, dpi=150)
        if any("missing from font" in str(warning.message) for warning in caught):
            notes.append(f"{path.name} has boxes for letters that its font lacks; the tables have the letters.")
        pictures.append(path)
    return pictures
