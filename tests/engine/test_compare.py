"""The comparison: same start and same data for every arm, and a word on each way to get it wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs_here import in_this_process

from batchformer.engine.compare import compare
from batchformer.engine.config import ConfigError, parse
from batchformer.engine.recipes import find_recipe
from batchformer.tasks.training.arms import ARMS

RECIPE = find_recipe("longtail/folder").path
Small = Callable[..., list[str]]


def compared(small: Small, folder: Path, *more: str, **arguments: Any) -> list[str]:
    said: list[str] = []
    settings: dict[str, Any] = {
        "seeds": [0],
        "controls": [],
        "name": "longtail/folder",
        "say": said.append,
        **arguments,
    }
    compare(RECIPE, small(*more, epochs=1), folder, **settings)
    return said


def set_up(small: Small, arm: str, seed: int = 3) -> Any:
    cli = parse(
        RECIPE, small(f"--seed={seed}", f"--model.batchformer.arm={arm}"), logger=False, enable_checkpointing=False
    )
    cli.datamodule.trainer = cli.trainer
    cli.trainer.datamodule = cli.datamodule
    cli.model.trainer = cli.trainer
    cli.datamodule.setup("fit")
    cli.model.setup("fit")
    return cli


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")
def test_every_arm_starts_alike_and_sees_the_same_batches(small: Small) -> None:
    starts, batches = {}, {}
    for arm in ARMS:
        cli = set_up(small, arm)
        state = cli.model.network.state_dict()
        starts[arm] = {key: value for key, value in state.items() if not key.startswith("batchformer.")}
        loader = cli.datamodule.train_dataloader()
        loader.sampler.set_epoch(1)
        torch.rand(17)  # what an arm draws from the global stream does not matter
        batches[arm] = list(loader)
    for arm in ARMS:
        assert starts[arm].keys() == starts["plain"].keys()
        assert all(torch.equal(starts[arm][key], starts["plain"][key]) for key in starts["plain"]), arm
        for (images, labels), (others, other_labels) in zip(batches["plain"], batches[arm], strict=True):
            assert torch.equal(images, others)
            assert torch.equal(labels, other_labels)
    another = set_up(small, "plain", seed=4)
    assert not torch.equal(another.model.network.classifier.weight, starts["plain"]["classifier.weight"])
    assert not torch.equal(next(iter(another.datamodule.train_dataloader()))[0], batches["plain"][0][0])


def test_trained_arms_start_from_the_same_module(small: Small) -> None:
    modules = {
        arm: set_up(small, arm).model.handle.modules[0]
        for arm in ("batchformer", "frozen", "self_only", "single_stream")
    }
    for module in modules.values():
        for one, other in zip(module.parameters(), modules["batchformer"].parameters(), strict=True):
            assert torch.equal(one, other)
    assert modules["self_only"].attend == "self"
    assert modules["single_stream"].mode == "single_stream"
    assert list(set_up(small, "duplicate").model.handle.modules[0].parameters()) == []
    assert set_up(small, "plain").model.handle is None


@pytest.mark.timeout(300)
def test_runs_resumes_and_grows(small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "compare"
    said = compared(small, folder, controls=["frozen"])
    assert [line.partition("]")[0] for line in said if line.startswith("[")] == ["[1/3", "[2/3", "[3/3"]
    plan = json.loads((folder / "compare.json").read_text())
    assert plan["arms"] == ["plain", "batchformer", "frozen"]
    assert plan["seeds"] == [0]
    # The frozen module is what it was at the start.
    state = torch.load(folder / "frozen/seed0/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    start = set_up(small, "frozen", seed=0).model.network.state_dict()
    for key in (key for key in start if key.startswith("batchformer.")):
        assert torch.equal(state[f"network.{key}"], start[key])
    with pytest.raises(FileExistsError, match=r"has a comparison already. Go on with --resume"):
        compared(small, folder)
    # What is finished is kept; seeds are added.
    kept = (folder / "plain/seed0/result.json").stat().st_mtime_ns
    said = compared(small, folder, seeds=[0, 1], resume=True)
    assert "(kept)" in said[0]
    assert (folder / "plain/seed0/result.json").stat().st_mtime_ns == kept
    assert (folder / "batchformer/seed1/done").exists()
    plan = json.loads((folder / "compare.json").read_text())
    assert (plan["arms"], plan["seeds"]) == (["plain", "batchformer", "frozen"], [0, 1])


@pytest.mark.parametrize(
    ("arguments", "more", "error", "message"),
    [
        (
            {"controls": ["random"]},
            [],
            ValueError,
            "controls out of frozen, self_only, duplicate, single_stream, got random",
        ),
        ({"seeds": [1, 1]}, [], ValueError, r"different seeds, at least one, got \[1, 1\]"),
        ({"seeds": []}, [], ValueError, "at least one"),
        (
            {"controls": ["duplicate", "single_stream"]},
            ["--model.batchformer.mode=single_stream"],
            ConfigError,
            "it is the control single_stream itself. Leave that control out",
        ),
        ({}, ["--trainer.devices=2"], ConfigError, "train each run on one device, got trainer.devices=2"),
        ({}, ["--seed=4"], ConfigError, "compare to set the seed and the arm"),
        ({}, ["--model.batchformer.arm=plain"], ConfigError, "Give --seeds and --controls"),
        ({}, ["--model.optimizer.lrr=1"], ConfigError, "Did you mean model.optimizer.lr"),
    ],
)
def test_refusals(
    arguments: dict[str, Any], more: list[str], error: type, message: str, small: Small, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        compared(small, tmp_path / "compare", *more, **arguments)
    assert not (tmp_path / "compare").exists()  # the next try finds nothing in its way


def test_another_comparison_is_not_mixed_in(small: Small, tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(json.dumps({"recipe": "longtail/other", "arms": [], "seeds": []}))
    with pytest.raises(ValueError, match=r"comparison of longtail/folder in .*, found one of longtail/other"):
        compared(small, tmp_path, resume=True)


def test_resumed_without_its_seeds_a_comparison_keeps_them(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a finished run of other settings is not taken for one of these."""
    from batchformer.engine import compare as module

    monkeypatch.setattr(module, "run_jobs", in_this_process)
    compared(small, tmp_path / "both", seeds=[3, 5], controls=["duplicate"])
    (tmp_path / "both/duplicate/seed5/done").unlink()
    said = compared(small, tmp_path / "both", seeds=[3], resume=True)
    assert [line.split(":")[0] for line in said] == [
        f"[{n}/6] {arm}, seed {seed}"
        for n, (seed, arm) in enumerate(
            ((seed, arm) for seed in (3, 5) for arm in ("plain", "batchformer", "duplicate")), 1
        )
    ]
    assert (tmp_path / "both/duplicate/seed5/done").exists()
    plan = (tmp_path / "both/compare.json").read_text()
    with pytest.raises(ConfigError, match=r"model.optimizer.lr: 0.5 \(was: 0.05\)"):
        compared(small, tmp_path / "both", "--model.optimizer.lr=0.5", seeds=[3, 5, 6], resume=True)
    assert (tmp_path / "both/compare.json").read_text() == plan


def test_a_second_stage_is_not_compared(small: Small, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not trained in the stage crt, so every arm would be identical"):
        compared(small, tmp_path / "both", "--stages.crt.epochs=1", "--stages.crt.start_from=first")
    assert not (tmp_path / "both").exists()
