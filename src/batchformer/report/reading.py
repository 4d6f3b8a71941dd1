"""Find and read run folders and comparison folders; their formats are in :mod:`batchformer.report.runs`."""

import csv
import glob
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .runs import ClassResult, Comparison, Found, LeftOut, ReportError, Run

__all__ = ["find_runs", "read_comparison", "read_curves", "read_run"]

_RUN_FILES = ("result.json", "config.yaml", "environment.json", "done")


def find_runs(paths: Sequence[str | os.PathLike[str]]) -> Found:
    """Read every run and comparison at or below the given paths.

    Args:
        paths: Run folders, comparison folders, folders that hold such folders, or patterns (``"runs/cifar*"``) that the
            shell has not expanded.

    Returns:
        What was :class:`Found`; a folder reached by two paths appears once.

    Raises:
        ReportError: A path does not exist, no run was found at all, or a comparison mixes recipes, splits or
            selection rules.

    Example:
        >>> find_runs(["no/such/folder"])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        batchformer.report.runs.ReportError: Expected run folders, but no/such/folder does not exist. ...
    """
    comparison_folders: dict[Path, Path] = {}
    run_folders: dict[Path, Path] = {}
    for root in _expand(paths):
        for folder in _walk(root):
            kind = comparison_folders if (folder / "compare.json").is_file() else run_folders
            kind.setdefault(folder.resolve(), folder)
    comparisons = tuple(read_comparison(folder) for folder in comparison_folders.values())
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for resolved, folder in run_folders.items():
        if not any(parent in comparison_folders for parent in resolved.parents):
            entry = read_run(folder)
            (runs if isinstance(entry, Run) else left_out).append(entry)  # type: ignore[arg-type]
    if not comparisons and not runs:
        raise _nothing_found(paths, left_out)
    return Found(comparisons, tuple(runs), tuple(left_out))


def _expand(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    if not paths:
        raise ReportError("Expected at least one run or comparison folder, got none. Name one: batchformer report RUNS")
    for given in paths:
        path = Path(given)
        matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(os.fspath(path)))]
        if not matches:
            raise ReportError(
                f"Expected run folders, but {path} does not exist. "
                "Name a folder that `batchformer fit` or `batchformer compare` has written."
            )
        yield from matches


def _walk(root: Path) -> Iterator[Path]:
    """Comparison and run folders at or below ``root``, sorted, not looking inside what was found."""
    for current, children, files in os.walk(root):
        children.sort()
        if "compare.json" in files or any(name in files for name in _RUN_FILES):
            children.clear()
            yield Path(current)


def _nothing_found(paths: Sequence[str | os.PathLike[str]], left_out: Sequence[LeftOut]) -> ReportError:
    given = ", ".join(os.fspath(path) for path in paths)
    if left_out:
        reasons = "\n".join(f"  {entry.path}: {entry.reason}" for entry in left_out)
        return ReportError(f"Expected at least one finished run below {given}, found none that can be used:\n{reasons}")
    return ReportError(
        f"Expected run folders (with config.yaml, result.json and the mark `done`) or comparison folders (with "
        f"compare.json) below {given}, found neither. `batchformer fit` and `batchformer compare` write them."
    )


def read_run(folder: Path) -> Run | LeftOut:
    """Read one run folder.

    Returns:
        The :class:`Run`, or :class:`LeftOut` with the reason: unfinished (no mark ``done``) or unreadable.

    Example:
        >>> read_run(Path("no/such/run")).reason
        'unfinished: no mark `done`, stopped before the first epoch ended; continue it with --resume'
    """
    if not (folder / "done").is_file():
        return LeftOut(folder, f"unfinished: no mark `done`, {_progress(folder)}; continue it with --resume")
    try:
        result = _read_json(folder / "result.json")
        environment = _read_json(folder / "environment.json") if (folder / "environment.json").is_file() else {}
        config = folder / "config.yaml"
        return Run(
            path=folder,
            recipe=str(result["recipe"]),
            arm=str(result["arm"]),
            seed=int(result["seed"]),
            metrics=_numbers(result["metrics"]),
            per_class=tuple(_class_result(entry) for entry in result.get("per_class") or ()),
            cost=_numbers(result.get("cost") or {}),
            class_metric=str(result.get("class_metric", "accuracy")),
            class_count=str(result.get("class_count", "training images")),
            notes=tuple(str(note) for note in result.get("notes") or ()),
            selection=str(result.get("selection", "not recorded")),
            split=str(result.get("split", "not recorded")),
            date=str(result.get("date", "")),
            host=result["host"] if isinstance(result.get("host"), dict) else {},
            environment=environment,
            config=config.read_text(encoding="utf-8") if config.is_file() else "",
        )
    except KeyError as error:
        reason = f"unreadable: result.json has no {error}"
    except (OSError, TypeError, ValueError, AttributeError) as error:
        reason = f"unreadable: {error}"
    return LeftOut(folder, f"{reason}; run it again, or delete the folder")


def _progress(folder: Path) -> str:
    try:
        epochs = read_curves(folder).values()
        return f"stopped after epoch {max(max(curve) for curve in epochs)}"
    except (OSError, ReportError, ValueError):
        return "stopped before the first epoch ended"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.name} is missing") from None
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, expected an object")
    return content


def _number(value: object, name: str) -> float:
    if value is None:  # strict JSON has no NaN
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"result.json has {value!r} as {name} where a number was expected")
    return float(value)


def _numbers(mapping: Mapping[str, object]) -> dict[str, float]:
    return {str(name): _number(value, str(name)) for name, value in mapping.items()}


def _class_result(entry: Mapping[str, Any]) -> ClassResult:
    return ClassResult(str(entry["name"]), int(entry["count"]), _number(entry["value"], "value"))


def read_curves(folder: Path) -> dict[str, dict[int, float]]:
    """Read ``metrics.csv``: column -> epoch -> value.

    Rows may be sparse (one logger call per row) and epochs may repeat after a resume: an epoch's last value counts.

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


def read_comparison(folder: Path) -> Comparison:
    """Read a comparison folder with all its runs.

    Runs that are planned and absent, unfinished or unreadable, and runs that lie in the folder but are not planned, are
    in ``left_out``.

    Raises:
        ReportError: ``compare.json`` is broken, the runs differ in recipe, split or selection rule, or no run has the
            primary metric.
    """
    try:
        plan = _read_json(folder / "compare.json")
        arms, seeds = tuple(str(arm) for arm in plan["arms"]), tuple(int(seed) for seed in plan["seeds"])
        recipe, primary = str(plan["recipe"]), str(plan["primary"])
    except (KeyError, TypeError, ValueError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ReportError(
            f"Expected {folder / 'compare.json'} to hold recipe, arms, seeds and primary, but {why}. "
            "Run the comparison again with --resume, or report its run folders one by one."
        ) from None
    planned = {folder / arm / f"seed{seed}": (arm, seed) for arm in arms for seed in seeds}
    entries = [_read_planned(path, arm, seed) for path, (arm, seed) in planned.items()]
    runs = tuple(entry for entry in entries if isinstance(entry, Run))
    extra = [path for path in sorted(folder.glob("*/*")) if path not in planned and _is_run(path)]
    strangers = [LeftOut(path, "not part of compare.json; report it by its own path") for path in extra]
    left_out = (*(entry for entry in entries if isinstance(entry, LeftOut)), *strangers)
    comparison = Comparison(
        folder, recipe, arms, seeds, primary, runs, left_out, str(plan.get("command", "")), str(plan.get("date", ""))
    )
    _refuse_mixtures(comparison)
    return comparison


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _RUN_FILES)


def _read_planned(path: Path, arm: str, seed: int) -> Run | LeftOut:
    if not path.is_dir():
        return LeftOut(path, "missing: never started; start it with --resume", arm, seed)
    entry = read_run(path)
    if isinstance(entry, LeftOut):
        return LeftOut(path, entry.reason, arm, seed)
    if (entry.arm, entry.seed) != (arm, seed):
        reason = f"expected arm {arm}, seed {seed} here, but result.json says arm {entry.arm}, seed {entry.seed}"
        return LeftOut(path, f"{reason}; run it again", arm, seed)
    return entry


def _refuse_mixtures(comparison: Comparison) -> None:
    """Numbers of different recipes, splits or selection rules do not belong in one table."""
    for what, expected in (("recipe", comparison.recipe), ("split", None), ("selection", None)):
        found: dict[str, list[str]] = {expected: []} if expected is not None else {}
        for run in comparison.runs:
            found.setdefault(getattr(run, what), []).append(f"{run.arm}/seed{run.seed}")
        if len(found) > 1:
            listing = "; ".join(f"{value!r} in {', '.join(runs) or 'compare.json'}" for value, runs in found.items())
            raise ReportError(
                f"Expected one {what} in all runs of {comparison.path}, found {listing}. "
                "Delete the runs that do not belong and continue with --resume, or report the run folders one by one."
            )
    names = {name for run in comparison.runs for name in run.metrics}
    if comparison.runs and comparison.primary not in names:
        raise ReportError(
            f"Expected the primary metric {comparison.primary!r} in the results of {comparison.path}, "
            f"found {', '.join(sorted(names)) or 'no metrics'}. Name one of these as `primary` in compare.json."
        )
