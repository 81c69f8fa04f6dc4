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
def wide(x, NATIVE: tl.constexpr):
    """x in FP32; of two BF16 in a register each by one instruction, where Triton's own takes three."""
    if NATIVE and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32,
                                         is_pure=True, pack=2)
    else:
        return x.to(tl.float32)


@triton.jit
def gated(gate, up, alpha, NATIVE: tl.constexpr):
    """gate * sigmoid(alpha * gate) * up."""
    if NATIVE:
        return gate * sigmoid(gate, alpha, True) * up
    return gate / (1.0 + tl.exp(0.0 - alpha * gate)) * up


@triton.jit
def swiglu(gate, up, alpha, limit, CLAMPED: tl.constexpr, NATIVE: tl.constexpr = False):
    """gate * sigmoid(alpha * gate) * up, alpha being 1 of plain SwiGLU; CLAMPED: GPT-OSS's, (up + 1), gate <= limit, |up| <= limit."""
    if CLAMPED:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, 0.0 - limit, propagate_nan=tl.PropagateNan.ALL) + 1.0
    return gated(gate, up, alpha, NATIVE)


PAIRED = tl.constexpr(2)    # of CLAMPED: two BF16 an instruction, of which the limit is one


@triton.jit
def swiglu_pairs(gate, up, alpha, limit):
    """`swiglu`, clamped, of BF16 gate and up with a limit that is BF16: clamped as they are, two an instruction."""
    top = limit.to(tl.bfloat16)
    gate = tl.inline_asm_elementwise("min.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [gate, top], dtype=tl.bfloat16, is_pure=True, pack=2)
    up = tl.inline_asm_elementwise("{.reg .b32 t; min.NaN.bf16x2 t, $1, $2; neg.bf16x2 $0, $2; max.NaN.bf16x2 $0, t, $0;}",
                                   "=&r,r,r", [up, top], dtype=tl.bfloat16, is_pure=True, pack=2)
    return gated(wide(gate, True), wide(up, True) + 1.0, alpha, True)


@triton.jit
def load_halves(h_ptr, at, at2, mask, mask2, I, INTERLEAVED: tl.constexpr, E2M1: tl.constexpr):
    """(gate, up) [ROWS, COLUMNS] as they are, at offsets `at` from h_ptr; INTERLEAVED: both together, twice, at `at2`. Where masked, anything.

    Behind them come bytes of as many elements a lane as 16 bytes hold: of FP8 16, which take two loads, half a sector each. What L1 is
    told to give up first it has given up before the other half."""
    EVICT: tl.constexpr = "evict_first" if E2M1 else ""
    if INTERLEAVED:
        both = tl.load(h_ptr + at2, mask=mask2, eviction_policy=EVICT)
        return both, both
    else:
        gate = tl.load(h_ptr + at, mask=mask, eviction_policy=EVICT)
        up = tl.load(h_ptr + I + at, mask=mask, eviction_policy=EVICT)
        return gate, up


@triton.jit
def activated(gate, up, bias_ptr, offsets_ptr, r, k, k2, mask, mask2, E, I, alpha, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
              STEPS: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr, BIAS: tl.constexpr, NATIVE: tl.constexpr):
    """What `load_halves` has read as [ROWS, COLUMNS] of the activation, in the same type. `k`, `k2`: columns of the result and of
    both halves."""
    DTYPE: tl.constexpr = gate.dtype
    if CLAMPED != PAIRED:
        gate = wide(gate, NATIVE)
        up = wide(up, NATIVE)
    if BIAS:
        eb = (expert_of(offsets_ptr, r, E, STEPS).to(tl.int64) * (2 * I))[:, None]
        if INTERLEAVED:
            gate += tl.load(bias_ptr + eb + k2, mask=mask2, other=0.0).to(tl.float32)
        else:
            gate += tl.load(bias_ptr + eb + k, mask=mask, other=0.0).to(tl.float32)
            up += tl.load(bias_ptr + eb + I + k, mask=mask, other=0.0).to(tl.float32)
    if INTERLEAVED:
        gate, up = tl.split(tl.reshape(gate, (ROWS, COLUMNS, 2)))
    if CLAMPED == PAIRED:
        y = swiglu_pairs(gate, up, alpha, limit)
    else:
        y = swiglu(gate, up, alpha, limit, CLAMPED, NATIVE)
    return rounded(y, DTYPE, NATIVE)


@triton.jit(do_not_specialize=["R", "SURE"])
def activate_kernel(h_ptr, bias_ptr, offsets_ptr, out_ptr, scale_ptr, R, SURE, E, I, S, clamp, alpha, limit, hr, orow, sr, ss,
                    N: tl.constexpr, BR: tl.constexpr, BG: tl.constexpr, ACROSS: tl.constexpr, EVEN: tl.constexpr, KIND: tl.constexpr,
                    GROUPED: tl.constexpr, STEPS: tl.constexpr, CLAMPED: tl.constexpr, INTERLEAVED: tl.constexpr,
                    BIAS: tl.constexpr, E2M1: tl.constexpr, SATURATE: tl.constexpr, ROUNDING: tl.constexpr,
                    E8M0: tl.constexpr, TOP: tl.constexpr, EMAX: tl.constexpr, MANTISSA: tl.constexpr,
                    MANTISSA_BITS: tl.constexpr, NATIVE: tl.constexpr, LEADS: tl.constexpr, FOLLOWS: tl.constexpr,
                    ONCE: tl.constexpr, WIDE: tl.constexpr):
    """Tiles of BR rows x BG blocks of N columns, ACROSS of them a row. KIND: 'copy' stores h's type, 'blocks' has a scale for each block.

    ONCE: a program has one tile, of the R rows that there may be; of the first
    SURE, which are live as a rule, it reads what it may not need instead of waiting for the number of rows.
    LEADS: the launch behind may start meanwhile, if it waits for this one by itself. FOLLOWS: the launch in front may still be at it.
    WIDE: offsets inside a tile take 64 bits."""
    if FOLLOWS:     # first: blocks of the launch behind that come between these and the product's find no room for long
        gdc_wait()
    if LEADS:
        gdc_launch_dependents()
    PER_BYTE: tl.constexpr = 2 if E2M1 else 1
    first = tl.program_id(0) // ACROSS
    i = tl.arange(0, BR * BG)
    row = i // BG
    g = tl.program_id(0) % ACROSS * BG + i % BG
    if WIDE:
        row = row.to(tl.int64)
    k = (g * N)[:, None] + tl.arange(0, N)[None, :]
    k2 = (g * 2 * N)[:, None] + tl.arange(0, 2 * N)[None, :]
    kh = (g * (N // PER_BYTE))[:, None] + tl.arange(0, N // PER_BYTE)[None, :]
    inside = (g < S)[:, None]
    inside2 = inside
    inside_h = inside
    if not EVEN:
        inside = inside & (k < I)
        inside2 = inside2 & (k2 < 2 * I)
        inside_h = inside_h & (kh < I // PER_BYTE)
    at = (row * hr)[:, None] + k
    at2 = (row * hr)[:, None] + k2
    at_h = (row * orow)[:, None] + kh
    at_s = row.to(tl.int64) * sr + g.to(tl.int64) * ss
    rows = R
    if GROUPED:
        if not ONCE or first * BR >= SURE:  # volatile: else compilers see one number of rows, and have every program wait for it
            rows = tl.minimum(tl.load(offsets_ptr + E, volatile=ONCE), R).to(tl.int32)
    end = first + 1 if ONCE else tl.cdiv(rows, BR)
    for tile in range(first, end, 1 if ONCE else tl.num_programs(0) // ACROSS):
        r = tile * BR + i // BG
        live = r < rows
        origin = (tile * BR).to(tl.int64)
        mask = live[:, None] & inside
        mask2 = live[:, None] & inside2
        gate, up = load_halves(h_ptr + origin * hr, at, at2, mask, mask2, I, INTERLEAVED, E2M1)
        if GROUPED:
            if ONCE:
                tl.debug_barrier()      # the compiler would have the number of rows waited for before these loads are made
                rows = tl.minimum(tl.load(offsets_ptr + E), R).to(tl.int32)
                live = r < rows
        if tile * BR < rows:    # always, but for ONCE; the compiler moves no load across it: all are on their way before the first is used
            y = activated(gate, up, bias_ptr, offsets_ptr, r, k, k2, mask, mask2, E, I, alpha, limit, BR * BG, N, STEPS, CLAMPED,
                          INTERLEAVED, BIAS, NATIVE)
            mask_h = live[:, None] & inside_h
            if KIND == "copy":
                tl.store(out_ptr + origin * orow + at_h, y, mask=mask_h)
            else:
                if not EVEN:
                    y = tl.where(inside, y, tl.zeros([1, 1], y.dtype))
                if E2M1:
                    scale, y = block_e2m1(y, clamp, E2M1, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA, MANTISSA_BITS, BR * BG, N)
                else:
                    scale, y = block_fp8(wide(y, NATIVE), clamp, out_ptr.dtype.element_ty, SATURATE, ROUNDING, E8M0, TOP, EMAX, MANTISSA,
                                         MANTISSA_BITS, NATIVE)
                tl.store(scale_ptr + origin * sr + at_s, scale, mask=live & (g < S))
                tl.store(out_ptr + origin * orow + at_h, y, mask=mask_h)


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
        mask2 = live[:, None] & (k2 < 2 * I)
        at = (r.to(tl.int64) * hr)[:, None]
        gate, up = load_halves(h_ptr, at + k, at + k2, mask, mask2, I, INTERLEAVED, 0)
        y = activated(gate, up, bias_ptr, offsets_ptr, r, k, k2, mask, mask2, E, I, alpha, limit, BR, BK, STEPS, CLAMPED, INTERLEAVED,
                      BIAS, NATIVE)
        y = tl.where(mask, y, tl.zeros([1, 1], y.dtype))
        scale, y = block_fp8(y, clamp, out_ptr.dtype.element_ty, False, "", False, TOP, 0, 0, 0, NATIVE)
        tl.store(scale_ptr + r.to(tl.int64) * sr, scale, mask=live)
        tl.store(out_ptr + (r.to(tl.int64) * orow)[:, None] + k, y, mask=mask)
