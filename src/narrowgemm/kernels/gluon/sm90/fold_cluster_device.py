"""Device code of the Hopper prefill kernel on clusters with MXFP4 weights that are brought to E4M3 once a call.

    out[m, n] = (sum over K blocks of  (A[m, kb] . B[g, n, kb]) * sa[m, kb]) * s[g, n]

What `fp8_cluster_device.py` does, with one scale a column, in the store; and with three warps a block, idle there, that expand
the weights of groups to come (`fold_whole_device.py`), where they haven't all been in front. Blocks start while the launch in front
runs (programmatic dependent launch), and wait for it where they need what it writes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_wait

from . import cluster_device as cluster
from .fold_device import gated
from .fold_whole_device import ahead
from .fp8_cluster_device import consumer, consumer_of, idle, is_wider, prepare, producer, producer_of


@gluon.jit
def helper(pointers, sync_ptr, problem, NT, cfg: gl.constexpr):
    cluster.wait_all(cfg.CLUSTER)
    gdc_wait()
    ahead(pointers, sync_ptr, problem, NT, cfg)
    cluster.wait_all(cfg.CLUSTER)


@gluon.jit
def late_producer(descs, table, problem, sa_pitch, cfg: gl.constexpr, sync_ptr, NT):
    gdc_wait()
    producer(descs, table, problem, sa_pitch, cfg, sync_ptr, NT)


@gluon.jit
def late_producer_of(wider, descs, wider_desc, table, problem, sa_pitch, cfg: gl.constexpr):
    gdc_wait()
    producer_of(wider, descs, wider_desc, table, problem, sa_pitch, cfg)


@gluon.jit(do_not_specialize=["M", "KB", "G", "alignment", "flags", "NT", "sa_pitch", "out_pitch"])
def fold_cluster_kernel(a_desc, sa_desc, b_desc, wider_desc, d_desc, out_ptr, w_ptr, s_ptr, top_ptr, factor_ptr, made_ptr, sync_ptr, flags_ptr,
                        index_ptr, M, N, KB, G, alignment, flags, NT, sa_pitch, og, om, out_pitch, cfg: gl.constexpr):
    """A persistent grid of clusters; arguments as `fp8_cluster_kernel`, `fold_whole_kernel` and `fold_kernel` have them. b_desc
    [G, NT * 64, KB * 128] is on what made_ptr points to; top, factor [G, NT * 64]."""
    M = gated(M, flags_ptr, flags, cfg)
    ring, d_s, table = prepare(out_ptr, index_ptr, M, G, alignment, cfg)

    problem = (index_ptr, M, N, KB, G, alignment)
    scales = (top_ptr, 0, 0, 0, top_ptr, NT * 64, factor_ptr, 0)
    out = (out_ptr, og, om, out_pitch)
    descs = (a_desc, sa_desc, b_desc)
    if cfg.PIECE > 0:
        pointers = (w_ptr, s_ptr, top_ptr, made_ptr)
        gl.warp_specialize([
            (consumer, (d_desc, out, scales, ring, d_s, table, problem, cfg, 0, 0)),
            (consumer, (d_desc, out, scales, ring, d_s, table, problem, cfg, cfg.WGM - 1, cfg.WGN - 1)),
            (helper, (pointers, sync_ptr, problem, NT, cfg)),
            (helper, (pointers, sync_ptr, problem, NT, cfg)),
            (late_producer, (descs, table, problem, sa_pitch, cfg, sync_ptr, NT)),
            (helper, (pointers, sync_ptr, problem, NT, cfg)),
        ], [4, 1, 1, 1, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS,
                             cfg.PRODUCER_REGISTERS])
    elif cfg.WIDER is not None:
        wider = is_wider(table, M, N, cfg)
        gl.warp_specialize([
            (consumer_of, (wider, d_desc, out, scales, ring, d_s, table, problem, cfg, 0, 0)),
            (consumer_of, (wider, d_desc, out, scales, ring, d_s, table, problem, cfg, cfg.WGM - 1, cfg.WGN - 1)),
            (idle, (cfg, )),
            (late_producer_of, (wider, descs, wider_desc, table, problem, sa_pitch, cfg)),
            (idle, (cfg, )),
        ], [4, 2, 1, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (consumer, (d_desc, out, scales, ring, d_s, table, problem, cfg, 0, 0)),
            (consumer, (d_desc, out, scales, ring, d_s, table, problem, cfg, cfg.WGM - 1, cfg.WGN - 1)),
            (idle, (cfg, )),
            (late_producer, (descs, table, problem, sa_pitch, cfg, sync_ptr, NT)),
            (idle, (cfg, )),
        ], [4, 2, 1, 1], [cfg.CONSUMER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS, cfg.PRODUCER_REGISTERS])
