"""The method. Depends on torch alone; read functional, modules, streams and distributed in this order."""

from .modules import BatchFormer
from .streams import expand, split, stream_loss
from .training_checks import BatchFormerWarning

__all__ = ["BatchFormer", "BatchFormerWarning", "expand", "split", "stream_loss"]
