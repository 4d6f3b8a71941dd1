"""RIDE's network and its routers."""

import pytest
import torch
from torch import Tensor

from batchformer import insert
from batchformer.tasks.longtail.loss_ride import routing
from batchformer.tasks.longtail.ride import RIDE, RoutedExperts, RoutedOutput, RoutingOutput


def network(experts: int = 3) -> RIDE:
    torch.manual_seed(0)
    return RIDE("small_resnet", 10, experts=experts, in_channels=1)


def images(samples: int = 6) -> Tensor:
    return torch.randn(samples, 1, 28, 28, generator=torch.Generator().manual_seed(2))


def test_experts_share_the_stem_and_nothing_else() -> None:
    model = network()
    one = network(experts=1)
    shared = sum(p.numel() for p in model.shared.parameters())
    total, single = (sum(p.numel() for p in m.parameters()) for m in (model, one))
    assert total - shared == 3 * (single - shared)
    first, second = (next(expert.parameters()) for expert in list(model.experts)[:2])
    assert not torch.equal(first, second)  # drawn independently


def test_one_experts_loss_reaches_its_branch_and_the_stem_only() -> None:
    model = network()
    model(images())[:, 1].sum().backward()
    touched = {
        ".".join(name.split(".")[:2])
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    assert {name for name in touched if not name.startswith("shared")} == {"experts.1", "heads.1"}
    assert any(name.startswith("shared") for name in touched)


def test_every_parameter_has_a_gradient() -> None:
    model = network()
    model(images()).sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


@pytest.mark.parametrize(("name", "heads"), [("resnet32", 1), ("resnet10", 4)])
def test_published_number_of_heads(name: str, heads: int) -> None:
    assert RIDE(name, 10).num_heads == heads


def test_single_stream_keeps_the_rows() -> None:
    model = network()
    plain = model.train()(images())
    insert(model, before="auto", mode="single_stream", num_heads=model.num_heads)
    mixed = model(images())
    assert mixed.shape == plain.shape
    assert not torch.allclose(mixed, plain)


def test_the_experts_do_not_see_each_other_in_batchformer() -> None:
    model = network()
    insert(model, before="auto", num_heads=1, drop=0.0)
    before = model(images()).detach()
    with torch.no_grad():
        for parameter in model.experts[2].parameters():
            parameter.mul_(2.0)
    after = model(images()).detach()
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.allclose(before[:, 2], after[:, 2])


def test_routers_train_alone() -> None:
    model = network()
    insert(model, before="auto", num_heads=1)
    routed = RoutedExperts(model).train()
    assert not model.training
    before = {name: value.clone() for name, value in model.state_dict().items()}
    output = routed(images())
    assert isinstance(output, RoutingOutput)
    assert output.help_logits.shape == (6, 2)
    assert output.logits.shape == (6, 3, 10)  # the inserted module is inactive
    routing(*output, torch.arange(6)).backward()
    trained = {name for name, p in routed.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in routed.named_parameters() if name.split(".")[0] in ("hidden", "ask")}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def slow_route(routed: RoutedExperts, x: Tensor) -> tuple[Tensor, float]:
    """One sample at a time, one expert after the other."""
    model, rows, used = routed.network, [], 0
    for n in range(len(x)):
        maps = model.shared(x[n : n + 1])
        total = torch.zeros(1, 10)
        for e in range(len(model.experts)):
            feature = model.experts[e](maps)
            total = total + model.heads[e](feature)
            used += 1
            if e + 1 == len(model.experts):
                break
            hidden = torch.relu(routed.hidden[e](feature / feature.norm()))
            seen = torch.cat([(total / (e + 1)).sort(descending=True).values[:, :5], hidden], dim=1)
            if float(routed.ask(seen)) <= 0:
                break
        rows.append(total / (e + 1))
    return torch.cat(rows), used / len(x)


def test_routing_equals_the_loop_over_samples() -> None:
    torch.manual_seed(1)
    routed = RoutedExperts(network()).eval()
    with torch.no_grad():
        x = images(16)
        asked = routed.train()(x).help_logits
        routed.eval()
        routed.ask.bias.sub_(asked[:, 0].median())  # half of the samples ask for a second expert
        output = routed(x)
        expected, used = slow_route(routed, x)
    assert isinstance(output, RoutedOutput)
    torch.testing.assert_close(output.logits, expected)
    assert float(output.experts_used) == pytest.approx(used)
    assert 1.0 < used < 3.0


@pytest.mark.parametrize(("bias", "experts"), [(-1e4, 1), (1e4, 3)])
def test_routers_that_never_and_always_ask(bias: float, experts: int) -> None:
    model = network().eval()
    routed = RoutedExperts(model).eval()
    with torch.no_grad():
        routed.ask.bias.fill_(bias)
        output = routed(images())
        expected = model(images())[:, :experts].mean(dim=1)
    torch.testing.assert_close(output.logits, expected)
    assert float(output.experts_used) == experts


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"at least one expert, got 0"):
        RIDE("resnet32", 10, experts=0)
    with pytest.raises(ValueError, match=r"at least two experts"):
        RoutedExperts(network(experts=1))
