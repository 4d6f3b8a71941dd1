"""The convolutional network in front of the transformer: any backbone that transformers' ``AutoBackbone`` knows."""

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

    What trains: the convolutions behind the first ``config.freeze_backbone_at`` parts; all batch norms keep their
    statistics and their weights, in training too.

    Args:
        config: `SmcaConfig`; its ``backbone_config`` says which network, and which of its maps.

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
        """As in torch, except that batch norms stay in eval mode."""
        super().train(mode)
        for module in _batch_norms(self):
            module.eval()
        return self

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Images (B, 3, height, width) and mask (B, height, width), 1 where they are, to maps with boolean masks."""
        mask = pixel_mask[None].float()
        maps = self.model(pixel_values).feature_maps
        return [(x, F.interpolate(mask, size=x.shape[-2:]).bool()[0]) for x in maps]


def freeze(backbone: nn.Module, parts: int) -> None:
    """Let the batch norms and the first parts of a backbone not train.

    Args:
        backbone: The network; stages are found by the names of its parameters, the stem is what comes before them.
        parts: 0 freezes no convolution, 1 the stem, 2 also the first stage, and so on.

    Raises:
        ValueError: If ``parts`` is negative, or more than 0 in a network whose names show no stages.

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
            f"Expected stages in parameter names (stages.0, layer1, blocks.0), {type(backbone).__name__} has none: "
            "set freeze_backbone_at=0 and freeze what shall not train by requires_grad_(False)."
        )
    for module in _batch_norms(backbone):
        module.requires_grad_(False)


def _forgotten(config: Any) -> dict[str, int]:
    """What transformers 4 keeps in the configuration of a timm backbone without using it: the dilation."""
    stride = getattr(config, "output_stride", None)
    return {} if stride is None or hasattr(type(config)(), "output_stride") else {"output_stride": stride}


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
