"""Learning from the relations between the samples of a mini-batch.

The names load on first use, so that the command line's ``--help`` does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core import BatchFormer as BatchFormer
    from .core import BatchFormerWarning as BatchFormerWarning
    from .core import Handle as Handle
    from .core import describe as describe
    from .core import expand as expand
    from .core import handles as handles
    from .core import insert as insert
    from .core import param_groups as param_groups
    from .core import remove as remove
    from .core import split as split
    from .core import stream_loss as stream_loss

    BatchFormerV2 = BatchFormer

__version__ = "0.1.0"

__all__ = [
    "BatchFormer",
    "BatchFormerV2",
    "BatchFormerWarning",
    "Handle",
    "describe",
    "expand",
    "handles",
    "insert",
    "param_groups",
    "remove",
    "split",
    "stream_loss",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'batchformer' has no attribute {name!r}")
    from . import core

    # People search for BatchFormerV2: there is one layer and two ways to place it.
    value = core.BatchFormer if name == "BatchFormerV2" else getattr(core, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
