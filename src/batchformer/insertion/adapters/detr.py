"""Detectors of transformers, versions 4.57 to 5, and whatever is built like them (SMCA of this project).

``insert(model, after="model.encoder.layers.0")``, or several layers of the encoder. The images, their masks and the
labels are doubled at the top of the model, so that all it derives from them (positions, reference points, valid ratios,
queries, matched targets) is there for both streams without further ado. What lies in front of the first point works
once: its named inputs are halved and its outputs repeated. Always by name, never by the number of rows: the
``spatial_shapes`` of four feature levels have four rows, and so may the batch.

- ``DetrForObjectDetection``, ``ConditionalDetrForObjectDetection`` and ``DabDetrForObjectDetection``: one feature map;
  the layers get a mask of all pairs of tokens (additive in 4.57, boolean or none at all in 5).
- ``DetrForSegmentation``: the layers are ``detr.model.encoder.layers.*``. The mask head reads the projected map, the
  backbone's maps and the memory with the rows that ``pixel_values`` has: all of them are doubled.
- ``DeformableDetrForObjectDetection``: several feature maps in one sequence with their reference points; ``two_stage``
  makes its queries from the memory of both streams.
- ``RTDetrForObjectDetection`` and its V2: transformer layers on the smallest map only, without any mask: padding takes
  part, as it does in the layers' own attention. They are ``model.encoder.aifi.0.layers.0`` (4.57:
  ``model.encoder.encoder.0.layers.0``). The denoising queries are made from the doubled labels. The batch norms of its
  pyramid, behind the point, see both streams.
- ``Mask2FormerForUniversalSegmentation``: ``model.pixel_level_module.decoder.encoder.layers.0``; no mask either.
- A token is padding where the layer's own attention does not look (``padding="mask"``). It has the same features in
  both streams after the first point; the later layers treat it as they always do.
- D-FINE and Table Transformer are built like RT-DETR and DETR. Grounding DINO, OneFormer and others whose layers or
  inputs carry more than images are refused, as are LW-DETR and RF-DETR, which have no encoder.
- ``encoder_outputs`` bypass the encoder, so training with them does not work. With ``output_hidden_states`` the states
  from before the point come repeated.
- Not the plug-in's doing, but a trap: transformers freezes *every* weight of its own ResNet as a backbone of the DETR
  family (it looks for ``stage.1`` in names that read ``stages.1``), and its batch norms are constants.
  ``model.model.backbone.requires_grad_(True)`` trains the weights.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from batchformer.insertion.hooks import input_names
from batchformer.insertion.plan import Once, Place, Plan

# Inputs with one row for each image, and inputs without: of the model, and of a layer of its encoder.
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
# Outputs with layers or queries first; where the encoder's layers take no reference points, these too.
_LAYERED = ("auxiliary_outputs", "auxiliary_logits", "transformer_decoder_hidden_states")
_LAYERED_IN_DETR = ("intermediate_hidden_states", "reference_points")
# Detector, stack of layers inside it, number. RT-DETR: `encoder.aifi` in 5, `encoder.encoder` in 4.57.
_LAYER = re.compile(r"(?:(.*?)\.)?(encoder|encoder\.(?:aifi|encoder)\.\d+|decoder\.encoder)\.layers\.(\d+)")
_PROJECTION = re.compile(r"(encoder_)?input_proj(ections?)?|adapter_\d+")


def is_detector(model: nn.Module) -> bool:
    """Whether a part of the model holds a backbone, an encoder and a decoder, or the model's name says so."""
    return "Detr" in type(model).__name__ or any(_parts(module) for module in model.modules())


def plan(model: nn.Module, places: tuple[Place, ...]) -> Plan:
    """What is doubled at the top, and what works once for both streams up to the first place.

    Raises:
        ValueError: For places other than behind layers of the encoder, and for models with inputs of which it is not
            known whether they have one row for each image.
    """
    layers = {name: match for name, _ in model.named_modules() if (match := _match_layer(model, name))}
    wrong = [str(place) for place in places if place.where == "before" or place.name not in layers]
    if wrong:
        raise ValueError(
            f"Expected places behind layers of the encoder of {type(model).__name__}, got {', '.join(wrong)}. "
            + (f"Take after= with some of {[*layers][:6]}." if layers else "It has no encoder that this works for.")
        )
    body, stack, _ = layers[places[0].name].groups()
    parts = _parts(model.get_submodule(body or ""))
    assert parts is not None
    names = {id(module): name for name, module in model.named_modules()}
    once = [Once(names[id(parts[0])], ("pixel_values", "pixel_mask"))]
    once += [Once(names[id(module)], input_names(module)[:1]) for module in _projections(parts[1])]
    for first in _first_of_each_stack([place.name for place in places]):
        once += _layers_up_to(model, first)
    return Plan(
        places,
        companions={"": _rows_of(model, _MODEL_ROWS, _MODEL_OTHERS)},
        once=tuple(once),
        padding=padding_of if stack == "encoder" else None,
        layered=_LAYERED
        + (_LAYERED_IN_DETR if stack == "encoder" and "reference_points" not in once[-1].inputs else ()),
    )


def padding_of(inputs: Mapping[str, Any]) -> Tensor | None:
    """Which tokens the attention of an encoder layer does not see, whatever form its mask has.

    Args:
        inputs: Of the layer, by name. ``attention_mask`` is ``None``; (B, S), not zero where a token is real; or (B or
            1, 1, S or 1, S), boolean and true where a token is real, or additive and zero where a token is real.

    Returns:
        Boolean (B, S), true = padding; ``None`` where there is none.

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
            f"Expected an attention mask (B, S) or (B, 1, S, S), got {form}. Take attn_implementation='sdpa' or "
            "'eager', or let padding take part with insert(..., padding='attend')."
        )
    if mask.dim() == 4:
        # The same for every head and every query.
        additive, mask = mask.is_floating_point(), mask[:, 0, 0]
        padding = mask != 0 if additive else mask == 0
    else:
        padding = mask == 0
    return padding.expand(hidden.shape[:2])


def _parts(body: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The backbone of a detector, and what holds the projections of its maps; ``None`` for other modules."""
    children = dict(body.named_children())
    if {"backbone", "encoder", "decoder"} <= children.keys():
        return children["backbone"], body
    if {"encoder", "decoder"} <= children.keys() and hasattr(children["decoder"], "input_projections"):
        return children["encoder"], children["decoder"]  # the pixel-level module of Mask2Former
    return None


def _match_layer(model: nn.Module, name: str) -> re.Match[str] | None:
    match = _LAYER.fullmatch(name)
    return match if match and _parts(model.get_submodule(match[1] or "")) else None


def _projections(holder: nn.Module) -> Iterator[nn.Module]:
    for name, child in holder.named_children():
        if _PROJECTION.fullmatch(name):
            yield from child if isinstance(child, nn.ModuleList) else [child]


def _first_of_each_stack(names: list[str]) -> list[str]:
    """Of layers in the order of the model, the first in each list of layers."""
    return [*{name.rpartition(".")[0]: name for name in reversed(names)}.values()]


def _layers_up_to(model: nn.Module, last: str) -> list[Once]:
    stack, _, index = last.rpartition(".")
    names = [f"{stack}.{i}" for i in range(int(index) + 1)]
    rows = [_rows_of(model.get_submodule(name), _LAYER_ROWS, _LAYER_OTHERS) for name in names]
    return [Once(name, rows[i], behind=tuple(names[:i]), rerun=True) for i, name in enumerate(names)]


def _rows_of(module: nn.Module, rows: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    inputs = input_names(module)
    if unknown := [name for name in inputs if name not in rows + others]:
        raise ValueError(
            f"Expected a detector that takes images alone, but of the inputs {unknown} of {type(module).__name__} it "
            "is not known whether they have a row for each image. BatchFormer cannot go into this kind of model."
        )
    return tuple(name for name in inputs if name in rows)
