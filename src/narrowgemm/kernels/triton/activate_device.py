"""Device code of `activate`: SwiGLU of the rows that are live, rounded to the input's type, then quantised as it is.

    gate, up (+ bias of the row's expert, FP32) -> silu(gate) * up -> input's type -> scale of a block -> FP8 or E2M1

A program walks the tiles of the rows in [0, offsets[E]), which only the device knows.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .quantize_device import block_e2m1, block_fp8

# 1 / (1 + 2^($1 * $2)); below 2^-126 it is zero
SIGMOID = tl.constexpr("""{
.reg .f32 t;
mul.f32 t, $1, $2;
ex2.approx.ftz.f32 t, t;
add.f32 t, t, 0f3F800000;
rcp.approx.ftz.f32 $0, t;
}""")
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def expert_of(offsets_ptr, row, E, STEPS: tl.constexpr):
    """The group of each row by bisection: the last e with offsets[e] <= row."""
    low = (row * 0).to(tl.int32)
    high = low + E
    for _ in range(STEPS):
        middle = (low + high) // 2
        right = tl.load(offsets_ptr + middle) <= row
        low = tl.where(right, middle, low)
        high = tl.where(right, high, middle)
    return low


@triton.jit
def sigmoid(x, alpha, NATIVE: tl.constexpr):
    """Of alpha * x. NATIVE: NVIDIA's approximations, to within two units of FP32's last place, without their ranges' ends."""
    if NATIVE:
        return tl.inline_asm_elementwise(SIGMOID, "=r,r,r", [x, alpha * (0.0 - LOG2E)], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / (1.0 + tl.exp(0.0 - alpha * x))


@triton.jit
def rounded(x, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """FP32 x in another type; two elements an instruction where Triton would take one."""
    if NATIVE and DTYPE == tl.bfloat16:
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)
    else:
        return x.to(DTYPE)


@triton.jit
def swiglu(gate, up, alpha, limit, CLAMPED: tl.constexpr, NATIVE: tl.constexpr = False):
    """gate * sigmoid(alpha * gate) * up, alpha being 1 of plain SwiGLU; CLAMPED: GPT-OSS's, (up + 1), gate <= limit, |up| <= limit."""
    if CLAMPED:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, 0.0 - limit, propagate_nan=tl.PropagateNan.ALL) + 1.0
    if NATIVE:
        return gate * sigmoid(gate, alpha, True) * up
    return gate / (1.0 + tl.exp(0.0 - alpha * gate)) * up


@triton.jit
def load_activated(h_ptr, bias_ptr, offsets_ptr, r, k, k2, mask, mask2, E, I, hr, alpha, limit,
                   ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr, CLAMPED: tl.constexpr,
                   INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr):
    """[ROWS, COLUMNS] of the activation, in the type of h. `k`: columns of the result; `k2`: twice them, interleaved."""
    at = (r.to(tl.int64) * hr)[:, None]
    if BIAS:
        e = expert_of(offsets_ptr, r, E, STEPS)
        eb = (e.to(tl.int64) * (2 * I))[:, None]
    if INTERLEAVED:
        both = tl.load(h_ptr + at + k2, mask=mask2, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if BIAS:
            both += tl.load(bias_ptr + eb + k2, mask=mask2, other=0.0).to(tl.float32)
        gate, up = tl.split(tl.reshape(both, (ROWS, COLUMNS, 2)))
    else:
        gate = tl.load(h_ptr + at + k, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        up = tl.load(h_ptr + at + I + k, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if BIAS:
            gate += tl.load(bias_ptr + eb + k, mask=mask, other=0.0).to(tl.float32)
            up += tl.load(bias_ptr + eb + I + k, mask=mask, other=0.0).to(tl.float32)
    return rounded(swiglu(gate, up, alpha, limit, CLAMPED, NATIVE), h_ptr.dtype.element_ty, NATIVE)


@triton.jit(do_not_specialize=["R"])
def activate_kernel(h_ptr, bias_ptr, offsets_ptr, out_ptr, scale_ptr, R, E, I, S, clamp, alpha, limit, hr, orow, sr, ss,
                    N: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
                    GROUPED: tl.constexpr, STEPS: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr,
                    BIAS: tl.constexpr, E2M1: tl.constexpr, SATURATE: tl.constexpr, ROUNDING: tl.constexpr,
                    E8M0: tl.constexpr, TOP: tl.constexpr, EMAX: tl.constexpr, MANTISSA: tl.constexpr,
                    MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr, LEADS: tl.constexpr, FOLLOWS: tl.constexpr):
    """Tiles of BR rows x BG blocks of N columns. KIND: 'copy' stores h's type, 'blocks' has a scale for each block.

    LEADS: the launch behind may start meanwhile, if it waits for this one by itself. FOLLOWS: the launch in front may still be at it."""
    if FOLLOWS:     # first: blocks of the launch behind that come between these and the product's find no room for long
        gdc_wait()
    if LEADS:
        gdc_launch_dependents()
    PER_BYTE: tl.constexpr = 2 if E2M1 else 1
    i = tl.arange(0, BR * BG)
    n = tl.arange(0, N)
    n2 = tl.arange(0, 2 * N)
    h = tl.arange(0, N // PER_BYTE)
    rows = R
    if GROUPED:
        rows = tl.minimum(tl.load(offsets_ptr + E), R).to(tl.int32)
    across = tl.cdiv(S, BG)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BR) * across, tl.num_programs(0)):
        r = tile // across * BR + i // BG
        g = tile % across * BG + i % BG
        live = (r < rows) & (g < S)
        k = (g * N)[:, None] + n[None, :]
        k2 = (g * 2 * N)[:, None] + n2[None, :]
        kh = (g * (N // PER_BYTE))[:, None] + h[None, :]
        mask = live[:, None]
        mask2 = live[:, None]
        out_mask = live[:, None]
        if not EVEN:
            mask = mask & (k < I)
            mask2 = mask2 & (k2 < 2 * I)
            out_mask = out_mask & (kh < I // PER_BYTE)
        y = load_activated(h_ptr, bias_ptr, offsets_ptr, r, k, k2, mask, mask2, E, I, hr, alpha, limit, BR * BG, N,
                           STEPS, CLAMPED, INTERLEAVED, BIAS, NATIVE)
        at = out_ptr + (r.to(tl.int64) * orow)[:, None] + kh
        if KIND == "copy":
            tl.store(at, y, mask=out_mask)
        else:
            if not EVEN:
                y = tl.where(mask, y, tl.zeros([1, 1], y.dtype))
            if E2M1:
                scale, y = block_e2m1(y, clamp, E2M1, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, BR * BG, N)
            else:
                scale, y = block_fp8(y, clamp, out_ptr.dtype.element_ty, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA,
                                     MANTISSA_BITS, NATIVE)
            tl.store(scale_ptr + r.to(tl.int64) * sr + g * ss, scale, mask=live)
            tl.store(at, y, mask=out_mask)


@triton.jit(do_not_specialize=["R"])
def activate_rows_kernel(h_ptr, bias_ptr, offsets_ptr, out_ptr, scale_ptr, R, E, I, clamp, alpha, limit, hr, orow, sr,
                         BR: tl.constexpr, BK: tl.constexpr, GROUPED: tl.constexpr, STEPS: tl.constexpr,
                         CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr, NATIVE: tl.constexpr):
    """One FP32 scale a row: BR rows a program, BK holds a row."""
    k = tl.arange(0, BK)[None, :]
    k2 = tl.arange(0, 2 * BK)[None, :]
    rows = R
    if GROUPED:
        rows = tl.minimum(tl.load(offsets_ptr + E), R).to(tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, BR), tl.num_programs(0)):
        r = tile * BR + tl.arange(0, BR)
        live = r < rows
        mask = live[:, None] & (k < I)
        y = load_activated(h_ptr, bias_ptr, offsets_ptr, r, k, k2, mask, live[:, None] & (k2 < 2 * I), E, I, hr, alpha,
                           limit, BR, BK, STEPS, CLAMPED, INTERLEAVED, BIAS, NATIVE)
        y = tl.where(mask, y, tl.zeros([1, 1], y.dtype))
        scale, y = block_fp8(y, clamp, out_ptr.dtype.element_ty, False, "", False, TOP, 0, 0, 0, NATIVE)
        tl.store(scale_ptr + r.to(tl.int64) * sr, scale, mask=live)
        tl.store(out_ptr + (r.to(tl.int64) * orow)[:, None] + k, y, mask=mask)
