"""Which tasks there are, and where their parts are; a part is imported when a recipe or a run asks for it."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

TASKS = {
    "longtail": ("batchformer.tasks.longtail.task:LongTailTask", "batchformer.tasks.longtail.data:LongTailData"),
    "detection": ("batchformer.tasks.detection.task:DetectionTask", "batchformer.tasks.detection.data:DetectionData"),
    "panoptic": ("batchformer.tasks.panoptic.task:PanopticTask", "batchformer.tasks.panoptic.data:PanopticData"),
}
"""Task -> its LightningModule (a :class:`batchformer.tasks.training.contract.TaskModule`), its LightningDataModule."""


def task_classes(task: str) -> "tuple[type[LightningModule], type[LightningDataModule]]":
    """The module and the data module of a task.

    Raises:
        ImportError: When a package is missing; names the extra.

    Example:
        >>> [one.__name__ for one in task_classes("longtail")]
        ['LongTailTask', 'LongTailData']
    """

    def found(place: str) -> Any:
        module, _, name = place.partition(":")
        return getattr(_imported(module, task), name)

    module, data = TASKS[task]
    return found(module), found(data)


def task_part(task: str, part: str) -> ModuleType:
    """``tasks/<task>/<part>.py``: ``restore`` or ``predict``.

    Raises:
        ImportError: When a package is missing; names the extra.
    """
    return _imported(f"batchformer.tasks.{task}.{part}", task)


def _imported(module: str, task: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if str(error.name).startswith("batchformer"):
            raise
        raise ImportError(f"{error.name} is missing: pip install 'batchformer[{task}]'") from error
