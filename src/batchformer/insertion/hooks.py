"""What runs at the points of insertion: hooks, as methods of plain objects, so that a model with them can be copied and
pickled, and what the points of one forward pass know of each other."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from batchformer.core import streams
from batchformer.core.modules import BatchFormer

from .plan import Once, Place

T = TypeVar("T")
Role = Literal["first", "later"]
Padding = Callable[[Mapping[str, Any]], Tensor | None]


@dataclass(eq=False)
class Pass:
    """What the points of one forward pass know of each other; all insertions into one model share it."""

    running: bool = False  # between the start and the end of the model's own forward pass
    rows: int | None = None  # samples before the doubling
    roles: dict[Place, set[Role]] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget the pass before."""
        self.running, self.rows, self.roles = True, None, {}

    def role(self, place: Place, rows: int) -> Role:
        """Whether the batch doubles at this place, which sees ``rows`` rows, or did so before.

        Raises:
            ValueError: When the rows are neither those of the first place nor twice as many.
        """
        settled = self.roles.setdefault(place, set())
        if not self.running and len(settled) == 1:
            # Activation checkpointing runs a point again, perhaps after a later pass with other rows.
            return next(iter(settled))
        if self.rows is None:
            self.rows = rows
        if rows not in (self.rows, 2 * self.rows):
            raise ValueError(
                f"Expected {self.rows} or {2 * self.rows} rows {place}, got {rows}: between two points of insertion "
                "the model changes the batch. Insert at places that see the same samples."
            )
        role: Role = "first" if rows == self.rows else "later"
        settled.add(role)
        return role


class Point:
    """One place of insertion: the hook that runs there.

    Args:
        place: Where.
        module: What runs there.
        state: Shared by all points of the model.
        inputs: Names of the inputs of the module at the place, in the order of positions.
        padding: Reads the padding off them, see :class:`batchformer.insertion.plan.Plan`.
    """

    def __init__(
        self, place: Place, module: BatchFormer, state: Pass, inputs: tuple[str, ...], padding: Padding | None = None
    ) -> None:
        self.place = place
        self.module = module
        self.state = state
        self.inputs = inputs
        self.padding = padding

    def before(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Forward pre-hook: mixes the first input."""
        if not self.module.training:
            return None
        padding = self._padding(args, named)
        if args:
            return (self.mix(args[0], padding), *args[1:]), named
        name = next((name for name in (*self.inputs, *named) if name in named), "")
        return args, {**named, name: self.mix(named.get(name), padding)}

    def after(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        """Forward hook: mixes the output, or the first of several."""
        if not self.module.training:
            return None
        padding = self._padding(args, named)
        if isinstance(output, tuple | list) and output:
            return streams._rebuild(output, [self.mix(output[0], padding), *output[1:]])
        return self.mix(output, padding)

    def mix(self, x: Any, padding: Tensor | None = None) -> Tensor:
        """N rows -> the module's output; [plain; mixed] -> [plain; mixed again].

        Raises:
            TypeError: When there is no tensor here.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"Expected a tensor {self.place}, got {type(x).__name__}. Insert at another place.")
        if padding is None and self.padding is not None and self.module.gather == "all":
            # Ranks must agree on having a mask, and another one's batch may be padded.
            padding = torch.zeros(x.shape[:-1], dtype=torch.bool, device=x.device)
        # By a call of the module, so that wrappers of it (FSDP) do their part.
        later = self.state.role(self.place, x.shape[0]) == "later"
        out: Tensor = self.module(x, mask=padding, doubled=later)
        return out

    def _padding(self, args: tuple[Any, ...], named: dict[str, Any]) -> Tensor | None:
        if self.padding is None:
            return None
        return self.padding({**dict(zip(self.inputs, args, strict=False)), **named})


class Companions:
    """Doubles named inputs (labels, masks, positions) of a module that gets doubled features."""

    def __init__(self, names: tuple[str, ...], inputs: tuple[str, ...], doubles: Callable[[], bool]) -> None:
        self.names = names
        self.inputs = inputs
        self.doubles = doubles

    def double(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Forward pre-hook: doubles the named inputs, however they come."""
        if not self.doubles():
            return None
        self._check_lists({**dict(zip(self.inputs, args, strict=False)), **named})
        return _change(_twice, self.names, self.inputs, args, named)

    def _check_lists(self, given: Mapping[str, Any]) -> None:
        """Labels that were doubled before would be so twice, and fail far inside the model's loss.

        Raises:
            ValueError: When a list has more or fewer entries than the tensors beside it have rows.
        """
        values = {name: given[name] for name in self.names if name in given}
        rows = next((x.shape[0] for x in values.values() if isinstance(x, Tensor) and x.dim() > 0), None)
        for name, value in values.items():
            if isinstance(value, list) and rows is not None and len(value) != rows:
                raise ValueError(
                    f"Expected {name} with one entry for each of the {rows} samples, got {len(value)}. Give those of "
                    "the batch as they are: they are doubled here, together with it."
                )


class Shared:
    """Lets a module work once for both streams, see :class:`batchformer.insertion.plan.Once`.

    Args:
        once: Which module, which inputs.
        state: Shared by all points of the model.
        inputs: Names of the module's inputs, in the order of positions.
        works_once: ``()``: on both streams this time; ``("halve",)``: once, and a point behind it doubles its output;
            ``("halve", "repeat")``: once.
    """

    def __init__(
        self, once: Once, state: Pass, inputs: tuple[str, ...], works_once: Callable[[], tuple[str, ...]]
    ) -> None:
        self.once = once
        self.state = state
        self.inputs = inputs
        self.works_once = works_once

    def halve(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Forward pre-hook: [plain; plain] -> plain in the named inputs.

        Raises:
            RuntimeError: When the module is called past the model, whose inputs then were not doubled.
        """
        if "halve" not in self.works_once():
            return None
        if self._inside_a_pass():
            return _change(self._half, self.once.inputs, self.inputs, args, named)
        if module.training:
            raise RuntimeError(
                f"Expected a call of the model that BatchFormer was inserted into, got one of its part "
                f"{self.once.name!r} alone, in training. Call the model, or call the part in eval()."
            )
        return None

    def repeat(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: plain -> [plain; plain] in all outputs."""
        return _repeat(output) if "repeat" in self.works_once() and self._inside_a_pass() else None

    def _inside_a_pass(self) -> bool:
        return self.state.running or self.once.rerun

    def _half(self, value: Any) -> Any:
        # One row holds for every sample, as it is.
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] == 1:
            return value
        plain, _ = streams.split(value)
        if self.state.running and self.state.rows is None:
            self.state.rows = plain.shape[0]
        return plain


def _change(
    change: Callable[[Any], Any],
    names: tuple[str, ...],
    inputs: tuple[str, ...],
    args: tuple[Any, ...],
    named: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Change the named inputs, however they come."""
    args = tuple(
        change(value) if index < len(inputs) and inputs[index] in names else value for index, value in enumerate(args)
    )
    return args, {name: change(value) if name in names else value for name, value in named.items()}


def _twice(value: Any) -> Any:
    """Rows repeated; a number among the companions is a count of rows."""
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, Tensor) and value.dim() == 0):
        return 2 * value
    return streams.expand(value)


def _repeat(output: Any) -> Any:
    """Every tensor inside an output with its rows repeated; lists and tuples hold several outputs here."""
    if isinstance(output, Tensor):
        return streams.expand(output)
    if isinstance(output, Mapping):
        return type(output)({key: _repeat(value) for key, value in output.items()})  # type: ignore[call-arg]
    if isinstance(output, tuple | list):
        return streams._rebuild(output, [_repeat(value) for value in output])
    return output


class Passenger(nn.Module):
    """Carries the module inside an ``nn.Sequential``, which would call it: passes its input on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: T) -> T:
        """The identity."""
        return x


def input_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the inputs of a module, which may come by position or by name."""
    return tuple(inspect.signature(module.forward).parameters)


def points_in(model: nn.Module) -> list[Point]:
    """All points of insertion inside a model, whoever put them there."""
    hooks = [hook for m in model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if isinstance(owner, Point)]
