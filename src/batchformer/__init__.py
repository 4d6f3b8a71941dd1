"""Learning from the relations between the samples of a mini-batch.

The public names load on first use, so that the command line's ``--help`` does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .core import BatchFormer as BatchFormer
    from .core import BatchFormerWarning as BatchFormerWarning
    from .core import expand as expand
    from .core import split as split
    from .core import stream_loss as stream_loss
    from .insertion import Handle as Handle
    from .insertion import describe as describe
    from .insertion import handles as handles
    from .insertion import insert as insert
    from .insertion import param_groups as param_groups
    from .insertion import remove as remove

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
    from . import core, insertion

    # BatchFormerV2 is a name that people search for: it is the same layer, applied at every token.
    value = core.BatchFormer if name == "BatchFormerV2" else getattr(core if hasattr(core, name) else insertion, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
