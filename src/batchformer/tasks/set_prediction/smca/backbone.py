"""Convolutional backbone of SMCA: any network that ``AutoBackbone`` of transformers knows."""

import re
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoBackbone

from .configuration import SmcaConfig

# Stages count from 0 in names like "encoder.stages.0" and "blocks.0", from 1 in "layer1" and "stage1".
_STAGE = re.compile(r"(?:^|[._])(?:(?:stages|layers|blocks)[._](?P<from_0>\d+)|(?:layer|stage)(?P<from_1>\d+))")


class SmcaBackbone(nn.Module):
    """Feature maps of an image with their masks.

    The convolutions after the first ``config.freeze_backbone_at`` parts train; all batch norms keep their statistics
    and their weights, in training too.

    Args:
        config: Settings, whose ``backbone_config`` names the network and its maps.

    Attributes:
        intermediate_channel_sizes: Channels of the maps.
    """

    def __init__(self, config: SmcaConfig) -> None:
        super().__init__()
        self.model = AutoBackbone.from_config(config.backbone_config, **_forgotten(config.backbone_config))
        self.intermediate_channel_sizes: list[int] = list(self.model.channels)
        freeze(self.model, config.freeze_backbone_at)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as torch does, but keep batch norms in eval mode."""
        super().train(mode)
        for module in _batch_norms(self):
            module.eval()
        return self

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Map images (B, 3, height, width) and their mask (B, height, width), 1 inside, to maps with boolean masks."""
        mask = pixel_mask[None].float()
        maps = self.model(pixel_values).feature_maps
        return [(x, F.interpolate(mask, size=x.shape[-2:]).bool()[0]) for x in maps]


def freeze(backbone: nn.Module, parts: int) -> None:
    """Freeze the batch norms and the first parts of a backbone.

    Args:
        backbone: Network whose parameters' names show the stages; the parameters before them are the stem.
        parts: Number of parts whose convolutions are frozen: 0 none, 1 the stem, 2 also the first stage, and so on.

    Raises:
        ValueError: When ``parts`` is negative, or larger than 0 in a network whose names show no stages.

    Source:
        DETR (Carion et al. 2020), appendix A.4: batch norms, stem and first stage are frozen; SMCA follows it.

    Example:
        >>> network = nn.ModuleDict({"conv1": nn.Conv2d(3, 4, 1), "layer1": nn.Conv2d(4, 4, 1)})
        >>> freeze(network, 1)
        >>> [name for name, p in network.named_parameters() if p.requires_grad]
        ['layer1.weight', 'layer1.bias']
    """
    if parts < 0:
        raise ValueError(f"Expected freeze_backbone_at to be 0 or more, got {parts}.")
    stage = 0
    for name, parameter in backbone.named_parameters():
        if found := _STAGE.search(name):
            stage = int(found["from_1"]) if found["from_0"] is None else int(found["from_0"]) + 1
        if stage < parts:
            parameter.requires_grad_(False)
    if parts and not stage:
        raise ValueError(
            f"Expected stages in parameter names (stages.0, layer1, blocks.0), got a {type(backbone).__name__} "
            "without them. Set freeze_backbone_at=0, and freeze parameters by requires_grad_(False)."
        )
    for module in _batch_norms(backbone):
        module.requires_grad_(False)


def _forgotten(config: Any) -> dict[str, int]:
    """Return the dilation, which transformers 4 keeps in the configuration of a timm backbone without using it."""
    stride = getattr(config, "output_stride", None)
    return {} if stride is None or hasattr(type(config)(), "output_stride") else {"output_stride": stride}


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
