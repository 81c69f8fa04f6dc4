"""The expert layer as a torch module."""

from .experts import Experts

__all__ = ["Experts"]
