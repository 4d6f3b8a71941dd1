"""The method. Depends on torch alone."""

from .arms import ARMS, Arm, insert_arm
from .handle import Handle, handles
from .inspection import describe, param_groups
from .modules import BatchFormer
from .notices import BatchFormerWarning
from .streams import expand, split, stream_loss
from .surgery import insert, remove

__all__ = [
    "ARMS",
    "Arm",
    "BatchFormer",
    "BatchFormerWarning",
    "Handle",
    "describe",
    "expand",
    "handles",
    "insert",
    "insert_arm",
    "param_groups",
    "remove",
    "split",
    "stream_loss",
]
