"""The entries (expert, first position, at most BT tokens) of dense, masked and offsets layouts, found by a block itself: it has no need
to wait for the launch in front, which lists those of other layouts."""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl

from .fp8_block_schedule_device import DENSE, MASKED, add, clip
from .shim import block_barrier


@constexpr_function
def of_warp(GROUPS, WARPS):
    """GROUPS numbers, each warp has all of them: a sum over them is a warp's own matter."""
    return gl.BlockedLayout([GROUPS // 32], [32], [WARPS], [0])


@gluon.jit
def rows_of(index_ptr, e, live, cap, cfg: gl.constexpr):
    """(first position, rows) of expert(s) e where `live`; cap: rows that a masked group can hold, that A has in other layouts."""
    if cfg.LAYOUT == DENSE:
        return e * 0, gl.where(live, cap, 0)
    elif cfg.LAYOUT == MASKED:
        return e * cap, clip(gl.load(index_ptr + e, mask=live, other=0), cap)
    else:
        first = clip(gl.load(index_ptr + e, mask=live, other=0), cap)
        return first, gl.maximum(clip(gl.load(index_ptr + e + 1, mask=live, other=0), cap) - first, 0)


@gluon.jit
def sum_up(table, index_ptr, G, cap, cfg: gl.constexpr):
    """table[e] = entries of experts up to and including e. By the block's first four warps, which meet afterwards."""
    e = gl.arange(0, cfg.GROUPS, of_warp(cfg.GROUPS, 4))
    first, rows = rows_of(index_ptr, e, e < G, cap, cfg)
    table.store(gl.associative_scan((rows + (cfg.BT - 1)) // cfg.BT, 0, add))
    block_barrier()


@gluon.jit
def entry_sums(table, cfg: gl.constexpr, WARPS: gl.constexpr):
    return table.load(of_warp(cfg.GROUPS, WARPS))


@gluon.jit
def entry_at(b, live, sums, index_ptr, G, cap, cfg: gl.constexpr, WARPS: gl.constexpr):
    """(expert, first position, tokens) of entry b; no tokens where not `live`."""
    behind = sums <= b
    e = gl.minimum(gl.sum(behind.to(gl.int32), 0), G - 1)
    skip = (b - gl.max(gl.where(behind, sums, 0), 0)) * cfg.BT
    first, rows = rows_of(index_ptr, e, live, cap, cfg)
    return e, first + skip, gl.minimum(rows - skip, cfg.BT)
