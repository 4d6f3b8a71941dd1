"""Backbones by name, from images to pooled features, built from the blocks of torchvision and timm.

Every backbone maps images ``(N, in_channels, H, W)`` to features ``(N, C)``; its attribute ``num_features`` is C. The
ResNets can be split by `stages` into the part that RIDE's experts share and the part that each has for itself.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from batchformer.tasks.pretrained.weights import create_timm

__all__ = ["BACKBONES", "ResNet", "create_backbone", "stages"]


class ZeroPadShortcut(nn.Module):
    """Option-A shortcut of He et al. 2016: every second pixel, new channels zero, no parameters."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, c, H, W)`` to ``(N, channels, H / stride, W / stride)``."""
        missing = self.channels - x.shape[1]
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, missing // 2, missing - missing // 2))


class ResNet(nn.Module):
    """ResNet for small images: a 3x3 stem, stages of torchvision's basic blocks, option-A shortcuts, global pooling.

    Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

    Args:
        depths: Blocks of each stage; every stage but the first halves the resolution.
        widths: Channels of each stage.
        in_channels: 3 for colour, 1 for grey.
        stem_stride: Stride of the stem; 2 halves the resolution there already.
        shared: Number of stages that RIDE's experts share.

    Raises:
        ValueError: If depths and widths differ in number, or ``shared`` leaves no stage to the experts.

    Example:
        >>> import torch
        >>> ResNet((1, 1), (8, 16), in_channels=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...],
        in_channels: int = 3,
        stem_stride: int = 1,
        shared: int = 1,
    ) -> None:
        super().__init__()
        if len(depths) != len(widths) or not 0 <= shared < len(depths):
            raise ValueError(
                f"Expected as many depths as widths and 0 <= shared < stages: {depths}, {widths}, {shared}."
            )
        self.num_features = widths[-1]
        self.shared = shared
        self.conv1 = nn.Conv2d(in_channels, widths[0], 3, stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            before = widths[max(stage - 1, 0)]
            self.add_module(f"layer{stage + 1}", _stage(before, width, depth, stride=1 if stage == 0 else 2))
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(N, in_channels, H, W)`` to features ``(N, C)``."""
        for module in self.children():
            x = module(x)
        return x


def _stage(before: int, width: int, depth: int, stride: int) -> nn.Sequential:
    from torchvision.models.resnet import BasicBlock

    blocks = []
    for index in range(depth):
        step = stride if index == 0 else 1
        shortcut = ZeroPadShortcut(width, step) if step != 1 or before != width else None
        blocks.append(BasicBlock(before, width, step, shortcut))
        before = width
    return nn.Sequential(*blocks)


def _resnet10(in_channels: int, reduced: bool, **kwargs: Any) -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    settings = _narrow(reduced) | kwargs
    backbone: nn.Module = ResNet(BasicBlock, (1, 1, 1, 1), num_classes=0, in_chans=in_channels, **settings)
    return backbone


def _timm_resnet(name: str, in_channels: int, reduced: bool, **kwargs: Any) -> nn.Module:
    return _from_timm(name, in_channels, **_narrow(reduced), **kwargs)


def _narrow(reduced: bool) -> dict[str, Any]:
    """Return RIDE's reduced width: three quarters of the channels in the last two stages."""
    return {"channels": (64, 128, 192, 384)} if reduced else {}


def _cifar_resnet32(in_channels: int, reduced: bool) -> nn.Module:
    return ResNet((5, 5, 5), (16, 24, 48) if reduced else (16, 32, 64), in_channels)


def _small_resnet(in_channels: int, reduced: bool) -> nn.Module:
    return ResNet((1, 1, 1), (16, 24, 48) if reduced else (16, 32, 64), in_channels, stem_stride=2)


BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet32": _cifar_resnet32,
    "small_resnet": _small_resnet,
    "resnet10": _resnet10,
    "resnet50": partial(_timm_resnet, "resnet50"),
    "resnext50": partial(_timm_resnet, "resnext50_32x4d"),
    "resnet152": partial(_timm_resnet, "resnet152"),
}
"""Backbones with published long-tail settings, by name; every other name is timm's."""


def create_backbone(
    name: str, *, in_channels: int = 3, pretrained: bool = False, reduced: bool = False, **kwargs: Any
) -> nn.Module:
    """Create a backbone that maps images to pooled features ``(N, num_features)``.

    Args:
        name: Name of the backbone: `resnet32` (CIFAR, 64 features), `small_resnet` (28x28 images, 64 features),
            `resnet10` (512), `resnet50`, `resnext50` (32x4d), `resnet152` (2048 each), or any name that
            `timm.create_model` takes.
        in_channels: 3 for colour, 1 for grey.
        pretrained: Whether timm's weights are loaded; they are downloaded at first use.
        reduced: Whether the experts' stages have RIDE's reduced width: 48 features for `resnet32` and `small_resnet`,
            384 for `resnet10`, 1536 for `resnet50`, `resnext50` and `resnet152`.
        **kwargs: Passed to timm.

    Returns:
        The module, with an int attribute ``num_features``.

    Raises:
        ValueError: If the name is unknown, or ``reduced`` or ``pretrained`` cannot be had for it.
        ImportError: If timm or torchvision is missing.
        OSError: If pretrained weights could not be downloaded.

    Example:
        >>> create_backbone("small_resnet", in_channels=1).num_features
        64
    """
    if pretrained and (reduced or name in ("resnet32", "small_resnet", "resnet10")):
        raise ValueError(
            f"There are no pretrained weights for {name!r}{' at reduced width' if reduced else ''}. Set "
            "pretrained=False, or take one of timm's models, for example 'resnet50', with reduced=False."
        )
    if name in BACKBONES:
        if pretrained:
            kwargs["pretrained"] = True
        return BACKBONES[name](in_channels=in_channels, reduced=reduced, **kwargs)
    if reduced:
        raise ValueError(f"Reduced width is defined for {', '.join(BACKBONES)}, not for {name!r}.")
    return _from_timm(name, in_channels, pretrained=pretrained, **kwargs)


def _from_timm(name: str, in_channels: int, pretrained: bool = False, **kwargs: Any) -> nn.Module:
    model: Any = create_timm(
        name,
        pretrained=pretrained,
        advice="Or give a file with pretrained_cfg_overlay={'file': ...}, or set pretrained=False.",
        own_names=tuple(BACKBONES),
        google_lite0=False,  # runs of earlier versions have timm's
        in_chans=in_channels,
        num_classes=0,
        **kwargs,
    )
    # Some timm models put a hidden layer between pooling and classifier; their features are that layer's.
    model.num_features = getattr(model, "head_hidden_size", model.num_features)
    return model  # type: ignore[no-any-return]


def stages(backbone: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Split a backbone into the part that RIDE's experts share and the part that each has for itself.

    Args:
        backbone: Backbone of this module, or a ResNet of timm: shared up to `layer1` (`resnet32`, `small_resnet`) or
            `layer2`.

    Returns:
        The shared part, from images to maps, and the expert's part, from maps to pooled features, as sequences. They
        hold the backbone's own modules, not copies.

    Raises:
        ValueError: If this kind of backbone has no such split.

    Example:
        >>> import torch
        >>> shared, own = stages(create_backbone("resnet32"))
        >>> own(shared(torch.zeros(2, 3, 32, 32))).shape
        torch.Size([2, 64])
    """
    parts = OrderedDict(backbone.named_children())
    if isinstance(backbone, ResNet):
        last = f"layer{backbone.shared}"
    elif {"conv1", "layer2", "layer3", "layer4", "global_pool", "fc"} <= parts.keys():
        del parts["fc"]  # an identity: backbones carry no classifier
        last = "layer2"
    else:
        raise ValueError(
            f"Experts share the first stages of a ResNet; {type(backbone).__name__} has no such split. Choose one of "
            f"{', '.join(BACKBONES)}, or a ResNet or ResNeXt of timm."
        )
    names = list(parts)
    cut = names.index(last) + 1
    shared = nn.Sequential(OrderedDict((name, parts[name]) for name in names[:cut]))
    own = nn.Sequential(OrderedDict((name, parts[name]) for name in names[cut:]))
    if drop_rate := float(getattr(backbone, "drop_rate", 0.0)):
        own.append(nn.Dropout(drop_rate))  # timm drops in forward(), after the pooling
    return shared, own
