"""Decoder: object queries look at the image through a Gaussian window that they predict themselves.

Axes: B images, H heads, Q object queries, L feature levels, S tokens of all levels, C channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput

from .attention import Attention, FeedForward
from .configuration import SmcaConfig
from .encoder import Shapes, split_levels
from .prior import log_gaussian


@dataclass
class SmcaModelOutput(ModelOutput):  # type: ignore[misc]
    """Output of the decoder and of `SmcaModel`; the decoder leaves the encoder's parts out.

    Attributes:
        last_hidden_state: Normed output of the last decoder layer, (B, Q, C).
        encoder_last_hidden_state: Output of the encoder, (B, S, C).
        intermediate_hidden_states: Normed output of every decoder layer, (decoder layers, B, Q, C).
        reference_logits: Centers (x, y) before the sigmoid, which gives them as shares of the image, (B, Q, 2).
        decoder_hidden_states: Input of the first decoder layer and output of each, not normed; on request.
        encoder_hidden_states: Input of the first encoder layer and output of each; on request.
        cross_attentions: Co-attention weights (B, H, Q, S) of each layer, which sum to 1 over all levels; on request.
    """

    last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    reference_logits: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, dim: int, out: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, width) for width in [dim] * (layers - 1) + [out]])

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., out)."""
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)  # type: ignore[no-any-return]


class InverseExtent(nn.Linear):
    """Layer that predicts 1/s; it starts from weights 0 and bias 1."""


class SpatialPrior(nn.Module):
    r"""Gaussian prior of every query and head on every level.

    .. math:: c_h = \sigma(r)\,(X, Y) + \Delta c_h, \qquad (\Delta c_h, 1/s_h) = \mathrm{FC}(O_q)

    :math:`r`, the reference of the query, is common to heads, layers and levels; (X, Y) is the size of the image in
    cells of the level, padding not counted. Offset and extent are in cells of the level, so that on a coarser level the
    same numbers make a wider window. At the start :math:`s = 1`.

    Source:
        SMCA (arXiv 2101.07448), section 3.2, dynamic spatial weight maps and multi-head modulation; that the inverse of
        the extent is predicted, from weights 0 and bias 1, is from the authors' code.
    """

    def __init__(self, config: SmcaConfig) -> None:
        super().__init__()
        self.beta = config.prior_beta
        self.heads = config.decoder_attention_heads if config.prior_heads == "independent" else 1
        numbers = {"fixed": 0, "single": 1, "width_height": 2}[config.prior_scale]
        self.offset = nn.Linear(config.d_model, 2 * self.heads) if config.prior_heads == "independent" else None
        self.inverse_extent = InverseExtent(config.d_model, numbers * self.heads) if numbers else None

    def forward(
        self, query_BQC: Tensor, reference_logits_BQ2: Tensor, valid_sizes_BL2: Tensor, spatial_shapes: Shapes
    ) -> list[Tensor]:
        """Compute the prior log G on each level, (B, H or 1, Q, cells of the level), in at least float32."""
        dtype = torch.promote_types(query_BQC.dtype, torch.float32)  # half precision has 8 bits for a position
        center_B1Q2 = reference_logits_BQ2.to(dtype).sigmoid()[:, None]
        zero, one = center_B1Q2.new_zeros(()), center_B1Q2.new_ones(())
        offset_BHQ2 = zero if self.offset is None else self._by_head(self.offset(query_BQC)).to(dtype)
        inverse_BHQ2 = one if self.inverse_extent is None else self._by_head(self.inverse_extent(query_BQC)).to(dtype)
        logs = []
        for level, (rows, columns) in enumerate(spatial_shapes):
            center_BHQ2 = center_B1Q2 * valid_sizes_BL2[:, level, None, None] + offset_BHQ2
            logs.append(log_gaussian(center_BHQ2, inverse_BHQ2.expand_as(center_BHQ2), (rows, columns), self.beta))
        return logs

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # type: ignore[no-any-return]


class SmcaDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    r"""Post-norm decoder layer with spatially modulated co-attention and scale selection.

    .. math::
        C = \sum_l \alpha_l \, \mathrm{softmax}\big(Q K_l^T / \sqrt{D} + \log G_l\big) V_l, \qquad
        \alpha = \mathrm{softmax}(\mathrm{FC}(O_q))

    over the levels :math:`l`; with one level :math:`\alpha = 1`. The output projection is affine and :math:`\alpha`
    sums to 1, so it may as well come before the sum, as it does here.

    Source:
        SMCA (arXiv 2101.07448), section 3.2, spatially-modulated co-attention and multi-scale visual features.
    """

    def __init__(self, config: SmcaConfig) -> None:
        super().__init__()
        dim, heads = config.d_model, config.decoder_attention_heads
        self.self_attn = Attention(dim, heads, config.attention_dropout)
        self.self_attn_layer_norm = nn.LayerNorm(dim)
        levels = config.num_feature_levels
        self.scale_selection = nn.Linear(dim, levels) if levels > 1 else None
        self.prior = SpatialPrior(config)
        predicts = any((self.prior.offset, self.prior.inverse_extent, self.scale_selection))
        self.prior_layer_norm = nn.LayerNorm(dim) if predicts else nn.Identity()  # DDP refuses idle parameters
        self.encoder_attn = Attention(dim, heads, config.attention_dropout)
        self.encoder_attn_layer_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        self.mlp = FeedForward(config, config.decoder_ffn_dim)
        self.final_layer_norm = nn.LayerNorm(dim)

    def forward(
        self,
        hidden_states: Tensor,
        object_queries_position_embeddings: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        spatial_position_embeddings: Tensor,
        reference_logits: Tensor,
        valid_sizes: Tensor,
        spatial_shapes: Shapes,
        output_attentions: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Decode one layer.

        Args:
            hidden_states: Queries' states (B, Q, C).
            object_queries_position_embeddings: Learned queries (B, Q, C).
            encoder_hidden_states: Output of the encoder (B, S, C).
            encoder_attention_mask: Mask (B, S), 1 or True for tokens of the image; ``None``: no padding.
            spatial_position_embeddings: Positions (B, S, C) that are added to the keys.
            reference_logits: Reference points (B, Q, 2) before the sigmoid.
            valid_sizes: Size of the image on each level (B, L, 2), see `prior.valid_size`.
            spatial_shapes: Number of rows and columns of each level.
            output_attentions: Return the co-attention weights (B, H, Q, S) too.

        Returns:
            States (B, Q, C), or a pair of them and the weights.
        """
        query = hidden_states + object_queries_position_embeddings
        predictor = self.prior_layer_norm(query)  # O_q
        attended, _ = self.self_attn(query, query, hidden_states, None)
        hidden_states = self.self_attn_layer_norm(hidden_states + self.dropout(attended))

        biases = self.prior(predictor, reference_logits, valid_sizes, spatial_shapes)
        if encoder_attention_mask is not None:
            padding = split_levels(~encoder_attention_mask.bool(), spatial_shapes)
            biases = [b.masked_fill(p[:, None, None], -torch.inf) for b, p in zip(biases, padding, strict=True)]
        attended, weights = self._co_attend(
            hidden_states + object_queries_position_embeddings,
            encoder_hidden_states + spatial_position_embeddings,
            encoder_hidden_states,
            biases,
            spatial_shapes,
            None if self.scale_selection is None else self.scale_selection(predictor).softmax(-1),
            output_attentions,
        )
        hidden_states = self.encoder_attn_layer_norm(hidden_states + self.dropout(attended))
        hidden_states = self.final_layer_norm(hidden_states + self.mlp(hidden_states))
        return hidden_states if weights is None else (hidden_states, weights)

    def _co_attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        biases: list[Tensor],
        spatial_shapes: Shapes,
        alpha_BQL: Tensor | None,
        need_weights: bool,
    ) -> tuple[Tensor, Tensor | None]:
        keys, values = split_levels(key, spatial_shapes), split_levels(value, spatial_shapes)
        found = [
            self.encoder_attn(query, *level, need_weights=need_weights)
            for level in zip(keys, values, biases, strict=True)
        ]
        if alpha_BQL is None:
            return found[0]  # type: ignore[no-any-return]
        share_LBQ1 = alpha_BQL.unsqueeze(-1).unbind(-2)
        attended = torch.stack([a * x for a, (x, _) in zip(share_LBQ1, found, strict=True)]).sum(0)
        if not need_weights:
            return attended, None
        return attended, torch.cat([a[:, None] * w for a, (_, w) in zip(share_LBQ1, found, strict=True)], -1)


class SmcaDecoder(nn.Module):
    r"""Decoder layers with a common reference point of each query, :math:`r = \mathrm{MLP}(\mathrm{LN}(O_q))`.

    Source:
        SMCA (arXiv 2101.07448), section 3.2, dynamic spatial weight maps.
    """

    def __init__(self, config: SmcaConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList([SmcaDecoderLayer(config) for _ in range(config.decoder_layers)])
        self.layernorm = nn.LayerNorm(config.d_model)
        self.reference_layer_norm = nn.LayerNorm(config.d_model)
        self.ref_point_head = MLP(config.d_model, 2, layers=2)

    def forward(
        self,
        inputs_embeds: Tensor,
        object_queries_position_embeddings: Tensor,
        encoder_hidden_states: Tensor,
        spatial_position_embeddings: Tensor,
        spatial_shapes: Shapes,
        valid_sizes: Tensor,
        encoder_attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> SmcaModelOutput:
        """Decode ``inputs_embeds`` (B, Q, C); the other arguments are those of `SmcaDecoderLayer`."""
        reference_logits = self.ref_point_head(self.reference_layer_norm(object_queries_position_embeddings))
        hidden_states, seen, normed, weights = inputs_embeds, [inputs_embeds], [], []
        for layer in self.layers:
            # By position: reentrant checkpointing gives gradients to positional arguments only.
            output = layer(
                hidden_states,
                object_queries_position_embeddings,
                encoder_hidden_states,
                encoder_attention_mask,
                spatial_position_embeddings,
                reference_logits,
                valid_sizes,
                spatial_shapes,
                output_attentions,
            )
            hidden_states = output[0] if output_attentions else output
            if output_attentions:
                weights.append(output[1])
            seen.append(hidden_states)
            normed.append(self.layernorm(hidden_states))
        return SmcaModelOutput(
            last_hidden_state=normed[-1],
            intermediate_hidden_states=torch.stack(normed),
            reference_logits=reference_logits,
            decoder_hidden_states=tuple(seen) if output_hidden_states else None,
            cross_attentions=tuple(weights) if output_attentions else None,
        )
