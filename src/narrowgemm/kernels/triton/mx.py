"""Portable GEMM with MXFP8 and MXFP4 weights, dense and grouped, by `tl.dot_scaled`: one Triton source for every GPU.

BF16, FP16, MXFP8, MXFP4 or FP8 activations (1x128, by row, by tensor); the scales of FP8 are left to the sum of each 128 of K. The
scaled matrix instruction on CDNA4 and Blackwell; elsewhere the compiler converts to BF16 in front of the product, which on Hopper
runs at an eighth of the read bandwidth for few rows: prepack there, or leave dense MXFP8 to `mx8_decode` and `expand`.
Device code: `mx_device.py`.
"""

from __future__ import annotations

from torch import Tensor

from ...arch import Arch, detect
from ...formats import ScaledTensor
from ...problem import Config, Problem, Step
from ..launching import Launch
from ..operands import Operands
from . import common

NAME = "triton.mx"
BACKEND = "triton"
A_KINDS = ("bf16", "fp16", "e4m3", "e2m1")
B_KINDS = ("e4m3", "e2m1")
# of the BF16 rate on 128x128 tiles; of the read bandwidth where weights are the traffic
EFFICIENCY, STREAMING = 0.3, 0.15
# where the compiler converts to BF16: microseconds of 128 of K of a tile on an SM of a device of the rate below, where others hide
# its latency, and alone; by what A is: not converted, in one part or two; FP8 with scales for 128 of K; narrow as B is, with scales
# that may be too far from one for BF16 (E4M3 on both sides) or not. 32x64, which is routed products' own, was timed for BF16 alone
BLOCK_TIMES = {
    "bf16": {(16, 128): (1.0, 2.0), (32, 128): (1.35, 2.5), (64, 128): (1.8, 3.5), (128, 128): (2.3, 4.2), (64, 64): (0.70, 3.5),
             (16, 64): (0.56, 2.5), (32, 64): (0.63, 3.0)},
    "fp16": {(16, 128): (1.1, 2.2), (64, 128): (2.2, 4.5), (64, 64): (1.2, 4.5), (16, 64): (0.63, 3.0), (32, 64): (0.85, 3.7)},
    "chunked": {(16, 128): (0.97, 2.7), (32, 128): (2.1, 4.0), (64, 128): (4.1, 6.0), (128, 128): (4.5, 7.0), (64, 64): (1.75, 6.0),
                (16, 64): (0.61, 3.0), (32, 64): (1.15, 4.3)},
    "narrow": {(16, 128): (1.2, 2.8), (32, 128): (2.5, 4.3), (64, 128): (4.7, 7.0), (128, 128): (4.8, 7.5), (64, 64): (1.9, 6.5),
               (16, 64): (0.79, 3.5), (32, 64): (1.35, 4.8)},
    "far": {(16, 128): (1.4, 2.75), (32, 128): (3.2, 3.5), (64, 128): (4.1, 4.4), (128, 128): (4.9, 6.9), (64, 64): (1.9, 4.1),
            (16, 64): (0.97, 2.5), (32, 64): (1.75, 3.2)}}
# of a tile with one stage, as much
SERIAL = {(16, 128): 1.25, (32, 128): 1.5, (64, 128): 1.3, (128, 128): 1.9, (64, 64): 1.7, (16, 64): 1.2, (32, 64): 1.4}
RATE = 0.76e15
OVERHEAD = 32               # rows that bringing a tile's weights counts as, where tiles have not been timed
NATIVE = 100                # NVIDIA's first compute capability with scaled products
SPLIT_TILES = ((16, 128), (64, 128), (64, 64), (16, 64))        # of FP16, without spills on any target
MOST_GFX942 = {1: 64, 2: 16}     # rows of a tile, by parts: more spill there
TILES = ((16, 128, 4, 3), (32, 128, 8, 3), (64, 128, 8, 3), (128, 128, 8, 3), (64, 64, 4, 2), (16, 64, 4, 2))


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.op not in ("gemm", "grouped_gemm") or problem.layout not in common.LAYOUT_IDS:
        return f"computes gemm and grouped_gemm, not {problem.op} with layout {problem.layout}"
    if not problem.epilogue.plain or problem.gather:
        return "has no fused gather and no epilogue beyond the sum"
    return refuse_operands(problem, arch)


def refuse_operands(problem: Problem, arch: Arch) -> str | None:
    """Why the products of this source can't take the operands on this device, or None."""
    a, b = problem.a, problem.b
    if arch.vendor == "cpu" or (arch.vendor == "nvidia" and arch.capability < 89):
        return f"runs on GPUs with FP8 conversions, not {arch.target}"
    if b.format.element not in B_KINDS or b.format.group != (1, 32) or b.scale_dtype != "e8m0":
        return f"takes MXFP8 and MXFP4 weights, not {b.format.name}"
    fine = not a.format.scaled or (a.format.group == (1, 32) and a.scale_dtype == "e8m0")
    if a.format.element not in A_KINDS or not (fine or by_chunk(problem)):
        return ("takes BF16, FP16, MXFP8, MXFP4 and FP8 activations (1x128, by row, by tensor), "
                f"not {a.format.name} with {a.scale_dtype or 'no'} scales")
    if arch.target == "gfx942" and a.format.scaled:
        return "gfx942 has no scaled product of two narrow operands"
    if a.prepack or b.prepack:
        return "takes plain operands, not prepacked ones"
    if a.major != "k" or b.major != "k":
        return "needs both operands K-major"
    return None


def by_chunk(problem: Problem) -> bool:
    """Whether A is FP8 with a scale for 128 of K or for all of it, FP32 or E8M0: the sum of a K block is scaled."""
    return problem.a.format.group in ((1, 128), (1, 0), (0, 0)) and problem.a.format.element == "e4m3"


def scale_strides(a: ScaledTensor) -> tuple[int, int]:
    """(from row to row, from block to block of K) of A's scales: 0 where the same scale is read again."""
    if a.scale is None:
        return 0, 0
    rows, columns = a.format.group
    return a.scale.stride(-2) if rows else 0, a.scale.stride(-1) if columns else 0


def smem_bytes(problem: Problem, config: Config, arch: Arch) -> int:
    """Upper bound: the pipelined loads, and the BF16 copies where the compiler converts. On AMD copies stay in registers, and one
    of two stages does."""
    narrow = config.block_m * problem.a.format.elem.bits + config.block_n * problem.b.format.elem.bits
    if arch.vendor == "amd":
        return max(1, config.num_stages - 1) * narrow * config.block_k // 8 + 4096
    ring = config.num_stages * (narrow * config.block_k // 8 + (config.block_m + config.block_n) * config.block_k // 32)
    return ring + 2 * (parts(problem) * config.block_m + config.block_n) * config.block_k + 4096


def parts(problem: Problem) -> int:
    """BF16 numbers that one of A is: products of a K block."""
    return 2 if problem.a.format.element == "fp16" else 1


def configs(problem: Problem, arch: Arch) -> list[Config]:
    rows = max(1, problem.rows)
    near = [t for t in TILES if t[0] <= max(16, 4 * rows) and (parts(problem) == 1 or t[:2] in SPLIT_TILES)]
    out = [Config(bm, bn, 128, w, 1 if serial(problem, arch) else s if arch.vendor == "nvidia" else 2, persistent=True)
           for bm, bn, w, s in near]
    return [c for c in out if legal(problem, c, arch) is None]


def serial(problem: Problem, arch: Arch) -> bool:
    """Whether K blocks have to go one after the other. On NVIDIA, rows of weights that asynchronous copies can't load come through
    registers, and with two or three stages BF16 x MXFP4 is then wrong on an H100 (Triton 3.6; calc_diff 0.8), with one right."""
    return arch.vendor == "nvidia" and not (problem.k % 128 == 0 and problem.a.aligned and problem.b.aligned)


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    if serial(problem, arch) and config.num_stages > 1:
        return f"num_stages={config.num_stages} with rows off 16 bytes or K no multiple of 128: expected 1, others compute wrong"
    if config.block_k != 128 or config.split_k != 1 or config.swap_ab or not config.persistent:
        return "expected block_k=128 and persistent, without split_k and swap_ab"
    if config.block_m not in (16, 32, 64, 128) or config.block_n not in (32, 64, 128):
        return f"block_m={config.block_m}, block_n={config.block_n}, expected powers of two up to 128"
    if arch.target == "gfx942" and config.block_m > MOST_GFX942[parts(problem)]:
        return f"{config.block_m} rows spill registers on gfx942, {MOST_GFX942[parts(problem)]} do not"
    if smem_bytes(problem, config, arch) > arch.smem:
        return f"needs {smem_bytes(problem, config, arch)} bytes of shared memory, the device has {arch.smem}"
    return None


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: the slower of padded tiles at a share of the BF16 rate and the bytes at a share of the bandwidth."""
    tiles, shape = common.tiles(problem, config), (config.block_m, config.block_n)
    what = kind(problem, arch)
    if converts(arch) and (times := BLOCK_TIMES[what].get(shape)):
        each, alone = times
        block = 1e-6 * max(tiles / arch.sms * each, alone) * (RATE / 132) / (arch.bf16_flops / arch.sms)
        block *= SERIAL[shape] if config.num_stages == 1 and what != "far" else 1.0
        return common.LAUNCH_SECONDS + max(-(-problem.k // config.block_k) * block, problem.bytes / arch.bandwidth)
    work = tiles * 2.0 * parts(problem) * (config.block_m + OVERHEAD) / (1 + OVERHEAD / 128) * config.block_n * problem.k
    return common.LAUNCH_SECONDS + max(work / (arch.bf16_flops * EFFICIENCY), problem.bytes / (arch.bandwidth * STREAMING))


def kind(problem: Problem, arch: Arch) -> str:
    """Which of `BLOCK_TIMES`."""
    if not problem.a.format.scaled:
        return problem.a.format.element
    return "chunked" if by_chunk(problem) else "far" if far(problem, arch) else "narrow"


def converts(arch: Arch) -> bool:
    """Whether the compiler brings both sides to BF16 in front of a product."""
    return arch.vendor == "nvidia" and arch.capability < NATIVE


def far(problem: Problem, arch: Arch) -> bool:
    """Whether it brings E4M3 with E8M0 scales to BF16 on both sides, and scales may be too far from one for that."""
    return converts(arch) and problem.a.format.element == problem.b.format.element == "e4m3" and not by_chunk(problem)


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from . import mx_device as device

    c = step.config
    a, b, out, sa, sb = x.a.data, x.b.data, x.out, x.a.scale, x.b.scale
    assert sb is not None
    masked = problem.layout == "masked"
    slots = common.slots(problem, x, c.block_m)
    arch = detect(out.device)
    programs = min(slots * -(-x.n // c.block_n), problem.max_sms or common.resident(out, common.smem_bytes(c, arch)))
    sag, (sam, sak) = 0 if sa is None or not masked else sa.stride(0), scale_strides(x.a)
    return [Launch(
        device.mx_kernel, (programs,),
        (a, b, out, sb if sa is None else sa, sb, x.index if x.index is not None else sb, x.m, x.n, x.k, x.groups, slots,
         x.alignment, a.stride(0) if masked else 0, a.stride(-2), b.stride(0) if b.dim() == 3 else 0, b.stride(-2),
         out.stride(0) if masked else 0, out.stride(-2), sag, sam, sak, sb.stride(0) if sb.dim() == 3 else 0, sb.stride(-2),
         sb.stride(-1)),
        dict(LAYOUT=common.LAYOUT_IDS[problem.layout], A_KIND=problem.a.format.element, B_KIND=problem.b.format.element,
             BM=c.block_m, BN=c.block_n, BK=128, GROUP_M=c.group_m, EVEN_K=x.k % 128 == 0, EVEN_N=x.n % c.block_n == 0,
             CHUNKED=by_chunk(problem), ACCUMULATE=problem.accumulate, ZERO=problem.zero_padding, WIDE=problem.wide,
             FAR=far(problem, arch), num_warps=c.num_warps, num_stages=c.num_stages))]
