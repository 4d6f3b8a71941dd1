"""Put the module into a model that nobody edited, and take it out again.

Insertion is forward hooks on named modules (:mod:`batchformer.core.points`). The first point of a pass doubles the
batch, [plain; mixed]; at later points only the mixed half attends; points that each see the undoubled batch (the
classifiers of several experts) are parallel branches, and each doubles. All this holds for the points of one
:func:`insert` as for those of several into one model, which is why every insertion goes into the whole model.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from . import streams
from .modules import BatchFormer
from .notices import BatchFormerWarning
from .places import Once, Place, Plan, find_classifier, find_places, width_of
from .points import Companions, Pass, Passenger, Point, Shared, input_names, points_in

T = TypeVar("T")
_HANDLES = "_batchformer_handles"
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")
Names = str | Sequence[str]


class Handle:
    """What :func:`insert` returns: the labels' side of the two streams, and the way back.

    Attributes:
        modules: The inserted :class:`BatchFormer` modules; one, if its weights are shared.
        places: Where they were inserted.
    """

    def __init__(self, model: nn.Module, plan: Plan, modules: list[BatchFormer], prefix: str, state: Pass) -> None:
        self.modules = modules
        self.places = plan.places
        self.plan = plan
        self.prefix = prefix
        self._model = model
        self._state = state
        self._hooks: list[Any] = []
        self._attach()

    @property
    def doubles(self) -> bool:
        """Whether the next forward pass returns twice the rows."""
        return self.modules[0].doubles

    def expand(self, targets: T) -> T:
        """Double targets in training with two streams; return them as they are otherwise.

        Args:
            targets: See :func:`batchformer.expand`.

        Example:
            >>> import torch
            >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
            >>> handle = insert(model, before="1")
            >>> handle.expand(torch.tensor([0, 2]))
            tensor([0, 2, 0, 2])
            >>> _ = model.eval()
            >>> handle.expand(torch.tensor([0, 2]))
            tensor([0, 2])
        """
        return streams.expand(targets) if self.doubles else targets

    def split(self, outputs: T) -> tuple[T | None, T | None]:
        """The outputs of the last pass as (plain, mixed).

        Returns:
            Both halves in training with two streams; ``(None, outputs)`` in training with a single stream;
            ``(outputs, None)`` in ``eval()``.
        """
        if self.doubles:
            return streams.split(outputs, layered=self.plan.layered)
        return (None, outputs) if self.modules[0].training else (outputs, None)

    def loss(
        self, criterion: Callable[[T, Any], Tensor], outputs: T, targets: Any, weights: Sequence[float] = (1.0, 1.0)
    ) -> Tensor:
        """Weighted mean of both streams' losses for targets that are *not* doubled.

        Args:
            criterion: ``criterion(outputs, targets) -> scalar``.
            outputs: What the model returned.
            targets: N rows.
            weights: Of the plain and the mixed stream. In ``eval()`` and with a single stream they have no effect.
        """
        return streams.stream_loss(criterion, outputs, targets, two_streams=self.doubles, weights=weights)

    def evaluate_in_batch(self, *inputs: Any, labels: Tensor, **named: Any) -> tuple[Any, Any]:
        """Evaluate with the batch attention on: (plain, mixed) outputs, without dropout. An analysis, not a result.

        The mixed outputs of a sample depend on the samples that it comes with. Over a class-sorted batch they leak
        the label, which is why the labels are asked for, and such a batch warned about.

        Args:
            inputs: Of the model, which must be in ``eval()``.
            labels: Class indices (N,), only looked at for their order.
            named: Keyword inputs of the model.

        Raises:
            RuntimeError: When the model is in training.
        """
        return _evaluate_in_batch(self._model, self.modules, inputs, labels, named)

    def remove(self) -> nn.Module:
        """Take the module out: the plain network, with the keys and outputs it had. Returns the model."""
        for hook in self._hooks:
            hook.remove()
        if not self._hooks:
            raise RuntimeError("This insertion was removed before. Call insert() again to put the module back.")
        self._hooks = []
        delattr(self._model, self.prefix)
        handles = getattr(self._model, _HANDLES)
        handles.remove(self)
        if not handles:
            delattr(self._model, _HANDLES)
        return self._model

    def _attach(self) -> None:
        modules = self.modules * (len(self.places) if len(self.modules) == 1 else 1)
        for place, module in zip(self.places, modules, strict=True):
            target = self._model.get_submodule(place.name)
            point = Point(place, module, self._state, input_names(target), self.plan.padding)
            self._hooks.append(
                target.register_forward_pre_hook(point.before, with_kwargs=True)
                if place.where == "before"
                else target.register_forward_hook(point.after, with_kwargs=True)
            )
        self._hooks.append(self._model.register_forward_pre_hook(self._begin_pass))
        self._hooks.append(self._model.register_forward_hook(self._end_pass))
        for name, inputs in self.plan.companions.items():
            target = self._model.get_submodule(name)
            doubles = functools.partial(self._doubles_inputs_of, name)
            companions = Companions(inputs, input_names(target), doubles)
            self._hooks.append(target.register_forward_pre_hook(companions.double, with_kwargs=True))
        for once in self.plan.once:
            target = self._model.get_submodule(once.name)
            shared = Shared(once, self._state, input_names(target), functools.partial(self._works_once, once))
            self._hooks.append(target.register_forward_pre_hook(shared.halve, with_kwargs=True))
            self._hooks.append(target.register_forward_hook(shared.repeat))

    def _begin_pass(self, *_: Any) -> None:
        if self.modules[0].training:
            self._state.begin()

    def _end_pass(self, *_: Any) -> None:
        self._state.running = False
        if self.modules[0].training and not torch.compiler.is_compiling():
            self._warn_if_idle()

    def replaced(self) -> list[Place]:
        """Places whose module is not the one of :func:`insert` any more, so that nothing is mixed there."""
        found = {point.place for point in points_in(self._model) if point.state is self._state}
        return [place for place in self.places if place not in found]

    def _warn_if_idle(self) -> None:
        told = self.modules[0]._told
        if "idle" in told or any(self._state.roles.get(place) for place in self.places):
            return
        told.add("idle")
        where = ", ".join(str(place) for place in self.places)
        why = "the model did not call it as a module in this pass: its forward() may take the weights instead"
        if self.replaced():
            why = "its module was replaced since insert(). remove() and insert() again, after the last change"
        warnings.warn(
            f"BatchFormer ({where}) did nothing in training: {why}. The outputs are those of the plain network.",
            BatchFormerWarning,
            stacklevel=2,
        )

    def _doubles_inputs_of(self, name: str) -> bool:
        # Of several insertions into one model, one doubles each companion.
        doubling = (handle for handle in _handles(self._model) if handle.doubles and name in handle.plan.companions)
        return next(doubling, None) is self

    def _works_once(self, once: Once) -> tuple[str, ...]:
        doubling = [handle for handle in _handles(self._model) if handle.doubles]
        places = {place.name for handle in doubling for place in handle.places}
        if next((handle for handle in doubling if once in handle.plan.once), None) is not self or places & {
            *once.behind
        }:
            return ()
        return ("halve",) if once.name in places else ("halve", "repeat")


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
    handle = Handle(model, plan, modules, prefix, state)
    if not hasattr(model, _HANDLES):
        setattr(model, _HANDLES, [])
    _handles(model).append(handle)
    return handle


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
    handles = list(_handles(model))
    if not handles:
        raise ValueError("Expected a model with an inserted BatchFormer, found none. Pass the model given to insert().")
    for handle in handles:
        handle.remove()
    return model


def _handles(model: nn.Module) -> list[Handle]:
    return cast(list[Handle], getattr(model, _HANDLES, []))


def _shared_state(model: nn.Module, plan: Plan) -> Pass:
    """What the insertions into ``model`` so far share, after a check that the new places go with them."""
    handles = _handles(model)
    if taken := [str(place) for place in plan.places if any(place in handle.places for handle in handles)]:
        raise ValueError(f"Expected a free place, but there is a BatchFormer {', '.join(taken)}. remove() it first.")
    state = handles[0]._state if handles else Pass()
    if other := [str(point.place) for point in points_in(model) if point.state is not state]:
        raise ValueError(
            f"Expected all insertions on one model, but there is a BatchFormer {', '.join(other)} that was inserted "
            "into a part of this model, or into a model that this is a part of. remove() it and insert both into the "
            "whole model: the first point doubles the batch, and later ones must know."
        )
    return state


def _refuse_wrapped(model: nn.Module) -> None:
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


def _evaluate_in_batch(
    model: nn.Module, modules: list[BatchFormer], inputs: Sequence[Any], labels: Tensor, named: Mapping[str, Any]
) -> tuple[Any, Any]:
    if model.training:
        raise RuntimeError("Expected a model in eval(), got one in training. Call model.eval() first.")
    if streams.looks_class_sorted(labels):
        warnings.warn(
            "The batch is sorted by class: with the batch attention on, samples mostly see their own class, and the "
            "label leaks. Shuffle the data first.",
            BatchFormerWarning,
            stacklevel=3,
        )
    # Only the outer module is switched: its layers, and their dropout, stay in eval(). Its own dropout is that of a
    # control without layers.
    drops = [module.drop for module in modules]
    for module in modules:
        module.training, module.drop = True, 0.0
    try:
        outputs = model(*inputs, **named)
    finally:
        for module, drop in zip(modules, drops, strict=True):
            module.training, module.drop = False, drop
    return streams.split(outputs) if modules[0].mode == "two_stream" else (None, outputs)
