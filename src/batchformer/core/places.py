"""Where to insert: names of modules, the width there, and the classifier of a model.

Libraries' own habits live in :mod:`batchformer.adapters`, one module for each, imported only when a model of that
library arrives.
"""

import difflib
import importlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, cast

from torch import nn

# Top-level package of a model's class -> the module that knows such models (it has `find_classifier(model) -> Plan`).
ADAPTERS: dict[str, str] = {
    "timm": "batchformer.adapters.timm",
    "torchvision": "batchformer.adapters.torchvision",
    "transformers": "batchformer.adapters.transformers",
}


@dataclass(frozen=True)
class Place:
    """A point of insertion: in front of, or behind, the module of that name."""

    name: str
    where: Literal["before", "after"]

    def __str__(self) -> str:
        return f"{self.where} {self.name!r}"


@dataclass(frozen=True)
class Plan:
    """Where the module goes and what must follow the doubled batch.

    Attributes:
        places: Points of insertion, in the order of the model.
        companions: Module name -> names of keyword inputs that are doubled with the batch; ``""`` is the model
            itself (its ``labels``, where it computes its own loss).
        layer: Arguments of :class:`batchformer.BatchFormer` that this model needs (``layout`` for maps).
    """

    places: tuple[Place, ...]
    companions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    layer: dict[str, Any] = field(default_factory=dict)


class Adapter(Protocol):
    """What a module of :mod:`batchformer.adapters` offers."""

    def find_classifier(self, model: nn.Module) -> Plan:
        """The plan for ``before="auto"``."""
        ...

    def companions(self, model: nn.Module, places: Sequence[Place]) -> dict[str, tuple[str, ...]]:
        """What follows the batch when the module goes to ``places``."""
        ...


def adapter_of(model: nn.Module) -> Adapter | None:
    """The adapter for the library that ``model``'s class, or one of its bases, comes from."""
    for cls in type(model).__mro__:
        package = cls.__module__.partition(".")[0]
        if package in ADAPTERS:
            return cast(Adapter, importlib.import_module(ADAPTERS[package]))
    return None


def find_places(model: nn.Module, names: str | Sequence[str], where: Literal["before", "after"]) -> Plan:
    """The modules that ``names`` stand for; ``*`` stands for one part of a dotted name.

    Raises:
        ValueError: For a name that matches nothing, with the nearest ones.
    """
    known = [name for name, _ in model.named_modules() if name]
    found: set[str] = set()
    for wanted in [names] if isinstance(names, str) else names:
        pattern = re.compile(re.escape(wanted).replace(r"\*", r"[^.]+"))
        matches = [name for name in known if pattern.fullmatch(name)]
        if not matches:
            near = difflib.get_close_matches(wanted, known, n=5, cutoff=0.4) or known[-5:]
            raise ValueError(f"Expected the name of a module, but nothing matches {wanted!r}. Near to it: {near}.")
        found.update(matches)
    if not found:
        raise ValueError("Expected at least one module name, got none.")
    places = tuple(Place(name, where) for name in known if name in found)
    adapter = adapter_of(model)
    return Plan(places, {} if adapter is None else adapter.companions(model, places))


def find_classifier(model: nn.Module) -> Plan:
    """The classifier of a model: by its library's adapter, by ``get_classifier()``, or as its one last ``Linear``.

    Raises:
        ValueError: When it is ambiguous or missing, with the candidates.
    """
    adapter = adapter_of(model)
    if adapter is not None:
        return adapter.find_classifier(model)
    if callable(getattr(model, "get_classifier", None)):
        found = model.get_classifier()  # type: ignore[operator]
        modules = tuple(found) if isinstance(found, tuple | list | nn.ModuleList) else (found,)
        return Plan(tuple(Place(name_of(model, module), "before") for module in modules))
    return Plan((Place(last_linear(model), "before"),))


def last_linear(model: nn.Module, inside: str = "") -> str:
    """Name of the one ``Linear`` that nothing with parameters comes after.

    Args:
        model: The whole model.
        inside: Name of a part to look in; all of the model by default.

    Raises:
        ValueError: When the last module with parameters is no ``Linear``, or another ``Linear`` has the same input
            width and sits beside it (two heads).
    """
    part = model.get_submodule(inside)
    prefix = f"{inside}." if inside else ""
    leaves = [(prefix + n if n else inside, m) for n, m in part.named_modules() if _is_leaf(m)]
    linears = [name for name, m in leaves if isinstance(m, nn.Linear)]
    last = leaves[-1] if leaves else None
    if last is None or not isinstance(last[1], nn.Linear):
        raise _ambiguous(linears, f"its last module with parameters is {last[0] if last else 'nothing'!r}")
    if len(leaves) > 1 and isinstance(leaves[-2][1], nn.Linear):
        beside = leaves[-2][1]
        if beside.in_features == last[1].in_features and beside.out_features != last[1].in_features:
            raise _ambiguous(linears, f"{leaves[-2][0]!r} and {last[0]!r} read the same features")
    return last[0]


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The dotted name of a module inside ``model``.

    Raises:
        ValueError: When it is not there, or has no parameters (``num_classes=0`` leaves an ``Identity``).
    """
    if not any(True for _ in wanted.parameters()):
        raise _ambiguous(
            [name for name, m in model.named_modules() if isinstance(m, nn.Linear)],
            f"it has no classifier (a {type(wanted).__name__} stands there)",
        )
    for name, module in model.named_modules():
        if module is wanted:
            return name
    raise ValueError(f"Expected a module of the model, got a {type(wanted).__name__} that is not inside it.")


def width_of(model: nn.Module, place: Place) -> int:
    """Channels at a place: the input width of the first, or the output width of the last, module with parameters.

    Raises:
        ValueError: When no module there tells.
    """
    leaves = [m for m in model.get_submodule(place.name).modules() if _is_leaf(m)]
    attributes = ("in_features", "in_channels", "num_features", "normalized_shape")
    if place.where == "after":
        leaves.reverse()
        attributes = ("out_features", "out_channels", "num_features", "normalized_shape")
    for leaf in leaves:
        for attribute in attributes:
            value = getattr(leaf, attribute, None)
            if isinstance(value, tuple) and value:
                value = value[-1]
            if isinstance(value, int):
                return value
    raise ValueError(f"Expected to read the width {place} off the model, but no module there tells it. Pass dim=...")


def _is_leaf(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _ambiguous(candidates: Iterable[str], why: str) -> ValueError:
    shown = list(candidates)[-8:]
    return ValueError(
        f"Expected a model with one classifier for before='auto', but {why}. Name it: before=... with one of {shown}."
    )
