"""The arms of an honest comparison: the plain network, the method, and controls that take one thing away from it."""

from typing import Any, Literal, get_args

from torch import nn

from batchformer.insertion.handle import Handle
from batchformer.insertion.insert import insert

Arm = Literal["plain", "batchformer", "frozen", "self_only", "duplicate", "single_stream"]

ARMS: tuple[str, ...] = get_args(Arm)
"""In the order of tables: the plain network, the method, the controls."""


def insert_arm(model: nn.Module, arm: Arm, **arguments: Any) -> Handle | None:
    """Insert what an arm needs.

    Args:
        model: Changed in place.
        arm: ``"plain"``: nothing. ``"batchformer"``: the method. ``"frozen"``: a random module that is never trained.
            ``"self_only"``: the same layer, trained, in which each sample attends to itself alone: whether the
            relations *between* samples matter shows in the difference to it. ``"duplicate"``: a second stream with
            dropout only, no layer, whatever ``mode`` says. ``"single_stream"``: the mixed features alone, without the
            plain stream; with ``mode="single_stream"`` this is the method itself.
        arguments: Of :func:`batchformer.insert`.

    Returns:
        The handle, ``None`` for the plain arm.

    Raises:
        ValueError: For an unknown arm.

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
    changes: dict[str, dict[str, Any]] = {
        "self_only": {"attend": "self"},
        "duplicate": {"attend": "nothing", "mode": "two_stream"},
        "single_stream": {"mode": "single_stream"},
    }
    handle = insert(model, **{**arguments, **changes.get(arm, {})})
    if arm == "frozen":
        for module in handle.modules:
            module.freeze()
    return handle
