"""Where to insert: names of modules, the width there, and the classifier of a model.

Libraries' own habits live in :mod:`batchformer.insertion.adapters`, one module for each, imported only when a model
of that library arrives.
"""

import difflib
import importlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

from torch import nn

from batchformer.core.modules import BatchFormer

from .plan import Adapter, Place, Plan

# Top-level package of a model's class -> the module that knows such models (an `Adapter`, see below).
ADAPTERS: dict[str, str] = {
    "timm": "batchformer.insertion.adapters.timm",
    "torchvision": "batchformer.insertion.adapters.torchvision",
    "transformers": "batchformer.insertion.adapters.transformers",
}


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
    first_name = {id(module): name for name, module in model.named_modules() if name}
    # A module may have several names; it is one place, under its first name.
    known = {name: first_name[id(m)] for name, m in model.named_modules(remove_duplicate=False) if name}
    found: set[str] = set()
    for wanted in [names] if isinstance(names, str) else names:
        pattern = re.compile(re.escape(wanted).replace(r"\*", r"[^.]*"))
        matches = [first for name, first in known.items() if pattern.fullmatch(name)]
        if not matches:
            near = difflib.get_close_matches(wanted, known, n=5, cutoff=0.4) or list(known)[-5:]
            raise ValueError(f"Expected the name of a module, but nothing matches {wanted!r}. Near to it: {near}.")
        found.update(matches)
    if not found:
        raise ValueError("Expected at least one module name, got none.")
    places = tuple(Place(name, where) for name in first_name.values() if name in found)
    adapter = adapter_of(model)
    if adapter is not None:
        return adapter.plan(model, places)
    _refuse_inside_of_others(model, places)
    return Plan(places)


def _refuse_inside_of_others(model: nn.Module, places: tuple[Place, ...]) -> None:
    """Where the inputs of a model must be doubled at its top, the insertion must know the top."""
    for place in places:
        parts = place.name.split(".")
        for end in range(1, len(parts)):
            owner, inner = ".".join(parts[:end]), Place(".".join(parts[end:]), place.where)
            part = model.get_submodule(owner)
            adapter = adapter_of(part)
            if adapter is not None and adapter.plan(part, (inner,)).once:
                raise ValueError(
                    f"Expected the {type(part).__name__} itself, got a {type(model).__name__} that holds it as "
                    f"{owner!r}. Insert into that part: insert(model.{owner}, {place.where}={inner.name!r})."
                )


def find_classifier(model: nn.Module) -> Plan:
    """The classifier of a model: by its library's adapter, by ``get_classifier()``, or as its one last ``Linear``.

    Raises:
        ValueError: When it is ambiguous or missing, with the candidates.
    """
    adapter = adapter_of(model)
    if adapter is not None:
        return adapter.find_classifier(model)
    if offered := offered_classifiers(model):
        return Plan(places_before(model, offered))
    return Plan((Place(last_linear(model), "before"),))


def offered_classifiers(model: nn.Module) -> list[nn.Module]:
    """What ``model.get_classifier()`` gives (a module, or modules in tuples and lists), flat; empty without it."""

    def flat(found: Any) -> list[nn.Module]:
        if isinstance(found, tuple | list | nn.ModuleList):
            return [module for part in found for module in flat(part)]
        return [found]

    return flat(model.get_classifier()) if callable(getattr(model, "get_classifier", None)) else []  # type: ignore[operator]


def places_before(model: nn.Module, modules: Iterable[nn.Module]) -> tuple[Place, ...]:
    """Places in front of these modules of ``model``."""
    return tuple(Place(name_of(model, module), "before") for module in modules)


def last_linear(model: nn.Module, part: nn.Module | None = None) -> str:
    """Name of the one ``Linear`` that nothing with parameters comes after.

    Args:
        model: The whole model.
        part: The part of it to look in; all of it by default.

    Raises:
        ValueError: When the last module with parameters is no ``Linear``, when the run of ``Linear`` that it ends does
            not fit together, or, in a whole model, when another head may stand beside it.
    """
    whole, part = part is None, model if part is None else part
    ours = {id(m) for module in part.modules() if isinstance(module, BatchFormer) for m in module.modules()}
    leaves = [m for m in part.modules() if _is_leaf(m) and id(m) not in ours]
    last = leaves.pop() if leaves else None
    if last is None or not isinstance(last, nn.Linear):
        found = repr(name_of(model, last)) if last else "missing"
        raise no_classifier(model, f"its last module with parameters is {found}, no Linear")
    if whole and (rival := _rival(model, last, leaves)) is not None:
        names = name_of(model, rival), name_of(model, last)
        raise no_classifier(model, f"{names[0]!r} may stand beside {names[1]!r}: there may be several heads")
    linear = last
    while leaves and isinstance(before := leaves.pop(), nn.Linear):
        if before.out_features != linear.in_features:
            names = name_of(model, before), name_of(model, linear)
            raise no_classifier(model, f"{names[0]!r} does not lead into {names[1]!r}: there may be several heads")
        linear = before
    return name_of(model, last)


def _rival(model: nn.Module, last: nn.Linear, others: list[nn.Module]) -> nn.Linear | None:
    """The end of an earlier branch that may be another head, on the same features as the branch that ``last`` is in.

    Only an ``nn.Sequential`` says in which order its parts run. Elsewhere an earlier branch of the same input width
    that ends in a ``Linear`` is one that either leads nowhere (its output fits no such branch), or is just like this
    one and right in front of it, as two heads with as many classes as channels, or hidden layers, would be.
    """
    owner, branches = model, name_of(model, last).split(".")
    for name in branches:
        branch = owner.get_submodule(name)
        width = _width([m for m in branch.modules() if _is_leaf(m)], _INPUTS)
        earlier = [m for m in others if m not in set(branch.modules())]
        for child in [] if isinstance(owner, nn.Sequential) else owner.children():
            if child is branch:
                break
            inside = set(child.modules())
            leaves = [m for m in earlier if m in inside]
            if not leaves or not isinstance(end := leaves[-1], nn.Linear) or _width(leaves, _INPUTS) != width:
                continue
            if end.out_features != width or (type(child) is type(branch) and end is earlier[-1]):
                return end
        owner = branch
    return None


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """The dotted name of a module inside ``model``.

    Raises:
        ValueError: When it is not there, or has no parameters (``num_classes=0`` leaves an ``Identity``).
    """
    if not any(True for _ in wanted.parameters()):
        raise no_classifier(model, f"a {type(wanted).__name__} without parameters stands in its place")
    for name, module in model.named_modules():
        if module is wanted:
            return str(name)
    raise ValueError(f"Expected a module of the model, got a {type(wanted).__name__} that is not inside it.")


def width_of(model: nn.Module, place: Place) -> int:
    """Channels at a place: the input width of the first, or the output width of the last, module with parameters.

    Raises:
        ValueError: When no module there tells.
    """
    leaves = [m for m in model.get_submodule(place.name).modules() if _is_leaf(m)]
    width = _width(leaves, _INPUTS) if place.where == "before" else _width(leaves[::-1], _OUTPUTS)
    if width is None:
        raise ValueError(
            f"Expected to read the width {place} off the model, but no module there tells it. Pass dim=..."
        )
    return width


_INPUTS = ("in_features", "in_channels", "num_features", "normalized_shape")
_OUTPUTS = ("out_features", "out_channels", "num_features", "normalized_shape")


def _width(leaves: list[nn.Module], attributes: tuple[str, ...]) -> int | None:
    for leaf in leaves:
        for attribute in attributes:
            value = getattr(leaf, attribute, None)
            if isinstance(value, tuple) and value:
                value = value[-1]
            if isinstance(value, int):
                return value
    return None


def _is_leaf(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def no_classifier(model: nn.Module, why: str) -> ValueError:
    """The error for ``before="auto"``, with the candidates."""
    candidates = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][-8:]
    way = f"Name the module: before=... with one of {candidates}."
    if not candidates:
        parts = [name for name, m in model.named_children() if any(True for _ in m.parameters())][-8:]
        way = f"It has no Linear. Name another module, before=... or after=..., out of {parts}." if parts else ""
    return ValueError(f"Expected a model with one classifier for before='auto', but {why}. {way}".strip())
