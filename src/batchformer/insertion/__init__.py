"""Insertion of BatchFormer into models that nobody edited, and its removal. It depends on the core alone."""

from .describe import describe
from .handle import Handle, handles
from .insert import insert, remove
from .optimizer import param_groups

__all__ = ["Handle", "describe", "handles", "insert", "param_groups", "remove"]
