"""Dropout, and attention with dropout, that are fast on a processor. On a GPU torch's own kernels run instead."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Slices = tuple[slice, ...]

# Below this number of elements torch's own dropout runs, so that small layers draw the random numbers of torch's layer.
_SMALL = 2**13

# Attention weights that are worked on at once, in elements: this many stay in the processor's cache.
_TILE = 2**19


def dropout(x: Tensor, p: float, *, inplace: bool = False) -> Tensor:
    """Zero elements at random, as in training, with cheap random numbers on the CPU.

    torch draws one Bernoulli number for each element, which on the CPU costs as much as a matrix product. Here one
    64-bit draw serves eight elements. It serves four if ``p`` is not a multiple of 1/256; ``p`` is then rounded to
    1/65536 and the kept values are scaled by the rounded rate, so that the expectation is exact. Small tensors, other
    devices and compiled graphs use :func:`torch.nn.functional.dropout`.

    Args:
        x: Tensor of any shape.
        p: Probability of zeroing an element, in [0, 1].
        inplace: Overwrite ``x``.

    Returns:
        Tensor of the shape and dtype of ``x``; kept elements are scaled by ``1 / (1 - p)``.

    Example:
        >>> x = torch.ones(100, 1000)
        >>> 0.97 < dropout(x, 0.5).mean() < 1.03
        tensor(True)
    """
    if p == 0.0:
        return x
    if p == 1.0 or x.device.type != "cpu" or x.numel() < _SMALL or torch.compiler.is_compiling():
        return F.dropout(x, p, inplace=inplace)
    keep = _draw_keep_mask(x, p)
    return x.mul_(keep) if inplace else x * keep


def attention_with_dropout(
    q_THND: Tensor, k_THMD: Tensor, v_THMD: Tensor, allowed: Tensor | None, drop: float
) -> Tensor:
    """Compute softmax(q k^T / sqrt(D)) v with dropout on the weights, for which torch has no fused CPU kernel.

    Half precision is worked on in fp32, as in torch's unfused kernel: sums over thousands of samples need the digits,
    and in fp16 large scores would overflow. Arguments as in :func:`batchformer.core.functional.attend_over_batch`, with
    heads apart; ``drop`` is neither 0 nor 1.
    """
    T, H, N, _ = q_THND.shape
    dtype = sum_dtype(q_THND.dtype)
    attend = _attend_whole if T * H * N * k_THMD.shape[2] < _SMALL else _TiledAttention.apply
    with torch.autocast("cpu", enabled=False):
        out: Tensor = attend(q_THND.to(dtype), k_THMD.to(dtype), v_THMD.to(dtype), allowed, drop).to(q_THND.dtype)
    return out


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype for sums over samples: fp32 for half precision, otherwise ``dtype`` itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _draw_keep_mask(like: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """Draw the factors of :func:`dropout`: 0 or ``1 / (1 - p)``, of the shape and dtype of ``like``."""
    bits, lanes, dtype = (8, 8, torch.int8) if (p * 256).is_integer() else (16, 4, torch.int16)
    levels = 2**bits
    dropped = min(max(round(p * levels), 1), levels - 1)
    draws = torch.empty(-(-like.numel() // lanes), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    lane = draws.view(dtype)[: like.numel()].view(like.shape)
    keep = torch.ge(lane, dropped - levels // 2, out=torch.empty(like.shape, dtype=like.dtype))
    return keep.mul_(levels / (levels - dropped))


def _attention_weights(q_THND: Tensor, k_THMD: Tensor, allowed: Tensor | None) -> Tensor:
    scores_THNM = torch.matmul(q_THND * (1.0 / math.sqrt(q_THND.shape[-1])), k_THMD.transpose(-2, -1))
    if allowed is not None:
        scores_THNM = scores_THNM.masked_fill(~allowed, float("-inf"))
    return torch.softmax(scores_THNM, dim=-1)


def _attend_whole(q_THND: Tensor, k_THMD: Tensor, v_THMD: Tensor, allowed: Tensor | None, drop: float) -> Tensor:
    return torch.matmul(dropout(_attention_weights(q_THND, k_THMD, allowed), drop), v_THMD)


class _TiledAttention(torch.autograd.Function):
    """Attention with dropout in tiles that stay in the processor's cache.

    The backward pass computes the tiles again, with the same dropout, so that memory is linear in the batch.
    """

    @staticmethod
    def forward(
        ctx: Any, q_THND: Tensor, k_THMD: Tensor, v_THMD: Tensor, allowed: Tensor | None, drop: float
    ) -> Tensor:
        q_THND, k_THMD, v_THMD = q_THND.contiguous(), k_THMD.contiguous(), v_THMD.contiguous()
        ctx.save_for_backward(q_THND, k_THMD, v_THMD, allowed)
        ctx.drop, ctx.seed = drop, int(torch.empty((), dtype=torch.int64).random_())
        generator = torch.Generator().manual_seed(ctx.seed)
        out_THND = _empty_samples_first(q_THND)
        for queries, keys in _tiles(q_THND, k_THMD.shape[2]):
            weights = _attention_weights(q_THND[queries], k_THMD[keys], _slice_allowed(allowed, queries))
            weights.mul_(_draw_keep_mask(weights, drop, generator))
            out_THND[queries] = torch.matmul(weights, v_THMD[keys])
        return out_THND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THND: Tensor) -> tuple[Tensor | None, ...]:
        q_THND, k_THMD, v_THMD, allowed = ctx.saved_tensors
        generator = torch.Generator().manual_seed(ctx.seed)
        scale = 1.0 / math.sqrt(q_THND.shape[-1])
        grad_q = _empty_samples_first(q_THND)
        grad_k, grad_v = _empty_samples_first(k_THMD).zero_(), _empty_samples_first(v_THMD).zero_()
        for queries, keys in _tiles(q_THND, k_THMD.shape[2]):
            q, k, grad = q_THND[queries], k_THMD[keys], grad_THND[queries]
            weights = _attention_weights(q, k, _slice_allowed(allowed, queries))
            keep = _draw_keep_mask(weights, ctx.drop, generator)
            grad_v[keys] += torch.matmul((weights * keep).transpose(-2, -1), grad)
            grad_weights = torch.matmul(grad, v_THMD[keys].transpose(-2, -1)).mul_(keep)
            # Softmax: the gradient of a score is its weight times (own gradient minus the row's weighted mean).
            mean = torch.linalg.vecdot(grad_weights, weights).unsqueeze(-1)
            grad_scores = grad_weights.sub_(mean).mul_(weights).mul_(scale)
            grad_q[queries] = torch.matmul(grad_scores, k)
            grad_k[keys] += torch.matmul(grad_scores.transpose(-2, -1), q)
        return grad_q, grad_k, grad_v, None, None


def _tiles(q_THND: Tensor, keys: int) -> Iterator[tuple[Slices, Slices]]:
    """Yield indices (T, H, N) of queries to work on together, and (T, H) of their keys."""
    T, H, N, _ = q_THND.shape
    positions = max(1, _TILE // (H * N * keys))
    heads = H if H * N * keys <= _TILE else 1
    rows = max(1, _TILE // keys)
    for t in range(0, T, positions):
        for h in range(0, H, heads):
            for n in range(0, N, rows):
                outer = slice(t, t + positions), slice(h, h + heads)
                yield (*outer, slice(n, n + rows)), outer


def _empty_samples_first(like_THND: Tensor) -> Tensor:
    """Make an empty tensor of this shape with samples outermost in memory, as the linear layers around it need."""
    T, H, N, D = like_THND.shape
    return like_THND.new_empty(N, T, H, D).permute(1, 2, 0, 3)


def _slice_allowed(allowed: Tensor | None, queries: Slices) -> Tensor | None:
    if allowed is None:
        return None
    return allowed[tuple(part if size > 1 else slice(None) for part, size in zip(queries, allowed.shape, strict=False))]
