"""Modules that the arms of a comparison insert, and the parts of a model that they leave unchanged."""

import pytest
import torch
from torch import Tensor, nn

from batchformer import describe, param_groups
from batchformer.tasks.training.arms import ARMS, DropoutStream, insert_arm

N, C, K = 6, 8, 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, C), nn.ReLU(), nn.Linear(C, K))


def rows(arm: str, x: Tensor, drop: float = 0.0) -> Tensor:
    model = net()
    torch.manual_seed(1)
    insert_arm(model, arm, before="2", num_heads=2, drop=drop)  # type: ignore[arg-type]
    return model.train()(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("arm", ARMS)
def test_in_eval_mode_every_arm_is_the_plain_network(arm: str) -> None:
    model, x = net(), torch.randn(N, 4)
    expected = model(x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    insert_arm(model, arm, before="auto")  # type: ignore[arg-type]
    assert torch.equal(model.eval()(x), expected)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_what_each_arm_trains() -> None:
    trained = {}
    for arm in ARMS:
        model = net()
        own = len(list(model.parameters()))
        handle = insert_arm(model, arm, before="auto")  # type: ignore[arg-type]
        trained[arm] = sum(p.requires_grad for p in model.parameters()) - own
        assert (handle is None) == (arm == "plain")
    assert trained["plain"] == trained["duplicate"] == trained["frozen"] == 0
    assert trained["batchformer"] == trained["self_only"] == trained["single_stream"] == 12


def test_a_frozen_module_does_not_change_in_training() -> None:
    model = net()
    handle = insert_arm(model, "frozen", before="auto")
    assert handle is not None
    before = [p.clone() for p in handle.modules[0].parameters()]
    assert before
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.1)
    classifier = model[2].weight.clone()
    loss = model.train()(torch.randn(N, 4)).square().mean()
    loss.backward()
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(handle.modules[0].parameters(), before, strict=True))
    assert not torch.equal(model[2].weight, classifier)


def test_which_rows_an_arm_mixes() -> None:
    x = torch.randn(N, 4)
    other = torch.cat([x[:1], torch.randn(N - 1, 4)])  # the first sample in other company
    plain = rows("plain", x)
    assert rows("plain", x).shape == (N, K)
    for arm in ("batchformer", "frozen", "self_only", "duplicate"):
        assert rows(arm, x).shape == (2 * N, K)
        assert torch.equal(rows(arm, x)[:N], plain), arm  # the plain stream comes first
    assert rows("single_stream", x).shape == (N, K)
    for arm, at in (("batchformer", N), ("frozen", N), ("single_stream", 0)):
        assert not torch.allclose(rows(arm, x)[at], rows(arm, other)[at]), arm
    for arm in ("self_only", "duplicate"):
        torch.testing.assert_close(rows(arm, x)[N], rows(arm, other)[N])
    assert not torch.allclose(rows("self_only", x)[N:], plain)
    torch.testing.assert_close(rows("duplicate", x)[N:], plain)
    assert not torch.allclose(rows("duplicate", x, drop=0.5)[N:], plain)  # dropout alone


def test_the_duplicate_is_dropout_alone() -> None:
    """Without parameters, off in an evaluation with the batch attention on, and visible in the description."""
    model, x = net(), torch.randn(300, 4)
    handle = insert_arm(model, "duplicate", before="2", num_heads=2)
    assert handle is not None
    stream = handle.modules[0]
    assert isinstance(stream, DropoutStream) and not list(stream.parameters())
    features = torch.randn(300, C)
    kept = (out := stream(features))[300:] != 0
    assert torch.equal(out[:300], features)
    assert torch.equal(out[300:][kept], 2 * features[kept])
    assert 0.4 < float(kept.float().mean()) < 0.6
    assert "DropoutStream before '2': dropout 0.5 alone, two_stream" in str(describe(model))
    model.eval()
    plain, mixed = handle.evaluate_in_batch(x, labels=torch.arange(300))
    torch.testing.assert_close(mixed, plain)
    assert not stream.training and stream.dropout.p == 0.5
    assert param_groups(model, lr=1.0, batchformer_lr_mult=0.1)[0]["name"] == "network"
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        insert_arm(net(), "duplicate", before="2", heads=2)


def test_with_the_mixed_stream_alone_the_duplicate_still_has_two() -> None:
    x = torch.randn(N, 4)
    for arm, expected in (("batchformer", N), ("frozen", N), ("self_only", N), ("duplicate", 2 * N)):
        model = net()
        handle = insert_arm(model, arm, before="2", mode="single_stream")  # type: ignore[arg-type]
        assert handle is not None
        assert model.train()(x).shape == (expected, K), arm
        assert handle.expand(torch.arange(N)).shape == (expected,), arm


def test_trained_arms_draw_the_same_weights() -> None:
    weights = []
    for arm in ("batchformer", "frozen", "self_only", "single_stream"):
        torch.manual_seed(3)
        handle = insert_arm(net(), arm, before="auto")  # type: ignore[arg-type]
        assert handle is not None
        weights.append([p.detach() for p in handle.modules[0].parameters()])
    for others in weights[1:]:
        assert all(torch.equal(one, other) for one, other in zip(weights[0], others, strict=True))


def test_an_unknown_arm_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected arm to be one of \('plain', .*got 'random'"):
        insert_arm(net(), "random", before="auto")  # type: ignore[arg-type]
