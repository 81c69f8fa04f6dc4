"""Expert layers as torch modules: `Experts`, frozen and routed; `ExpertMLP`, trainable."""

from .expert_mlp import ExpertMLP
from .experts import Experts

__all__ = ["ExpertMLP", "Experts"]
