"""FP8 tokens for weights in the order `narrowgemm.prepack_bits.FP8_PREPACK`: K as `narrow_fp8_device` has it, scales beside them."""

import triton
import triton.language as tl

FP8_ORDER = tl.constexpr(5)


@triton.jit
def token_scale(xs_ptr, i, count, ssk):
    """FP32 scales of K blocks i, given as FP32, or as E8M0 codes."""
    s = tl.load(xs_ptr + i * ssk, mask=i < count, other=0)
    if xs_ptr.dtype.element_ty == tl.uint8:
        bits = s.to(tl.int32) << 23
        bits = tl.where(s == 0, 0x00400000, bits)
        bits = tl.where(s == 255, 0x7FC00000, bits)
        return bits.to(tl.float32, bitcast=True)
    else:
        return s.to(tl.float32)


@triton.jit
def bring_fp8(x_ptr, xs_ptr, to_ptr, scale_ptr, at, part, K, KX, ssk, cfg: tl.constexpr):
    """BK bytes of a row to position `at`, out[w * 16 + q * 4 + b] = in[q * 32 + w * 4 + b] of every 128, zeros from K on. Of each K block a
    position has the scales of itself and of those 1, 8 and 9 further on: 16 bytes, the least that TMA moves, and what a thread of wgmma
    wants of 16 positions. They are another group's, or nobody's, where the group ends."""
    o = part * cfg.BK + tl.arange(0, cfg.BK)
    x = tl.load(x_ptr + o, mask=o < K, other=0.0)
    x = tl.reshape(tl.permute(tl.reshape(x, [cfg.BK // 128, 4, 8, 4]), (0, 2, 1, 3)), [cfg.BK])
    tl.store(to_ptr + o, x, mask=o < KX)
    i = part * (cfg.BK // 128) + tl.arange(0, cfg.BK // 128)
    scale = token_scale(xs_ptr, i, (K + 127) // 128, ssk)
    for j in tl.static_range(4):
        back = at - (j // 2 * 8 + j % 2)
        tl.store(scale_ptr + back * (KX // 32) + (4 * i + j), scale, mask=(i < KX // 128) & (back >= 0))
