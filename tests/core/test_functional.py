"""The layer against plain loops in fp64 and against torch's own layer."""

import math

import pytest
import torch
from torch import Tensor, nn

from batchformer import BatchFormer
from batchformer.core import cpu_kernels, functional

pytestmark = pytest.mark.filterwarnings("ignore:.*batch of one sample")
SHAPES = [(6, 8), (5, 3, 8), (1, 2, 8), (2, 4, 8)]


def layer(dim: int = 8, heads: int = 2, drop: float = 0.0, **more: object) -> BatchFormer:
    torch.manual_seed(0)
    module = BatchFormer(dim, heads, drop=drop, **more).double()  # type: ignore[arg-type]
    for parameter in module.parameters():  # biases and norms away from their zeros and ones
        nn.init.normal_(parameter, std=0.4)
    return module


def by_loops(module: BatchFormer, x: Tensor, padding: Tensor | None = None, itself: bool = False) -> Tensor:
    """One layer, sample by sample, head by head, token by token."""
    w = module.layers[0].weights()  # type: ignore[operator]
    x_NTC = x.unsqueeze(1) if x.dim() == 2 else x
    N, T, C = x_NTC.shape
    H = module.num_heads
    D = C // H
    out = torch.empty_like(x_NTC)
    for t in range(T):
        for n in range(N):
            if padding is not None and padding[n, t]:
                out[n, t] = x_NTC[n, t]
                continue
            seen = [m for m in range(N) if (m == n) or not (itself or (padding is not None and padding[m, t]))]
            heads = []
            for h in range(H):
                part = slice(h * D, (h + 1) * D)
                q = (w.in_proj_weight[:C] @ x_NTC[n, t] + w.in_proj_bias[:C])[part]
                k = [(w.in_proj_weight[C : 2 * C] @ x_NTC[m, t] + w.in_proj_bias[C : 2 * C])[part] for m in seen]
                v = [(w.in_proj_weight[2 * C :] @ x_NTC[m, t] + w.in_proj_bias[2 * C :])[part] for m in seen]
                scores = [math.exp(float(q @ key) / math.sqrt(D)) for key in k]
                heads.append(sum(s / sum(scores) * value for s, value in zip(scores, v, strict=True)))
            mixed = w.out_proj_weight @ torch.cat(heads) + w.out_proj_bias  # type: ignore[arg-type]
            hidden = norm(x_NTC[n, t] + mixed, w.norm1_weight, w.norm1_bias)
            after = w.linear2_weight @ (w.linear1_weight @ hidden + w.linear1_bias).clamp(min=0) + w.linear2_bias
            out[n, t] = norm(hidden + after, w.norm2_weight, w.norm2_bias)
    return out.view_as(x)


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (x - x.mean()) / torch.sqrt(((x - x.mean()) ** 2).mean() + 1e-5) * weight + bias


def torchs(module: BatchFormer) -> nn.TransformerEncoderLayer:
    """torch's layer with the same weights."""
    first = module.layers[0]
    like = nn.TransformerEncoderLayer(module.dim, module.num_heads, first.linear1.out_features, module.drop).double()
    like.load_state_dict(first.state_dict())
    return like


def as_published(like: nn.TransformerEncoderLayer, x: Tensor) -> Tensor:
    out: Tensor = like(x.unsqueeze(1)).squeeze(1) if x.dim() == 2 else like(x)
    return out


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_a_plain_loop(shape: tuple[int, ...]) -> None:
    module, x = layer(), torch.randn(shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(module.mix(x), by_loops(module, x), rtol=1e-10, atol=1e-10)


def test_self_attention_of_each_alone_equals_a_plain_loop_and_batches_of_one() -> None:
    module, x = layer(attend="self"), torch.randn(4, 3, 8, dtype=torch.float64)
    with torch.no_grad():
        mixed = module.mix(x)
        torch.testing.assert_close(mixed, by_loops(module, x, itself=True), rtol=1e-10, atol=1e-10)
        module.attend = "batch"
        alone = torch.cat([module.eval().mix(x[n : n + 1]) for n in range(4)])
    torch.testing.assert_close(mixed, alone, rtol=1e-10, atol=1e-10)


def test_self_attention_is_the_batchs_under_a_mask_in_values_and_gradients() -> None:
    q, k, v = (torch.randn(5, 3, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    own = torch.eye(5, dtype=torch.bool)[None, None]
    masked = functional.attend_over_batch(q, k, v, 2, drop=0.0, allowed=own)
    alone = functional.attend_to_itself(v, 2, drop=0.0)
    torch.testing.assert_close(alone, masked, rtol=1e-12, atol=1e-12)
    direction = torch.randn_like(masked)
    of_masked = torch.autograd.grad(masked, (q, k, v), direction)
    torch.testing.assert_close(torch.autograd.grad(alone, v, direction)[0], of_masked[2], rtol=1e-12, atol=1e-12)
    for gradient in of_masked[:2]:  # softmax over one key hangs on neither query nor key
        assert float(gradient.abs().max()) < 1e-12


@pytest.mark.parametrize("drop", [0.5, 0.25, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(50, 1, 8), (3000, 2, 8)])
def test_self_attention_drops_whole_weights_at_the_rate(drop: float, shape: tuple[int, int, int]) -> None:
    """One weight for each sample, position and head: a head's channels are all dropped or all kept, and scaled."""
    torch.manual_seed(0)
    v = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out = functional.attend_to_itself(v, 2, drop=drop)
    (gradient,) = torch.autograd.grad(out.sum(), v)
    factor = (out / v).unflatten(-1, (2, 4))
    torch.testing.assert_close(gradient.unflatten(-1, (2, 4)), factor)
    torch.testing.assert_close(factor, factor[..., :1].expand_as(factor))
    kept = factor[..., 0] != 0
    if drop < 1:
        torch.testing.assert_close(
            factor[..., 0][kept], torch.full((int(kept.sum()),), 1 / (1 - drop)).double(), rtol=1e-4, atol=0
        )
    spread = math.sqrt(drop * (1 - drop) / kept.numel())
    assert abs(float(kept.double().mean()) - (1 - drop)) <= 4 * spread


def test_self_attention_is_linear_in_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """No score of one sample with another is ever computed."""

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("attention over the batch")

    monkeypatch.setattr(functional, "attend_over_batch", refuse)
    module, x = layer(attend="self", drop=0.5), torch.randn(4, 3, 8, dtype=torch.float64)
    assert module.mix(x).shape == x.shape
    with pytest.raises(AssertionError, match="attention over the batch"):
        layer(drop=0.5).mix(x)


@pytest.mark.parametrize("shape", [*SHAPES, (64, 8), (3, 700, 8)])
@pytest.mark.parametrize("drop", [0.0, 0.5, 0.1])
def test_equals_torchs_layer_in_values_and_gradients(shape: tuple[int, ...], drop: float) -> None:
    """With dropout too, under the same seed, at the sizes where torch's own dropout is used."""
    if drop and math.prod(shape) * shape[0] >= cpu_kernels._SMALL:
        pytest.skip("above this size the random numbers are our own")
    module = layer(drop=drop)
    like = torchs(module)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.manual_seed(3)
    ours = module.mix(x)
    torch.manual_seed(3)
    theirs = as_published(like, y)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    direction = torch.randn_like(ours)
    ours.backward(direction)
    theirs.backward(direction)
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-10)
    for (name, own), other in zip(module.layers[0].named_parameters(), like.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_gradients_by_finite_differences() -> None:
    module, x = layer(dim=4), torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module.mix, (x,))


def test_padding_equals_a_plain_loop() -> None:
    module, x = layer(), torch.randn(4, 3, 8, dtype=torch.float64)
    padding = torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 1], [0, 1, 1]], dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(module.mix(x, mask=padding), by_loops(module, x, padding), rtol=1e-10, atol=1e-10)


def test_padding_leaks_nothing_and_a_position_of_padding_alone_gives_no_nan() -> None:
    module = layer(drop=0.5).train()
    padding = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 1]], dtype=torch.bool)
    x = torch.randn(3, 3, 8, dtype=torch.float64, requires_grad=True)
    other = x.detach().clone()
    other[padding] += 100.0
    torch.manual_seed(0)
    out = module.mix(x, mask=padding)
    torch.manual_seed(0)
    assert torch.equal(module.mix(other, mask=padding)[~padding], out[~padding])
    out[~padding].sum().backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert (x.grad[padding] == 0).all()
    # Without a mask padding takes part, as in the published code.
    assert not torch.allclose(module.eval().mix(x)[~padding], module.mix(other)[~padding])


# ---------------------------------------------------------------- half precision, memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_half_precision_stays_finite_with_large_values(dtype: torch.dtype, drop: float) -> None:
    module = BatchFormer(16, drop=drop).to(dtype)
    x = (30 * torch.randn(200, 16)).to(dtype).requires_grad_()
    out = module.mix(x)
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert torch.isfinite(out).all()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_half_precision_is_near_to_fp64() -> None:
    module = layer(dim=16)
    x = torch.randn(100, 16, dtype=torch.float64)
    exact = module.mix(x).detach()
    torch.testing.assert_close(module.bfloat16().mix(x.bfloat16()).double(), exact, rtol=0.1, atol=0.15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 16), (100, 16), (6, 50, 16)])
def test_autocast(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Small batches (explicit) and large ones (tiles): finite, close to fp32 without dropout, gradients in fp32."""
    torch.manual_seed(0)
    x = torch.randn(shape)
    for drop in (0.0, 0.5):
        module = BatchFormer(16, drop=drop)
        with torch.autocast("cpu", dtype):
            low = module(x)
        low.float().square().mean().backward()
        assert all(
            p.grad is not None and p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all()
            for p in module.parameters()
        )
        assert torch.equal(low[: len(x)], x)
        if not drop:
            torch.testing.assert_close(low, module(x), rtol=0.05, atol=0.05)


def test_softmax_is_fp32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    softmax = torch.softmax

    def watched(*args: object, **named: object) -> Tensor:
        out: Tensor = softmax(*args, **named)  # type: ignore[call-overload]
        seen.append(out.dtype)
        return out

    monkeypatch.setattr(torch, "softmax", watched)
    with torch.autocast("cpu", torch.bfloat16):
        BatchFormer(16).mix(torch.randn(100, 16))
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("attend", ["batch", "self"])
def test_memory_is_linear_in_the_batch(attend: str, masked: bool, drop: float) -> None:
    """The tensors that autograd keeps for the backward pass grow with the rows, not with their square."""

    def kept(rows: int) -> int:
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        mask = torch.rand(rows) < 0.3 if masked else None
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module = BatchFormer(8, 1, drop=drop, attend=attend)  # type: ignore[arg-type]
            module.mix(torch.randn(rows, 8, requires_grad=True), mask=mask)
        return total

    assert kept(2000) < 2.2 * kept(1000)


@pytest.mark.parametrize("padded", [0.3, 1.0])
def test_what_may_be_seen_takes_no_square_of_the_batch(padded: float) -> None:
    padding = torch.rand(64, 5, generator=torch.Generator().manual_seed(0)) < padded
    allowed = functional.attention_allowed(padding)
    assert allowed.shape == (5, 1, 1, 64)
    assert torch.equal(allowed[:, 0, 0], ~padding.T if padded < 1 else torch.ones(5, 64, dtype=torch.bool))


def test_sum_of_weights_survives_thousands_of_rows() -> None:
    zeros = torch.zeros(5000, 1, 8)
    out = functional.attend_over_batch(zeros, zeros, zeros + 1, 1, drop=0.0, allowed=None)
    torch.testing.assert_close(out, zeros + 1)


def test_functional_equals_module() -> None:
    module, x = layer(), torch.randn(5, 3, 8, dtype=torch.float64)
    weights = module.layers[0].weights()  # type: ignore[operator]
    assert torch.equal(functional.encoder_layer(x, weights, 2), module.mix(x))
