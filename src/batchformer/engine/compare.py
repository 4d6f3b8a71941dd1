"""Comparisons: every arm with the same seeds, initial weights and data order, each run in a process of its own."""

import json
import math
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from functools import partial
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any, cast

from batchformer.data.atomic import alone_in, write_json, write_text
from batchformer.tasks.training.arms import ARMS
from batchformer.tasks.training.contract import Measure, Unit
from batchformer.tasks.training.data import changed_splits, in_words
from batchformer.tasks.training.task import Task

from .config import RUN_CONFIG, setting, task_of
from .errors import ConfigError
from .metrics import shown
from .resuming import DONE, read_result, refuse_result_on_other_data
from .run import data_fingerprints, discard, first_rank, fit, refuse_settings_unlike
from .stages import word
from .tasks import task_class, tasks

PLAN = "compare.json"


def compare(
    recipe: Path,
    overrides: Sequence[str],
    folder: Path,
    *,
    name: str,
    seeds: Sequence[int],
    controls: Sequence[str] = (),
    resume: bool = False,
    margin: float | None = None,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Run every arm with every seed; runs that are finished already are kept.

    Args:
        recipe: YAML file.
        overrides: ``--key=value`` settings for all arms.
        folder: Folder of the comparison; gets the run folders ``<arm>/seed<k>``, or ``<arm>/seed<k>-<unit>`` where the
            task has units such as target domains.
        name: Name of the recipe, for the records.
        seeds: Seeds; each arm is run once with each, and on each unit.
        controls: Arms beside ``plain`` and ``batchformer``.
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
            seeds, or a folder with another comparison.
    """
    if margin is not None and not 0.0 < margin < math.inf:
        raise ValueError(f"Expected a margin above 0, got {margin}. Name the smallest difference that matters to you.")
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
        _write_plan(recipe, overrides, folder, asked)
        _run_all(recipe, overrides, folder, asked, units, task.measures, say)
    return folder


def _run_all(
    recipe: Path,
    overrides: Sequence[str],
    folder: Path,
    plan: dict[str, Any],
    units: Mapping[str, Unit],
    measures: Sequence[Measure],
    say: Callable[[str], None],
) -> None:
    runs = [(arm, seed, unit) for seed in plan["seeds"] for unit in units.values() for arm in plan["arms"]]
    for arm, seed, unit in runs:
        _refuse_a_result_on_other_data(folder / _run_folder(arm, seed, unit), plan, unit)
    started = time.monotonic()
    for finished, (arm, seed, unit) in enumerate(runs, 1):
        run = folder / _run_folder(arm, seed, unit)
        before = (run / DONE).exists()
        own = [*overrides, "--trainer.devices=1", f"--seed={seed}", f"--model.batchformer.arm={arm}"]
        own += [word(key, value) for key, value in unit.settings.items()]
        result = _run_in_process(recipe, own, run, plan["recipe"], unit.name or None, plan["command"])
        _refuse_a_result_on_other_data(run, plan, unit)
        value = shown(plan["primary"], result["metrics"].get(plan["primary"]), measures)
        note = "kept" if before else f"{result['cost']['train_seconds']:.0f} s of training"
        who = f"{arm}, seed {seed}{f', {unit.name}' if unit.name else ''}"
        say(f"[{finished}/{len(runs)}] {who}: {value} ({note})")
        if finished == 1 and not before and len(runs) > 1:
            say(f"About {(time.monotonic() - started) * (len(runs) - 1) / 60:.1f} minutes to go.")


def _run_folder(arm: str, seed: int, unit: Unit) -> str:
    return f"{arm}/seed{seed}-{unit.name}" if unit.name else f"{arm}/seed{seed}"


def _data(recipe: Path, overrides: Sequence[str], folder: Path, units: Mapping[str, Unit]) -> dict[str, dict[str, str]]:
    """Return the fingerprints of the data of each unit, by its name."""
    own = {name: [word(key, value) for key, value in unit.settings.items()] for name, unit in units.items()}
    return {
        name: data_fingerprints(recipe, [*overrides, "--trainer.devices=1", *words], folder)
        for name, words in own.items()
    }


def _refuse_a_result_on_other_data(run: Path, plan: Mapping[str, Any], unit: Unit) -> None:
    if (result := read_result(run)) is not None:
        refuse_result_on_other_data(run, result, plan["data"].get(unit.name, {}))


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


def _write_plan(recipe: Path, overrides: Sequence[str], folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan of the runs; arms, seeds and data of an earlier plan stay in it."""
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
    if first_rank():
        write_json(path, {**plan, "date": datetime.now().astimezone().isoformat(timespec="seconds")})


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
    if any(folder.rglob("last.ckpt")):
        return
    (folder / PLAN).unlink(missing_ok=True)
    for empty in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            empty.rmdir()


def _run_in_process(
    recipe: Path, overrides: list[str], run: Path, name: str, unit: str | None, command: str | None
) -> dict[str, Any]:
    """Run once in a fresh process, so that its peak memory is its own and it cannot disturb the next run."""
    # The server process has the slow imports done; every run forks off it.
    context = multiprocessing.get_context("forkserver")
    module = tasks()[task_of(recipe)].partition(":")[0]
    context.set_forkserver_preload(["batchformer.engine.run", module])
    answers, sender = context.Pipe(duplex=False)
    process = context.Process(target=_serve_one_run, args=(sender, recipe, overrides, run, name, unit, command))
    try:
        _start_unreached(process)
        sender.close()
        result, error = answers.recv()
        process.join(10)  # it tidies up after itself
    except EOFError:
        process.join()
        error = ChildProcessError(
            f"Expected {run} to be trained, but its process was ended from outside (exit code {process.exitcode}; -9 "
            "may be a lack of memory). Go on with --resume."
        )
    finally:
        # Killing is safe at any moment, and the only way that always works when the user wants to stop.
        if process.pid is not None:
            process.kill()
            process.join()
        if first_rank() and run.exists():
            with suppress(BlockingIOError), alone_in(run):  # also removes the lock file of a process that was killed
                discard(run)
    if error is not None:
        raise error
    return cast(dict[str, Any], result)


def _start_unreached(process: Any) -> None:
    """Start a process that Ctrl-C does not reach. The terminal sends it to all, and this process ends the other one.

    Starting takes as long as the server needs for its imports. Ctrl-C meanwhile waits until the process is known, so
    that it can be ended.
    """
    pressed: list[int] = []
    try:
        before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    except ValueError:  # not in the main thread, which alone gets Ctrl-C
        _start_server()
        process.start()
        return
    try:
        _start_server()
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _start_server() -> None:
    """Start the server that runs fork from, with Ctrl-C blocked; a Ctrl-C meanwhile waits until it has started."""
    resource_tracker.ensure_running()  # it unblocks Ctrl-C after its own start, so that comes first
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


def _serve_one_run(
    sender: Any,
    recipe: Path,
    overrides: list[str],
    run: Path,
    name: str,
    unit: str | None,
    command: str | None,
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # From here on as in a process of its own: what a run starts (loaders) is not made by the server's rules, and names
    # no semaphores that are left over when the run is killed.
    multiprocessing.set_start_method(None, force=True)
    try:
        result = fit(recipe, overrides, run, name=name, unit=unit, resume=run.exists(), command=command, say=_silent)
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))  # for BATCHFORMER_TRACEBACK
        sender.send((None, error))
    else:
        sender.send((result, None))


def _end_with_parent() -> None:
    """End this process with its parent, since a run that went on alone would be in the way of the next attempt."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _silent(line: str) -> None:
    """Say nothing, since the comparison prints lines of its own."""
