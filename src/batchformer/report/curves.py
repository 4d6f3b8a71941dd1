"""Training curves: the file ``metrics.csv`` of a run, and one column of it for each seed of each arm."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path

from .paired import average_units
from .runs import Comparison, ReportError

__all__ = ["Curves", "read_curves", "seed_curves"]

Curves = Mapping[str, Mapping[int, Mapping[int, float]]]
"""Arm -> seed -> epochs done -> value."""


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """Read ``metrics.csv``: column -> epoch -> value.

    Rows may be sparse (one logger call in each row) and epochs may repeat after a resume: the last value of an epoch
    counts.

    Raises:
        ReportError: The file is missing or has no column ``epoch``.

    Example:
        >>> read_curves(Path("no/such/run"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        batchformer.report.runs.ReportError: Expected training curves in no/such/run/metrics.csv, found no such ...
    """
    path = folder / "metrics.csv"
    if not path.is_file():
        raise ReportError(f"Expected training curves in {path}, found no such file. Other plots need no curves.")
    curves: dict[str, dict[int, float]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if "epoch" not in (reader.fieldnames or ()):
            raise ReportError(f"Expected a column `epoch` in {path}, found {reader.fieldnames}.")
        for row in reader:
            if not row["epoch"]:
                continue
            for name, cell in row.items():
                if name not in (None, "epoch", "step") and cell:
                    curves.setdefault(name, {})[int(float(row["epoch"]))] = float(cell)
    return curves


def seed_curves(comparison: Comparison, column: str) -> dict[str, dict[int, dict[int, float]]]:
    """One column of the curves for each seed: the mean over its units, where all of them are finished.

    Args:
        comparison: Its runs may or may not have the file ``metrics.csv``.
        column: Name of a column, such as ``train_loss``.

    Returns:
        Arm -> seed -> epochs done, counted from 1 -> value. Values that are not finite, and arms and seeds without the
        column, are left out.

    Raises:
        ReportError: A file of curves is broken.
    """
    units = [unit.name for unit in comparison.units]
    found: dict[str, dict[int, dict[int, float]]] = {}
    for arm in comparison.arms:
        by_epoch: dict[int, dict[int, dict[str, float]]] = {}
        for run in comparison.of(arm):
            for epoch, value in _column(run.path, column).items():
                by_epoch.setdefault(epoch + 1, {}).setdefault(run.seed, {})[run.unit] = value
        for epoch in sorted(by_epoch):
            for seed, value in average_units(by_epoch[epoch], units).items():
                if math.isfinite(value):
                    found.setdefault(arm, {}).setdefault(seed, {})[epoch] = value
    return found


def _column(folder: Path, column: str) -> dict[int, float]:
    return read_curves(folder).get(column, {}) if (folder / "metrics.csv").is_file() else {}
