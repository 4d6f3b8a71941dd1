"""Knowledge about other people's models: one module for each library, imported when such a model arrives.

Each module offers ``find_classifier(model)`` and ``plan(model, points)``, see
:class:`batchformer.insertion.plan.Adapter`. The functions of the same names here ask the module of a model's library,
or plan for a model of no known library.
"""

import importlib
from typing import cast

from torch import nn

from batchformer.insertion.locate import last_linear, offered_classifiers, points_before
from batchformer.insertion.plan import Adapter, InsertionPlan, InsertionPoint

# Top-level package of a model's class -> the module that knows such models (an `Adapter`).
ADAPTERS: dict[str, str] = {
    "timm": "batchformer.insertion.adapters.timm",
    "torchvision": "batchformer.insertion.adapters.torchvision",
    "transformers": "batchformer.insertion.adapters.transformers",
}


def adapter_of(model: nn.Module) -> Adapter | None:
    """Find the adapter for the library that ``model``'s class, or one of its bases, comes from."""
    for cls in type(model).__mro__:
        package = cls.__module__.partition(".")[0]
        if package in ADAPTERS:
            return cast(Adapter, importlib.import_module(ADAPTERS[package]))
    return None


def find_classifier(model: nn.Module) -> InsertionPlan:
    """Find the classifier of a model: by its library's adapter, by ``get_classifier()``, or as its one last ``Linear``.

    Raises:
        ValueError: If it is ambiguous or missing, with the candidates.
    """
    adapter = adapter_of(model)
    if adapter is not None:
        return adapter.find_classifier(model)
    if offered := offered_classifiers(model):
        return InsertionPlan(points_before(model, offered))
    return InsertionPlan((InsertionPoint(last_linear(model), "before"),))


def plan(model: nn.Module, points: tuple[InsertionPoint, ...]) -> InsertionPlan:
    """Plan an insertion at these points of any model.

    Raises:
        ValueError: If the model's adapter cannot double the batch there, or if a point lies inside a part whose own
            inputs must be doubled.
    """
    adapter = adapter_of(model)
    if adapter is not None:
        return adapter.plan(model, points)
    _refuse_points_inside_detectors(model, points)
    return InsertionPlan(points)


def _refuse_points_inside_detectors(model: nn.Module, points: tuple[InsertionPoint, ...]) -> None:
    """Refuse points inside a part whose own inputs must be doubled: the insertion must know that part as the model."""
    for point in points:
        names = point.name.split(".")
        for end in range(1, len(names)):
            owner, inner = ".".join(names[:end]), InsertionPoint(".".join(names[end:]), point.where)
            part = model.get_submodule(owner)
            adapter = adapter_of(part)
            if adapter is not None and adapter.plan(part, (inner,)).run_once:
                raise ValueError(
                    f"Expected the {type(part).__name__} itself, got a {type(model).__name__} that holds it as "
                    f"{owner!r}. Insert into that part: insert(model.{owner}, {point.where}={inner.name!r})."
                )
