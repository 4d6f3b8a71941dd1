"""Networks of both stages: an unedited detector of transformers, and the same detector with a mask head."""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from batchformer.tasks.set_prediction.backbone import Backbone
from batchformer.tasks.set_prediction.detector import detector_from_settings

from .settings import NetworkSettings

__all__ = ["build_network", "detector_inside", "with_masks"]


def build_network(settings: NetworkSettings, num_classes: int) -> Any:
    """Build the detector of segments, things and stuff alike, on which a mask head can be put.

    Args:
        settings: Settings of the network.
        num_classes: K, number of classes, things and stuff together.

    Returns:
        A ``DetrForObjectDetection`` or ``ConditionalDetrForObjectDetection`` in training mode.

    Raises:
        ValueError: When the backbone does not give four maps, or sizes do not fit together.
        OSError: When the backbone's weights cannot be fetched.

    Source:
        Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020, section 4.4: boxes are predicted for
        stuff and things alike.

    Example:
        >>> from batchformer.tasks.set_prediction.backbone import BackboneSettings
        >>> backbone = BackboneSettings("efficientnet_lite0", pretrained=False, strides=[4, 8, 16, 32])
        >>> small = NetworkSettings("detr", backbone, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
        >>> type(build_network(small, num_classes=7)).__name__
        'DetrForObjectDetection'
    """
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
    return detector_from_settings(settings, num_classes)


def build_detector(settings: NetworkSettings, num_classes: int) -> Any:
    """Deprecated name of `build_network`."""
    warnings.warn(
        "batchformer.tasks.panoptic.model.build_detector is now called build_network.", DeprecationWarning, stacklevel=2
    )
    return build_network(settings, num_classes)


def with_masks(detector: Any) -> Any:
    """Put a new mask head on a trained detector, which is frozen.

    Only the mask head trains. The detector stays in training mode, with dropout and batch attention, as published. It
    becomes a part of the network, a ``DetrForSegmentation`` or its conditional sibling, under the name that
    `detector_inside` returns.

    Args:
        detector: Detector from `build_network`, without BatchFormer.

    Returns:
        The network, in training mode: ``logits``, ``pred_boxes (B, Q, 4)``, and ``pred_masks (B, Q, h, w)`` at the
        resolution of the backbone's finest map.

    Source:
        DETR, section 4.4: the mask head is trained on the frozen detector.

    Example:
        >>> from batchformer.tasks.set_prediction.backbone import BackboneSettings
        >>> backbone = BackboneSettings("efficientnet_lite0", pretrained=False, strides=[4, 8, 16, 32])
        >>> small = NetworkSettings("detr", backbone, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
        >>> network = with_masks(build_network(small, num_classes=7)).eval()
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
    # A copy of the configuration, so that the caller's detector can still be trained with the loss of all layers.
    network = getattr(transformers, f"{name}ForSegmentation")(copy.deepcopy(detector.config))
    setattr(network, detector_inside(network), detector.requires_grad_(False))
    if name == "ConditionalDetr":
        _ReferencePoints(detector)
    # The loss is on the last layer alone, since the frozen detector has nothing to learn.
    network.config.auxiliary_loss = False
    return network.train()


def detector_inside(network: Any) -> str:
    """Return the name of the detector inside a network with a mask head: ``detr`` or ``conditional_detr``."""
    return str(network.config.model_type)


class _ReferencePoints:
    """Hooks that add the reference points to the boxes inside a network with a mask head.

    ``ConditionalDetrForSegmentation`` of transformers (4.57 to 5.24) leaves them out; without them its boxes are not
    those that the detector learned, and the masks cannot be matched. The hooks are not for a detector alone.
    """

    def __init__(self, detector: nn.Module) -> None:
        self.points_NQ2: Tensor | None = None
        detector.get_submodule("model.decoder").register_forward_hook(self.keep)
        detector.get_submodule("bbox_predictor").register_forward_hook(self.add)

    def keep(self, module: nn.Module, args: Any, output: Any) -> None:
        """Keep the reference points; a forward hook of the decoder."""
        self.points_NQ2 = output.reference_points.transpose(0, 1).logit(eps=1e-5)

    def add(self, module: nn.Module, args: Any, boxes_NQ4: Tensor) -> Tensor:
        """Add the reference points; a forward hook of the box head, before the sigmoid."""
        assert self.points_NQ2 is not None
        centers, sides = boxes_NQ4.split(2, dim=-1)
        return torch.cat((centers + self.points_NQ2, sides), dim=-1)
