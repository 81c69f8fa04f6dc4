"""FP8 weight gradient on Hopper: K-grouped, group lengths on the device, in Gluon.

Row-wise and tensor-wise scales with promotion as in `fp8_scaled`, or 1x128 scales on both sides; E4M3, E5M2 or one of each.
Tiles of which a few would set the time are cut along K and added up in a fixed order. Groups' columns start at multiples of 128,
with zeros up to the next one, as `quantize_both` writes them; operands that come otherwise are copied into the workspace so
(`k_major`). Device code: `fp8_wgrad_device.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ...launching import Launch, Pointer
from ...operands import Operands
from ...triton import k_major
from ...triton.k_major import Copied
from . import fp8_scaled
from .fp8_block_tile import LAYOUTS, MAX_GROUPS, group_table
from .fp8_scaled_tile import OUT_COLS, Tile
from .refusals import OUT_DTYPES
from .tensor_maps import output, planes, stride

NAME = "gluon_sm90.fp8_wgrad"
BACKEND = "gluon_sm90"
# 1x128 scales, block_m x block_n -> warpgroups along M and N, columns of a warpgroup's wgmma, its pieces of 64 rows: as many
# sums as leave registers for one partial sum beside its scales
BLOCK_SHAPES = {(128, 256): (1, 2, 128, 2), (128, 128): (2, 1, 128, 1), (64, 256): (1, 2, 128, 1), (64, 128): (1, 2, 64, 1)}
_WIDE = fp8_scaled.config(128, 256, 3, 8)      # FP32 outputs leave room for three slots
BLOCK_TIMES = {(128, 256): 1.12, (128, 128): 0.600, (64, 256): 0.640, (64, 128): 0.400}     # with 1x128 scales
WIDE_SECONDS = 0.5e-6   # of a tile of two pieces, a byte of an output element: half of it waits for the other half's store
SHARE = 4 * 132         # a tile longer than two of this many parts of the work is cut into chunks no longer than one


def supports(problem: Problem, arch: Arch) -> str | None:
    p, a, b = problem, problem.a, problem.b
    if arch.target != "sm90":
        return f"runs on NVIDIA Hopper (sm90), not {arch.target}"
    if p.op != "grouped_gemm_wgrad":
        return f"computes grouped_gemm_wgrad, not {p.op}"
    blocks = a.format.group == b.format.group == (1, 128)
    if not blocks and (a.format.group not in fp8_scaled.GROUPS or b.format.group not in fp8_scaled.GROUPS):
        return f"takes row-wise and tensor-wise scales, or 1x128 on both sides, not {a.format.group} x {b.format.group}"
    if blocks and any(x.scale_major != "mn" or x.scale_dtype != "fp32" for x in (a, b)):
        return "TMA loads 1x128 scales in FP32, MN-major with columns on 16 bytes"
    if (reason := fp8_scaled.refuse_operands(a, b)) is not None:
        return reason
    if p.alignment % 128 and blocks:
        return f"takes 1x128 scales of groups that start at multiples of 128 (KGrouped.alignment), not of {p.alignment}"
    if p.n < 8 or not p.k:
        return f"takes at least 8 columns and something to contract, not {p.n} and {p.k}"
    if p.out_dtype not in OUT_DTYPES:
        return f"writes {', '.join(OUT_DTYPES)}, not {p.out_dtype}"
    if 0 < p.promote < 128:
        return f"promotes every 128 of K, not every {p.promote}"
    if p.groups > MAX_GROUPS:
        return f"counts tiles of up to {MAX_GROUPS} groups, not {p.groups}"
    if p.wide:
        return "offsets inside a tile pass 2^31 elements"
    return None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    found = (_WIDE, *fp8_scaled.CANDIDATES) if _blocks(problem) else fp8_scaled.CANDIDATES
    return [c for c in found if legal(problem, c, arch) is None]


def _blocks(problem: Problem) -> bool:
    return problem.a.format.group[1] == 128


def _shape(problem: Problem, config: Config) -> tuple[int, int, int, int, int]:
    """Warpgroups along M and N, columns of the one or two wgmma of one, its pieces."""
    if _blocks(problem):
        wgm, wgn, cols, pieces = BLOCK_SHAPES[config.block_m, config.block_n]
        return wgm, wgn, cols, 0, pieces
    return *fp8_scaled.SHAPES[config.block_m, config.block_n], 1


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    if _blocks(problem) and (config.block_m, config.block_n) not in BLOCK_SHAPES:
        return f"with 1x128 scales tiles are {list(BLOCK_SHAPES)}, not {config.block_m}x{config.block_n}"
    pieces = BLOCK_SHAPES[config.block_m, config.block_n][3] if _blocks(problem) else 1
    if pieces > 1 and problem.accumulate and not problem.out_aligned:
        return f"{config.block_n} columns leave no registers for what the output held; TMA adds to it where it is aligned"
    return fp8_scaled.legal_tile(replace(problem, promote=0) if _blocks(problem) else problem, config) or (
        f"needs more shared memory than the {arch.smem} bytes of the device" if tile_of(problem, config, arch) is None else None)


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config, arch: Arch) -> Tile | None:
    """The compile-time constants of a legal config; None where it needs more shared memory than there is."""
    wgm, wgn, cols0, cols1, pieces = _shape(problem, config)
    groups = group_table(problem)
    for buffers in (4, 3, 2, 1):       # staging of the store: as much as fits
        if buffers * OUT_COLS > cols0 + cols1:
            continue
        tile = Tile(
            LAYOUTS["masked"], WGM=wgm, WGN=wgn, COLS0=cols0, COLS1=cols1, STAGES=config.num_stages,
            PROMOTE=0 if _blocks(problem) else problem.promote // 128, STRIP=config.group_m, OUT_BUFFERS=buffers,
            OUT_BYTES=problem.out_bytes, GROUPS=groups, A_ROWS=problem.a.format.group[0] == 1,
            B_ROWS=problem.b.format.group[0] == 1, BLOCKS=_blocks(problem), ZERO=False, ACCUMULATE=problem.accumulate,
            STORE_TMA=problem.out_aligned,
            SPLIT=_cut(problem, config) or pieces > 1,      # two pieces: see `_cut`
            TABLES=2, MP=pieces)
        if tile.shared_bytes <= arch.smem:
            return tile
    return None


def _cut(problem: Problem, config: Config) -> bool:
    """Whether a tile can be longer than 2 / SHARE of the work: one of many can't.

    Tiles of two pieces are compiled as if they could: without the branch to what others summed, ptxas keeps 77 registers of the
    sums on the stack, there and back in every K block.
    """
    return -(-problem.m // config.block_m) * -(-problem.n // config.block_n) < SHARE // 2


def _copies(problem: Problem) -> tuple[int, int]:
    """Bytes of K-major copies of A and of B, 0 where they need none."""
    tight = problem.alignment % 128 != 0
    columns = k_major.columns(problem.k, problem.groups if tight else 0)
    return (problem.m * columns if tight or k_major.needed(problem.a) else 0,
            problem.n * columns if tight or k_major.needed(problem.b) else 0)


def _counts(problem: Problem, config: Config) -> tuple[int, int, int]:
    """int32 of the plan, arrivals at cut tiles, elements of their sums. Cut tiles make fewer than 2 * SHARE items: each is
    more than half as long as a chunk may be."""
    groups = 4 * group_table(problem)
    if not _cut(problem, config):
        return groups, 0, 0
    return groups, 4 * SHARE, 2 * SHARE * config.block_m * config.block_n


def workspace(problem: Problem, config: Config) -> int:
    return _own(problem, config) + sum(_copies(problem))


def _own(problem: Problem, config: Config) -> int:
    """Bytes without copies: plan, arrivals and sums, and where segments start."""
    segments = 4 * (problem.groups + 1) if problem.alignment % 128 else 0
    return -(-(4 * sum(_counts(problem, config)) + segments) // 128) * 128


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds: tiles dealt out to the SMs, or the bytes at the streaming rate, whichever is longer, and some of the other."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    groups = max(problem.groups, 1)
    work = groups * -(-problem.m // config.block_m) * -(-problem.n // config.block_n)
    unit = -(-problem.k // groups // 128) * 1e-6 * (fp8_scaled.H200_RATE / 132) / (arch.fp8_flops / arch.sms)
    waves = math.ceil(work / sms) if work < 8 * sms else work / sms + 0.5
    times = BLOCK_TIMES if _blocks(problem) else fp8_scaled.BLOCK_TIMES
    tile = fp8_scaled.TILE_SECONDS + fp8_scaled.store_seconds(problem, tile_of(problem, config, arch), arch)
    if _blocks(problem) and _shape(problem, config)[4] > 1:
        tile += WIDE_SECONDS * problem.out_bytes * (2 if problem.accumulate else 1)
    seconds = waves * (unit * times[config.block_m, config.block_n] + tile)
    memory = fp8_scaled.MEMORY_SECONDS + problem.bytes / (arch.bandwidth * fp8_scaled.MEMORY_EFFICIENCY)
    copies = sum(k_major.seconds(size, arch) for size in _copies(problem) if size)
    return 2 * fp8_scaled.LAUNCH_SECONDS + max(seconds, memory) + fp8_scaled.NOT_HIDDEN * min(seconds, memory) + copies


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    """The plan of who does what, and the product."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ....arch import detect
    from . import fp8_wgrad_device as device
    from . import fp8_wgrad_plan_device as planner

    arch = detect(x.out.device)
    sa, sb, out = x.a.scale, x.b.scale, x.out
    assert sa is not None and sb is not None and workspace is not None
    tile = tile_of(problem, step.config, arch)
    assert tile is not None, f"{step.config} is not legal for {problem}"
    om = stride(out, -2, x.n)
    og = stride(out, 0, om * x.m)
    if tile.STORE_TMA and og % om:
        tile = replace(tile, STORE_TMA=False)
    out_desc = None
    if tile.STORE_TMA:
        out_desc = output(x, og, om, tile.OUT_COLS, tile.OUT_BYTES)
    tiles = -(-x.m // tile.BM) * -(-x.n // tile.BN)
    sms = arch.sms if not problem.max_sms else min(problem.max_sms, arch.sms)
    planned, arrivals, _ = _counts(problem, step.config)
    plan, counts = Pointer(workspace, torch.int32), Pointer(workspace, torch.int32, 4 * planned)
    sums = Pointer(workspace, torch.float32, 4 * (planned + arrivals))
    a, b, index, k, first = _k_major(problem, step.config, x, workspace)
    first.append(Launch(planner.plan_kernel, (1,), (index, plan, counts, k, x.groups, tiles, SHARE),
                        {"GROUPS": tile.GROUPS, "COUNTS": arrivals, "SPLIT": tile.SPLIT, "num_warps": 4}))
    sa_desc = sb_desc = None
    if tile.BLOCKS:
        flat = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        sa_desc, sb_desc = (TensorDescriptor(s, [s.shape[1], s.shape[0]], [s.stride(1), 1], [1, box], flat)
                            for s, box in ((sa, tile.BM), (sb, tile.BN)))
    arguments = (
        planes(a, k, tile.BM), planes(b, k, tile.WGN * tile.COLS0),
        planes(b, k, tile.COLS1) if tile.COLS1 else None, sa_desc, sb_desc, out_desc, out, sa, sb, index, plan,
        counts, sums, x.m, x.n, k,
        sa.stride(0) if sa.dim() == 3 else 0, sa.stride(-2), sb.stride(0) if sb.dim() == 3 else 0, sb.stride(-2), og, om, og // om,
        tile)
    grid = max(1, min(sms, tiles * x.groups))
    return [*first, Launch(device.fp8_wgrad_kernel, (grid,), arguments, {"num_warps": 4, "maxnreg": tile.max_registers})]


def _k_major(problem: Problem, config: Config, x: Operands, workspace: Tensor
             ) -> tuple[Tensor | Copied, Tensor | Copied, Tensor | Pointer, int, list[Launch]]:
    """(A, B, where groups start, columns of K, launches) as the product takes them: the call's own, or copies."""
    assert x.index is not None
    out: list[Tensor | Copied] = []
    launches: list[Launch] = []
    index: Tensor | Pointer = x.index
    segments, k = None, x.k
    if problem.alignment % 128:
        found, segments = k_major.find_segments(x.index, x.k, x.groups, workspace, 4 * sum(_counts(problem, config)))
        launches.append(found)
        index, k = segments, k_major.columns(x.k, x.groups)
    at = _own(problem, config)
    for t, size in zip((x.a.data, x.b.data), _copies(problem)):
        if size:
            made, copied = k_major.copy(t, workspace, at, x.index, segments, x.groups)
            launches.append(made)
            at += size
        out.append(copied if size else t)
    return out[0], out[1], index, k, launches
