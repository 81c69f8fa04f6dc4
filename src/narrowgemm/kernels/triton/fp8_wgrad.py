"""Portable k-grouped FP8 GEMM (weight gradient): out[g] = A[:, ks_g] . B[:, ks_g]^T, group sizes on the device.

Takes 1x128 scales along K on both sides, row-wise and tensor-wise ones too. Device code: `fp8_wgrad_device.py`.
"""

from __future__ import annotations

from torch import Tensor

from ...arch import Arch
from ...problem import Config, Problem, Step
from ..launching import Launch
from ..operands import Operands
from . import common

NAME = "triton.fp8_wgrad"
BACKEND = "triton"
TILE_SECONDS = 1.5e-5   # of a tile, beyond its K blocks: 19 us a tile of one block on an H100
EFFICIENCY = 0.25  # both operands are M-major as a rule: the tiles are transposed on the way to the tensor core


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.op != "grouped_gemm_wgrad":
        return f"computes grouped_gemm_wgrad, not {problem.op}"
    if problem.b.format.group[0] == 128:
        return "takes 1x128, row-wise or tensor-wise scales on both sides, not 128x128"
    return common.refuse(problem, arch)


def configs(problem: Problem, arch: Arch) -> list[Config]:
    cand = [Config(128, 128, 128, 8, 3), Config(128, 64, 128, 4, 3), Config(64, 64, 128, 4, 3), Config(64, 128, 128, 4, 2)]
    if arch.target == "sm100":
        cand = cand[2:3]  # the others spill: the sum comes back through tensor memory to be scaled
    if arch.target == "gfx942":
        cand = cand[1:]
    return [c for c in cand if common.smem_bytes(c, arch) <= arch.smem]


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    tiles = problem.groups * -(-problem.m // config.block_m) * -(-problem.n // config.block_n)
    rate = max(arch.fp8_flops, 1.0) / arch.sms * EFFICIENCY
    tile = 2.0 * config.block_m * config.block_n * max(problem.k // max(problem.groups, 1), 128) / rate
    sms = min(arch.sms, problem.max_sms or arch.sms)
    return common.LAUNCH_SECONDS + max(-(-tiles // sms) * (tile + TILE_SECONDS), problem.bytes / (0.8 * arch.bandwidth))


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from . import fp8_wgrad_device as device

    c = step.config
    sa, sa_e8m0, (sag, sam, sak) = common.kernel_scale(x.a)
    sb, sb_e8m0, (sbg, sbn, sbk) = common.kernel_scale(x.b)
    a, b, out = x.a.data, x.b.data, x.out
    tiles = x.groups * -(-x.m // c.block_m) * -(-x.n // c.block_n)
    programs = min(tiles, problem.max_sms) if problem.max_sms else tiles
    return [Launch(
        device.fp8_wgrad_kernel, (programs,),
        (a, b, out, sa, sb, x.index, x.m, x.n, x.k, tiles, a.stride(-2), a.stride(-1), b.stride(-2), b.stride(-1),
         out.stride(0), out.stride(1), sag, sam, sak, sbg, sbn, sbk),
        dict(BM=c.block_m, BN=c.block_n, BK=128, GROUP_M=c.group_m, ACCUMULATE=problem.accumulate,
             EVEN=x.m % c.block_m == 0 and x.n % c.block_n == 0, SA_E8M0=sa_e8m0,
             SB_E8M0=sb_e8m0, WIDE=problem.wide, num_warps=c.num_warps, num_stages=c.num_stages))]
