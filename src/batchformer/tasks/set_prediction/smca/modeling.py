"""SMCA: backbone, encoder, decoder with spatially modulated co-attention, heads.

Axes: B images, L feature levels, S tokens of all levels, Q object queries, C channels, K classes.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput, can_return_tuple

from ..initial_weights import STACKED_GAIN
from .attention import InProjection
from .backbone import SmcaBackbone, freeze
from .configuration import SmcaConfig
from .decoder import MLP, InverseExtent, SmcaDecoder, SmcaModelOutput
from .encoder import SmcaEncoder
from .prior import sine_positions, valid_size


@dataclass
class SmcaObjectDetectionOutput(ModelOutput):  # type: ignore[misc]
    """Output of `SmcaForObjectDetection`; the attributes that are not listed are those of `SmcaModelOutput`.

    Attributes:
        loss: Weighted sum of the terms, a scalar; ``None`` without labels.
        loss_dict: Terms of the loss; ``None`` without labels.
        logits: Class logits (B, Q, K), whose sigmoid is the probability of each class.
        pred_boxes: Boxes (B, Q, 4), (center x, center y, width, height) as shares of the image without padding.
        auxiliary_outputs: ``logits`` and ``pred_boxes`` of all decoder layers except the last; ``None`` without labels.
    """

    loss: Tensor | None = None
    loss_dict: dict[str, Tensor] | None = None
    logits: Tensor | None = None
    pred_boxes: Tensor | None = None
    auxiliary_outputs: list[dict[str, Tensor]] | None = None
    last_hidden_state: Tensor | None = None
    encoder_last_hidden_state: Tensor | None = None
    intermediate_hidden_states: Tensor | None = None
    reference_logits: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


class Classifier(nn.Linear):
    """Layer that predicts the classes; each starts with probability 0.01."""


class SmcaPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """Base class for initial values, loading and saving."""

    config_class = SmcaConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["SmcaEncoderLayer", "SmcaDecoderLayer", "SmcaBackbone"]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as in transformers, and freeze the parts that the configuration names."""
        # transformers 5 gives new parameters to the model when it loads, and all of them require gradients.
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        for backbone in (m for m in model.modules() if isinstance(m, SmcaBackbone)):
            freeze(backbone.model, model.config.freeze_backbone_at)
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        """Draw from Xavier's rule, queries from N(0, 1), as in DETR; `InverseExtent` and `Classifier` are constant."""
        # With functions of nn.init, on leaves alone: transformers 5 skips them for parameters that it has loaded.
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        elif isinstance(module, InverseExtent):
            nn.init.zeros_(module.weight)
            nn.init.ones_(module.bias)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight, STACKED_GAIN if isinstance(module, InProjection) else 1.0)
            if module.bias is not None:
                nn.init.constant_(module.bias, -math.log(99) if isinstance(module, Classifier) else 0.0)


class SmcaModel(SmcaPreTrainedModel):
    """Backbone, encoder and decoder, from images to one vector for each object query.

    ``backbone`` may be replaced by any module with ``forward(pixel_values, pixel_mask) -> [(map, mask), ...]`` and the
    same ``intermediate_channel_sizes``.

    Source:
        SMCA (arXiv 2101.07448), section 3.

    Args:
        config: Configuration.
    """

    def __init__(self, config: SmcaConfig) -> None:
        super().__init__(config)
        self.backbone = SmcaBackbone(config)
        channels = self.backbone.intermediate_channel_sizes[-config.num_feature_levels :]
        added = config.num_feature_levels - len(channels)
        projections = [nn.Conv2d(c, config.d_model, 1) for c in channels]
        if added:
            projections.append(nn.Conv2d(channels[-1], config.d_model, 3, stride=2, padding=1))
            projections += [nn.Conv2d(config.d_model, config.d_model, 3, stride=2, padding=1) for _ in range(added - 1)]
        self.input_projection = nn.ModuleList(projections)
        self.level_embeddings = (
            nn.Embedding(config.num_feature_levels, config.d_model) if len(projections) > 1 else None
        )
        self.query_position_embeddings = nn.Embedding(config.num_queries, config.d_model)
        self.encoder = SmcaEncoder(config)
        self.decoder = SmcaDecoder(config)
        self.post_init()

    def _levels(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return projected maps (B, C, rows, columns) and masks of the L levels."""
        features = self.backbone(pixel_values, pixel_mask)[-len(self.input_projection) :]
        projections = list(self.input_projection)
        levels = [(p(x), mask) for p, (x, mask) in zip(projections, features, strict=False)]
        x, mask = features[-1]
        for projection in projections[len(features) :]:
            # Padding must not leak through the kernel. Output (i, j) lies on input (2i, 2j), and so does the mask.
            x, mask = projection(x * mask[:, None]), mask[:, ::2, ::2]
            levels.append((x, mask))
        return levels

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SmcaModelOutput:
        """Encode the image, decode the queries.

        Args:
            pixel_values: Images (B, 3, height, width), padded at the bottom and right.
            pixel_mask: Mask (B, height, width), 1 or True where the image is; ``None``: no padding.
            output_attentions: Return ``cross_attentions``; ``None``: as the configuration says.
            output_hidden_states: Return the states of every layer; ``None``: as the configuration says.
            **kwargs: Arguments that transformers passes and SMCA does not use.

        Returns:
            States, references and, on request, attention weights.
        """
        if output_attentions is None:
            output_attentions = bool(self.config.output_attentions)
        if output_hidden_states is None:
            output_hidden_states = bool(self.config.output_hidden_states)
        if pixel_mask is None:
            pixel_mask = pixel_values.new_ones(pixel_values.shape[0], *pixel_values.shape[-2:])
        levels = self._levels(pixel_values, pixel_mask)
        maps, masks = zip(*levels, strict=True)
        spatial_shapes = tuple((x.shape[-2], x.shape[-1]) for x in maps)
        hidden_states = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        attention_mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        valid_sizes = torch.stack([valid_size(mask) for mask in masks], 1)
        positions = [sine_positions(mask, self.config.d_model).to(hidden_states.dtype) for mask in masks]
        if self.level_embeddings is not None:
            positions = [p + e for p, e in zip(positions, self.level_embeddings.weight, strict=True)]
        spatial_position_embeddings = torch.cat(positions, 1)
        queries = self.query_position_embeddings.weight.expand(hidden_states.shape[0], -1, -1)
        encoded = self.encoder(
            inputs_embeds=hidden_states,
            attention_mask=attention_mask,
            spatial_position_embeddings=spatial_position_embeddings,
            spatial_shapes=spatial_shapes,
            output_hidden_states=output_hidden_states,
        )
        decoded = self.decoder(
            inputs_embeds=torch.zeros_like(queries),
            object_queries_position_embeddings=queries,
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=attention_mask,
            spatial_position_embeddings=spatial_position_embeddings,
            spatial_shapes=spatial_shapes,
            valid_sizes=valid_sizes,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
        )
        return SmcaModelOutput(
            encoder_last_hidden_state=encoded.last_hidden_state, encoder_hidden_states=encoded.hidden_states, **decoded
        )


class SmcaForObjectDetection(SmcaPreTrainedModel):
    r"""`SmcaModel` with heads for classes and boxes.

    .. math:: \mathrm{Box} = \sigma\big(\mathrm{MLP}(D) + (r, 0)\big), \qquad \mathrm{Score} = \mathrm{FC}(D)

    with :math:`r` the reference logits of the query. With ``labels`` the model computes ``self.loss_function``, as its
    siblings do; the default is the loss that transformers has for Conditional and Deformable DETR (focal, L1, GIoU).

    Source:
        SMCA (arXiv 2101.07448), section 3.2, box prediction; section 4 for the focal loss.

    Args:
        config: Configuration.

    Example:
        >>> from transformers import ResNetConfig
        >>> backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
        >>> model = SmcaForObjectDetection(SmcaConfig(backbone, d_model=32, num_queries=5, num_labels=3)).eval()
        >>> outputs = model(torch.zeros(2, 3, 64, 96))
        >>> outputs.logits.shape, outputs.pred_boxes.shape
        (torch.Size([2, 5, 3]), torch.Size([2, 5, 4]))
    """

    def __init__(self, config: SmcaConfig) -> None:
        super().__init__(config)
        self.loss_type = "DeformableDetrForObjectDetection"
        self.model = SmcaModel(config)
        self.class_labels_classifier = Classifier(config.d_model, config.num_labels)
        self.bbox_predictor = MLP(config.d_model, 4, layers=3)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        pixel_values: Tensor,
        pixel_mask: Tensor | None = None,
        labels: list[dict[str, Tensor]] | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> SmcaObjectDetectionOutput:
        """Detect objects.

        Args:
            pixel_values: Images (B, 3, height, width), padded at the bottom and right.
            pixel_mask: Mask (B, height, width), 1 or True where the image is; ``None``: no padding.
            labels: Targets of each image: ``class_labels`` (T,) in 0..K-1 and ``boxes`` (T, 4), (center x, center y,
                width, height) as shares of the image.
            output_attentions: Return ``cross_attentions``.
            output_hidden_states: Return the states of every layer.
            **kwargs: Arguments that transformers passes and SMCA does not use.

        Returns:
            Logits, boxes, and with labels the loss.
        """
        outputs = self.model(
            pixel_values,
            pixel_mask=pixel_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        with_layers = labels is not None and self.config.auxiliary_loss
        states = outputs.intermediate_hidden_states if with_layers else outputs.last_hidden_state[None]
        logits_LBQK = self.class_labels_classifier(states)
        boxes_LBQ4 = (self.bbox_predictor(states) + nn.functional.pad(outputs.reference_logits, (0, 2))).sigmoid()
        logits, pred_boxes = logits_LBQK[-1], boxes_LBQ4[-1]
        loss, loss_dict, auxiliary_outputs = None, None, None
        if labels is not None:
            layers = (logits_LBQK, boxes_LBQ4) if with_layers else (None, None)
            loss, loss_dict, auxiliary_outputs = self.loss_function(
                logits, labels, self.device, pred_boxes, self.config, *layers
            )
        return SmcaObjectDetectionOutput(
            loss=loss,
            loss_dict=loss_dict,
            logits=logits,
            pred_boxes=pred_boxes,
            auxiliary_outputs=auxiliary_outputs,
            **outputs,
        )
