"""Real processes that are killed or interrupted anywhere, and go on to the same numbers, bit for bit."""

import csv
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import Command
from ranks import processes

pytestmark = [
    processes,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]
Small = Callable[..., list[str]]


def same_end(one: Path, other: Path) -> None:
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["per_class"] == results[1]["per_class"]
    assert (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()
    states = [torch.load(folder / "checkpoints/last.ckpt", weights_only=True) for folder in (one, other)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(states[0][key], states[1][key])


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for first, second in zip(one, other, strict=True):
            assert_equal(first, second)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


# Each run has 3 epochs of 4 steps (31 training images, batches of 8, the last one dropped): 12 steps.
EPOCHS, STEPS = 3, 3
KINDS = {
    "average": ["--model.ema=0.7", "--data.sampler=progressive", "--model.optimizer.warmup_epochs=2"],
    "ride": [  # in two stages, the second of one epoch
        "--model.network.kind=ride",
        "--model.loss.name=ride",
        "--model.loss.settings.reweight_epoch=1",
        "--data.mixup_alpha=0.5",
        "--stages.train.epochs=2",
        "--stages.routing.epochs=1",
        "--stages.routing.settings.data.mixup_alpha=0",
    ],
    "paco": [
        "--model.network.kind=paco",
        "--model.network.settings.queue_size=16",
        "--model.loss.name=paco",
        "--data.two_views=true",
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_again_and_again_ends_with_the_same_numbers(
    kind: str, command: Command, small: Small, tmp_path: Path
) -> None:
    settings = [*small(*KINDS[kind], epochs=None if kind == "ride" else EPOCHS), f"--out={tmp_path}"]
    status, said = command.run("fit", "longtail/folder", "--name=whole", *settings)
    assert status == 0, said
    lines = said.splitlines()  # no warning, no progress bar, no word of Lightning's
    assert [line.split()[0] for line in lines] == ["Training", "top1", "Run:"], said
    with (tmp_path / "whole" / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == [str(STEPS * (e + 1)) for e in range(EPOCHS)]
    dice = random.Random(kind)
    traps = [
        f"at_step:{dice.randrange(STEPS)}",  # before the first checkpoint
        "in_checkpoint:0",  # the first one, half written
        f"at_step:{STEPS + dice.randrange(STEPS)}",  # in the second epoch, counted from the first
        "in_checkpoint:0",  # the second one: the first must stay
        "in_file:metrics.csv",
        *(["in_file:train.ckpt"] if kind == "ride" else []),  # between the stages
        f"at_step:{dice.randrange(STEPS)}",  # in the second epoch or in the last
        "in_test",  # nothing is left to train
        "in_file:result.json",
        "in_file:done",
    ]
    folder = tmp_path / "killed"
    for trap in traps:
        status, said = command.run("fit", "longtail/folder", "--name=killed", *settings, "--resume", trap=trap)
        assert status == -signal.SIGKILL, (trap, said)
        assert not (folder / "done").exists()
        checkpoint = folder / "checkpoints" / "last.ckpt"
        if checkpoint.exists():
            torch.load(checkpoint, weights_only=True)
        if (folder / "result.json").exists():
            json.loads((folder / "result.json").read_text())
    status, said = command.run("fit", "longtail/folder", "--name=killed", *settings, "--resume")
    assert status == 0, said
    same_end(tmp_path / "whole", folder)
    assert len(json.loads((folder / "environment.json").read_text())["resumed"]) == len(traps)
    # Nothing half written is left over in the end.
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == sorted(
        ["config.yaml", "environment.json", "metrics.csv", "result.json", "done", "last.ckpt"]
        + (["train.ckpt"] if kind == "ride" else [])
    )
    status, said = command.run("fit", str(folder), "--resume")
    assert (status, "is finished already" in said) == (0, True)


TINY = [
    "--data.size=64",
    "--data.batch_size=4",
    "--data.eval_batch_size=4",
    "--data.num_workers=0",
    "--model.network.backbone.pretrained=false",
    "--model.network.d_model=32",
    "--model.network.ffn_dim=32",
    "--model.network.encoder_layers=2",
    "--model.network.decoder_layers=2",
    "--model.network.num_queries=8",
    "--model.network.dropout=0.1",
    "--model.optimizer.warmup_epochs=0",
    "--trainer.check_val_every_n_epoch=1",
]


def killed_and_resumed(
    command: Command, recipe: str, settings: list[str], traps: list[tuple[str, int]], folder: Path
) -> None:
    """Killed at each trap, with so many epochs in metrics.csv by then, a run ends as one that was left alone does."""
    words = ["fit", recipe, *settings, f"--out={folder}"]
    for trap, epochs in traps:
        status, said = command.run(*words, "--name=killed", "--resume", trap=trap)
        assert status == -signal.SIGKILL, (trap, said)
        table = folder / "killed" / "metrics.csv"
        assert (len(table.read_text().splitlines()) - 1 if table.exists() else 0) == epochs, trap
        assert not (folder / "killed" / "done").exists()
    for more in (["--name=killed", "--resume"], ["--name=whole"]):
        status, said = command.run(*words, *more)
        assert status == 0, said
    same_end(folder / "whole", folder / "killed")
    assert len(json.loads((folder / "killed" / "environment.json").read_text())["resumed"]) == len(traps)


# Detectors have 3 epochs of 2 steps: 8 training images, batches of 4. An epoch's row is written before its checkpoint.


@pytest.mark.slow
def test_a_killed_detector_ends_with_the_same_numbers(
    command: Command, write_coco: Callable[..., Path], tmp_path: Path
) -> None:
    root = write_coco(tmp_path / "coco", {"train": 8, "val": 4, "test": 4})
    settings = [f"--data.root={root}", *TINY, "--model.network.backbone.name=resnet18", "--trainer.max_epochs=3"]
    traps = [("at_step:1", 0), ("at_step:3", 1), ("in_checkpoint:0", 2), ("in_file:result.json", 3)]
    killed_and_resumed(command, "detection/folder", settings, traps, tmp_path / "runs")


@pytest.mark.slow
def test_a_mask_head_killed_on_its_detector_ends_with_the_same_numbers(
    command: Command, write_panoptic: Callable[..., Path], tmp_path: Path
) -> None:
    """The first epoch is the detector's: what trains the mask head was not there when the first checkpoint was."""
    root = write_panoptic(tmp_path / "panoptic", count=8)
    settings = [f"--data.root={root}", *TINY, "--stages.detector.epochs=1", "--stages.masks.epochs=2"]
    traps = [
        ("in_file:detector.ckpt", 1),
        ("at_step:1", 1),
        ("in_checkpoint:0", 2),
        ("at_step:3", 2),
        ("in_file:result.json", 3),
    ]
    killed_and_resumed(command, "panoptic/folder", settings, traps, tmp_path / "runs")


def wait_for(file: Path, lines: int) -> None:
    end = time.monotonic() + 120
    while not file.exists() or len(file.read_text().splitlines()) < lines:
        assert time.monotonic() < end, f"{file} never came to {lines} lines"
        time.sleep(0.005)


def test_ctrl_c_in_a_run_resumes_where_it_stopped(command: Command, small: Small, tmp_path: Path) -> None:
    settings = [*small(epochs=20), f"--out={tmp_path}"]
    words = ["fit", "longtail/folder", "--name=my run", *settings]
    pid = command.start(*words)
    wait_for(tmp_path / "my run" / "metrics.csv", 4)
    os.killpg(pid, signal.SIGINT)
    status, said = command.end()
    assert status == 130, said
    assert "Traceback" not in said
    assert said.splitlines()[-1].strip().startswith("batchformer fit longtail/folder '--name=my run' --data.root=")
    assert said.rstrip().endswith("--resume")
    pid = command.start(*words, "--resume")
    wait_for(tmp_path / "my run" / "metrics.csv", 8)
    os.killpg(pid, signal.SIGTERM)  # a batch system's way to ask
    status, said = command.end()
    assert (status, "Traceback" in said) == (130, False), said
    assert command.run(*words, "--resume")[0] == 0
    assert command.run("fit", "longtail/folder", "--name=whole", *settings)[0] == 0
    same_end(tmp_path / "whole", tmp_path / "my run")


def ended(session: int) -> None:
    """Nothing that a process has started outlives it for long."""
    end = time.monotonic() + 20
    while others := [process for process in psutil.process_iter() if in_session(process.pid, session)]:
        assert time.monotonic() < end, others
        time.sleep(0.05)


def in_session(pid: int, session: int) -> bool:
    try:
        return os.getsid(pid) == session
    except OSError:
        return False


def interrupted(command: Command, pid: int) -> None:
    """Ctrl-C reaches all processes of the terminal; the comparison alone answers."""
    os.killpg(pid, signal.SIGINT)
    status, said = command.end()
    assert status == 130, said
    assert not any(word in said for word in ("Traceback", "Warning", "leaked")), said
    assert said.rstrip().endswith("--resume")
    ended(pid)


def test_ctrl_c_while_the_first_run_is_started_is_not_lost(command: Command, small: Small, tmp_path: Path) -> None:
    pid = command.start("compare", "longtail/folder", f"--out={tmp_path}", "--name=both", *small(epochs=20000))
    wait_for(tmp_path / "both" / "compare.json", 1)
    interrupted(command, pid)
    assert list(tmp_path.rglob("both*")) == []


def test_a_finished_comparison_leaves_nothing_behind(command: Command, small: Small, tmp_path: Path) -> None:
    """Its runs end by themselves: a killed one would leave semaphores, which Python warns about at the very end."""
    status, said = command.run("compare", "longtail/folder", f"--out={tmp_path}", "--seeds=1", *small(epochs=1))
    assert status == 0, said
    assert not any(word in said for word in ("Traceback", "Warning", "leaked")), said
    assert "Report: " in said.splitlines()[-1]


def test_a_comparison_goes_on_at_once_after_a_kill_and_after_ctrl_c(
    command: Command, small: Small, tmp_path: Path
) -> None:
    """The run ends with the comparison; while it still holds its folder, the next attempt waits for that."""
    words = ["compare", "longtail/folder", f"--out={tmp_path}", "--name=both", *small(epochs=20000)]
    run = tmp_path / "both" / "plain" / "seed0"
    killed = command.start(*words)
    wait_for(run / "metrics.csv", 3)
    os.kill(killed, signal.SIGKILL)
    assert command.end()[0] == -signal.SIGKILL
    rows = len((run / "metrics.csv").read_text().splitlines())
    again = command.start(*words, "--resume")
    wait_for(run / "metrics.csv", rows + 2)
    ended(killed)
    interrupted(command, again)
    torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(json.loads((run / "environment.json").read_text())["resumed"]) == 1
    assert json.loads((tmp_path / "both" / "compare.json").read_text())["seeds"] == [0, 1, 2]


def process_of(run: Path, session: int) -> psutil.Process:
    """The process that trains in a run folder, by the lock that it holds."""
    lock = str((run / ".lock").resolve())
    processes = [psutil.Process(process.pid) for process in psutil.process_iter() if in_session(process.pid, session)]
    [found] = [process for process in processes if lock in [file.path for file in process.open_files()]]
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_is_named_and_the_others_go_on(
    number: signal.Signals, command: Command, small: Small, tmp_path: Path
) -> None:
    words = ["compare", "longtail/folder", f"--out={tmp_path}", "--seeds=1", "--controls=duplicate", *small(epochs=40)]
    parent = command.start(*words, "--name=killed", "--jobs=2")
    run = tmp_path / "killed" / "batchformer" / "seed0"
    wait_for(run / "metrics.csv", 4)
    process_of(run, parent).send_signal(number)
    status, said = command.end()
    assert status == 2, said
    assert "Traceback" not in said
    assert "batchformer, seed 0: killed" in said and f"{tmp_path}/killed/report" in said
    code = -9 if number == signal.SIGKILL else 143
    last = said[said.index("batchformer compare: ") :]
    assert "Expected 3 finished runs, 1 did not finish:\n  batchformer, seed 0 killed: " in last
    assert f"ended from outside (exit code {code}" in last and "Try these again with --resume" in last
    assert json.loads((run / "failed.json").read_text())["reason"] == "killed"
    assert all((tmp_path / "killed" / arm / "seed0" / "done").exists() for arm in ("plain", "duplicate"))
    ended(parent)
    # The next try goes on where it was, to the numbers of one that was never killed, made one run at a time.
    status, said = command.run(*words, "--name=killed", "--resume")
    assert status == 0, said
    assert not (run / "failed.json").exists()
    assert len(json.loads((run / "environment.json").read_text())["resumed"]) == 1
    if number == signal.SIGKILL:
        assert command.run(*words, "--name=whole", "--jobs=1")[0] == 0
        for arm in ("plain", "batchformer", "duplicate"):
            same_end(tmp_path / "whole" / arm / "seed0", tmp_path / "killed" / arm / "seed0")


STOPS: dict[str, tuple[Callable[[int, int], None], int, int]] = {
    "Ctrl-C in the terminal": (os.killpg, signal.SIGINT, 130),
    "SIGTERM": (os.kill, signal.SIGTERM, 130),
    "SIGTERM to all": (os.killpg, signal.SIGTERM, 130),
    "kill -9": (os.kill, signal.SIGKILL, -signal.SIGKILL),
}


@pytest.mark.parametrize(
    "stop", [pytest.param(stop, marks=[pytest.mark.slow] if "SIGTERM to all" in stop else []) for stop in STOPS]
)
def test_two_runs_at_a_time_are_stopped_and_go_on(stop: str, command: Command, small: Small, tmp_path: Path) -> None:
    words = ["compare", "longtail/folder", f"--out={tmp_path}", "--name=both", "--jobs=2", *small(epochs=20000)]
    runs = [tmp_path / "both" / arm / "seed0" for arm in ("plain", "batchformer")]
    parent = command.start(*words)
    for run in runs:
        wait_for(run / "metrics.csv", 3)
    send, number, expected = STOPS[stop]
    send(parent, number)
    status, said = command.end()
    assert status == expected, said
    assert not any(word in said for word in ("Traceback", "Warning", "leaked")), said
    if expected == 130:
        assert said.rstrip().endswith("--resume")
    ended(parent)
    rows = []
    for run in runs:
        torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
        rows.append(len((run / "metrics.csv").read_text().splitlines()))
    again = command.start(*words, "--resume")
    for run, before in zip(runs, rows, strict=True):
        wait_for(run / "metrics.csv", before + 2)
    interrupted(command, again)
    assert [len(json.loads((run / "environment.json").read_text())["resumed"]) for run in runs] == [1, 1]


def test_the_server_of_the_runs_can_be_killed(command: Command, small: Small, tmp_path: Path) -> None:
    """Its runs go on, and the next ones get a new server."""
    words = ["compare", "longtail/folder", f"--out={tmp_path}", "--name=both", "--seeds=1", "--jobs=1"]
    parent = command.start(*words, *small(epochs=20))
    run = tmp_path / "both" / "plain" / "seed0"
    wait_for(run / "metrics.csv", 4)
    os.kill(process_of(run, parent).ppid(), signal.SIGKILL)
    status, said = command.end()
    assert status == 0, said
    assert (tmp_path / "both" / "batchformer" / "seed0" / "done").exists()
    ended(parent)
