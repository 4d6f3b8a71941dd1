"""The settings of runs, read from ``config.yaml``, and the differences that neither the seed nor the arm explains."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from .runs import BASELINE, TREATMENT, Comparison, Run

__all__ = ["flatten", "setting_differences", "settings_of", "single_stream"]

_FREE = ("seed", "data.seed", "model.seed")
# Where fingerprints show that the data is the same, its place and the number of processes that read it are free.
_FREE_WITH_FINGERPRINTS = ("data.root", "data.train_list", "data.val_list", "data.test_list", "data.num_workers")
_FREE_BETWEEN_ARMS = "model.batchformer."


def flatten(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested mappings and lists, in their order.

    Example:
        >>> dict(flatten({"model": {"lr": 0.1, "layers": [1, 2], "more": {}}, "seed": 3}))
        {'model.lr': 0.1, 'model.layers.0': 1, 'model.layers.1': 2, 'model.more': {}, 'seed': 3}
    """
    entries = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else ()
    if not tree or not isinstance(tree, Mapping | list):
        yield name, tree
    for key, value in entries:
        yield from flatten(value, f"{name}.{key}" if name else str(key))


@lru_cache(maxsize=256)
def settings_of(config: str) -> Mapping[str, Any]:
    r"""Dotted key -> value of the text of a ``config.yaml``; empty where there is no text or it is not valid.

    Raises:
        ImportError: PyYAML is not installed.

    Example:
        >>> dict(settings_of("model:\n  lr: 0.1\nseed: 3\n"))
        {'model.lr': 0.1, 'seed': 3}
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError("Reading the settings of a run needs PyYAML: pip install 'batchformer[train]'") from error
    try:
        tree = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}
    return dict(flatten(tree)) if isinstance(tree, Mapping) else {}


def single_stream(comparison: Comparison) -> bool:
    """True when BatchFormer has the mixed stream alone in this comparison (``mode: single_stream``)."""
    modes = {settings_of(run.config).get("model.batchformer.mode") for run in comparison.of(TREATMENT)}
    return "single_stream" in modes


def setting_differences(comparison: Comparison) -> list[str]:
    """One line for each setting that differs between runs and is neither a seed nor what makes an arm.

    Runs of one arm and unit are compared over the seeds, and the arms are compared with plain on each unit. Settings in
    which the units of a seed differ are free as long as they are the same in all arms, which the second look shows.
    """
    lines = []
    for unit in comparison.units:
        first: dict[str, Run] = {}
        for arm in comparison.arms:
            runs = [run for run in comparison.of(arm) if run.unit == unit.name]
            first |= {arm: runs[0]} if runs else {}
            for other in runs[1:]:
                lines += _lines(runs[0], other)
        for arm, run in first.items():
            if BASELINE in first and arm != BASELINE:
                lines += _lines(first[BASELINE], run, arms=True)
    return lines


def _lines(run: Run, other: Run, *, arms: bool = False) -> list[str]:
    ours, theirs = _own_settings(run), _own_settings(other)
    if not ours or not theirs:
        return []
    lines, free = [], (*_FREE, *(_FREE_WITH_FINGERPRINTS if run.data and other.data else ()))
    for key in sorted(ours.keys() | theirs.keys()):
        # A setting that an earlier version did not have is one that is not set.
        one, two = ours.get(key, "null"), theirs.get(key, "null")
        if one != two and key not in free and not (arms and key.startswith(_FREE_BETWEEN_ARMS)):
            lines.append(f"Setting {key} differs: {one} in {run.name}, {two} in {other.name}.")
    return lines


def _own_settings(run: Run) -> dict[str, str]:
    """Settings as text, in which the run's own folder, arm, seed and unit are replaced by placeholders."""
    settings = {key: "null" if value is None else str(value) for key, value in settings_of(run.config).items()}
    for text in (str(run.path), run.name, run.name.replace("/", "-")):
        settings = {key: value.replace(text, "<run>") for key, value in settings.items()}
    return settings
