"""Encoder: layers that look within each scale, and layers that look across all of them.

Axes: B images, S tokens of all levels one after the other, C channels.
"""

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput

from .attention import Attention, FeedForward
from .configuration import SmcaConfig

Shapes = tuple[tuple[int, int], ...]


def split_levels(x_BS: Tensor, spatial_shapes: Shapes) -> tuple[Tensor, ...]:
    """Split tokens (B, S, ...) into those of each level."""
    return x_BS.split([rows * columns for rows, columns in spatial_shapes], 1)  # type: ignore[no-any-return]


class SmcaEncoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """Post-norm transformer layer over image tokens.

    With ``attention="intra_scale"`` each token attends to its own level, and all levels share the weights. With
    ``attention="multi_scale"`` each token attends to the tokens of all levels. With one level the two are equal.

    Source:
        SMCA (arXiv 2101.07448), section 3.2, multi-scale visual features.
    """

    def __init__(self, config: SmcaConfig, attention: str) -> None:
        super().__init__()
        self.attention = attention
        self.self_attn = Attention(config.d_model, config.encoder_attention_heads, config.attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = FeedForward(config, config.encoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        spatial_position_embeddings: Tensor | None = None,
        spatial_shapes: Shapes | None = None,
    ) -> Tensor:
        """Encode one layer.

        Args:
            hidden_states: Tokens (B, S, C).
            attention_mask: Mask (B, S), 1 or True for tokens of the image, 0 or False for padding; ``None``: no
                padding.
            spatial_position_embeddings: Positions (B, S, C) that are added to queries and keys.
            spatial_shapes: Number of rows and columns of each level; ``None``: one level.

        Returns:
            Tokens (B, S, C).
        """
        query = hidden_states if spatial_position_embeddings is None else hidden_states + spatial_position_embeddings
        allowed = None if attention_mask is None else attention_mask.bool()
        if self.attention == "multi_scale" or spatial_shapes is None or len(spatial_shapes) == 1:
            attended = self._attend(query, hidden_states, allowed)
        else:
            queries, values = split_levels(query, spatial_shapes), split_levels(hidden_states, spatial_shapes)
            masks = [None] * len(queries) if allowed is None else split_levels(allowed, spatial_shapes)
            attended = torch.cat([self._attend(*level) for level in zip(queries, values, masks, strict=True)], 1)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))
        return self.final_layer_norm(hidden_states + self.mlp(hidden_states))  # type: ignore[no-any-return]

    def _attend(self, query: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        attended: Tensor = self.self_attn(query, query, value, None if allowed is None else allowed[:, None, None])[0]
        return attended


class SmcaEncoder(nn.Module):
    """Encoder layers, one for each word of ``config.encoder_attention``."""

    def __init__(self, config: SmcaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([SmcaEncoderLayer(config, word) for word in config.encoder_attention])

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        spatial_position_embeddings: Tensor | None = None,
        spatial_shapes: Shapes | None = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutput:
        """Encode; arguments are those of `SmcaEncoderLayer.forward`, the output has ``last_hidden_state`` (B, S, C)."""
        hidden_states, seen = inputs_embeds, [inputs_embeds]
        for layer in self.layers:
            # By position: reentrant checkpointing gives gradients to positional arguments only.
            hidden_states = layer(hidden_states, attention_mask, spatial_position_embeddings, spatial_shapes)
            seen.append(hidden_states)
        return BaseModelOutput(
            last_hidden_state=hidden_states, hidden_states=tuple(seen) if output_hidden_states else None
        )
