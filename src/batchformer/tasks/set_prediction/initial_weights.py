"""Initial weights of the detectors, as published.

The initial weights of transformers are meant to be overwritten by a checkpoint: all queries are alike, and the
classifier calls half of all boxes an object.
"""

import math
from typing import Any

import torch
from torch import nn

__all__ = ["STACKED_GAIN", "initialize"]

STACKED_GAIN = math.sqrt(0.5)
"""Gain of Xavier's rule for each of three C x C projections that are one 3C x C matrix in the published code."""

_KEPT = ("sampling_offsets", "attention_weights")  # of deformable attention, which transformers sets as published


def initialize(detector: Any) -> None:
    """Draw the initial weights of DETR, Conditional DETR or Deformable DETR as their authors do.

    The backbone keeps its weights, and so does SMCA, which draws the published ones by itself. Numbers come from the
    global generator of torch.

    Args:
        detector: Detection model of transformers, changed in place.

    Raises:
        ValueError: For another detector.

    Source:
        DETR, appendix A.4 (Xavier, as in "Attention is all you need"); Focal loss, section 4.1 (class prior 0.01);
        Deformable DETR, appendix A.4.

    Example:
        >>> from transformers import ConditionalDetrConfig, ConditionalDetrForObjectDetection, ResNetConfig
        >>> tiny = ResNetConfig(embedding_size=4, hidden_sizes=[8], depths=[1], out_features=["stage1"])
        >>> size = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=8, decoder_ffn_dim=8)
        >>> model = ConditionalDetrForObjectDetection(ConditionalDetrConfig(backbone_config=tiny, **size))
        >>> initialize(model)
        >>> round(model.class_labels_classifier.bias[0].sigmoid().item(), 4)
        0.01
    """
    kind = detector.config.model_type
    if kind == "smca":
        return
    if kind not in ("detr", "conditional_detr", "deformable_detr"):
        raise ValueError(
            f"Expected DETR, Conditional DETR, Deformable DETR or SMCA, got {type(detector).__name__}, whose published "
            "initial weights are not known here. Leave this call out to keep those of transformers."
        )
    model: Any = detector.model
    with torch.no_grad():
        for part in (model.encoder, model.decoder):
            for name, parameter in part.named_parameters():
                if parameter.dim() > 1 and not any(word in name for word in _KEPT):
                    nn.init.xavier_uniform_(parameter)
            for projection in _stacked(part):
                nn.init.xavier_uniform_(projection.weight, gain=STACKED_GAIN)
        if (queries := getattr(model, "query_position_embeddings", None)) is not None:
            nn.init.normal_(queries.weight)
        if kind == "deformable_detr":
            _deformable(detector)
            return
        for module in (model.input_projection, *_linears(detector.bbox_predictor), detector.class_labels_classifier):
            module.reset_parameters()
        if kind == "conditional_detr":
            _class_prior(detector.class_labels_classifier)
            _from_zero(_linears(detector.bbox_predictor)[-1])


def _deformable(detector: Any) -> None:
    for level in detector.model.input_proj:
        nn.init.xavier_uniform_(level[0].weight)
        nn.init.zeros_(level[0].bias)
    for number, (classifier, box) in enumerate(zip(detector.class_embed, detector.bbox_embed, strict=True)):
        for module in (classifier, *_linears(box)):
            module.reset_parameters()
        _class_prior(classifier)
        last = _linears(box)[-1]
        _from_zero(last)
        # Boxes start small; with refinement only in the first layer, with proposals in none.
        if not detector.config.two_stage and (number == 0 or not detector.config.with_box_refine):
            nn.init.constant_(last.bias[2:], -2.0)


def _stacked(part: nn.Module) -> list[nn.Linear]:
    """Return the projections that are one matrix in the published code; Conditional DETR's decoder has none."""
    names = ("q_proj", "k_proj", "v_proj")
    attentions = [module for module in part.modules() if all(hasattr(module, name) for name in names)]
    return [getattr(module, name) for module in attentions for name in names]


def _linears(module: Any) -> list[nn.Linear]:
    return [part for part in module.modules() if isinstance(part, nn.Linear)]


def _class_prior(classifier: nn.Linear, prior: float = 0.01) -> None:
    nn.init.constant_(classifier.bias, -math.log((1 - prior) / prior))


def _from_zero(last: nn.Linear) -> None:
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
