"""aiter's MXFP8 products for few rows, its routing order, and its A16W4 weight orders, by their names.

    from narrowgemm.compat.aiter import grouped_gemm_mxfp8, moe_sorting, mxfp8_gemv, shuffle_weight_a16w4

Definitions: ROCm/aiter, pull request 3783 (products), `fused_moe.py` (sorting), `ops/shuffle.py` (orders). A product returns None
where no kernel made for it runs it, as there, but says why; what fails raises. Weights come plain and are packed once.
"""

from __future__ import annotations

from ...moe_sorting import MoeSorting, moe_sorting_from_routed, routed_from_moe_sorting
from ..flydsl.weights import shuffle_weight, unshuffle_weight
from .mxfp8 import grouped_gemm_mxfp8, mxfp8_gemv, smallm_mxfp8_gemv, smallm_mxfp8_mfma, smallm_mxfp8_moe_grouped_gemm
from .shuffle import shuffle_scale_a16w4, shuffle_weight_a16w4, unshuffle_scale_a16w4, unshuffle_weight_a16w4
from .sorting import moe_sorting

__all__ = ["MoeSorting", "grouped_gemm_mxfp8", "moe_sorting", "moe_sorting_from_routed", "mxfp8_gemv", "routed_from_moe_sorting",
           "shuffle_scale_a16w4", "shuffle_weight", "shuffle_weight_a16w4", "smallm_mxfp8_gemv", "smallm_mxfp8_mfma",
           "smallm_mxfp8_moe_grouped_gemm", "unshuffle_scale_a16w4", "unshuffle_weight", "unshuffle_weight_a16w4"]
