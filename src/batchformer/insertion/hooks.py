"""Hooks that run in a model with insertions, and the state of a forward pass that they share.

Hooks are methods of plain objects, so that a model with hooks can be copied and pickled.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchformer.core.modules import BatchFormer
from batchformer.core.streams import MixedStream, expand, make_sequence_like, split

from .plan import InsertionPoint, RunOnce

Role = Literal["first", "later"]
Padding = Callable[[Mapping[str, Any]], Tensor | None]
Action = Literal["halve", "repeat"]


@dataclass(eq=False)
class ForwardState:
    """State of one forward pass; the hooks of all insertions into one model share it.

    Attributes:
        running: True between the start and the end of the model's own forward pass.
        rows: Number of samples before the doubling, once it is known.
        roles: Roles that each point had in this pass.
    """

    running: bool = False
    rows: int | None = None
    roles: dict[InsertionPoint, set[Role]] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget the pass before."""
        self.running, self.rows, self.roles = True, None, {}

    def role(self, point: InsertionPoint, rows: int) -> Role:
        """Decide whether the batch doubles at this point, which sees ``rows`` rows, or was doubled before it.

        Raises:
            ValueError: If the rows are neither those of the first point nor twice as many.
        """
        known = self.roles.setdefault(point, set())
        if not self.running and len(known) == 1:
            # Activation checkpointing runs a point again, possibly after a later pass with another number of rows.
            return next(iter(known))
        if self.rows is None:
            self.rows = rows
        if rows not in (self.rows, 2 * self.rows):
            raise ValueError(
                f"Expected {self.rows} or {2 * self.rows} rows {point}, got {rows}: the model changes the batch "
                "between two points of insertion. Insert at points that see the same samples."
            )
        role: Role = "first" if rows == self.rows else "later"
        known.add(role)
        return role


class InsertionHook:
    """Hook that mixes the samples at one point of insertion.

    Args:
        point: Point of insertion.
        module: Module that mixes.
        state: State that all hooks in the model share.
        inputs: Names of the inputs of the module at the point, in the order of positions.
        padding: Function that reads the padding from these inputs, see
            :class:`batchformer.insertion.plan.InsertionPlan`.
    """

    def __init__(
        self,
        point: InsertionPoint,
        module: MixedStream,
        state: ForwardState,
        inputs: tuple[str, ...],
        padding: Padding | None = None,
    ) -> None:
        self.point = point
        self.module = module
        self.state = state
        self.inputs = inputs
        self.padding = padding

    def before(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Mix the first input (forward pre-hook)."""
        if not self.module.training:
            return None
        padding = self._read_padding(args, named)
        if args:
            return (self.mix(args[0], padding), *args[1:]), named
        name = next((name for name in (*self.inputs, *named) if name in named), "")
        return args, {**named, name: self.mix(named.get(name), padding)}

    def after(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        """Mix the output, or the first of several (forward hook)."""
        if not self.module.training:
            return None
        padding = self._read_padding(args, named)
        if isinstance(output, tuple | list) and output:
            return make_sequence_like(output, [self.mix(output[0], padding), *output[1:]])
        return self.mix(output, padding)

    def mix(self, x: Any, padding: Tensor | None = None) -> Tensor:
        """Mix the samples: N rows -> the module's output; [plain; mixed] -> [plain; mixed again].

        Raises:
            TypeError: If ``x`` is no tensor.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"Expected a tensor {self.point}, got {type(x).__name__}. Insert at another point.")
        over_ranks = isinstance(self.module, BatchFormer) and self.module.gather == "all"
        if padding is None and self.padding is not None and over_ranks:
            # Ranks must agree on having a mask, and the batch of another rank may be padded.
            padding = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        later = self.state.role(self.point, x.shape[0]) == "later"
        # The module itself is called, and not its methods, so that wrappers of it (FSDP) do their part.
        out: Tensor = self.module(x, mask=padding, doubled=later)
        return out

    def _read_padding(self, args: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        return None if self.padding is None else self.padding(_by_name(self.inputs, args, named))


class DoubledInputs:
    """Hook that doubles named inputs (labels, masks, positions) of a module that gets doubled features.

    Args:
        names: Names of the inputs to double.
        inputs: Names of all inputs of the module, in the order of positions.
        active: Function that tells whether this hook doubles them in this pass.
    """

    def __init__(self, names: tuple[str, ...], inputs: tuple[str, ...], active: Callable[[], bool]) -> None:
        self.names = names
        self.inputs = inputs
        self.active = active

    def double(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Double the named inputs, passed by position or by name (forward pre-hook)."""
        if not self.active():
            return None
        self._check_lists(_by_name(self.inputs, args, named))
        return _change_inputs(_double, self.names, self.inputs, args, named)

    def _check_lists(self, given: Mapping[str, Any]) -> None:
        """Refuse lists that were doubled before, which would fail far inside the model's loss.

        Raises:
            ValueError: If a list has more or fewer entries than the tensors passed with it have rows.
        """
        values = {name: given[name] for name in self.names if name in given}
        rows = next((x.shape[0] for x in values.values() if isinstance(x, Tensor) and x.dim() > 0), None)
        for name, value in values.items():
            if isinstance(value, list) and rows is not None and len(value) != rows:
                raise ValueError(
                    f"Expected {name} with one entry for each of the {rows} samples, got {len(value)}. Pass those of "
                    "the batch as they are: they are doubled in the model, together with it."
                )


class RunOnceHook:
    """Hooks that let a module run once for both streams, see :class:`batchformer.insertion.plan.RunOnce`.

    Args:
        once: Module and inputs.
        state: State that all hooks in the model share.
        inputs: Names of the module's inputs, in the order of positions.
        actions: Function that tells what to do in this pass: nothing if the module runs on both streams; ``"halve"``
            if it runs once and a point after it doubles its output; ``"halve"`` and ``"repeat"`` otherwise.
    """

    def __init__(
        self, once: RunOnce, state: ForwardState, inputs: tuple[str, ...], actions: Callable[[], tuple[Action, ...]]
    ) -> None:
        self.once = once
        self.state = state
        self.inputs = inputs
        self.actions = actions

    def halve(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Change the named inputs from [plain; plain] to plain (forward pre-hook).

        Raises:
            RuntimeError: If the module is called directly and not by the model, so that its inputs were not doubled.
        """
        if "halve" not in self.actions():
            return None
        if self._inside_a_pass():
            return _change_inputs(self._halve, self.once.inputs, self.inputs, args, named)
        if module.training:
            raise RuntimeError(
                f"Expected a call of the model that BatchFormer was inserted into, got one of its part "
                f"{self.once.name!r} alone, in training. Call the model, or call the part in eval()."
            )
        return None

    def repeat(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Change all outputs from plain to [plain; plain] (forward hook)."""
        return _repeat_tensors(output) if "repeat" in self.actions() and self._inside_a_pass() else None

    def _inside_a_pass(self) -> bool:
        return self.state.running or self.once.rerun

    def _halve(self, value: Any) -> Any:
        # A tensor with one row holds for every sample, so it stays as it is.
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] == 1:
            return value
        plain, _ = split(value)
        if self.state.running and self.state.rows is None:
            self.state.rows = plain.shape[0]
        return plain


def _by_name(inputs: tuple[str, ...], args: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(inputs, args, strict=False)), **named}


def _change_inputs(
    change: Callable[[Any], Any],
    names: tuple[str, ...],
    inputs: tuple[str, ...],
    args: tuple[Any, ...],
    named: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Apply ``change`` to the inputs of these names, passed by position or by name."""
    args = tuple(
        change(value) if index < len(inputs) and inputs[index] in names else value for index, value in enumerate(args)
    )
    return args, {name: change(value) if name in names else value for name, value in named.items()}


def _double(value: Any) -> Any:
    """Repeat along the batch axis; integers are counts of rows and are doubled."""
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, Tensor) and value.dim() == 0):
        return 2 * value
    return expand(value)


def _repeat_tensors(output: Any) -> Any:
    """Repeat the rows of every tensor in an output; lists and tuples hold several outputs here."""
    if isinstance(output, Tensor):
        return expand(output)
    if isinstance(output, Mapping):
        return type(output)({key: _repeat_tensors(value) for key, value in output.items()})  # type: ignore[call-arg]
    if isinstance(output, tuple | list):
        return make_sequence_like(output, [_repeat_tensors(value) for value in output])
    return output


def input_names(module: nn.Module) -> tuple[str, ...]:
    """List the names of the inputs of a module, which may be passed by position or by name."""
    return tuple(inspect.signature(module.forward).parameters)


def hooks_in(model: nn.Module) -> list[InsertionHook]:
    """List all insertion hooks in a model, whichever insertion registered them."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, InsertionHook)]
