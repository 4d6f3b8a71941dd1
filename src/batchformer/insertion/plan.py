"""Points of insertion, and what an insertion changes in a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from batchformer.core.modules import Layout


@dataclass(frozen=True)
class InsertionPoint:
    """A point in a model where a module is inserted: before or after the module of that name.

    Attributes:
        name: Dotted name of the module in the model.
        where: ``"before"`` mixes the input of that module, ``"after"`` its output.
    """

    name: str
    where: Literal["before", "after"]

    def __str__(self) -> str:
        return f"{self.where} {self.name!r}"


@dataclass(frozen=True)
class RunOnce:
    """A module that runs once for both streams, inside a model whose inputs are doubled at the top.

    Its named inputs, [plain; plain], are halved and its outputs repeated, so that nothing is computed twice.

    Attributes:
        name: Dotted name of the module.
        inputs: Names of the inputs that are halved.
        upstream: Names of modules that run before this one and may themselves be insertion points. After such a point
            the two streams differ, so this module runs on both.
        rerun: True if activation checkpointing may run it again, outside the model's own forward pass.
    """

    name: str
    inputs: tuple[str, ...]
    upstream: tuple[str, ...] = ()
    rerun: bool = False


@dataclass(frozen=True)
class InsertionPlan:
    """The points of an insertion, and what is doubled together with the batch.

    Attributes:
        points: Points of insertion, in the order of the model.
        doubled_inputs: Name of a module -> names of its keyword inputs that are doubled with the batch; ``""`` is the
            model itself (its ``labels``, if it computes its own loss).
        layout: Layout of the features at the points, if it is not the default.
        run_once: Modules that run once for both streams, before the first point; only in models whose own inputs are
            doubled.
        padding: Function that reads the padding, boolean (rows, tokens), from the named inputs of the module at a
            point; ``None`` if there is no padding.
        layered: Names of outputs whose first axis, or list, is not one of samples, see :func:`batchformer.split`.
    """

    points: tuple[InsertionPoint, ...]
    doubled_inputs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    layout: Layout | None = None
    run_once: tuple[RunOnce, ...] = ()
    padding: Callable[[Mapping[str, Any]], Tensor | None] | None = None
    layered: tuple[str, ...] = ()


class Adapter(Protocol):
    """Interface of a module of :mod:`batchformer.insertion.adapters`, which knows the models of one library."""

    def find_classifier(self, model: nn.Module) -> InsertionPlan:
        """Plan an insertion before the classifier, for ``before="auto"``."""
        ...

    def plan(self, model: nn.Module, points: tuple[InsertionPoint, ...]) -> InsertionPlan:
        """Plan an insertion at these points: what is doubled together with the batch."""
        ...
