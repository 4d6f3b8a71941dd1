"""The detector of a run: a model of transformers (or SMCA, in their style), a backbone, published initial weights."""

from typing import Any

from torch import nn

from batchformer.tasks.set_prediction.backbone import Backbone, create_backbone, replace_backbone, stand_in
from batchformer.tasks.set_prediction.checkpointing import checkpoint_gradients
from batchformer.tasks.set_prediction.decoder_norm import normalize_copies
from batchformer.tasks.set_prediction.initial_weights import initialize

from .settings import NetworkSettings, published

__all__ = ["backbone_of", "build_detector"]


def build_detector(settings: NetworkSettings, num_classes: int) -> Any:
    """Build the plain detector.

    Draws initial weights from torch's global generator.

    Args:
        settings: The network.
        num_classes: K.

    Returns:
        A ``PreTrainedModel``: ``pixel_values (B, 3, H, W)``, ``pixel_mask (B, H, W)`` and ``labels`` to ``logits``
        (B, Q, K; DETR K + 1), ``pred_boxes (B, Q, 4)`` and ``loss``.

    Raises:
        ValueError: For settings that do not go together.
        OSError: When the backbone's weights could not be had.

    Example:
        >>> import torch
        >>> from batchformer.tasks.set_prediction.backbone import BackboneSettings
        >>> backbone = BackboneSettings("resnet18", pretrained=False, strides=[32])
        >>> settings = NetworkSettings("detr", backbone, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
        >>> network = build_detector(settings, num_classes=3)
        >>> network(torch.zeros(1, 3, 64, 64)).logits.shape
        torch.Size([1, 5, 4])
    """
    backbone = create_backbone(settings.backbone)
    network = _make(settings, num_classes, stand_in(backbone))
    replace_backbone(network, backbone)
    initialize(network)
    normalize_copies(network)
    if settings.checkpointing:
        checkpoint_gradients(network)
    return network


def backbone_of(network: nn.Module) -> Backbone:
    """The backbone of a detector that `build_detector` built."""
    return next(module for module in network.modules() if isinstance(module, Backbone))


def _make(settings: NetworkSettings, num_classes: int, backbone: dict[str, Any]) -> Any:
    detector = settings.detector
    levels = published(detector, "feature_levels", settings.feature_levels)
    ffn_dim = published(detector, "ffn_dim", settings.ffn_dim)
    arguments: dict[str, Any] = {
        **backbone,
        "num_labels": num_classes,
        "num_queries": published(detector, "num_queries", settings.num_queries),
        "d_model": settings.d_model,
        "encoder_layers": settings.encoder_layers,
        "decoder_layers": settings.decoder_layers,
        "encoder_attention_heads": settings.num_heads,
        "decoder_attention_heads": settings.num_heads,
        "dropout": settings.dropout,
        # As published; transformers leaves these two at 0.
        "attention_dropout": settings.dropout,
        "activation_dropout": settings.dropout,
        "auxiliary_loss": True,
    }
    if ffn_dim is not None:
        arguments |= {"encoder_ffn_dim": ffn_dim, "decoder_ffn_dim": ffn_dim}
    _check(settings, levels)
    if detector == "smca":
        from .smca import SmcaConfig, SmcaForObjectDetection

        prior: dict[str, Any] = {"prior_scale": settings.prior_scale, "prior_heads": settings.prior_heads}
        return SmcaForObjectDetection(SmcaConfig(**arguments, **prior, num_feature_levels=levels))
    import transformers

    if detector == "deformable_detr":
        arguments |= {
            "num_feature_levels": levels,
            "with_box_refine": settings.with_box_refine or settings.two_stage,
            "two_stage": settings.two_stage,
            "two_stage_num_proposals": arguments["num_queries"],
            # Its own kernels would have to be compiled at first use.
            "disable_custom_kernels": True,
        }
        return transformers.DeformableDetrForObjectDetection(transformers.DeformableDetrConfig(**arguments))
    if detector == "conditional_detr":
        return transformers.ConditionalDetrForObjectDetection(transformers.ConditionalDetrConfig(**arguments))
    return transformers.DetrForObjectDetection(transformers.DetrConfig(**arguments))


def _check(settings: NetworkSettings, levels: int) -> None:
    maps = len(settings.backbone.strides)
    if settings.detector in ("detr", "conditional_detr") and (levels != 1 or maps != 1):
        raise ValueError(
            f"Expected one map for {settings.detector}, got feature_levels={levels} and "
            f"backbone.strides={settings.backbone.strides}. Give one stride, 16 or 32."
        )
    if levels < maps:
        raise ValueError(
            f"Expected at most feature_levels={levels} strides of the backbone, got {settings.backbone.strides}."
        )
    if settings.detector != "deformable_detr" and (settings.two_stage or settings.with_box_refine):
        raise ValueError(f"Expected two_stage and with_box_refine with deformable_detr, got {settings.detector}.")
    if settings.detector == "deformable_detr":
        _check_heads(settings)
    if settings.d_model % settings.num_heads:
        raise ValueError(
            f"Expected d_model to be a multiple of num_heads={settings.num_heads}, got {settings.d_model}."
        )


def _check_heads(settings: NetworkSettings) -> None:
    from transformers import DeformableDetrForObjectDetection

    # One head for each decoder layer, and one for the proposals. transformers 5 ties them by a table of names, and an
    # entry of it that fits none is an error that speaks of its own source; transformers 4 has a list.
    single = settings.decoder_layers + settings.two_stage < 2
    if single and isinstance(DeformableDetrForObjectDetection._tied_weights_keys, dict):
        raise ValueError(
            f"Expected decoder_layers of at least 2 for deformable_detr, got {settings.decoder_layers}: transformers 5 "
            "cannot build it with a single prediction head. Give 2, or two_stage=true, which has one more head."
        )
