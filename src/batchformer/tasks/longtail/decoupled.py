"""Second stages of decoupled training: a new classifier on frozen features, or the old one rescaled.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, section 4.
Take BatchFormer out first (``batchformer.remove(network)``); left in, it is inactive on frozen features.
"""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from batchformer.tasks.image_classification.network import CosineClassifier, ImageClassifier

__all__ = ["WeightScale", "learn_weight_scale", "retrain_classifier", "tau_normalize"]

NetworkT = TypeVar("NetworkT", bound=ImageClassifier)


class WeightScale(nn.Module):
    """A frozen classifier whose weight vectors are multiplied by one learned number per class (LWS).

    Args:
        classifier: Trained linear or cosine classifier.

    Example:
        >>> scaled = WeightScale(nn.Linear(8, 3))
        >>> [name for name, parameter in scaled.named_parameters() if parameter.requires_grad]
        ['scale']
    """

    def __init__(self, classifier: nn.Module) -> None:
        super().__init__()
        weight = _weight(classifier)
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]
        self.classifier = classifier.requires_grad_(False)
        self.scale = nn.Parameter(weight.new_ones(weight.shape[0]))

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``(N, C)`` to logits ``(N, K)``; a bias is not scaled."""
        logits: Tensor = self.classifier(x)
        bias = getattr(self.classifier, "bias", None)
        return self.scale * logits if bias is None else self.scale * (logits - bias) + bias


def retrain_classifier(network: NetworkT) -> NetworkT:
    """Freeze everything and start the classifiers anew (cRT); train them with a class-balanced sampler.

    Args:
        network: Trained network, changed in place.

    Returns:
        The same network; only its classifiers have gradients, the rest stays in eval mode.

    Raises:
        ValueError: If a classifier is neither linear nor cosine.

    Example:
        >>> from batchformer.tasks.longtail.model import build_model
        >>> network = retrain_classifier(build_model("small_resnet", 10, in_channels=1))
        >>> [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        ['classifier.weight', 'classifier.bias']
    """
    for classifier in network.classifiers():
        _weight(classifier)
        classifier.reset_parameters()  # type: ignore[operator]
    return network.freeze()


def learn_weight_scale(network: NetworkT) -> NetworkT:
    """Freeze everything and learn one factor for each class (LWS); train with a class-balanced sampler.

    Args:
        network: Trained network, changed in place.

    Returns:
        The same network; only the factors have gradients, the rest stays in eval mode.

    Raises:
        ValueError: If a classifier is neither linear nor cosine.

    Example:
        >>> from batchformer.tasks.longtail.model import build_model
        >>> network = learn_weight_scale(build_model("small_resnet", 10, in_channels=1))
        >>> [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        ['classifier.scale']
    """
    network.replace_classifiers(WeightScale)
    network.freeze()
    for scaled in network.classifiers():
        for name, parameter in scaled.named_parameters():
            parameter.requires_grad_(name == "scale")
    return network


def tau_normalize(network: NetworkT, tau: float = 1.0) -> NetworkT:
    """Divide every weight vector by its length to the power ``tau`` and drop the bias (tau-normalisation).

    Nothing is trained; ``tau`` is chosen on a validation split. A cosine classifier has unit vectors already, so it is
    left as it is.

    Args:
        network: Trained network.
        tau: Exponent: 0 keeps the lengths, 1 makes them equal.

    Returns:
        Changed copy, so that several ``tau`` can be tried.

    Raises:
        ValueError: If a classifier is neither linear nor cosine.

    Example:
        >>> from batchformer.tasks.longtail.model import build_model
        >>> network = tau_normalize(build_model("small_resnet", 10, in_channels=1), tau=1.0)
        >>> bool(torch.allclose(network.classifier.weight.norm(dim=1), torch.ones(10)))
        True
    """
    network = copy.deepcopy(network)
    with torch.no_grad():
        for classifier in network.classifiers():
            weight = _weight(classifier)
            if isinstance(classifier, CosineClassifier):
                continue
            weight.div_(weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny) ** tau)
            bias = classifier.bias
            if isinstance(bias, Tensor):
                bias.zero_()
    return network


def _weight(classifier: nn.Module) -> Tensor:
    if not isinstance(classifier, nn.Linear | CosineClassifier):
        raise ValueError(
            f"Expected a linear or cosine classifier, got {type(classifier).__name__}. A second stage starts from the "
            "network of the first: build it, load its weights, then call this once."
        )
    return classifier.weight
