"""Handle of one insertion: registers its hooks, expands targets, splits outputs, and removes the module."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from batchformer.core import streams
from batchformer.core.streams import MixedStream
from batchformer.core.training_checks import BatchFormerWarning, warn_once

from .hooks import Action, DoubledInputs, ForwardState, InsertionHook, RunOnceHook, hooks_in, input_names
from .plan import InsertionPlan, InsertionPoint, RunOnce

T = TypeVar("T")
_HANDLES = "_batchformer_handles"


class Handle:
    """Handle of one insertion, as :func:`batchformer.insert` returns it: expands targets, splits outputs, removes.

    Attributes:
        modules: Inserted modules, :class:`batchformer.BatchFormer`; a single one if the points share its weights.
        plan: Points of insertion, and what is doubled together with the batch.
        prefix: Name of the modules' parent in the model, and so in its state dict.
        state: State of the forward pass that all insertions into the model share.
    """

    def __init__(
        self, model: nn.Module, plan: InsertionPlan, modules: Sequence[MixedStream], prefix: str, state: ForwardState
    ) -> None:
        self.modules = list(modules)
        self.plan = plan
        self.prefix = prefix
        self.state = state
        self._model = model
        self._hooks: list[Any] = []
        self._register_hooks()
        setattr(model, _HANDLES, [*handles(model), self])

    @property
    def points(self) -> tuple[InsertionPoint, ...]:
        """Points of insertion, in the order of the model."""
        return self.plan.points

    @property
    def places(self) -> tuple[InsertionPoint, ...]:
        """Deprecated name of :attr:`points`."""
        warnings.warn("Handle.places is deprecated: use Handle.points.", DeprecationWarning, stacklevel=2)
        return self.points

    @property
    def doubles(self) -> bool:
        """True if the next forward pass returns twice the rows."""
        return self.modules[0].doubles

    def expand(self, targets: T) -> T:
        """Double targets in training with two streams; return them as they are otherwise.

        Args:
            targets: Targets of N samples, see :func:`batchformer.expand`.

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
        """Split the outputs of the last pass into (plain, mixed).

        Args:
            outputs: Outputs of the model, see :func:`batchformer.split`.

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
        """Compute the weighted mean of both streams' losses for targets that are *not* doubled.

        Args:
            criterion: ``criterion(outputs, targets) -> scalar``.
            outputs: Outputs of the model.
            targets: Targets of N samples.
            weights: Weights of the plain and of the mixed stream, each at least 0, not both 0. In ``eval()`` and with
                a single stream they have no effect.

        Raises:
            ValueError: For other weights.
        """
        return streams.stream_loss(criterion, outputs, targets, two_streams=self.doubles, weights=weights)

    def evaluate_in_batch(self, *inputs: Any, labels: Tensor, **named: Any) -> tuple[Any, Any]:
        """Evaluate with the batch attention on and without dropout, for an analysis; this is no test result.

        The mixed outputs of a sample depend on the other samples of its batch. In a class-sorted batch they leak the
        label, so the labels are asked for and a sorted batch is warned about.

        Args:
            inputs: Inputs of the model, which must be in ``eval()``.
            labels: Class indices (N,), only checked for their order.
            named: Keyword inputs of the model.

        Returns:
            Outputs as (plain, mixed); ``(None, mixed)`` with a single stream.

        Raises:
            RuntimeError: If the model is in training.
        """
        return _evaluate_in_batch(self._model, self.modules, inputs, labels, named)

    def remove(self) -> nn.Module:
        """Take the module out and return the model: the plain network, with the keys and outputs it had.

        Raises:
            RuntimeError: If it was removed before.
        """
        if not self._hooks:
            raise RuntimeError("This insertion was removed before. Call insert() again to put the module back.")
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        delattr(self._model, self.prefix)
        left = [handle for handle in handles(self._model) if handle is not self]
        delattr(self._model, _HANDLES)
        if left:
            setattr(self._model, _HANDLES, left)
        return self._model

    def replaced_points(self) -> list[InsertionPoint]:
        """List the points whose module was replaced after the insertion, so that nothing is mixed there."""
        found = {hook.point for hook in hooks_in(self._model) if hook.state is self.state}
        return [point for point in self.points if point not in found]

    def _register_hooks(self) -> None:
        modules = self.modules * (len(self.points) if len(self.modules) == 1 else 1)
        for point, module in zip(self.points, modules, strict=True):
            target = self._model.get_submodule(point.name)
            hook = InsertionHook(point, module, self.state, input_names(target), self.plan.padding)
            self._hooks.append(
                target.register_forward_pre_hook(hook.before, with_kwargs=True)
                if point.where == "before"
                else target.register_forward_hook(hook.after, with_kwargs=True)
            )
        self._hooks.append(self._model.register_forward_pre_hook(self._begin_pass))
        self._hooks.append(self._model.register_forward_hook(self._end_pass))
        for name, inputs in self.plan.doubled_inputs.items():
            target = self._model.get_submodule(name)
            doubled = DoubledInputs(inputs, input_names(target), functools.partial(self._doubles_inputs_of, name))
            self._hooks.append(target.register_forward_pre_hook(doubled.double, with_kwargs=True))
        for once in self.plan.run_once:
            target = self._model.get_submodule(once.name)
            actions = functools.partial(self._actions_for, once)
            single = RunOnceHook(once, self.state, input_names(target), actions)
            self._hooks.append(target.register_forward_pre_hook(single.halve, with_kwargs=True))
            self._hooks.append(target.register_forward_hook(single.repeat))

    def _begin_pass(self, *_: Any) -> None:
        if self.modules[0].training:
            self.state.begin()

    def _end_pass(self, *_: Any) -> None:
        self.state.running = False
        if self.modules[0].training and not torch.compiler.is_compiling():
            self._warn_if_no_point_ran()

    def _warn_if_no_point_ran(self) -> None:
        if any(self.state.roles.get(point) for point in self.points):
            return
        why = (
            "a module there was replaced since insert(). Call remove() and insert() again, after the last change"
            if self.replaced_points()
            else "the model did not call the module there in this pass; its forward() may use the weights directly"
        )
        warn_once(
            self.modules[0], f"did nothing in training: {why}. The outputs of this pass are those of the plain network."
        )

    def _doubles_inputs_of(self, name: str) -> bool:
        # Of several insertions into one model, one doubles the inputs of each module.
        doubling = (handle for handle in handles(self._model) if handle.doubles and name in handle.plan.doubled_inputs)
        return next(doubling, None) is self

    def _actions_for(self, once: RunOnce) -> tuple[Action, ...]:
        doubling = [handle for handle in handles(self._model) if handle.doubles]
        points = {point.name for handle in doubling for point in handle.points}
        responsible = next((handle for handle in doubling if once in handle.plan.run_once), None)
        if responsible is not self or points & {*once.upstream}:
            return ()
        return ("halve",) if once.name in points else ("halve", "repeat")


def handles(model: nn.Module) -> list[Handle]:
    """List the handles of a model's insertions, in the order of insertion.

    A copy of a model has handles of its own: after ``copy.deepcopy``, unpickling or in an average of weights, the
    handle that ``insert`` returned is still that of the original.

    Args:
        model: Model that was given to :func:`batchformer.insert`, or a copy of it; no wrapper around it.

    Returns:
        One handle for each insertion; an empty list without any.

    Example:
        >>> import copy
        >>> from batchformer import insert
        >>> model = nn.Sequential(nn.Linear(4, 3))
        >>> _ = insert(model, before="0", num_heads=2)
        >>> [handle] = handles(copy.deepcopy(model))
        >>> handle.points
        (InsertionPoint(name='0', where='before'),)
    """
    return list(getattr(model, _HANDLES, []))


def looks_class_sorted(labels: Tensor) -> bool:
    """Tell whether class indices (N,) come in non-decreasing order with repeats, as from an unshuffled image folder.

    Example:
        >>> looks_class_sorted(torch.tensor([0, 0, 0, 1])), looks_class_sorted(torch.tensor([1, 0, 0, 1]))
        (True, False)
    """
    if labels.dim() != 1 or labels.is_floating_point() or len(labels) < 3:
        return False
    steps = labels[1:] - labels[:-1]
    return bool((steps >= 0).all() and (steps == 0).any())


def _evaluate_in_batch(
    model: nn.Module, modules: list[MixedStream], inputs: Sequence[Any], labels: Tensor, named: Mapping[str, Any]
) -> tuple[Any, Any]:
    if model.training:
        raise RuntimeError("Expected a model in eval(), got one in training. Call model.eval() first.")
    if looks_class_sorted(labels):
        warnings.warn(
            "The batch is sorted by class: with the batch attention on, samples mostly see their own class, and the "
            "label leaks. Shuffle the data first.",
            BatchFormerWarning,
            stacklevel=3,
        )
    # Only the inserted module itself is switched: the layers in it, and their dropout, stay in eval().
    for module in modules:
        module.training = True
    try:
        outputs = model(*inputs, **named)
    finally:
        for module in modules:
            module.training = False
    return streams.split(outputs) if modules[0].mode == "two_stream" else (None, outputs)
