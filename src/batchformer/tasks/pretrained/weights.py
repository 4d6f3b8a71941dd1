"""Networks of timm with ImageNet weights, from timm's hub, from a file, or from a Python package.

The hub cannot be reached from everywhere. The weights of EfficientNet-Lite0 can be had without it, from a package of
the Python index (``efficientnet-lite0`` in the data sets of ``batchformer ls``).
"""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from batchformer.data import fetch
from batchformer.data.detection_transforms import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["LITE0", "create_timm", "load_weights", "pixel_statistics", "read_weights", "weights_error"]

LITE0 = "efficientnet_lite0"
"""Name of EfficientNet-Lite0 as published by Google, whose weights come from a Python package."""


def create_timm(
    name: str,
    *,
    pretrained: bool,
    weights: str | Path | None = None,
    advice: str = "",
    own_names: Sequence[str] = (),
    google_lite0: bool = True,
    **options: Any,
) -> nn.Module:
    """Create a network of timm and load its weights.

    Args:
        name: :data:`LITE0`, or any name that ``timm.create_model`` takes.
        pretrained: Start from ImageNet weights.
        weights: File of weights in the network's own layout, read instead of a download if ``pretrained`` is on.
        advice: Sentence for the error of a failed download: the settings by which the user gets around it.
        own_names: Names of a task's own networks, which the error about an unknown name offers as well.
        google_lite0: Whether :data:`LITE0` is the network that Google published, with the weights of its package, or
            timm's network of that name, which pads otherwise.
        options: Passed to ``timm.create_model``, for example ``num_classes=0`` or ``features_only=True``.

    Raises:
        ValueError: The name is unknown (the message names the nearest ones), or the file is of another network.
        ImportError: timm is missing.
        OSError: The weights could not be downloaded.
        DataNotFoundError: The package of EfficientNet-Lite0 could not be fetched.

    Example:
        >>> network = create_timm("efficientnet_lite0", pretrained=False, num_classes=0)
        >>> network.eval()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 1280])
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError("timm is missing, which backbones come from: pip install 'batchformer[vision]'") from error
    lite0 = name == LITE0 and google_lite0
    known = f"tf_{LITE0}" if lite0 else name
    elsewhere = known.startswith(("hf-hub:", "local-dir:"))
    if not elsewhere and not timm.is_model(known.removeprefix("timm/").split(".")[0]):
        names = dict.fromkeys([LITE0, *own_names, *timm.list_models()])
        near = ", ".join(difflib.get_close_matches(known, names, n=3))
        own_ones = f" Own: {', '.join(own_names)}; timm's: timm.list_models()." if own_names else ""
        raise ValueError(f"Unknown backbone {known!r}." + (f" Did you mean {near}?" if near else "") + own_ones)
    own = lite0 or weights is not None
    try:
        network: nn.Module = timm.create_model(known, pretrained=pretrained and not own, **options)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise weights_error(name, error, advice) from error
    if pretrained and own:
        load_weights(network, read_weights(Path(weights) if weights is not None else _lite0_file()), known)
    return network


def pixel_statistics(name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Return mean and standard deviation of the pixels (0..1), by channel, that a network of timm was trained on.

    Example:
        >>> pixel_statistics("resnet18")
        ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    """
    import timm

    if name == LITE0:
        return (127 / 255,) * 3, (128 / 255,) * 3
    facts = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return (facts.mean, facts.std) if facts is not None else (IMAGENET_MEAN, IMAGENET_STD)


def load_weights(network: nn.Module, state: Mapping[str, Tensor], name: str) -> None:
    """Load weights by name, else by order, which fits the package of EfficientNet-Lite0 with its other names.

    Args:
        network: Network, or the first part of one: what ``state`` has beyond it, such as a classifier, is left out.
        state: Weights by name.
        name: Name of the network for the error.

    Raises:
        ValueError: Names, order or shapes do not fit.
    """
    own = network.state_dict()
    if not own.keys() <= state.keys():
        pairs = list(zip(own.items(), state.items(), strict=False))
        last_words = [(key.split(".")[-1], other.split(".")[-1]) for (key, _), (other, _) in pairs]
        fits = len(pairs) == len(own) and all(a == b for a, b in last_words)
        if not fits or any(value.shape != other.shape for (_, value), (_, other) in pairs):
            raise ValueError(f"Expected the weights of {name}, got a file with others, such as {list(state)[:3]}.")
        state = {key: other for (key, _), (_, other) in pairs}
    network.load_state_dict({key: state[key] for key in own})


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a file of weights by name, in the format of safetensors or of torch, without running code from it.

    Raises:
        FileNotFoundError: The file is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a file of weights, got {path}, which is not there.")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return cast(dict[str, Tensor], load_file(path))
    state: Any = torch.load(path, map_location="cpu", weights_only=True)
    return cast(dict[str, Tensor], state.get("state_dict", state))


def weights_error(name: str, error: Exception, advice: str) -> OSError:
    """Make the error for weights that could not be downloaded.

    Args:
        name: Name of the network.
        error: Error of the library that tried.
        advice: Sentence that names the settings by which the user gets around it.
    """
    first_line = str(error).partition("\n")[0]
    text = (
        f"The weights of the backbone {name!r} could not be loaded ({type(error).__name__}: {first_line}). They are "
        f"downloaded at first use, so run once with a network. {advice}"
    )
    return OSError(text.rstrip())


def _lite0_file() -> Path:
    data = LITE0.replace("_", "-")
    return fetch.get(data) / fetch.describe(data).files[0]
