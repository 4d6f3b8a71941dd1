"""Points of insertion in a forward pass: rows, roles, doubled inputs, checkpointing."""

import contextlib
import copy
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchformer import BatchFormer, BatchFormerWarning, describe, insert, remove
from batchformer.insertion.adapters import ADAPTERS
from batchformer.insertion.locate import find_points
from batchformer.insertion.plan import InsertionPlan

N, C = 5, 8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Tower(nn.Module):
    """Blocks, then a head; blocks may be checkpointed, or one block used several times."""

    def __init__(self, *, reused: bool = False, reentrant: bool | None = None) -> None:
        super().__init__()
        block = [nn.Linear(C, C) for _ in range(1 if reused else 3)]
        self.blocks = nn.ModuleList(nn.Sequential(linear, nn.Tanh()) for linear in block)
        self.head = nn.Linear(C, 3)
        self.order = [0, 0, 0] if reused else [0, 1, 2]
        self.reentrant = reentrant
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for index in self.order:
            block = self.blocks[index]
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        out: Tensor = self.head(x)
        return out


def features(n: int = N) -> Tensor:
    return torch.randn(n, C, dtype=torch.float64, requires_grad=True)


def torch_layer(module: BatchFormer) -> Callable[[Tensor], Tensor]:
    """The oracle: torch's own layer on the same weights, the batch as its sequence."""
    layer = nn.TransformerEncoderLayer(C, module.num_heads, C, dropout=0.0).double()
    layer.load_state_dict({key.removeprefix("layers.0."): value for key, value in module.state_dict().items()})
    return lambda x: layer(x.unsqueeze(1)).squeeze(1)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_first_point_doubles_and_later_ones_mix_the_mixed_half(share: bool, together: bool) -> None:
    model = Tower()
    block = copy.deepcopy(model.blocks)
    if together:
        modules = insert(model, after=["blocks.0", "blocks.2"], share=share, drop=0.0).modules
    else:
        modules = [m for name in ("blocks.0", "blocks.2") for m in insert(model, after=name, drop=0.0).modules]
    mix = [torch_layer(module) for module in modules] * (2 if len(modules) == 1 else 1)
    x = features()
    plain = block[0](x)
    plain, mixed = block[1](plain), block[1](mix[0](plain))
    plain, mixed = block[2](plain), mix[1](block[2](mixed))
    torch.testing.assert_close(model(x), model.head(torch.cat((plain, mixed))), rtol=1e-10, atol=1e-12)


def test_points_of_two_insertions_on_both_sides_of_one_module() -> None:
    model = Tower()
    block = copy.deepcopy(model.blocks)
    first = insert(model, before="blocks.1", drop=0.0)
    second = insert(model, after="blocks.1", drop=0.0)
    x = features()
    plain = block[0](x)
    mixed = torch_layer(first.modules[0])(plain)
    plain, mixed = block[1](plain), torch_layer(second.modules[0])(block[1](mixed))
    expected = model.head(block[2](torch.cat((plain, mixed))))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    second.remove()
    assert model(x).shape == (2 * N, 3)
    first.remove()
    assert model(x).shape == (N, 3)


def test_single_stream_keeps_the_rows_at_every_point() -> None:
    model = Tower()
    block = copy.deepcopy(model.blocks)
    handle = insert(model, after=["blocks.0", "blocks.2"], mode="single_stream", drop=0.0)
    mix = torch_layer(handle.modules[0])
    x = features()
    expected = model.head(mix(block[2](block[1](mix(block[0](x))))))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)
    assert handle.split(model(x))[0] is None
    labels = torch.arange(N)
    assert handle.expand(labels) is labels


class ByItsWeight(Tower):
    """A head that is there, and never called."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = nn.functional.linear(self.blocks[0](x), self.head.weight, self.head.bias)
        return out


def test_a_point_that_never_runs_warns_once() -> None:
    model = ByItsWeight()
    insert(model, before="head")
    model.eval()(features())
    with pytest.warns(
        BatchFormerWarning, match=r"\(before 'head'\) did nothing in training: .* use the weights directly"
    ) as told:
        assert model.train()(features()).shape == (N, 3)
    assert len(told) == 1
    model(features())
    twin = copy.deepcopy(model)  # speaks for itself
    with pytest.warns(BatchFormerWarning, match="did nothing in training"):
        twin(features())


def test_a_head_that_was_replaced_warns_and_is_described() -> None:
    model = Tower()
    handle = insert(model, before="head")
    assert "not in effect" not in str(describe(model))
    model.head = nn.Linear(C, 7).double()
    assert "not in effect before 'head': the module there was replaced" in str(describe(model))
    with pytest.warns(BatchFormerWarning, match="replaced since insert"):
        model(features())
    handle.remove()
    insert(model, before="head")
    assert model(features()).shape == (2 * N, 7)


def test_a_point_that_runs_beside_one_that_does_not_is_silent() -> None:
    """As under layer drop; and each insertion speaks for itself."""
    model = ByItsWeight()
    insert(model, after=["blocks.0", "blocks.1"])
    model(features())
    insert(model, before="head")
    with pytest.warns(BatchFormerWarning, match="before 'head'") as told:
        model(features())
    assert len(told) == 1


def test_parallel_branches_each_double() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trunk = nn.Linear(C, C)
            self.heads = nn.ModuleList(nn.Linear(C, 3) for _ in range(3))
            self.double()

        def get_classifier(self) -> nn.ModuleList:
            return self.heads

        def forward(self, x: Tensor) -> Tensor:
            x = self.trunk(x)
            return torch.stack([head(x + i) for i, head in enumerate(self.heads)], dim=1)

    model = Experts()
    handle = insert(model, before="auto", drop=0.0)
    assert [p.name for p in handle.points] == ["heads.0", "heads.1", "heads.2"]
    mix = torch_layer(handle.modules[0])
    x = features()
    x_trunk = model.trunk(x)
    got = model(x)
    remove(model)
    expected = torch.stack(
        [head(torch.cat((x_trunk + i, mix(x_trunk + i)))) for i, head in enumerate(model.heads)], dim=1
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_one_module_used_several_times_in_a_pass(reentrant: bool | None) -> None:
    """The first use doubles, the others mix the mixed half; two passes before the backward, as in a Siamese network."""
    model = Tower(reused=True, reentrant=reentrant)
    block = copy.deepcopy(model.blocks[0])
    handle = insert(model, after="blocks.0", drop=0.0)
    mix = torch_layer(handle.modules[0])
    inputs = [features(n) for n in (N, 3)]
    for x in inputs:
        plain = block(x)
        mixed = mix(plain)
        for _ in range(2):
            plain, mixed = block(plain), mix(block(mixed))
        torch.testing.assert_close(model(x), model.head(torch.cat((plain, mixed))), rtol=1e-10, atol=1e-12)
    model(inputs[0]).square().sum().backward()
    got = gradients(model)
    model.reentrant = None
    model(inputs[0]).square().sum().backward()
    for name, expected in gradients(model).items():
        torch.testing.assert_close(got[name], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool, drop: float) -> None:
    model = Tower()
    insert(model, after=["blocks.0", "blocks.1"], drop=drop)
    # Two passes before one backward, of which the second has as many samples as the first has rows.
    inputs = [features(N), features(2 * N)]
    found = []
    for setting in (None, reentrant):
        model.reentrant = setting
        torch.manual_seed(1)
        sum(model(x).square().sum() for x in inputs).backward()
        found.append(gradients(model))
    assert set(found[0]) == set(dict(model.named_parameters()))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-10, atol=1e-12)


def test_evaluation_between_a_pass_and_its_backward() -> None:
    model = Tower(reentrant=False)
    insert(model, after=["blocks.0", "blocks.1"], drop=0.0)
    out = model(features())
    with torch.no_grad():
        model.eval()(features(3))
    model.train()
    out.sum().backward()
    assert gradients(model).keys() == dict(model.named_parameters()).keys()


def test_parts_called_past_the_model() -> None:
    """A LightningModule calls its parts, not itself: no pass begins or ends, and the batch size still may change."""
    model = Tower()
    insert(model, after=["blocks.0", "blocks.1"], drop=0.0)
    for n in (N, 2 * N, 3, 1):
        x = features(n)
        with pytest.warns(BatchFormerWarning, match="batch of one sample") if n == 1 else contextlib.nullcontext():
            for block in model.blocks:
                x = block(x)
        assert x.shape[0] == 2 * n


def test_a_pass_that_failed_leaves_nothing_behind() -> None:
    model = Tower()
    insert(model, after=["blocks.0", "blocks.1"], drop=0.0)
    failing = model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(features(4))
    failing.remove()
    assert model(features(8)).shape == (16, 3)


def test_training_without_gradients_doubles_too() -> None:
    model = Tower()
    insert(model, before="head", drop=0.0)
    with torch.no_grad():
        assert model(features()).shape == (2 * N, 3)


def test_frozen_norms_in_eval_do_not_switch_it_off() -> None:
    model = nn.Sequential(nn.Linear(C, C), nn.BatchNorm1d(C), nn.Linear(C, 3))
    insert(model, before="2")
    model.train()
    model[1].eval()
    assert model(torch.randn(N, C)).shape == (2 * N, 3)


def test_rows_that_change_between_points_raise() -> None:
    class Windows(Tower):
        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            return self.blocks[1](torch.cat((x, x, x)))

    model = Windows()
    insert(model, after=["blocks.0", "blocks.1"])
    with pytest.raises(ValueError, match=r"Expected 5 or 10 rows after 'blocks.1', got 30"):
        model(features())


class Returns(nn.Module):
    """Calls its part in the way asked for, and gives back what the part gives."""

    def __init__(self, part: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.part = part
        self.call = call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.part, x)


class Part(nn.Module):
    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(C, C)
        self.wrap = wrap

    def forward(self, hidden: Tensor, scale: Tensor) -> Any:
        return self.wrap(self.linear(hidden) * scale, scale)


class Pair(NamedTuple):
    hidden: Tensor
    other: Tensor


SCALE = torch.full((N,), 2.0)[:, None]


@pytest.mark.parametrize(
    ("wrap", "kind"),
    [(lambda h, s: (h, s), tuple), (lambda h, s: [h, s], list), (Pair, Pair)],
    ids=["tuple", "list", "named tuple"],
)
def test_the_first_of_several_outputs_is_mixed(wrap: Callable[..., Any], kind: type) -> None:
    model = Returns(Part(wrap), lambda part, x: part(x, SCALE))
    insert(model, after="part", dim=C)
    out = model(torch.randn(N, C))
    assert type(out) is kind
    assert out[0].shape == (2 * N, C)
    assert out[1] is SCALE


@pytest.mark.parametrize(
    "call",
    [
        lambda part, x: part(x, 2.0),
        lambda part, x: part(hidden=x, scale=2.0),
        lambda part, x: part(scale=2.0, hidden=x),
        lambda part, x: part(x, scale=2.0),
    ],
    ids=["by position", "by name", "by name in another order", "both"],
)
def test_inputs_by_position_and_by_name(call: Callable[..., Any]) -> None:
    model = Returns(Part(lambda hidden, _: hidden), call).double()
    handle = insert(model, before="part", drop=0.0)
    x = features()
    expected = model.part.linear(torch.cat((x, torch_layer(handle.modules[0])(x)))) * 2.0
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


def test_what_is_no_tensor_raises() -> None:
    model = Returns(Part(lambda hidden, _: {"hidden": hidden}), lambda part, x: part(x, SCALE))
    insert(model, after="part", dim=C)
    with pytest.raises(TypeError, match=r"Expected a tensor after 'part', got dict"):
        model(torch.randn(N, C))
    nothing = Returns(nn.Identity(), lambda part, x: part())
    insert(nothing, before="part", dim=C)
    with pytest.raises(TypeError, match=r"Expected a tensor before 'part', got NoneType"):
        nothing(torch.randn(N, C))


def test_a_map_says_what_to_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, C, 1))
    insert(model, after="0")
    with pytest.raises(ValueError, match=r"Flatten the map or pass layout='BCHW'"):
        model(torch.randn(2, 3, 4, 4))


class Scorer(nn.Module):
    """Computes its own loss, as transformers' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(C, C)
        self.head = nn.Linear(C, 3)

    def forward(self, x: Tensor, labels: Tensor | None = None, weight: float = 1.0) -> tuple[Tensor, Tensor]:
        logits = self.head(self.trunk(x))
        assert labels is not None
        return logits, nn.functional.cross_entropy(logits, labels) * weight


@pytest.fixture
def _scorers_have_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = types.ModuleType("scorer_adapter")
    adapter.plan = lambda model, points: InsertionPlan(points, {"": ("labels",)})  # type: ignore[attr-defined]
    adapter.find_classifier = lambda model: InsertionPlan(  # type: ignore[attr-defined]
        find_points(model, "head", "before"), {"": ("labels",)}
    )
    monkeypatch.setitem(sys.modules, "scorer_adapter", adapter)
    monkeypatch.setitem(ADAPTERS, Scorer.__module__.partition(".")[0], "scorer_adapter")


@pytest.mark.usefixtures("_scorers_have_an_adapter")
@pytest.mark.parametrize("points", [["auto"], ["auto", "trunk"]], ids=["one insertion", "two insertions"])
def test_named_inputs_are_doubled_once(points: list[str]) -> None:
    model = Scorer()
    handles = [insert(model, before=point, drop=0.0) for point in points]
    x, labels = torch.randn(N, C), torch.randint(3, (N,))
    by_name = model(x, labels=labels, weight=2.0)
    by_position = model(x, labels, 2.0)
    for logits, loss in (by_name, by_position):
        expected = 2.0 * nn.functional.cross_entropy(logits, labels.repeat(2))
        torch.testing.assert_close(loss, expected)
    handles[0].remove()
    assert model(x, labels)[0].shape[0] == (2 * N if len(points) > 1 else N)
    model.eval()
    assert model(x, labels)[0].shape[0] == N
