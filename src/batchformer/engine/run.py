"""One run: train stage by stage, test the plain network, write the results; and test it again afterwards."""

import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.cli import LightningCLI

from batchformer.data.atomic import alone_in, write_json, write_text
from batchformer.tasks.training.checkpoint import checkpoint_of
from batchformer.tasks.training.contract import Stage
from batchformer.tasks.training.data import TaskData
from batchformer.tasks.training.task import Task

from .callbacks import Cost, History
from .config import RUN_CONFIG, dump, parse, setting, task_of
from .environment import environment
from .errors import ConfigError
from .results import make_result, tested
from .resuming import (
    DONE,
    PLACES,
    refuse_another_run,
    refuse_missing_root,
    refuse_other_data,
    refuse_other_settings,
    refuse_other_than_reading,
    write_config,
)
from .run_files import WholeCheckpoints
from .stages import (
    PlannedStage,
    continue_counting,
    costs,
    finish,
    last_checkpoint,
    plan,
    remaining,
    stage_of,
    with_start,
)


def fit(
    recipe: Path,
    overrides: Sequence[str],
    folder: Path,
    *,
    name: str,
    unit: str | None = None,
    resume: bool = False,
    command: str | None = None,
    say: Callable[[str], None] = print,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Train by a recipe and test the plain network; resumable at any moment.

    Args:
        recipe: YAML file.
        overrides: ``--key=value`` settings on top.
        folder: Folder of the run.
        name: Name of the recipe, for the records.
        unit: Name of what a comparison runs each seed on beside the seed, such as a target domain, for the records.
        resume: Go on in the folder from its last checkpoint, with the settings that are there.
        command: Command that the user typed, for the records.
        say: Takes lines for the user.
        callbacks: Lightning callbacks that look on; they are no part of the run's settings.

    Returns:
        The content of result.json.

    Raises:
        FileExistsError: When the folder has a run and ``resume`` is off.
        BlockingIOError: When another process is at work in the folder.
        ConfigError: For wrong settings; with ``resume`` for settings that differ from the run's.
    """
    if first_rank() and not resume:
        refuse_another_run(folder)
    quiet()
    history = History(folder / "metrics.csv")
    whole, stages = _plan_of(recipe, overrides, folder)
    with alone_in(folder) if first_rank() else nullcontext():
        if first_rank():
            _write_config(recipe, overrides, folder, whole, stages, resume)
        if resume and (folder / DONE).exists():
            say(f"{folder} is finished already.")
            return cast(dict[str, Any], json.loads((folder / "result.json").read_text(encoding="utf-8")))
        if first_rank():
            _write_environment(folder, environment(str(whole.trainer.precision), command))
            going_on = resume and any((folder / "checkpoints").glob("*.ckpt"))
            say(f"{'Resuming' if going_on else 'Training'} {folder}: {_description(whole)}")
        with _keeping_nothing_unsaved(folder):
            measured: list[Cost] = []
            for planned in remaining(folder, stages, whole.model.checkpoint):
                measured.append(Cost())
                stage, own = with_start(folder, stages, planned), [history, measured[-1], _keeper(folder), *callbacks]
                cli = _parse_stage(recipe, overrides, planned, folder, stage, own)
                _train(cli, folder, stage, history)
                finish(folder, planned, cli.trainer)
            # What is tested is what was saved: a run that was killed after its last epoch has nothing else.
            cli.trainer.test(
                cli.model, cli.datamodule, ckpt_path=last_checkpoint(folder), verbose=False, weights_only=True
            )
        result = make_result(cli, name, unit, measured, costs(folder, stages, measured[-1]))
        if cli.trainer.is_global_zero:
            write_json(folder / "result.json", result)
            write_text(folder / DONE, "")
    return result


def _plan_of(recipe: Path, overrides: Sequence[str], folder: Path) -> tuple[LightningCLI, list[PlannedStage]]:
    """Parse a recipe and the settings of all its stages, so that what is wrong is said before the first one."""
    whole = parse(recipe, overrides, **_surroundings(folder))
    listed, settings = whole.config.get("stages"), whole.config.trainer
    stages = plan(listed, whole.model.stages, whole.model.follows)
    if listed:
        _refuse_lengths_beside_stages(recipe, overrides, stages, settings)
        if settings.max_epochs is not None:  # the recipe's own gives way to stages that are asked for
            whole = parse(recipe, overrides, ["--trainer.max_epochs=null"], **_surroundings(folder))
    elif settings.max_epochs is None and settings.max_steps in (None, -1) and settings.max_time is None:
        raise ConfigError("Expected the length of the training, got none. Set trainer.max_epochs, or list stages.")
    for planned in stages:
        # A stage without settings of its own has the trainer of the run, but for its epochs.
        own = parse(recipe, overrides, planned.overrides, **_surroundings(folder)) if planned.overrides[:-1] else whole
        if getattr(own.trainer, "fast_dev_run", False) or own.trainer.limit_test_batches == 0:
            raise ConfigError(
                "Expected a run that is saved and tested, got trainer.fast_dev_run or trainer.limit_test_batches=0. "
                "For a quick trial set trainer.max_epochs=1, trainer.limit_train_batches=2 and "
                "trainer.limit_test_batches=2."
            )
    return whole, stages


def _refuse_lengths_beside_stages(
    recipe: Path, overrides: Sequence[str], stages: Sequence[PlannedStage], settings: Any
) -> None:
    asked = any(word.startswith("--trainer.max_epochs=") for word in overrides)
    given = ["trainer.max_epochs"] if asked and setting(recipe, overrides, "trainer.max_epochs") is not None else []
    given += ["trainer.max_steps"] if settings.max_steps not in (None, -1) else []
    given += ["trainer.max_time"] if settings.max_time is not None else []
    if given:
        raise ConfigError(
            f"Expected the epochs of each stage, got {' and '.join(given)} beside stages. Leave it out, and set "
            f"--stages.{stages[-1].stage.name}.epochs."
        )


def _parse_stage(
    recipe: Path,
    overrides: Sequence[str],
    planned: PlannedStage,
    folder: Path,
    stage: Stage,
    callbacks: Sequence[Callback] = (),
) -> LightningCLI:
    """Parse and instantiate a stage; without callbacks it is only tested."""
    end = [] if stage.epochs is None else [f"--trainer.max_epochs={stage.first_epoch + stage.epochs}"]
    words = [*planned.overrides, *end]
    cli = parse(recipe, overrides, words, **_surroundings(folder, callbacks, saves=bool(callbacks)))
    cli.model.stage = stage
    cli.trainer.strategy.checkpoint_io = WholeCheckpoints()
    return cli


def _keeper(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(
        last_checkpoint(folder).parent,
        filename="last",
        save_top_k=1,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )


def _train(cli: LightningCLI, folder: Path, stage: Stage, history: History) -> None:
    """Fit a stage, from its checkpoint where there is one."""
    trainer, checkpoint = cli.trainer, last_checkpoint(folder)
    start = checkpoint if checkpoint.exists() else None
    if start is None:
        continue_counting(stage, trainer, history)
    trainer.fit(cli.model, cli.datamodule, ckpt_path=start, weights_only=True)
    # A stage of no epochs, such as tau-normalization, is a stage all the same. The first rank decides for all: by the
    # time that another one looks, the file may have its final name.
    if trainer.strategy.broadcast(not checkpoint.exists()):
        trainer.save_checkpoint(checkpoint)
        history.write()


def data_fingerprints(recipe: Path, overrides: Sequence[str], folder: Path) -> dict[str, str]:
    """Return the fingerprint of each split of the data that a run's result would be on; data is fetched if absent.

    Args:
        recipe: YAML file.
        overrides: ``--key=value`` settings on top.
        folder: Folder for the run; nothing is written there.
    """
    quiet()
    _, stages = _plan_of(recipe, overrides, folder)
    data = parse(recipe, overrides, stages[-1].overrides, **_surroundings(folder)).datamodule
    data.prepare_data()
    return cast(TaskData, data).fingerprints()


def refuse_settings_unlike(run: Path, recipe: Path, overrides: Sequence[str]) -> None:
    """Refuse settings other than those of a run, except for the place of the data and how it is read.

    Raises:
        ConfigError: Lists them.
    """
    refuse_other_settings(run, _settings_of(run / RUN_CONFIG), dump(_plan_of(recipe, overrides, run)[0]))


def _settings_of(config: Path) -> str:
    """Return the settings of a run in today's terms and with today's defaults."""
    return dump(parse(config, **_surroundings(config.parent)), absolute=PLACES)


def test(run: Path, overrides: Sequence[str] = ()) -> dict[str, float | None]:  # noqa: PT028  # no test of pytest's
    """Test the plain network of a run on the test split, and warn if that is not the data that it was trained on.

    Of a run that stopped, it is the network as its last checkpoint has it.

    Args:
        run: Run folder.
        overrides: ``--key=value`` settings of where the data lies and how it is read.

    Returns:
        Metric to value; ``None`` where it is not defined.

    Raises:
        FileNotFoundError: When the run has no checkpoint, or there is no folder of the data where the settings say.
        ConfigError: For settings other than those of the data's place and reading.
    """
    refuse_other_than_reading(overrides)
    refuse_missing_root(overrides)
    checkpoint = checkpoint_of(run)
    quiet()
    # However many devices trained it: one process meets every test image once, and can be had anywhere.
    alone = (*overrides, "--trainer.devices=1", "--trainer.strategy=auto", "--trainer.num_nodes=1")
    config = run / RUN_CONFIG
    whole = parse(config, alone, **_surroundings(run))
    stages = plan(whole.config.get("stages"), whole.model.stages, whole.model.follows)
    planned = stage_of(checkpoint, stages, whole.model.checkpoint)  # of a run that stopped, it may be an earlier one
    cli = _parse_stage(config, alone, planned, run, with_start(run, stages, planned))
    cli.trainer.test(cli.model, cli.datamodule, ckpt_path=checkpoint, verbose=False, weights_only=True)
    return tested(cli.trainer.callback_metrics)


@contextmanager
def _keeping_nothing_unsaved(folder: Path) -> Iterator[None]:
    """Remove a run that fails before its first checkpoint, so that the same command can be repeated."""
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
    """Return whether this process is the one that writes; launchers tell the rank before anything is set up."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def _surroundings(folder: Path, callbacks: Sequence[Callback] = (), *, saves: bool = True) -> dict[str, Any]:
    """Return the Trainer's arguments that are not a recipe's business; ``saves`` is off where nothing is trained."""
    shown = sys.stderr.isatty()
    return {
        "default_root_dir": str(folder),
        "logger": False,
        "callbacks": [*callbacks, *([TQDMProgressBar()] if shown else [])],
        "enable_progress_bar": shown,
        "enable_model_summary": False,
        "enable_checkpointing": saves,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
        "deterministic": True,
    }


def _write_config(
    recipe: Path,
    overrides: Sequence[str],
    folder: Path,
    whole: LightningCLI,
    stages: Sequence[PlannedStage],
    resume: bool,
) -> None:
    """Write the settings of a run; one that goes on must have those that are there, and the data that it had."""

    def data_of(planned: PlannedStage) -> TaskData:
        return cast(TaskData, parse(recipe, overrides, planned.overrides, **_surroundings(folder)).datamodule)

    def guard(moved: bool) -> None:
        if moved:
            refuse_missing_root(overrides)
        refuse_other_data(folder, stages, task_of(recipe), data_of, moved=moved)

    write_config(
        folder,
        dump(whole, absolute=PLACES),
        _settings_of,
        resume=resume,
        guard=guard,
    )


def _write_environment(folder: Path, now: dict[str, Any]) -> None:
    """Write the environment of a run; that of its start stays, and each resumption is noted beside it."""
    path = folder / "environment.json"
    if path.exists():
        first = json.loads(path.read_text(encoding="utf-8"))
        resumed = {key: now[key] for key in ("date", "command", "precision")}
        now = {**first, "resumed": [*first.get("resumed", []), resumed]}
    write_json(path, now)


def _description(cli: LightningCLI) -> str:
    task = cast(Task, cli.model)
    device = cli.trainer.strategy.root_device.type
    where = f"{device}, {cli.trainer.precision}, {torch.get_num_threads()} threads"
    return f"{task.batchformer.arm}, seed {task.seed}, {where}"


def quiet() -> None:
    """Silence Lightning's notes on hardware and tips, and leave out the place of a warning: neither helps a user."""
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
    """Remove the records of a run that never saved anything, so that it can be started afresh; leave other files."""
    if any((folder / "checkpoints").glob("*.ckpt")):
        return
    for name in ("config.yaml", "environment.json", "metrics.csv"):
        (folder / name).unlink(missing_ok=True)
    for empty in (folder / "checkpoints", folder):
        with suppress(OSError):
            empty.rmdir()
