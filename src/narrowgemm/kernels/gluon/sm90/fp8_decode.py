"""Hopper FP8 block-scaled GEMM for few rows a group (decode): weights stream at memory bandwidth, tokens are wgmma's columns.

1x128 activations x 128x128 weights, E4M3, FP32 or E8M0 scales; dense, contiguous, offsets, psum and masked. A persistent,
warp-specialised grid with the operands swapped; device code and how it works: `fp8_decode_device.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ...operands import Operands

NAME = "gluon_sm90.fp8_decode"
BACKEND = "gluon_sm90"
LAYOUT_IDS = {"dense": 0, "contiguous": 1, "offsets": 2, "psum": 3, "masked": 4}
MAX_ROWS = 128               # rows a group above which weights are no longer all of the traffic
MAX_GROUPS = 1024            # the group table is held in the registers of one warp
COUNTERS = 1024              # int32 words for the arrivals of shared tiles
ZERO_ROWS = 16               # padding rows a program of the preparing kernel looks at
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
LAUNCH_SECONDS = 3.5e-6      # launch, schedule, first bytes
PREPARE_SECONDS = 2.0e-6     # the kernel in front: counters, piece table, padding rows


@dataclass(frozen=True)
class Static:
    """What the device code is compiled for; its fields are read by `fp8_decode_device.py`."""

    LAYOUT: int
    BT: int                  # token columns
    BN: int                  # weight rows
    CONSUMERS: int           # warpgroups that share the weight rows
    STAGES: int
    STREAM: int              # 0: whole tiles only; else the fewest K blocks a CTA takes of a shared tile
    GROUPS: int              # size of the group table, a power of two from 32
    STORE_VEC: int           # elements of 16 bytes of output
    ACCUMULATE: bool
    PDL: bool
    LOADER_REGS: int
    CONSUMER_REGS: int

    @property
    def WR(self) -> int:
        """Weight rows of one consumer."""
        return self.BN // self.CONSUMERS

    @property
    def SCALE_ROWS(self) -> int:
        """Blocks of 128 weight rows in a tile."""
        return max(1, self.BN // 128)

    @property
    def PARTS_AHEAD(self) -> int:
        """Partial sums loaded before the first is added."""
        return 4 if self.WR * self.BT <= 2048 else 2


def extra(config: Config, name: str, default: int = 0) -> int:
    return next((v for k, v in config.extra if k == name), default)


def smem_bytes(config: Config, itemsize: int = 2) -> int:
    """Shared memory of a CTA: the ring, its barriers, and the transposition of a tile (never less than the compiler uses)."""
    bt, bn = config.block_m, config.block_n
    slot = (bn + bt) * 128 + max(1, bn // 128) * bt * 4 + 16
    return config.num_stages * slot + bn * bt * itemsize + 1024


def max_registers(config: Config) -> int:
    """Registers a thread that let the CTAs of one SM be resident together; warps are allocated by fours."""
    warps = config.num_warps + 4
    return min(232, 65536 // (extra(config, "ctas", 1) * warps * 32) // 8 * 8)


def static(problem: Problem, config: Config, groups: int) -> Static:
    table = 32
    while table < groups and problem.layout in ("offsets", "psum", "masked"):
        table *= 2
    regs = max_registers(config)
    return Static(LAYOUT_IDS[problem.layout], config.block_m, config.block_n, config.num_warps // 4, config.num_stages,
                  extra(config, "stream"), table, 16 // ITEMSIZE[problem.out_dtype], problem.accumulate,
                  bool(extra(config, "pdl")), min(regs, 56 if table <= 256 else 88), regs)
