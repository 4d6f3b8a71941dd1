"""From what a run left behind to a network, whatever kind and stage."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from batchformer.tasks.longtail.model import build_network, build_stage
from batchformer.tasks.longtail.paco import PaCo
from batchformer.tasks.longtail.restore import LongTailFacts, exportable, load_network
from batchformer.tasks.longtail.ride import RIDE, RoutedExperts
from batchformer.tasks.longtail.settings import NetworkSettings
from batchformer.tasks.training.arms import insert_arm

FACTS = LongTailFacts(
    classes=["a", "b", "c"], counts=[9, 4, 2], groups={"many": [0], "medium": [1], "few": [2]},
    in_channels=1, image_size=16, mean=[0.5], std=[0.5],
)  # fmt: skip
KINDS = {
    "plain": NetworkSettings(),
    "cosine": NetworkSettings(cosine=True),
    "ride": NetworkSettings(kind="ride", experts=2),
    "paco": NetworkSettings(kind="paco", settings={"queue_size": 8, "embed_dim": 16}),
}


def network_of(settings: NetworkSettings) -> Any:
    return build_network(settings, 3, 1)


def saved(path: Path, network: nn.Module, settings: NetworkSettings, stage: str = "train") -> Path:
    state = {f"network.{key}": value for key, value in network.state_dict().items()}
    entry = {"stage": stage, "settings": {"network": asdict(settings)}, "facts": asdict(FACTS)}
    (path / "checkpoints").mkdir(parents=True)
    torch.save({"state_dict": state, "longtail": entry}, path / "checkpoints" / "last.ckpt")
    return path


def answer(network: nn.Module) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        answered = network.eval()(torch.randn(4, 1, 16, 16))
    return answered[0] if isinstance(answered, tuple) else answered


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [True, False])
def test_the_plain_network_comes_back_without_the_module(kind: str, share: bool, tmp_path: Path) -> None:
    network = network_of(KINDS[kind])
    plain = set(network.state_dict())
    insert_arm(network, "batchformer", before="auto", share=share)
    run = saved(tmp_path / "run", network, KINDS[kind])
    restored = load_network(run)
    assert set(restored.network.state_dict()) == plain
    assert not restored.network.training
    assert (restored.facts, restored.settings) == (FACTS, KINDS[kind])
    assert torch.equal(answer(restored.network), answer(network))
    assert torch.equal(answer(load_network(run / "checkpoints" / "last.ckpt").network), answer(network))


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        (NetworkSettings(settings={"foo": 3}), "none"),
        (NetworkSettings("resnet10", settings={"foo": 3}), "arguments of timm's resnet10"),
        (NetworkSettings("resnet18", settings={"foo": 3, "drop_rate": 0.1}), "arguments of timm's resnet18"),
        (NetworkSettings(kind="ride", settings={"foo": 3}), "none"),
        (NetworkSettings(kind="paco", settings={"foo": 3}), "embed_dim, momentum, queue_size"),
    ],
)
def test_settings_that_a_network_does_not_take_are_refused(settings: NetworkSettings, taken: str) -> None:
    with pytest.raises(ValueError, match=rf"this network takes \({taken}\), got foo.*argument 'foo'"):
        network_of(settings)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_beside_an_exported_network(kind: str, tmp_path: Path) -> None:
    run = saved(tmp_path / "run", network_of(KINDS[kind]), KINDS[kind])
    facts = exportable(run).facts
    assert ("experts" in facts["network"], "reduced" in facts["network"]) == (kind == "ride", kind == "ride")
    assert (facts["resize_short_side"], facts["centre_crop"], facts["image_size"]) == (16, 16, 16)


def test_restoring_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of(NetworkSettings())
    run = saved(tmp_path / "run", network, NetworkSettings(pretrained=True))
    assert load_network(run).settings.pretrained is False


@pytest.mark.parametrize("stage", ["crt", "lws", "tau"])
@pytest.mark.parametrize("kind", KINDS)
def test_later_stages_come_back(kind: str, stage: str, tmp_path: Path) -> None:
    network = build_stage(network_of(KINDS[kind]), stage, 0.5)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01)
    assert not isinstance(network, PaCo)
    restored = load_network(saved(tmp_path / "run", network, KINDS[kind], stage)).network
    assert torch.equal(answer(restored), answer(network))


def test_routed_experts_come_back(tmp_path: Path) -> None:
    routed = build_stage(network_of(KINDS["ride"]), "routing", 1.0)
    assert isinstance(routed, RoutedExperts)
    restored = load_network(saved(tmp_path / "run", routed, KINDS["ride"], "routing")).network
    assert torch.equal(answer(restored), answer(routed))


def test_only_ride_can_be_routed() -> None:
    with pytest.raises(ValueError, match="Expected a RIDE run to start from for 'routing', got a Network"):
        build_stage(network_of(KINDS["paco"]), "routing", 1.0)
    assert isinstance(network_of(KINDS["ride"]), RIDE)


def test_a_checkpoint_of_an_earlier_version_comes_back(tmp_path: Path) -> None:
    network = build_stage(network_of(KINDS["plain"]), "crt")
    run = saved(tmp_path / "run", network, KINDS["plain"], "crt")
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    old = {"network": asdict(KINDS["plain"]), "second": "crt", "data": asdict(FACTS)}
    torch.save({**checkpoint, "longtail": old}, run / "checkpoints" / "last.ckpt")
    restored = load_network(run)
    assert (restored.stage, restored.facts, restored.settings) == ("crt", FACTS, KINDS["plain"])
    assert torch.equal(answer(restored.network), answer(network))
    torch.save({**checkpoint, "longtail": {**old, "second": None}}, run / "checkpoints" / "last.ckpt")
    assert load_network(run).stage == "train"


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run folder with checkpoints/last.ckpt, or a checkpoint file, got"):
        load_network(tmp_path)
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="checkpoint of the task 'longtail'"):
        load_network(tmp_path / "other.ckpt")
