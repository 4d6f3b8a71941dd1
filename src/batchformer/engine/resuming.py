"""A run that goes on: its settings and its data must be those that it was started with.

Fingerprints in the checkpoints and results tell the data apart. So a run whose data was moved, or that is read by more
workers or into more memory, goes on and is tested.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from batchformer.data.atomic import write_text
from batchformer.tasks.training.data import TaskData, changed_splits, in_words

from .config import RUN_CONFIG, differences
from .errors import ConfigError
from .stages import PlannedStage, finished_checkpoint, last_checkpoint

PLACES = ("data.root", "data.train_list", "data.val_list", "data.test_list")
"""Settings that say where the data lies; run folders keep them as absolute paths."""
READING = ("data.num_workers", "data.memory_gib")
"""Settings that say how the data is read."""
DONE = "done"
"""Name of the mark of a finished run."""


def write_config(
    folder: Path, now: str, before: Callable[[Path], str], *, resume: bool, guard: Callable[[bool], None]
) -> None:
    """Write the resolved settings of a run; with ``resume`` they must be those that are there.

    Settings in :data:`PLACES` and :data:`READING` may be new ones, which are then kept. A finished run keeps its own.

    Args:
        folder: Run folder.
        now: Resolved settings, YAML.
        before: Resolves the file of the settings that are there, in today's terms and with today's defaults.
        resume: Whether the run goes on.
        guard: Refuses other data; told whether the data lies in another place than before.

    Raises:
        FileExistsError: The folder has a run and ``resume`` is off.
        ConfigError: Other settings differ, or the data does.
    """
    path = folder / RUN_CONFIG
    if not (resume and path.exists()):
        refuse_another_run(folder)
        write_text(path, now)
        return
    was = before(path)
    refuse_other_settings(folder, was, now)
    kept = was if (folder / DONE).exists() else now
    guard(any(line.startswith(PLACES) for line in differences(was, kept)))
    if differences(path.read_text(encoding="utf-8"), kept):
        write_text(path, kept)  # a run of an earlier version stands in one table with those of today


def refuse_another_run(folder: Path) -> None:
    """Refuse a folder that has a run.

    Raises:
        FileExistsError: Says the way out.
    """
    if (folder / RUN_CONFIG).exists():
        raise FileExistsError(f"{folder} has a run already. Go on with --resume, or choose another --name.")


def refuse_other_settings(folder: Path, before: str, now: str) -> None:
    """Refuse settings other than those of a run, except for the place of the data and how it is read.

    Raises:
        ConfigError: Lists them.
    """
    changed = [line for line in differences(before, now) if not line.startswith((*PLACES, *READING))]
    if changed:
        listed = "".join(f"\n  {line}" for line in changed)
        raise ConfigError(
            f"Expected the settings that {folder} was started with, got others:{listed}\n"
            "Resume with the same settings, or start another run with --name."
        )


def refuse_other_data(
    folder: Path, stages: Sequence[PlannedStage], task: str, data_of: Callable[[PlannedStage], TaskData], *, moved: bool
) -> None:
    """Refuse data other than that of the newest checkpoint of a run.

    A stage that goes on from its own checkpoint refuses by itself, so that data in its old place is looked at here only
    between two stages.

    Args:
        folder: Run folder.
        stages: Stages of the run.
        task: Name of the task.
        data_of: Makes the data module of a stage.
        moved: Whether the data lies in another place than before.

    Raises:
        ConfigError: Names the splits that have changed, or says that the run cannot tell its data from other data.
    """
    newest = next((file for file in _checkpoints(folder, stages) if file.exists()), None)
    if newest is None or (not moved and newest == last_checkpoint(folder)):
        return
    entry = torch.load(newest, map_location="cpu", weights_only=True, mmap=True).get(task, {})
    if not entry.get("data"):
        if not moved:
            return
        raise ConfigError(
            f"Expected the data where it was, since {folder} was made by an older version, which kept no fingerprint "
            "to know it by. Leave data.root out, or start another run with --name."
        )
    data = data_of(next((one for one in stages if one.stage.name == entry.get("stage")), stages[-1]))
    data.prepare_data()
    if splits := changed_splits(entry["data"], data.fingerprints()):
        raise ConfigError(
            f"Expected the data that {folder} was trained on, but {in_words(splits)}. Point data.root to that data, or "
            "start another run with --name."
        )


def _checkpoints(folder: Path, stages: Sequence[PlannedStage]) -> list[Path]:
    return [last_checkpoint(folder), *(finished_checkpoint(folder, one.stage) for one in reversed(stages))]


def refuse_result_on_other_data(run: Path, result: Mapping[str, Any], expected: Mapping[str, str]) -> None:
    """Refuse a finished run of a comparison that was made on other data than the comparison is on.

    Raises:
        ConfigError: Names the run and the splits that differ.
    """
    if splits := changed_splits(result.get("data") or {}, expected):
        differ = f"{'s' if len(splits) > 1 else ''} {' and '.join(splits)}"
        raise ConfigError(
            f"Expected runs on the data of this comparison, but {run} was made on other data (split{differ}). Delete "
            "that folder to run it again, or move it out of the comparison."
        )


def read_result(run: Path) -> dict[str, Any] | None:
    """Return the result of a finished run, ``None`` if it is not finished."""
    if not (run / DONE).exists():
        return None
    found: dict[str, Any] = json.loads((run / "result.json").read_text(encoding="utf-8"))
    return found


def refuse_missing_root(overrides: Sequence[str]) -> None:
    """Refuse a data root that is not there, before anything is fetched into a mistyped one.

    Raises:
        FileNotFoundError: Names it.
    """
    for word in overrides:
        key, _, value = word.removeprefix("--").partition("=")
        if key == "data.root" and value not in ("", "null") and not Path(value).expanduser().is_dir():
            raise FileNotFoundError(f"Expected the folder of the data in {value}, found none. See --data.root.")


def refuse_other_than_reading(overrides: Sequence[str]) -> None:
    """Refuse settings of a test that are neither the place of the data nor how it is read.

    Raises:
        ConfigError: Names them.
    """
    allowed = (*PLACES, *READING)
    if other := [word for word in overrides if word.removeprefix("--").partition("=")[0] not in allowed]:
        raise ConfigError(
            f"Expected settings of where the data lies and how it is read ({', '.join(allowed)}), got "
            f"{', '.join(other)}. The other settings of a run are those that it was trained with."
        )
