"""Put the module into a model that nobody edited, and take it out again.

Insertion is forward hooks on named modules (:mod:`batchformer.insertion.hooks`). The first point of a pass doubles the
batch, [plain; mixed]; at later points only the mixed half attends; points that each see the undoubled batch (the
classifiers of several experts) are parallel branches, and each doubles. All this holds for the points of one
:func:`insert` as for those of several into one model, which is why every insertion goes into the whole model.
"""

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from torch import nn

from batchformer.core.modules import BatchFormer

from .handle import Handle, handles
from .hooks import Pass, Passenger, points_in
from .locate import find_classifier, find_places, width_of
from .plan import Plan

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")
Names = str | Sequence[str]


def insert(
    model: nn.Module,
    *,
    before: Names | None = None,
    after: Names | None = None,
    share: bool = True,
    padding: Literal["mask", "attend"] = "mask",
    **layer: Any,
) -> Handle:
    """Insert BatchFormer into a model, in place.

    Args:
        model: Any ``nn.Module``; not yet wrapped in DDP, FSDP or ``torch.compile``.
        before: Name or names of modules whose *input* is mixed (BatchFormer: the classifier). ``"auto"`` finds the
            classifier of timm, torchvision and transformers models, of models with ``get_classifier()``, and of any
            model with one unambiguous last ``Linear``.
        after: Name or names of modules whose *output* is mixed (BatchFormerV2: ``"blocks.8"``,
            ``"model.encoder.layers.0"``). A ``*`` stands for one part of a name: ``"blocks.*"``.
        share: Whether several points use one set of weights.
        padding: Where the model says which tokens are padding (the DETR family): ``"mask"``: these neither attend nor
            are attended to, and are the same in both streams; ``"attend"``: they take part like any other, as in the
            published code.
        layer: Arguments of :class:`BatchFormer`; ``dim`` is read off the model where it is not given.

    Returns:
        The handle: ``expand``, ``split``, ``loss``, ``remove``.

    Raises:
        ValueError: When nothing matches (with the nearest names), when there is something at that place already,
            when the width or the classifier is ambiguous (with the candidates), or when the place is one that this
            kind of model cannot double its batch at.
        RuntimeError: When the model is wrapped.
        TypeError: For something that is no model, and for unknown arguments (with the nearest ones).

    Source:
        BatchFormer, section 3; BatchFormerV2, section 3.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> handle = insert(model, before="auto")
        >>> model(torch.randn(5, 4)).shape
        torch.Size([10, 3])
        >>> handle.remove().eval()(torch.randn(5, 4)).shape
        torch.Size([5, 3])
    """
    _refuse_wrapped(model)
    _refuse_unknown(layer)
    if (before is None) == (after is None):
        raise ValueError("Expected exactly one of before= and after=. Take before='auto' for the classifier.")
    if after == "auto":
        raise ValueError("Expected module names for after=, got 'auto'. Take before='auto' for the classifier.")
    if padding not in ("mask", "attend"):
        raise ValueError(f"Expected padding to be 'mask' or 'attend', got {padding!r}.")
    names = before if before is not None else after
    where: Literal["before", "after"] = "before" if before is not None else "after"
    plan = find_classifier(model) if names == "auto" else find_places(model, cast(Names, names), where)
    if padding == "attend":
        plan = dataclasses.replace(plan, padding=None)
    state = _shared_state(model, plan)
    layer = {**plan.layer, **layer}
    widths = [layer.pop("dim")] * len(plan.places) if "dim" in layer else [width_of(model, p) for p in plan.places]
    if share and len(set(widths)) > 1:
        raise ValueError(
            f"Expected one width to share weights over {len(widths)} points, got {widths}. Pass share=False."
        )
    modules = [BatchFormer(width, **layer) for width in (widths[:1] if share else widths)]
    _follow(model, modules)
    prefix = _register(model, modules, plan, share)
    return Handle(model, plan, modules, prefix, state)


def remove(model: nn.Module) -> nn.Module:
    """Take every BatchFormer out that :func:`insert` put into ``model``; returns the plain model.

    Raises:
        ValueError: When there is none.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> _ = insert(model, before="0", num_heads=2)
        >>> sorted(remove(model).state_dict())
        ['0.bias', '0.weight']
    """
    found = handles(model)
    if not found:
        raise ValueError("Expected a model with an inserted BatchFormer, found none. Pass the model given to insert().")
    for handle in found:
        handle.remove()
    return model


def _shared_state(model: nn.Module, plan: Plan) -> Pass:
    """What the insertions into ``model`` so far share, after a check that the new places go with them."""
    found = handles(model)
    if taken := [str(place) for place in plan.places if any(place in handle.places for handle in found)]:
        raise ValueError(f"Expected a free place, but there is a BatchFormer {', '.join(taken)}. remove() it first.")
    state = found[0]._state if found else Pass()
    if other := [str(point.place) for point in points_in(model) if point.state is not state]:
        raise ValueError(
            f"Expected all insertions on one model, but there is a BatchFormer {', '.join(other)} that was inserted "
            "into a part of this model, or into a model that this is a part of. remove() it and insert both into the "
            "whole model: the first point doubles the batch, and later ones must know."
        )
    return state


def _refuse_unknown(layer: Mapping[str, Any]) -> None:
    known = [name for what in (insert, BatchFormer) for name in inspect.signature(what).parameters if name != "layer"]
    for name in layer:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"It takes {', '.join(known)}."
            raise TypeError(f"insert() has no argument {name!r}. {hint}")


def _refuse_wrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a model, an nn.Module, got {type(model).__name__}.")
    wrapped = [type(m).__name__ for m in model.modules() if type(m).__name__ in _WRAPPERS or "FSDP" in type(m).__name__]
    wrapped += ["model.compile()" for m in model.modules() if m._compiled_call_impl is not None]
    if wrapped:
        raise RuntimeError(
            f"Expected a plain model, got one wrapped in {wrapped[0]}. Insert first, then wrap: the module's "
            "parameters must be there when the wrapper looks for them."
        )


def _follow(model: nn.Module, modules: list[BatchFormer]) -> None:
    """Put new modules on the device, in the floating type and in the mode of the model."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    for module in modules:
        if parameter is not None:
            module.to(device=parameter.device, dtype=parameter.dtype)
        module.train(model.training)


def _register(model: nn.Module, modules: list[BatchFormer], plan: Plan, share: bool) -> str:
    holder: nn.Module = modules[0]
    if share:
        modules[0].inserted_at = ", ".join(str(place) for place in plan.places)
    else:
        holder = nn.ModuleDict()
        for place, module in zip(plan.places, modules, strict=True):
            module.inserted_at = str(place)
            name = place.name.replace(".", "_")
            while hasattr(holder, name):
                name += "_"
            holder[name] = module
    if isinstance(model, nn.Sequential):
        holder = Passenger(holder)
    prefix = "batchformer"
    while hasattr(model, prefix):
        prefix += "_"
    model.add_module(prefix, holder)
    return prefix
