"""Reservations that a reader of the tables has to know: missing runs, few seeds, runs that were not made alike."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .paired import FEW_SEEDS
from .runs import BASELINE, TREATMENT, Comparison, LeftOut, Run
from .sentences import DIFFERENT_DATA
from .settings import setting_differences, settings_of

__all__ = ["caveats", "hardware", "left_out_lines", "precision", "run_caveats", "some", "versions"]

# Parts of a machine's description that change from minute to minute.
_MOMENTARY = {"free", "available", "load", "used", "hostname", "time"}


def caveats(comparison: Comparison) -> list[str]:
    """All reservations about a comparison, the gravest first; empty when there are none."""
    return [
        *_mixed_data(comparison),
        *left_out_lines(comparison.left_out, comparison.planned),
        *_few_seeds(comparison),
        *_margin(comparison),
        *_settings(comparison),
        *run_caveats(comparison.runs),
        *_undefined(comparison),
    ]


def _mixed_data(comparison: Comparison) -> list[str]:
    lines = []
    for (unit, split), fingerprints in comparison.mixed_splits.items():
        of_unit = f" of unit {unit}" if unit else ""
        listing = "; ".join(f"{fingerprint} in {some(names)}" for fingerprint, names in fingerprints.items())
        lines.append(f"The split {split}{of_unit} is not the same data in all runs: {listing}.")
    if lines:
        lines.insert(0, f"{DIFFERENT_DATA} Delete the runs that do not belong and go on with --resume.")
    return lines


def left_out_lines(left_out: Sequence[LeftOut], planned: int | None = None) -> list[str]:
    """One line for each run that is not in the tables."""
    lines = []
    absent = sum(entry.arm is not None for entry in left_out)
    if planned is not None and absent:
        lines.append(f"Missing from the tables: {absent} of {planned} planned runs.")
    return [*lines, *(f"{entry.name}: {entry.reason}." for entry in left_out)]


def _few_seeds(comparison: Comparison) -> list[str]:
    if not (comparison.of(TREATMENT) and comparison.of(BASELINE)):
        return []
    pairs = comparison.difference(TREATMENT, BASELINE, comparison.primary).n
    if pairs > FEW_SEEDS:
        return []
    count = f"Only {pairs} paired seed{'' if pairs == 1 else 's'}" if pairs else "No paired seed"
    return [f"{count}: run more (--seeds) before drawing conclusions."]


def _margin(comparison: Comparison) -> list[str]:
    if not comparison.margin_after:
        return []
    return [
        "The margin was named with the report, after the runs. It is honest only when it was not chosen by these "
        "numbers; compare --margin writes it down before."
    ]


def run_caveats(runs: Sequence[Run]) -> list[str]:
    """Differences between runs that stand in one table: hardware, precision, versions, training data."""
    kinds: tuple[tuple[str, Callable[[Run], str], str], ...] = (
        ("hardware", hardware, "times are not comparable, and numbers may differ in the last digits"),
        ("precision", precision, "results and times of different precisions are not comparable without care"),
        ("versions", versions, "differences between runs may come from the libraries"),
    )
    lines = []
    for what, read, consequence in kinds:
        groups: dict[str, list[str]] = {}
        for run in runs:
            groups.setdefault(read(run), []).append(run.name)
        if len(groups) > 1:
            listing = "; ".join(f"{value}: {some(names)}" for value, names in groups.items())
            lines.append(f"Runs were made with different {what} ({listing}): {consequence}.")
    for unit in dict.fromkeys(run.unit for run in runs):
        alike = [run for run in runs if run.unit == unit and run.per_class]
        counts = {tuple(sorted((entry.name, entry.count) for entry in run.per_class)) for run in alike}
        if len(counts) > 1 and len({run.recipe for run in runs}) == 1:
            where = f" of unit {unit}" if unit else ""
            lines.append(
                f"The {alike[0].class_count} of each class differ between runs{where}; the per-class table gives their "
                "mean."
            )
    return lines


def some(names: Sequence[str], limit: int = 4) -> str:
    """A list of names for a sentence; of a long one its beginning.

    Example:
        >>> some(["a", "b", "c"], limit=2)
        'a, b and 1 more'
    """
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _undefined(comparison: Comparison) -> list[str]:
    lines = []
    for metric in comparison.metric_names:
        runs = [run.name for run in comparison.runs if (value := run.metrics.get(metric, 0.0)) != value]
        if runs:
            label = comparison.measure(metric).label
            lines.append(
                f"{label} is undefined in {some(runs)}, where there is no class or image to measure; its means leave "
                f"{'these seeds' if len(runs) > 1 else 'this seed'} out."
            )
    return lines


def _settings(comparison: Comparison) -> list[str]:
    """Differences in the resolved settings that neither the seed nor the arm explains."""
    lines = setting_differences(comparison)
    if lines:
        lines.insert(0, "Runs differ in settings other than seed and arm, which may be what the tables show.")
    unread = [run.name for run in comparison.runs if not settings_of(run.config)]
    if unread:
        lines.append(f"The settings of {some(unread)} were not compared: config.yaml is missing or not valid YAML.")
    return lines


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        kept = {key: entry for key, entry in value.items() if not _MOMENTARY & set(str(key).lower().split("_"))}
        return ", ".join(f"{key} {_flat(entry)}" for key, entry in kept.items() if entry not in (None, "", {}, []))
    if isinstance(value, list | tuple):
        return ", ".join(_flat(entry) for entry in value)
    return str(value)


def hardware(run: Run) -> str:
    """The machine a run was made on, in one line."""
    return _flat(run.environment.get("hardware") or run.host or "not recorded")


def precision(run: Run) -> str:
    """The numeric precision of a run."""
    return _flat(run.environment.get("precision") or run.host.get("precision") or "not recorded")


def versions(run: Run) -> str:
    """Packages and their versions, in one line."""
    return _flat(run.environment.get("versions") or "not recorded")
