"""The two networks: a detector of transformers, and the same with a mask head; both as they are, nothing edited."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from batchformer.tasks.set_prediction.backbone import Backbone, create_backbone, replace_backbone, stand_in
from batchformer.tasks.set_prediction.checkpointing import checkpoint_gradients
from batchformer.tasks.set_prediction.decoder_norm import normalize_copies
from batchformer.tasks.set_prediction.initial_weights import initialize

from .settings import NetworkSettings

__all__ = ["build_detector", "detector_inside", "with_masks"]


def build_detector(settings: NetworkSettings, num_classes: int) -> Any:
    """A ``DetrForObjectDetection`` or ``ConditionalDetrForObjectDetection`` of segments: things and stuff alike.

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
        >>> small = NetworkSettings("detr", backbone, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
        >>> type(build_detector(small, num_classes=7)).__name__
        'DetrForObjectDetection'
    """
    import transformers

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
    name = {"detr": "Detr", "conditional_detr": "ConditionalDetr"}[settings.detector]
    config = getattr(transformers, f"{name}Config")(
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
    detector = getattr(transformers, f"{name}ForObjectDetection")(config)
    replace_backbone(detector, backbone)
    initialize(detector)
    normalize_copies(detector)
    if settings.checkpointing:
        checkpoint_gradients(detector)
    return detector.train()


def with_masks(detector: Any) -> Any:
    """A ``DetrForSegmentation``, or its conditional sibling, around a trained detector, which is frozen.

    Only the mask head is new, and trains. The detector stays in training mode, dropout and batch attention included, as
    published. It becomes a part of the network, under the name that `detector_inside` says.

    Args:
        detector: From `build_detector`, without BatchFormer.

    Returns:
        The network, in training mode: ``logits``, ``pred_boxes (B, Q, 4)``, and ``pred_masks (B, Q, h, w)`` at the
        resolution of the backbone's finest map.

    Source:
        DETR, section 4.4: the mask head is trained on the frozen detector.

    Example:
        >>> from batchformer.tasks.set_prediction.backbone import BackboneSettings
        >>> backbone = BackboneSettings("efficientnet_lite0", pretrained=False, strides=[4, 8, 16, 32])
        >>> small = NetworkSettings("detr", backbone, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
        >>> network = with_masks(build_detector(small, num_classes=7)).eval()
        >>> network(torch.zeros(1, 3, 64, 64)).pred_masks.shape
        torch.Size([1, 5, 16, 16])
        >>> sorted({name.split(".")[0] for name, p in network.named_parameters() if p.requires_grad})
        ['bbox_attention', 'mask_head']
    """
    import transformers

    for module in detector.modules():
        if isinstance(module, Backbone):
            module.trains = "nothing"
    name = type(detector).__name__.removesuffix("ForObjectDetection")
    # A configuration of its own: the caller's detector can still be trained with the loss of all layers.
    network = getattr(transformers, f"{name}ForSegmentation")(copy.deepcopy(detector.config))
    setattr(network, detector_inside(network), detector.requires_grad_(False))
    if name == "ConditionalDetr":
        _ReferencePoints(detector)
    # The loss is on the last layer alone: the frozen detector has nothing to learn.
    network.config.auxiliary_loss = False
    return network.train()


def detector_inside(network: Any) -> str:
    """The name of the detector inside a network with a mask head: ``detr`` or ``conditional_detr``."""
    return str(network.config.model_type)


class _ReferencePoints:
    """Adds the reference points to the boxes, which ``ConditionalDetrForSegmentation`` of transformers (4.57 to 5.24)
    leaves out: without them its boxes are not those that the detector learned, and the masks cannot be matched.

    Works inside a network with a mask head, which calls the box head by itself; not for the detector alone.
    """

    def __init__(self, detector: nn.Module) -> None:
        self.points_NQ2: Tensor | None = None
        detector.get_submodule("model.decoder").register_forward_hook(self.keep)
        detector.get_submodule("bbox_predictor").register_forward_hook(self.add)

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the decoder."""
        self.points_NQ2 = output.reference_points.transpose(0, 1).logit(eps=1e-5)

    def add(self, module: nn.Module, args: Any, boxes_NQ4: Tensor) -> Tensor:
        """Forward hook of the box head, before its sigmoid."""
        assert self.points_NQ2 is not None
        centers, sides = boxes_NQ4.split(2, dim=-1)
        return torch.cat((centers + self.points_NQ2, sides), dim=-1)
