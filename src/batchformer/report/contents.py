"""The contents of a report as plain values: every page, in whatever format, is rendered from these.

Texts are plain: no value here holds markup, so that a renderer escapes all of them alike.
"""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from .caveats import caveats, hardware, left_out_lines, precision, run_caveats, versions
from .certainty import certainty_table
from .convergence import convergence_sentence, convergence_table
from .costs import cost_table
from .first_screen import FirstScreen, first_screen
from .pictures import Picture, PictureTable, picture_table
from .planning import planning_table
from .render import Table
from .runs import Comparison, Found, ReportError, Run
from .sentences import arm_text, conclusions, multiple_comparisons
from .tables import controls_table, difference_table, main_table, per_class_table, runs_table, units_table

__all__ = ["ComparisonContents", "Contents", "Fact", "RunsContents", "contents"]


@dataclass(frozen=True)
class Fact:
    """A fact about the origin of runs.

    Attributes:
        name: Word or words that name the fact.
        text: The fact.
        is_code: True for a command or path, which is shown letter by letter.
    """

    name: str
    text: str
    is_code: bool = False


@dataclass(frozen=True)
class ComparisonContents:
    """The section of one comparison.

    Attributes:
        recipe: Name of the recipe.
        first: The question, the answer and the next step.
        conclusions: Sentences, the main one first.
        main: Arms and metrics.
        questions: Sentences on the number of intervals.
        caveats: Reservations.
        tables: Units, other metrics, controls, certainty, number of seeds, as far as they exist.
        convergence: Course of the validation metric; None without curves.
        convergence_sentence: Its sentence.
        arms: Arm -> description.
        more_tables: Cost and classes.
        plots: Plots of the comparison.
        pictures: Pictures that the task left; None without any.
        facts: Origin of the runs.
    """

    recipe: str
    first: FirstScreen
    conclusions: Sequence[str]
    main: Table
    questions: str
    caveats: Sequence[str]
    tables: Sequence[Table]
    convergence: Table | None
    convergence_sentence: str | None
    arms: Mapping[str, str]
    more_tables: Sequence[Table]
    plots: Sequence[Picture]
    pictures: PictureTable | None
    facts: Sequence[Fact]


@dataclass(frozen=True)
class RunsContents:
    """The section of all runs outside comparisons: their table, caveats and origin."""

    table: Table
    caveats: Sequence[str]
    facts: Sequence[Fact]


@dataclass(frozen=True)
class Contents:
    """A whole report.

    Attributes:
        recipes: Names of all recipes.
        date: Time at which the report was made.
        command: Command that made it.
        comparisons: One section for each comparison.
        runs: The section of runs outside comparisons; None without any.
        left_out: Lines about runs outside comparisons that could not be used.
        notes: Lines about what could not be written.
    """

    recipes: Sequence[str]
    date: str
    command: str
    comparisons: Sequence[ComparisonContents]
    runs: RunsContents | None
    left_out: Sequence[str]
    notes: Sequence[str]


def contents(
    paths: Sequence[str | os.PathLike[str]],
    found: Found,
    plots: Sequence[Sequence[Path]],
    folder: Path,
    notes: list[str],
    margin: float | None = None,
) -> Contents:
    """Gather everything that a report says.

    Args:
        paths: Paths that the report was asked for.
        found: Runs and comparisons at or below these paths.
        plots: Files of the plots of each comparison.
        folder: Folder of the report, to which links are relative.
        notes: Lines about what could not be written; reasons for missing tables are added.
        margin: Margin that the report was asked for, which has its word in the command.

    Returns:
        The :class:`Contents`.
    """
    comparisons = [
        _comparison_contents(comparison, drawn, folder, notes)
        for comparison, drawn in zip(found.comparisons, plots, strict=True)
    ]
    asked = [] if margin is None else ["--margin", f"{margin:g}"]
    recipes = dict.fromkeys([*(c.recipe for c in found.comparisons), *(run.recipe for run in found.runs)])
    return Contents(
        recipes=list(recipes),
        date=f"{datetime.now(UTC).replace(tzinfo=None).isoformat(' ', 'minutes')} UTC",
        command=shlex.join(["batchformer", "report", *(os.fspath(path) for path in paths), *asked]),
        comparisons=comparisons,
        runs=_runs_contents(found.runs) if found.runs else None,
        left_out=left_out_lines(found.left_out),
        notes=list(dict.fromkeys(notes)),
    )


def _comparison_contents(
    comparison: Comparison, drawn: Sequence[Path], folder: Path, notes: list[str]
) -> ComparisonContents:
    course, sentence = _convergence(comparison, notes)
    optional: tuple[tuple[bool, Callable[[Comparison], Table]], ...] = (
        (comparison.has_units, units_table),
        (len(comparison.metric_names) > 1, difference_table),
        (bool(comparison.controls), controls_table),
    )
    has_classes = any(run.per_class for run in comparison.runs)
    return ComparisonContents(
        recipe=comparison.recipe,
        first=first_screen(comparison),
        conclusions=conclusions(comparison),
        main=main_table(comparison),
        questions=multiple_comparisons(comparison),
        caveats=caveats(comparison),
        tables=[
            *(build(comparison) for wanted, build in optional if wanted),
            *certainty_table(comparison),
            *planning_table(comparison),
        ],
        convergence=course,
        convergence_sentence=sentence,
        arms={arm: arm_text(comparison, arm) for arm in comparison.arms},
        more_tables=[cost_table(comparison), *([per_class_table(comparison)] if has_classes else [])],
        plots=[Picture(path.stem, path.name) for path in drawn],
        pictures=picture_table(comparison, folder),
        facts=[*_plan(comparison), *_origin(comparison.runs, comparison.date)],
    )


def _convergence(comparison: Comparison, notes: list[str]) -> tuple[Table | None, str | None]:
    try:
        return convergence_table(comparison), convergence_sentence(comparison)
    except (ReportError, ValueError) as error:
        notes.append(f"No convergence table for {comparison.path}: {error}")
        return None, None


def _runs_contents(runs: Sequence[Run]) -> RunsContents:
    commands = [
        Fact(str(run.path), str(run.environment.get("command") or "command not recorded"), is_code=True) for run in runs
    ]
    return RunsContents(runs_table(runs), run_caveats(runs), [*commands, *_origin(runs)])


def _plan(comparison: Comparison) -> list[Fact]:
    facts = [
        Fact("Command", comparison.command or "not recorded", is_code=True),
        Fact("Folder", str(comparison.path), is_code=True),
        Fact("Seeds", ", ".join(str(seed) for seed in comparison.seeds)),
    ]
    if comparison.has_units:
        facts.append(Fact("Units", ", ".join(unit.label for unit in comparison.units)))
    if comparison.margin is not None:
        measure = comparison.measure(comparison.primary)
        when = "named after the runs" if comparison.margin_after else "written down before the runs"
        facts.append(Fact("Margin", f"{measure.amount(measure.unscaled(comparison.margin))}, {when}"))
    return facts


def _origin(runs: Sequence[Run], started: str = "") -> list[Fact]:
    dates = sorted({date for date in (started, *(run.date for run in runs)) if date})
    facts: tuple[tuple[str, Callable[[Run], str]], ...] = (
        ("Checkpoint selection", lambda run: run.selection),
        ("Split", lambda run: run.split),
        ("Hardware", hardware),
        ("Precision", precision),
        ("Versions", versions),
        ("Code version", lambda run: str(run.environment.get("git") or "not recorded")),
    )
    return [
        Fact("Date", " to ".join(dict.fromkeys([dates[0], dates[-1]])) if dates else "not recorded"),
        *(Fact("Note", note) for note in dict.fromkeys(note for run in runs for note in run.notes)),
        *(Fact(name, "; ".join(dict.fromkeys(read(run) for run in runs)) or "no finished run") for name, read in facts),
    ]
