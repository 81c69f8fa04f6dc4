"""DeepGEMM's names and signatures over narrowgemm's ops: `from narrowgemm.compat import deep_gemm`.

    from narrowgemm.compat import deep_gemm      # instead of `import deep_gemm`
    narrowgemm.compat.deep_gemm.install()        # or: let other libraries' `import deep_gemm` find it

Every GEMM takes `(payload, scales)` pairs, writes `d` in place and returns None. More is accepted than upstream does:
any device, MN-major FP8 operands, scales of any layout, segments of any length, E5M2, FP16 output. Bad input raises
ValueError or TypeError before anything is written; what no kernel does raises `narrowgemm.Unsupported`. Names that are
not here (attention, mega kernels) come from a real deep_gemm if one is installed; so do the BF16 ones (products, einsum,
cublaslt), which are ours where there is none.
"""

from __future__ import annotations

from . import testing, utils
from .batched import fp8_einsum
from .delegate import attribute as __getattr__  # noqa: F401  (module attribute hook)
from .dense import (
    fp8_fp4_gemm_nn,
    fp8_fp4_gemm_nt,
    fp8_fp4_gemm_tn,
    fp8_fp4_gemm_tt,
    fp8_gemm_nn,
    fp8_gemm_nt,
    fp8_gemm_tn,
    fp8_gemm_tt,
)
from .fp4 import prepack_fp4
from .grouped import (
    fp8_m_grouped_gemm_nt_masked,
    m_grouped_fp8_fp4_gemm_nn_contiguous,
    m_grouped_fp8_fp4_gemm_nt_contiguous,
    m_grouped_fp8_fp4_gemm_nt_masked,
    m_grouped_fp8_gemm_nn_contiguous,
    m_grouped_fp8_gemm_nt_contiguous,
    m_grouped_fp8_gemm_nt_masked,
)
from .installer import install, installed, uninstall
from .kgrouped import k_grouped_fp8_gemm_nt_contiguous, k_grouped_fp8_gemm_tn_contiguous
from .scale_layout import transform_sf_into_required_layout
from .state import (
    get_compile_mode,
    get_deterministic_algorithms,
    get_num_sms,
    get_pdl,
    get_tc_util,
    set_block_size_multiple_of,
    set_compile_mode,
    set_ignore_compile_dims,
    set_num_sms,
    set_pdl,
    set_tc_util,
    use_deterministic_algorithms,
)
from .utils import *  # noqa: F403  (upstream's names are flat too)
from .utils import __all__ as _utils

__version__ = "2.6.1"  # the DeepGEMM release whose signatures these are; arguments of later ones are accepted too

__all__ = [
    *_utils,
    "fp8_einsum", "fp8_fp4_gemm_nn", "fp8_fp4_gemm_nt", "fp8_fp4_gemm_tn", "fp8_fp4_gemm_tt", "fp8_gemm_nn", "fp8_gemm_nt",
    "fp8_gemm_tn", "fp8_gemm_tt", "fp8_m_grouped_gemm_nt_masked", "get_compile_mode", "get_deterministic_algorithms",
    "get_num_sms", "get_pdl", "get_tc_util", "install", "installed", "k_grouped_fp8_gemm_nt_contiguous",
    "k_grouped_fp8_gemm_tn_contiguous", "m_grouped_fp8_fp4_gemm_nn_contiguous", "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "m_grouped_fp8_fp4_gemm_nt_masked", "m_grouped_fp8_gemm_nn_contiguous", "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked", "prepack_fp4", "set_block_size_multiple_of", "set_compile_mode", "set_ignore_compile_dims",
    "set_num_sms", "set_pdl", "set_tc_util", "testing", "transform_sf_into_required_layout", "uninstall",
    "use_deterministic_algorithms", "utils",
]
