"""The module: weights, layouts, streams, what must and what must not depend on what."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchformer import BatchFormer, BatchFormerV2, BatchFormerWarning

C = 8


def made(**arguments: object) -> BatchFormer:
    torch.manual_seed(0)
    return BatchFormer(C, **arguments)  # type: ignore[arg-type]


# ---------------------------------------------------------------- weights


def test_initial_weights_and_names_are_torchs() -> None:
    torch.manual_seed(7)
    ours = BatchFormer(C, 4, drop=0.5).layers[0]
    torch.manual_seed(7)
    theirs = nn.TransformerEncoderLayer(C, 4, C, 0.5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


def test_state_dicts_of_torch_load_as_they_are() -> None:
    layer = nn.TransformerEncoderLayer(C, 4, C, 0.5)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(5, C)
    module = made().eval()
    module.load_state_dict(layer.state_dict())
    torch.testing.assert_close(module.mix(x), layer.eval()(x.unsqueeze(1)).squeeze(1))
    two = made(layers=2).eval()
    two.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(two.mix(x), encoder.eval()(x.unsqueeze(1)).squeeze(1))
    # Inside a model, under a prefix, and strictly: a foreign key is still refused.
    net = nn.ModuleDict({"bt": made()})
    net.load_state_dict({f"bt.{key}": value for key, value in layer.state_dict().items()})
    assert torch.equal(net["bt"].layers[0].linear1.weight, layer.linear1.weight)  # type: ignore[union-attr,index]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        made().load_state_dict({**layer.state_dict(), "other": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="Missing key"):
        made(layers=2).load_state_dict(layer.state_dict())


def test_loading_does_not_change_the_given_dict() -> None:
    state = nn.TransformerEncoderLayer(C, 4, C).state_dict()
    keys = list(state)
    made().load_state_dict(state)
    assert list(state) == keys


def test_v2_is_another_name_of_the_same() -> None:
    assert BatchFormerV2 is BatchFormer


def test_mlp_ratio_layers_and_parameters() -> None:
    assert sum(p.numel() for p in BatchFormer(512).parameters()) == 6 * 512**2 + 10 * 512
    assert made(mlp_ratio=2.0).layers[0].linear1.out_features == 2 * C
    assert len(made(layers=3).layers) == 3


# ---------------------------------------------------------------- streams


def test_training_returns_plain_then_mixed_and_doubles_targets() -> None:
    module, x, labels = made(), torch.randn(6, C), torch.arange(6)
    out, targets = module(x, labels)
    assert out.shape == (12, C)
    assert torch.equal(out[:6], x)
    assert not torch.allclose(out[6:], x)
    assert torch.equal(targets, torch.cat((labels, labels)))


def test_eval_returns_the_very_same_objects() -> None:
    module, x, labels = made().eval(), torch.randn(6, C), torch.arange(6)
    assert module(x) is x
    out, targets = module(x, labels)
    assert out is x
    assert targets is labels
    wrong = torch.randn(2, 3, 4, 5)  # nothing is looked at: an eval() costs one `if`
    assert module(wrong) is wrong


def test_single_stream_returns_the_mixed_rows_and_leaves_targets() -> None:
    module, x, labels = made(mode="single_stream", drop=0.0), torch.randn(6, C), torch.arange(6)
    out, targets = module(x, labels)
    assert torch.equal(out, module.mix(x))
    assert targets is labels


def test_single_sample_and_odd_batches() -> None:
    module = made()
    with pytest.warns(BatchFormerWarning, match="batch of one sample"):
        assert module(torch.randn(1, C)).shape == (2, C)
    assert module(torch.randn(1, C)).shape == (2, C)  # once
    assert module(torch.randn(7, C)).shape == (14, C)


@pytest.mark.parametrize("shape", [(0, C), (0, 3, C)])
def test_empty_batch_raises(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least one sample, got an empty batch"):
        made()(torch.randn(shape))


# ---------------------------------------------------------------- what depends on what


@pytest.fixture
def tokens() -> tuple[BatchFormer, Tensor]:
    return made(drop=0.0).double(), torch.randn(5, 4, C, dtype=torch.float64)


def test_permuting_samples_permutes_outputs(tokens: tuple[BatchFormer, Tensor]) -> None:
    module, x = tokens
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(module.mix(x[order]), module.mix(x)[order])


def test_another_sample_changes_mine_and_another_token_does_not(tokens: tuple[BatchFormer, Tensor]) -> None:
    module, x = tokens
    before = module.mix(x)
    other = x.clone()
    other[4, 2] += 1.0  # sample 4, token 2
    after = module.mix(other)
    assert not torch.allclose(after[0, 2], before[0, 2])
    unchanged = [0, 1, 3]
    torch.testing.assert_close(after[:, unchanged], before[:, unchanged], rtol=0, atol=0)


def test_a_loss_of_one_sample_sends_gradients_to_the_others(tokens: tuple[BatchFormer, Tensor]) -> None:
    module, x = tokens
    x.requires_grad_()
    module.mix(x)[0].square().sum().backward()
    assert x.grad is not None
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()


# ---------------------------------------------------------------- layouts


def test_features_are_tokens_of_one_position() -> None:
    module, x = made(drop=0.0), torch.randn(5, C)
    torch.testing.assert_close(module.mix(x), module.mix(x.unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize("channels_last", [False, True])
def test_maps_are_tokens(channels_last: bool) -> None:
    tokens, maps, behind = made(drop=0.0), made(drop=0.0, layout="BCHW"), made(drop=0.0, layout="BHWC")
    x = torch.randn(3, C, 2, 5)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    expected = tokens.mix(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(maps.mix(x), expected)
    torch.testing.assert_close(behind.mix(x.permute(0, 2, 3, 1)), expected.permute(0, 2, 3, 1))
    mask = torch.rand(3, 2, 5) < 0.3
    masked = tokens.mix(x.flatten(2).transpose(1, 2), mask=mask.flatten(1)).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(maps.mix(x, mask=mask), masked)


# ---------------------------------------------------------------- living with it


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(copier: object) -> None:
    module = made(drop=0.0)
    module(torch.randn(4, C))
    twin = copier(module)  # type: ignore[operator]
    x = torch.randn(4, C)
    assert torch.equal(module(x), twin(x))
    nn.init.zeros_(twin.layers[0].linear1.weight)
    assert not torch.equal(module(x), twin(x))


def test_state_dict_round_trip_and_moving_average() -> None:
    module, other, x = made(drop=0.0), BatchFormer(C, drop=0.0), torch.randn(4, C)
    other.load_state_dict(module.state_dict())
    assert torch.equal(module(x), other(x))
    average = torch.optim.swa_utils.AveragedModel(module)
    average.update_parameters(module)
    assert torch.equal(average(x), module(x))


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(drop: float, reentrant: bool) -> None:
    module, x = made(drop=drop), torch.randn(50, C, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        module.zero_grad()
        x.grad = None
        torch.manual_seed(1)
        out = checkpoint(module, x, use_reentrant=reentrant) if checkpointed else module(x)
        out.square().sum().backward()
        assert x.grad is not None
        gradients.append([x.grad.clone(), *(p.grad.clone() for p in module.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) == 13
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("arguments", [{"layout": "BCHW", "layers": 2}, {"attend": "self"}], ids=["batch", "self"])
def test_compiles_without_a_graph_break(arguments: dict[str, object]) -> None:
    """Once for each kernel: attention over the batch, with a mask, and of each sample to itself."""
    module = made(drop=0.0, **arguments)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (4, 7, 5):  # batches differ in size
        x, mask = torch.randn((rows, C, 2, 3) if "layout" in arguments else (rows, 3, C)), None
        if "layout" in arguments:
            mask = torch.rand(rows, 2, 3) < 0.3
        torch.testing.assert_close(compiled(x, mask=mask), module(x, mask=mask))
    module.eval()
    assert torch.equal(compiled(x), x)


@pytest.mark.slow
def test_compiles_by_inductor() -> None:
    module = made(drop=0.5)
    compiled = torch.compile(module, fullgraph=True)
    x = torch.randn(300, C, requires_grad=True)
    out = compiled(x)
    out.square().sum().backward()
    assert torch.equal(out[:300], x)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in module.parameters())


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, r"num_heads to divide dim, got dim=8 and num_heads=3. Take one of \[1, 2, 4, 8\]"),
        ({"drop": 1.5}, "drop between 0 and 1 .*got drop=1.5"),
        ({"mlp_ratio": 0}, "mlp_ratio above 0"),
        ({"layers": 0}, "layers of at least 1, got 0"),
        ({"num_heads": 0}, "num_heads of at least 1, got 0"),
        ({"mode": "both"}, "mode to be one of .*'two_stream', 'single_stream'.*, got 'both'"),
        ({"gather": True}, "gather to be one of"),
        ({"layout": "NCHW"}, "layout to be one of"),
        ({"attend": "nothing"}, "attend to be one of .*'batch', 'self'.*, got 'nothing'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(**arguments)


@pytest.mark.parametrize("name", ["dim", "num_heads", "layers"])
def test_counts_are_whole_numbers(name: str) -> None:
    with pytest.raises(TypeError, match=rf"Expected {name} to be a whole number, got 8.0 \(float\)"):
        BatchFormer(**{"dim": 8, name: 8.0})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([1], r"features as a tensor, got list. Convert with torch.as_tensor\(x\)"),
        (None, "features as a tensor, got NoneType"),
        (torch.ones(4, C, dtype=torch.int64), r"of a floating type, got torch.int64. Convert with x.float\(\)"),
        (torch.ones(4, C, dtype=torch.bool), "of a floating type, got torch.bool"),
    ],
)
def test_features_are_tensors_of_a_floating_type(features: object, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        made()(features)


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ((4, C, 7, 7), None, r"got \(4, 8, 7, 7\). Flatten the map or pass layout='BCHW'"),
        ((4, 7, 7, C), None, "pass layout='BHWC'"),
        ((4, 9), None, r"features of shape \(N, 8\) or tokens of shape \(B, N, 8\), got \(4, 9\). Set dim"),
        ((4,), None, "got "),
        ((4, C), "BCHW", r"maps of shape \(B, 8, H, W\)"),
        ((4, C, 2, 2), "BHWC", r"maps of shape \(B, H, W, 8\)"),
    ],
)
def test_wrong_shapes(shape: tuple[int, ...], layout: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made(layout=layout)(torch.randn(shape))


@pytest.mark.parametrize("mask", [torch.zeros(4, 3), torch.zeros(3, 4, dtype=torch.bool)])
def test_wrong_masks(mask: Tensor) -> None:
    with pytest.raises(ValueError, match=r"boolean mask of shape \(4, 3\)"):
        made()(torch.randn(4, 3, C), mask=mask)
