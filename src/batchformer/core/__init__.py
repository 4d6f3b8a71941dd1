"""The method. Depends on torch alone."""

from .inspection import describe, param_groups
from .modules import BatchFormer
from .notices import BatchFormerWarning
from .streams import expand, split, stream_loss
from .surgery import Handle, insert, remove

__all__ = [
    "BatchFormer",
    "BatchFormerWarning",
    "Handle",
    "describe",
    "expand",
    "insert",
    "param_groups",
    "remove",
    "split",
    "stream_loss",
]
