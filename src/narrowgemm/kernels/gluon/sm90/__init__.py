"""NVIDIA Hopper: TMA, mbarrier, wgmma, warp specialisation.

A kernel is a host module, whose docstring says what it is for, and files that begin with its name: `_device` (the kernel: read
this first), `_sums_device` (its inner loop), `_parts_device`, `_schedule_device` and others (what it is made of), `_prep_device`
(a launch in front of it), `_tile` (what is fixed at compile time, and the shared memory), `_model` (its predicted time).

    kernel          computes
    fp8_decode      FP8 in blocks, few rows a group: weights stream, tokens are columns
    fp8_block       FP8 in blocks, many rows
    fp8_cluster     the same on pairs of blocks, by PTX where Gluon has no words
    fp8_gated       gate_up of an expert layer on the same tiles, with SwiGLU and its quantisation
    fp8_scaled      FP8 by row or tensor
    fp8_wgrad       FP8 weight gradients, by row, tensor or 1x128
    mx8_decode      MXFP8 x MXFP8, weights as a checkpoint has them, few tokens: FP8 wgmma
    mx8_rows        the same for 33 to 64 tokens, which are the rows of wgmma
    mx8_bf16        the same for 33 to 512 tokens: BF16 wgmma
    mx8_f16         the same for 129 to 2048 tokens: FP16 wgmma, rows that FP16 does not hold summed again
    narrow          packed MXFP4 and MXFP8 weights, few tokens
    narrow_prefill  packed weights, many tokens, expanded tile by tile
    expand          packed weights, many tokens, expanded once a call; then `bf16`
    fold            packed MXFP4 weights folded into E4M3, FP8 or MXFP4 activations, many tokens
    fold_mixed      the same with MXFP8 activations
    fold_both       MXFP8 x MXFP8, many tokens: weights folded when they were packed, or by the call
    bf16            BF16 groups of many rows
    bf16_cluster    dense BF16 on pairs of blocks, for `expand`
    quantize_both   one read, two FP8 copies: along rows and along columns
    activate_both   SwiGLU or its derivative, quantised so

What several kernels share: `ring_device` (the ring of K blocks and its producer), `fp8_block_parts_device` and
`fp8_block_schedule_device` (tiles in turn, promotion, the store), `narrow_expand_device` and `fold_expand_device` (weights from
four bits to more), `cluster_device`, `wgmma_device` and `counters_device` (PTX), `tensor_maps`, `refusals`, `occupancy` and,
for `mx8_*`, `mx8_tile` (host), `shim` (names that changed between Triton 3.6 and 3.9).
"""
