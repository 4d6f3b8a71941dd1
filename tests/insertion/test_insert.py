"""insert() and remove(): what is refused, what is registered, what comes back, what is warned about."""

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from batchformer import BatchFormer, BatchFormerWarning, describe, insert, remove
from batchformer.insertion.handle import looks_class_sorted

N, C = 6, 8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, C), nn.Tanh(), nn.Linear(C, C), nn.Tanh(), nn.Linear(C, 3))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, C)
        self.blocks = nn.ModuleList(nn.Linear(C, C) for _ in range(3))
        self.head = nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).tanh()
        out: Tensor = self.head(x)
        return out


def images(n: int = N) -> Tensor:
    return torch.randn(n, 4)


# --- what is refused


def test_neither_or_both_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="exactly one of before= and after="):
        insert(Net())
    with pytest.raises(ValueError, match="exactly one of before= and after="):
        insert(Net(), before="head", after="stem")
    with pytest.raises(ValueError, match="Expected module names for after=, got 'auto'"):
        insert(Net(), after="auto")


def test_a_name_that_matches_nothing_is_refused_and_nothing_changes() -> None:
    model = Net()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"nothing matches 'haed'. The nearest names are \['head'"):
        insert(model, before=["stem", "haed"])
    assert list(model.state_dict()) == keys
    assert model(images()).shape == (N, 3)


@pytest.mark.parametrize("second", ["head", "auto", ["stem", "head"], "h*"])
def test_twice_at_one_place_is_refused(second: str | list[str]) -> None:
    model = Net()
    insert(model, before="head")
    with pytest.raises(
        ValueError, match=r"Expected a free point, but there is a BatchFormer before 'head'. remove\(\)"
    ):
        insert(model, before=second)
    assert model(images()).shape == (2 * N, 3)


def test_twice_on_a_sequential_is_refused() -> None:
    model = net()
    insert(model, before="auto")
    with pytest.raises(ValueError, match="Expected a free point, but there is a BatchFormer before '4'"):
        insert(model, before="auto")


@pytest.mark.parametrize("inner_first", [True, False])
def test_a_part_and_the_whole_are_refused(inner_first: bool) -> None:
    whole = nn.Sequential(Net(), nn.Linear(3, 3))
    steps: list[Callable[[], object]] = [
        lambda: insert(whole[0], after="stem"),
        lambda: insert(whole, before=["0.head"]),
    ]
    first, second = steps if inner_first else reversed(steps)
    first()
    with pytest.raises(ValueError, match="Expected all insertions on one model"):
        second()


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_wrapped_in_ddp_is_refused_and_wrapping_afterwards_works() -> None:
    model = Net()
    with pytest.raises(RuntimeError, match="wrapped in DistributedDataParallel. Insert first, then wrap"):
        insert(DistributedDataParallel(model), before="module.head")
    with pytest.raises(RuntimeError, match="wrapped in DistributedDataParallel"):
        insert(nn.Sequential(DistributedDataParallel(model)), before="0.module.head")
    handle = insert(model, before="head")
    wrapped = DistributedDataParallel(model)
    logits = wrapped(images())
    nn.functional.cross_entropy(logits, handle.expand(torch.zeros(N, dtype=torch.long))).backward()
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(ValueError, match=r"found none. Pass the model given to insert\(\)"):
        remove(wrapped)


def test_wrapped_in_other_ways_is_refused() -> None:
    with pytest.raises(RuntimeError, match="wrapped in DataParallel"):
        insert(DataParallel(Net()), before="module.head")
    with pytest.raises(RuntimeError, match="wrapped in OptimizedModule"):
        insert(torch.compile(Net()), before="_orig_mod.head")  # type: ignore[arg-type]
    compiled = Net()
    compiled.compile()
    with pytest.raises(RuntimeError, match=r"wrapped in model.compile\(\)"):
        insert(compiled, before="head")


def test_several_widths_do_not_share() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 12), nn.Linear(12, 3))
    with pytest.raises(ValueError, match=r"Expected one width .* 2 points, got \[8, 12\]. Pass share=False"):
        insert(model, after=["0", "1"])
    handle = insert(model, after=["0", "1"], share=False)
    assert [module.dim for module in handle.modules] == [8, 12]
    assert model(images()).shape == (2 * N, 3)


@pytest.mark.parametrize("model", [3, None, "resnet18"])
def test_what_is_no_model_is_refused(model: object) -> None:
    with pytest.raises(TypeError, match=r"Expected a model, an nn.Module, got \w+\."):
        insert(model, before="auto")  # type: ignore[arg-type]


def test_arguments_of_the_layer() -> None:
    model = Net()
    with pytest.raises(ValueError, match="Expected num_heads to divide dim, got dim=8 and num_heads=3"):
        insert(model, before="head", num_heads=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        insert(model, before="head", heads=3)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="control 'duplicate' of a comparison"):
        insert(model, before="head", attend="nothing")  # type: ignore[arg-type]
    module = insert(model, before="head", num_heads=2, mlp_ratio=2.0, layers=2, drop=0.1).modules[0]
    assert (module.num_heads, len(module.layers), module.drop) == (2, 2, 0.1)
    insert(model, after="stem", dim=12)
    with pytest.raises(ValueError, match=r"Expected features of shape \(N, 12\) .* got \(6, 8\)"):
        model(images())


def test_the_signature_names_every_argument_of_the_module() -> None:
    """With its defaults, so that editors and type checkers see them; `dim` may be read from the model."""
    ours, theirs = (inspect.signature(what).parameters for what in (insert, BatchFormer))
    assert ours["dim"].default is None
    for name in theirs.keys() - {"dim"}:
        assert ours[name].default == theirs[name].default, name


# --- what is registered


def test_names_in_the_state_dict() -> None:
    model = Net()
    insert(model, after=["stem", "blocks.1"])
    new = [key for key in model.state_dict() if key.startswith("batchformer")]
    assert len(new) == 12
    assert "batchformer.layers.0.self_attn.in_proj_weight" in new
    model = Net()
    insert(model, after=["stem", "blocks.1"], share=False)
    insert(model, before="head")
    prefixes = {key.split("layers")[0] for key in model.state_dict() if key.startswith("batchformer")}
    assert prefixes == {"batchformer.stem.", "batchformer.blocks_1.", "batchformer_."}


def test_names_that_only_differ_in_a_dot() -> None:
    model = nn.Module()
    model.a_b = nn.Linear(C, C)
    model.a = nn.ModuleDict({"b": nn.Linear(C, C)})
    insert(model, after=["a_b", "a.b"], share=False)
    assert len([m for m in model.modules() if isinstance(m, BatchFormer)]) == 2
    model = nn.Sequential()
    model.add_module("keys", nn.Linear(4, C))  # an attribute of every ModuleDict
    insert(model, after="keys", share=False)
    assert model(images()).shape == (2 * N, C)


def test_device_type_and_mode_follow_the_model() -> None:
    model = Net().to(torch.bfloat16).eval()
    module = insert(model, before="head").modules[0]
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert not module.training
    assert model.train().double()(images().double()).dtype == torch.float64
    meta = insert(Net().to("meta"), before="head").modules[0]
    assert {p.device.type for p in meta.parameters()} == {"meta"}


@pytest.mark.parametrize("places", [{"before": "4"}, {"after": "0"}, {"after": ["0", "2"], "share": False}])
def test_a_sequential_root_returns_its_input_from_the_holder(places: dict[str, object]) -> None:
    model = net()
    x = images()
    plain = model(x)
    handle = insert(model, **places, drop=0.0)  # type: ignore[arg-type]
    torch.testing.assert_close(handle.split(model(x))[0], plain)
    assert model.eval()(x).equal(plain)
    handle.remove()
    assert len(model) == 5


# --- what the handle answers


def test_the_old_name_of_the_points_still_works() -> None:
    handle = insert(Net(), before="head")
    with pytest.warns(DeprecationWarning, match="use Handle.points"):
        assert handle.places == handle.points


def test_expand_split_and_loss_follow_the_mode() -> None:
    model = Net()
    handle = insert(model, before="head")
    x, labels = images(), torch.arange(N) % 3
    logits = model(x)
    assert handle.doubles
    assert handle.expand(labels).tolist() == [*labels.tolist(), *labels.tolist()]
    plain, mixed = handle.split(logits)
    assert plain is not None
    assert mixed is not None
    assert torch.cat((plain, mixed)).equal(logits)
    loss = nn.functional.cross_entropy
    torch.testing.assert_close(handle.loss(loss, logits, labels), loss(logits, handle.expand(labels)))
    torch.testing.assert_close(handle.loss(loss, logits, labels, weights=(1.0, 0.0)), loss(plain, labels))
    logits = model.eval()(x)
    assert not handle.doubles
    assert handle.expand(labels) is labels
    assert handle.split(logits)[0] is logits
    assert handle.split(logits)[1] is None
    torch.testing.assert_close(handle.loss(loss, logits, labels, weights=(0.0, 1.0)), loss(logits, labels))


def test_eval_is_the_identity_whatever_else_is_in_the_batch() -> None:
    model = Net().eval()
    x = images()
    plain = model(x)
    insert(model, before="head")
    insert(model, after="stem", gather="all")
    assert model(x).equal(plain)
    assert model(torch.full((N, 4), float("nan"))).isnan().all()
    assert model(x[:1]).equal(Net.forward(model, x[:1]))


# --- remove


def test_remove_in_any_order_gives_back_the_plain_network() -> None:
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        model = Net()
        keys, x = list(model.state_dict()), images()
        attributes = set(vars(model)), set(model._modules)
        plain = model(x)
        handles = [
            insert(model, before="head"),
            insert(model, after="stem"),
            insert(model, after="blocks.*", share=False),
        ]
        for left, index in zip((2, 1, 0), order, strict=True):
            assert handles[index].remove() is model
            assert model(x).shape[0] == (2 * N if left else N)
        assert list(model.state_dict()) == keys
        assert model(x).equal(plain)
        assert (set(vars(model)), set(model._modules)) == attributes
        assert not any((m._forward_hooks, m._forward_pre_hooks) != ({}, {}) for m in model.modules())


def test_remove_takes_everything_out_and_allows_a_new_start() -> None:
    model = Net()
    handle = insert(model, before="head")
    insert(model, after="stem")
    assert remove(model) is model
    assert str(describe(model)) == "No BatchFormer in this model."
    with pytest.raises(RuntimeError, match=r"was removed before. Call insert\(\) again"):
        handle.remove()
    with pytest.raises(ValueError, match="Expected a model with an inserted BatchFormer, found none"):
        remove(model)
    insert(model, before="head")
    assert model(images()).shape == (2 * N, 3)


def test_other_peoples_hooks_stay() -> None:
    model = Net()
    seen: list[int] = []
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    handle = insert(model, before="head")
    model.head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0]))
    model(images())
    handle.remove()
    model(images())
    assert seen == [N, 2 * N, N, N]


def test_a_module_put_there_by_hand_stays() -> None:
    model = nn.Sequential(nn.Linear(4, C), BatchFormer(C), nn.Linear(C, 3))
    with pytest.raises(ValueError, match="found none"):
        remove(model)
    assert model(images()).shape == (2 * N, 3)


# --- evaluate_in_batch


@pytest.mark.parametrize("layers", [1, 2])
def test_evaluate_in_batch_is_plain_and_undisturbed_by_dropout(layers: int) -> None:
    model = Net()
    handle = insert(model, before="head", drop=0.9, layers=layers)
    x, labels = images(), torch.tensor([0, 2, 1, 0, 1, 2])
    with pytest.raises(RuntimeError, match=r"Expected a model in eval\(\)"):
        handle.evaluate_in_batch(x, labels=labels)
    expected = model.eval()(x)
    plain, mixed = handle.evaluate_in_batch(x, labels=labels)
    assert plain.equal(expected) or torch.allclose(plain, expected)
    assert mixed.equal(handle.evaluate_in_batch(x, labels=labels)[1])
    assert not mixed.allclose(plain)
    assert model(x).equal(expected)


def test_evaluate_in_batch_warns_about_sorted_classes_and_survives_errors() -> None:
    model = Net().eval()
    handle = insert(model, before="head", mode="single_stream")
    with pytest.warns(BatchFormerWarning, match="sorted by class"):
        plain, mixed = handle.evaluate_in_batch(images(), labels=torch.tensor([0, 0, 0, 1, 1, 2]))
    assert plain is None
    assert mixed.shape == (N, 3)
    with pytest.raises(RuntimeError):
        handle.evaluate_in_batch(torch.randn(N, 5), labels=torch.randperm(N))
    assert not handle.modules[0].training


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([0, 0, 1, 1], True), ([2, 2, 2], True), ([0, 1, 2, 3], False), ([1, 0, 1, 0], False), ([0, 0], False)],
)
def test_class_sorted(labels: list[int], expected: bool) -> None:
    assert looks_class_sorted(torch.tensor(labels)) is expected


# --- warnings: by the points of insertion; when they are given at all is in tests/core/test_training_checks.py


def step(model: nn.Module, optimizer: torch.optim.Optimizer, n: int = N) -> None:
    optimizer.zero_grad()
    model(images(n)).square().mean().backward()
    optimizer.step()


@contextlib.contextmanager
def only_once(match: str) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert [match in str(w.message) and w.category is BatchFormerWarning for w in caught] == [True]


def test_frozen_warns_once_by_name() -> None:
    model = Net()
    handle = insert(model, before="head")
    handle.modules[0].requires_grad_(False)
    with only_once("BatchFormer (before 'head') is in training but all of its parameters are frozen"):
        for _ in range(3):
            model(images())


def test_absent_from_the_optimizer_warns_once_by_name() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    insert(model, after=["stem", "blocks.1"])
    with only_once("BatchFormer (after 'stem', after 'blocks.1') gets gradients but no optimizer holds"):
        for _ in range(5):
            step(model, optimizer)
