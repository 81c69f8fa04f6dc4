"""Portable FP8 GEMM, dense and grouped (contiguous, psum, offsets, masked): one Triton source for every GPU.

Block-scaled (1x128 x 128x128 or 1x128), row-wise and tensor-wise scales, FP32 or E8M0; partial sums are promoted to FP32
every 128 of K. Device code: `fp8_block_device.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...arch import Arch, detect
from ...problem import Config, Problem, Step
from ..launching import Launch, Pointer
from ..operands import Operands
from . import common

NAME = "triton.fp8_block"
BACKEND = "triton"
EFFICIENCY = 0.47  # of the FP8 rate on 128x128 tiles; fitted on H200 times, docs/measured.md


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.op not in ("gemm", "grouped_gemm"):
        return f"computes gemm and grouped_gemm, not {problem.op}"
    if problem.layout not in common.LAYOUT_IDS:
        return f"has no {problem.layout} layout"
    return common.refuse(problem, arch)


def configs(problem: Problem, arch: Arch) -> list[Config]:
    out = common.tile_configs(problem, arch)
    if problem.layout == "dense" and not problem.batch_invariant:
        blocks = -(-problem.k // 128)
        for split in (2, 4, 8):
            # a split has at least 4 K blocks, and is there to fill SMs that tiles leave idle
            out += [replace(c, split_k=split) for c in out[:4] if c.split_k == 1 and blocks >= 4 * split
                    and common.tiles(problem, c) * split <= 4 * arch.sms]
    return out


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None: what the kernel's code needs, beyond the candidates tried by default."""
    if config.block_k != 128:
        return "block_k is the scale block, 128"
    for name in ("block_m", "block_n"):
        v = getattr(config, name)
        if v not in (16, 32, 64, 128, 256):
            return f"{name}={v}, expected a power of two from 16 to 256"
    if problem.b.format.group[0] == 128 and config.block_n > 128:
        return f"block_n={config.block_n} crosses a 128-column scale block"
    if config.split_k > 1 and problem.layout != "dense":
        return "split_k is for dense problems"
    if config.split_k > 1 and problem.batch_invariant:
        return "split_k would depend on the batch"
    if problem.layout == "masked" and not config.persistent:
        return "masked needs persistent=True: only the device knows the number of tiles"
    if common.smem_bytes(config, arch) > arch.smem:
        return f"needs {common.smem_bytes(config, arch)} bytes of shared memory, the device has {arch.smem}"
    return None


def workspace(problem: Problem, config: Config) -> int:
    """FP32 partial sums of split-K; the bucket of M is at least the real M."""
    return 4 * config.split_k * problem.m * problem.n if config.split_k > 1 else 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    return common.estimate(problem, config, arch, EFFICIENCY)


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    """The kernel, and behind it the sum of partial sums where K is split."""
    from . import fp8_block_device as device

    c = step.config
    sa, sa_e8m0, (sag, sam, sak) = common.kernel_scale(x.a)
    sb, sb_e8m0, (sbg, sbn, sbk) = common.kernel_scale(x.b)
    a, b, out = x.a.data, x.b.data, x.out
    masked = problem.layout == "masked"
    slots = common.slots(problem, x, c.block_m)
    programs = slots * -(-x.n // c.block_n)
    if c.persistent:
        programs = min(programs, problem.max_sms or common.resident(out, common.smem_bytes(c, detect(out.device))))
    target: Tensor | Pointer = out
    target_strides = (out.stride(0) if masked else 0, out.stride(-2))
    if c.split_k > 1:
        assert workspace is not None
        target, target_strides = Pointer(workspace, torch.float32), (0, x.n)
    found = [Launch(
        device.fp8_block_kernel, (programs, c.split_k),
        (a, b, target, sa, sb, x.index if x.index is not None else sa, x.m, x.n, x.k, x.groups, slots, x.alignment,
         a.stride(0) if masked else 0, a.stride(-2), a.stride(-1),
         b.stride(0) if b.dim() == 3 else 0, b.stride(-2), b.stride(-1), *target_strides,
         sag if masked else 0, sam, sak, sbg, sbn, sbk),
        dict(LAYOUT=common.LAYOUT_IDS[problem.layout], BM=c.block_m, BN=c.block_n, BK=128,
             GROUP_N=1 if x.b.format.group[0] == 1 else 128, GROUP_M=c.group_m, SPLIT_K=c.split_k, EVEN_K=x.k % 128 == 0,
             EVEN_N=x.n % c.block_n == 0, SWAP=c.swap_ab, PERSISTENT=c.persistent,
             ACCUMULATE=problem.accumulate and c.split_k == 1, ZERO=problem.zero_padding, SA_E8M0=sa_e8m0, SB_E8M0=sb_e8m0,
             WIDE=problem.wide, num_warps=c.num_warps, num_stages=c.num_stages))]
    if c.split_k > 1:
        block = 512
        found.append(Launch(
            device.reduce_splits_kernel, (x.m, -(-x.n // block)), (target, out, x.m, x.n, out.stride(-2)),
            dict(SPLIT_K=c.split_k, BLOCK=block, ACCUMULATE=problem.accumulate, num_warps=4)))
    return found
