"""Does it help on this data? Arms with the same seeds, initial weights and data order, each run in its own process."""

import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, cast

from batchformer.core.arms import ARMS

from .config import ConfigError, setting
from .records import write_json
from .run import DONE, discard, first_rank, fit


def compare(
    recipe: Path,
    overrides: Sequence[str],
    folder: Path,
    *,
    name: str,
    seeds: Sequence[int],
    controls: Sequence[str] = (),
    resume: bool = False,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Run every arm with every seed; what is done already is kept.

    Args:
        recipe: YAML file.
        overrides: ``--key=value`` settings for all arms.
        folder: Of the comparison; gets ``<arm>/seed<k>/`` run folders.
        name: Of the recipe, for the records.
        seeds: One run of each arm for each.
        controls: Arms beside ``plain`` and ``batchformer``.
        resume: Go on in the folder.
        command: What the user typed, for the records.
        say: Takes lines for the user.

    Returns:
        The folder.

    Raises:
        FileExistsError: When the folder has a comparison and ``resume`` is off.
        ValueError: For unknown controls, repeated seeds, or a folder with another comparison.
    """
    arms = _arms(controls)
    if len(set(seeds)) != len(seeds) or not seeds:
        raise ValueError(f"Expected different seeds, at least one, got {list(seeds)}.")
    if any(
        word.startswith(("--seed=", "--model.batchformer.arm", "--model.seed", "--data.seed")) for word in overrides
    ):
        raise ConfigError("Expected compare to set the seed and the arm of each run. Give --seeds and --controls.")
    if setting(recipe, overrides, "model.stage.second") is not None:
        raise ConfigError("Expected a first stage: a second stage trains no BatchFormer, so that all arms are alike.")
    devices = setting(recipe, overrides, "trainer.devices")
    if devices not in (None, "auto", 1, "1"):
        raise ConfigError(
            f"Expected compare to train each run on one device, got trainer.devices={devices}. Train the arms one by "
            "one with batchformer fit --model.batchformer.arm=plain (and =batchformer), then batchformer report RUNS."
        )
    asked = {"recipe": name, "command": command, "arms": arms, "seeds": list(seeds), "primary": "top1"}
    arms, seeds = _settle(folder, asked, resume)
    plan = [(arm, seed) for seed in seeds for arm in arms]
    started = time.monotonic()
    for finished, (arm, seed) in enumerate(plan, 1):
        run = folder / arm / f"seed{seed}"
        before = (run / DONE).exists()
        own = [*overrides, "--trainer.devices=1", f"--seed={seed}", f"--model.batchformer.arm={arm}"]
        try:
            result = _apart(recipe, own, run, name, command)
        except BaseException:
            _discard_plan(folder)
            raise
        took = result["cost"]["train_seconds"]
        note = "kept" if before else f"{took:.0f} s of training"
        say(f"[{finished}/{len(plan)}] {arm}, seed {seed}: top-1 {100 * result['metrics']['top1']:.2f} % ({note})")
        if finished == 1 and not before and len(plan) > 1:
            say(f"About {(time.monotonic() - started) * (len(plan) - 1) / 60:.1f} minutes to go.")
    return folder


def _arms(controls: Sequence[str]) -> list[str]:
    known = [arm for arm in ARMS if arm not in ("plain", "batchformer")]
    if unknown := [control for control in controls if control not in known]:
        raise ValueError(f"Expected controls out of {', '.join(known)}, got {', '.join(unknown)}.")
    return ["plain", "batchformer", *dict.fromkeys(controls)]


def _settle(folder: Path, plan: dict[str, Any], resume: bool) -> tuple[list[str], list[int]]:
    """Write down what is going to be run, and return it: the arms and the seeds, those of before included."""
    path = folder / "compare.json"
    if path.exists() and not resume:
        raise FileExistsError(f"{folder} has a comparison already. Go on with --resume, or choose another --name.")
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["recipe"] != plan["recipe"]:
            raise ValueError(f"Expected a comparison of {plan['recipe']} in {folder}, found one of {before['recipe']}.")
        # Seeds and controls may be added to a comparison; those that are there stay.
        for key in ("arms", "seeds"):
            plan[key] = list(dict.fromkeys([*before[key], *plan[key]]))
    if first_rank():
        write_json(path, {**plan, "date": datetime.now().astimezone().isoformat(timespec="seconds")})
    return plan["arms"], plan["seeds"]


def _discard_plan(folder: Path) -> None:
    """A comparison whose first run fails before its first checkpoint does not stand in the way of the next try."""
    if first_rank() and not any(folder.rglob("last.ckpt")):
        (folder / "compare.json").unlink(missing_ok=True)
        for empty in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
            with suppress(OSError):
                empty.rmdir()
        with suppress(OSError):
            folder.rmdir()


def _apart(recipe: Path, overrides: list[str], run: Path, name: str, command: str | None) -> dict[str, Any]:
    """One run in a fresh process: its peak memory is its own, and it cannot disturb the next."""
    # The server process has the slow imports done; every run forks off it.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["batchformer.engine.run"])
    answers, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, recipe, overrides, run, name, command))
    _start(process)
    sender.close()
    try:
        result, error = answers.recv()
    except EOFError:
        process.join()
        error = ChildProcessError(
            f"Expected {run} to be trained, but its process was ended from outside (exit code {process.exitcode}; -9 "
            "may be a lack of memory). Go on with --resume."
        )
    finally:
        # Killing is safe at any moment, and the only way that always works when the user wants to stop.
        process.kill()
        process.join()
        if first_rank():
            discard(run)
    if error is not None:
        raise error
    return cast(dict[str, Any], result)


def _start(process: Any) -> None:
    """Start a process that Ctrl-C does not reach: the terminal sends it to all, and this one ends the other."""
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    except ValueError:  # not in the main thread, which alone gets Ctrl-C
        process.start()
        return
    try:
        process.start()
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(sender: Any, recipe: Path, overrides: list[str], run: Path, name: str, command: str | None) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = fit(recipe, overrides, run, name=name, resume=run.exists(), command=command, say=_silent)
    except Exception as error:
        error.add_note("".join(traceback.format_exception(error)))  # for BATCHFORMER_TRACEBACK
        sender.send((None, error))
    else:
        sender.send((result, None))


def _end_with_parent() -> None:
    """When the comparison is killed, the run must not go on behind the back of the next attempt."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def _silent(line: str) -> None:
    """The comparison prints its own lines."""
