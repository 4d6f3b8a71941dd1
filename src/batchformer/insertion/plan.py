"""Points of insertion, and what an insertion changes in a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    """A point of insertion: in front of, or behind, the module of that name."""

    name: str
    where: Literal["before", "after"]

    def __str__(self) -> str:
        return f"{self.where} {self.name!r}"


@dataclass(frozen=True)
class Once:
    """A module that works once for both streams, inside a model whose inputs are doubled at the top.

    Its named inputs, [plain; plain], are halved and its outputs repeated, so that nothing is computed twice.

    Attributes:
        name: Of the module.
        inputs: Names of the inputs that are halved.
        behind: Modules in front of it, of which any may be a place of insertion: from such a place on both streams
            differ, and this module works on both.
        rerun: Whether activation checkpointing may run it again, outside the model's own forward pass.
    """

    name: str
    inputs: tuple[str, ...]
    behind: tuple[str, ...] = ()
    rerun: bool = False


@dataclass(frozen=True)
class Plan:
    """Where the module goes and what must follow the doubled batch.

    Attributes:
        places: Points of insertion, in the order of the model.
        companions: Module name -> names of keyword inputs that are doubled with the batch; ``""`` is the model
            itself (its ``labels``, where it computes its own loss).
        layer: Arguments of :class:`batchformer.BatchFormer` that this model needs (``layout`` for maps).
        once: Where the model's own inputs are among the companions: what works once, in front of the first place.
        padding: Reads the padding, boolean (rows, tokens), off the named inputs of the module at a place; ``None``
            is no padding.
        layered: Names of outputs whose first axis, or list, is not one of samples, see :func:`batchformer.split`.
    """

    places: tuple[Place, ...]
    companions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    layer: dict[str, Any] = field(default_factory=dict)
    once: tuple[Once, ...] = ()
    padding: Callable[[Mapping[str, Any]], Tensor | None] | None = None
    layered: tuple[str, ...] = ()


class Adapter(Protocol):
    """What a module of :mod:`batchformer.insertion.adapters` offers."""

    def find_classifier(self, model: nn.Module) -> Plan:
        """The plan for ``before="auto"``."""
        ...

    def plan(self, model: nn.Module, places: tuple[Place, ...]) -> Plan:
        """The plan for ``places``: what follows the batch when the module goes there."""
        ...
