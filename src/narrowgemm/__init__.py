"""narrowgemm: matrix products in narrow number formats for Mixture-of-Experts models.

Importing needs torch alone: no GPU, no Triton, no network.
"""

from .errors import Unsupported
from .formats import BF16, FORMATS, FP8_128x128, FP8_1x128, FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, Format, ScaledTensor
from .layouts import Contiguous, KGrouped, Layout, Masked, Offsets, Psum, Routed
from .ops.explain import Explanation, explain
from .ops.gemm import gemm
from .ops.grouped import grouped_gemm
from .ops.wgrad import grouped_gemm_wgrad
from .problem import Config, Plan, Problem
from .version import __version__

__all__ = [
    "BF16", "FORMATS", "FP8_128x128", "FP8_1x128", "FP8_ROW", "FP8_TENSOR", "MXFP4", "MXFP8",
    "Config", "Contiguous", "Explanation", "Format", "KGrouped", "Layout", "Masked", "Offsets", "Plan", "Problem", "Psum",
    "Routed", "ScaledTensor", "Unsupported", "__version__",
    "explain", "gemm", "grouped_gemm", "grouped_gemm_wgrad",
]
