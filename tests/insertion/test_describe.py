"""describe() and param_groups()."""

import pytest
import torch
from torch import nn

from batchformer import BatchFormer, describe, insert, param_groups

OWN = 464  # parameters of a layer of width 8: 4 * 8 * 8 + 4 * 8 (attention), 2 * (8 * 8 + 8) (MLP), 4 * 8 (norms)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


# --- describe


def test_nothing_inserted() -> None:
    found = describe(net())
    assert str(found) == "No BatchFormer in this model."
    assert (found.parameters, found.trainable) == (0, 0)


def test_place_size_and_effect_of_a_classifiers_module() -> None:
    model = net()
    insert(model, before="4", num_heads=2, drop=0.1)
    found = describe(model)
    assert found.lines == (
        "BatchFormer before '4': dim 8, 2 heads, 1 layer, dropout 0.1, two_stream, 464 parameters (464 trained)",
        "  in training 2N rows [plain; mixed] from there on through '4'; in eval() the plain network",
    )
    assert (found.parameters, found.trainable) == (OWN, OWN)


def test_shared_and_own_weights() -> None:
    model = net()
    insert(model, after=["0", "2"])
    found = describe(model)
    assert "after '0', after '2': dim 8" in found.lines[0]
    assert "weights shared by 2 points" in found.lines[0]
    assert "through '4'" in found.lines[1]
    assert found.parameters == OWN
    model = net()
    insert(model, after=["0", "2"], share=False, layers=2)
    found = describe(model)
    assert [line.partition(":")[0] for line in found.lines[:2]] == ["BatchFormer after '0'", "BatchFormer after '2'"]
    assert "2 layers" in found.lines[0]
    assert found.parameters == 4 * OWN


def test_what_is_unusual_is_said() -> None:
    model = net()
    insert(model, before="4", mode="single_stream", attend="self", gather="all")
    found = str(describe(model))
    assert "single_stream, attend='self', gather='all'" in found
    assert "the N mixed rows alone" in found
    model = nn.Sequential(nn.Conv2d(3, 8, 1))
    insert(model, after="0", layout="BCHW")
    found = str(describe(model))
    assert "layout='BCHW'" in found
    assert "through the end" in found


def test_frozen_parameters_are_not_counted_as_trained() -> None:
    model = net()
    insert(model, before="4").modules[0].requires_grad_(False)
    found = describe(model)
    assert (found.parameters, found.trainable) == (OWN, 0)
    assert "(0 trained)" in str(found)


def test_modules_put_there_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 8), BatchFormer(8))
    insert(model, after="0")
    found = describe(model)
    assert found.lines[0].startswith("BatchFormer after '0'")
    assert found.lines[-1].startswith("BatchFormer as module '1'")
    assert found.parameters == 2 * OWN
    assert describe(BatchFormer(8)).lines[0].startswith("BatchFormer as module 'itself'")


# --- param_groups


def test_multipliers_of_the_module() -> None:
    model = net()
    handle = insert(model, before="4")
    network, own = param_groups(
        model, lr=0.2, batchformer_lr_mult=0.1, weight_decay=0.5, batchformer_weight_decay_mult=10.0
    )
    assert (network["name"], network["weight_decay"]) == ("network", 0.5)
    assert network["lr"] == pytest.approx(0.2)
    assert (own["name"], own["weight_decay"]) == ("batchformer", 5.0)
    assert own["lr"] == pytest.approx(0.02)
    assert {id(p) for p in own["params"]} == {id(p) for p in handle.modules[0].parameters()}


def test_vectors_without_decay() -> None:
    model = net()
    insert(model, before="4")
    groups = {g["name"]: g for g in param_groups(model, lr=0.1, weight_decay=0.5, decay_norm_and_bias=False)}
    assert set(groups) == {"network", "network_no_decay", "batchformer", "batchformer_no_decay"}
    for name, group in groups.items():
        vectors = name.endswith("no_decay")
        assert {p.dim() for p in group["params"]} == {1 if vectors else 2}
        assert group["weight_decay"] == (0.0 if vectors else 0.5)


def test_every_trained_parameter_exactly_once() -> None:
    model = net()
    model.add_module("tied", model[0])
    insert(model, after=["0", "2"], share=False)
    insert(model, before="4")
    model[1].requires_grad_(False)
    for decay_all in (True, False):
        groups = param_groups(model, lr=0.1, weight_decay=0.1, decay_norm_and_bias=decay_all)
        ids = [id(p) for group in groups for p in group["params"]]
        assert len(ids) == len(set(ids))
        assert set(ids) == {id(p) for p in model.parameters() if p.requires_grad}


def test_empty_groups_are_left_out() -> None:
    model = net()
    assert [g["name"] for g in param_groups(model, lr=0.1)] == ["network"]
    insert(model, before="4").modules[0].requires_grad_(False)
    assert [g["name"] for g in param_groups(model, lr=0.1, batchformer_lr_mult=0.1)] == ["network"]
    assert [g["name"] for g in param_groups(BatchFormer(8), lr=0.1)] == ["batchformer"]
    with pytest.raises(ValueError, match="all of the model's are frozen"):
        param_groups(model.requires_grad_(False), lr=0.1)


@pytest.mark.parametrize("value", [-1.0, -1e-9, float("nan")])
@pytest.mark.parametrize("name", ["lr", "weight_decay", "batchformer_lr_mult", "batchformer_weight_decay_mult"])
def test_negative_rates_and_multipliers_are_refused(name: str, value: float) -> None:
    model = net()
    insert(model, before="4")
    with pytest.raises(ValueError, match=rf"Expected rates and multipliers of at least 0, got {name}={value}\."):
        param_groups(model, **{"lr": 0.1, name: value})
    assert param_groups(model, **{"lr": 0.1, name: 0.0})


@pytest.mark.parametrize("multiplier", ["batchformer_lr_mult", "batchformer_weight_decay_mult"])
def test_a_multiplier_without_a_module_raises(multiplier: str) -> None:
    with pytest.raises(ValueError, match=r"Expected a model with a BatchFormer for these multipliers.*insert\(\)"):
        param_groups(net(), lr=0.1, **{multiplier: 0.1})


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_and_schedulers_keep_the_ratio(kind: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    model = net()
    insert(model, before="4")
    optimizer = kind(param_groups(model, lr=0.1, batchformer_lr_mult=0.1, decay_norm_and_bias=False))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=5)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for _ in range(3):  # warnings are errors: nothing says that the module is not trained
        optimizer.zero_grad()
        model(torch.randn(6, 4)).square().mean().backward()
        optimizer.step()
        scheduler.step()
    assert not [name for name, p in model.named_parameters() if p.equal(before[name])]
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert rates["batchformer"] == pytest.approx(0.1 * rates["network"])
    assert rates["network"] < 0.1
