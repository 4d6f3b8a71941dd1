"""Batch attention as pure functions.

Axes, used as suffixes of names (``x_NTC``):

    N  samples of the mini-batch (queries)      T  token positions (1 for plain features)
    M  samples that are attended to (keys)      C  channels
    H  heads                                    D  channels of one head, C = H * D

Attention runs over the samples, N x M, independently at every token position and head. ``M`` equals ``N`` unless
the keys were gathered from several processes (:mod:`batchformer.core.distributed`).
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_kernels import attention_with_dropout, dropout, sum_dtype

Attend = Literal["batch", "self"]
Gather = Callable[[Tensor], Tensor]


class LayerWeights(NamedTuple):
    """Parameters of one post-norm encoder layer, in the order and shapes of torch's; F is the feed-forward width."""

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


def attention_allowed(padding_MT: Tensor) -> Tensor:
    """Allow attention to the keys that are no padding.

    Where all samples are padding all keys are allowed, because a softmax over nothing would be NaN; the output there is
    not used. Takes booleans (M, T), true = padding; returns booleans that broadcast to (T, H, N, M), true = allowed.
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
        num_heads: Number of heads; divides C.
        drop: Dropout probability of the attention weights, in [0, 1].
        allowed: Boolean, broadcasts to (T, H, N, M); ``None`` allows all.

    Returns:
        Tensor (N, T, C).

    Source:
        BatchFormer (CVPR 2022), section 3.1; attention as in Vaswani et al. 2017, equation 1.

    Example:
        >>> x = torch.randn(6, 3, 8)
        >>> attend_over_batch(x, x, x, 2, drop=0.0, allowed=None).shape
        torch.Size([6, 3, 8])
    """
    N, T, C = q_NTC.shape
    q_THND, k_THMD, v_THMD = (x.unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q_NTC, k_MTC, v_MTC))
    if drop in (0.0, 1.0) or q_NTC.device.type != "cpu" or torch.compiler.is_compiling():
        out = F.scaled_dot_product_attention(q_THND, k_THMD, v_THMD, attn_mask=allowed, dropout_p=drop)
    else:
        out = attention_with_dropout(q_THND, k_THMD, v_THMD, allowed, drop)
    return out.permute(2, 0, 1, 3).reshape(N, T, C)


def attend_to_itself(v_NTC: Tensor, num_heads: int, *, drop: float) -> Tensor:
    """Attention in which each sample sees itself alone: its value times its one weight, which is 1.

    Dropout zeroes that weight for each sample, position and head, as in :func:`attend_over_batch`.

    Args:
        v_NTC: Values, (N, T, C).
        num_heads: Number of heads; divides C.
        drop: Dropout probability of the attention weights, in [0, 1].

    Returns:
        Tensor (N, T, C).

    Example:
        >>> v = torch.randn(6, 3, 8)
        >>> torch.equal(attend_to_itself(v, 2, drop=0.0), v)
        True
    """
    if drop == 0.0:
        return v_NTC
    v_NTHD = v_NTC.unflatten(-1, (num_heads, -1))
    weights_NTH1 = dropout(v_NTHD.new_ones(*v_NTHD.shape[:-1], 1, dtype=sum_dtype(v_NTC.dtype)), drop)
    out: Tensor = (v_NTHD * weights_NTH1).flatten(-2).to(v_NTC.dtype)
    return out


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
    """Run one post-norm transformer encoder layer whose sequence is the mini-batch.

    ``H = LayerNorm(x + Drop(Attention(x)))``, ``out = LayerNorm(H + Drop(W2 Drop(ReLU(W1 H))))``.

    Args:
        x_NTC: Samples, (N, T, C).
        weights: Parameters of the layer.
        num_heads: Number of heads; divides C.
        drop: Dropout probability in [0, 1] of the attention weights, inside the feed-forward part and on both residual
            branches.
        attend: ``"batch"`` attends to all samples, ``"self"`` lets each sample attend to itself alone.
        padding_NT: Boolean (N, T), true where a token is padding. Padding neither attends nor is attended to; its
            rows are returned unchanged.
        gather: Function that brings the rows of all processes together, (N, ...) -> (M, ...). ``None`` uses the rows
            of this process alone.
        eps: Epsilon of both layer norms.

    Returns:
        Tensor (N, T, C).

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
