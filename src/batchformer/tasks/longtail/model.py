"""Networks of long-tailed recognition by name: a plain classifier, RIDE's experts, or PaCo's two encoders.

Axis letters: N samples, E experts, K classes.
"""

from typing import Any

from batchformer.tasks.image_classification.backbone import create_backbone
from batchformer.tasks.image_classification.network import ImageClassifier, Network

from .paco import PaCo
from .ride import RIDE

__all__ = ["build_model"]


def build_model(
    name: str,
    num_classes: int,
    *,
    in_channels: int = 3,
    kind: str = "plain",
    cosine: bool | None = None,
    pretrained: bool = False,
    experts: int = 3,
    reduced: bool = True,
    **settings: Any,
) -> ImageClassifier:
    """Build a network by name.

    Args:
        name: Backbone, see `create_backbone`.
        num_classes: K.
        in_channels: 3 for colour, 1 for grey.
        kind: "plain": one classifier, logits ``(N, K)``. "ride": several experts, logits ``(N, E, K)``. "paco": with
            momentum encoder and queue, see `PaCo`.
        cosine: Whether the classifiers are cosine classifiers; ``None`` takes the kind's own: cosine for "ride", linear
            for the others.
        pretrained: Whether timm's weights are loaded.
        experts: Number of RIDE's experts.
        reduced: Whether RIDE's experts have their stages at reduced width.
        **settings: For "paco" its keyword arguments (``queue_size``, ``momentum``, ``embed_dim``), else timm's.

    Returns:
        The network.

    Raises:
        ValueError: If the kind or the name is unknown.

    Example:
        >>> import torch
        >>> build_model("small_resnet", 10, in_channels=1, kind="ride")(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 3, 10])
    """
    if kind == "ride":
        return RIDE(
            name,
            num_classes,
            experts=experts,
            in_channels=in_channels,
            reduced=reduced,
            cosine=cosine is not False,
            pretrained=pretrained,
            **settings,
        )
    if kind == "paco":
        backbone = create_backbone(name, in_channels=in_channels, pretrained=pretrained)
        return PaCo(backbone, num_classes, cosine=bool(cosine), **settings)
    if kind == "plain":
        backbone = create_backbone(name, in_channels=in_channels, pretrained=pretrained, **settings)
        return Network(backbone, num_classes, cosine=bool(cosine))
    raise ValueError(f"Unknown kind {kind!r}. Choose 'plain', 'ride' or 'paco'.")
