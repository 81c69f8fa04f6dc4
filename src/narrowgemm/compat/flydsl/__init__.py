"""FlyDSL's block-scaled FP8 grouped GEMM by its names: two factories of launchers, and what their callers use.

    from narrowgemm.compat.flydsl import compile_grouped_gemm_blockscale_contiguous, shuffle_weight

    launch = compile_grouped_gemm_blockscale_contiguous(n=2048, k=7168, num_groups=8, out_dtype="bf16")
    launch(d.view(-1), a.view(torch.int8).view(-1), b.view(torch.int8).view(-1), scale_a.view(-1), scale_b.view(-1),
           grouped_layout, M, 2048, 7168, 8, torch.cuda.current_stream())

Definition: ROCm/FlyDSL, pull request 433; the weight order is aiter's `shuffle_weight(layout=(16, 16))`. More is
checked than there: dtypes, sizes, devices. More is accepted: any device, FP32 or E8M0 scales wherever it runs,
segments of any length, groups without rows. Less is written: rows of no group keep what they held, where FlyDSL fills
up live tiles. Bad input raises ValueError or TypeError before anything is written; E4M3FNUZ payload raises
`narrowgemm.Unsupported`.

Weights arrive shuffled and are kept a second time in plain order, as long as their storage lives; writes that torch's
version counter does not see (through `.data`, by custom kernels) need `refresh_weight`; callers that view weights as
int8 under `torch.inference_mode` need `freeze_weight`. See `weights`.

`compile_a16w4_moe_gemm2` (pull request 431) is the down projection of an MXFP4 expert layer, over aiter's `moe_sorting` and
`shuffle_weight_a16w4`, which are in `narrowgemm.compat.aiter`.
"""

from __future__ import annotations

from .factories import compile_grouped_gemm_blockscale_contiguous, compile_grouped_gemm_blockscale_masked
from .moe import compile_a16w4_moe_gemm2
from .scales import fp32_e8m0_to_byte, fp32_to_e8m0
from .weights import freeze_weight, refresh_weight, shuffle_weight, unshuffle_weight

__all__ = ["compile_a16w4_moe_gemm2", "compile_grouped_gemm_blockscale_contiguous", "compile_grouped_gemm_blockscale_masked",
           "fp32_e8m0_to_byte", "fp32_to_e8m0", "freeze_weight", "refresh_weight", "shuffle_weight", "unshuffle_weight"]
