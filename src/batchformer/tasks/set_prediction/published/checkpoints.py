"""Checkpoints of the official DETR, Conditional DETR and Deformable DETR code, with and without BatchFormer inside.

::

    model = DetrForObjectDetection(DetrConfig(num_labels=91, ...))
    insert(model, after="model.encoder.layers.0")          # without this line the plain network is loaded
    print(load_published(model, "checkpoint.pth"))

- The names of tensors differ between transformers 4.57 and 5; those of the model itself decide. Its backbone may be a
  ResNet of timm or of transformers.
- Official attention holds queries, keys and values in one matrix, attention of transformers in three; the inserted
  layer keeps one.
- DETR and Conditional DETR number the norms of a decoder layer in the order self-attention, cross-attention,
  feed-forward; Deformable DETR numbers cross-attention before self-attention.
- The published BatchFormer code holds a shared layer as ``transformer.bf``, and layers of their own for each encoder
  layer as ``transformer.bf.<i>`` and again as ``transformer.encoder.bf.<i>``. ``--bt_num_layers`` adds ``layers.<n>``
  to the names. The points of insertion are in the ``args`` of the file, not in the names.
- With ``auxiliary_loss=True`` in the configuration, DETR and Conditional DETR of transformers normalise the state
  between the layers of the decoder, which the official networks do not: set it to ``False``; or, to train with the loss
  of all layers, call ``batchformer.tasks.set_prediction.decoder_norm.normalize_copies(model)``. The report says so.
- In panoptic checkpoints the detector's names begin with ``detr.``. The checkpoint of a detector also loads into the
  detector inside ``DetrForSegmentation`` (second stage of training), with ``strict=False``: the mask head is missing.
"""

import argparse
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchformer.core.modules import BatchFormer
from batchformer.insertion.hooks import hooks_in

Kind = Literal["detr", "conditional_detr", "deformable_detr"]
Status = Literal["loaded", "left out", "new", "none"]

# Key that only this kind has, without the prefix of panoptic checkpoints.
_SIGNS: dict[Kind, str] = {
    "deformable_detr": "transformer.level_embed",
    "conditional_detr": "transformer.decoder.ref_point_head.layers.0.weight",
    "detr": "transformer.decoder.layers.0.multihead_attn.in_proj_weight",
}
_ENCODER_NORMS = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm"}
_DECODER_NORMS = {"norm1": "self_attn_layer_norm", "norm2": "encoder_attn_layer_norm", "norm3": "final_layer_norm"}
_DEFORMABLE_NORMS = {"norm1": "encoder_attn_layer_norm", "norm2": "self_attn_layer_norm", "norm3": "final_layer_norm"}
_NOTE = (
    "With auxiliary_loss=True the decoder differs from the published one: set model.config.auxiliary_loss = False, "
    "or keep it and call batchformer.tasks.set_prediction.decoder_norm.normalize_copies(model)."
)
_COUNTER = "num_batches_tracked"  # of batch norms that are constants in both
_LAYER = re.compile(r"transformer\.(encoder|decoder)\.layers\.(\d+)\.(\w+)\.(.+)")
_BATCHFORMER = re.compile(r"transformer\.(?:encoder\.)?bf\.(?:(\d+)\.)?(?:layers\.(\d+)\.)?(.+)")
_BLOCK = re.compile(r"layer(\d)\.(\d+)\.(conv|bn|downsample\.)(\d)\.(\w+)")
# Projections of Conditional DETR: outside the attention in the official code and in 4.57, inside it in 5.
_CONDITIONAL = re.compile(r"(sa|ca)_([qkv])(content|pos_sine|pos)?_proj")
# Official names -> those of transformers 5, outside of layers and backbone; the mask head is that of 4.57.
_NAMES = (
    (r"transformer\.decoder\.norm\.", "decoder.layernorm."),
    (r"transformer\.", ""),
    (r"query_embed\.", "query_position_embeddings."),
)
_HEADS = (
    (r"input_proj\.", "input_projection."),
    (r"class_embed\.", "class_labels_classifier."),
    (r"bbox_embed\.", "bbox_predictor."),
)
_MASK_HEAD = {
    **{f"lay{i}": f"conv{i}.conv" for i in (1, 2)},
    **{f"gn{i}": f"conv{i}.norm" for i in (1, 2)},
    **{f"adapter{i}": f"fpn_stages.{i - 1}.fpn_adapter" for i in (1, 2, 3)},
    **{f"lay{i}": f"fpn_stages.{i - 3}.refine.conv" for i in (3, 4, 5)},
    **{f"gn{i}": f"fpn_stages.{i - 3}.refine.norm" for i in (3, 4, 5)},
    "out_lay": "output_conv",
    "q_linear": "q_proj",
    "k_linear": "k_proj",
}


@dataclass(frozen=True)
class Report:
    """Report on a published checkpoint and a model; ``print`` shows it.

    Attributes:
        kind: Official code that the checkpoint comes from.
        state_dict: Tensors that fit, under the names of the model; queries, keys and values are separate.
        missing: Names of the model that the checkpoint does not have.
        unexpected: Names of the checkpoint that the model does not have.
        mismatched: Name of the model -> shapes (in the checkpoint, in the model).
        batchformer: ``"loaded"``: both have BatchFormer. ``"left out"``: the checkpoint has it, the model does not.
            ``"new"``: the model has it and keeps its own weights. ``"none"``: neither has it.
        inserted_at: Numbers of the encoder layers after which the checkpoint had BatchFormer, as far as it says so.
        note: Further remark; empty where there is none.
    """

    kind: Kind
    state_dict: dict[str, Tensor]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    batchformer: Status
    inserted_at: tuple[int, ...]
    note: str = ""

    @property
    def complete(self) -> bool:
        """True if the checkpoint has exactly the tensors of the model; BatchFormer may be in one of them alone."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        at = f" (after encoder layers {', '.join(map(str, self.inserted_at))})" if self.inserted_at else ""
        lines = [f"{self.kind}: {len(self.state_dict)} tensors; BatchFormer: {self.batchformer}{at}"]
        for word, names in (("missing", self.missing), ("unexpected", self.unexpected)):
            if names:
                more = f" and {len(names) - 6} more" if len(names) > 6 else ""
                lines.append(f"{word}: {', '.join(names[:6])}{more}")
        lines += [
            f"shape of {name}: {got} in the checkpoint, {own} here" for name, (got, own) in self.mismatched.items()
        ]
        return "\n".join(lines + [self.note] * bool(self.note))


def load_published(
    model: nn.Module, path: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = True
) -> Report:
    """Load a checkpoint of the official code into a model of transformers, in place.

    Args:
        model: ``DetrForObjectDetection``, ``DetrForSegmentation``, ``ConditionalDetrForObjectDetection`` or
            ``DeformableDetrForObjectDetection``, with or without BatchFormer.
        path: A ``.pth`` file, read as weights alone, or its content.
        strict: Raise, and load nothing, when the checkpoint is not complete for the model.

    Returns:
        The report; :attr:`Report.complete` is False when anything but BatchFormer is missing or left over.

    Raises:
        ValueError: See ``strict`` and :func:`convert_checkpoint`.
        FileNotFoundError: When there is no such file.

    Example:
        >>> published = {"transformer.level_embed": torch.zeros(4, 8)}
        >>> print(load_published(nn.Linear(2, 2), published, strict=False))
        deformable_detr: 0 tensors; BatchFormer: none
        missing: weight, bias
        unexpected: transformer.level_embed
    """
    report = convert_checkpoint(path, model)
    if strict and not report.complete:
        raise ValueError(
            f"Expected a checkpoint for this {type(model).__name__}, got\n{report}\nBuild the model with the settings "
            "of the checkpoint (num_labels, num_queries, two_stage, ...), or load what fits with strict=False."
        )
    model.load_state_dict(report.state_dict, strict=False)
    return report


def convert_checkpoint(checkpoint: str | os.PathLike[str] | Mapping[str, Any], model: nn.Module) -> Report:
    """Rename a checkpoint of the official code for a model of transformers; the model stays as it is.

    Args:
        checkpoint: A ``.pth`` file, read as weights alone, or its content: a state dict, or a dict with one under
            ``"model"`` (and the settings of the run under ``"args"``).
        model: Model as for :func:`load_published`.

    Raises:
        ValueError: When the checkpoint is of none of the three detectors, or the file is damaged or holds more than
            tensors and settings.
        FileNotFoundError: When there is no such file.

    Example:
        >>> convert_checkpoint({"fc.weight": torch.zeros(2, 2)}, nn.Linear(2, 2))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: Expected a checkpoint of the official DETR, ..., got keys like ['fc.weight']. ...
    """
    content = read_published(checkpoint)
    weights = published_weights(content)
    kind = published_kind(weights)
    own = model.state_dict()
    found, unexpected = _find_places(weights, kind, own)
    modules, groups = _batchformers(model), _batchformer_layers(weights)
    unexpected += _fill_batchformers(modules, groups, found)
    unexpected += [name for name in found if name not in own]
    found = {name: value for name, value in found.items() if name in own}
    shapes = {name: (tuple(value.shape), tuple(own[name].shape)) for name, value in found.items()}
    mismatched = {name: pair for name, pair in shapes.items() if pair[0] != pair[1]}
    fresh = () if groups else tuple(f"{name}." for name in modules)
    differs = kind != "deformable_detr" and getattr(getattr(model, "config", None), "auxiliary_loss", False)
    status: Status = "none"
    if groups:
        status = "loaded" if modules else "left out"
    elif modules:
        status = "new"
    return Report(
        kind,
        state_dict={name: value for name, value in found.items() if name not in mismatched},
        missing=tuple(n for n in own if n not in found and not n.startswith(fresh) and not n.endswith(_COUNTER)),
        unexpected=tuple(dict.fromkeys(unexpected)),
        mismatched=mismatched,
        batchformer=status,
        inserted_at=_inserted_at(content, groups),
        note=_NOTE if differs else "",
    )


def published_kind(keys: Iterable[str]) -> Kind:
    """Return the detector that a state dict of the official code belongs to.

    Raises:
        ValueError: When it belongs to none of the three.

    Example:
        >>> published_kind(["transformer.level_embed", "query_embed.weight"])
        'deformable_detr'
    """
    present = {key.removeprefix("module.").removeprefix("detr.") for key in keys}
    for kind, sign in _SIGNS.items():
        if sign in present:
            return kind
    raise ValueError(
        "Expected a checkpoint of the official DETR, Conditional DETR or Deformable DETR code, got keys like "
        f"{sorted(present)[:4]}. A model that transformers has saved loads with from_pretrained()."
    )


def read_published(path: str | os.PathLike[str] | Mapping[str, Any]) -> Mapping[str, Any]:
    """Read the content of a ``.pth`` file of the official code, weights-only; a mapping is returned as it is.

    Raises:
        ValueError: When the file is no checkpoint, is damaged, or holds Python objects.
        FileNotFoundError: When there is no such file.
    """
    if isinstance(path, Mapping):
        return path
    try:
        # The official code saves its command line beside the weights: a plain namespace.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"Expected a checkpoint of tensors and settings, but {os.fspath(path)!r} is none, or holds Python objects, "
            "which could run any code when loaded. Save its state dict alone where you trust it: "
            "torch.save({'model': content['model']}, ...)."
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises many kinds of errors, depending on the first damaged byte
        raise ValueError(
            f"Expected a whole file of torch.save(), but {os.fspath(path)!r} cannot be read "
            f"({type(error).__name__}: {error}). It may be damaged or cut off: compare its size with the source's, or "
            "download it again."
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"Expected a state dict in {os.fspath(path)!r}, got {type(content).__name__}.")
    return content


def published_weights(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of an official checkpoint, without the prefixes of wrappers.

    Example:
        >>> list(published_weights({"model": {"module.fc.weight": torch.zeros(2, 2)}, "epoch": 3}))
        ['fc.weight']
    """
    weights = content.get("model", content)
    return {
        key.removeprefix("module.").removeprefix("detr."): value
        for key, value in weights.items()
        if isinstance(value, Tensor) and not key.endswith(_COUNTER)
    }


def _find_places(
    weights: Mapping[str, Tensor], kind: Kind, own: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Return all tensors but BatchFormer's under the names of the model, and the keys that have no such name."""
    inside = "detr." if any(name.startswith("detr.") for name in own) else ""
    body = "model." if any(name.startswith(f"{inside}model.") for name in own) else ""
    found: dict[str, Tensor] = {}
    unexpected = []
    for key, value in weights.items():
        for names, part in [] if _BATCHFORMER.fullmatch(key) else _renamed(key, kind, value):
            placed = (_placed(name, inside, body) for name in names)
            if (name := next((name for name in placed if name in own), None)) is not None:
                found[name] = part
            else:
                unexpected.append(key)
    return found, unexpected


def _renamed(key: str, kind: Kind, value: Tensor) -> list[tuple[tuple[str, ...], Tensor]]:
    """Split a tensor into parts, each with the names that it may have in transformers 5 and 4.57."""
    if key.startswith("backbone.0.body."):
        inner = key.removeprefix("backbone.0.body.")
        holders = ("backbone.model.", "backbone.conv_encoder.model.")
        return [(tuple(holder + name for holder in holders for name in (inner, _resnet_name(inner))), value)]
    if match := _LAYER.fullmatch(key):
        side, number, part, leaf = match.groups()
        return _renamed_in_layer(f"{side}.layers.{number}", part, leaf, kind, value)
    head, _, name = key.partition(".")
    if head in ("mask_head", "bbox_attention"):
        part, _, leaf = name.partition(".")
        return [((f"{head}.{_MASK_HEAD.get(part, part)}.{leaf}", key), value)]
    for pattern, new in _NAMES if kind == "deformable_detr" else _NAMES + _HEADS:
        key = re.sub(f"^{pattern}", new, key)
    return [((key,), value)]


def _renamed_in_layer(
    layer: str, part: str, leaf: str, kind: Kind, value: Tensor
) -> list[tuple[tuple[str, ...], Tensor]]:
    norms = _DEFORMABLE_NORMS if kind == "deformable_detr" else _DECODER_NORMS
    norms = _ENCODER_NORMS if layer.startswith("encoder") else norms
    names: tuple[str, ...] = (f"{part}.{leaf}",)
    if part in norms:
        names = (f"{norms[part]}.{leaf}",)
    elif part in ("linear1", "linear2"):
        names = (f"mlp.fc{part[-1]}.{leaf}", f"fc{part[-1]}.{leaf}")
    elif match := _CONDITIONAL.fullmatch(part):
        where, letter, what = match.groups()
        attention = "self_attn" if where == "sa" else "encoder_attn"
        names = (f"{attention}.{letter}_{what + '_' if what else ''}proj.{leaf}", f"{part}.{leaf}")
    elif part in ("self_attn", "multihead_attn", "cross_attn"):
        attention = "self_attn" if part == "self_attn" else "encoder_attn"
        if leaf.startswith("in_proj_"):
            names = tuple(f"{layer}.{attention}.{letter}_proj.{leaf.removeprefix('in_proj_')}" for letter in "qkv")
            return [((name,), third) for name, third in zip(names, value.chunk(3), strict=True)]
        names = (f"{attention}.{leaf.replace('out_proj.', 'o_proj.')}", f"{attention}.{leaf}")
    return [(tuple(f"{layer}.{name}" for name in names), value)]


def _resnet_name(name: str) -> str:
    """Translate the name of a ResNet's tensor from torchvision and timm to transformers."""
    if match := _BLOCK.fullmatch(name):
        stage, block, what, number, leaf = match.groups()
        place = "shortcut" if what == "downsample." else f"layer.{int(number) - 1}"
        convolution = what == "conv" or (what == "downsample." and number == "0")
        layer = f"encoder.stages.{int(stage) - 1}.layers.{block}.{place}"
        return f"{layer}.{'convolution' if convolution else 'normalization'}.{leaf}"
    stem = {"conv1": "convolution", "bn1": "normalization"}
    part, _, leaf = name.partition(".")
    return f"embedder.embedder.{stem.get(part, part)}.{leaf}"


def _placed(name: str, inside: str, body: str) -> str:
    if name.startswith(("mask_head.", "bbox_attention.")):
        return name
    return inside + ("" if name.startswith(("class_", "bbox_")) else body) + name


def _batchformer_layers(weights: Mapping[str, Tensor]) -> dict[int | None, dict[str, Tensor]]:
    """Map the number of an encoder layer (``None``: one for all) to the state dict of a :class:`BatchFormer`."""
    groups: dict[int | None, dict[str, Tensor]] = {}
    for key, value in weights.items():
        if match := _BATCHFORMER.fullmatch(key):
            layer, depth, leaf = match.groups()
            group = groups.setdefault(None if layer is None else int(layer), {})
            group[f"layers.{depth or 0}.{leaf}"] = value
    return groups


def _batchformers(model: nn.Module) -> dict[str, list[int]]:
    """Map the name of each inserted module to the numbers of the encoder layers that it comes after."""
    names = {id(module): name for name, module in model.named_modules() if isinstance(module, BatchFormer)}
    modules: dict[str, list[int]] = {}
    for hook in hooks_in(model):
        number = hook.point.name.rpartition(".")[2]
        modules.setdefault(names[id(hook.module)], []).append(int(number))
    return modules


def _fill_batchformers(
    modules: Mapping[str, list[int]], groups: Mapping[int | None, dict[str, Tensor]], found: dict[str, Tensor]
) -> list[str]:
    """Put the tensors of every module into ``found``; return the names of those that fit no module."""
    used: set[int | None] = set()
    for name, numbers in modules.items():
        fitting = [number for number in (None, *numbers) if number in groups]
        if len(fitting) == 1:  # several layers of their own do not fit into one shared module
            used.add(fitting[0])
            found.update({f"{name}.{leaf}": value for leaf, value in groups[fitting[0]].items()})
    return [f"transformer.bf.{number}" for number in groups if modules and number not in used]


def _inserted_at(content: Mapping[str, Any], groups: Mapping[int | None, Any]) -> tuple[int, ...]:
    if not groups:
        return ()
    if None not in groups:
        return tuple(sorted(number for number in groups if number is not None))
    arguments = content.get("args")
    listed = arguments.get("insert_idx") if isinstance(arguments, Mapping) else getattr(arguments, "insert_idx", None)
    return tuple(listed) if isinstance(listed, list | tuple) else ()
