"""BatchFormer inside models that nobody edited, and out of them again. Depends on the core alone."""

from .describe import describe
from .handle import Handle, handles
from .insert import insert, remove
from .optimizer import param_groups

__all__ = ["Handle", "describe", "handles", "insert", "param_groups", "remove"]
