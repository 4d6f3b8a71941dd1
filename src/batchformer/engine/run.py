"""One run: train, test the plain network, write the results; and what one does with a run afterwards."""

import json
import logging
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningCLI
from torch import nn

from batchformer.core import BatchFormer
from batchformer.data.atomic import alone_in, write_json, write_text
from batchformer.tasks.training.contract import TaskModule

from .callbacks import Cost, History
from .config import ConfigError, differences, dump, parse
from .environment import environment, peak_memory_mb
from .run_files import WholeCheckpoints

DONE = "done"


def fit(
    recipe: Path,
    overrides: Sequence[str],
    folder: Path,
    *,
    name: str,
    resume: bool = False,
    command: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train by a recipe and test the plain network; resumable at any moment.

    Args:
        recipe: YAML file.
        overrides: ``--key=value`` settings on top.
        folder: Of the run.
        name: Of the recipe, for the records.
        resume: Go on in the folder from its last checkpoint, with the settings that are there.
        command: What the user typed, for the records.
        say: Takes lines for the user.

    Returns:
        The content of result.json.

    Raises:
        FileExistsError: When the folder has a run and ``resume`` is off.
        BlockingIOError: When another process is at work in the folder.
        ConfigError: For wrong settings; with ``resume`` for settings that differ from the run's.
    """
    if first_rank() and not resume:
        _refuse_another_run(folder)
    quiet()
    history, cost = History(folder / "metrics.csv"), Cost()
    keeper = ModelCheckpoint(
        _checkpoint(folder).parent,
        filename="last",
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    cli = parse(recipe, overrides, **_surroundings(folder, [history, cost, keeper]))
    if getattr(cli.trainer, "fast_dev_run", False) or cli.trainer.limit_test_batches == 0:
        raise ConfigError(
            "Expected a run that is saved and tested, got trainer.fast_dev_run or trainer.limit_test_batches=0. For a "
            "quick trial set trainer.max_epochs=1, trainer.limit_train_batches=2 and trainer.limit_test_batches=2."
        )
    cli.trainer.strategy.checkpoint_io = WholeCheckpoints()
    with alone_in(folder) if first_rank() else nullcontext():
        if first_rank():
            _settle_config(folder, dump(cli), resume)
        if resume and (folder / DONE).exists():
            say(f"{folder} is finished already.")
            return cast(dict[str, Any], json.loads((folder / "result.json").read_text(encoding="utf-8")))
        if first_rank():
            _settle_environment(folder, environment(str(cli.trainer.precision), command))
            going_on = resume and _checkpoint(folder).exists()
            say(f"{'Resuming' if going_on else 'Training'} {folder}: {_words(cli)}")
        _train_and_test(cli, folder, history, resume)
        result = _result(cli, name, cost)
        if cli.trainer.is_global_zero:
            write_json(folder / "result.json", result)
            write_text(folder / DONE, "")
    return result


def _train_and_test(cli: LightningCLI, folder: Path, history: History, resume: bool) -> None:
    trainer, checkpoint = cli.trainer, _checkpoint(folder)
    with _keeping_nothing_unsaved(folder):
        start = checkpoint if resume and checkpoint.exists() else None
        trainer.fit(cli.model, cli.datamodule, ckpt_path=start, weights_only=True)
        if trainer.max_epochs == 0:
            trainer.save_checkpoint(checkpoint)  # tau-normalization trains nothing, and is a run like any other
            history.write()
        # What is tested is what was saved: a run that was killed after its last epoch has nothing else.
        trainer.test(cli.model, cli.datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True)


def test(run: Path) -> dict[str, float | None]:
    """The plain network of a run on the test split.

    Raises:
        FileNotFoundError: When the run has no checkpoint.
    """
    checkpoint = _checkpoint(run)
    if not checkpoint.exists():
        raise FileNotFoundError(f"Expected {checkpoint}, but it is not there. Train first, or go on with fit --resume.")
    quiet()
    # However many devices trained it: one process meets every test image once, and can be had anywhere.
    alone = ("--trainer.devices=1", "--trainer.strategy=auto", "--trainer.num_nodes=1")
    cli = parse(run / "config.yaml", alone, **_surroundings(run, []))
    cli.trainer.test(cli.model, cli.datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True)
    return _fractions(cli.trainer.callback_metrics)


@contextmanager
def _keeping_nothing_unsaved(folder: Path) -> Iterator[None]:
    """A run that fails before its first checkpoint (wrong data, say) does not stand in the way of the next try."""
    try:
        yield
    except SystemExit:  # Lightning ends the process on Ctrl-C and SIGTERM; the caller has a word to say first
        with suppress(ValueError):  # Lightning also left Ctrl-C switched off; only a main thread may say so
            signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from None
    finally:
        if first_rank():
            discard(folder)


def first_rank() -> bool:
    """Whether this process is the one that writes: launchers tell the rank before anything is set up."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def _checkpoint(folder: Path) -> Path:
    return folder / "checkpoints" / "last.ckpt"


def _refuse_another_run(folder: Path) -> None:
    if (folder / "config.yaml").exists():
        raise FileExistsError(f"{folder} has a run already. Go on with --resume, or choose another --name.")


def _surroundings(folder: Path, callbacks: list[Callback]) -> dict[str, Any]:
    shown = sys.stderr.isatty()
    return {
        "default_root_dir": str(folder),
        "logger": False,
        "callbacks": [*callbacks, *([TQDMProgressBar()] if shown else [])],
        "enable_progress_bar": shown,
        "enable_model_summary": False,
        "enable_checkpointing": bool(callbacks),
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "deterministic": True,
    }


def _settle_config(folder: Path, text: str, resume: bool) -> None:
    path = folder / "config.yaml"
    if resume and path.exists():
        before = path.read_text(encoding="utf-8")
        if changed := differences(before, text):
            listed = "".join(f"\n  {line}" for line in changed)
            raise ConfigError(
                f"Expected the settings that {folder} was started with, got others:{listed}\n"
                "Resume with the same settings, or start another run with --name."
            )
        return
    _refuse_another_run(folder)
    write_text(path, text)


def _settle_environment(folder: Path, now: dict[str, Any]) -> None:
    """What a run was started in stays; each resumption is noted beside it."""
    path = folder / "environment.json"
    if path.exists():
        first = json.loads(path.read_text(encoding="utf-8"))
        resumed = {key: now[key] for key in ("date", "command", "precision")}
        now = {**first, "resumed": [*first.get("resumed", []), resumed]}
    write_json(path, now)


def _result(cli: LightningCLI, name: str, cost: Cost) -> dict[str, Any]:
    task = cast(TaskModule, cli.model)
    network = cast(nn.Module, task.network)
    module = sum(p.numel() for m in network.modules() if isinstance(m, BatchFormer) for p in m.parameters())
    total = sum(p.numel() for p in network.parameters())
    host = environment(str(cli.trainer.precision))
    peak = peak_memory_mb(cli.trainer.strategy.root_device)
    return {
        "recipe": name,
        "arm": task.plug_in.arm,
        "seed": task.seed,
        "primary": task.primary,
        "metrics": _fractions(cli.trainer.callback_metrics),
        "class_metric": task.class_metric,
        "class_count": task.class_count,
        "per_class": [{**asdict(entry), "value": _defined(entry.value)} for entry in task.class_results()],
        "cost": {
            "step_ms": cost.step_ms(),
            "peak_memory_mb": peak,
            "training_memory_mb": cost.memory_over_start_mb(peak),
            "parameters_train": total,
            "parameters_test": total - module,
            "train_seconds": cost.train_seconds,
            "test_ms_per_image": 1000 * task.test_seconds / max(1, task.test_images),
        },
        "selection": "last epoch",
        "split": "test",
        "notes": task.notes(),
        "date": host["date"],
        "host": {**host["hardware"], "precision": host["precision"], "torch": host["versions"].get("torch")},
    }


def _fractions(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    named = {name.removeprefix("test_"): float(value) for name, value in metrics.items() if name.startswith("test_")}
    return {name: _defined(value) for name, value in named.items()}


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value  # strict JSON has no NaN


def _words(cli: LightningCLI) -> str:
    task = cast(TaskModule, cli.model)
    device = cli.trainer.strategy.root_device.type
    return f"{task.plug_in.arm}, seed {task.seed}, {device}, {cli.trainer.precision}, {torch.get_num_threads()} threads"


def quiet() -> None:
    """Lightning's notes on hardware and tips are no news to the user of a recipe, nor is the place of a warning."""
    warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*smaller than the logging interval.*",
        ".*LeafSpec.*",
        ".*callbacks used to create the checkpoint.*",  # `test` needs none of them
        ".*checkpoint outside the 'fit' stage.*",  # and no moving average beside the weights
        ".*exists and is not empty.*",  # of a resumed run
        ".*dirpath has changed.*",  # of a run folder that was moved, or named from elsewhere
        ".*in eval mode at the start of training.*",  # the frozen part of a second stage
    ):
        warnings.filterwarnings("ignore", message, module="lightning")


def discard(folder: Path) -> None:
    """Remove the records of a run that never saved anything, so that it can be started afresh; nothing else there."""
    if _checkpoint(folder).exists():
        return
    for name in ("config.yaml", "environment.json", "metrics.csv"):
        (folder / name).unlink(missing_ok=True)
    for empty in (folder / "checkpoints", folder):
        with suppress(OSError):
            empty.rmdir()
