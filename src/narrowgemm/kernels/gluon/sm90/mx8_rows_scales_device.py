"""Device code of the Hopper kernel for plain MXFP8 weights with tokens as wgmma's rows: codes of both sides to powers of two, slot by slot.

Codes are loaded a trip, four K blocks, at a time, one or two trips ahead. Where none of a trip is wild, below 64 or above 191, a power is
two operations; a slot's word says so of the weights', for the consumers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl

from . import cluster_device as cluster
from .fp8_decode_cluster_device import idle
from .fp8_decode_schedule_device import advance
from .mx8_decode_sums_device import columns_of, power
from .mx8_rows_sums_device import empty_at, full_at, wild_at
from .shim import touch

TAME = gl.constexpr(0x7F7F7F7F)     # codes of 1, where there are no rows


@constexpr_function
def code_rows(R):
    """Of codes int32 [R, 4] in one warp."""
    lanes = [[r, 0] if r < R else [0, 0] for r in (1, 2, 4, 8, 16)]
    return gl.DistributedLinearLayout([[0, 1], [0, 2]] + [[r, 0] for r in (32, 64) if r < R], lanes, [], [], [R, 4])


@constexpr_function
def code_columns():
    """Of codes int32 [4, 16] in one warp, tokens by four."""
    return gl.DistributedLinearLayout([[2, 0]], [[0, 1], [0, 2], [0, 4], [0, 8], [1, 0]], [], [], [4, 16])


@gluon.jit
def tame(v, j: gl.constexpr):
    """2^(c - 127) of code j of each four, none of which is wild."""
    if j == 3:
        bits = (v >> 1) & 0x7F800000
    else:
        bits = (v << (23 - 8 * j)) & 0x7F800000
    return bits.to(gl.float32, bitcast=True)


@gluon.jit
def any_power(v, j: gl.constexpr):
    """NaN for 255."""
    x = power(v, j)
    return gl.where(x == float("inf"), float("nan"), x)


@gluon.jit
def wild(v):
    """A bit for each of four codes that is below 64 or above 191."""
    return (~(v ^ (v << 1)) >> 7) & 0x01010101


@gluon.jit
def wild_in(v):
    """Not zero where one of the codes is below 64 or above 191."""
    return gl.max(gl.max(wild(v), 1), 0)


@gluon.jit
def codes_of_rows(ptr, stride, sk, row, limit, kb, KB, R: gl.constexpr, VEC: gl.constexpr):
    """Codes [R, 4] of the rows from `row` on, `limit` of which there are, and of four K blocks from kb on, K ascending in an int32."""
    lay: gl.constexpr = code_rows(R)
    r = gl.arange(0, R, gl.SliceLayout(1, lay))
    k = kb + gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(0, lay)), 0)
    at = (row + gl.expand_dims(r, 1)).to(gl.int64) * stride
    rows = gl.expand_dims(r < limit, 1)
    if VEC == 4:
        return gl.load(ptr + gl.multiple_of(at + k, [1, 4]), mask=rows & (kb < KB), other=TAME)
    elif VEC == 1:
        return gl.load(ptr + (at + k), mask=rows & (k < KB), other=TAME)
    else:
        codes = (rows & (k < KB)).to(gl.int32) * 0
        for j in gl.static_range(4):
            codes |= gl.load(ptr + at + (k * 4 + j).to(gl.int64) * sk, mask=rows & (k < KB), other=127).to(gl.int32) << (8 * j)
        return codes


# ---------------------------------------------------------------- weights
@gluon.jit
def weight_codes(ptr, stride, row, limit, kb, KB, cfg: gl.constexpr):
    """Of a trip: of MAIN rows, and of those past them."""
    M: gl.constexpr = cfg.MAIN
    R: gl.constexpr = cfg.REST
    main = codes_of_rows(ptr, stride, 1, row, limit, kb, KB, M, cfg.VEC)
    if R > 0:
        return main, codes_of_rows(ptr, stride, 1, row + M, limit - M, kb, KB, R, cfg.VEC)
    else:
        return main, main


@gluon.jit
def weight_scaler(ptr, swn, row, limit, k0, trips, powers, KB, cfg: gl.constexpr):
    """2^(c - 127) of the weights' codes into every slot, and whether the slot's are wild. Loads run two trips ahead."""
    main, rest = powers
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    here, here2 = weight_codes(ptr, swn, row, limit, k0, KB, cfg)
    ahead, ahead2 = weight_codes(ptr, swn, row, limit, k0 + 4, KB, cfg)
    for t in range(0, trips):
        later, later2 = weight_codes(ptr, swn, row, limit, k0 + t * 4 + 8, KB, cfg)
        u = columns_of(here)
        u2 = u
        odd = wild_in(here)
        if cfg.REST > 0:
            u2 = columns_of(here2)
            odd |= wild_in(here2)
        for i in gl.static_range(4):
            cluster.wait(empty_at(slot, cfg), phase, 1)
            if odd == 0:
                for j in gl.static_range(4):
                    main.index(cfg.MAIN_AT // (cfg.MAIN * 4) + slot * 4 + j).store(tame(u[i], j))
                    if cfg.REST > 0:
                        rest.index(cfg.REST_AT // (cfg.REST * 4) + slot * 4 + j).store(tame(u2[i], j))
            else:
                for j in gl.static_range(4):
                    main.index(cfg.MAIN_AT // (cfg.MAIN * 4) + slot * 4 + j).store(any_power(u[i], j))
                    if cfg.REST > 0:
                        rest.index(cfg.REST_AT // (cfg.REST * 4) + slot * 4 + j).store(any_power(u2[i], j))
            cluster.put_word(wild_at(slot, cfg), odd)
            cluster.arrive_once(full_at(slot, cfg))
            slot, phase = advance(slot, phase, cfg.STAGES)
        here = ahead
        here2 = ahead2
        ahead = later
        ahead2 = later2
    idle(cfg)


# ---------------------------------------------------------------- tokens
@gluon.jit
def codes_of_columns(ptr, sxk, row, M, kb, KB):
    """Codes of 64 tokens, by four, [4, 16] of each of four K blocks; sxk: in int32."""
    lay: gl.constexpr = code_columns()
    t = row // 4 + gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, lay)), 0)
    at = gl.expand_dims(gl.arange(0, 4, gl.SliceLayout(1, lay)), 1).to(gl.int64) * sxk + t
    out = ()
    for i in gl.static_range(4):
        out = out + (gl.load(ptr + (kb + i).to(gl.int64) * 4 * sxk + at, mask=(t * 4 < M) & (kb + i < KB), other=TAME), )
    return out


@gluon.jit
def token_codes(ptr, strides, row, M, kb, KB, cfg: gl.constexpr):
    """Of a trip."""
    sxm, sxk = strides
    if cfg.TOKEN_CODES == 2:
        return codes_of_columns(ptr, sxk, row, M, kb, KB)
    else:
        return columns_of(codes_of_rows(ptr, sxm, sxk, row, M - row, kb, KB, 64, cfg.TOKEN_CODES))


@gluon.jit
def wild_tokens(u, cfg: gl.constexpr):
    """Whether a code of a trip is wild."""
    found = wild(u[0])
    for i in gl.static_range(3):
        found |= wild(u[i + 1])
    if cfg.TOKEN_CODES == 2:
        found = gl.max(found, 1)
    return gl.max(found, 0)


@gluon.jit
def put_tokens(u, s_x, s_x4, slot, WILD: gl.constexpr, cfg: gl.constexpr):
    """Powers of a K block."""
    if cfg.TOKEN_CODES == 2:
        if WILD:
            a = gl.join(any_power(u, 0), any_power(u, 2))
            b = gl.join(any_power(u, 1), any_power(u, 3))
        else:
            a = gl.join(tame(u, 0), tame(u, 2))
            b = gl.join(tame(u, 1), tame(u, 3))
        s_x4.index(cfg.SX_AT // 1024 + slot).store(gl.reshape(gl.join(a, b), [4, 64]))
    else:
        for j in gl.static_range(4):
            s_x.index(cfg.SX_AT // 256 + slot * 4 + j).store(any_power(u, j) if WILD else tame(u, j))


@gluon.jit
def token_scaler(ptr, strides, row, M, k0, trips, s_x, s_x4, KB, cfg: gl.constexpr):
    """2^(c - 127) of the tokens' codes into every slot. Loads run a trip ahead."""
    slot = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    here = token_codes(ptr, strides, row, M, k0, KB, cfg)
    for t in range(0, trips):
        ahead = token_codes(ptr, strides, row, M, k0 + t * 4 + 4, KB, cfg)
        odd = wild_tokens(here, cfg)
        for i in gl.static_range(4):
            cluster.wait(empty_at(slot, cfg), phase, 1)
            if odd == 0:
                put_tokens(here[i], s_x, s_x4, slot, False, cfg)
            else:
                put_tokens(here[i], s_x, s_x4, slot, True, cfg)
            cluster.arrive_once(full_at(slot, cfg))
            slot, phase = advance(slot, phase, cfg.STAGES)
        here = ahead
    idle(cfg)


# ---------------------------------------------------------------- before the warps part
@gluon.jit
def touch_codes(w_ptr, swn, w_row, limit, x_ptr, strides, x_row, M, k0, chunk, KB, cfg: gl.constexpr):
    """Have L2 fetch all codes of a block, in front of its first boxes: behind a ring of these they would come microseconds later."""
    sxm, sxk = strides
    W: gl.constexpr = 1 if cfg.VEC > 0 else 4       # elements of a K block of a row
    lay: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = gl.arange(0, 128, lay)
    rows = w_ptr + (w_row + gl.minimum(i, limit - 1)).to(gl.int64) * swn
    last = gl.minimum(k0 + chunk, KB) - 1
    for k in range(k0, last + 1, 16):       # 64 bytes
        touch(rows + gl.minimum(k, last) * W)
    if cfg.TOKEN_CODES == 1:
        tokens = x_ptr + gl.minimum(x_row + i % 64, M - 1).to(gl.int64) * sxm
        for k in range(k0, last + 1, 32):
            touch(tokens + gl.minimum(k + i // 64 * 16, last))
    else:       # those of the first row are enough where rows are next to each other
        first = x_ptr + (x_row // 4 if cfg.TOKEN_CODES == 2 else x_row * sxm)
        for k in range(k0 * 4, last * 4 + 4, 128):
            touch(first + gl.minimum(k + i, last * 4 + 3).to(gl.int64) * sxk)
