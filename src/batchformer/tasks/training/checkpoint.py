"""The way from a run folder back to a network: what a checkpoint holds, and how it is read."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class DataFacts:
    """Facts about the data that a trained network needs, and its users with it. Tasks add fields of their own.

    Attributes:
        classes: Name of each class, by class index.
        counts: Amount of training data of each class.
    """

    classes: list[str]
    counts: list[int]

    @classmethod
    def of(cls, data: Any) -> Self:
        """Read every field off the attribute of that name of a data module, after its ``setup()``."""
        return cls(**{field.name: _plain(getattr(data, field.name)) for field in fields(cls)})

    @classmethod
    def read(cls, stored: dict[str, Any]) -> Self:
        """Read the facts of a checkpoint.

        Raises:
            ValueError: When they are of an earlier version, which described its data and networks in other terms.
        """
        try:
            return cls(**stored)
        except TypeError:
            raise ValueError(
                "This run was made by an older version of batchformer with a different network. Load it with that "
                "version, or train it again."
            ) from None


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(inside) for key, inside in value.items()}
    return [_plain(inside) for inside in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class Stored:
    """Content of a checkpoint, before a network is built from it.

    Attributes:
        stage: Name of the stage that it was written in.
        settings: Settings that ``Task.settings()`` gave.
        facts: Facts about the data.
        plain: State dict of the plain network.
        batchformer: State dict of the BatchFormer modules; empty for the plain arm.
    """

    stage: str
    settings: dict[str, Any]
    facts: Any
    plain: dict[str, Tensor]
    batchformer: dict[str, Tensor]


class Restored(NamedTuple):
    """A trained network and what belongs to it.

    Attributes:
        network: The plain network, in ``eval()``.
        facts: Facts about the data that it was trained on.
        settings: Settings that it was built from, as the task spells them.
        stage: Name of the stage that trained it last.
    """

    network: Any
    facts: Any
    settings: Any
    stage: str


@dataclass(frozen=True)
class CheckpointFormat:
    """Format of the checkpoints of a task, and the way to read them.

    Attributes:
        task: Name of the task; its checkpoints hold an entry of this name.
        facts: Class of its facts about the data.
        translate: Turns such an entry of an earlier version into today's (``stage``, ``settings``, ``facts``).
    """

    task: str
    facts: type[DataFacts] = DataFacts
    translate: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    def entry(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return the task's entry of a loaded checkpoint, in today's form.

        Raises:
            KeyError: When there is none.
        """
        entry: dict[str, Any] = checkpoint[self.task]
        return entry if "facts" in entry or self.translate is None else self.translate(entry)

    def read(self, run: str | Path) -> Stored:
        """Read a run folder or a checkpoint file; nothing in it is executed.

        Raises:
            FileNotFoundError: When there is no checkpoint.
            ValueError: When it is no checkpoint of this task.
        """
        path = checkpoint_of(run)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if self.task not in checkpoint:
            raise ValueError(
                f"Expected a checkpoint of the task {self.task!r}, got {path} without the entry of that name."
            )
        entry = self.entry(checkpoint)
        parts: dict[bool, dict[str, Tensor]] = {True: {}, False: {}}
        for key, value in checkpoint["state_dict"].items():
            owner, _, name = key.partition(".")
            if owner == "network":
                inserted = name.startswith("batchformer.")
                parts[inserted][name.removeprefix("batchformer.") if inserted else name] = value
        return Stored(entry["stage"], entry["settings"], self.facts.read(entry["facts"]), parts[False], parts[True])


def checkpoint_of(run: str | Path) -> Path:
    """Return the newest checkpoint of a run folder, or the file itself.

    Raises:
        FileNotFoundError: When there is none; names the runs of a comparison where a comparison was given.
    """
    path = Path(run)
    if path.is_dir():
        path = path / "checkpoints" / "last.ckpt"
        if not path.exists():  # between two stages there is that of the stage before
            path = max(path.parent.glob("*.ckpt"), key=lambda found: found.stat().st_mtime, default=path)
    if not path.is_file():
        raise no_run(run, "checkpoints/last.ckpt")
    return path


def no_run(folder: str | Path, missing: str) -> FileNotFoundError:
    """Return the error for a folder that is no run folder, for lack of a file; of a comparison it names a run."""
    if (Path(folder) / "compare.json").is_file():
        runs = sorted(str(path.parent) for path in Path(folder).glob("*/*/config.yaml"))
        hint = f" Give one of its runs, such as {runs[0]}." if runs else " It has no run yet."
        return FileNotFoundError(f"Expected a run folder, got the comparison {folder}.{hint}")
    return FileNotFoundError(
        f"Expected a run folder with {missing}, or a checkpoint file, got {folder}. Train one with batchformer fit, or "
        "go on with its --resume."
    )
