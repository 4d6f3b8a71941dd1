"""Convolutional backbones of detectors: the network, its weights, and the part of it that trains.

A `Backbone` takes the place of the backbone of an unedited DETR, Conditional DETR, Deformable DETR or SMCA. The part
that trains is then a setting, where transformers 5.x freezes every weight of its own ResNet in detectors of this kind.

Axis letters: B images, C channels, H, W pixels, h, w cells of a map.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchformer.data.detection_transforms import IMAGENET_MEAN, IMAGENET_STD
from batchformer.tasks.pretrained.weights import (
    LITE0,
    create_timm,
    load_weights,
    pixel_statistics,
    read_weights,
    weights_error,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Backbone",
    "BackboneSettings",
    "create_backbone",
    "replace_backbone",
    "stand_in",
]

Trains = Literal["nothing", "from_stride_8", "all"]
_ADVICE = (
    "Or give a file with model.network.backbone.weights=PATH; or take "
    f"model.network.backbone.name={LITE0}, whose weights come from a Python package; or start from random weights with "
    "model.network.backbone.pretrained=false."
)


@dataclass
class BackboneSettings:
    """Settings of the backbone.

    Attributes:
        name: ``efficientnet_lite0`` (its ImageNet weights come from a Python package), any timm name, or a model of
            transformers by its name on the hub, which has a slash (``microsoft/resnet-50``), or its folder.
        pretrained: Start from ImageNet weights.
        weights: File of weights in the backbone's own layout, instead of a download.
        trains: Part that trains: ``nothing``; ``from_stride_8``, the layers after the map of stride 4, as DETR trains a
            ResNet; or ``all``. Batch norms never train: they keep their statistics and their weights.
        strides: Strides of the maps that the detector gets, in pixels for each cell, finest first. DETR, Conditional
            DETR and single-scale SMCA take the last.
    """

    name: str = "resnet50"
    pretrained: bool = True
    weights: str | None = None
    trains: Trains = "from_stride_8"
    strides: list[int] = field(default_factory=lambda: [32])


class Backbone(nn.Module):
    """Feature maps of images with their masks; batch norms are frozen.

    Args:
        body: Network from images (B, 3, H, W) to a list of maps, finest first.
        strides: Strides of the maps that ``body`` gives.
        channels: Channels of the maps that ``body`` gives.
        wanted: Strides of the maps to give, out of ``strides``.
        trains: Part that trains, see `BackboneSettings`.
        mean: Mean of the pixels (0..1) that ``body`` was trained on, for each of the three channels.
        std: Standard deviation of these pixels, for each of the three channels.

    Attributes:
        intermediate_channel_sizes: Channels of the maps that are given.

    Raises:
        ValueError: A wanted stride is not among ``strides``.

    Example:
        >>> backbone = create_backbone(BackboneSettings("efficientnet_lite0", pretrained=False, strides=[16]))
        >>> [(x, mask)] = backbone(torch.zeros(1, 3, 64, 96), torch.ones(1, 64, 96))
        >>> x.shape, mask.shape
        (torch.Size([1, 112, 4, 6]), torch.Size([1, 4, 6]))
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        body: nn.Module,
        strides: Sequence[int],
        channels: Sequence[int],
        *,
        wanted: Sequence[int],
        trains: Trains,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if not wanted or any(stride not in strides for stride in wanted) or sorted(set(wanted)) != list(wanted):
            raise ValueError(f"Expected strides out of {sorted(strides)}, finest first, each once; got {list(wanted)}.")
        self.body, self.trains = body, trains
        self.chosen = [list(strides).index(stride) for stride in wanted]
        self.strides = list(wanted)
        self.intermediate_channel_sizes = [channels[index] for index in self.chosen]
        # Batches come with ImageNet's statistics; a body trained on others gets its own back, in one step.
        self.register_buffer("scale", _column(IMAGENET_STD) / _column(std), persistent=False)
        self.register_buffer("shift", (_column(IMAGENET_MEAN) - _column(mean)) / _column(std), persistent=False)
        self._served: Sequence[Tensor] | None = None
        self._freeze(strides)
        self.train(self.training)

    def _freeze(self, strides: Sequence[int]) -> None:
        if self.trains == "nothing":
            self.requires_grad_(False)
        elif self.trains == "from_stride_8":
            if 4 not in strides:
                raise ValueError(
                    f"Expected a backbone with a map of stride 4 for trains='from_stride_8', got strides "
                    f"{sorted(strides)}. Take trains='all' or 'nothing'."
                )
            for parameter in _upstream(self.body, list(strides).index(4)):
                parameter.requires_grad_(False)
        for module in _batch_norms(self.body):
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Set the mode as in torch, except that batch norms, and a backbone that does not train, stay in eval mode."""
        super().train(mode)
        for module in [self.body] if self.trains == "nothing" else _batch_norms(self.body):
            module.eval()
        return self

    def maps(self, pixels_B3HW: Tensor) -> list[Tensor]:
        """Compute the maps (B, C, h, w), finest first, of images normalised with ImageNet's statistics."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains != "nothing"):
            found = self.body(pixels_B3HW * self.scale + self.shift)
        return [found[index] for index in self.chosen]

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Compute maps, and boolean masks of the same size, from images (B, 3, H, W) and their mask (B, H, W)."""
        maps = self.maps(pixel_values) if self._served is None else self._served
        mask = pixel_mask[None].float()
        return [(x, F.interpolate(mask, size=x.shape[-2:]).to(torch.bool)[0]) for x in maps]

    @contextmanager
    def serving(self, maps: Sequence[Tensor] | None) -> Iterator[None]:
        """Return these maps from ``forward`` inside the block, whatever the pixels; ``None`` changes nothing."""
        self._served = maps
        try:
            yield
        finally:
            self._served = None

    def note(self) -> str:
        """Return a sentence that counts the parameters that train."""
        total = sum(p.numel() for p in self.body.parameters())
        trained = sum(p.numel() for p in self.body.parameters() if p.requires_grad)
        return f"Backbone: {trained:,} of {total:,} parameters train ({self.trains}); batch norms are frozen."


def create_backbone(settings: BackboneSettings) -> Backbone:
    """Build a backbone and load its weights.

    Raises:
        ValueError: The name is unknown (the message names the nearest ones), or the backbone has no map of a stride.
        ImportError: timm or transformers is missing.
        OSError: The weights could not be downloaded; the message names the ways out.
        DataNotFoundError: The package of EfficientNet-Lite0 could not be fetched.
    """
    if "/" in settings.name or Path(settings.name).is_dir():
        return _from_transformers(settings)
    return _from_timm(settings)


def stand_in(backbone: Backbone) -> dict[str, Any]:
    """Return arguments for a detector's configuration: a tiny backbone of the same channels, for `replace_backbone`.

    Example:
        >>> made = create_backbone(BackboneSettings("resnet18", pretrained=False, strides=[16, 32]))
        >>> stand_in(made)["backbone_config"].hidden_sizes
        [256, 512]
    """
    from transformers import ResNetConfig

    channels = backbone.intermediate_channel_sizes
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=channels,
        depths=[1] * len(channels),
        out_features=[f"stage{number}" for number in range(1, len(channels) + 1)],
    )
    # Up to 4.57 a configuration asks timm for a backbone unless told not to.
    return {"backbone_config": config, "backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}


def replace_backbone(detector: nn.Module, backbone: Backbone) -> None:
    """Put a backbone into a detector of transformers (or SMCA) that was built for maps of the same channels.

    Args:
        detector: Detector, its base model, or one with a mask head; changed in place.
        backbone: Backbone to put in.

    Raises:
        ValueError: There is no backbone to replace, or its channels differ.
    """
    holders = [module for module in detector.modules() if isinstance(getattr(module, "backbone", None), nn.Module)]
    if len(holders) != 1:
        raise ValueError(f"Expected a detector with one backbone, got {type(detector).__name__} with {len(holders)}.")
    # Up to transformers 4.57 the backbone also makes the position embeddings.
    holder: Any = holders[0]
    inner = getattr(holder.backbone, "conv_encoder", None)
    old = holder.backbone if inner is None else inner
    if list(old.intermediate_channel_sizes) != backbone.intermediate_channel_sizes:
        raise ValueError(
            f"Expected maps of {list(old.intermediate_channel_sizes)} channels, as the detector was built for, got "
            f"{backbone.intermediate_channel_sizes}."
        )
    if inner is None:
        holder.backbone = backbone
    else:
        holder.backbone.conv_encoder = backbone


class _TransformersMaps(nn.Module):
    """A backbone of transformers that returns its maps as a list."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels_B3HW: Tensor) -> list[Tensor]:
        return list(self.model(pixels_B3HW).feature_maps)


def _from_timm(settings: BackboneSettings) -> Backbone:
    options: dict[str, Any] = {"features_only": True, "advice": _ADVICE}
    every: Any = create_timm(settings.name, pretrained=False, **options)
    last = max(index for index, stride in enumerate(every.feature_info.reduction()) if stride <= max(settings.strides))
    body: Any = create_timm(
        settings.name,
        pretrained=settings.pretrained,
        weights=settings.weights,
        out_indices=tuple(range(last + 1)),
        **options,
    )
    info, (mean, std) = body.feature_info, pixel_statistics(settings.name)
    return Backbone(
        body, info.reduction(), info.channels(), wanted=settings.strides, trains=settings.trains, mean=mean, std=std
    )


def _from_transformers(settings: BackboneSettings) -> Backbone:
    try:
        from transformers import AutoConfig
        from transformers.models.auto import MODEL_FOR_BACKBONE_MAPPING
    except ImportError as error:
        raise ImportError("This backbone comes from transformers: pip install 'batchformer[transformers]'") from error
    try:
        config = AutoConfig.from_pretrained(settings.name)
        config.out_features = [name for name in config.stage_names if name != "stem"]
        # Not AutoBackbone.from_pretrained: it takes a folder for a name of timm's.
        kind = MODEL_FOR_BACKBONE_MAPPING[type(config)]
        loads = settings.pretrained and settings.weights is None
        model = kind.from_pretrained(settings.name, config=config) if loads else kind(config)
    except (OSError, ValueError, KeyError) as error:
        raise weights_error(settings.name, error, _ADVICE) from error
    if settings.pretrained and settings.weights is not None:
        load_weights(model, read_weights(Path(settings.weights)), settings.name)
    with torch.no_grad():
        sizes = [x.shape[-1] for x in model.eval()(torch.zeros(1, 3, 224, 224)).feature_maps]
    strides = [224 // size for size in sizes]
    return Backbone(_TransformersMaps(model), strides, model.channels, wanted=settings.strides, trains=settings.trains)


def _upstream(body: nn.Module, index: int) -> list[nn.Parameter]:
    """Return the parameters that a map depends on: those that its gradient reaches, whatever their names."""
    parameters = list(body.parameters())
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):
        was = body.training
        x = body.eval()(torch.zeros(1, 3, 64, 64))[index]
        body.train(was)
        grads = torch.autograd.grad(x.sum(), parameters, allow_unused=True)
    return [parameter for parameter, grad in zip(parameters, grads, strict=True) if grad is not None]


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _column(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None]
