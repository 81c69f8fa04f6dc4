"""Device code of `route`: scores, the groups that are eligible, and the top-k of one token in one warp.

A score and its expert travel as one 64-bit key, score above expert, so that a maximum is also the choice among equals:
the lower id. Bits are those of a float in an order where NaN is the greatest, as torch sorts it.
"""

import triton
import triton.language as tl

LEAST = tl.constexpr(-(1 << 63))
NAN_ORDER = tl.constexpr(0x7FFFFFFF)
MINUS_INFINITY = tl.constexpr(-2139095041)  # `order` of -inf


@triton.jit
def order(x):
    """Bits of float32 `x` as int32 in the order of the values: both zeros equal, every NaN above infinity."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, NAN_ORDER, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@triton.jit
def value(bits):
    """The float32 that `order` made `bits` of."""
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def pack(bits, index):
    """A key that orders by `bits`, then by the lower `index`."""
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index)


@triton.jit
def exp(x):
    """e^x to the last bit or two; the device's own loses a bit for every doubling of |x|."""
    n = tl.minimum(tl.maximum(tl.floor(x * 1.4426950408889634 + 0.5), -126.0), 127.0)
    r = (x - n * 0.693145751953125) - n * 1.4286068203094172e-06
    return tl.exp2(r * 1.4426950408889634) * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def score_of(x, top, total, SOFTMAX: tl.constexpr):
    """Softmax of logits, given their maximum and the sum of exponentials, or sigmoid."""
    if SOFTMAX:
        return tl.div_rn(exp(x - top), tl.zeros(x.shape, tl.float32) + total)
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), 1.0 + exp(0.0 - x))


@triton.jit(do_not_specialize=["st"])
def route_kernel(x_ptr, bias_ptr, weights_ptr, ids_ptr, st, sx, scaling, G, S, KEPT,
                 K: tl.constexpr, KP: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, SOFTMAX: tl.constexpr,
                 BIAS: tl.constexpr, BEST: tl.constexpr, RENORMALIZE: tl.constexpr):
    """The token of this program. Experts lie as [GP, SP]: G groups of S; BEST experts count for a group, 0: no groups."""
    t = tl.program_id(0).to(tl.int64)
    x_ptr += t * st
    g = tl.arange(0, GP)
    s = tl.arange(0, SP)
    expert = g[:, None] * S + s[None, :]
    live = (g < G)[:, None] & (s < S)[None, :]
    x = tl.load(x_ptr + expert * sx, mask=live, other=float("-inf")).to(tl.float32)
    top = 0.0
    total = 1.0
    if SOFTMAX:
        top = tl.max(tl.max(x, 1), 0)
        total = tl.sum(tl.sum(tl.where(live, exp(x - top), 0.0), 1), 0)
    choice = score_of(x, top, total, SOFTMAX)
    if BIAS:
        choice += tl.load(bias_ptr + expert, mask=live, other=0.0).to(tl.float32)
    bits = order(choice)
    if BEST > 0:
        key = tl.where(live, pack(bits, s[None, :]), LEAST)
        first = tl.max(key, 1)
        mark = value((first >> 32).to(tl.int32))
        if BEST == 2:
            second = tl.max(tl.where(key == first[:, None], LEAST, key), 1)
            mark += value((second >> 32).to(tl.int32))
        groups = tl.where(g < G, pack(order(mark), g), LEAST)
        kept = tl.zeros((GP, ), tl.int32)
        for _ in range(KEPT):
            best = tl.max(groups, 0)
            kept = tl.where(groups == best, 1, kept)
            groups = tl.where(groups == best, LEAST, groups)
        bits = tl.where(kept[:, None] > 0, bits, MINUS_INFINITY)
    key = tl.where(live, pack(bits, expert), LEAST)
    j = tl.arange(0, KP)
    ids = tl.zeros((KP, ), tl.int32)
    for i in tl.static_range(K):
        best = tl.max(tl.max(key, 1), 0)
        ids = tl.where(j == i, 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32), ids)
        key = tl.where(key == best, LEAST, key)
    weights = score_of(tl.load(x_ptr + ids * sx).to(tl.float32), top, total, SOFTMAX)
    if RENORMALIZE:
        weights = tl.div_rn(weights, tl.zeros((KP, ), tl.float32) + (tl.sum(tl.where(j < K, weights, 0.0), 0) + 1e-20))
    tl.store(weights_ptr + t * K + j, weights * scaling, mask=j < K)
    tl.store(ids_ptr + t * K + j, ids, mask=j < K)
