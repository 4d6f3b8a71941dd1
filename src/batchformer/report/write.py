"""Write a report: Markdown, CSV and PNG files that read on their own."""

import os
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from . import flat_rows as records
from . import plots, tables
from .caveats import caveats, hardware, left_out_lines, precision, run_caveats, versions
from .convergence import convergence_sentence, convergence_table
from .pictures import picture_table
from .reading import find_runs
from .render import Table, to_csv, to_markdown
from .runs import Comparison, Found, ReportError, Run
from .sentences import arm_text, conclusions, multiple_comparisons

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[[Comparison], tuple[Figure, Axes]]

__all__ = ["ReportPaths", "write_report"]


@dataclass(frozen=True)
class ReportPaths:
    """The files of a report.

    Attributes:
        report: ``report.md``.
        results, per_class, differences: CSV files; the last two are None when there is nothing for them.
        plots: PNG files, in the order of the report.
        notes: What could not be written, and why.
    """

    report: Path
    results: Path
    per_class: Path | None
    differences: Path | None
    plots: tuple[Path, ...]
    notes: tuple[str, ...]


def write_report(paths: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str]) -> ReportPaths:
    """Read run and comparison folders and write a report about them.

    Comparisons get paired differences, verdicts and plots; runs outside comparisons get one table without claims. Each
    file is replaced as a whole, so a reader never sees half of one.

    Args:
        paths: As for :func:`batchformer.report.find_runs`.
        out: Folder to write to; made when absent.

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
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    notes: list[str] = []
    parts = [_header(paths, found)]
    for comparison, prefix in zip(found.comparisons, _prefixes(found.comparisons), strict=True):
        pictures = _write_plots(comparison, folder, prefix, notes)
        written += pictures
        parts.append(_comparison_section(comparison, pictures, folder, notes))
    if found.runs:
        parts.append(_runs_section(found.runs))
    if found.left_out:
        parts.append("## Runs that are not in the tables\n\n" + _bullets(left_out_lines(found.left_out)))
    parts += ["## Files\n\n" + _bullets(notes)] if notes else []
    results = _write_text(folder / "results.csv", to_csv(records.result_rows(found)))
    classes, differences = records.class_rows(found), records.difference_rows(found.comparisons)
    per_class = _write_text(folder / "per_class.csv", to_csv(classes)) if classes else None
    compared = _write_text(folder / "differences.csv", to_csv(differences)) if differences else None
    report = _write_text(folder / "report.md", "\n".join(parts))
    return ReportPaths(report, results, per_class, compared, tuple(written), tuple(dict.fromkeys(notes)))


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # mkstemp's 0600 is for secrets
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> Path:
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")
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
        notes.append(f"No training curves of {comparison.path}: {error}")
    pictures = []
    for name, draw in drawings:
        try:
            fig, _ = draw(comparison)
        except ImportError as error:
            notes.append(f"No plots: {error}")
            break
        except ReportError as error:
            notes.append(f"No plot `{name}` of {comparison.path}: {error}")
            continue
        path = folder / f"{prefix}{name}.png"
        with _replacing(path) as temporary:
            fig.savefig(temporary, dpi=150)
        pictures.append(path)
    return pictures


def _bullets(lines: Sequence[str]) -> str:
    return "".join(f"- {line}\n" for line in dict.fromkeys(lines))


def _section(table: Table, level: str = "###") -> str:
    return f"{level} {table.title}\n\n{to_markdown(table)}"


def _header(paths: Sequence[str | os.PathLike[str]], found: Found) -> str:
    command = shlex.join(["batchformer", "report", *(os.fspath(path) for path in paths)])
    recipes = dict.fromkeys([*(c.recipe for c in found.comparisons), *(run.recipe for run in found.runs)])
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"# Report: {', '.join(recipes)}\n\nWritten {date} by `{command}`.\n"


def _comparison_section(comparison: Comparison, drawn: Sequence[Path], folder: Path, notes: list[str]) -> str:
    parts = [f"## {comparison.recipe}\n", _bullets(conclusions(comparison))]
    main = tables.main_table(comparison)
    parts.append(f"{to_markdown(main)}\n{multiple_comparisons(comparison)}\n")
    reservations = caveats(comparison)
    if reservations:
        parts.append("### Caveats\n\n" + _bullets(reservations))
    if len(comparison.metric_names) > 1:
        parts.append(_section(tables.difference_table(comparison)))
    if comparison.controls:
        parts.append(_section(tables.controls_table(comparison)))
    parts += _convergence_section(comparison, notes)
    parts.append("### What the arms are\n\n" + _bullets(_arm_lines(comparison)))
    parts.append(_section(tables.cost_table(comparison)))
    if any(run.per_class for run in comparison.runs):
        parts.append(_section(tables.per_class_table(comparison)))
    if drawn:
        links = "\n\n".join(f"![{path.stem}]({path.name})" for path in drawn)
        parts.append(f"### Plots\n\n{links}\n")
    if (shown := picture_table(comparison, folder)) is not None:
        parts.append(f"### Pictures\n\n{shown}")
    parts.append("### How it was made\n\n" + _bullets(_provenance(comparison.runs, comparison)))
    return "\n".join(parts)


def _convergence_section(comparison: Comparison, notes: list[str]) -> list[str]:
    try:
        table, sentence = convergence_table(comparison), convergence_sentence(comparison)
    except (ReportError, ValueError) as error:
        notes.append(f"Nothing on the way through the epochs of {comparison.path}: {error}")
        return []
    return [] if table is None else [_section(table) + (f"\n{sentence}\n" if sentence else "")]


def _arm_lines(comparison: Comparison) -> list[str]:
    return [f"`{arm}`: {arm_text(comparison, arm)}." for arm in comparison.arms]


def _runs_section(runs: Sequence[Run]) -> str:
    parts = [_section(tables.runs_table(runs), "##")]
    reservations = run_caveats(runs)
    if reservations:
        parts.append("### Caveats\n\n" + _bullets(reservations))
    parts.append("### How they were made\n\n" + _bullets(_provenance(runs)))
    return "\n".join(parts)


def _provenance(runs: Sequence[Run], comparison: Comparison | None = None) -> list[str]:
    lines = []
    if comparison is not None:
        seeds = ", ".join(str(seed) for seed in comparison.seeds)
        lines += [
            f"Command: `{comparison.command or 'not recorded'}`",
            f"Folder: `{comparison.path}`",
            f"Seeds: {seeds}",
        ]
    else:
        lines += [f"`{run.path}`: `{run.environment.get('command', 'command not recorded')}`" for run in runs]
    dates = sorted({run.date for run in runs if run.date} | ({comparison.date} - {""} if comparison else set()))
    lines.append(f"Date: {' to '.join(dict.fromkeys([dates[0], dates[-1]])) if dates else 'not recorded'}")
    facts: tuple[tuple[str, Callable[[Run], str]], ...] = (
        ("Checkpoint selection", lambda run: run.selection),
        ("Split", lambda run: run.split),
        ("Hardware", hardware),
        ("Precision", precision),
        ("Versions", lambda run: versions(run)[1]),
        ("Code", lambda run: str(run.environment.get("git") or "not recorded")),
    )
    lines += [f"Note: {note}" for note in dict.fromkeys(note for run in runs for note in run.notes)]
    for name, read in facts:
        lines.append(f"{name}: {'; '.join(dict.fromkeys(read(run) for run in runs)) or 'no finished run'}")
    return lines
