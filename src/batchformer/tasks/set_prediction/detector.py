"""Detectors of transformers (and SMCA) on any backbone, with the initial weights that they were published with."""

from typing import Any, Literal

from torch import nn

from .backbone import Backbone, create_backbone, replace_backbone, stand_in
from .checkpointing import checkpoint_gradients
from .decoder_norm import normalize_copies
from .initial_weights import initialize
from .settings import PUBLISHED, Detector, DetectorSettings

__all__ = ["backbone_of", "build_detector", "detector_from_settings"]


def build_detector(
    detector: Detector,
    backbone: Backbone,
    num_classes: int,
    *,
    d_model: int = 256,
    encoder_layers: int = 6,
    decoder_layers: int = 6,
    num_heads: int = 8,
    ffn_dim: int | None = None,
    num_queries: int | None = None,
    dropout: float = 0.1,
    feature_levels: int | None = None,
    with_box_refine: bool = False,
    two_stage: bool = False,
    prior_scale: Literal["fixed", "single", "width_height"] = "width_height",
    prior_heads: Literal["independent", "shared"] = "independent",
    checkpointing: bool = False,
) -> Any:
    """Build a plain detector; initial weights are drawn from torch's global generator.

    Args:
        detector: Name of the detector.
        backbone: Backbone from :func:`.backbone.create_backbone`; it becomes a part of the detector. DETR and
            Conditional DETR attend over its last map; the others are there for a mask head.
        num_classes: K, number of classes without "no object".
        d_model: Width of the transformer, a multiple of ``num_heads``.
        encoder_layers: Number of encoder layers.
        decoder_layers: Number of decoder layers.
        num_heads: Number of heads of every attention in the transformer.
        ffn_dim: Width of the feed-forward layers; ``None``: as published, 2048, for Deformable DETR and for SMCA on
            several maps 1024.
        num_queries: Q, the largest number of objects in an image; ``None``: as published, 100 for DETR, else 300.
        dropout: Dropout rate, in 0..1.
        feature_levels: Number of maps that Deformable DETR (as published 4) and SMCA (1) attend over. Convolutions of
            stride 2 make the maps that the backbone does not give.
        with_box_refine: Whether each decoder layer of Deformable DETR refines the boxes of the layer before it.
        two_stage: Whether the encoder of Deformable DETR proposes the boxes that its decoder starts from.
        prior_scale: Extent of SMCA's Gaussian.
        prior_heads: Whether each head of SMCA has a Gaussian of its own.
        checkpointing: Whether the backward pass computes activations again: less memory, more time, the same numbers.

    Returns:
        A ``PreTrainedModel`` in training mode: ``pixel_values (B, 3, H, W)``, ``pixel_mask (B, H, W)`` and ``labels``
        to ``logits`` (B, Q, K; DETR K + 1), ``pred_boxes (B, Q, 4)`` and ``loss``.

    Raises:
        ValueError: When the arguments do not fit together.

    Source:
        Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020; Meng et al., "Conditional DETR", ICCV
        2021; Zhu et al., "Deformable DETR", ICLR 2021; Gao et al., "Fast Convergence of DETR with Spatially Modulated
        Co-Attention", ICCV 2021.

    Example:
        >>> import torch
        >>> from batchformer.tasks.set_prediction.backbone import BackboneSettings
        >>> backbone = create_backbone(BackboneSettings("resnet18", pretrained=False, strides=[32]))
        >>> network = build_detector("detr", backbone, 3, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
        >>> network(torch.zeros(1, 3, 64, 64)).logits.shape
        torch.Size([1, 5, 4])
    """
    published = PUBLISHED[detector]
    levels: int = published["feature_levels"] if feature_levels is None else feature_levels
    _check_maps(detector, len(backbone.strides), levels)
    if detector != "deformable_detr" and (two_stage or with_box_refine):
        raise ValueError(f"Expected two_stage and with_box_refine with deformable_detr, got {detector}.")
    if detector == "deformable_detr":
        _check_heads(decoder_layers, two_stage)
    if d_model % num_heads:
        raise ValueError(f"Expected d_model to be a multiple of num_heads={num_heads}, got {d_model}.")
    width = published["ffn_dim"] if ffn_dim is None else ffn_dim
    queries: int = published["num_queries"] if num_queries is None else num_queries
    settings: dict[str, Any] = {
        **stand_in(backbone),
        "num_labels": num_classes,
        "num_queries": queries,
        "d_model": d_model,
        "encoder_layers": encoder_layers,
        "decoder_layers": decoder_layers,
        "encoder_attention_heads": num_heads,
        "decoder_attention_heads": num_heads,
        "dropout": dropout,
        # As published; transformers leaves these two at 0.
        "attention_dropout": dropout,
        "activation_dropout": dropout,
        "auxiliary_loss": True,
    }
    if width is not None:
        settings |= {"encoder_ffn_dim": width, "decoder_ffn_dim": width}
    if detector == "smca":
        settings |= {"num_feature_levels": levels, "prior_scale": prior_scale, "prior_heads": prior_heads}
    if detector == "deformable_detr":
        settings |= {
            "num_feature_levels": levels,
            "with_box_refine": with_box_refine or two_stage,
            "two_stage": two_stage,
            "two_stage_num_proposals": queries,
            # Its own kernels would have to be compiled at first use.
            "disable_custom_kernels": True,
        }
    network = _model(detector, settings)
    replace_backbone(network, backbone)
    initialize(network)
    normalize_copies(network)
    if checkpointing:
        checkpoint_gradients(network)
    return network


def detector_from_settings(settings: DetectorSettings, num_classes: int) -> Any:
    """Build the detector that a recipe's settings describe, and its backbone.

    Args:
        settings: Settings whose fields are arguments of :func:`build_detector`.
        num_classes: K, number of classes without "no object".

    Raises:
        ValueError: When the settings do not fit together.
        OSError: When the backbone's weights cannot be fetched.

    Example:
        >>> from batchformer.tasks.set_prediction.backbone import BackboneSettings
        >>> backbone = BackboneSettings("resnet18", pretrained=False, strides=[32])
        >>> settings = DetectorSettings("detr", backbone, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
        >>> type(detector_from_settings(settings, num_classes=3)).__name__
        'DetrForObjectDetection'
    """
    arguments = dict(vars(settings))
    backbone = create_backbone(arguments.pop("backbone"))
    return build_detector(backbone=backbone, num_classes=num_classes, **arguments)


def backbone_of(network: nn.Module) -> Backbone:
    """The backbone inside a network that :func:`build_detector` built."""
    return next(module for module in network.modules() if isinstance(module, Backbone))


def _model(detector: Detector, settings: dict[str, Any]) -> Any:
    if detector == "smca":
        from .smca import SmcaConfig, SmcaForObjectDetection

        return SmcaForObjectDetection(SmcaConfig(**settings))
    import transformers

    name = {"detr": "Detr", "conditional_detr": "ConditionalDetr", "deformable_detr": "DeformableDetr"}[detector]
    config = getattr(transformers, f"{name}Config")(**settings)
    return getattr(transformers, f"{name}ForObjectDetection")(config)


def _check_maps(detector: Detector, maps: int, levels: int) -> None:
    if detector in ("detr", "conditional_detr"):
        if levels != 1:
            raise ValueError(f"Expected one map for {detector}, got feature_levels={levels}. Leave feature_levels out.")
    elif levels < maps:
        raise ValueError(
            f"Expected feature_levels to be at least the {maps} maps of the backbone, got {levels}. Raise "
            "feature_levels, or give the backbone fewer strides."
        )


def _check_heads(decoder_layers: int, two_stage: bool) -> None:
    from transformers import DeformableDetrForObjectDetection

    # One head for each decoder layer, and one for the proposals. transformers 5 ties them by a table of names, and an
    # entry of it that fits none is an error that speaks of its own source; transformers 4 has a list.
    if decoder_layers + two_stage < 2 and isinstance(DeformableDetrForObjectDetection._tied_weights_keys, dict):
        raise ValueError(
            f"Expected decoder_layers of at least 2 for deformable_detr, got {decoder_layers}: transformers 5 cannot "
            "build it with a single prediction head. Give 2, or two_stage=true, which has one more head."
        )
