"""What inference servers load by name in each of their processes (entry points of vLLM and SGLang): nothing, unless asked to."""

from __future__ import annotations

from .errors import expect
from .runtime import env

VARIABLE = "NARROWGEMM_DEEP_GEMM"


def load() -> bool:
    """`compat.deep_gemm.install()` where NARROWGEMM_DEEP_GEMM is 1; whether it is. Without the variable nothing is imported and
    nothing changes; again is harmless. ValueError for another value than 0 or 1."""
    value = env.get(VARIABLE)
    expect(value in ("", "0", "1"), VARIABLE, repr(value), "'0' or '1'")
    if value != "1":
        return False
    from .compat import deep_gemm

    deep_gemm.install()
    return True
