"""Counters in device memory by which warps of different blocks share work, in PTX. All of this is by one warp."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def take(counter):
    """The number of the next piece, the same in all lanes of a warp. `counter`: an address."""
    return gl.inline_asm_elementwise("""{
        .reg .pred p;
        .reg .b32 x;
        mov.u32 x, %laneid;
        setp.eq.u32 p, x, 0;
        @p atom.relaxed.gpu.global.add.u32 x, [$1], 1;
        shfl.sync.idx.b32 $0, x, 0, 31, 0xffffffff;
    }""", "=r,l", [counter.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def finish(counter):
    """One more is done: what this warp has stored can be seen by whoever sees the count, by TMA too."""
    gl.inline_asm_elementwise("""{
        .reg .pred p;
        .reg .b32 x;
        fence.acq_rel.gpu;
        fence.proxy.async.global;
        bar.warp.sync 0xffffffff;
        mov.u32 x, %laneid;
        setp.eq.u32 p, x, 0;
        @p red.release.gpu.global.add.u32 [$1], 1;
        mov.b32 $0, 0;
    }""", "=r,l", [counter.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def await_count(counter, count):
    """Until so many are done."""
    gl.inline_asm_elementwise("""{
        .reg .pred p;
        .reg .b32 x;
        again:
        ld.acquire.gpu.global.u32 x, [$1];
        setp.ge.s32 p, x, $2;
        @p bra out;
        nanosleep.u32 100;
        bra again;
        out:
        fence.proxy.async.global;
        mov.b32 $0, 0;
    }""", "=r,l,r", [counter.to(gl.int64), count], dtype=gl.int32, is_pure=False, pack=1)
