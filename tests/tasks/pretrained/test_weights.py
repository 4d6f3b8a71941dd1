"""Weights by name and by order, from files and packages, and the ways out when there are none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from batchformer.tasks.pretrained import weights as module
from batchformer.tasks.pretrained.weights import LITE0, create_timm, load_weights, pixel_statistics, read_weights


def test_weights_of_the_same_network_under_other_names_and_with_more_behind_them() -> None:
    """As EfficientNet-Lite0's package has them: other names, the same order, then a classifier."""
    first, second = (create_timm(LITE0, pretrained=False, num_classes=0) for _ in range(2))
    renamed = {f"_{key.replace('blocks', 'layers')}": value for key, value in first.state_dict().items()}
    load_weights(second, {**renamed, "_fc.weight": torch.zeros(3)}, "it")
    assert all(value.equal(first.state_dict()[key]) for key, value in second.state_dict().items())
    with pytest.raises(ValueError, match="Expected the weights of it, got a file with others, such as"):
        load_weights(second, dict(reversed(renamed.items())), "it")


@pytest.mark.parametrize("kind", ["pth", "safetensors", "checkpoint"])
def test_weights_of_a_file(kind: str, tmp_path: Path) -> None:
    state = create_timm("resnet18", pretrained=False, num_classes=0).state_dict()
    file = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state} if kind == "checkpoint" else state, file)
    assert read_weights(file).keys() == state.keys()
    network = create_timm("resnet18", pretrained=True, weights=file, num_classes=0)
    assert all(value.equal(state[key]) for key, value in network.state_dict().items())
    with pytest.raises(FileNotFoundError, match="a file of weights, got .*none.pth, which is not there"):
        create_timm("resnet18", pretrained=True, weights=tmp_path / "none.pth")


def test_lite0_takes_the_weights_of_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task gets the same file, whatever part of the network it wants."""
    whole = create_timm(LITE0, pretrained=False, num_classes=5)
    torch.save(whole.state_dict(), tmp_path / "efficientnet-lite0-57934424.pth")
    monkeypatch.setattr(module.fetch, "get", lambda name: tmp_path)
    pooled = create_timm(LITE0, pretrained=True, num_classes=0)
    maps = create_timm(LITE0, pretrained=True, features_only=True, out_indices=(0, 1, 2))
    for network in (pooled, maps):
        for key, value in network.state_dict().items():
            assert value.equal(whole.state_dict()[key]), key
    assert pixel_statistics(LITE0) == ((127 / 255,) * 3, (128 / 255,) * 3)


def test_unknown_names_say_what_is_near() -> None:
    with pytest.raises(ValueError, match="Unknown backbone 'resnet5'. Did you mean .*resnet5"):
        create_timm("resnet5", pretrained=False)


def test_without_a_network_the_ways_out_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def offline(*args: Any, **options: Any) -> nn.Module:
        raise OSError("no connection\nand more")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(OSError, match=r"'resnet18' could not be loaded \(OSError: no connection\).*with a network.$"):
        create_timm("resnet18", pretrained=True)
    with pytest.raises(OSError, match=r"network. Or set this.$"):
        create_timm("resnet18", pretrained=True, advice="Or set this.")
