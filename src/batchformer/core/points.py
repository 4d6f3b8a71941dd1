"""What runs at the points of insertion: hooks, as methods of plain objects, so that a model with them can be copied and
pickled, and what the points of one forward pass know of each other."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from . import streams
from .modules import BatchFormer
from .places import Place

T = TypeVar("T")
Role = Literal["first", "later"]


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
    """One place of insertion: the hook that runs there."""

    def __init__(self, place: Place, module: BatchFormer, state: Pass, inputs: tuple[str, ...]) -> None:
        self.place = place
        self.module = module
        self.state = state
        self.inputs = inputs

    def before(self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Forward pre-hook: mixes the first input."""
        if not self.module.training:
            return None
        if args:
            return (self.mix(args[0]), *args[1:]), named
        name = next((name for name in (*self.inputs, *named) if name in named), "")
        return args, {**named, name: self.mix(named.get(name))}

    def after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: mixes the output, or the first of several."""
        if not self.module.training:
            return None
        if isinstance(output, tuple | list) and output:
            return streams._rebuild(output, [self.mix(output[0]), *output[1:]])
        return self.mix(output)

    def mix(self, x: Any) -> Tensor:
        """N rows -> the module's output; [plain; mixed] -> [plain; mixed again].

        Raises:
            TypeError: When there is no tensor here.
        """
        if not isinstance(x, Tensor):
            raise TypeError(f"Expected a tensor {self.place}, got {type(x).__name__}. Insert at another place.")
        # By a call of the module, so that wrappers of it (FSDP) do their part.
        out: Tensor = self.module(x, doubled=self.state.role(self.place, x.shape[0]) == "later")
        return out


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
        args = tuple(
            _twice(value) if index < len(self.inputs) and self.inputs[index] in self.names else value
            for index, value in enumerate(args)
        )
        return args, {name: _twice(value) if name in self.names else value for name, value in named.items()}


def _twice(value: Any) -> Any:
    """Rows repeated; a number among the companions is a count of rows."""
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, Tensor) and value.dim() == 0):
        return 2 * value
    return streams.expand(value)


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
