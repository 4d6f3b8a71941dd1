"""The method. Depends on torch alone."""

from .arms import ARMS, Arm, insert_arm
from .inspection import describe, param_groups
from .modules import BatchFormer
from .notices import BatchFormerWarning
from .streams import expand, split, stream_loss
from .surgery import Handle, insert, remove

__all__ = [
    "ARMS",
    "Arm",
    "BatchFormer",
    "BatchFormerWarning",
    "Handle",
    "describe",
    "expand",
    "insert",
    "insert_arm",
    "param_groups",
    "remove",
    "split",
    "stream_loss",
]
