"""Networks of long-tailed recognition: by name, from a recipe's settings, and for the stages after the first.

Axis letters: N samples, E experts, K classes.
"""

import inspect
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from batchformer.tasks.image_classification.backbone import create_backbone
from batchformer.tasks.image_classification.network import ImageClassifier, Network, train_only

from .decoupled import learn_weight_scale, retrain_classifier, tau_normalize
from .paco import PaCo
from .ride import RIDE, RoutedExperts, RoutedOutput
from .settings import NetworkSettings

__all__ = ["Logits", "build_model", "build_network", "build_stage", "final_logits", "without_keys"]


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


def build_network(settings: NetworkSettings, num_classes: int, in_channels: int) -> ImageClassifier:
    """Build the network that a recipe describes.

    Args:
        settings: Settings of the network.
        num_classes: K.
        in_channels: 3 for colour, 1 for grey.

    Raises:
        ValueError: For ``settings`` that this network does not take, and ``train_only`` of parts that it has not.
    """
    arguments = asdict(settings)
    more, parts, name = arguments.pop("settings"), arguments.pop("train_only"), arguments.pop("backbone")
    try:
        network = build_model(name, num_classes, in_channels=in_channels, **arguments, **more)
    except TypeError as error:
        if not more:
            raise
        taken = "none" if name in ("small_resnet", "resnet32") else f"arguments of timm's {name}"
        if settings.kind == "paco":
            taken = ", ".join(sorted(set(inspect.signature(PaCo).parameters) - {"backbone", "num_classes", "cosine"}))
        raise ValueError(
            f"Expected model.network.settings that this network takes ({taken}), got {', '.join(more)}: {error}."
        ) from error
    train_only(network, parts)
    return network


def build_stage(network: Any, stage: str, tau: float = 0.0) -> Any:
    """Make the network of a stage out of that of the stage before.

    Args:
        network: Network of the stage before; changed in place.
        stage: "train" returns the network itself, "crt", "lws", "tau" and "routing" the network of that stage.
        tau: Exponent of the stage "tau".

    Raises:
        ValueError: For a stage that this kind of network does not have.
    """
    if stage == "train":
        return network
    network = without_keys(network)
    if stage == "crt":
        return retrain_classifier(network)
    if stage == "lws":
        return learn_weight_scale(network)
    if stage == "tau":
        return tau_normalize(network, tau)
    if not isinstance(network, RIDE):
        raise ValueError(f"Expected a RIDE run to start from for 'routing', got a {type(network).__name__}.")
    return RoutedExperts(network)


def without_keys(network: nn.Module) -> Any:
    """Return the network that is tested: of PaCo query encoder and classifier, any other network as it is."""
    return network.plain() if isinstance(network, PaCo) else network


def final_logits(outputs: Tensor | RoutedOutput) -> Tensor:
    """Return logits (N, K) by which a class is chosen: of several experts (N, E, K) the mean."""
    logits = outputs.logits if isinstance(outputs, RoutedOutput) else outputs
    return logits.mean(dim=1) if logits.dim() == 3 else logits


class Logits(nn.Module):
    """A network that returns `final_logits`, whatever its kind and stage.

    Args:
        network: Any network of this task, in ``eval()``.

    Example:
        >>> import torch
        >>> network = build_model("small_resnet", 10, in_channels=1, kind="ride").eval()
        >>> Logits(network)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Map images (N, C, H, W) to logits (N, K)."""
        return final_logits(self.network(images))
