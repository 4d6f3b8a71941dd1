"""RIDE: experts that share the first stages of a ResNet, and routers that ask for as many experts as a sample needs.

Axis letters: N samples, C features, E experts, K classes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchformer.tasks.image_classification.backbone import create_backbone, stages
from batchformer.tasks.image_classification.network import ImageClassifier, make_classifier

__all__ = ["RIDE", "RoutedExperts", "RoutedOutput", "RoutingOutput"]


class RIDE(ImageClassifier):
    """A multi-expert network: shared first stages, one branch of the last two stages and one classifier per expert.

    BatchFormer goes in front of every expert's classifier, one module for all experts; in it a sample attends to the
    other samples within one expert. The published runs use 4 heads for C > 128, else 1 (`num_heads`); a single stream
    on ImageNet-LT and iNaturalist, two streams on CIFAR-100-LT.

    Source: Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", ICLR 2021.

    Args:
        name: Name of a backbone that `stages` can split, such as `resnet32`, `small_resnet`, `resnet10` or `resnet50`.
        num_classes: K.
        experts: E, at least 1.
        in_channels: 3 for colour, 1 for grey.
        reduced: Whether the experts' stages have three quarters of their width.
        cosine: Whether the classifiers are cosine classifiers with scale 30, as published, instead of linear ones.
        pretrained: Whether the shared stages and all experts start from timm's weights (full width only).
        **settings: Passed to timm.

    Raises:
        ValueError: If there is no expert or the backbone cannot be split.

    Example:
        >>> network = RIDE("resnet32", 100)
        >>> network(torch.zeros(2, 3, 32, 32)).shape, network.num_features
        (torch.Size([2, 3, 100]), 48)
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        *,
        experts: int = 3,
        in_channels: int = 3,
        reduced: bool = True,
        cosine: bool = True,
        pretrained: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        if experts < 1:
            raise ValueError(f"Expected at least one expert, got {experts}.")
        # Built whole, then split: each expert draws its own initial values, and only the first one's stem is kept.
        built = [
            create_backbone(name, in_channels=in_channels, reduced=reduced, pretrained=pretrained, **settings)
            for _ in range(experts)
        ]
        parts = [stages(backbone) for backbone in built]
        self.num_features = int(built[0].num_features)  # type: ignore[arg-type]
        self.num_classes = num_classes
        self.shared = parts[0][0]
        self.experts = nn.ModuleList(own for _, own in parts)
        self.heads = nn.ModuleList(
            make_classifier(self.num_features, num_classes, cosine=cosine) for _ in range(experts)
        )

    @property
    def num_heads(self) -> int:
        """Attention heads of BatchFormer in the published runs: 4 for more than 128 features, else 1."""
        return 4 if self.num_features > 128 else 1

    def get_classifier(self) -> tuple[nn.Module, ...]:
        """Return the classifiers, one for each expert."""
        return tuple(self.heads)

    def replace_classifiers(self, new: Callable[[nn.Module], nn.Module]) -> None:
        """Put ``new(old)`` in the place of every expert's classifier."""
        self.heads = nn.ModuleList(new(head) for head in self.heads)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits ``(N, E, K)``, ``(2N, E, K)`` in training with BatchFormer; predict with their mean."""
        maps = self.shared(x)
        return torch.stack([head(own(maps)) for own, head in zip(self.experts, self.heads, strict=True)], dim=1)


class RoutingOutput(NamedTuple):
    """Output of `RoutedExperts` in training.

    Attributes:
        help_logits: Logits of asking the next expert, ``(N, E - 1)``.
        logits: Logits of all experts, ``(N, E, K)``.
    """

    help_logits: Tensor
    logits: Tensor


class RoutedOutput(NamedTuple):
    """Output of `RoutedExperts` in eval mode.

    Attributes:
        logits: Mean logits of the experts that were asked, ``(N, K)``.
        experts_used: Number of experts that were asked, the mean over the samples, a scalar.
    """

    logits: Tensor
    experts_used: Tensor


class RoutedExperts(nn.Module):
    """Expert assignment: after each expert a router decides for each sample whether the next one is asked.

    Only the routers train, with `loss_ride.routing`; the network is frozen and stays in eval mode, so an inserted
    BatchFormer is not active (in the published code it was).

    Source: Wang et al., ICLR 2021, section 3.3. A router sees the unit-length pooled feature through 16 hidden units,
    and the largest logits of the running mean; all routers share the last layer, as in the published code.

    Args:
        network: Trained `RIDE` network of at least two experts.
        hidden: Number of hidden units of a router.
        top: Number of the largest logits that a router sees; all K where there are fewer.

    Raises:
        ValueError: If the network has a single expert.

    Example:
        >>> routed = RoutedExperts(RIDE("small_resnet", 10, in_channels=1)).eval()
        >>> logits, used = routed(torch.zeros(2, 1, 28, 28))
        >>> logits.shape, 1 <= float(used) <= 3
        (torch.Size([2, 10]), True)
    """

    onnx_refusal = (
        "Expected a network that does the same for every image, got routed experts, which ONNX cannot say. Give "
        "--format=safetensors, or export the run of the stage before, which asks all experts."
    )

    def __init__(self, network: RIDE, *, hidden: int = 16, top: int = 5) -> None:
        super().__init__()
        if len(network.experts) < 2:
            raise ValueError("Expected a network with at least two experts: there is nothing to route with one.")
        self.network = network.requires_grad_(False)
        self.num_features, self.num_classes = network.num_features, network.num_classes
        self.top = min(top, network.num_classes)
        self.hidden = nn.ModuleList(nn.Linear(network.num_features, hidden) for _ in range(len(network.experts) - 1))
        self.ask = nn.Linear(hidden + self.top, 1)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as in torch, except that the network stays in eval mode."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, x: Tensor) -> RoutingOutput | RoutedOutput:
        """Map images to `RoutingOutput` in training, where all experts run; to `RoutedOutput` in eval mode."""
        with torch.no_grad():
            maps = self.network.shared(x)
        return self._all(maps) if self.training else self._routed(maps)

    def _expert(self, index: int, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Return feature ``(N, C)`` and logits ``(N, K)`` of one expert."""
        with torch.no_grad():
            feature = self.network.experts[index](maps)
            return feature, self.network.heads[index](feature)

    def _help(self, index: int, feature: Tensor, mean_logits: Tensor) -> Tensor:
        """Return the logit ``(N,)`` of asking expert ``index + 1``."""
        hidden = F.relu(self.hidden[index](F.normalize(feature, dim=1)))
        largest = mean_logits.topk(self.top, dim=1).values.to(hidden.dtype)
        answer: Tensor = self.ask(torch.cat([largest, hidden], dim=1))
        return answer[:, 0]

    def _all(self, maps: Tensor) -> RoutingOutput:
        features, logits = zip(*(self._expert(index, maps) for index in range(len(self.network.experts))), strict=True)
        logits_NEK = torch.stack(logits, dim=1)
        ranks = torch.arange(1, len(features) + 1, device=maps.device)[:, None]
        running_NEK = logits_NEK.cumsum(dim=1) / ranks
        asked = [self._help(i, features[i], running_NEK[:, i]) for i in range(len(features) - 1)]
        return RoutingOutput(torch.stack(asked, dim=1), logits_NEK)

    def _routed(self, maps: Tensor) -> RoutedOutput:
        feature, total = self._expert(0, maps)
        used = torch.ones(len(total), device=total.device)
        rows = torch.arange(len(total), device=total.device)
        for index in range(1, len(self.network.experts)):
            wanted = self._help(index - 1, feature, total[rows] / index) > 0
            rows = rows[wanted]
            if len(rows) == 0:
                break
            feature, logits = self._expert(index, maps[rows])
            total = total.index_add(0, rows, logits)
            used = used.index_add(0, rows, torch.ones_like(rows, dtype=used.dtype))
        return RoutedOutput(total / used[:, None], used.mean())
