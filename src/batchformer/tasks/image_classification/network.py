"""Image classifiers: a backbone, and a classifier on its pooled features.

Axis letters: N samples, C features, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CosineClassifier", "ImageClassifier", "Network", "make_classifier", "train_only"]


class CosineClassifier(nn.Module):
    """Linear classifier on unit vectors: ``scale * cos(x, w_k)``, computed in fp32.

    Source: the "normalised linear" layer of LDAM (Cao et al. 2019) and RIDE (Wang et al. 2021), which scale by 30.

    Args:
        in_features: C.
        out_features: K.
        scale: Factor on the cosines.

    Example:
        >>> classifier = CosineClassifier(8, 3)
        >>> bool((classifier(torch.randn(4, 8)).abs() <= 30.001).all())
        True
    """

    def __init__(self, in_features: int, out_features: int, scale: float = 30.0) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = in_features, out_features, scale
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the class vectors evenly from the cube; their length has no effect."""
        nn.init.uniform_(self.weight, -1.0, 1.0)
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight, dim=1))

    def forward(self, x: Tensor) -> Tensor:
        """Map features ``(N, C)`` to logits ``(N, K)``."""
        with torch.autocast(x.device.type, enabled=False):
            # 30 * cos in bf16 would be off by up to 0.1.
            x = x.to(self.weight.dtype)
            return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        """Return the arguments, as ``print`` shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}"


class ImageClassifier(nn.Module):
    """Base of the networks: it knows its classifiers, and can be frozen up to them (decoupled second stage).

    ``batchformer.insert(network, before="auto")`` places BatchFormer in front of the classifiers; in training the rows
    of the outputs then double, [plain; mixed].

    Attributes:
        num_features: C, the width of the pooled feature.
        num_classes: K.
        frozen: Whether `freeze` was called; everything but the classifiers then stays in eval mode.
    """

    num_features: int
    num_classes: int
    frozen: bool = False

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """Return the module, or one for each expert, whose input is the pooled feature ``(N, C)``."""
        raise NotImplementedError

    def replace_classifiers(self, new: Callable[[nn.Module], nn.Module]) -> None:
        """Put ``new(old)`` in the place of every classifier."""
        raise NotImplementedError

    def classifiers(self) -> tuple[nn.Module, ...]:
        """Return `get_classifier` as a tuple, whatever the number of experts."""
        found = self.get_classifier()
        return found if isinstance(found, tuple) else (found,)

    def freeze(self) -> Self:
        """Freeze all but the classifiers: no gradient, and eval mode whatever ``train()`` says."""
        self.requires_grad_(False)
        for classifier in self.classifiers():
            classifier.requires_grad_(True)
        self.frozen = True
        return self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as in torch, except that the frozen part stays in eval mode."""
        super().train(mode)
        if self.frozen:
            for child in self.children():
                child.eval()
            for classifier in self.classifiers():
                classifier.train(mode)
        return self


class Network(ImageClassifier):
    """A backbone and one classifier.

    Args:
        backbone: Module from images to pooled features ``(N, C)``, with ``num_features``.
        num_classes: K.
        cosine: Whether the classifier is a `CosineClassifier` (as in LDAM and RIDE) instead of a linear one.

    Example:
        >>> from batchformer.tasks.image_classification.backbone import create_backbone
        >>> network = Network(create_backbone("small_resnet", in_channels=1), num_classes=10)
        >>> network(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, backbone: nn.Module, num_classes: int, *, cosine: bool = False) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_features = int(backbone.num_features)  # type: ignore[arg-type]
        self.num_classes = num_classes
        self.classifier = make_classifier(self.num_features, num_classes, cosine=cosine)

    def get_classifier(self) -> nn.Module:
        """Return the classifier."""
        return self.classifier

    def replace_classifiers(self, new: Callable[[nn.Module], nn.Module]) -> None:
        """Put ``new(old)`` in the place of the classifier."""
        self.classifier = new(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, channels, H, W)`` to logits ``(N, K)``; ``(2N, K)`` in training with BatchFormer."""
        logits: Tensor = self.classifier(self.backbone(x))
        return logits


def make_classifier(num_features: int, num_classes: int, *, cosine: bool = False) -> nn.Module:
    """Make a cosine classifier, or a linear one with torch's own initial values."""
    return CosineClassifier(num_features, num_classes) if cosine else nn.Linear(num_features, num_classes)


def train_only(network: nn.Module, parts: Sequence[str]) -> None:
    """Freeze all parameters but those whose names begin with one of ``parts``; without parts, change nothing.

    Args:
        network: Network, changed in place.
        parts: Beginnings of parameter names, such as ``"backbone.layer4"``.

    Raises:
        ValueError: When a part names no parameter; lists the parts that there are.

    Example:
        >>> network = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> train_only(network, ["1"])
        >>> [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        ['1.weight', '1.bias']
    """
    names = [name for name, _ in network.named_parameters()]
    if absent := [part for part in parts if not any(name.startswith(part) for name in names)]:
        known = sorted({".".join(name.split(".")[:2]) for name in names})
        raise ValueError(f"Expected train_only to name parts out of {', '.join(known)} ..., got {', '.join(absent)}.")
    for name, parameter in network.named_parameters():
        if parts and not name.startswith(tuple(parts)):
            parameter.requires_grad_(False)
