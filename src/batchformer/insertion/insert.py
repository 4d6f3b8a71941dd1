"""Insert the module into a model that nobody edited, and take it out again.

An insertion is a set of forward hooks on named modules (:mod:`batchformer.insertion.hooks`). The first point of a pass
doubles the batch, [plain; mixed]; at later points only the mixed half attends. Points that each see the undoubled batch
(the classifiers of several experts) are parallel branches, and each doubles. All this holds for the points of one
:func:`insert` as for those of several into one model, so every insertion must go into the whole model.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

from torch import nn

from batchformer.core.functional import Attend
from batchformer.core.modules import BatchFormer, GatherMode, Layout
from batchformer.core.streams import MixedStream, Mode

from .adapters import find_classifier
from .adapters import plan as plan_points
from .handle import Handle, handles
from .hooks import ForwardState, hooks_in
from .locate import find_points, width_of
from .plan import InsertionPlan, InsertionPoint

_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")
Names = str | Sequence[str]
Padding = Literal["mask", "attend"]


def insert(
    model: nn.Module,
    *,
    before: Names | None = None,
    after: Names | None = None,
    share: bool = True,
    padding: Padding = "mask",
    dim: int | None = None,
    num_heads: int = 4,
    mlp_ratio: float = 1.0,
    drop: float = 0.5,
    layers: int = 1,
    mode: Mode = "two_stream",
    gather: GatherMode = "none",
    layout: Layout | None = None,
    attend: Attend = "batch",
) -> Handle:
    """Insert BatchFormer into a model, in place.

    Args:
        model: Any ``nn.Module``; not yet wrapped in DDP, FSDP or ``torch.compile``.
        before: Name or names of modules whose *input* is mixed (BatchFormer: the classifier). ``"auto"`` finds the
            classifier of timm, torchvision and transformers models, of models with ``get_classifier()``, and of any
            model with one unambiguous last ``Linear``.
        after: Name or names of modules whose *output* is mixed (BatchFormerV2: ``"blocks.8"``,
            ``"model.encoder.layers.0"``). A ``*`` matches one part of a name: ``"blocks.*"``.
        share: True if several points share one set of weights.
        padding: Treatment of padding where the model says which tokens are padding (the DETR family): with ``"mask"``
            they neither attend nor are attended to, and are equal in both streams; with ``"attend"`` they take part
            like any other token, as in the published code.
        dim: Channels at the points; ``None`` reads them from the model.
        num_heads: Number of attention heads; divides the channels.
        mlp_ratio: Width of the feed-forward part divided by the channels, above 0.
        drop: Dropout probability in [0, 1].
        layers: Number of encoder layers, one after the other, at least 1.
        mode: ``"two_stream"`` or ``"single_stream"``, see :class:`batchformer.BatchFormer`.
        gather: ``"all"`` attends over the batches of all ranks, see :class:`batchformer.BatchFormer`.
        layout: ``"BCHW"`` or ``"BHWC"`` for maps; ``None`` for features, tokens, and maps before a classifier that
            ``"auto"`` found.
        attend: ``"batch"``, or ``"self"`` for a control in which each sample attends to itself alone.

    Returns:
        Handle with ``expand``, ``split``, ``loss`` and ``remove``.

    Raises:
        ValueError: If nothing matches (with the nearest names), if a module is inserted at a point already, if the
            width or the classifier is ambiguous (with the candidates), if this kind of model cannot double its batch
            at a point, or for arguments outside their ranges.
        RuntimeError: If the model is wrapped.
        TypeError: For something that is no model, and for unknown arguments.

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
    if cast(str, attend) == "nothing":
        raise ValueError(
            "Expected attend to be 'batch' or 'self', got 'nothing', which is no longer an attention. A second stream "
            "with dropout alone is the control 'duplicate' of a comparison (--controls duplicate)."
        )

    def make(width: int, planned: Layout | None) -> BatchFormer:
        settings: dict[str, Any] = {"layers": layers, "mode": mode, "gather": gather, "attend": attend}
        return BatchFormer(width, num_heads, mlp_ratio, drop, layout=layout or planned, **settings)

    return insert_module(model, make, before=before, after=after, share=share, padding=padding, dim=dim)


def insert_module(
    model: nn.Module,
    make: Callable[[int, Layout | None], MixedStream],
    *,
    before: Names | None = None,
    after: Names | None = None,
    share: bool = True,
    padding: Padding = "mask",
    dim: int | None = None,
) -> Handle:
    """Insert modules of any kind of mixed stream into a model, in place.

    Args:
        model: Any ``nn.Module``, as in :func:`insert`.
        make: Function that makes a module from the channels at its point and the layout of the features there
            (``None`` if the model does not say).
        before: Name or names of modules whose input is mixed, as in :func:`insert`.
        after: Name or names of modules whose output is mixed, as in :func:`insert`.
        share: True if one module serves all points.
        padding: Treatment of padding, as in :func:`insert`.
        dim: Channels at the points; ``None`` reads them from the model.

    Returns:
        Handle with ``expand``, ``split``, ``loss`` and ``remove``.

    Raises:
        ValueError: As in :func:`insert`.
        RuntimeError: If the model is wrapped.
        TypeError: For something that is no model.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> insert_module(model, lambda width, layout: BatchFormer(width, layout=layout), after="1", dim=8).points
        (InsertionPoint(name='1', where='after'),)
    """
    _refuse_wrapped(model)
    plan = _plan_insertion(model, before, after)
    if padding not in ("mask", "attend"):
        raise ValueError(f"Expected padding to be 'mask' or 'attend', got {padding!r}.")
    if padding == "attend":
        plan = dataclasses.replace(plan, padding=None)
    state = _shared_state(model, plan)
    widths = [width_of(model, point) for point in plan.points] if dim is None else [dim] * len(plan.points)
    if share and len(set(widths)) > 1:
        raise ValueError(
            f"Expected one width to share weights over {len(widths)} points, got {widths}. Pass share=False."
        )
    modules = [make(width, plan.layout) for width in (widths[:1] if share else widths)]
    _match_device_dtype_and_mode(modules, model)
    prefix = _register_modules(model, modules, plan.points, share)
    return Handle(model, plan, modules, prefix, state)


def remove(model: nn.Module) -> nn.Module:
    """Take every module out that :func:`insert` put into ``model``, and return the plain model.

    Raises:
        ValueError: If there is none.

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


def _refuse_wrapped(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a model, an nn.Module, got {type(model).__name__}.")
    wrapped = [type(m).__name__ for m in model.modules() if type(m).__name__ in _WRAPPERS or "FSDP" in type(m).__name__]
    wrapped += ["model.compile()" for m in model.modules() if m._compiled_call_impl is not None]
    if wrapped:
        raise RuntimeError(
            f"Expected a plain model, got one wrapped in {wrapped[0]}. Insert first, then wrap: the wrapper looks for "
            "the parameters when it is made."
        )


def _plan_insertion(model: nn.Module, before: Names | None, after: Names | None) -> InsertionPlan:
    if (before is None) == (after is None):
        raise ValueError("Expected exactly one of before= and after=. Pass before='auto' for the classifier.")
    if after == "auto":
        raise ValueError("Expected module names for after=, got 'auto'. Pass before='auto' for the classifier.")
    if before == "auto":
        return find_classifier(model)
    if before is not None:
        return plan_points(model, find_points(model, before, "before"))
    return plan_points(model, find_points(model, cast(Names, after), "after"))


def _shared_state(model: nn.Module, plan: InsertionPlan) -> ForwardState:
    """Return the state that the insertions into ``model`` share, after a check that the new points go with them."""
    found = handles(model)
    if taken := [str(point) for point in plan.points if any(point in handle.points for handle in found)]:
        raise ValueError(f"Expected a free point, but there is a BatchFormer {', '.join(taken)}. remove() it first.")
    state = found[0].state if found else ForwardState()
    if other := [str(hook.point) for hook in hooks_in(model) if hook.state is not state]:
        raise ValueError(
            f"Expected all insertions on one model, but there is a BatchFormer {', '.join(other)} that was inserted "
            "into a part of this model, or into a model that this is a part of. remove() it and insert both into the "
            "whole model, as later points must know that the first one doubled the batch."
        )
    return state


def _match_device_dtype_and_mode(modules: Sequence[MixedStream], model: nn.Module) -> None:
    parameter = next((p for p in model.parameters() if p.is_floating_point()), None)
    for module in modules:
        if parameter is not None:
            module.to(device=parameter.device, dtype=parameter.dtype)
        module.train(model.training)


def _register_modules(
    model: nn.Module, modules: Sequence[MixedStream], points: Sequence[InsertionPoint], share: bool
) -> str:
    """Register the modules, one for all points or one for each, below one child of the model; return its name."""
    holder: nn.Module = modules[0]
    if share:
        _set_label(modules[0], points)
    else:
        holder = nn.ModuleDict()
        for point, module in zip(points, modules, strict=True):
            _set_label(module, [point])
            name = point.name.replace(".", "_")
            while hasattr(holder, name):
                name += "_"
            holder[name] = module
    if isinstance(model, nn.Sequential):
        holder = _SequentialHolder(holder)
    prefix = "batchformer"
    while hasattr(model, prefix):
        prefix += "_"
    model.add_module(prefix, holder)
    return prefix


def _set_label(module: MixedStream, points: Sequence[InsertionPoint]) -> None:
    module.label = f"{type(module).__name__} ({', '.join(str(point) for point in points)})"


class _SequentialHolder(nn.Module):
    """Holder of the module inside an ``nn.Sequential``, which calls its children: it returns its input."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any) -> Any:
        return x
