"""What several kernels share of Hopper's room: CTAs on an SM, clusters on the chip, and what passes through L2."""

from __future__ import annotations

from ....arch import Arch
from ....problem import Config

RESERVED_SMEM = 1024     # of an SM's shared memory, for each CTA on it
KEEP_BYTES = 16e6        # an output of so many bytes and fewer is asked to stay in L2, where its reader finds it
STREAM_CACHES = 3        # weights of so many times L2 and fewer pass through it, which keeps what others wrote; more lose 3-5%
ROOM = {2: 66 / 132, 4: 30 / 132, 8: 15 / 132}     # clusters of so many blocks, one on an SM, that an H100 of 132 SMs holds at once
CLUSTERS = (2, 4, 8)     # blocks that share a tile, each with a part of K; more than 8 not every chip grants


def smem_budget(config: Config, arch: Arch) -> int:
    """Shared memory that one of the CTAs on an SM may use."""
    ctas = config.option("ctas", 1)
    return min(arch.smem, (arch.smem + RESERVED_SMEM) // ctas - RESERVED_SMEM)


def max_registers(config: Config) -> int:
    """Registers a thread that let the CTAs of one SM be resident together; warps are allocated by fours."""
    warps = config.num_warps + 4
    return min(232, 65536 // (config.option("ctas", 1) * warps * 32) // 8 * 8)
