"""The two networks: transformers' DETR, and the same with its mask head; both as they are, nothing edited."""

from typing import Any

from batchformer.tasks.set_prediction.backbone import Backbone, create_backbone, replace_backbone, stand_in
from batchformer.tasks.set_prediction.initial_weights import initialize

from .settings import NetworkSettings

__all__ = ["DETECTOR", "build_detector", "with_masks"]

DETECTOR = "detr"
"""The name of the detector inside the network with a mask head."""


def build_detector(settings: NetworkSettings, num_classes: int) -> Any:
    """A ``DetrForObjectDetection`` for segments: things and stuff are classes alike.

    Args:
        settings: The network.
        num_classes: K, things and stuff together.

    Returns:
        The detector, in training mode.

    Raises:
        ValueError: When the backbone does not give four maps, or for sizes that do not go together.
        OSError: When pretrained weights could not be had; says what to do.

    Source:
        Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 4.4: boxes are predicted for
        stuff and things alike.

    Example:
        >>> from batchformer.tasks.set_prediction.backbone import BackboneSettings
        >>> backbone = BackboneSettings("efficientnet_lite0", pretrained=False, strides=[4, 8, 16, 32])
        >>> small = NetworkSettings(backbone, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
        >>> type(build_detector(small, num_classes=7)).__name__
        'DetrForObjectDetection'
    """
    from transformers import DetrConfig, DetrForObjectDetection

    if len(settings.backbone.strides) != 4:
        raise ValueError(
            f"Expected four maps for the mask head, model.network.backbone.strides=[4,8,16,32] for example, got "
            f"{settings.backbone.strides}."
        )
    width, heads = settings.d_model, settings.num_heads
    if width % heads or width % 16 or (width + heads) % 8:
        raise ValueError(
            f"Expected d_model to be a multiple of num_heads and of 16, and their sum one of 8, got d_model={width} "
            f"and num_heads={heads}. Take num_heads=8."
        )
    backbone = create_backbone(settings.backbone)
    config = DetrConfig(
        **stand_in(backbone),
        num_labels=num_classes,
        num_queries=settings.num_queries,
        d_model=width,
        encoder_layers=settings.encoder_layers,
        decoder_layers=settings.decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=settings.ffn_dim,
        decoder_ffn_dim=settings.ffn_dim,
        dropout=settings.dropout,
        attention_dropout=settings.dropout,  # as published; transformers leaves these two at 0
        activation_dropout=settings.dropout,
        auxiliary_loss=True,
    )
    detector = DetrForObjectDetection(config)
    replace_backbone(detector, backbone)
    initialize(detector)
    if settings.checkpointing:
        # transformers 5.24 renames it.
        enable = getattr(detector, "activation_checkpointing_enable", detector.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    return detector.train()


def with_masks(detector: Any) -> Any:
    """A ``DetrForSegmentation`` around a trained detector, which is frozen; only the mask head is new, and trains.

    The detector stays in training mode, dropout and batch attention included, as published.

    Args:
        detector: From `build_detector`, without BatchFormer; becomes a part of the result, under its name `DETECTOR`.

    Returns:
        The network, in training mode: ``logits (B, Q, K + 1)``, ``pred_boxes (B, Q, 4)``, ``pred_masks (B, Q, h, w)``
        at the resolution of the backbone's finest map.

    Source:
        DETR, section 4.4: the mask head is trained on the frozen detector.
    """
    from transformers import DetrForSegmentation

    for module in detector.modules():
        if isinstance(module, Backbone):
            module.trains = "nothing"
    network = DetrForSegmentation(detector.config)
    setattr(network, DETECTOR, detector.requires_grad_(False))
    # The frozen detector's earlier layers have nothing to learn from.
    network.config.auxiliary_loss = False
    return network.train()
