"""What goes into the ring of the Hopper kernel for few tokens: weights, their scale fields, rows of tokens. By cp.async, 16 bytes a thread.

All of it is PTX, on addresses, for the sake of the instructions that it takes: Gluon works out an address for every copy, and has the
block meet at a barrier between copies and uses. Here a step's copies are at distances from one address, and the block meets once a
step. Expanding takes 120 instructions of a warp for 64 x 128 weights, and at 35 GB/s an SM has about 220 clocks for them, all its warps
together. (One thread that asks for a step of weights in one bulk copy takes fewer still, but they come half a microsecond later.)
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl

from . import cluster_device as cluster


# ---------------------------------------------------------------- weights
@constexpr_function
def weights_at_code():
    return """{
        .reg .b32 t;
        mov.u32 t, %tid.x;
        mad.wide.u32 $0, t, 16, $1;
    }"""


@constexpr_function
def fields_at_code(UNITS):
    """A warp has the fields of two chunks of one tile; the warps of a pair of chunks, its tiles."""
    return f"""{{
        .reg .b32 t, lane, warp, tile;
        .reg .b64 at;
        mov.u32 t, %tid.x;
        and.b32 lane, t, 31;
        shr.u32 warp, t, 5;
        and.b32 tile, warp, {UNITS - 1};
        shr.u32 warp, warp, {UNITS - 1};
        mad.wide.u32 at, lane, 16, $1;
        mad.lo.u32 tile, tile, $2, warp;
        mad.wide.u32 $0, tile, 512, at;
    }}"""


@constexpr_function
def slot_at_code():
    return "{ .reg .b32 t; mov.u32 t, %tid.x; mad.lo.u32 $0, t, 16, $1; }"


@constexpr_function
def weights_code(ROWS, CH, CW, W_AT, S_AT, EVEN, STREAM):
    """PTX. $1, $2: a thread's place in the weights and in the fields; $3: in shared memory; $4, $5: chunks and pairs of chunks in front
    of the step; $6: slot; $7: chunks from the step on; $8: tiles of 64 rows from the first on; $9: chunks of a tile. Zeros come for what
    is past the last chunk or the last tile. STREAM: L2 gives up first what is copied."""
    units, per = ROWS // 64, CW // CH
    unit, pairs = 4096, CH // 2
    threads = ROWS * 2
    copy, policy = ("cp.async.cg.shared.global.L2::cache_hint", ", policy") if STREAM else ("cp.async.cg.shared.global", "")
    lines = ""
    for c in range(CH):
        if not EVEN:
            lines += f"""
        setp.le.s32 none, $7, {c};"""
            if units > 1:
                lines += """
        setp.le.or.s32 missing, $8, 1, none;"""
        for at in range(c * per, (c + 1) * per):
            for u in range(units):
                for h in range(0, unit, threads * 16):
                    left_out = "" if EVEN else ", missing" if u else ", none"
                    lines += f"""
        {copy} [to + {(at * units + u) * unit + h}], [src{u} + {at * unit + h}], 16{left_out}{policy};"""
    second = f"""
        mul.wide.u32 far, $9, {per * unit};
        add.u64 src1, src0, far;""" if units > 1 else ""
    # of the fields, a thread has one piece: pair by pair of chunks, tile by tile
    none = f"""
        shr.u32 t, t, {5 + units - 1};
        shl.b32 t, t, 1;
        setp.le.s32 none, $7, t;""" if not EVEN else ""
    if units > 1 and not EVEN:
        none += f"""
        mov.u32 t, %tid.x;
        shr.u32 t, t, 5;
        and.b32 t, t, 1;
        setp.ge.or.s32 none, t, $8, none;"""
    return f"""{{
        .reg .pred p, none, missing;
        .reg .b32 t, to, sto;
        .reg .b64 src0, src1, ssrc, far, policy;
        mov.b64 policy, {cluster.EVICT_FIRST:#x};
        mad.wide.u32 src0, $4, {per * unit}, $1;
        mad.wide.u32 ssrc, $5, 512, $2;
        mad.lo.u32 to, $6, {CW * ROWS * 64}, $3;
        add.u32 to, to, {W_AT};
        mad.lo.u32 sto, $6, {CH * ROWS * 4}, $3;{second}{lines}
        mov.u32 t, %tid.x;
        setp.lt.u32 p, t, {pairs * units * 32};{none}
        @p {copy} [sto + {S_AT}], [ssrc], 16{"" if EVEN else ", none"}{policy};
        mov.b32 $0, 0;
    }}"""


@gluon.jit
def issue_weights(weights, e, nt, k, slot, cfg: gl.constexpr):
    """Ask for step k of a tile. weights: bytes, fields, tiles of 64 rows of an expert, chunks of K. What a thread adds to addresses is
    worked out once, or, where sums take most registers, in every step: impure is not moved out of a loop."""
    w_ptr, s_ptr, NT, KC = weights
    UNITS: gl.constexpr = cfg.ROWS // 64
    ONCE: gl.constexpr = cfg.BT <= 16
    w = gl.inline_asm_elementwise(weights_at_code(), "=l,l", [w_ptr.to(gl.int64)], dtype=gl.int64, is_pure=ONCE, pack=1)
    s = gl.inline_asm_elementwise(fields_at_code(UNITS), "=l,l,r", [s_ptr.to(gl.int64), (KC + 1) // 2], dtype=gl.int64, is_pure=ONCE, pack=1)
    to = gl.inline_asm_elementwise(slot_at_code(), "=r,r", [cluster.start_of_shared()], dtype=gl.int32, is_pure=ONCE, pack=1)
    at = nt * UNITS
    tile = e * NT + at
    chunk = k * cfg.CH
    gl.inline_asm_elementwise(
        weights_code(cfg.ROWS, cfg.CH, cfg.CW, cfg.W_BOX * cfg.ROWS * 64, cfg.S_BOX * cfg.ROWS * 8, cfg.EVEN, cfg.STREAM), "=r,l,l,r,r,r,r,r,r,r",
        [w, s, to, tile * KC + chunk, tile * ((KC + 1) // 2) + chunk // 2, slot, KC - chunk, NT - at, KC], dtype=gl.int32,
        is_pure=False, pack=1)


# ---------------------------------------------------------------- tokens
@constexpr_function
def place_code(ROWS):
    return f"""{{
        .reg .b32 lane, warp, unit, at;
        mov.u32 lane, %laneid;
        mov.u32 warp, %tid.x;
        shr.u32 warp, warp, 5;
        xor.b32 unit, lane, warp;
        and.b32 unit, unit, 7;
        shl.b32 unit, unit, 4;
        shr.u32 at, lane, 3;
        mad.lo.u32 at, at, {ROWS * 128}, unit;
        mad.lo.u32 at, warp, 128, at;
        add.u32 $0, at, $1;
    }}"""


@gluon.jit
def places(slot_at, BT: gl.constexpr, NW: gl.constexpr, layout: gl.constexpr):
    """Where a thread's pieces of its rows go, in a slot whose own first piece is at `slot_at` (`first_place`): warp w has rows w, w + NW, ...
    and every row is swizzled by its number mod 8."""
    i = gl.arange(0, BT, layout) // NW
    return (slot_at ^ (i * NW % 8 * 16)) + i * (NW * 128)


@gluon.jit
def first_place(ROWS: gl.constexpr):
    """Address of the piece that a thread brings of its warp's first row, in the first slot. A slot is ROWS rows of 64 columns, swizzled by
    128 bytes, then those of the next 64; a lane has 8 columns of every 256."""
    return gl.inline_asm_elementwise(place_code(ROWS), "=r,r", [cluster.start_of_shared()], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def lane_columns():
    """The first column of a thread's piece."""
    return gl.inline_asm_elementwise("{ .reg .b32 t; mov.u32 t, %laneid; shl.b32 t, t, 3; add.u32 $0, t, $1; }", "=r,r", [gl.to_tensor(0)],
                                     dtype=gl.int32, is_pure=True, pack=1)


@constexpr_function
def rows_code(ROWS, COLUMNS):
    """PTX. $1: element; $2: address in shared memory; $3: tokens in memory; $4: whether there is such a row."""
    copies = "".join(f"""
        @p cp.async.cg.shared.global [$2 + {j * 4 * ROWS * 128}], [src + {j * 512}], 16;""" for j in range(COLUMNS // 256))
    return f"""{{
        .reg .pred p;
        .reg .b64 src;
        setp.ne.b32 p, $4, 0;
        mad.wide.s32 src, $1, 2, $3;{copies}
        mov.b32 $0, 0;
    }}"""


@gluon.jit
def issue_rows(x_ptr, at, to, live, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Copy a thread's piece of each live row, from element `at` to address `to`. What isn't live stays what it was: its sums aren't stored."""
    gl.inline_asm_elementwise(rows_code(ROWS, COLUMNS), "=r,r,r,l,r", [at, to, x_ptr.to(gl.int64), live.to(gl.int32)], dtype=gl.int32,
                              is_pure=False, pack=1)


@gluon.jit
def commit():
    gl.inline_asm_elementwise("cp.async.commit_group; mov.b32 $0, 0;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@constexpr_function
def wait_code(COUNT):
    return f"cp.async.wait_group {COUNT}; mov.b32 $0, 0;"


@gluon.jit
def wait(COUNT: gl.constexpr):
    """Until all but COUNT of a thread's groups of copies are there."""
    gl.inline_asm_elementwise(wait_code(COUNT), "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)
