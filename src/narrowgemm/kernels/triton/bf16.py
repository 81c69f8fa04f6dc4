"""Portable 16-bit GEMM, dense and grouped (every layout of rows), BF16 or FP16 on both sides: one Triton source for every GPU.

For few rows, where torch's grouped product costs its set-up, its index arithmetic and a copy: one launch here, bound to the
signature like any other. Many rows are cuBLAS's (`torch_bf16`). Device code: `bf16_device.py`.
"""

from __future__ import annotations

from torch import Tensor

from ...arch import Arch
from ...problem import PADDED, Config, Problem, Step
from ..launching import Launch
from ..operands import Operands
from . import common

NAME = "triton.bf16"
BACKEND = "triton"
LAYOUTS = ("dense", "contiguous", "psum", "offsets", "masked")
BESIDE = 4.0        # times as long on Hopper, in these: not measured beside `gluon_sm90.bf16`, in whose place it is never taken
ELEMENTS = ("bf16", "fp16")
# of the BF16 rate on 128x128 tiles; of the read bandwidth; what a byte through L2 costs of one from memory (H100)
EFFICIENCY, STREAMING, L2_COST = 0.43, 0.92, 0.03
STREAMING_MORE = 0.80       # of the read bandwidth, where groups have more than 16 rows (H200)
FEW = ((16, 64, 128, 4, 4, True), (16, 128, 128, 4, 5, True), (32, 64, 128, 4, 4, True), (64, 128, 64, 4, 5, True))
MANY = ((128, 128, 64, 8, 4, False), (64, 128, 64, 4, 4, False), (128, 128, 64, 8, 3, False))
AMD = ((128, 128, 64, 8, 2, False), (64, 128, 64, 4, 2, False), (32, 128, 64, 4, 2, False), (16, 64, 128, 4, 2, False))


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.op not in ("gemm", "grouped_gemm") or problem.layout not in LAYOUTS:
        return f"computes gemm and grouped_gemm, not {problem.op} with layout {problem.layout}"
    a, b = problem.a, problem.b
    if a.format.scaled or b.format.scaled or a.format.element != b.format.element or a.format.element not in ELEMENTS:
        return f"takes BF16 or FP16 on both sides, not {a.format.name} x {b.format.name}"
    if arch.vendor == "cpu" or (arch.vendor == "nvidia" and arch.capability < 80):
        return "runs on GPUs that have a BF16 matrix instruction"
    if a.prepack or b.prepack:
        return "takes plain operands, not prepacked ones"
    if not problem.epilogue.plain or problem.gather:
        return "has no fused gather and no epilogue beyond the sum"
    return None


def smem_bytes(config: Config) -> int:
    """Upper bound: the pipelined loads."""
    return config.num_stages * 2 * (config.block_m + config.block_n) * config.block_k + 1024


def configs(problem: Problem, arch: Arch) -> list[Config]:
    rows = max(1, problem.rows)
    if arch.vendor == "amd":
        near = [t for t in AMD if t[0] <= max(16, 2 * rows)]
    elif rows <= 64:
        near = [t for t in FEW if t[0] <= max(16, 2 * rows)]
        if arch.target == "sm100" and problem.layout == "psum":
            near = [t for t in near if t[:2] != (16, 64)]       # spills there
    else:
        near = list(MANY)
        if arch.target == "sm100" and problem.layout == "masked":
            near = [t for t in near if t[:2] != (128, 128)]     # spills there
    out = [Config(bm, bn, bk, w, s, swap_ab=swap, persistent=True) for bm, bn, bk, w, s, swap in near]
    return [c for c in out if smem_bytes(c) <= arch.smem]


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    if config.block_k not in (32, 64, 128) or config.split_k != 1 or not config.persistent:
        return "expected block_k of 32, 64 or 128 and persistent, without split_k"
    if config.block_m not in (16, 32, 64, 128) or config.block_n not in (16, 32, 64, 128, 256):
        return f"block_m={config.block_m}, block_n={config.block_n}, expected powers of two from 16 to 128 and to 256"
    if smem_bytes(config) > arch.smem:
        return f"needs {smem_bytes(config)} bytes of shared memory, the device has {arch.smem}"
    return None


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: whole waves of tiles at a share of the BF16 rate, or the bytes, by as many SMs as a last wave keeps busy."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    tiles = max(1, common.tiles(problem, config))
    waves = -(-tiles // sms)
    rate = arch.bf16_flops / arch.sms * EFFICIENCY * common.RATE.get((config.block_m, config.block_n), 0.55)
    bm, bn = (config.block_m, max(config.block_n, 64)) if config.swap_ab else (max(config.block_m, 64), config.block_n)
    math = waves * 2.0 * bm * bn * problem.k / rate
    through_l2 = tiles * 2.0 * (config.block_m + config.block_n) * problem.k
    busy = tiles / (waves * sms) if tiles > sms else min(1.0, 2 * tiles / sms)
    streaming = STREAMING if problem.rows <= 16 else STREAMING_MORE
    memory = (problem.bytes / (streaming * busy) + L2_COST * through_l2) / arch.bandwidth * arch.sms / sms
    beside = BESIDE if problem.layout in PADDED and arch.target == "sm90" else 1.0
    return (common.LAUNCH_SECONDS + max(math, memory)) * beside


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from . import bf16_device as device

    c = step.config
    a, b, out = x.a.data, x.b.data, x.out
    masked = problem.layout == "masked"
    most = common.slots(problem, x, c.block_m)
    programs = most * -(-x.n // c.block_n)
    programs = min(programs, problem.max_sms or common.resident(out, smem_bytes(c)))
    return [Launch(
        device.bf16_kernel, (programs,),
        (a, b, out, x.index if x.index is not None else a, x.m, x.n, x.k, x.groups, most, x.alignment, a.stride(0) if masked else 0,
         a.stride(-2), a.stride(-1), b.stride(0) if b.dim() == 3 else 0, b.stride(-2), b.stride(-1), out.stride(0) if masked else 0,
         out.stride(-2)),
        dict(LAYOUT=common.LAYOUT_IDS[problem.layout], BM=c.block_m, BN=c.block_n, BK=c.block_k, GROUP_M=c.group_m,
             EVEN_K=x.k % c.block_k == 0, EVEN_N=x.n % c.block_n == 0, SWAP=c.swap_ab, ACCUMULATE=problem.accumulate,
             ZERO=problem.zeroes, WIDE=problem.wide, num_warps=c.num_warps,
             num_stages=c.num_stages))]
