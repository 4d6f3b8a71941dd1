"""Arms of an honest comparison: the plain network, the method, and controls that take one thing away from it."""

import inspect
from typing import Any, Literal, get_args

from torch import Tensor, nn

from batchformer.core.cpu_kernels import dropout
from batchformer.core.streams import MixedStream
from batchformer.insertion.handle import Handle
from batchformer.insertion.insert import insert, insert_module

Arm = Literal["plain", "batchformer", "frozen", "self_only", "duplicate", "single_stream"]

ARMS: tuple[str, ...] = get_args(Arm)
"""Names of the arms in the order of tables: the plain network, the method, the controls."""


class DropoutStream(MixedStream):
    """Mixed stream that is a copy of the plain one with dropout only: the control ``duplicate``.

    Args:
        drop: Dropout probability in [0, 1].

    Example:
        >>> import torch
        >>> DropoutStream(0.5)(torch.ones(2, 3)).shape
        torch.Size([4, 3])
    """

    def __init__(self, drop: float = 0.5) -> None:
        super().__init__("two_stream")
        # A module of its own holds the rate and follows eval(), also where this one is switched to training alone.
        self.dropout = nn.Dropout(drop)

    def mix(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return ``x`` with dropout; a mask has no effect."""
        return dropout(x, self.dropout.p if self.dropout.training else 0.0)

    def extra_repr(self) -> str:
        """Return the setting that ``print`` and ``describe`` show."""
        return f"dropout {self.dropout.p} alone"


def insert_arm(model: nn.Module, arm: Arm, **arguments: Any) -> Handle | None:
    """Insert the module of an arm into a model.

    Args:
        model: Model to change in place.
        arm: ``"plain"`` inserts nothing. ``"batchformer"`` is the method. ``"frozen"`` is a random module that is never
            trained. ``"self_only"`` is the same layer, trained, in which each sample attends to itself alone: the
            difference to it shows whether the relations *between* samples matter. ``"duplicate"`` is a second stream
            with dropout only, no layer, for any ``mode``. ``"single_stream"`` is the mixed features alone, without the
            plain stream; with ``mode="single_stream"`` this is the method itself.
        arguments: Arguments of :func:`batchformer.insert`.

    Returns:
        Handle of the insertion, ``None`` for the plain arm.

    Raises:
        ValueError: For an unknown arm.
        TypeError: For arguments that :func:`batchformer.insert` does not have.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> handle = insert_arm(model, "frozen", before="auto")
        >>> any(p.requires_grad for p in handle.modules[0].parameters())
        False
    """
    if arm not in ARMS:
        raise ValueError(f"Expected arm to be one of {ARMS}, got {arm!r}.")
    if arm == "plain":
        return None
    if arm == "duplicate":
        return _insert_duplicate(model, arguments)
    changes = {"self_only": {"attend": "self"}, "single_stream": {"mode": "single_stream"}}
    handle = insert(model, **{**arguments, **changes.get(arm, {})})
    if arm == "frozen":
        for module in handle.modules:
            module.freeze()
    return handle


def _insert_duplicate(model: nn.Module, arguments: dict[str, Any]) -> Handle:
    given = inspect.signature(insert).bind(model, **arguments)
    given.apply_defaults()
    drop = given.arguments["drop"]
    where = {name: given.arguments[name] for name in ("before", "after", "share", "padding", "dim")}
    return insert_module(model, lambda width, layout: DropoutStream(drop), **where)
