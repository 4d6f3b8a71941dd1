"""A backbone and a classifier as one network."""

from collections.abc import Callable
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        """Features ``(N, C)`` to logits ``(N, K)``."""
        with torch.autocast(x.device.type, enabled=False):
            # 30 * cos in bf16 would be off by up to 0.1.
            x = x.to(self.weight.dtype)
            return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, scale={self.scale}"


class LongTailNetwork(nn.Module):
    """Base of the networks: says where the classifier is, and can be frozen up to it (decoupled second stage).

    Attributes:
        num_features: C, the width of the pooled feature.
        num_classes: K.
        frozen: Set by `freeze`; everything but the classifiers then stays in eval mode.
    """

    num_features: int
    num_classes: int
    frozen: bool = False

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]:
        """The module, or one per expert, whose input is the pooled feature ``(N, C)``."""
        raise NotImplementedError

    def replace_classifiers(self, new: Callable[[nn.Module], nn.Module]) -> None:
        """Put ``new(old)`` in the place of every classifier."""
        raise NotImplementedError

    def classifiers(self) -> tuple[nn.Module, ...]:
        """`get_classifier` as a tuple, whatever the number of experts."""
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
        """As in torch, except that the frozen part stays in eval mode."""
        super().train(mode)
        if self.frozen:
            for child in self.children():
                child.eval()
            for classifier in self.classifiers():
                classifier.train(mode)
        return self


class Network(LongTailNetwork):
    """A backbone and one classifier.

    Args:
        backbone: Images to pooled features ``(N, C)``, with ``num_features``.
        num_classes: K.
        cosine: A `CosineClassifier` in the place of a linear one (as LDAM and RIDE use).

    Example:
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
        """The classifier."""
        return self.classifier

    def replace_classifiers(self, new: Callable[[nn.Module], nn.Module]) -> None:
        """Put ``new(old)`` in the place of the classifier."""
        self.classifier = new(self.classifier)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(N, channels, H, W)`` to logits ``(N, K)``; ``(2N, K)`` in training with BatchFormer."""
        logits: Tensor = self.classifier(self.backbone(x))
        return logits


def make_classifier(num_features: int, num_classes: int, *, cosine: bool = False) -> nn.Module:
    """A linear or cosine classifier, `Linear` with torch's own initial values."""
    return CosineClassifier(num_features, num_classes) if cosine else nn.Linear(num_features, num_classes)
