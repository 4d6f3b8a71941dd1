"""Runs and comparisons as values; :mod:`batchformer.report.reading` reads them from folders.

A run folder holds ``config.yaml``, ``environment.json``, ``metrics.csv``, ``result.json`` and, written last, the mark
``done``. A comparison folder holds ``compare.json`` and the run folders ``<arm>/seed<k>``, or ``<arm>/seed<k>-<unit>``
where every seed is run on several units (target domains, splits). A run that cannot be used is kept with its reason
(:class:`LeftOut`), so that the report can name it; ``failed.json`` in its folder has the reason of a failure.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .measures import Measure, find_measure, order_metrics
from .older_results import OLDER_MEASURES
from .paired import CONFIDENCE, PairedDifference, average_units, paired_difference
from .sequence import BASELINE, TREATMENT, Step, beside, references, simultaneous, walk

__all__ = [
    "BASELINE",
    "TREATMENT",
    "ClassResult",
    "Comparison",
    "Found",
    "LeftOut",
    "ReportError",
    "Run",
    "StageCost",
    "Unit",
    "run_folder",
]


class ReportError(ValueError):
    """No report can be made from these folders; the message says what was expected, what was found, and the way out."""


@dataclass(frozen=True)
class Unit:
    """One of the things that every seed of a comparison is run on, such as a target domain or a split.

    Attributes:
        name: Name in folders and files; empty where the seed is all there is.
        label: Name in tables.
    """

    name: str = ""
    label: str = ""


@dataclass(frozen=True)
class ClassResult:
    """One class of a run.

    Attributes:
        name: Name of the class.
        count: Amount of training data of the class, counted in ``Run.class_count``.
        value: Value of ``Run.class_metric``; NaN where there is nothing to measure.
    """

    name: str
    count: int
    value: float


@dataclass(frozen=True)
class StageCost:
    """Cost of one stage of a run.

    Attributes:
        name: Name of the stage.
        epochs: Number of epochs.
        step_ms: Median time of a training step, in milliseconds; NaN where it was not measured.
        train_seconds: Time of the training, in seconds; NaN where it was not measured.
    """

    name: str
    epochs: int
    step_ms: float
    train_seconds: float


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        path: The run folder.
        recipe: Name of the recipe.
        arm: Name of the arm.
        seed: Seed of the run.
        metrics: Name -> value, in the unit of its measure; NaN where undefined (an empty group of classes).
        per_class: One entry for each class, in the order of the file.
        cost: Name -> number (``step_ms``, ``peak_memory_mb``, ``parameters_train``, ...).
        class_metric: Name of the measure of ``per_class``.
        class_count: Words for the counts of ``per_class``, such as "training images".
        notes: Remarks of the task about the run.
        selection: Rule by which the tested checkpoint was chosen.
        split: Split of the data that was tested.
        date: Time at which the result was written.
        host: Description of the machine in the result.
        environment: Content of ``environment.json``; empty when the file is absent.
        config: Text of ``config.yaml``; empty when the file is absent.
        measures: Labels, units and directions of the metrics, in the order of the tables.
        unit: Name of the unit of the run; empty where the seed is all there is.
        stages: Cost of each stage; empty in results of earlier versions.
        data: Split -> fingerprint of its content; empty in results of earlier versions.
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
    measures: tuple[Measure, ...] = OLDER_MEASURES
    unit: str = ""
    stages: tuple[StageCost, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Arm, seed and unit in one word, as the folders of a comparison are named."""
        return run_folder(self.arm, self.seed, self.unit)


@dataclass(frozen=True)
class LeftOut:
    """A run that is not in the tables.

    Attributes:
        path: The run folder.
        reason: The reason for which it is left out.
        arm: Name of the arm; None outside a comparison.
        seed: Planned seed; None outside a comparison.
        unit: Planned unit; empty where there is none.
    """

    path: Path
    reason: str
    arm: str | None = None
    seed: int | None = None
    unit: str = ""

    @property
    def name(self) -> str:
        """Arm, seed and unit inside a comparison; otherwise the path."""
        return str(self.path) if self.arm is None or self.seed is None else run_folder(self.arm, self.seed, self.unit)


def run_folder(arm: str, seed: int, unit: str = "") -> str:
    """Folder of a run inside its comparison.

    Example:
        >>> run_folder("plain", 0), run_folder("plain", 0, "photo")
        ('plain/seed0', 'plain/seed0-photo')
    """
    return f"{arm}/seed{seed}-{unit}" if unit else f"{arm}/seed{seed}"


@dataclass(frozen=True)
class Comparison:
    """Several arms on the same seeds and units.

    Attributes:
        path: The comparison folder.
        recipe: Name of the recipe.
        arms: Planned arms.
        seeds: Planned seeds.
        primary: Metric of the verdict, chosen before the runs.
        runs: Finished runs.
        left_out: Planned runs that are not finished, and runs that do not belong.
        command: Command that started the comparison.
        date: Time at which it was started.
        units: Planned units; one without a name where the seed is all there is.
        margin: Smallest difference of the primary metric that matters, as it is shown: in points for a measure in
            percent, otherwise in the unit of the measure. None where nobody named one.
        margin_after: True when the margin was not written into ``compare.json`` before the runs.
        data: Name of the unit -> split -> fingerprint that the comparison was started with; empty in earlier versions.
        jobs: Largest number of runs that were made side by side.
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
    units: tuple[Unit, ...] = (Unit(),)
    margin: float | None = None
    margin_after: bool = False
    data: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    jobs: int = 1

    @property
    def planned(self) -> int:
        """Number of planned runs."""
        return len(self.arms) * len(self.seeds) * len(self.units)

    @property
    def has_units(self) -> bool:
        """True when runs differ in more than arm and seed."""
        return self.units != (Unit(),)

    def of(self, arm: str) -> tuple[Run, ...]:
        """The finished runs of an arm, by seed, then in the order of the units."""
        order = [unit.name for unit in self.units]
        return tuple(sorted((r for r in self.runs if r.arm == arm), key=lambda r: (r.seed, order.index(r.unit))))

    def complete(self, arm: str) -> tuple[Run, ...]:
        """The runs of an arm on seeds for which all its planned units are finished."""
        runs = self.of(arm)
        counts = [run.seed for run in runs]
        return tuple(run for run in runs if counts.count(run.seed) == len(self.units))

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        """The seeds for which all planned units of an arm are finished."""
        return tuple(dict.fromkeys(run.seed for run in self.complete(arm)))

    def values(self, arm: str, metric: str, unit: str | None = None) -> dict[int, float]:
        """Seed -> value of a metric for the finished runs of an arm.

        Args:
            arm: Name of the arm.
            metric: Name of the metric.
            unit: Name of one unit; None for the mean over all units, of seeds for which all of them are finished.

        Returns:
            Values in the unit of the metric; NaN where undefined.
        """
        found: dict[int, dict[str, float]] = {}
        for run in self.of(arm):
            if metric in run.metrics:
                found.setdefault(run.seed, {})[run.unit] = run.metrics[metric]
        return average_units(found, [entry.name for entry in self.units] if unit is None else [unit])

    def difference(self, arm: str, reference: str, metric: str, unit: str | None = None) -> PairedDifference:
        """Paired difference ``arm - reference`` of a metric, over all units of a seed or over one of them.

        The margin belongs to the primary metric over all units, which alone has verdicts. There, comparisons beside the
        sequence of questions get intervals that hold all at once.
        """
        measure, main = self.measure(metric), metric == self.primary and unit is None
        difference = paired_difference(
            self.values(arm, metric, unit),
            self.values(reference, metric, unit),
            higher_is_better=measure.higher_is_better,
            confidence=self.beside_confidence if main and (arm, reference) in self.beside else CONFIDENCE,
            margin=measure.unscaled(self.margin) if main and self.margin is not None else None,
        )
        return replace(difference, same_data=not self.mixed_splits)

    @property
    def mixed_splits(self) -> dict[tuple[str, str], dict[str, list[str]]]:
        """Unit and split -> fingerprint -> what has it, for each split of which there is more than one fingerprint."""
        plans = [(unit, "the plan", data) for unit, data in self.data.items()]
        known = [entry for entry in (*plans, *((run.unit, run.name, run.data) for run in self.runs)) if entry[2]]
        found: dict[tuple[str, str], dict[str, list[str]]] = {}
        for where in dict.fromkeys((unit, split) for unit, _, data in known for split in data):
            for unit, name, data in known:
                if unit == where[0]:
                    found.setdefault(where, {}).setdefault(data.get(where[1], "absent"), []).append(name)
        return {where: fingerprints for where, fingerprints in found.items() if len(fingerprints) > 1}

    @property
    def beside(self) -> tuple[tuple[str, str], ...]:
        """Pairs (arm, reference) that have a verdict and are no question of the sequence."""
        return beside(self.arms)

    @property
    def beside_confidence(self) -> float:
        """Confidence of each interval beside the sequence, so that all of them hold at once."""
        return simultaneous(len(self.beside))

    @property
    def steps(self) -> tuple[Step, ...]:
        """The questions in their order; empty without BatchFormer among the arms."""
        return walk({arm: self.difference(TREATMENT, arm, self.primary) for arm in references(self.arms)})

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The measures that the runs describe, each once, in the order of the tables."""
        found: dict[str, Measure] = {}
        for measure in (measure for run in self.runs for measure in run.measures):
            found.setdefault(measure.name, measure)
        return tuple(found.values()) or OLDER_MEASURES

    def measure(self, metric: str) -> Measure:
        """Label, unit, direction and decimals of a metric of the runs, or of a column of their curves."""
        values = [run.metrics[metric] for run in self.runs if metric in run.metrics]
        return find_measure(metric, self.measures).fitted(values)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """All metrics of the runs: the primary one, the other described ones, further splits, all others."""
        names = {name for run in self.runs for name in run.metrics}
        return tuple(dict.fromkeys([self.primary, *order_metrics(names, self.measures)]))

    @property
    def class_measure(self) -> Measure:
        """The measure of each class."""
        metric = next((run.class_metric for run in self.runs if run.per_class), "value")
        values = [entry.value for run in self.runs for entry in run.per_class]
        return find_measure(metric, self.measures).fitted(values)

    @property
    def class_count(self) -> str:
        """Words for the training data of a class, such as "training images"."""
        return next((run.class_count for run in self.runs if run.per_class), "count")

    @property
    def controls(self) -> tuple[str, ...]:
        """Arms that are neither the baseline nor BatchFormer itself."""
        return tuple(arm for arm in self.arms if arm not in (BASELINE, TREATMENT))


@dataclass(frozen=True)
class Found:
    """Everything below the given paths.

    Attributes:
        comparisons: The comparisons.
        runs: Runs outside comparisons.
        left_out: Runs outside comparisons that cannot be used.
    """

    comparisons: tuple[Comparison, ...]
    runs: tuple[Run, ...]
    left_out: tuple[LeftOut, ...]
