"""Device code of the Hopper FP8 prefill kernel on clusters: where the scales of a tile start, and those of a K block."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .fp8_block_parts_device import of_lane
from .fp8_block_schedule_device import CONTIGUOUS, MASKED, NO_GROUP
from .scales_device import as_float


@gluon.jit
def b_scale_bases(scales, own, N, cfg: gl.constexpr, WN: gl.constexpr):
    """Where the scales of a piece's columns start, which lie in B_SCALES blocks of 128 at most: (each of them, for every tensor of the
    piece the number of its block). A tile may lie past N: clamped."""
    sa_ptr, sag, sam, sak, sb_ptr, sbg, sbn, sbk = scales
    n, g, first, end, stop = own
    if cfg.LAYOUT == CONTIGUOUS:
        g = gl.where(g == NO_GROUP, 0, g)
    NP: gl.constexpr = cfg.NP
    col = gl.maximum(n, 0) * cfg.STEP + WN * (NP * cfg.WN)
    last = (N - 1) // 128
    base = sb_ptr + g.to(gl.int64) * sbg
    COUNT: gl.constexpr = cfg.B_SCALES
    starts = ()
    for i in gl.static_range(COUNT):
        starts = starts + (base + of_lane(gl.minimum(col // 128 + i, last)).to(gl.int64) * sbn, )
    which = ()
    for i in gl.static_range(NP):
        which = which + ((col % 128 + i * cfg.WN) // 128, )
    return starts, which


@gluon.jit
def a_scale_base(scales, own, cfg: gl.constexpr, WM: gl.constexpr):
    """Where A's start, of this warpgroup's first row."""
    sa_ptr, sag, sam, sak, sb_ptr, sbg, sbn, sbk = scales
    n, g, first, end, stop = own
    base = sa_ptr + (first + WM * (cfg.MP * 64)).to(gl.int64) * sam
    if cfg.LAYOUT == MASKED:
        base += g.to(gl.int64) * sag
    return base


@gluon.jit
def load_b_scales(bases, scales, kb, cfg: gl.constexpr):
    """Of K block kb; none where they are in the store."""
    sa_ptr, sag, sam, sak, sb_ptr, sbg, sbn, sbk = scales
    out = ()
    COUNT: gl.constexpr = 0 if cfg.FOLD else cfg.B_SCALES
    for i in gl.static_range(COUNT):
        out = out + (as_float(gl.load(bases[0][i] + kb * sbk)), )
    return out


@gluon.jit
def b_scale(sb, bases, cfg: gl.constexpr, PART: gl.constexpr):
    """Of one tensor of a piece."""
    if cfg.B_SCALES == 1 or PART == 0:
        return sb[0]
    elif cfg.B_SCALES == 2:
        return gl.where(bases[1][PART] == 1, sb[1], sb[0])
    else:
        return gl.where(bases[1][PART] == 2, sb[2], gl.where(bases[1][PART] == 1, sb[1], sb[0]))
