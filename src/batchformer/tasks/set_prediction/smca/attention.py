"""Multi-head attention with a bias on its logits, and the feed-forward layer.

Axes: B images, H heads, Q queries, S keys, D channels of one head, C = H * D.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .configuration import SmcaConfig


class InProjection(nn.Linear):
    """Projection to queries, keys or values; the three start as one stacked matrix, as in ``nn.MultiheadAttention``."""


class Attention(nn.Module):
    r"""Multi-head attention :math:`\mathrm{softmax}(Q K^T / \sqrt{D} + \mathrm{bias}) V` between projections.

    With ``bias`` :math:`= \log G` this is spatially modulated co-attention.

    Source:
        SMCA (arXiv 2101.07448), section 3.2, spatially-modulated co-attention.

    Args:
        dim: C, number of channels.
        num_heads: H, a divisor of C.
        drop: Dropout rate of the attention weights, in 0..1.
    """

    def __init__(self, dim: int, num_heads: int, drop: float) -> None:
        super().__init__()
        self.num_heads, self.drop = num_heads, drop
        self.q_proj = InProjection(dim, dim)
        self.k_proj = InProjection(dim, dim)
        self.v_proj = InProjection(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(
        self, query_BQC: Tensor, key_BSC: Tensor, value_BSC: Tensor, bias: Tensor | None, *, need_weights: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query_BQC: Queries.
            key_BSC: Keys.
            value_BSC: Values.
            bias: Tensor that broadcasts to (B, H, Q, S): boolean, True where attention is allowed, or numbers to add.
            need_weights: Return the weights too, which takes more time and memory for all of them.

        Returns:
            The output (B, Q, C) and the weights (B, H, Q, S), before dropout, or ``None``.
        """
        q_BHQD, k_BHSD, v_BHSD = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, x in ((self.q_proj, query_BQC), (self.k_proj, key_BSC), (self.v_proj, value_BSC))
        )
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.to(q_BHQD.dtype)
        drop = self.drop if self.training else 0.0
        weights_BHQS = None
        if need_weights:
            logits = q_BHQD @ k_BHSD.transpose(-1, -2) / q_BHQD.shape[-1] ** 0.5
            if bias is not None:
                logits = logits.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else logits + bias
            weights_BHQS = logits.softmax(-1)
            x_BHQD = F.dropout(weights_BHQS, drop) @ v_BHSD
        else:
            x_BHQD = F.scaled_dot_product_attention(q_BHQD, k_BHSD, v_BHSD, attn_mask=bias, dropout_p=drop)
        x_BQHD = x_BHQD.transpose(1, 2)
        if torch.compiler.is_compiling():
            # torch.onnx takes attention apart into a form with other strides, of which the heads are no view.
            x_BQHD = x_BQHD.clone(memory_format=torch.contiguous_format)
        return self.o_proj(x_BQHD.flatten(-2)), weights_BHQS


class FeedForward(nn.Module):
    """Two linear layers with an activation and dropout."""

    def __init__(self, config: SmcaConfig, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, width)
        self.fc2 = nn.Linear(width, config.d_model)
        self.activation = ACT2FN[config.activation_function]
        self.activation_dropout = nn.Dropout(config.activation_dropout)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., C) to (..., C)."""
        x = self.activation_dropout(self.activation(self.fc1(x)))
        return self.dropout(self.fc2(x))  # type: ignore[no-any-return]
