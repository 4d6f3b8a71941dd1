"""Read one run folder or one comparison folder; their formats are in :mod:`batchformer.report.runs`."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .curves import read_curves
from .measures import Measure, is_described
from .older_results import OLDER_MEASURES
from .runs import ClassResult, Comparison, LeftOut, ReportError, Run, StageCost, Unit, run_folder

__all__ = ["RUN_FILES", "check_margin", "read_comparison", "read_run", "with_margin"]

RUN_FILES = ("result.json", "config.yaml", "environment.json", "done")


def read_run(folder: Path) -> Run | LeftOut:
    """Read one run folder.

    Returns:
        The :class:`Run`, or :class:`LeftOut` with the reason: unfinished (no mark ``done``) or unreadable.

    Example:
        >>> read_run(Path("no/such/run")).reason
        'unfinished (it has no file named done): it stopped before the first epoch ended; continue it with --resume'
    """
    if not (folder / "done").is_file():
        reason = _failure(folder) or f"unfinished (it has no file named done): it {_progress(folder)}"
        return LeftOut(folder, f"{reason}; continue it with --resume")
    try:
        result = _read_json(folder / "result.json")
        environment = _read_json(folder / "environment.json") if (folder / "environment.json").is_file() else {}
        config = folder / "config.yaml"
        measures = tuple(Measure.read(entry) for entry in result.get("measures") or ())
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
            measures=measures or OLDER_MEASURES,
            unit=str((result.get("unit") or {}).get("name") or ""),
            stages=tuple(_stage(entry) for entry in result.get("stages") or ()),
            data=_fingerprints(result.get("data")),
        )
    except KeyError as error:
        reason = f"unreadable: result.json has no {error}"
    except (OSError, TypeError, ValueError, AttributeError) as error:
        reason = f"unreadable: {error}"
    return LeftOut(folder, f"{reason}; run it again, or delete the folder")


def _failure(folder: Path) -> str | None:
    """The reason that a comparison wrote down for a run that did not finish, in one line."""
    try:
        record = _read_json(folder / "failed.json")
        return f"{record['reason']} ({' '.join(str(record['message']).split()).rstrip('.')}): it {_progress(folder)}"
    except (OSError, KeyError, ValueError):
        return None


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


def _fingerprints(entry: object) -> dict[str, str]:
    if not isinstance(entry, Mapping | None):
        raise ValueError(f"data holds a {type(entry).__name__}, expected an object")
    return {str(split): str(fingerprint) for split, fingerprint in (entry or {}).items()}


def _stage(entry: Mapping[str, Any]) -> StageCost:
    times = (_number(entry.get(name), name) for name in ("step_ms", "train_seconds"))
    return StageCost(str(entry["name"]), int(entry["epochs"]), *times)


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
        data = {str(unit): _fingerprints(entry) for unit, entry in (plan.get("data") or {}).items()}
        units = tuple({unit.name: unit for unit in map(_unit, plan.get("units") or ())}.values()) or (Unit(),)
        margin = None if plan.get("margin") is None else check_margin(plan["margin"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise ReportError(
            f"Expected {folder / 'compare.json'} to hold recipe, arms, seeds and primary, but {why}. "
            "Run the comparison again with --resume, or report its run folders one by one."
        ) from None
    planned = {
        folder / run_folder(arm, seed, unit.name): (arm, seed, unit.name)
        for arm in arms
        for seed in seeds
        for unit in units
    }
    entries = [_read_planned(path, *who) for path, who in planned.items()]
    runs = tuple(entry for entry in entries if isinstance(entry, Run))
    extra = [path for path in sorted(folder.glob("*/*")) if path not in planned and _is_run(path)]
    strangers = [LeftOut(path, "not part of compare.json; report it by its own path") for path in extra]
    comparison = Comparison(
        folder,
        recipe,
        arms,
        seeds,
        primary,
        runs,
        left_out=(*(entry for entry in entries if isinstance(entry, LeftOut)), *strangers),
        command=str(plan.get("command") or ""),
        date=str(plan.get("date", "")),
        units=units,
        margin=margin,
        data=data,
        jobs=int(plan.get("jobs") or 1),
    )
    _refuse_mixtures(comparison)
    _refuse_unknown_primary(comparison)
    return comparison


def check_margin(value: float | str) -> float:
    """Margin as a number above 0.

    Raises:
        ReportError: It is none.

    Example:
        >>> check_margin("0.5")
        0.5
    """
    try:
        margin = float(value)
    except (TypeError, ValueError):
        margin = math.nan
    if not 0.0 < margin < math.inf:
        raise ReportError(
            f"Expected a margin above 0, got {value!r}. Name the smallest difference that matters to you, in points or "
            "in the unit of the metric, such as --margin 0.5."
        )
    return margin


def with_margin(comparison: Comparison, margin: float | None) -> Comparison:
    """The comparison judged by a margin that was named after its runs; by that of its plan where it is the same.

    Args:
        comparison: A comparison.
        margin: Margin in points or in the unit of the primary metric; None for that of the plan.
    """
    if margin is None or margin == comparison.margin:
        return comparison
    return replace(comparison, margin=check_margin(margin), margin_after=True)


def _unit(entry: Mapping[str, Any]) -> Unit:
    name = str(entry["name"])
    if Path(name).name != name:
        raise ValueError(f"its unit {name!r} is no name of a folder")
    return Unit(name, str(entry.get("label") or name))


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in RUN_FILES)


def _read_planned(path: Path, arm: str, seed: int, unit: str) -> Run | LeftOut:
    if not path.is_dir():
        return LeftOut(path, "missing: it was never started; start it with --resume", arm, seed, unit)
    entry = read_run(path)
    if isinstance(entry, LeftOut):
        return LeftOut(path, entry.reason, arm, seed, unit)
    if (entry.arm, entry.seed, entry.unit) != (arm, seed, unit):
        expected, found = (
            f"arm {arm}, seed {seed}" + (f", unit {unit}" if unit else "")
            for arm, seed, unit in ((arm, seed, unit), (entry.arm, entry.seed, entry.unit))
        )
        reason = f"expected {expected} here, but result.json says {found}; run it again"
        return LeftOut(path, reason, arm, seed, unit)
    return entry


def _refuse_mixtures(comparison: Comparison) -> None:
    """Refuse numbers of different recipes, splits, selection rules or units of a metric in one table."""
    kinds = {name: name for name in ("recipe", "split", "selection")}
    readings = [{name: str(getattr(run, name)) for name in kinds} for run in comparison.runs]
    for run, reading in zip(comparison.runs, readings, strict=True):
        for measure in run.measures:
            if measure.name in run.metrics:
                kinds[measure.name] = f"unit and direction of {measure.name}"
                reading[measure.name] = ", ".join(filter(None, (measure.unit or "no unit", measure.direction)))
    for kind, words in kinds.items():
        found: dict[str, list[str]] = {comparison.recipe: []} if kind == "recipe" else {}
        for run, reading in zip(comparison.runs, readings, strict=True):
            if kind in reading:
                found.setdefault(reading[kind], []).append(run.name)
        if len(found) > 1:
            listing = "; ".join(f"{value!r} in {', '.join(runs) or 'compare.json'}" for value, runs in found.items())
            raise ReportError(
                f"Expected one {words} in all runs of {comparison.path}, found {listing}. "
                "Delete the runs that do not belong and continue with --resume, or report the run folders one by one."
            )


def _refuse_unknown_primary(comparison: Comparison) -> None:
    names = {name for run in comparison.runs for name in run.metrics}
    if comparison.runs and comparison.primary not in names:
        raise ReportError(
            f"Expected the primary metric {comparison.primary!r} in the results of {comparison.path}, "
            f"found {', '.join(sorted(names)) or 'no metrics'}. Name one of these as `primary` in compare.json."
        )
    if not is_described(comparison.primary, comparison.measures):
        raise ReportError(
            f"Expected `measures` in the results of {comparison.path} to say whether higher is better of the primary "
            f"metric {comparison.primary!r}, found measures of {', '.join(m.name for m in comparison.measures)}. "
            "Without it there is no verdict: add the metric to the measures of the task and run again."
        )
