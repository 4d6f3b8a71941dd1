"""The method. It depends on torch alone.

Read the files in this order: functional, cpu_kernels, streams, modules, distributed, training_checks.
"""

from .modules import BatchFormer
from .streams import expand, split, stream_loss
from .training_checks import BatchFormerWarning

__all__ = ["BatchFormer", "BatchFormerWarning", "expand", "split", "stream_loss"]
