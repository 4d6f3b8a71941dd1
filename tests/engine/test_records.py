"""Callbacks that record a run: which validation metrics are new, and step times that take no room."""

import random
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchformer.engine import environment as module
from batchformer.engine.callbacks import Cost, History
from batchformer.engine.environment import memory_mb, peak_memory_mb


def trainer(epoch: int, **metrics: float) -> Any:
    return SimpleNamespace(
        callback_metrics={name: torch.tensor(value) for name, value in metrics.items()},
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.1}])],
        current_epoch=epoch,
        global_step=epoch,
        is_global_zero=True,
    )


def test_an_epoch_without_validation_has_no_validation_metrics(tmp_path: Path) -> None:
    history, module = History(tmp_path / "metrics.csv"), SimpleNamespace()
    for epoch, validated in enumerate((False, True, False)):
        now = trainer(epoch, train_loss=1.0, val_top1=0.5)  # the Trainer keeps what was logged before
        history.on_train_epoch_start(now, module)  # type: ignore[arg-type]
        if validated:
            history.on_validation_end(now, module)  # type: ignore[arg-type]
        history.on_train_epoch_end(now, module)  # type: ignore[arg-type]
    assert ["val_top1" in row for row in history.rows] == [False, True, False]
    assert all(row["train_loss"] == 1.0 for row in history.rows)


def test_step_times_stay_few_and_keep_their_median() -> None:
    dice = random.Random(0)
    times = [dice.lognormvariate(0, 0.5) for _ in range(100_000)]
    cost, resumed = Cost(), Cost()
    for index, seconds in enumerate(times):
        cost._keep(seconds)
        if index == 50_000:
            resumed.load_state_dict(cost.state_dict())
        elif index > 50_000:
            resumed._keep(seconds)
    assert Cost.most / 2 <= len(cost.step_seconds) <= Cost.most
    assert cost.step_seconds == times[:: cost.stride]  # evenly over the whole run
    assert cost.step_ms() == pytest.approx(1000 * statistics.median(times), rel=0.05)
    assert resumed.state_dict() == cost.state_dict()


def test_the_steps_of_a_short_run_are_all_kept() -> None:
    cost = Cost()
    for seconds in range(Cost.most):
        cost._keep(float(seconds))
    assert cost.step_seconds == [float(seconds) for seconds in range(Cost.most)]


def test_memory_is_counted_from_the_start_of_training() -> None:
    cost, device = Cost(), torch.device("cpu")
    assert cost.memory_over_start_mb(100.0) is None  # nothing was trained
    assert cost.memory_over_start_mb(None) is None
    cost.on_train_start(SimpleNamespace(strategy=SimpleNamespace(root_device=device)), torch.nn.Linear(2, 3))  # type: ignore[arg-type]
    assert cost.parameters == 9
    before = memory_mb(device)
    if before is None:
        pytest.skip("this system does not tell")
    held = torch.ones(2**25)  # 128 MB
    after, peak = memory_mb(device), peak_memory_mb(device)
    assert after is not None and peak is not None
    assert after - before > 0.9 * held.numel() * 4 / 2**20
    over = cost.memory_over_start_mb(peak)
    assert over is not None
    assert over >= 0.9 * held.numel() * 4 / 2**20


def test_without_the_systems_word_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_resident_mb", lambda entry: None)
    peak = peak_memory_mb(torch.device("cpu"))
    assert peak is not None and 10 < peak < 1e6  # in MB, by getrusage
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory_mb(torch.device("cpu")) is None


def test_ctrl_c_while_a_checkpoint_is_written_is_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchformer.engine.run_files import WholeCheckpoints

    WholeCheckpoints().save_checkpoint({"a": 1}, tmp_path / "last.ckpt")

    def interrupted(checkpoint: object, file: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 64 vs 0")  # what torch's archive says at its end

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        WholeCheckpoints().save_checkpoint({"a": 2}, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
