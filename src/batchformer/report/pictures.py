"""Pictures of a report: plots, and the pictures that tasks leave in their run folders, of several arms side by side."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .runs import BASELINE, Comparison, Run

__all__ = ["Picture", "PictureTable", "picture_table"]

_MOST = 8


@dataclass(frozen=True)
class Picture:
    """A picture in a report.

    Attributes:
        name: Words that stand in for the picture where it cannot be shown.
        path: Path relative to the folder of the report, with ``/`` between folders.
    """

    name: str
    path: str


@dataclass(frozen=True)
class PictureTable:
    """Pictures side by side.

    Attributes:
        columns: Heads of the columns after the first one.
        rows: Name of each row, and its picture in each column; None where there is none.
        more: Number of rows that are not shown.
    """

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Picture | None]]]
    more: int


def picture_table(comparison: Comparison, folder: Path) -> PictureTable | None:
    """Gather ``pictures/<name>.png`` of the arms' runs with one seed and unit: one row for each name.

    The first column is ``pictures/given/<name>.png``, where a run has it: image and truth, the same in every arm.

    Args:
        comparison: Its finished runs.
        folder: Folder of the report, to which the paths are relative.

    Returns:
        The table; None without pictures.
    """
    runs = _runs_with_pictures(comparison)
    names = sorted({path.name for run in runs for path in (run.path / "pictures").glob("*.png")})
    if not names:
        return None
    unit = f", {runs[0].unit}" if runs[0].unit else ""
    sources = [(f"{run.arm}, seed {run.seed}{unit}", run.path / "pictures") for run in runs]
    given = next((run.path / "pictures" / "given" for run in runs if (run.path / "pictures" / "given").is_dir()), None)
    if given is not None:
        sources.insert(0, ("given", given))
    rows = [
        (name.removesuffix(".png"), [_picture(source / name, folder) for _, source in sources])
        for name in names[:_MOST]
    ]
    return PictureTable([title for title, _ in sources], rows, max(0, len(names) - _MOST))


def _runs_with_pictures(comparison: Comparison) -> list[Run]:
    """Runs of the first seed and unit for which plain has pictures; of the last one with pictures if plain has none."""
    runs: list[Run] = []
    for seed in comparison.seeds:
        for unit in comparison.units:
            own = [
                r for r in comparison.runs if (r.seed, r.unit) == (seed, unit.name) and (r.path / "pictures").is_dir()
            ]
            runs = sorted(own, key=lambda run: comparison.arms.index(run.arm)) or runs
            if any(run.arm == BASELINE for run in own):
                return runs
    return runs


def _picture(path: Path, folder: Path) -> Picture | None:
    return Picture(path.name, Path(os.path.relpath(path, folder)).as_posix()) if path.is_file() else None
