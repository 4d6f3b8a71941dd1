"""Modules of a model by name, the width at a point of insertion, and the classifier of a model."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from torch import nn

from batchformer.core.streams import MixedStream

from .plan import InsertionPoint

_INPUTS = ("in_features", "in_channels", "num_features", "normalized_shape")
_OUTPUTS = ("out_features", "out_channels", "num_features", "normalized_shape")


def find_points(
    model: nn.Module, names: str | Sequence[str], where: Literal["before", "after"]
) -> tuple[InsertionPoint, ...]:
    """Find the modules of these names, in the order of the model; ``*`` matches one part of a dotted name.

    A module with several names is one point, under its first name.

    Raises:
        ValueError: For a name that matches nothing, with the nearest names.
    """
    first_name = {id(module): name for name, module in model.named_modules() if name}
    known = {name: first_name[id(m)] for name, m in model.named_modules(remove_duplicate=False) if name}
    found: set[str] = set()
    for wanted in [names] if isinstance(names, str) else names:
        pattern = re.compile(re.escape(wanted).replace(r"\*", r"[^.]*"))
        matches = [first for name, first in known.items() if pattern.fullmatch(name)]
        if not matches:
            near = difflib.get_close_matches(wanted, known, n=5, cutoff=0.4) or list(known)[-5:]
            raise ValueError(
                f"Expected the name of a module of the model, but nothing matches {wanted!r}. The nearest names are "
                f"{near}."
            )
        found.update(matches)
    if not found:
        raise ValueError("Expected at least one module name, got none.")
    return tuple(InsertionPoint(name, where) for name in first_name.values() if name in found)


def offered_classifiers(model: nn.Module) -> list[nn.Module]:
    """List what ``model.get_classifier()`` returns (a module, or modules in tuples and lists); empty without it."""

    def flatten(found: Any) -> list[nn.Module]:
        if isinstance(found, tuple | list | nn.ModuleList):
            return [module for part in found for module in flatten(part)]
        return [found]

    return flatten(model.get_classifier()) if callable(getattr(model, "get_classifier", None)) else []  # type: ignore[operator]


def points_before(model: nn.Module, modules: Iterable[nn.Module]) -> tuple[InsertionPoint, ...]:
    """Make the points before these modules of ``model``."""
    return tuple(InsertionPoint(name_of(model, module), "before") for module in modules)


def last_linear(model: nn.Module, head: nn.Module | None = None) -> str:
    """Find the one ``Linear`` that no module with parameters follows.

    Args:
        model: The whole model.
        head: Part of the model that is known to be one head, to search there alone.

    Returns:
        Its dotted name in ``model``.

    Raises:
        ValueError: If the last module with parameters is no ``Linear``, or if another head may stand beside it.
    """
    leaves = _leaves(model if head is None else head)
    last = leaves[-1] if leaves else None
    if not isinstance(last, nn.Linear):
        if last is None:
            raise no_classifier(model, "no module has parameters")
        raise no_classifier(model, f"its last module with parameters is {name_of(model, last)!r}, which is no Linear")
    if others := _other_heads(model if head is None else head, last, one_head=head is not None):
        names = ", ".join(repr(name_of(model, other)) for other in others)
        raise no_classifier(model, f"{names} may stand beside {name_of(model, last)!r}: there may be several heads")
    return name_of(model, last)


def _other_heads(part: nn.Module, last: nn.Linear, *, one_head: bool) -> list[nn.Linear]:
    """List the ends of earlier branches that may be heads beside ``last``.

    Only an ``nn.Sequential`` says in which order its parts run. Elsewhere an earlier branch that ends in a ``Linear``
    surely runs before ``last`` only if a later branch takes its width; in ``one_head``, whose layers are a chain, only
    if the next branch does. Even then it may be another head if it is of the same class and input width as the branch
    of ``last``: a hidden layer of C channels and a head for C classes look alike. In ``one_head`` it is a hidden layer.
    """
    found: list[nn.Linear] = []
    while part is not last:
        branches = [child for child in part.children() if _leaves(child)]
        branch = next(child for child in reversed(branches) if last in child.modules())
        widths = [_width(_leaves(child), _INPUTS) for child in branches]
        for index, child in enumerate([] if isinstance(part, nn.Sequential) else branches[: branches.index(branch)]):
            later = widths[index + 1 : index + 2] if one_head else widths[index + 1 :]
            alike = type(child) is type(branch) and widths[index] == widths[branches.index(branch)]
            end = _leaves(child)[-1]
            if isinstance(end, nn.Linear) and (end.out_features not in later or (alike and not one_head)):
                found.append(end)
        part = branch
    return found


def name_of(model: nn.Module, wanted: nn.Module) -> str:
    """Find the dotted name of a module inside ``model``.

    Raises:
        ValueError: If it is not there, or has no parameters (``num_classes=0`` leaves an ``Identity``).
    """
    if not any(True for _ in wanted.parameters()):
        raise no_classifier(model, f"its classifier has no parameters (class {type(wanted).__name__})")
    for name, module in model.named_modules():
        if module is wanted:
            return str(name)
    raise ValueError(f"Expected a module of the model, got a {type(wanted).__name__} that is not inside it.")


def width_of(model: nn.Module, point: InsertionPoint) -> int:
    """Read the channels at a point: the input width of the first module with parameters there, or the output width of
    the last.

    Raises:
        ValueError: If no module there tells it.
    """
    leaves = [m for m in model.get_submodule(point.name).modules() if _has_own_parameters(m)]
    width = _width(leaves, _INPUTS) if point.where == "before" else _width(leaves[::-1], _OUTPUTS)
    if width is None:
        raise ValueError(
            f"Expected to read the width {point} from the model, but no module there tells it. Pass dim=..."
        )
    return width


def no_classifier(model: nn.Module, why: str) -> ValueError:
    """Make the error for ``before="auto"``, with the candidates."""
    candidates = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][-8:]
    way = f"Name the module: before=... with one of {candidates}."
    if not candidates:
        parts = [name for name, m in model.named_children() if any(True for _ in m.parameters())][-8:]
        way = f"It has no Linear. Name another module, before=... or after=..., out of {parts}." if parts else ""
    return ValueError(f"Expected a model with one classifier for before='auto', but {why}. {way}".strip())


def _leaves(part: nn.Module) -> list[nn.Module]:
    """List the modules with parameters of their own, in the order of the model, without those that were inserted."""
    ours = {id(m) for module in part.modules() if isinstance(module, MixedStream) for m in module.modules()}
    return [m for m in part.modules() if _has_own_parameters(m) and id(m) not in ours]


def _has_own_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def _width(leaves: list[nn.Module], attributes: tuple[str, ...]) -> int | None:
    for leaf in leaves:
        for attribute in attributes:
            value = getattr(leaf, attribute, None)
            if isinstance(value, tuple) and value:
                value = value[-1]
            if isinstance(value, int):
                return value
    return None
