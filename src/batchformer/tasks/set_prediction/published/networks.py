"""Models of transformers from published checkpoints alone, whose tensors tell all sizes.

::

    published = build_published("detr-r50.pth")
    published.model.save_pretrained("detr-r50")       # later: DetrForObjectDetection.from_pretrained("detr-r50")
"""

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from .checkpoints import Kind, Report, convert_checkpoint, published_kind, published_weights, read_published

_CLASSES = {
    "detr": ("DetrConfig", "DetrForObjectDetection"),
    "conditional_detr": ("ConditionalDetrConfig", "ConditionalDetrForObjectDetection"),
    "deformable_detr": ("DeformableDetrConfig", "DeformableDetrForObjectDetection"),
}


class Published(NamedTuple):
    """A published checkpoint as a model of transformers.

    Attributes:
        model: Plain detector with the weights of the checkpoint, in ``eval()``.
        report: Report on the checkpoint.
        insertion: Arguments of :func:`batchformer.insert` that put BatchFormer where the checkpoint has it (after the
            first encoder layer where it does not say); ``load_published`` then loads its weights. ``None`` where the
            checkpoint has no BatchFormer.
    """

    model: nn.Module
    report: Report
    insertion: dict[str, Any] | None


def build_published(path: str | os.PathLike[str] | Mapping[str, Any]) -> Published:
    """Build the model of a checkpoint of the official code, and load the weights.

    Args:
        path: A ``.pth`` file of the official DETR, Conditional DETR or Deformable DETR code, with BatchFormer or
            without; or its content.

    Raises:
        ValueError: When the checkpoint is of another detector, or not complete.
        FileNotFoundError: When there is no such file.
        ImportError: When transformers is missing.

    Example:
        >>> import torch
        >>> build_published({"transformer.level_embed": torch.zeros(4, 8)})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: Expected a whole deformable_detr with a ResNet in the checkpoint, got none with 'transformer...'...
    """
    import transformers

    content = read_published(path)
    weights = published_weights(content)
    kind = published_kind(weights)
    config_class, model_class = _CLASSES[kind]
    if any(name.startswith("mask_head.") for name in weights):
        model_class = "DetrForSegmentation"
    try:
        settings = _settings(weights, kind, _arguments(content)) | _backbone(weights, model_class)
    except KeyError as error:
        raise ValueError(
            f"Expected a whole {kind} with a ResNet in the checkpoint, got none with {error}. Build the model with "
            "settings of your own and use load_published(model, path, strict=False)."
        ) from error
    config = getattr(transformers, config_class)(**settings)
    model: nn.Module = getattr(transformers, model_class)(config).eval()
    report = convert_checkpoint(content, model)
    if not report.complete:
        raise ValueError(f"Expected a checkpoint that fills {model_class} as its tensors describe it, got\n{report}")
    model.load_state_dict(report.state_dict, strict=False)
    return Published(model, report, _insertion(report, weights, "detr." if hasattr(model, "detr") else ""))


def _arguments(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the command line of the run that made the checkpoint; empty where it is not stored."""
    found = content.get("args")
    return dict(found) if isinstance(found, Mapping) else dict(vars(found)) if hasattr(found, "__dict__") else {}


def _settings(weights: Mapping[str, Tensor], kind: Kind, given: Mapping[str, Any]) -> dict[str, Any]:
    heads = int(given.get("nheads", 8))
    hidden = weights["transformer.encoder.layers.0.linear1.weight"]
    settings: dict[str, Any] = {
        "d_model": int(hidden.shape[1]),
        "encoder_layers": _count(weights, "transformer.encoder.layers."),
        "decoder_layers": _count(weights, "transformer.decoder.layers."),
        "encoder_ffn_dim": int(hidden.shape[0]),
        "decoder_ffn_dim": int(weights["transformer.decoder.layers.0.linear1.weight"].shape[0]),
        "encoder_attention_heads": heads,
        "decoder_attention_heads": heads,
        "dilation": bool(given.get("dilation", False)),
        # With True, DETR and Conditional DETR of transformers are other networks than the published ones.
        "auxiliary_loss": kind == "deformable_detr" and bool(given.get("aux_loss", True)),
    }
    classes = "class_embed.0.weight" if kind == "deformable_detr" else "class_embed.weight"
    settings["num_labels"] = int(weights[classes].shape[0]) - (kind == "detr")  # DETR has one more, for no object
    queries = weights.get("query_embed.weight")
    settings["num_queries"] = int(given.get("num_queries", 300)) if queries is None else int(queries.shape[0])
    if kind == "deformable_detr":
        levels = int(weights["transformer.level_embed"].shape[0])
        settings |= {
            "num_feature_levels": levels,
            "two_stage_num_proposals": settings["num_queries"],
            "encoder_n_points": _points(weights, "encoder.layers.0.self_attn", heads * levels),
            "decoder_n_points": _points(weights, "decoder.layers.0.cross_attn", heads * levels),
            "two_stage": "transformer.enc_output.weight" in weights,
            "with_box_refine": any(name.startswith("transformer.decoder.bbox_embed.") for name in weights),
        }
    return settings


def _points(weights: Mapping[str, Tensor], attention: str, per_point: int) -> int:
    return int(weights[f"transformer.{attention}.attention_weights.weight"].shape[0]) // per_point


def _backbone(weights: Mapping[str, Tensor], model: str) -> dict[str, Any]:
    from transformers import ResNetConfig

    body = {n.removeprefix("backbone.0.body."): v for n, v in weights.items() if n.startswith("backbone.0.body.")}
    stages = [f"layer{number}." for number in (1, 2, 3, 4)]
    # Number of maps that are read: all for masks, one for each projection without a stride, or the last.
    projections = (
        value.shape[-1] for name, value in weights.items() if re.fullmatch(r"input_proj\.\d\.0\.weight", name)
    )
    maps = 4 if model == "DetrForSegmentation" else sum(side == 1 for side in projections) or 1
    last = "conv3.weight" if "layer1.0.conv3.weight" in body else "conv2.weight"
    resnet = ResNetConfig(
        embedding_size=int(body["conv1.weight"].shape[0]),
        hidden_sizes=[int(body[f"{stage}0.{last}"].shape[0]) for stage in stages],
        depths=[_count(body, stage) for stage in stages],
        layer_type="bottleneck" if last == "conv3.weight" else "basic",
        out_features=[f"stage{5 - maps + number}" for number in range(maps)],
    )
    return {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None, "backbone_config": resnet}


def _count(names: Iterable[str], prefix: str) -> int:
    """Count the numbers from 0 that follow a prefix."""
    return 1 + max(int(name.removeprefix(prefix).partition(".")[0]) for name in names if name.startswith(prefix))


def _insertion(report: Report, weights: Mapping[str, Tensor], inside: str) -> dict[str, Any] | None:
    if report.batchformer == "none":
        return None
    hidden, width = next(v.shape for n, v in weights.items() if ".bf." in n and n.endswith("linear1.weight"))
    numbers = [int(match[1]) for name in weights if (match := re.search(r"\.bf\.(?:\d+\.)?layers\.(\d+)\.", name))]
    return {
        "after": [f"{inside}model.encoder.layers.{number}" for number in report.inserted_at or (0,)],
        "mlp_ratio": hidden / width,
        "layers": 1 + max(numbers, default=0),
        "share": not any(name.startswith("transformer.encoder.bf.") for name in weights),
        "padding": "attend",  # as the published code does
    }
