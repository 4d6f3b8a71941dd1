"""Detectors of transformers, versions 4.57 to 5, and detectors that are built like them (SMCA of this project).

The call is ``insert(model, after="model.encoder.layers.0")``, or with several layers of the encoder. The images, their
masks and the labels are doubled at the top of the model, so that everything derived from them (positions, reference
points, valid ratios, queries, matched targets) exists for both streams. The modules before the first point run once:
their named inputs are halved and their outputs repeated. Inputs are chosen by name, never by the number of rows: the
``spatial_shapes`` of four feature levels have four rows, and so may the batch.

- ``DetrForObjectDetection``, ``ConditionalDetrForObjectDetection`` and ``DabDetrForObjectDetection`` have one feature
  map; their layers get a mask of all pairs of tokens (additive in 4.57, boolean or none at all in 5).
- In ``DetrForSegmentation`` the layers are ``detr.model.encoder.layers.*``. The mask head reads the projected map, the
  backbone's maps and the memory with the rows that ``pixel_values`` has: all of them are doubled.
- ``DeformableDetrForObjectDetection`` has several feature maps in one sequence with their reference points; with
  ``two_stage`` it makes its queries from the memory of both streams.
- ``RTDetrForObjectDetection`` and its V2 have transformer layers on the smallest map only, without any mask: padding
  takes part, as it does in the layers' own attention. The layers are ``model.encoder.aifi.0.layers.0`` (4.57:
  ``model.encoder.encoder.0.layers.0``). The denoising queries are made from the doubled labels. The batch norms of its
  pyramid, after the point, see both streams.
- ``Mask2FormerForUniversalSegmentation``: ``model.pixel_level_module.decoder.encoder.layers.0``; no mask either.
- A token is padding if the layer's own attention does not look at it (``padding="mask"``). Its features are equal in
  both streams after the first point; the later layers treat it as they always do.
- D-FINE and Table Transformer are built like RT-DETR and DETR. Grounding DINO, OneFormer and others whose layers or
  inputs carry more than images are refused, as are LW-DETR and RF-DETR, which have no encoder.
- ``encoder_outputs`` bypass the encoder, so training with them does not work. With ``output_hidden_states`` the states
  from before the point are repeated.
- Known issue in transformers (not caused by BatchFormer): it freezes *every* weight of its own ResNet as a backbone of
  the DETR family, because it looks for ``stage.1`` in names that read ``stages.1``, and its batch norms are constants.
  ``model.model.backbone.requires_grad_(True)`` trains the weights.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from batchformer.insertion.hooks import input_names
from batchformer.insertion.plan import InsertionPlan, InsertionPoint, RunOnce

# Inputs of the model, and of a layer of its encoder, that have one row for each image, and others.
_MODEL_ROWS = (
    *("pixel_values", "pixel_mask", "labels", "mask_labels", "class_labels"),
    *("inputs_embeds", "decoder_inputs_embeds", "decoder_attention_mask"),
)
_MODEL_OTHERS = (
    *("encoder_outputs", "return_dict", "output_attentions", "output_hidden_states", "output_auxiliary_logits"),
    "kwargs",
)
_LAYER_ROWS = (
    *("hidden_states", "attention_mask", "reference_points"),
    *("spatial_position_embeddings", "position_embeddings", "object_queries"),
)
_LAYER_OTHERS = ("spatial_shapes", "spatial_shapes_list", "level_start_index", "output_attentions", "kwargs")
# Outputs with layers or queries as the first axis; two more in models whose encoder takes no reference points.
_LAYERED = ("auxiliary_outputs", "auxiliary_logits", "transformer_decoder_hidden_states")
_LAYERED_IN_DETR = ("intermediate_hidden_states", "reference_points")
# Detector, stack of layers inside it, number. RT-DETR: `encoder.aifi` in 5, `encoder.encoder` in 4.57.
_LAYER = re.compile(r"(?:(.*?)\.)?(encoder|encoder\.(?:aifi|encoder)\.\d+|decoder\.encoder)\.layers\.(\d+)")
_PROJECTION = re.compile(r"(encoder_)?input_proj(ections?)?|adapter_\d+")


def is_detector(model: nn.Module) -> bool:
    """Tell whether a part of the model holds a backbone, an encoder and a decoder, or the model's name says so."""
    return "Detr" in type(model).__name__ or any(_backbone_and_projections(module) for module in model.modules())


def plan(model: nn.Module, points: tuple[InsertionPoint, ...]) -> InsertionPlan:
    """Plan the inputs that are doubled at the top, and the modules that run once for both streams before the points.

    Raises:
        ValueError: For points other than after layers of the encoder, and for models with inputs that this adapter
            does not know, so that it cannot tell whether they have one row for each image.
    """
    layers = {name: match for name, _ in model.named_modules() if (match := _match_layer(model, name))}
    wrong = [str(point) for point in points if point.where == "before" or point.name not in layers]
    if wrong:
        raise ValueError(
            f"Expected points after layers of the encoder of {type(model).__name__}, got {', '.join(wrong)}. "
            + (f"Pass after= with some of {[*layers][:6]}." if layers else "It has no encoder that this works for.")
        )
    body, stack, _ = layers[points[0].name].groups()
    parts = _backbone_and_projections(model.get_submodule(body or ""))
    assert parts is not None
    names = {id(module): name for name, module in model.named_modules()}
    once = [RunOnce(names[id(parts[0])], ("pixel_values", "pixel_mask"))]
    once += [RunOnce(names[id(module)], input_names(module)[:1]) for module in _projections(parts[1])]
    for first in _first_of_each_stack([point.name for point in points]):
        once += _layers_up_to(model, first)
    return InsertionPlan(
        points,
        doubled_inputs={"": _inputs_with_rows(model, _MODEL_ROWS, _MODEL_OTHERS)},
        run_once=tuple(once),
        padding=padding_of if stack == "encoder" else None,
        layered=_LAYERED
        + (_LAYERED_IN_DETR if stack == "encoder" and "reference_points" not in once[-1].inputs else ()),
    )


def padding_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """Find the tokens that the attention of an encoder layer does not see, from any form of its mask.

    Args:
        inputs: Inputs of the layer, by name. ``attention_mask`` is ``None``; (B, S), not zero where a token is real; or
            (B or 1, 1, S or 1, S), boolean and true where a token is real, or additive and zero where a token is real.

    Returns:
        Boolean (B, S), true = padding; ``None`` without padding.

    Raises:
        TypeError: For another form.

    Example:
        >>> import torch
        >>> hidden, additive = torch.zeros(2, 3, 8), torch.zeros(2, 1, 3, 3)
        >>> additive[1, :, :, 2] = torch.finfo(additive.dtype).min
        >>> padding_of({"hidden_states": hidden, "attention_mask": additive}).tolist()
        [[False, False, False], [False, False, True]]
    """
    mask, hidden = inputs.get("attention_mask"), inputs["hidden_states"]
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        form = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"Expected an attention mask (B, S) or (B, 1, S, S), got {form}. Use attn_implementation='sdpa' or "
            "'eager', or let padding take part with insert(..., padding='attend')."
        )
    if mask.dim() == 4:
        # The mask is equal for every head and every query.
        additive, mask = mask.is_floating_point(), mask[:, 0, 0]
        padding = mask != 0 if additive else mask == 0
    else:
        padding = mask == 0
    return padding.expand(hidden.shape[:2])


def _backbone_and_projections(body: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Find the backbone of a detector, and the module that holds the projections of its maps; ``None`` elsewhere."""
    children = dict(body.named_children())
    if {"backbone", "encoder", "decoder"} <= children.keys():
        return children["backbone"], body
    if {"encoder", "decoder"} <= children.keys() and hasattr(children["decoder"], "input_projections"):
        return children["encoder"], children["decoder"]  # the pixel-level module of Mask2Former
    return None


def _match_layer(model: nn.Module, name: str) -> re.Match[str] | None:
    match = _LAYER.fullmatch(name)
    return match if match and _backbone_and_projections(model.get_submodule(match[1] or "")) else None


def _projections(holder: nn.Module) -> Iterator[nn.Module]:
    for name, child in holder.named_children():
        if _PROJECTION.fullmatch(name):
            yield from child if isinstance(child, nn.ModuleList) else [child]


def _first_of_each_stack(names: list[str]) -> list[str]:
    """Choose the first layer in each list of layers; the names are in the order of the model."""
    return [*{name.rpartition(".")[0]: name for name in reversed(names)}.values()]


def _layers_up_to(model: nn.Module, last: str) -> list[RunOnce]:
    stack, _, index = last.rpartition(".")
    names = [f"{stack}.{i}" for i in range(int(index) + 1)]
    rows = [_inputs_with_rows(model.get_submodule(name), _LAYER_ROWS, _LAYER_OTHERS) for name in names]
    return [RunOnce(name, rows[i], upstream=tuple(names[:i]), rerun=True) for i, name in enumerate(names)]


def _inputs_with_rows(module: nn.Module, rows: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    inputs = input_names(module)
    if unknown := [name for name in inputs if name not in rows + others]:
        raise ValueError(
            f"Expected a detector that takes images alone, but {type(module).__name__} also has the inputs {unknown}, "
            "and it is not known whether they have a row for each image. BatchFormer cannot be inserted into this "
            "kind of model."
        )
    return tuple(name for name in inputs if name in rows)
