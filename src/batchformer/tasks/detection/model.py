"""The detector of a detection run."""

from typing import Any

from batchformer.tasks.set_prediction.detector import detector_from_settings

from .settings import NetworkSettings

__all__ = ["build_network"]


def build_network(settings: NetworkSettings, num_classes: int) -> Any:
    """Build the plain detector that a recipe describes; see `batchformer.tasks.set_prediction.detector`.

    Args:
        settings: Settings of the network.
        num_classes: K, number of classes without "no object".

    Raises:
        ValueError: When the settings do not fit together.
        OSError: When the backbone's weights cannot be fetched.

    Example:
        >>> import torch
        >>> from batchformer.tasks.set_prediction.backbone import BackboneSettings
        >>> backbone = BackboneSettings("resnet18", pretrained=False, strides=[32])
        >>> settings = NetworkSettings("detr", backbone, d_model=32, encoder_layers=1, decoder_layers=1, num_queries=5)
        >>> build_network(settings, num_classes=3)(torch.zeros(1, 3, 64, 64)).logits.shape
        torch.Size([1, 5, 4])
    """
    if settings.detector in ("detr", "conditional_detr") and len(settings.backbone.strides) != 1:
        raise ValueError(
            f"Expected one map for {settings.detector}, got backbone.strides={settings.backbone.strides}. Give one "
            "stride, 16 or 32."
        )
    return detector_from_settings(settings, num_classes)
