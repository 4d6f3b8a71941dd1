"""Every parameter that trains is in exactly one group, with its own rate; a group that trains nothing is an error."""

from typing import Any

import pytest
import torch
from torch import nn

from batchformer.tasks.detection.model import build_network
from batchformer.tasks.detection.settings import NetworkSettings
from batchformer.tasks.set_prediction.backbone import BackboneSettings
from batchformer.tasks.set_prediction.optimizer import DetectorOptimizerSettings, parameter_groups
from batchformer.tasks.training.arms import insert_arm
from batchformer.tasks.training.settings import BatchFormerSettings

RATES = DetectorOptimizerSettings(lr=1e-3, backbone_lr=1e-4, weight_decay=0.01)


def detector(kind: Any = "deformable_detr", trains: Any = "from_stride_8", arm: Any = "batchformer") -> Any:
    backbone = BackboneSettings("resnet18", pretrained=False, trains=trains, strides=[32])
    sizes: dict[str, Any] = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "ffn_dim": 16, "num_queries": 5}
    made = build_network(NetworkSettings(kind, backbone, feature_levels=1, **sizes), 3)
    insert_arm(made, arm, after=["model.encoder.layers.0"])
    return made


@pytest.mark.parametrize("kind", ["detr", "conditional_detr", "deformable_detr", "smca"])
@pytest.mark.parametrize("trains", ["nothing", "from_stride_8", "all"])
@pytest.mark.parametrize("arm", ["plain", "batchformer", "frozen"])
def test_each_parameter_that_trains_is_in_one_group(kind: str, trains: str, arm: str) -> None:
    network = detector(kind, trains, arm)
    groups = parameter_groups(network, RATES, BatchFormerSettings(lr_mult=0.5))
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in network.parameters() if p.requires_grad)
    names = {"network"} | ({"backbone"} if trains != "nothing" else set())
    names |= {"batchformer"} if arm == "batchformer" else set()
    names |= {"sampling"} if kind == "deformable_detr" else set()
    assert {group["name"] for group in groups} == names
    rates = {"network": 1e-3, "backbone": 1e-4, "batchformer": 5e-4, "sampling": 1e-4}
    for group in groups:
        assert group["lr"] == pytest.approx(rates[group["name"]])
        assert group["params"]
    torch.optim.AdamW(groups)


def test_the_sampling_group_is_offsets_and_reference_points() -> None:
    network = detector()
    (sampling,) = [g for g in parameter_groups(network, RATES, BatchFormerSettings()) if g["name"] == "sampling"]
    names = {id(p): name for name, p in network.named_parameters()}
    found = {names[id(p)].rsplit(".", 1)[0] for p in sampling["params"]}
    assert found == {
        "model.reference_points",
        *(f"model.encoder.layers.{i}.self_attn.sampling_offsets" for i in (0, 1)),
        *(f"model.decoder.layers.{i}.encoder_attn.sampling_offsets" for i in (0, 1)),
    }


def test_decay_may_leave_vectors_out_and_the_module_has_its_own() -> None:
    network = detector()
    settings = DetectorOptimizerSettings(weight_decay=0.01, decay_norm_and_bias=False)
    groups = {g["name"]: g for g in parameter_groups(network, settings, BatchFormerSettings(weight_decay_mult=3.0))}
    assert groups["network_no_decay"]["weight_decay"] == 0
    assert all(p.dim() == 1 for p in groups["network_no_decay"]["params"])
    assert groups["batchformer"]["weight_decay"] == pytest.approx(0.03)


def test_a_backbone_that_should_train_and_does_not_is_an_error() -> None:
    network = detector()
    network.model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match=r"train in the backbone \(trains='from_stride_8'\), but all are frozen"):
        parameter_groups(network, RATES, BatchFormerSettings())


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="all of the network's are frozen"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), RATES, BatchFormerSettings())
