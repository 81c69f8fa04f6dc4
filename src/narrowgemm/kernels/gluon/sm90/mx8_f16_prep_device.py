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
def put_states(state_ptr, flag_ptr, row, there, nan, wild):
    """Of rows, and of a program: whether it has any that are not TAME."""
    state = tl.where(nan != 0, NAN, tl.where(wild, WILD, TAME))
    tl.store(state_ptr + row, state, mask=there)
    tl.store(flag_ptr, tl.max(tl.where(there, state, TAME), 0).to(tl.uint8))


@triton.jit
def bring_tokens(x_ptr, xs_ptr, xp_ptr, top_ptr, state_ptr, flag_ptr, first, M, K, sxm, ssm, ssk, cfg: tl.constexpr):
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
    put_states(state_ptr, flag_ptr, row, row < M, nan, wild)


@triton.jit
def look_at_weights(w_ptr, s_ptr, codes_ptr, top_ptr, state_ptr, flag_ptr, first, N, blocks, swn, ssn, ssw, cfg: tl.constexpr):
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
        for b0 in range(0, blocks, cfg.LOOK):
            b = b0 + tl.arange(0, cfg.LOOK)
            c = tl.load(codes + (b * ssw)[None, :], mask=there[:, None] & (b < blocks)[None, :], other=255).to(tl.int32)
            far = c < (top - RANGE)[:, None]
            k = (b * 32)[None, :, None] + tl.arange(0, 32)[None, None, :]
            x = tl.load(w_ptr + (r.to(tl.int64) * swn)[:, None, None] + k, mask=far[:, :, None], other=0.0).to(tl.float32)
            lost |= tl.max(tl.max((x != 0).to(tl.int32), 2), 1)
    wild = (lost != 0) | (top > MOST)
    tl.store(top_ptr + r, top, mask=there)
    put_states(state_ptr, flag_ptr, r, there, nan, wild)


@triton.jit(do_not_specialize=["M", "N", "programs", "ssm", "ssk"])
def mx8_f16_prep_kernel(x_ptr, xs_ptr, xp_ptr, xtop_ptr, xstate_ptr, w_ptr, s_ptr, codes_ptr, top_ptr, state_ptr, flag_ptr, M, N, K, blocks, programs, sxm,
                        ssm, ssk, swn, ssn, ssw, cfg: tl.constexpr):
    """`programs` of TOKENS tokens each, then those of ROWS rows of weights. blocks: of 32, of K; with that as an argument, codes are loaded 16
    at a time where they lie so."""
    if cfg.PDL:
        gdc_launch_dependents()
    pid = tl.program_id(0)
    if pid < programs:
        bring_tokens(x_ptr, xs_ptr, xp_ptr, xtop_ptr, xstate_ptr, flag_ptr + pid, pid * cfg.TOKENS, M, K, sxm, ssm, ssk, cfg)
    else:
        look_at_weights(w_ptr, s_ptr, codes_ptr, top_ptr, state_ptr, flag_ptr + pid, (pid - programs) * cfg.ROWS, N, blocks, swn, ssn, ssw, cfg)


@triton.jit
def half_power(e):
    """2^e for e in [-127, 127]."""
    return tl.maximum((e + 127) << 23, 0x00400000).to(tl.float32, bitcast=True)


@triton.jit
def blocks_at(x_at, w_at, xs, ws, here, there, block, blocks, ssk, ssw, TOGETHER: tl.constexpr):
    """Values and codes of TOGETHER blocks of 32 of K: (tokens, weights, their codes)."""
    x, w, a, b = (), (), (), ()
    for i in tl.static_range(TOGETHER):
        inside = block + i < blocks
        x = x + (tl.load(x_at + (block + i) * 32, mask=here[:, None] & inside, other=0.0), )
        w = w + (tl.load(w_at + (block + i) * 32, mask=there[:, None] & inside, other=0.0), )
        a = a + (tl.load(xs + (block + i) * ssk, mask=here & inside, other=127), )
        b = b + (tl.load(ws + (block + i) * ssw, mask=there & inside, other=127), )
    return x, w, a, b


@triton.jit(do_not_specialize=["M", "N", "flags", "ssm", "ssk", "ssn", "ssw"])
def mx8_f16_mend_kernel(x_ptr, xs_ptr, xstate_ptr, w_ptr, s_ptr, state_ptr, flag_ptr, y_ptr, M, N, K, flags, sxm, ssm, ssk, swn, ssn, ssw, som,
                        BM: tl.constexpr, BN: tl.constexpr, TOGETHER: tl.constexpr, LOOK: tl.constexpr, PDL: tl.constexpr = True):
    """What rows meet that FP16 does not hold, or that are NaN: programs take parts of BM tokens by BN columns in turn. flags: how many of them,
    LOOK at a time, say whether there are any such rows; mostly there are none. PDL: it starts while the product stores, which has waited for
    what is looked at first."""
    wild = 0
    for f0 in range(0, flags, LOOK):
        f = f0 + tl.arange(0, LOOK)
        wild = tl.maximum(wild, tl.max(tl.load(flag_ptr + f, mask=f < flags, other=0).to(tl.int32), 0))
    if PDL:
        gdc_wait()
    if wild == 0:
        return
    k = tl.arange(0, 32)
    blocks = K // 32
    num_m = tl.cdiv(M, BM)
    for t in range(tl.program_id(0), num_m * tl.cdiv(N, BN), tl.num_programs(0)):
        m = t % num_m * BM + tl.arange(0, BM)
        n = t // num_m * BN + tl.arange(0, BN)
        here = m < M
        there = n < N
        of_tokens = tl.load(xstate_ptr + m, mask=here, other=0)
        of_weights = tl.load(state_ptr + n, mask=there, other=0)
        if tl.maximum(tl.max(of_tokens, 0), tl.max(of_weights, 0)) != 0:
            x_at = x_ptr + (m.to(tl.int64) * sxm)[:, None] + k[None, :]
            w_at = w_ptr + (n.to(tl.int64) * swn)[:, None] + k[None, :]
            xs, ws = xs_ptr + m.to(tl.int64) * ssm, s_ptr + n.to(tl.int64) * ssn
            acc = tl.zeros([BM, BN], tl.float32)
            x, w, a, b = blocks_at(x_at, w_at, xs, ws, here, there, 0, blocks, ssk, ssw, TOGETHER)
            for block in range(TOGETHER, blocks + TOGETHER, TOGETHER):
                x_next, w_next, a_next, b_next = blocks_at(x_at, w_at, xs, ws, here, there, block, blocks, ssk, ssw, TOGETHER)
                for i in tl.static_range(TOGETHER):
                    e = a[i].to(tl.int32)[:, None] + b[i].to(tl.int32)[None, :] - 254
                    half = e >> 1
                    acc += tl.dot(x[i].to(tl.bfloat16), tl.trans(w[i].to(tl.bfloat16))) * half_power(half) * half_power(e - half)
                x, w, a, b = x_next, w_next, a_next, b_next
            acc = tl.where((of_tokens == NAN)[:, None] | (of_weights == NAN)[None, :], float("nan"), acc)
            mended = ((of_tokens != 0)[:, None] | (of_weights != 0)[None, :]) & here[:, None] & there[None, :]
            tl.store(y_ptr + m.to(tl.int64)[:, None] * som + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=mended)
