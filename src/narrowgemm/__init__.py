"""narrowgemm: matrix products in narrow number formats for Mixture-of-Experts models.

Importing needs torch alone: no GPU, no Triton, no network.
"""

from typing import TYPE_CHECKING

from .version import __version__

try:
    import torch as _torch  # noqa: F401
except (ImportError, OSError, RuntimeError, AttributeError, NameError, SyntaxError) as _error:
    # torch is missing or broken. `python -m narrowgemm env` must be able to say so: fail at the first use instead.
    _cause = _error

    if not TYPE_CHECKING:       # type checkers take a module with this hook to have every name
        def __getattr__(name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            raise ImportError(f"narrowgemm.{name} needs torch, which can't be imported here "
                              f"({type(_cause).__name__}: {_cause}); `python -m narrowgemm env` shows more") from _cause
else:
    from .errors import Unsupported
    from .formats import BF16, FORMATS, FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, Format, FP8_1x128, FP8_128x128, ScaledTensor
    from .layouts import Contiguous, KGrouped, Layout, Masked, Offsets, Psum, Routed
    from .ops.activate import activate
    from .ops.activate_both import activate_backward, activate_both
    from .ops.expert_mlp import expert_mlp
    from .ops.experts import experts, experts_workspace
    from .ops.explain import Explanation, can_run, explain
    from .ops.explain_experts import explain_experts
    from .ops.gather import gather_quantize
    from .ops.gemm import gemm
    from .ops.grouped import grouped_gemm
    from .ops.grouped_linear import grouped_linear, quantize_weight
    from .ops.prepare import prepare
    from .ops.quantize import quantize
    from .ops.quantize_both import Both, quantize_both
    from .ops.route import Routing, combine, gather, moe_align_block_size, route, sort_by_expert
    from .ops.routed import routed_gemm
    from .ops.wgrad import grouped_gemm_wgrad
    from .prepack import PackedWeight, prepack, unpack
    from .problem import Config, Plan, Problem

    if TYPE_CHECKING:
        from . import compat, distributed, integrations, nn, testing  # noqa: F401
    else:
        def __getattr__(name: str) -> object:
            """The packages beside the ops, imported at their first use: `narrowgemm.nn` and the others."""
            if name in ("compat", "distributed", "integrations", "nn", "testing"):
                return __import__(f"{__name__}.{name}", fromlist=[name])
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

__all__ = [
    "BF16", "FORMATS", "FP8_ROW", "FP8_TENSOR", "MXFP4", "MXFP8", "Both", "Config", "Contiguous", "Explanation",
    "FP8_1x128", "FP8_128x128", "Format", "KGrouped", "Layout", "Masked", "Offsets", "PackedWeight", "Plan", "Problem",
    "Psum", "Routed", "Routing", "ScaledTensor", "Unsupported", "__version__", "activate",
    "activate_backward", "activate_both", "can_run", "combine", "expert_mlp", "experts", "experts_workspace",
    "explain", "explain_experts", "gather", "gather_quantize", "gemm", "grouped_gemm", "grouped_gemm_wgrad", "grouped_linear",
    "moe_align_block_size", "prepack", "prepare", "quantize", "quantize_both",
    "quantize_weight", "route", "routed_gemm", "sort_by_expert", "unpack",
]
