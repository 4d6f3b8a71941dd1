"""Runs and comparisons as values; :mod:`batchformer.report.reading` reads them from folders.

A run folder holds ``config.yaml``, ``environment.json``, ``metrics.csv``, ``result.json`` and, written last, the mark
``done``. A comparison folder holds ``compare.json`` and the run folders ``<arm>/seed<k>``. Whatever is found and cannot
be used is kept with its reason (:class:`LeftOut`), so that a table can say what it lacks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .paired import PairedDifference, paired_difference

__all__ = [
    "BASELINE",
    "TREATMENT",
    "ClassResult",
    "Comparison",
    "Found",
    "LeftOut",
    "ReportError",
    "Run",
    "higher_is_better",
]

BASELINE = "plain"
TREATMENT = "batchformer"

_METRIC_ORDER = (
    *("top1", "top5", "many", "medium", "few", "macro_f1", "ece"),
    *("AP", "AP50", "AP75", "APS", "APM", "APL"),
    *("PQ", "SQ", "RQ", "PQ_things", "SQ_things", "RQ_things", "PQ_stuff", "SQ_stuff", "RQ_stuff", "mask_AP"),
)
_LOWER_IS_BETTER = ("ece", "loss", "error")


class ReportError(ValueError):
    """No report can be made from these folders; the message says what was expected, what was found, and the way out."""


@dataclass(frozen=True)
class ClassResult:
    """One class of a run.

    Attributes:
        name: Of the class.
        count: How much the training data has of it, in ``Run.class_count``.
        value: ``Run.class_metric``, 0..1; NaN where there is nothing to measure.
    """

    name: str
    count: int
    value: float


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        path: The run folder.
        recipe, arm, seed: Who it is.
        metrics: Name -> fraction 0..1; NaN where undefined (an empty group of classes).
        per_class: One entry per class, in the order of the file.
        cost: Name -> number (``step_ms``, ``peak_memory_mb``, ``parameters_train``, ...).
        class_metric, class_count: What the values and counts of ``per_class`` are.
        notes: What the task says of the run.
        selection, split, date: Which checkpoint was tested, on what, when.
        host: Machine as the result tells it.
        environment: Content of ``environment.json``; empty when the file is absent.
        config: Text of ``config.yaml``; empty when the file is absent.
    """

    path: Path
    recipe: str
    arm: str
    seed: int
    metrics: Mapping[str, float]
    per_class: tuple[ClassResult, ...] = ()
    cost: Mapping[str, float] = field(default_factory=dict)
    class_metric: str = "accuracy"
    class_count: str = "training images"
    notes: tuple[str, ...] = ()
    selection: str = "not recorded"
    split: str = "not recorded"
    date: str = ""
    host: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""


@dataclass(frozen=True)
class LeftOut:
    """A run that is not in the tables, and why. ``arm`` and ``seed`` are known inside a comparison only."""

    path: Path
    reason: str
    arm: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Several arms on the same seeds.

    Attributes:
        path: The comparison folder.
        recipe, command, date: As ``compare.json`` tells.
        arms, seeds: What was planned; the finished part is in ``runs``, the rest in ``left_out``.
        primary: The metric on which the verdict is given, chosen before the runs.
    """

    path: Path
    recipe: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    primary: str
    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...] = ()
    command: str = ""
    date: str = ""

    def of(self, arm: str) -> tuple[Run, ...]:
        """The finished runs of an arm, by seed."""
        return tuple(sorted((run for run in self.runs if run.arm == arm), key=lambda run: run.seed))

    def values(self, arm: str, metric: str) -> dict[int, float]:
        """Seed -> value of a metric for the finished runs of an arm (fractions; NaN where undefined)."""
        return {run.seed: run.metrics[metric] for run in self.of(arm) if metric in run.metrics}

    def difference(self, arm: str, reference: str, metric: str) -> PairedDifference:
        """Paired difference ``arm - reference`` of a metric."""
        return paired_difference(
            self.values(arm, metric), self.values(reference, metric), higher_is_better=higher_is_better(metric)
        )

    @property
    def metric_names(self) -> tuple[str, ...]:
        """All metrics of the runs, the primary one first, then in the usual order."""
        names = {name for run in self.runs for name in run.metrics}
        # Then the same metrics on a further test set, as `unseen_AP`.
        order = [*_METRIC_ORDER, *(f"unseen_{name}" for name in _METRIC_ORDER)]
        known = [name for name in order if name in names]
        return tuple(dict.fromkeys([self.primary, *known, *sorted(names - set(known))]))

    @property
    def class_metric(self) -> str:
        """What is measured for each class."""
        return next((run.class_metric for run in self.runs if run.per_class), "value")

    @property
    def class_count(self) -> str:
        """What the training data of each class is counted in."""
        return next((run.class_count for run in self.runs if run.per_class), "count")

    @property
    def controls(self) -> tuple[str, ...]:
        """Arms that are neither the baseline nor BatchFormer itself."""
        return tuple(arm for arm in self.arms if arm not in (BASELINE, TREATMENT))


@dataclass(frozen=True)
class Found:
    """Everything below the given paths: comparisons, runs outside comparisons, and what could not be used."""

    comparisons: tuple[Comparison, ...]
    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...]


def higher_is_better(metric: str) -> bool:
    """Whether more of a metric is better; False for calibration error, losses and errors.

    Example:
        >>> higher_is_better("top1"), higher_is_better("ece"), higher_is_better("val_loss")
        (True, False, False)
    """
    return not any(word in metric.lower().split("_") for word in _LOWER_IS_BETTER)
