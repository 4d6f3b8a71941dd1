"""The registry of tasks: those of this package, and those that other packages bring by an entry point.

A package adds a task by an entry point of the group ``batchformer.tasks`` in its ``pyproject.toml``::

    [project.entry-points."batchformer.tasks"]
    age = "my_package.task:AgeTask"

where ``AgeTask`` is a subclass of :class:`batchformer.tasks.training.task.Task`, the modules ``restore`` and
``predict`` beside it have ``exportable`` and ``predict``, and the folder ``recipes`` beside it has YAML files, which
``batchformer ls`` shows as ``age/<file>``.
"""

import functools
import importlib
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchformer.tasks.training.task import Task

OWN = {
    "longtail": "batchformer.tasks.longtail.task:LongTailTask",
    "detection": "batchformer.tasks.detection.task:DetectionTask",
    "panoptic": "batchformer.tasks.panoptic.task:PanopticTask",
}
"""Tasks of this package: name -> module and class."""

GROUP = "batchformer.tasks"


@functools.cache
def tasks() -> dict[str, str]:
    """Return every known task, name -> module and class; nothing of them is imported.

    Raises:
        ValueError: When an entry point takes the name of another task.

    Example:
        >>> tasks()["longtail"]
        'batchformer.tasks.longtail.task:LongTailTask'
    """
    found = dict(OWN)
    for entry in metadata.entry_points(group=GROUP):
        if found.get(entry.name, entry.value) != entry.value:
            raise ValueError(
                f"Expected one task of each name, but the entry point {entry.value!r} calls itself {entry.name!r}, as "
                f"{found[entry.name]!r} does. Uninstall one of the two packages, or rename its entry point."
            )
        found[entry.name] = entry.value
    return found


def task_class(task: str) -> "type[Task]":
    """Import the class of a task.

    Raises:
        ImportError: When a package is missing, with the extra that brings it; when there is no such class.

    Example:
        >>> task_class("longtail").__name__
        'LongTailTask'
    """
    from batchformer.tasks.training.task import Task

    module, _, name = tasks()[task].partition(":")
    found = getattr(_imported(module, task), name, None)
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ImportError(
            f"Expected a subclass of batchformer.tasks.training.task.Task at {tasks()[task]!r}, the place of the task "
            f"{task!r}, got {'nothing' if found is None else repr(found)}. Mend the entry point of its package."
        )
    return found


def task_part(task: str, part: str) -> ModuleType:
    """Import a module that stands beside the class of a task: ``restore`` or ``predict``.

    Raises:
        ImportError: When a package is missing; names the extra that brings it.
    """
    package = tasks()[task].partition(":")[0].rpartition(".")[0]
    return _imported(f"{package}.{part}", task)


def recipe_folders() -> list[tuple[str, Path]]:
    """Return the folders of recipes: the prefix of their names, and the folder. No task is imported."""
    folders = [("", Path(__file__).parents[1] / "recipes")]
    for task, place in tasks().items():
        if task not in OWN and (spec := util.find_spec(place.partition(":")[0].partition(".")[0])) is not None:
            inside = place.partition(":")[0].split(".")[1:-1]
            roots = [Path(root).joinpath(*inside, "recipes") for root in spec.submodule_search_locations or ()]
            folders += [(f"{task}/", root) for root in roots if root.is_dir()]
    return folders


def _imported(module: str, task: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        own = module.partition(".")[0]
        if str(error.name).partition(".")[0] == own and util.find_spec(own) is not None:
            raise  # a defect inside the package, which is there
        raise ImportError(f"{error.name} is missing: pip install '{own}[{task}]'") from error
