"""What stands in front of and behind the Hopper product of plain MXFP8 by FP16 wgmma (`mx8_f16_device.py`).

In front: tokens in FP16, each row in units of its largest scale, in the order of the product's registers; the largest scale codes of
tokens' and weights' rows; and of both, which rows FP16 does not hold. It holds blocks whose scales are up to 2^21 below the row's
largest one, smaller ones if their values are zero. Behind: what rows that are not held meet is summed again, block by block in FP32.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

RANGE = tl.constexpr(21)        # how far below the largest code one may be
LEAST, MOST = tl.constexpr(74), tl.constexpr(194)       # codes whose powers, and products of two, the store takes without loss
TAME, WILD, NAN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def row_order(x, BK: tl.constexpr):
    """BK elements of a row, permuted: out[i * 16 + h * 8 + q * 2 + r] = in[q * 32 + i * 4 + h * 2 + r] of every 128."""
    return tl.reshape(tl.permute(tl.reshape(x, [BK // 128, 4, 8, 2, 2]), (0, 2, 3, 1, 4)), [BK])


@triton.jit
def top_of(c, axis: tl.constexpr):
    """Largest of codes, but those of NaN; no less than LEAST, so that rows of zeros, whose codes may be anything, are held."""
    return tl.maximum(tl.max(tl.where(c == 255, 0, c), axis), LEAST)


@triton.jit
def bring_tokens(x_ptr, xs_ptr, xp_ptr, top_ptr, state_ptr, first, M, K, sxm, ssm, ssk, cfg: tl.constexpr):
    """TOKENS rows in FP16. All that is moved is asked for first, codes, which may lie column by column, with it."""
    TOKENS: tl.constexpr = cfg.TOKENS
    BK: tl.constexpr = cfg.BK
    PIECES: tl.constexpr = cfg.PIECES
    row = first + tl.arange(0, TOKENS).to(tl.int64)
    here = (row < M)[:, None]
    o = tl.arange(0, BK)
    b = tl.arange(0, BK // 32)
    v = ()
    c = ()
    top = tl.zeros([TOKENS], tl.int32)
    nan = tl.zeros([TOKENS], tl.int32)
    lost = tl.zeros([TOKENS], tl.int32)
    for i in tl.static_range(PIECES):
        k = i * BK + o
        v = v + (tl.load(x_ptr + (row * sxm)[:, None] + k[None, :], mask=here & (k < K)[None, :], other=0.0, eviction_policy="evict_first"), )
        block = i * (BK // 32) + b
        codes = xs_ptr + (row * ssm)[:, None] + (block * ssk)[None, :]
        c = c + (tl.load(codes, mask=here & (block * 32 < K)[None, :], other=0).to(tl.int32), )
    for i in tl.static_range(PIECES):
        top = tl.maximum(top, top_of(c[i], 1))
        nan = tl.maximum(nan, tl.max((c[i] == 255).to(tl.int32), 1))
    for i in tl.static_range(PIECES):
        e = c[i] - top[:, None]
        scale = tl.where(e < -RANGE, 0, (e + 134) << 23).to(tl.float32, bitcast=True)
        x = tl.reshape(v[i].to(tl.float32), [TOKENS, BK // 32, 32])
        lost = tl.maximum(lost, tl.max(((e < -RANGE) & (tl.max((x != 0).to(tl.int32), 2) != 0)).to(tl.int32), 1))
        y = tl.reshape((x * scale[:, :, None]).to(tl.float16), [TOKENS * BK])
        k = i * BK + o
        tl.store(xp_ptr + (row * K)[:, None] + k[None, :], tl.reshape(row_order(y, TOKENS * BK), [TOKENS, BK]), mask=here & (k < K)[None, :])
    wild = (lost != 0) | (top > MOST)
    tl.store(top_ptr + row, top, mask=row < M)
    tl.store(state_ptr + row, tl.where(nan != 0, NAN, tl.where(wild, WILD, TAME)), mask=row < M)


@triton.jit
def look_at_weights(w_ptr, s_ptr, codes_ptr, top_ptr, state_ptr, first, N, blocks, swn, ssn, ssw, cfg: tl.constexpr):
    """The same of ROWS rows of weights, whose values are looked at only where a code is far below; their codes, side by side, with COPY."""
    ROWS: tl.constexpr = cfg.ROWS
    r = first + tl.arange(0, ROWS)
    there = r < N
    block = tl.arange(0, cfg.BLOCKS)
    inside = there[:, None] & (block < blocks)[None, :]
    codes = s_ptr + r.to(tl.int64)[:, None] * ssn
    code = tl.load(codes + (block * ssw)[None, :], mask=inside, other=0)
    if cfg.COPY:
        tl.store(codes_ptr + r.to(tl.int64)[:, None] * blocks + block[None, :], code, mask=inside)
    code = code.to(tl.int32)
    top = top_of(code, 1)
    nan = tl.max(((code == 255) & inside).to(tl.int32), 1)
    lost = tl.zeros([ROWS], tl.int32)
    if tl.max(tl.max((inside & (code < (top - RANGE)[:, None])).to(tl.int32), 1), 0) != 0:
        for k0 in range(0, blocks * 32, cfg.LOOK):
            k = k0 + tl.arange(0, cfg.LOOK)
            b = k0 // 32 + tl.arange(0, cfg.LOOK // 32)
            c = tl.load(codes + (b * ssw)[None, :], mask=there[:, None] & (b < blocks)[None, :], other=255).to(tl.int32)
            x = tl.load(w_ptr + r.to(tl.int64)[:, None] * swn + k[None, :], mask=there[:, None] & (k < blocks * 32)[None, :], other=0.0).to(tl.float32)
            some = tl.max((tl.reshape(x, [ROWS, cfg.LOOK // 32, 32]) != 0).to(tl.int32), 2)
            lost |= tl.max(((c < (top - RANGE)[:, None]) & (some != 0)).to(tl.int32), 1)
    wild = (lost != 0) | (top > MOST)
    tl.store(top_ptr + r, top, mask=there)
    tl.store(state_ptr + r, tl.where(nan != 0, NAN, tl.where(wild, WILD, TAME)), mask=there)


@triton.jit(do_not_specialize=["M", "N", "programs", "ssm", "ssk"])
def mx8_f16_prep_kernel(x_ptr, xs_ptr, xp_ptr, xtop_ptr, xstate_ptr, w_ptr, s_ptr, codes_ptr, top_ptr, state_ptr, M, N, K, blocks, programs, sxm, ssm,
                        ssk, swn, ssn, ssw, cfg: tl.constexpr):
    """`programs` of TOKENS tokens each, then those of ROWS rows of weights. blocks: of 32, of K; with that as an argument, codes are loaded 16
    at a time where they lie so."""
    if cfg.PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid < programs:
        bring_tokens(x_ptr, xs_ptr, xp_ptr, xtop_ptr, xstate_ptr, pid * cfg.TOKENS, M, K, sxm, ssm, ssk, cfg)
    else:
        look_at_weights(w_ptr, s_ptr, codes_ptr, top_ptr, state_ptr, (pid - programs) * cfg.ROWS, N, blocks, swn, ssn, ssw, cfg)


@triton.jit
def half_power(e):
    """2^e for e in [-127, 127]."""
    return tl.maximum((e + 127) << 23, 0x00400000).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["M", "N", "ssm", "ssk", "ssn", "ssw"])
def mx8_f16_mend_kernel(x_ptr, xs_ptr, xstate_ptr, w_ptr, s_ptr, state_ptr, y_ptr, M, N, K, sxm, ssm, ssk, swn, ssn, ssw, som,
                        BM: tl.constexpr, BN: tl.constexpr, STEP: tl.constexpr, TOGETHER: tl.constexpr, PDL: tl.constexpr = True):
    """A program BM tokens, STEP at a time, by BN columns: what their rows meet that FP16 does not hold, or that are NaN. PDL: it starts while
    the product stores, which has waited for what is looked at first."""
    first = tl.program_id(0) * BM
    m = first + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    there = n < N
    of_weights = tl.load(state_ptr + n, mask=there, other=0)
    wild = tl.max(of_weights, 0)
    held = tl.maximum(tl.max(tl.load(xstate_ptr + m, mask=m < M, other=0), 0), wild) == 0
    if PDL:
        gdc_wait()
    if held:
        return
    k = tl.arange(0, 32)
    w_at = w_ptr + (n.to(tl.int64) * swn)[:, None] + k[None, :]
    ws = s_ptr + n.to(tl.int64) * ssn
    for m0 in range(first, tl.minimum(first + BM, M), STEP):
        r = m0 + tl.arange(0, STEP)
        here = r < M
        of_tokens = tl.load(xstate_ptr + r, mask=here, other=0)
        if tl.maximum(tl.max(of_tokens, 0), wild) != 0:
            x_at = x_ptr + (r.to(tl.int64) * sxm)[:, None] + k[None, :]
            xs = xs_ptr + r.to(tl.int64) * ssm
            acc = tl.zeros([STEP, BN], tl.float32)
            for first_block in range(0, K // 32, TOGETHER):
                x, w, a, b = (), (), (), ()
                for i in tl.static_range(TOGETHER):        # asked for at once: one block takes as long
                    block = first_block + i
                    inside = block < K // 32
                    x = x + (tl.load(x_at + block * 32, mask=here[:, None] & inside, other=0.0), )
                    w = w + (tl.load(w_at + block * 32, mask=there[:, None] & inside, other=0.0), )
                    a = a + (tl.load(xs + block * ssk, mask=here & inside, other=127).to(tl.int32), )
                    b = b + (tl.load(ws + block * ssw, mask=there & inside, other=127).to(tl.int32), )
                for i in tl.static_range(TOGETHER):
                    e = a[i][:, None] + b[i][None, :] - 254
                    half = e >> 1
                    acc += tl.dot(x[i].to(tl.bfloat16), tl.trans(w[i].to(tl.bfloat16))) * half_power(half) * half_power(e - half)
            acc = tl.where((of_tokens == NAN)[:, None] | (of_weights == NAN)[None, :], float("nan"), acc)
            mended = ((of_tokens != 0)[:, None] | (of_weights != 0)[None, :]) & here[:, None] & there[None, :]
            tl.store(y_ptr + r.to(tl.int64)[:, None] * som + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mended)
