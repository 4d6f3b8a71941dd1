"""One insertion: the labels' side of the two streams, the hooks in the model, and the way back."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from batchformer.core import streams
from batchformer.core.modules import BatchFormer
from batchformer.core.training_checks import BatchFormerWarning

from .hooks import Companions, Pass, Point, Shared, input_names, points_in
from .plan import Once, Place, Plan

T = TypeVar("T")
_HANDLES = "_batchformer_handles"


class Handle:
    """What :func:`batchformer.insert` returns: the labels' side of the two streams, and the way back.

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
        setattr(model, _HANDLES, [*handles(model), self])

    @property
    def doubles(self) -> bool:
        """Whether the next forward pass returns twice the rows."""
        return self.modules[0].doubles

    def expand(self, targets: T) -> T:
        """Double targets in training with two streams; return them as they are otherwise.

        Args:
            targets: See :func:`batchformer.expand`.

        Example:
            >>> from batchformer import insert
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
        left = [handle for handle in handles(self._model) if handle is not self]
        delattr(self._model, _HANDLES)
        if left:
            setattr(self._model, _HANDLES, left)
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
        """Places whose module is not the one of :func:`batchformer.insert` any more, so that nothing is mixed there."""
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
        doubling = (handle for handle in handles(self._model) if handle.doubles and name in handle.plan.companions)
        return next(doubling, None) is self

    def _works_once(self, once: Once) -> tuple[str, ...]:
        doubling = [handle for handle in handles(self._model) if handle.doubles]
        places = {place.name for handle in doubling for place in handle.places}
        if next((handle for handle in doubling if once in handle.plan.once), None) is not self or places & {
            *once.behind
        }:
            return ()
        return ("halve",) if once.name in places else ("halve", "repeat")


def handles(model: nn.Module) -> list[Handle]:
    """The handles of what :func:`batchformer.insert` put into ``model``, in the order of insertion.

    For a copy: after ``copy.deepcopy``, unpickling or in an average of weights, the handle that ``insert`` returned is
    that of the original.

    Args:
        model: That was given to :func:`batchformer.insert`, or a copy of it; not what it is wrapped in.

    Returns:
        One for each insertion; empty where there is none.

    Example:
        >>> import copy
        >>> from batchformer import insert
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> _ = insert(model, before="0", num_heads=2)
        >>> [handle] = handles(copy.deepcopy(model))
        >>> handle.places
        (Place(name='0', where='before'),)
    """
    return list(getattr(model, _HANDLES, []))


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
