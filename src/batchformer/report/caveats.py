"""What a reader of the tables has to know: missing runs, few seeds, runs that were not made alike."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .paired import FEW_SEEDS
from .runs import BASELINE, TREATMENT, Comparison, LeftOut, Run

__all__ = ["caveats", "flatten_config", "hardware", "left_out_lines", "precision", "run_caveats", "versions"]

# Settings that may differ between any two runs of a comparison, and those that make an arm.
_EVERY_RUN = {"seed", "seeds", "arm"}
_EVERY_ARM = {"batchformer", "plugin", "plug"}
# Parts of a machine's description that change from minute to minute.
_MOMENTARY = {"free", "available", "load", "used", "hostname", "time"}


def caveats(comparison: Comparison) -> list[str]:
    """All reservations about a comparison, the gravest first; empty when there are none."""
    return [
        *left_out_lines(comparison.left_out, len(comparison.arms) * len(comparison.seeds)),
        *_few_seeds(comparison),
        *_settings(comparison),
        *run_caveats(comparison.runs),
        *_undefined(comparison),
    ]


def left_out_lines(left_out: Sequence[LeftOut], planned: int | None = None) -> list[str]:
    """One line per run that is not in the tables."""
    lines = []
    absent = sum(entry.arm is not None for entry in left_out)
    if planned is not None and absent:
        lines.append(f"{absent} of {planned} planned runs are not in the tables:")
    for entry in left_out:
        name = entry.path if entry.arm is None else f"{entry.arm}/seed{entry.seed}"
        lines.append(f"{name}: {entry.reason}.")
    return lines


def _few_seeds(comparison: Comparison) -> list[str]:
    if not (comparison.of(TREATMENT) and comparison.of(BASELINE)):
        return []
    pairs = comparison.difference(TREATMENT, BASELINE, comparison.primary).n
    if pairs > FEW_SEEDS:
        return []
    return [f"{pairs} paired seed{'' if pairs == 1 else 's'} only: run more with --seeds before drawing conclusions."]


def run_caveats(runs: Sequence[Run]) -> list[str]:
    """What differs between runs that stand in one table: hardware, precision, versions, training data."""
    kinds: tuple[tuple[str, Callable[[Run], str], str], ...] = (
        ("hardware", hardware, "times are not comparable, and numbers may differ in the last digits"),
        ("precision", precision, "results and times of different precisions are not comparable without care"),
        ("versions", lambda run: versions(run)[1], "differences between runs may come from the libraries"),
    )
    lines = []
    for what, read, consequence in kinds:
        groups: dict[str, list[str]] = {}
        for run in runs:
            groups.setdefault(read(run), []).append(f"{run.arm}/seed{run.seed}")
        if len(groups) > 1:
            listing = "; ".join(f"{value}: {_some(names)}" for value, names in groups.items())
            lines.append(f"Runs were made with different {what} ({listing}): {consequence}.")
    counts = {tuple((entry.name, entry.count) for entry in sorted_classes(run)): run for run in runs if run.per_class}
    if len(counts) > 1 and len({run.recipe for run in runs}) == 1:
        what = next(iter(counts.values())).class_count
        lines.append(f"The {what} per class differ between runs: the per-class table gives their mean.")
    return lines


def sorted_classes(run: Run) -> list[Any]:
    """The classes of a run by name."""
    return sorted(run.per_class, key=lambda entry: entry.name)


def _some(names: Sequence[str], limit: int = 4) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _undefined(comparison: Comparison) -> list[str]:
    lines = []
    for metric in comparison.metric_names:
        runs = [
            f"{run.arm}/seed{run.seed}"
            for run in comparison.runs
            if run.metrics.get(metric, 0.0) != run.metrics.get(metric, 0.0)
        ]
        if runs:
            lines.append(
                f"{metric} is undefined (no class or image to measure) in {_some(runs)}; left out of its means."
            )
    return lines


def _settings(comparison: Comparison) -> list[str]:
    """Differences in the resolved configs that neither the seed nor the arm explains."""
    lines = []
    first = {arm: comparison.of(arm)[0] for arm in comparison.arms if comparison.of(arm)}
    for arm, run in first.items():
        for other in comparison.of(arm)[1:]:
            lines += _setting_lines(run, other, _EVERY_RUN)
        if BASELINE in first and arm != BASELINE:
            lines += _setting_lines(first[BASELINE], run, _EVERY_RUN | _EVERY_ARM)
    if lines:
        lines.append(
            "Expected the same settings but for seed and arm: the differences above may be what the tables show."
        )
    return lines


def _setting_lines(run: Run, other: Run, free: set[str]) -> list[str]:
    ours, theirs = _own_settings(run), _own_settings(other)
    if not ours or not theirs:
        return []
    lines = []
    for key in sorted(set(ours) | set(theirs)):
        if ours.get(key) != theirs.get(key) and not free & set(re.split(r"[._\[\]]+", key.lower())):
            one, two = ours.get(key, "absent"), theirs.get(key, "absent")
            lines.append(
                f"Setting {key} differs: {one} in {run.arm}/seed{run.seed}, {two} in {other.arm}/seed{other.seed}."
            )
    return lines


def _own_settings(run: Run) -> dict[str, str]:
    """Settings in which the run's own folder, arm and seed are replaced by placeholders."""
    settings = flatten_config(run.config)
    pairs = ((str(run.path), "<run>"), (f"{run.arm}/seed{run.seed}", "<run>"), (f"{run.arm}-seed{run.seed}", "<run>"))
    for key, value in settings.items():
        for text, placeholder in pairs:
            value = value.replace(text, placeholder)
        settings[key] = value
    return settings


def flatten_config(text: str) -> dict[str, str]:
    r"""Dotted key -> text of the value, for block-style YAML as config writers dump it.

    Enough to compare two dumps of one writer without a YAML library; not a YAML reader.

    Example:
        >>> flatten_config("model:\n  lr: 0.1\n  layers:\n  - 1\n  - 2\nseed: 3\n")
        {'model.lr': '0.1', 'model.layers.0': '1', 'model.layers.1': '2', 'seed': '3'}
    """
    settings: dict[str, str] = {}
    stack: list[tuple[int, str]] = []
    items: dict[str, int] = {}
    for line in text.splitlines():
        body = line.strip()
        indent = len(line) - len(line.lstrip())
        if not body or body.startswith("#"):
            continue
        while body.startswith("- ") or body == "-":  # an item may stand at its parent's indent: count it half deeper
            stack = [entry for entry in stack if entry[0] < 2 * indent + 1]
            parent = ".".join(name for _, name in stack)
            items[parent] = items.get(parent, -1) + 1
            stack.append((2 * indent + 1, str(items[parent])))
            body, indent = body[1:].strip(), indent + 2
        key, colon, value = body.partition(":")
        if colon and (not value or value.startswith(" ")):
            stack = [entry for entry in stack if entry[0] < 2 * indent]
            stack.append((2 * indent, key.strip("'\"")))
            body = value.strip()
        name = ".".join(part for _, part in stack)
        if body:
            settings[name] = f"{settings[name]} {body}" if name in settings else body
    return settings


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


def versions(run: Run) -> tuple[dict[str, str], str]:
    """Package -> version, and the same in one line."""
    found = run.environment.get("versions") or {}
    table = {str(name): str(version) for name, version in found.items()} if isinstance(found, Mapping) else {}
    return table, _flat(found) or "not recorded"
