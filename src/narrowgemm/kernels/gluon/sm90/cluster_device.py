"""Blocks of a cluster on Hopper: barriers that count arrivals of other blocks, and TMA that brings one box to all of them.

Gluon for Triton 3.6 has neither, so both are PTX. They take addresses, so what they work on is in the largest allocation of the kernel,
which Triton puts at the start of shared memory; and descriptors by the names that PTX has for a kernel's parameters. Tests hold both
against the compiled code.
"""

from triton.experimental import gluon
from triton.experimental.gluon import constexpr_function
from triton.experimental.gluon import language as gl

EVICT_FIRST = 0x12F0000000000000        # a policy of L2, as `createpolicy` makes it for a whole access


@gluon.jit
def rank():
    """Of this block in its cluster."""
    return gl.inline_asm_elementwise("mov.u32 $0, %cluster_ctarank;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def start_of_shared():
    return gl.inline_asm_elementwise("mov.u32 $0, global_smem;", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def init(bar, count):
    """By one thread of the block; `wait_all` makes it known to the others."""
    gl.inline_asm_elementwise("""{
        .reg .pred p;
        .reg .b32 t;
        mov.u32 t, %tid.x;
        setp.eq.u32 p, t, 0;
        @p mbarrier.init.shared::cta.b64 [$1], $2;
        @p fence.mbarrier_init.release.cluster;
        mov.b32 $0, 0;
    }""", "=r,r,r", [bar, count], dtype=gl.int32, is_pure=False, pack=1)


@constexpr_function
def init_code(NUMBER):
    each = "".join(f"""
        @p mbarrier.init.shared::cta.b64 [$1+{8 * i}], $2;""" for i in range(NUMBER))
    return f"""{{
        .reg .pred p;
        .reg .b32 t;
        mov.u32 t, %tid.x;
        setp.eq.u32 p, t, 0;{each}
        @p fence.mbarrier_init.release.cluster;
        mov.b32 $0, 0;
    }}"""


@gluon.jit
def init_many(bar, count, NUMBER: gl.constexpr):
    """`init` of NUMBER barriers behind one another."""
    gl.inline_asm_elementwise(init_code(NUMBER), "=r,r,r", [bar, count], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait_all(CLUSTER: gl.constexpr):
    """Until every thread of every block of the cluster is here. A block that is alone has its own ways to wait."""
    if CLUSTER == 1:
        return
    gl.inline_asm_elementwise("""{
        barrier.cluster.arrive.release;
        barrier.cluster.wait.acquire;
        mov.b32 $0, $1;
    }""", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def arrive_all():
    """First half of `wait_all`; `join_all` is the other."""
    gl.inline_asm_elementwise("""{
        barrier.cluster.arrive.release;
        mov.b32 $0, $1;
    }""", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def join_all():
    """Second half of `wait_all`."""
    gl.inline_asm_elementwise("""{
        barrier.cluster.wait.acquire;
        mov.b32 $0, $1;
    }""", "=r,r", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1)


# ---------------------------------------------------------------- shared memory of another block
STAGED = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, [0, 1]))     # of sums [64, columns], rows fastest: no bank conflicts


@gluon.jit
def staged_at(row, column, COLUMNS: gl.constexpr):
    """Bytes from the start of sums in STAGED to four rows of a column; `row` is a multiple of 4."""
    return column * 256 + ((row >> 2) ^ (column & 7)) * 16


@gluon.jit
def of_block(address, rank):
    """An address of shared memory, in block `rank` of the cluster."""
    return gl.inline_asm_elementwise("mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", [address, rank], dtype=gl.int32, is_pure=False,
                                     pack=1)


@gluon.jit
def load_four(at):
    """Floats of any block of the cluster; of four neighbours in `at`, which one thread has, the first one's address counts."""
    return gl.inline_asm_elementwise("ld.shared::cluster.v4.f32 {$0, $1, $2, $3}, [$4];", "=f,=f,=f,=f,r,r,r,r", [at], dtype=gl.float32,
                                     is_pure=False, pack=4)


@gluon.jit
def put_word(at, value):
    """An int32 to this block's shared memory, the same from every thread."""
    gl.inline_asm_elementwise("st.shared.b32 [$1], $2; mov.b32 $0, 0;", "=r,r,r", [at, value], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def word(at):
    """An int32 of this block's shared memory, to every thread."""
    return gl.inline_asm_elementwise("ld.shared.b32 $0, [$1];", "=r,r", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def wait(bar, phase, pred):
    """Until the barrier's phase of this parity is over; at once where not `pred`."""
    gl.inline_asm_elementwise("""{
        .reg .pred done;
        setp.eq.u32 done, $3, 0;
        @done bra.uni out;
        again:
        mbarrier.try_wait.parity.shared::cta.b64 done, [$1], $2;
        @!done bra.uni again;
        out:
        mov.b32 $0, 0;
    }""", "=r,r,r,r", [bar, phase, pred], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def ready(bar, phase):
    """1 where the barrier's phase of this parity is over, else 0; doesn't wait."""
    return gl.inline_asm_elementwise("""{
        .reg .pred done;
        mbarrier.test_wait.parity.shared::cta.b64 done, [$1], $2;
        selp.b32 $0, 1, 0, done;
    }""", "=r,r,r", [bar, phase], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def everywhere(bar, CLUSTER: gl.constexpr):
    """`bar` for `arrive`: of lane r of a warp, where it is in block r of the cluster; negative in lanes without a block."""
    if CLUSTER == 1:
        return gl.inline_asm_elementwise("""{
            .reg .pred p;
            .reg .b32 lane;
            mov.u32 lane, %laneid;
            setp.eq.u32 p, lane, 0;
            selp.b32 $0, $1, 0x80000000, p;
        }""", "=r,r", [bar], dtype=gl.int32, is_pure=False, pack=1)
    else:
        return gl.inline_asm_elementwise("""{
            .reg .pred p;
            .reg .b32 lane;
            mov.u32 lane, %laneid;
            setp.lt.u32 p, lane, $2;
            mapa.shared::cluster.u32 $0, $1, lane;
            selp.b32 $0, $0, 0x80000000, p;
        }""", "=r,r,r", [bar, CLUSTER], dtype=gl.int32, is_pure=False, pack=1)


@constexpr_function
def arrive_code(CLUSTER):
    where = "cluster" if CLUSTER > 1 else "cta"
    return f"""{{
        .reg .pred p;
        setp.ge.s32 p, $1, 0;
        @p mbarrier.arrive.shared::{where}.b64 _, [$1];
        mov.b32 $0, 0;
    }}"""


@gluon.jit
def arrive(bar, CLUSTER: gl.constexpr):
    """Every warp arrives once at the barrier of each block in the cluster; `bar` from `everywhere`."""
    gl.inline_asm_elementwise(arrive_code(CLUSTER), "=r,r", [bar], dtype=gl.int32, is_pure=False, pack=1)


@constexpr_function
def one_code(ALONE):
    """PTX: a thread of a partition of one warp as `p`, or of the first warp of a block whose warps are together."""
    first = "" if ALONE else """
        mov.u32 t, %tid.x;
        setp.lt.u32 q, t, 32;
        and.pred p, p, q;"""
    return f"elect.sync _|p, 0xffffffff;{first}"


@constexpr_function
def expect_code(ALONE):
    return f"""{{
        .reg .pred p, q;
        .reg .b32 t;
        {one_code(ALONE)}
        @p mbarrier.arrive.expect_tx.shared::cta.b64 _, [$1], $2;
        mov.b32 $0, 0;
    }}"""


@gluon.jit
def expect(bar, size, ALONE: gl.constexpr = True):
    """One arrival, and so many bytes to come. By a partition of one warp, or by all warps of a block, of which the first does it."""
    gl.inline_asm_elementwise(expect_code(ALONE), "=r,r,r", [bar, size], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def arrive_once(bar):
    """One arrival behind all that the threads of a warp, a partition of its own, have done."""
    gl.inline_asm_elementwise("""{
        .reg .pred p;
        bar.warp.sync 0xffffffff;
        elect.sync _|p, 0xffffffff;
        @p mbarrier.arrive.shared::cta.b64 _, [$1];
        mov.b32 $0, 0;
    }""", "=r,r", [bar], dtype=gl.int32, is_pure=False, pack=1)


@constexpr_function
def copy_code(KERNEL, PARAMETER, RANK, CLUSTER, ALONE, ONCE):
    """PTX: one thread brings a box. $1: to, $2: barrier, $3...: coordinates, innermost first."""
    box = ", ".join(f"${3 + i}" for i in range(RANK))
    multicast, mask = (".multicast::cluster", ", all") if CLUSTER > 1 else ("", "")
    hint, policy = (".L2::cache_hint", ", policy") if ONCE else ("", "")
    copy = f"cp.async.bulk.tensor.{RANK}d.shared::cluster.global.mbarrier::complete_tx::bytes{multicast}{hint}"
    return f"""{{
        .reg .pred p, q;
        .reg .b16 all;
        .reg .b32 t;
        .reg .b64 desc, policy;
        mov.b64 desc, {KERNEL}_param_{PARAMETER};
        cvta.param.u64 desc, desc;
        mov.b16 all, {(1 << CLUSTER) - 1};
        mov.b64 policy, {EVICT_FIRST:#x};
        {one_code(ALONE)}
        @p {copy} [$1], [desc, {{{box}}}], [$2]{mask}{policy};
        mov.b32 $0, 0;
    }}"""


@gluon.jit
def load(desc, KERNEL: gl.constexpr, PARAMETER: gl.constexpr, at, bar, to, CLUSTER: gl.constexpr, ALONE: gl.constexpr = True,
         ONCE: gl.constexpr = False):
    """TMA of a box at (plane, row, column) to address `to`; `desc` is the kernel's PARAMETER-th. With CLUSTER > 1 it comes to
    that address of every block of the cluster, and arrives on each one's barrier at the address `bar`. ALONE: as `expect` has
    it. ONCE: nobody reads it again, so L2 gives it up first."""
    gl.inline_asm_elementwise(copy_code(KERNEL, PARAMETER, 3, CLUSTER, ALONE, ONCE), "=r,r,r,r,r,r", [to, bar, at[2], at[1], at[0]],
                              dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_box(desc, KERNEL: gl.constexpr, PARAMETER: gl.constexpr, at, bar, to):
    """`load` of a box at (plane, eight rows, K block), by a partition of one warp, that nobody reads again."""
    zero = at[0] * 0
    gl.inline_asm_elementwise(copy_code(KERNEL, PARAMETER, 5, 1, True, True), "=r,r,r,r,r,r,r,r", [to, bar, zero, zero, at[2], at[1], at[0]],
                              dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_rows(desc, KERNEL: gl.constexpr, PARAMETER: gl.constexpr, at, bar, to):
    """`load` of a box at (row, column)."""
    gl.inline_asm_elementwise(copy_code(KERNEL, PARAMETER, 2, 1, True, False), "=r,r,r,r,r", [to, bar, at[1], at[0]], dtype=gl.int32,
                              is_pure=False, pack=1)
