"""One run: its records, its resumption, its export."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batchformer.engine import config
from batchformer.engine import run as engine
from batchformer.engine.config import ConfigError, parse
from batchformer.engine.export import export
from batchformer.engine.recipes import find_recipe
from batchformer.tasks.longtail.paco import PaCo
from batchformer.tasks.longtail.restore import load_export, load_network

RECIPE = find_recipe("longtail/folder").path


Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run(small: Callable[..., list[str]]) -> Run:
    def fit_small(folder: Path, *more: str, resume: bool = False, epochs: int = 3) -> dict[str, Any]:
        overrides = small(*more, epochs=epochs)
        return engine.fit(RECIPE, overrides, folder, name="longtail/folder", resume=resume, command="test")

    return fit_small


def same_end(one: Path, other: Path) -> None:
    results = [json.loads((folder / "result.json").read_text()) for folder in (one, other)]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["per_class"] == results[1]["per_class"]
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    states = [torch.load(f / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for f in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.fixture(scope="module")
def finished(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    os.environ.setdefault("BATCHFORMER_DATA", str(folder.parent / "data"))
    run(folder)
    return folder


def test_a_run_leaves_complete_records(finished: Path) -> None:
    assert (finished / "done").exists()
    result = json.loads((finished / "result.json").read_text())
    assert result["arm"] == "batchformer"
    assert set(result["metrics"]) == {"top1", "top5", "many", "medium", "few", "macro_f1", "ece"}
    assert [entry["name"] for entry in result["per_class"]] == ["blue", "green", "red"]
    cost = result["cost"]
    assert cost["parameters_train"] - cost["parameters_test"] == 6 * 64**2 + 10 * 64
    assert cost["peak_memory_mb"] > 50
    assert cost["training_memory_mb"] is None or 0 <= cost["training_memory_mb"] < cost["peak_memory_mb"]
    assert result["notes"] == [
        "Many: classes with more than 10 training images; few: with fewer than 7; medium: the others. Each group's "
        "value is the mean over its classes."
    ]
    assert result["host"]["precision"] in ("32-true", "bf16-mixed")
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["versions"]["torch"] and environment["hardware"]["cores"] and environment["command"] == "test"
    rows = list(csv.DictReader((finished / "metrics.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert all(float(row["train_loss"]) > 0 and row["val_top1"] and row["lr_batchformer"] for row in rows)
    # The resolved config is a recipe again.
    assert parse(finished / "config.yaml", logger=False).model.optimizer_settings.lr == 0.05


def test_a_run_may_be_moved_and_go_on_elsewhere(
    run: Run, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder, the terminal and the device do not belong to the settings."""
    shutil.copytree(finished, tmp_path / "moved")
    for file in ("done", "result.json"):
        (tmp_path / "moved" / file).unlink()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(tmp_path / "moved", resume=True)
    same_end(finished, tmp_path / "moved")
    environment = json.loads((tmp_path / "moved" / "environment.json").read_text())
    first = json.loads((finished / "environment.json").read_text())
    assert environment["date"] == first["date"]
    assert [note["command"] for note in environment["resumed"]] == ["test"]


def test_a_finished_run_is_not_another_one(run: Run, finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.optimizer.lr: 0.5 \(was: 0.05\)"):
        run(finished, "--model.optimizer.lr=0.5", resume=True)


def test_other_data_is_refused_on_resume(run: Run, finished: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "done").unlink()
    more = images / "blue" / "new.png"
    for index in range(4):
        shutil.copy(images / "blue" / "0.png", more.with_stem(f"new{index}"))
    try:
        with pytest.raises(ValueError, match="the training images of each class have changed"):
            run(tmp_path / "run", resume=True)
    finally:
        for index in range(4):
            more.with_stem(f"new{index}").unlink()
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_a_run_without_training_is_a_run(run: Run, tmp_path: Path) -> None:
    result = run(tmp_path / "run", epochs=0)
    assert engine.test(tmp_path / "run") == result["metrics"]
    assert (tmp_path / "run" / "metrics.csv").read_text() == "epoch,step\n"


@pytest.mark.parametrize("word", ["--trainer.fast_dev_run=true", "--trainer.limit_test_batches=0"])
def test_a_run_that_would_not_be_saved_or_tested_is_refused(word: str, run: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"For a quick trial set trainer.max_epochs=1"):
        run(tmp_path / "run", word)
    assert not (tmp_path / "run").exists()


def test_precision_is_said_and_recorded(
    run: Run, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert run(tmp_path / "run", "--precision=32-true", epochs=1)["host"]["precision"] == "32-true"
    assert ", cpu, 32-true, " in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["precision"] == "32-true"
    auto = json.loads((finished / "environment.json").read_text())["precision"]
    assert auto == config.resolve_precision("auto")


@pytest.mark.parametrize(("flags", "expected"), [("fpu avx512_bf16 avx", "bf16-mixed"), ("fpu avx2", "32-true")])
def test_automatic_precision_asks_the_processor(flags: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: f"flags : {flags}\n")
    assert config.resolve_precision("auto") == expected


def test_training_learns(finished: Path) -> None:
    rows = list(csv.DictReader((finished / "metrics.csv").read_text().splitlines()))
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_an_existing_run_is_not_overwritten(run: Run, finished: Path) -> None:
    before = (finished / "result.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"has a run already. Go on with --resume, or choose another --name"):
        run(finished)
    assert run(finished, resume=True) == json.loads(before)
    assert (finished / "result.json").read_bytes() == before


def test_other_settings_are_refused_on_resume(run: Run, finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text((finished / "config.yaml").read_text())
    with pytest.raises(ConfigError, match=r"(?s)settings that .* was started with, got others:.*lr: 0.5 \(was: 0.05\)"):
        run(folder, "--model.optimizer.lr=0.5", resume=True)


def test_the_plain_network_gives_the_recorded_metrics(finished: Path) -> None:
    assert engine.test(finished) == json.loads((finished / "result.json").read_text())["metrics"]
    network, facts, *_ = load_network(finished)
    assert not any("batchformer" in key for key in network.state_dict())
    assert sum(facts.counts) < 44
    assert not network.training


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected a run folder with checkpoints/last.ckpt"):
        load_network(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="a checkpoint of the task 'longtail', got .* without the entry"):
        load_network(tmp_path / "other.ckpt")
    with pytest.raises(
        FileNotFoundError, match=r"Expected a run folder with checkpoints/last.ckpt, .* Train one with batchformer fit"
    ):
        engine.test(tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", ["plain", "ride", "paco"])
def test_exports_equal_the_plain_network(kind: str, run: Run, finished: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from safetensors.torch import load_file

    folder = finished
    if kind != "plain":
        folder = tmp_path / kind
        more = ["--data.two_views=true", "--model.network.settings.queue_size=8"] if kind == "paco" else []
        run(folder, f"--model.network.kind={kind}", f"--model.loss.name={kind}", *more, epochs=1)
    written = export(folder, tmp_path / "out")
    assert [path.name for path in written] == ["model.safetensors", "model.onnx", "model.json"]
    network, facts, *_ = load_network(folder)
    state = load_file(tmp_path / "out" / "model.safetensors")
    plain = network.plain() if isinstance(network, PaCo) else network
    assert state.keys() == plain.state_dict().keys()
    assert not any(word in key for key in state for word in ("batchformer", "queue", "key_"))
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    for rows in (1, 5):  # any batch size
        x = torch.randn(rows, facts.in_channels, facts.image_size, facts.image_size)
        with torch.no_grad():
            expected = network(x)
        expected = expected.mean(1) if kind == "ride" else expected
        (found,) = session.run(None, {"images": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)
    # The same without the run folder.
    x = torch.randn(3, facts.in_channels, facts.image_size, facts.image_size)
    with torch.no_grad():
        assert torch.equal(load_export(tmp_path / "out")(x), plain(x))
    facts_written = json.loads((tmp_path / "out" / "model.json").read_text())
    assert facts_written["classes"] == ["blue", "green", "red"]
    with pytest.raises(ValueError, match=r"formats out of .* got \['pickle'\]"):
        export(folder, tmp_path / "out", ("pickle",))


def test_routed_experts_are_tested_and_not_written_as_onnx(run: Run, tmp_path: Path) -> None:
    ride = ["--model.network.kind=ride", "--model.loss.name=ride", "--precision=32-true"]
    run(tmp_path / "first", *ride, epochs=1)
    # Words of an earlier version are understood, and named in today's terms.
    stage = ["--model.stage.second=routing", f"--model.stage.start_from={tmp_path / 'first'}"]
    with pytest.warns(FutureWarning, match=r"model.stage.second, .* In today's words they are: .*--stages=.*routing"):
        result = run(tmp_path / "second", *ride, *stage, epochs=1)
    data = parse(tmp_path / "second" / "config.yaml", logger=False).datamodule
    data.setup()
    [(images, _)] = data.test_dataloader()
    used = load_network(tmp_path / "second").network(images).experts_used
    assert result["metrics"]["share_of_experts_used"] == pytest.approx(float(used) / 3)
    assert engine.test(tmp_path / "second") == result["metrics"]
    with pytest.raises(ValueError, match=r"got routed experts, which ONNX cannot say. Give --format=safetensors"):
        export(tmp_path / "second", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(export(tmp_path / "second", tmp_path / "out", ("safetensors",))) == 2
    x = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(load_export(tmp_path / "out")(x).logits, load_network(tmp_path / "second").network(x).logits)
    (tmp_path / "out" / "model.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"model.json, but there is none. batchformer export RUN writes it"):
        load_export(tmp_path / "out")


@pytest.mark.parametrize(("format", "package"), [("safetensors", "safetensors.torch"), ("onnx", "onnx")])
def test_a_missing_package_names_the_extra(
    format: str, package: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{format} is missing: pip install 'batchformer\[export\]'"):
        export(finished, tmp_path, (format,))


# ---------------------------------------------------------------- interruption


class Stopped(Exception):
    """Somebody pulled the plug."""


@pytest.mark.parametrize(
    "more",
    [
        ["--data.sampler=progressive", "--model.optimizer.warmup_epochs=2"],
        ["--data.mixup_alpha=0.4", "--data.cutmix_alpha=1.0", "--precision=32-true"],
        ["--model.loss.name=ldam", "--model.loss.settings.reweight_epoch=2", "--model.network.cosine=true"],
    ],
    ids=["progressive", "mixup", "deferred"],
)
def test_resumes_to_the_same_end(more: list[str], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchformer.tasks.longtail.task import LongTailTask

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, *more)
    original = LongTailTask.training_step

    def failing(self: LongTailTask, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 1 and batch_idx == 1:
            raise Stopped
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patched:
        patched.setattr(LongTailTask, "training_step", failing)
        with pytest.raises(Stopped):
            run(broken, *more)
    assert not (broken / "done").exists()
    run(broken, *more, resume=True)
    same_end(whole, broken)


def started(
    small: Callable[..., list[str]], out: Path, name: str, resume: bool = False, epochs: int = 40
) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "batchformer", "fit", "longtail/folder", f"--out={out}", f"--name={name}"]
    command += [*(["--resume"] if resume else []), *small(epochs=epochs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )


def ended_well(process: "subprocess.Popen[str]") -> None:
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr


def wait_for_epochs(folder: Path, epochs: int, process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end and process.poll() is None:
        file = folder / "metrics.csv"
        if file.exists() and len(file.read_text().splitlines()) > epochs:
            return
        time.sleep(0.005)
    raise AssertionError(f"never came to epoch {epochs}: {process.communicate()}")


@pytest.mark.slow  # test_kills.py does the same in less time, at chosen places
@pytest.mark.timeout(400)
def test_killed_at_any_moment_and_resumed_ends_with_the_same_numbers(
    small: Callable[..., list[str]], tmp_path: Path
) -> None:
    """SIGKILL twice, at different moments of real processes; nothing is tidied up."""
    whole = started(small, tmp_path, "whole")
    ended_well(whole)
    for turn, (epochs, pause) in enumerate([(2, 0.0), (7, 0.02)]):
        process = started(small, tmp_path, "killed", resume=turn > 0)
        wait_for_epochs(tmp_path / "killed", epochs, process)
        time.sleep(pause)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "killed" / "done").exists()
    last = started(small, tmp_path, "killed", resume=True)
    ended_well(last)
    same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="the shell has Ctrl-C ignored")
@pytest.mark.timeout(200)
def test_ctrl_c_says_how_to_go_on(small: Callable[..., list[str]], tmp_path: Path) -> None:
    process = started(small, tmp_path, "run", epochs=4000)
    wait_for_epochs(tmp_path / "run", 2, process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Interrupted. Nothing is lost: go on with" in stderr
    assert "--name=run" in stderr and "--resume" in stderr
    assert "Traceback" not in stderr
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


def test_a_run_that_never_saved_leaves_no_trace_but_what_was_there(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="nowhere"):
        run(folder, f"--data.root={tmp_path / 'nowhere'}")
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_a_loss_that_is_not_finite_stops_the_run(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        FloatingPointError,
        match=r"finite loss, got (nan|inf). This was in epoch \d+, batch \d+. Lower model.optimizer.lr",
    ):
        run(tmp_path / "run", "--model.optimizer.lr=1e30", "--precision=32-true")
