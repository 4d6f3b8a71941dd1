"""Put the module into a model that nobody edited, and take it out again.

Insertion is forward hooks on named modules. The first point of a pass doubles the batch, [plain; mixed]; at later
points only the mixed half attends; points that each see the undoubled batch (the classifiers of several experts) are
parallel branches, and each doubles. Hooks are methods of plain objects, so a model with the module in it can be
copied, pickled, compiled and wrapped in DDP or FSDP.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from . import streams
from .modules import BatchFormer
from .notices import BatchFormerWarning
from .places import Place, Plan, find_places, find_classifier, width_of

T = TypeVar("T")
_HANDLES = "_batchformer_handles"
_WRAPPERS = ("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "OptimizedModule")
Names = str | Sequence[str]


@dataclass(eq=False)
class _Pass:
    """What the points of one forward pass know of each other."""

    rows: int | None = None  # samples before the doubling
    roles: dict[str, Literal["first", "later"]] = field(default_factory=dict)


class _Point:
    """One place of insertion: the hook that runs there."""

    def __init__(self, place: Place, module: BatchFormer, state: _Pass) -> None:
        self.place = place
        self.module = module
        self.state = state

    def before(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.module.training:
            return None
        return (self.mix(args[0]), *args[1:])

    def after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.module.training:
            return None
        if isinstance(output, tuple):
            return (self.mix(output[0]), *output[1:])
        return self.mix(output)

    def mix(self, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"Expected a tensor {self.place}, got {type(x).__name__}. Insert at another place.")
        if self.module.mode == "single_stream":
            return self.module.mix(x)
        if self._role(x) == "first":
            return cast(Tensor, self.module(x))
        plain, mixed = streams.split(x)
        return torch.cat((plain, self.module.mix(mixed)))

    def _role(self, x: Tensor) -> Literal["first", "later"]:
        # A role is settled once in a pass; activation checkpointing runs the hook again and must get the same answer.
        name = self.place.name
        if name not in self.state.roles:
            if self.state.rows is None:
                self.state.rows = x.shape[0]
            if x.shape[0] not in (self.state.rows, 2 * self.state.rows):
                raise ValueError(
                    f"Expected {self.state.rows} or {2 * self.state.rows} rows {self.place}, got {x.shape[0]}: between "
                    "two points of insertion the model changes the batch. Insert these points separately."
                )
            self.state.roles[name] = "first" if x.shape[0] == self.state.rows else "later"
        return self.state.roles[name]


class _Passenger(nn.Module):
    """Carries the module inside an ``nn.Sequential``, which would call it: passes its input on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: T) -> T:
        """The identity."""
        return x


class Handle:
    """What :func:`insert` returns: the labels' side of the two streams, and the way back.

    Attributes:
        modules: The inserted :class:`BatchFormer` modules; one, if its weights are shared.
        places: Where they were inserted.
    """

    def __init__(self, model: nn.Module, plan: Plan, modules: list[BatchFormer], prefix: str) -> None:
        self.modules = modules
        self.places = plan.places
        self.plan = plan
        self.prefix = prefix
        self._model = model
        self._state = _Pass()
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
            return streams.split(outputs)
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
            point = _Point(place, module, self._state)
            target = self._model.get_submodule(place.name)
            self._hooks.append(
                target.register_forward_pre_hook(point.before)
                if place.where == "before"
                else target.register_forward_hook(point.after)
            )
        self._hooks.append(self._model.register_forward_pre_hook(self._begin_pass))
        for name in self.plan.companions:
            hook = _Companions(self, self.plan.companions[name]).double
            self._hooks.append(self._model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))

    def _begin_pass(self, *_: Any) -> None:
        if self.modules[0].training:
            self._state.rows = None
            self._state.roles = {}


class _Companions:
    """Doubles named inputs (labels, masks, positions) of a module that gets doubled features."""

    def __init__(self, handle: Handle, names: tuple[str, ...]) -> None:
        self.handle = handle
        self.names = names

    def double(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        if not self.handle.doubles:
            return None
        return args, {k: streams.expand(v) if k in self.names else v for k, v in named.items()}


def insert(
    model: nn.Module, *, before: Names | None = None, after: Names | None = None, share: bool = True, **layer: Any
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
        layer: Arguments of :class:`BatchFormer`; ``dim`` is read off the model where it is not given.

    Returns:
        The handle: ``expand``, ``split``, ``loss``, ``remove``.

    Raises:
        ValueError: When nothing matches (with the nearest names), when there is something at that place already, or
            when the width or the classifier is ambiguous (with the candidates).
        RuntimeError: When the model is wrapped.

    Source:
        BatchFormer, section 3; BatchFormerV2, section 3.

    Example:
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
    names = before if before is not None else after
    where: Literal["before", "after"] = "before" if before is not None else "after"
    plan = find_classifier(model) if names == "auto" else find_places(model, cast(Names, names), where)
    for handle in _handles(model):
        if taken := [str(place) for place in plan.places if place in handle.places]:
            raise ValueError(f"Expected a free place, but there is a BatchFormer {', '.join(taken)}. remove() it first.")
    layer = {**plan.layer, **layer}
    widths = [layer.pop("dim")] * len(plan.places) if "dim" in layer else [width_of(model, p) for p in plan.places]
    if share and len(set(widths)) > 1:
        raise ValueError(f"Expected one width to share weights over {len(widths)} points, got {widths}. Pass share=False.")
    modules = [BatchFormer(width, **layer) for width in (widths[:1] if share else widths)]
    _follow(model, modules)
    prefix = _register(model, modules, plan, share)
    handle = Handle(model, plan, modules, prefix)
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


def _refuse_wrapped(model: nn.Module) -> None:
    wrapped = [type(m).__name__ for m in model.modules() if type(m).__name__ in _WRAPPERS or "FSDP" in type(m).__name__]
    if wrapped:
        raise RuntimeError(
            f"Expected a plain model, got one wrapped in {wrapped[0]}. Insert first, then wrap: the module's parameters "
            "must be there when the wrapper looks for them."
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
            holder[place.name.replace(".", "_")] = module
    if isinstance(model, nn.Sequential):
        holder = _Passenger(holder)
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
    # Only the outer module is switched: its layers, and their dropout, stay in eval().
    for module in modules:
        module.training = True
    try:
        outputs = model(*inputs, **named)
    finally:
        for module in modules:
            module.training = False
    return streams.split(outputs) if modules[0].mode == "two_stream" else (None, outputs)
