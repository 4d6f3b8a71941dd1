"""Comparisons: every arm with the same seeds, initial weights and data order, each run in a process of its own."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from batchformer.data.atomic import alone_in, write_json, write_text
from batchformer.tasks.training.arms import ARMS
from batchformer.tasks.training.contract import Measure, Unit
from batchformer.tasks.training.data import changed_splits, in_words
from batchformer.tasks.training.task import Task

from .config import RUN_CONFIG, setting, task_of
from .display import time_to_go
from .errors import ConfigError, RunsFailed
from .job_process import Job
from .jobs import FAILED, Ended, Failure, default_jobs, gpus, run_jobs
from .metrics import shown
from .resuming import DONE, read_result, refuse_result_on_other_data
from .run import data_fingerprints, first_rank, refuse_settings_unlike
from .stages import word
from .tasks import task_class

PLAN = "compare.json"


def compare(
    recipe: Path,
    overrides: Sequence[str],
    folder: Path,
    *,
    name: str,
    seeds: Sequence[int],
    controls: Sequence[str] = (),
    jobs: int | None = None,
    threads: int | None = None,
    resume: bool = False,
    margin: float | None = None,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Run every arm with every seed; runs that are finished already are kept.

    The numbers do not depend on ``jobs``; they can depend on ``threads``, which therefore stays what it was.

    Args:
        recipe: YAML file.
        overrides: ``--key=value`` settings for all arms.
        folder: Folder of the comparison; gets the run folders ``<arm>/seed<k>``, or ``<arm>/seed<k>-<unit>`` where the
            task has units such as target domains.
        name: Name of the recipe, for the records.
        seeds: Seeds; each arm is run once with each, and on each unit.
        controls: Arms beside ``plain`` and ``batchformer``.
        jobs: Largest number of runs at a time; ``None`` is one on each GPU, else as many as there are cores for.
        threads: Threads of each run; ``None`` is what the comparison has, and 1 for a new one.
        resume: Go on in the folder.
        margin: Smallest difference of the primary metric that matters, above 0, in points for a metric in percent and
            otherwise in its own unit. It is written into the plan before the runs.
        command: Command that the user typed, for the records.
        say: Takes lines for the user.

    Returns:
        The folder.

    Raises:
        FileExistsError: When the folder has a comparison and ``resume`` is off.
        BlockingIOError: When another process is at work in the folder.
        ValueError: For a margin that is not above 0, unknown controls, a control that is the method itself, repeated
            seeds, no jobs or threads, or a folder with another comparison.
        RunsFailed: When some runs did not finish, after all others did.
    """
    if margin is not None and not 0.0 < margin < math.inf:
        raise ValueError(f"Expected a margin above 0, got {margin}. Name the smallest difference that matters to you.")
    for option, number in (("--jobs", jobs), ("--threads", threads)):
        if number is not None and number < 1:
            raise ValueError(f"Expected {option} to be at least 1, got {number}.")
    arms = _arms(controls, single=setting(recipe, overrides, "model.batchformer.mode") == "single_stream")
    task = _comparable_task(recipe, overrides, seeds)
    units = _units(task, recipe, overrides)
    asked: dict[str, Any] = {
        "recipe": name,
        "command": command,
        "arms": arms,
        "seeds": list(seeds),
        "units": [{"name": unit} for unit in units if unit],
        "primary": task.primary,
        **({} if margin is None else {"margin": margin}),
    }
    with alone_in(folder) if first_rank() else nullcontext(), _keeping_the_plan(folder, resume):
        asked["data"] = _data(recipe, overrides, folder, units)
        asked["threads"] = _threads(folder, threads)
        accelerator = setting(recipe, overrides, "trainer.accelerator")
        devices = gpus(accelerator)
        most = default_jobs(accelerator, devices, asked["threads"]) if jobs is None else jobs
        plan = _joined_plan(recipe, overrides, folder, asked)
        planned = _planned(recipe, overrides, folder, plan, units)
        for job in planned:
            _refuse_a_result_on_other_data(job, plan)
        most = min(most, max(1, sum(not (job.folder / DONE).exists() for job in planned)))
        _write_plan(folder, plan, most)
        failed = _run_all(planned, most, plan, devices, task.measures, say)
    if failed:
        listed = "".join(f"\n  {title} {failure.kind}: {failure.message}" for title, failure in failed.items())
        raise RunsFailed(
            f"Expected {len(planned)} finished runs, {len(failed)} did not finish:{listed}\n"
            "The others are in the report. Try these again with --resume."
        )
    return folder


def _planned(
    recipe: Path, overrides: Sequence[str], folder: Path, plan: Mapping[str, Any], units: Mapping[str, Unit]
) -> list[Job]:
    """Return all runs, seed by seed, so that the arms of a seed come together."""
    jobs = []
    for seed in plan["seeds"]:
        for unit in units.values():
            for arm in plan["arms"]:
                own = [*overrides, "--trainer.devices=1", f"--seed={seed}", f"--model.batchformer.arm={arm}"]
                own += [word(key, value) for key, value in unit.settings.items()]
                run = folder / arm / (f"seed{seed}-{unit.name}" if unit.name else f"seed{seed}")
                title = f"{arm}, seed {seed}{f', {unit.name}' if unit.name else ''}"
                jobs.append(Job(title, recipe, tuple(own), run, plan["recipe"], unit.name or None, plan["command"]))
    return jobs


def _run_all(
    planned: Sequence[Job],
    most: int,
    plan: Mapping[str, Any],
    devices: Sequence[str],
    measures: Sequence[Measure],
    say: Callable[[str], None],
) -> dict[str, Failure]:
    """Make all runs, with a line for each; return the titles and reasons of those that failed."""
    failed: dict[str, Failure] = {}
    trained = count(1)
    number = count(1)

    def ended(one: Ended) -> None:
        place = f"[{next(number)}/{len(planned)}] {one.job.title}:"
        if one.failure is not None:
            failed[one.job.title] = one.failure
            say(f"{place} {one.failure.kind}")
            return
        _refuse_a_result_on_other_data(one.job, plan)
        value = shown(plan["primary"], one.result["metrics"].get(plan["primary"]), measures)
        note = "kept" if one.kept else f"{one.result['cost']['train_seconds']:.0f} s of training"
        say(f"{place} {value} ({note})")
        if not one.kept and one.seconds_left and next(trained) == 1:
            say(f"{time_to_go(one.seconds_left).capitalize()}.")

    run_jobs(planned, most, plan["threads"], devices, ended)
    return failed


def _threads(folder: Path, asked: int | None) -> int:
    """Return the threads of each run of a comparison: those that it has, else those that are asked for, else 1.

    Raises:
        ConfigError: When others are asked for than the comparison has.
    """
    before = _threads_before(folder)
    if before is not None and asked not in (None, before):
        raise ConfigError(
            f"Expected --threads={before}, with which the runs in {folder} were made, got {asked}: their numbers can "
            "depend on it. Leave --threads out, or choose another --name."
        )
    return before or asked or 1


def _threads_before(folder: Path) -> int | None:
    path = folder / PLAN
    if not path.exists():
        return None
    if (threads := json.loads(path.read_text(encoding="utf-8")).get("threads")) is not None:
        return int(threads)
    # A comparison of an earlier version has the number in the records of its runs alone.
    for record in sorted(folder.glob("*/*/environment.json")):
        threads = json.loads(record.read_text(encoding="utf-8")).get("hardware", {}).get("threads")
        if threads is not None:
            return int(threads)
    return None


def _data(recipe: Path, overrides: Sequence[str], folder: Path, units: Mapping[str, Unit]) -> dict[str, dict[str, str]]:
    """Return the fingerprints of the data of each unit, by its name."""
    own = {name: [word(key, value) for key, value in unit.settings.items()] for name, unit in units.items()}
    return {
        name: data_fingerprints(recipe, [*overrides, "--trainer.devices=1", *words], folder)
        for name, words in own.items()
    }


def _refuse_a_result_on_other_data(job: Job, plan: Mapping[str, Any]) -> None:
    if (result := read_result(job.folder)) is not None:
        refuse_result_on_other_data(job.folder, result, plan["data"].get(job.unit or "", {}))


def _units(task: type[Task], recipe: Path, overrides: Sequence[str]) -> dict[str, Unit]:
    """Return what each seed is run on, by name.

    Raises:
        ConfigError: When a setting that the units differ in is given for all of them.
    """
    units = {unit.name: unit for unit in task.units(partial(setting, recipe, overrides))}
    given = {word.removeprefix("--").partition("=")[0] for word in overrides}
    if fixed := sorted(given & {key for unit in units.values() for key in unit.settings}):
        raise ConfigError(
            f"Expected compare to set {', '.join(fixed)} in each run, since every seed is run on "
            f"{', '.join(units)}. Leave it out."
        )
    return units


def _comparable_task(recipe: Path, overrides: Sequence[str], seeds: Sequence[int]) -> type[Task]:
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"Expected different seeds, at least one, got {list(seeds)}.")
    if any(
        word.startswith(("--seed=", "--model.batchformer.arm", "--model.seed", "--data.seed")) for word in overrides
    ):
        raise ConfigError("Expected compare to set the seed and the arm of each run. Give --seeds and --controls.")
    devices = setting(recipe, overrides, "trainer.devices")
    if devices not in (None, "auto", 1, "1"):
        raise ConfigError(
            f"Expected compare to train each run on one device, got trainer.devices={devices}. Train the arms one by "
            "one with batchformer fit --model.batchformer.arm=plain (and =batchformer), then batchformer report RUNS."
        )
    task = task_class(task_of(recipe))
    if reason := task.not_comparable(partial(setting, recipe, overrides)):
        raise ConfigError(f"Expected settings in which the arms differ, but {reason}.")
    return task


def _arms(controls: Sequence[str], *, single: bool) -> list[str]:
    known = [arm for arm in ARMS if arm not in ("plain", "batchformer")]
    if unknown := [control for control in controls if control not in known]:
        raise ValueError(f"Expected controls out of {', '.join(known)}, got {', '.join(unknown)}.")
    if single and "single_stream" in controls:
        raise ConfigError(
            "Expected controls that differ from BatchFormer, but with model.batchformer.mode=single_stream it is the "
            "control single_stream itself. Leave that control out, or set model.batchformer.mode=two_stream."
        )
    return ["plain", "batchformer", *dict.fromkeys(controls)]


def _joined_plan(recipe: Path, overrides: Sequence[str], folder: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Return the plan of the runs; arms, seeds and data of an earlier plan stay in it."""
    path = folder / PLAN
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before.get("units", []) != plan["units"]:
            raise ValueError(
                f"Expected a comparison over {_listed(plan['units'])} in {folder}, found one over "
                f"{_listed(before.get('units', []))}. Choose another --name."
            )
        if before["recipe"] != plan["recipe"]:
            raise ValueError(f"Expected a comparison of {plan['recipe']} in {folder}, found one of {before['recipe']}.")
        if plan.get("margin", before.get("margin")) != before.get("margin"):
            raise ConfigError(
                f"Expected the margin that was written down before the runs ({before.get('margin', 'none')}), got "
                f"{plan['margin']}. Leave --margin out here, and judge by another one with: "
                f"batchformer report {folder} --margin {plan['margin']:g}"
            )
        if "margin" in before:
            plan["margin"] = before["margin"]
        known = before.get("data") or {}
        if splits := [
            split for unit, now in plan["data"].items() for split in changed_splits(known.get(unit, {}), now)
        ]:
            _refuse_other_settings(recipe, overrides, folder)
            raise ConfigError(
                f"Expected the data that the comparison in {folder} was started on, but "
                f"{in_words(list(dict.fromkeys(splits)))}. Bring that data back, or choose another --name."
            )
        plan["data"] |= {unit: splits for unit, splits in known.items() if splits}
        # Seeds and controls may be added to a comparison; those that are there stay.
        for key in ("arms", "seeds"):
            plan[key] = list(dict.fromkeys([*before[key], *plan[key]]))
        plan["jobs"] = before.get("jobs", 1)
    return plan


def _write_plan(folder: Path, plan: dict[str, Any], jobs: int) -> None:
    # The report has to know whether any times were taken side by side with other runs.
    plan["jobs"] = max(plan.get("jobs", 1), jobs)
    if first_rank():
        write_json(folder / PLAN, {**plan, "date": datetime.now().astimezone().isoformat(timespec="seconds")})


def _refuse_other_settings(recipe: Path, overrides: Sequence[str], folder: Path) -> None:
    """Refuse settings other than those of a run that is there, since they may be why the data is another."""
    for path in sorted(folder.glob(f"*/*/{RUN_CONFIG}"))[:1]:
        arm, seed = (setting(path, (), key) for key in ("model.batchformer.arm", "seed"))
        own = [*overrides, "--trainer.devices=1", f"--seed={seed}", f"--model.batchformer.arm={arm}"]
        refuse_settings_unlike(path.parent, recipe, own)


def _listed(units: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(unit["name"] for unit in units) or "seeds alone"


@contextmanager
def _keeping_the_plan(folder: Path, resume: bool) -> Iterator[None]:
    """Take back the plan of a refused command, and of one whose first run never saved anything."""
    path = folder / PLAN
    if path.exists() and not resume:
        raise FileExistsError(f"{folder} has a comparison already. Go on with --resume, or choose another --name.")
    before = path.read_text(encoding="utf-8") if path.exists() else None
    try:
        yield
    except BaseException as error:
        if first_rank():
            if before is not None and isinstance(error, ConfigError):
                write_text(path, before)
            _discard_plan(folder)
        raise


def _discard_plan(folder: Path) -> None:
    if any(folder.rglob("*.ckpt")) or any(folder.rglob(FAILED)):
        return
    (folder / PLAN).unlink(missing_ok=True)
    for empty in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            empty.rmdir()
