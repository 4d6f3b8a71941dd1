"""The CPU's own dropout and tiled attention, by their rates and mask by mask."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batchformer.core import cpu_kernels
from batchformer.core.cpu_kernels import dropout
from batchformer.core.functional import attend_over_batch, attention_allowed


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def random(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


# --- dropout ------------------------------------------------------------------------------------------------------

# 0.5 and 0.25 are multiples of 1/256: eight lanes of a draw. 0.1 and 0.3 are not: four lanes.
RATES = [0.5, 0.25, 0.1, 0.3]


@pytest.fixture
def no_torch_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("torch's own dropout ran")

    monkeypatch.setattr(F, "dropout", refuse)


@pytest.mark.usefixtures("no_torch_dropout")
@pytest.mark.parametrize("p", RATES)
def test_dropout_elements_and_lanes_are_independent(p: float) -> None:
    lanes = 8 if (p * 256).is_integer() else 4
    keep = (dropout(torch.ones(2**20, dtype=torch.float64), p) != 0).double()
    bound = 5 / math.sqrt(keep.numel() / lanes)
    rates = keep.view(-1, lanes).mean(0)
    assert float((rates - (1 - p)).abs().max()) < bound  # no lane has a rate of its own
    for lag in range(1, 2 * lanes + 1):
        correlation = torch.corrcoef(torch.stack((keep[:-lag], keep[lag:])))[0, 1]
        assert abs(float(correlation)) < bound, f"elements {lag} apart"
    between_lanes = torch.corrcoef(keep.view(-1, lanes).T) - torch.eye(lanes, dtype=torch.float64)
    assert float(between_lanes.abs().max()) < bound


@pytest.mark.usefixtures("no_torch_dropout")
@pytest.mark.parametrize("p", [0.5, 0.25, 0.1, 0.9, 1 / 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_keeps_the_rate_and_the_mean(p: float, dtype: torch.dtype) -> None:
    n = 400_003  # no multiple of the lanes
    out = dropout(torch.ones(n, dtype=dtype), p)
    kept = (out != 0).double()
    assert abs(float(kept.mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n) + 2**-16
    exact = torch.full((int(kept.sum()),), 1 / (1 - p), dtype=torch.float64)
    torch.testing.assert_close(out[out != 0].double(), exact, rtol=1e-2, atol=0)


def test_dropout_at_its_ends() -> None:
    x = torch.randn(20_000)
    assert dropout(x, 0.0) is x
    assert (dropout(x, 1.0) == 0).all()


def test_dropout_follows_the_seed() -> None:
    x = torch.ones(20_000)
    torch.manual_seed(5)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(dropout(x, 0.5), first)


@pytest.mark.usefixtures("no_torch_dropout")
@pytest.mark.parametrize("p", [0.5, 0.1])
@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_gradient_uses_the_same_mask(p: float, inplace: bool) -> None:
    x = torch.ones(9001, dtype=torch.float64, requires_grad=True)
    before = x * 1.0
    out = dropout(before, p, inplace=inplace)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, out.detach(), rtol=0, atol=0)
    assert (out is before) is inplace


@pytest.mark.parametrize("shape", [(8193,), (91, 93), (3, 2741), (8192,)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dropout_keeps_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for p in (0.5, 0.1):
        out = dropout(torch.ones(shape, dtype=dtype), p)
        assert out.shape == shape
        assert out.dtype == dtype
        assert abs(float(out.double().mean()) - 1) < 0.1


def test_small_tensors_take_torchs_random_numbers() -> None:
    x = torch.ones(8191)
    torch.manual_seed(1)
    ours = dropout(x, 0.3)
    torch.manual_seed(1)
    assert torch.equal(ours, F.dropout(x, 0.3))


# --- attention in tiles --------------------------------------------------------------------------------------------


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The dropout masks in the order they were drawn."""
    drawn: list[Tensor] = []
    draw = cpu_kernels._draw_keep_mask

    def record(*args: Any) -> Tensor:
        drawn.append(draw(*args))
        return drawn[-1]

    monkeypatch.setattr(cpu_kernels, "_draw_keep_mask", record)
    return drawn


def assemble(masks: list[Tensor], heads_first: Tensor) -> Tensor:
    """Put the masks of the tiles together to one of all attention weights, (T, H, N, M)."""
    T, H, N, _ = heads_first.shape
    whole = torch.full((T, H, N, N), torch.nan, dtype=torch.float64)
    for (queries, _), mask in zip(cpu_kernels._tiles(heads_first, N), masks, strict=True):
        whole[queries] = mask
    return whole


def masks_of_seen(kind: str, n: int, t: int) -> Tensor | None:
    if kind == "all":
        return None
    if kind == "self":  # a mask of another form: one for each query
        return torch.eye(n, dtype=torch.bool)[None, None]
    return attention_allowed(torch.rand(n, t) < 0.4)


@pytest.mark.parametrize("seen", ["all", "padding", "self"])
@pytest.mark.parametrize(
    ("n", "t", "tile"),
    [(70, 1, 300), (70, 3, 5000), (70, 3, 10**9), (3, 300, 200), (3, 301, 10**9), (47, 2, 1)],
    ids=["queries", "heads", "one", "positions", "many positions", "single rows"],
)
def test_tiles_equal_the_whole(
    monkeypatch: pytest.MonkeyPatch, masks: list[Tensor], n: int, t: int, tile: int, seen: str
) -> None:
    monkeypatch.setattr(cpu_kernels, "_TILE", tile)
    monkeypatch.setattr(cpu_kernels, "_SMALL", 1)
    q, k, v = (random(n, t, 8, grad=True) for _ in range(3))
    allowed = masks_of_seen(seen, n, t)
    out = attend_over_batch(q, k, v, 2, drop=0.3, allowed=allowed)
    forward_masks = list(masks)
    masks.clear()
    out_grad = random(n, t, 8)
    grads = torch.autograd.grad(out, (q, k, v), out_grad)
    assert len(masks) == len(forward_masks)
    assert all(torch.equal(a, b) for a, b in zip(masks, forward_masks, strict=True)), "the backward pass dropped others"

    q_THND, k_THND, v_THND = (x.unflatten(-1, (2, 4)).permute(1, 2, 0, 3) for x in (q, k, v))
    scores = q_THND @ k_THND.transpose(-2, -1) / 2
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    whole = (scores.softmax(-1) * assemble(forward_masks, q_THND)) @ v_THND
    whole = whole.permute(2, 0, 1, 3).reshape(n, t, 8)
    torch.testing.assert_close(out, whole)
    for ours, theirs in zip(grads, torch.autograd.grad(whole, (q, k, v), out_grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_tiles_with_more_keys_than_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_TILE", 400)
    monkeypatch.setattr(cpu_kernels, "_SMALL", 1)
    q, k, v = random(20, 2, 8), random(51, 2, 8), torch.ones(51, 2, 8, dtype=torch.float64)
    drop_nothing = attend_over_batch(q, k, v, 2, drop=1e-9, allowed=None)  # rounded up to 1/65536
    torch.testing.assert_close(drop_nothing, torch.ones_like(drop_nothing), rtol=0.2, atol=0)
    assert drop_nothing.shape == (20, 2, 8)


def test_tiles_drop_weights_at_the_rate() -> None:
    """With equal scores and values of one, an output is the share of weights kept, over the rate."""
    zeros, ones = torch.zeros(300, 1, 4), torch.ones(300, 1, 4)
    out = attend_over_batch(zeros, zeros, ones, 1, drop=0.25, allowed=None)
    assert abs(float(out.mean()) - 1) < 0.01
    assert 0.01 < float(out[:, 0, 0].std()) < 0.06  # sqrt(p / (1 - p) / 300) = 0.033: independent draws


def test_dropout_in_tiles_is_unbiased() -> None:
    q, k, v = random(64, 1, 8), random(64, 1, 8), random(64, 1, 8)
    exact = attend_over_batch(q, k, v, 2, drop=0.0, allowed=None)
    mean = torch.stack([attend_over_batch(q, k, v, 2, drop=0.5, allowed=None) for _ in range(2000)]).mean(0)
    assert float((mean - exact).abs().max()) < 0.15
    assert float((mean - exact).abs().mean()) < 0.02


@pytest.mark.parametrize("n", [8, 64], ids=["plain", "tiled"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_survives_large_scores(n: int, dtype: torch.dtype) -> None:
    x = (torch.randn(n, 1, 64) * 400).to(dtype).requires_grad_()  # scores around a million: beyond fp16
    out = attend_over_batch(x, x, x, 1, drop=0.5, allowed=None)
    out.float().mean().backward()
    assert out.dtype == dtype
    assert x.grad is not None
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
