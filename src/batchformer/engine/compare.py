"""Does it help on this data? The same seeds, initial weights and data order for every arm, each run in a process of its own."""

import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from batchformer.core.arms import ARMS

from .config import ConfigError
from .records import write_json
from .run import DONE, first_rank, fit


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
    _settle(folder, {"recipe": name, "command": command, "arms": arms, "seeds": list(seeds), "primary": "top1"}, resume)
    plan = [(arm, seed) for seed in seeds for arm in arms]
    started, finished = time.monotonic(), 0
    for arm, seed in plan:
        run = folder / arm / f"seed{seed}"
        before = (run / DONE).exists()
        own = [*overrides, f"--seed={seed}", f"--model.batchformer.arm={arm}"]
        try:
            result = _apart(recipe, own, run, name, command)
        except BaseException:
            _discard_plan(folder)
            raise
        finished += 1
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


def _settle(folder: Path, plan: dict[str, Any], resume: bool) -> None:
    if not first_rank():
        return
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
    write_json(path, {**plan, "date": datetime.now().astimezone().isoformat(timespec="seconds")})


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
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        waiting = pool.submit(
            fit, recipe, overrides, run, name=name, resume=run.exists(), command=command, say=_silent
        )
        return waiting.result()


def _silent(line: str) -> None:
    """The comparison prints its own lines."""
