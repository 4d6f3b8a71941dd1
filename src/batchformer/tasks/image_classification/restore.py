"""The way from a run back to an image classifier, for prediction and for use elsewhere."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from batchformer.data.transforms import evaluation_rule
from batchformer.tasks.training.checkpoint import DataFacts
from batchformer.tasks.training.contract import Exportable


@dataclass(frozen=True)
class ImageFacts(DataFacts):
    """Facts about image data that a trained classifier needs, and its users with it.

    Attributes:
        in_channels: 3 for colour, 1 for grey.
        image_size: Height and width in pixels.
        mean: Mean of each channel, of pixels in 0..1.
        std: Standard deviation of each channel, of pixels in 0..1.
    """

    in_channels: int
    image_size: int
    mean: list[float]
    std: list[float]


def exportable_classifier(
    network: nn.Module, forward: nn.Module, facts: ImageFacts, more: dict[str, Any], *, onnx_refusal: str | None = None
) -> Exportable:
    """Describe a classifier for safetensors, ONNX and ``model.json``.

    Args:
        network: The plain network, whose state dict safetensors gets.
        forward: Module from images (N, C, H, W) to logits (N, K), which ONNX gets.
        facts: Facts about the data that it was trained on.
        more: Further content of ``model.json``, such as the settings that build the network again.
        onnx_refusal: Message for the user that says why there can be no ONNX file; ``None`` where there can.
    """
    return Exportable(
        network.eval(),
        forward.eval(),
        inputs=(torch.zeros(2, facts.in_channels, facts.image_size, facts.image_size),),
        input_names=("images",),
        output_names=("logits",),
        facts={
            **more,
            **asdict(facts),
            **evaluation_rule(facts.image_size),
            "input": "(image / 255 - mean) / std",
        },
        onnx_refusal=onnx_refusal,
    )


def load_exported(folder: str | Path, build: Callable[[dict[str, Any]], nn.Module]) -> nn.Module:
    """Load a network that ``batchformer export`` wrote, with its weights.

    Args:
        folder: Folder with ``model.safetensors`` and ``model.json``.
        build: Function from the content of ``model.json`` to the network without its weights.

    Returns:
        The network in ``eval()``.

    Raises:
        FileNotFoundError: When one of the files is not there.
        ImportError: When safetensors is missing.
    """
    files = [Path(folder) / name for name in ("model.json", "model.safetensors")]
    if absent := [str(path) for path in files if not path.is_file()]:
        raise FileNotFoundError(
            f"Expected {' and '.join(absent)}, but there is none. batchformer export RUN writes it."
        )
    try:
        from safetensors.torch import load_model
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install 'batchformer[export]'") from error
    network = build(json.loads(files[0].read_text(encoding="utf-8")))
    load_model(network, files[1])
    return network.eval()
