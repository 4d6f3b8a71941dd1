"""The cost of each arm: time, memory and parameters, for each stage where training has several."""

import math
from collections.abc import Sequence
from statistics import median

from .measures import ABSENT
from .render import Table
from .runs import BASELINE, Comparison, Run

__all__ = ["cost_table"]

_STEP, _SECONDS = ("step_ms", "{:.1f}"), ("train_seconds", "{:,.0f}")
_WHOLE_RUN = (
    ("peak_memory_mb", "peak memory (MB)", "{:,.0f}"),
    ("training_memory_mb", "above start (MB)", "{:,.0f}"),
    ("parameters_train", "parameters in training", "{:,.0f}"),
    ("parameters_test", "parameters at test", "{:,.0f}"),
    ("test_ms_per_image", "test (ms per image)", "{:.3f}"),
)
_TIMES = ("step_ms", "test_ms_per_image", "train_seconds")


def cost_table(comparison: Comparison) -> Table:
    """Medians over runs, and the step time as a multiple of plain's on the same seed and unit.

    Training in several stages has one row for each stage and one for the whole run, since a median over the steps of
    two stages means nothing.
    """
    stages = _stages(comparison)
    rows: list[tuple[str, ...]] = []
    for arm in comparison.arms:
        runs = comparison.of(arm)
        whole = [_middle([run.cost.get(name, math.nan) for run in runs], name, form) for name, _, form in _WHOLE_RUN]
        seconds = _middle([run.cost.get("train_seconds", math.nan) for run in runs], *_SECONDS)
        if len(stages) < 2:
            rows.append((arm, *_step_cells(comparison, arm, None), *whole, seconds))
            continue
        for stage in stages:
            own = _middle([_of_stage(run, stage, "train_seconds") for run in runs], *_SECONDS)
            rows.append((arm, stage, *_step_cells(comparison, arm, stage), *[""] * len(whole), own))
        rows.append((arm, "all", "", "", *whole, seconds))
    stage_column = ("stage",) if len(stages) > 1 else ()
    whole_columns = (title for _, title, _ in _WHOLE_RUN)
    columns = ("arm", *stage_column, "time per step (ms)", "ratio to plain", *whole_columns, "training (s)")
    notes = _notes(comparison, several=len(stages) > 1)
    return Table("Cost", columns, tuple(rows), notes, leading=1 + len(stage_column))


def _notes(comparison: Comparison, *, several: bool) -> tuple[str, ...]:
    over, same = ("seeds and units", "seed and unit") if comparison.has_units else ("seeds", "seed")
    spread = f"Medians over {over}, with the lowest and the highest in brackets."
    if max((len(comparison.of(arm)) for arm in comparison.arms), default=0) < 2:
        spread = "There is one run of each arm, so no spread is known."
    steps = " Each stage has its own time per step." if several else ""
    test = "Test time is that of the forward passes alone."
    if not all(run.stages for run in comparison.runs):
        test = "Test time comes from an earlier version, which may have timed more than forward passes."
    return (
        f"{spread} The ratio to plain compares runs on the same {same}.{steps}",
        f"Times are wall-clock times and include whatever else the machine was doing. {test}",
        *_crowd(comparison),
        "Peak memory: resident memory of the process on CPU, allocated tensors on GPU. 'Above start': minus the memory "
        "in use before the first step, which leaves the memory that training added.",
        "Counts include frozen parameters; BatchFormer's exist only in training.",
    )


def _crowd(comparison: Comparison) -> list[str]:
    if comparison.jobs < 2:
        return []
    return [
        f"Up to {comparison.jobs} runs were made side by side and slowed each other down, so that times and their "
        "ratios are rough. With --jobs 1 each run has the machine to itself."
    ]


def _stages(comparison: Comparison) -> list[str]:
    """Names of all stages of all runs, in their order."""
    return list(dict.fromkeys(stage.name for run in comparison.runs for stage in run.stages))


def _of_stage(run: Run, stage: str | None, name: str) -> float:
    """A time of one stage of a run, or of the whole run; NaN where there is none."""
    if stage is None:
        return run.cost.get(name, math.nan)
    return next((float(getattr(entry, name)) for entry in run.stages if entry.name == stage), math.nan)


def _step_cells(comparison: Comparison, arm: str, stage: str | None) -> tuple[str, str]:
    """Time of a step, and its ratio to plain's."""
    name, form = _STEP
    base = {(run.seed, run.unit): _of_stage(run, stage, name) for run in comparison.of(BASELINE)}
    runs = comparison.of(arm)
    own = {(run.seed, run.unit): _of_stage(run, stage, name) for run in runs}
    ratios = [ratio for where, time in own.items() if base.get(where) and math.isfinite(ratio := time / base[where])]
    shown = ratios[:1] if arm == BASELINE else ratios  # plain's are all 1
    return _middle([*own.values()], name, form), _middle(shown, name, "{:.2f}")


def _middle(values: Sequence[float], name: str, form: str) -> str:
    """Median of the finite values; of times also the lowest and the highest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ABSENT
    middle = form.format(median(finite))
    if name not in _TIMES or len(finite) < 2:
        return middle
    return f"{middle} [{form.format(min(finite))} to {form.format(max(finite))}]"
