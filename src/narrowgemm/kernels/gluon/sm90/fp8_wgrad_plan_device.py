"""Who does what in the Hopper FP8 weight gradient: the groups by length, and the chunks that long ones are cut into."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["K", "G", "tiles", "share"])
def plan_kernel(offs_ptr, plan_ptr, count_ptr, K, G, tiles, share, GROUPS: tl.constexpr, COUNTS: tl.constexpr, SPLIT: tl.constexpr):
    """plan [4, GROUPS]: groups by length, longest first; items up to and including each; chunks of each one's tiles; where in
    the workspace its chunks start. `tiles`: of an output. `share`: where SPLIT, tiles longer than two of this many
    parts of the work are cut into chunks no longer than one. Zeroes
    `count_ptr`, the arrivals at cut tiles."""
    g = tl.arange(0, GROUPS)
    start = tl.minimum(tl.maximum(tl.load(offs_ptr + g, mask=g < G, other=0).to(tl.int64), 0), K)
    end = tl.minimum(tl.maximum(tl.load(offs_ptr + g + 1, mask=g < G, other=0).to(tl.int64), 0), K)
    blocks = tl.maximum(end - start + 127, 0) // 128
    # groups that don't exist come last, and equal ones in order
    key = tl.where(g < G, (blocks + 1) * GROUPS + (GROUPS - 1 - g), 0)
    key = tl.sort(key, descending=True)
    order = (GROUPS - 1 - key % GROUPS).to(tl.int32)
    length = tl.maximum(key // GROUPS - 1, 0)
    chunks = tl.full((GROUPS, ), 1, tl.int64)
    if SPLIT:
        most = tl.maximum((tl.sum(length) * tiles + share - 1) // share, 1)
        chunks = tl.where(length > 2 * most, (length + most - 1) // most, 1)     # adding up costs: not for little
    items = tl.where(g < G, chunks * tiles, 0)
    cut = tl.where((g < G) & (chunks > 1), items, 0)
    tl.store(plan_ptr + g, tl.where(g < G, order, 0))
    tl.store(plan_ptr + GROUPS + g, tl.cumsum(items, 0).to(tl.int32))
    tl.store(plan_ptr + 2 * GROUPS + g, chunks.to(tl.int32))
    tl.store(plan_ptr + 3 * GROUPS + g, (tl.cumsum(cut, 0) - cut).to(tl.int32))
    if SPLIT:
        for base in range(0, COUNTS, 1024):
            i = base + tl.arange(0, 1024)
            tl.store(count_ptr + i, tl.zeros((1024, ), tl.int32), mask=i < COUNTS)
