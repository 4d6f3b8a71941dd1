"""The way from a run folder back to a network."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchformer.tasks.training.checkpoint import CheckpointFormat, DataFacts, checkpoint_of


@dataclass(frozen=True)
class Facts(DataFacts):
    mean: list[float]
    groups: dict[str, list[int]]


FORMAT = CheckpointFormat("toy", Facts, lambda old: {"stage": old["part"], "settings": {}, "facts": old["data"]})
FACTS = {"classes": ["a", "b"], "counts": [3, 4], "mean": [0.5], "groups": {"many": [0]}}


def save(path: Path, **entries: Any) -> Path:
    state = {"network.layer": torch.ones(2), "network.batchformer.layer": torch.zeros(3), "criterion.x": torch.ones(1)}
    torch.save({"state_dict": state, **entries}, path)
    return path


def test_facts_are_read_off_a_data_module_in_plain_types() -> None:
    data = SimpleNamespace(
        classes=("a", "b"), counts=torch.tensor([3, 4]), mean=(0.5,), groups={"many": torch.tensor([0])}, other=1
    )
    assert Facts.of(data) == Facts(**FACTS)
    with pytest.raises(ValueError, match=r"This run was made by an older version of batchformer .* or train it again"):
        Facts.read({"classes": [], "counts": []})


def test_weights_of_the_network_and_of_batchformer_come_apart(tmp_path: Path) -> None:
    entry = {"stage": "train", "settings": {"width": 8}, "facts": FACTS}
    stored = FORMAT.read(save(tmp_path / "a.ckpt", toy=entry))
    assert (stored.stage, stored.settings, stored.facts) == ("train", {"width": 8}, Facts(**FACTS))
    assert {name: value.tolist() for name, value in stored.plain.items()} == {"layer": [1, 1]}
    assert {name: value.tolist() for name, value in stored.batchformer.items()} == {"layer": [0, 0, 0]}


def test_an_entry_of_an_earlier_version_is_translated(tmp_path: Path) -> None:
    stored = FORMAT.read(save(tmp_path / "a.ckpt", toy={"part": "masks", "data": FACTS}))
    assert (stored.stage, stored.settings, stored.facts) == ("masks", {}, Facts(**FACTS))


def test_a_checkpoint_of_another_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Expected a checkpoint of the task 'toy', got .*a.ckpt without the entry"):
        FORMAT.read(save(tmp_path / "a.ckpt", other={}))


def test_a_checkpoint_with_code_is_not_loaded(tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"toy": Code()}, tmp_path / "a.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="(?i)weights.only"):
        FORMAT.read(tmp_path / "a.ckpt")
    assert not (tmp_path / "ran").exists()


def test_the_way_out_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"with checkpoints/last.ckpt, .* go on with its --resume"):
        checkpoint_of(tmp_path)
    (tmp_path / "compare.json").touch()
    with pytest.raises(FileNotFoundError, match=r"got the comparison .* It has no run yet"):
        checkpoint_of(tmp_path)
    (tmp_path / "plain" / "seed0").mkdir(parents=True)
    (tmp_path / "plain" / "seed0" / "config.yaml").touch()
    with pytest.raises(FileNotFoundError, match=r"got the comparison .* Give one of its runs, such as .*plain/seed0\."):
        checkpoint_of(tmp_path)
