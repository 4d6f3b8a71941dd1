"""Dropout and tiled attention that are fast on a processor; on a GPU torch's own kernels run instead."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Below this size torch's own dropout is used, so that small layers draw the very random numbers of torch's layer.
_SMALL = 2**13


# Attention weights worked on at once on the CPU (elements): they stay in its cache.
_TILE = 2**19


def dropout(x: Tensor, p: float, *, inplace: bool = False) -> Tensor:
    """Dropout in training, with cheap random numbers on the CPU.

    torch draws one Bernoulli number for each element, which on the CPU costs as much as a matrix product. Here one
    64-bit draw serves eight elements (four where ``p`` is not a multiple of 1/256; ``p`` is then rounded to 1/65536
    and the kept values are scaled by the rounded rate, so the expectation is exact). Small tensors, other devices
    and compiled graphs take :func:`torch.nn.functional.dropout`.

    Args:
        x: Any shape.
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
    keep = _keep_mask(x, p)
    return x.mul_(keep) if inplace else x * keep


def _keep_mask(like: Tensor, p: float, generator: torch.Generator | None = None) -> Tensor:
    """What :func:`dropout` multiplies with: 0 or ``1 / (1 - p)``, of the shape and dtype of ``like``."""
    bits, lanes, dtype = (8, 8, torch.int8) if (p * 256).is_integer() else (16, 4, torch.int16)
    levels = 2**bits
    dropped = min(max(round(p * levels), 1), levels - 1)
    draws = torch.empty(-(-like.numel() // lanes), dtype=torch.int64).random_(-(2**63), None, generator=generator)
    lane = draws.view(dtype)[: like.numel()].view(like.shape)
    keep = torch.ge(lane, dropped - levels // 2, out=torch.empty(like.shape, dtype=like.dtype))
    return keep.mul_(levels / (levels - dropped))


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _attention_weights(q_THND: Tensor, k_THMD: Tensor, allowed: Tensor | None) -> Tensor:
    scores_THNM = torch.matmul(q_THND * (1.0 / math.sqrt(q_THND.shape[-1])), k_THMD.transpose(-2, -1))
    if allowed is not None:
        scores_THNM = scores_THNM.masked_fill(~allowed, float("-inf"))
    return torch.softmax(scores_THNM, dim=-1)


def _plain_attention(q_THND: Tensor, k_THMD: Tensor, v_THMD: Tensor, allowed: Tensor | None, drop: float) -> Tensor:
    return torch.matmul(dropout(_attention_weights(q_THND, k_THMD, allowed), drop), v_THMD)


class _TiledAttention(torch.autograd.Function):
    """Attention with dropout in tiles that stay in the processor's cache.

    The backward pass computes the tiles anew, with the same dropout, so memory is linear in the batch.
    """

    @staticmethod
    def forward(
        ctx: Any, q_THND: Tensor, k_THMD: Tensor, v_THMD: Tensor, allowed: Tensor | None, drop: float
    ) -> Tensor:
        q_THND, k_THMD, v_THMD = q_THND.contiguous(), k_THMD.contiguous(), v_THMD.contiguous()
        ctx.save_for_backward(q_THND, k_THMD, v_THMD, allowed)
        ctx.drop, ctx.seed = drop, int(torch.empty((), dtype=torch.int64).random_())
        generator = torch.Generator().manual_seed(ctx.seed)
        out_THND = _samples_first(q_THND)
        for queries, keys in _tiles(q_THND, k_THMD.shape[2]):
            weights = _attention_weights(q_THND[queries], k_THMD[keys], _cut(allowed, queries))
            weights.mul_(_keep_mask(weights, drop, generator))
            out_THND[queries] = torch.matmul(weights, v_THMD[keys])
        return out_THND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_THND: Tensor) -> tuple[Tensor | None, ...]:
        q_THND, k_THMD, v_THMD, allowed = ctx.saved_tensors
        generator = torch.Generator().manual_seed(ctx.seed)
        scale = 1.0 / math.sqrt(q_THND.shape[-1])
        grad_q, grad_k, grad_v = _samples_first(q_THND), _samples_first(k_THMD).zero_(), _samples_first(v_THMD).zero_()
        for queries, keys in _tiles(q_THND, k_THMD.shape[2]):
            q, k, grad = q_THND[queries], k_THMD[keys], grad_THND[queries]
            weights = _attention_weights(q, k, _cut(allowed, queries))
            keep = _keep_mask(weights, ctx.drop, generator)
            grad_v[keys] += torch.matmul((weights * keep).transpose(-2, -1), grad)
            grad_weights = torch.matmul(grad, v_THMD[keys].transpose(-2, -1)).mul_(keep)
            # Softmax: each score gets its weight times (own gradient minus the weighted mean of the row's).
            mean = torch.linalg.vecdot(grad_weights, weights).unsqueeze(-1)
            grad_scores = grad_weights.sub_(mean).mul_(weights).mul_(scale)
            grad_q[queries] = torch.matmul(grad_scores, k)
            grad_k[keys] += torch.matmul(grad_scores.transpose(-2, -1), q)
        return grad_q, grad_k, grad_v, None, None


Slices = tuple[slice, ...]


def _tiles(q_THND: Tensor, keys: int) -> Iterator[tuple[Slices, Slices]]:
    """Indices (T, H, N) of queries to work on together, and (T, H) of their keys."""
    T, H, N, _ = q_THND.shape
    positions = max(1, _TILE // (H * N * keys))
    heads = H if H * N * keys <= _TILE else 1
    rows = max(1, _TILE // keys)
    for t in range(0, T, positions):
        for h in range(0, H, heads):
            for n in range(0, N, rows):
                place = slice(t, t + positions), slice(h, h + heads)
                yield (*place, slice(n, n + rows)), place


def _samples_first(like_THND: Tensor) -> Tensor:
    """An empty tensor of this shape with samples outermost in memory, the order of the linear layers around."""
    T, H, N, D = like_THND.shape
    return like_THND.new_empty(N, T, H, D).permute(1, 2, 0, 3)


def _cut(allowed: Tensor | None, queries: Slices) -> Tensor | None:
    if allowed is None:
        return None
    return allowed[tuple(part if size > 1 else slice(None) for part, size in zip(queries, allowed.shape, strict=False))]
