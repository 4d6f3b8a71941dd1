"""Batch attention as pure functions.

Axes, used as suffixes of names (``x_NTC``):

    N  samples of the mini-batch (queries)      T  token positions (1 for plain features)
    M  samples that are attended to (keys)      C  channels
    H  heads                                    D  channels of one head, C = H * D

Attention runs over the samples, N x M, independently at every token position and head. ``M`` equals ``N`` unless
the keys were gathered from several processes (:mod:`batchformer.core.distributed`).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Attend = Literal["batch", "self"]
Gather = Callable[[Tensor], Tensor]

# Below this size torch's own dropout is used, so that small layers draw the very random numbers of torch's layer.
_SMALL = 2**13
# Attention weights worked on at once on the CPU (elements): they stay in its cache.
_TILE = 2**19


class LayerWeights(NamedTuple):
    """Parameters of one post-norm encoder layer, in the order and shapes of ``torch.nn.TransformerEncoderLayer``."""

    in_proj_weight: Tensor  # (3C, C)
    in_proj_bias: Tensor  # (3C,)
    out_proj_weight: Tensor  # (C, C)
    out_proj_bias: Tensor  # (C,)
    linear1_weight: Tensor  # (F, C)
    linear1_bias: Tensor  # (F,)
    linear2_weight: Tensor  # (C, F)
    linear2_bias: Tensor  # (C,)
    norm1_weight: Tensor  # (C,)
    norm1_bias: Tensor  # (C,)
    norm2_weight: Tensor  # (C,)
    norm2_bias: Tensor  # (C,)


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


def attention_allowed(padding_MT: Tensor) -> Tensor:
    """Which keys may be seen, as a boolean tensor that broadcasts to (T, H, N, M): those that are no padding.

    Where all samples are padding all are allowed, as a softmax over nothing would be NaN; nobody uses what comes out.
    """
    return (~padding_MT | padding_MT.all(dim=0)).T[:, None, None, :]


def attend_over_batch(
    q_NTC: Tensor, k_MTC: Tensor, v_MTC: Tensor, num_heads: int, *, drop: float, allowed: Tensor | None
) -> Tensor:
    """Multi-head attention over the first axis: softmax(q k^T / sqrt(D)) v, with dropout on the weights.

    Args:
        q_NTC: Queries, (N, T, C).
        k_MTC: Keys, (M, T, C).
        v_MTC: Values, (M, T, C).
        num_heads: Heads; divides C.
        drop: Dropout probability of the attention weights.
        allowed: Boolean, broadcasts to (T, H, N, M); ``None`` allows all.

    Returns:
        (N, T, C).

    Source:
        BatchFormer (CVPR 2022), section 3.1; attention as in Vaswani et al. 2017, equation 1.

    Example:
        >>> x = torch.randn(6, 3, 8)
        >>> attend_over_batch(x, x, x, 2, drop=0.0, allowed=None).shape
        torch.Size([6, 3, 8])
    """
    N, T, C = q_NTC.shape
    M = k_MTC.shape[0]
    q_THND, k_THMD, v_THMD = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q_NTC, k_MTC, v_MTC))
    if drop in (0.0, 1.0) or q_NTC.device.type != "cpu" or torch.compiler.is_compiling():
        out = F.scaled_dot_product_attention(q_THND, k_THMD, v_THMD, attn_mask=allowed, dropout_p=drop)
    else:
        # torch has no fused CPU kernel with dropout. As in its unfused one, half precision is worked on in fp32: sums
        # over thousands of samples need the digits, and in fp16 large scores would overflow.
        exact = _exact(q_NTC.dtype)
        attend = _plain_attention if T * num_heads * N * M < _SMALL else _TiledAttention.apply
        with torch.autocast("cpu", enabled=False):
            out = attend(q_THND.to(exact), k_THMD.to(exact), v_THMD.to(exact), allowed, drop).to(q_NTC.dtype)
    return out.permute(2, 0, 1, 3).reshape(N, T, C)


def attend_to_itself(v_NTC: Tensor, num_heads: int, *, drop: float) -> Tensor:
    """What :func:`attend_over_batch` is where each sample sees itself alone: its value times its one weight, 1.

    Dropout takes that weight, for each sample, position and head, as it takes any other.

    Args:
        v_NTC: Values, (N, T, C).
        num_heads: Heads; divides C.
        drop: Dropout probability of the attention weights.

    Returns:
        (N, T, C).

    Example:
        >>> v = torch.randn(6, 3, 8)
        >>> torch.equal(attend_to_itself(v, 2, drop=0.0), v)
        True
    """
    if drop == 0.0:
        return v_NTC
    v_NTHD = v_NTC.unflatten(-1, (num_heads, -1))
    weights_NTH1 = dropout(v_NTHD.new_ones(*v_NTHD.shape[:-1], 1, dtype=_exact(v_NTC.dtype)), drop)
    out: Tensor = (v_NTHD * weights_NTH1).flatten(-2).to(v_NTC.dtype)
    return out


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


def encoder_layer(
    x_NTC: Tensor,
    weights: LayerWeights,
    num_heads: int,
    *,
    drop: float = 0.0,
    attend: Attend = "batch",
    padding_NT: Tensor | None = None,
    gather: Gather | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """One post-norm transformer encoder layer whose sequence is the mini-batch.

    ``H = LayerNorm(x + Drop(Attention(x)))``, ``out = LayerNorm(H + Drop(W2 Drop(ReLU(W1 H))))``.

    Args:
        x_NTC: Samples, (N, T, C).
        weights: Parameters of the layer.
        num_heads: Heads; divides C.
        drop: Dropout probability, used on the attention weights, inside the feed-forward part and on both residual
            branches.
        attend: ``"batch"``: all samples; ``"self"``: each sample itself alone.
        padding_NT: Boolean (N, T), true where a token is padding. Padding neither attends nor is attended to; its
            rows come back as they are.
        gather: Brings the rows of all processes together, (N, ...) -> (M, ...). ``None``: this process alone.
        eps: Of both layer norms.

    Returns:
        (N, T, C).

    Source:
        BatchFormer (CVPR 2022), section 3.1; BatchFormerV2 (arXiv 2204.01254), section 3.2.
    """
    w = weights
    if attend == "self":
        v_NTC = F.linear(x_NTC, w.in_proj_weight.chunk(3)[2], w.in_proj_bias.chunk(3)[2])
        mixed_NTC = attend_to_itself(v_NTC, num_heads, drop=drop)
    else:
        q_NTC, k_MTC, v_MTC = F.linear(x_NTC, w.in_proj_weight, w.in_proj_bias).chunk(3, dim=-1)
        padding_MT = padding_NT
        if gather is not None:
            k_MTC, v_MTC = gather(torch.cat((k_MTC, v_MTC), dim=-1)).chunk(2, dim=-1)
            padding_MT = None if padding_NT is None else gather(padding_NT.to(torch.uint8)).bool()
        allowed = None if padding_MT is None else attention_allowed(padding_MT)
        mixed_NTC = attend_over_batch(q_NTC, k_MTC, v_MTC, num_heads, drop=drop, allowed=allowed)
    mixed_NTC = dropout(F.linear(mixed_NTC, w.out_proj_weight, w.out_proj_bias), drop, inplace=True)
    h_NTC = F.layer_norm(x_NTC + mixed_NTC, x_NTC.shape[-1:], w.norm1_weight, w.norm1_bias, eps)
    hidden = dropout(F.relu(F.linear(h_NTC, w.linear1_weight, w.linear1_bias), inplace=True), drop)
    out_NTC = h_NTC + dropout(F.linear(hidden, w.linear2_weight, w.linear2_bias), drop, inplace=True)
    out_NTC = F.layer_norm(out_NTC, x_NTC.shape[-1:], w.norm2_weight, w.norm2_bias, eps)
    return out_NTC if padding_NT is None else torch.where(padding_NT[..., None], x_NTC.to(out_NTC.dtype), out_NTC)
