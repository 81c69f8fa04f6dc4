"""What the kernels around the expert layer's products share on the host: who they run for, tiles, and what they cost."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...arch import Arch, detect
from ...formats import Format
from ...problem import Config, Problem
from ...reference.quantize import MANTISSA_BITS, mantissa
from .common import LAUNCH_SECONDS
from .quantize import GROUP_COLUMNS, ROW_ONCE, e2m1_kind, native, next_pow2, warps

FLOATS = ("bf16", "fp16", "fp32")
COPY_COLUMNS = 128         # of a block where there are no scales
EFFICIENCY = 0.85          # of bandwidth
PROGRAM_SECONDS = 1.5e-6   # what a program moves at once takes from its SM


def refuse(problem: Problem, arch: Arch, op: str) -> str | None:
    """Why a kernel of `op` can't take the problem on this device, or None."""
    if problem.op != op:
        return f"computes {op}, not {problem.op}"
    if arch.vendor == "cpu":
        return "runs on a GPU"
    if problem.a.format.name not in FLOATS:
        return f"reads BF16, FP16 and FP32, not {problem.a.format.name}"
    return None


def refuse_format(problem: Problem, arch: Arch) -> str | None:
    """Why rows can't be written in the problem's format `b`, or None."""
    fmt = problem.b.format
    if not fmt.scaled:
        same = fmt.name == problem.a.format.name
        return None if same else f"writes {problem.a.format.name} rows as they are, not as {fmt.name}"
    if arch.vendor == "nvidia" and arch.capability < 89:
        return f"{arch.target} converts no FP8"
    if fmt.group == (1, 0) and fmt.scale == "fp32" and fmt.element != "e2m1":
        return None if problem.k <= ROW_ONCE else f"holds rows of {ROW_ONCE} elements at most, not {problem.k}"
    if fmt.group[0] == 1 and fmt.group[1] in GROUP_COLUMNS:
        return None
    return f"has no {fmt.element} with {fmt.scale} scales of {fmt.group}"


def by_rows(fmt: Format) -> bool:
    """One scale a row, in which case a program holds whole rows."""
    return fmt.scaled and fmt.group[1] == 0


def columns(fmt: Format) -> int:
    """Columns of a block: what a scale is for, or what is moved together."""
    return fmt.group[1] if fmt.scaled else COPY_COLUMNS


def tile_configs(problem: Problem, arch: Arch, sizes: tuple[int, ...] = (4096, 2048, 1024)) -> list[Config]:
    """`block_m` x `block_k`: blocks (whole rows) x columns of a program's tile."""
    if by_rows(problem.b.format):
        block = min(max(next_pow2(problem.k), 64), ROW_ONCE)
        many = min(16, 1024 // arch.warp)
        return [Config(rows, 1, block, 4 if rows * block <= 4096 else many, 1)
                for rows in dict.fromkeys((max(1, 4096 // block), 1))]
    cols = columns(problem.b.format)
    return [Config(e // cols, 1, cols, warps(e, arch), 1) for e in sizes]


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run rows of the problem's format `b`, or None."""
    for name in ("block_m", "block_n", "block_k", "num_warps"):
        v = getattr(config, name)
        if v < 1 or v & (v - 1):
            return f"{name}={v}, expected a power of two"
    if config.block_n > config.block_m:
        return f"block_n={config.block_n}, a tile has {config.block_m} blocks"
    if config.num_warps > 1024 // arch.warp:
        return f"num_warps={config.num_warps}, the device has {1024 // arch.warp}"
    if by_rows(problem.b.format):
        if config.block_k < problem.k:
            return f"block_k={config.block_k}, a row has {problem.k} columns"
    elif config.block_k != columns(problem.b.format):
        return f"block_k={config.block_k}, the format's blocks have {columns(problem.b.format)} columns"
    if not 16 <= config.block_m * config.block_k <= 32768:
        return f"a tile of {config.block_m * config.block_k} elements, expected 16 to 32768"
    return None


def seconds(nbytes: float, programs: int, config: Config, arch: Arch) -> float:
    """Predicted time of `programs` that move `nbytes` between them."""
    resident = max(1, 2048 // (config.num_warps * arch.warp))
    waves = max(1.0, programs / (arch.sms * resident))
    busy = min(1.0, programs / (2 * arch.sms))
    return LAUNCH_SECONDS + max(nbytes / (arch.bandwidth * EFFICIENCY * max(busy, 0.05)), waves * PROGRAM_SECONDS)


def split_blocks(block_m: int, blocks: int, scale_rows_contiguous: bool, itemsize: int) -> tuple[int, int]:
    """(rows, blocks of a row) of a tile of `block_m` blocks: MN-major scales are written a sector at a time."""
    bg = max(1, block_m // (32 // itemsize)) if scale_rows_contiguous and blocks > 1 else block_m
    bg = min(bg, next_pow2(blocks))
    return block_m // bg, bg


def leads(x: Tensor) -> bool:
    """Whether a launch may tell the one behind that it may start (programmatic dependent launch)."""
    return native(x) and detect(x.device).capability >= 90


def follows(problem: Problem, x: Tensor) -> dict[str, Any]:
    """Parameter and option of a launch that may start while the one in front, which says so, is still at it."""
    front = bool(problem.front) and leads(x)
    return {"FOLLOWS": front} | ({"launch_pdl": True} if front else {})


def scale_constants(fmt: Format, rounding: str, x: Tensor) -> dict[str, Any]:
    """What the device code of quantisation knows of a format and of what is quantised; dummies where it is not scaled."""
    if not fmt.scaled:
        return {"E2M1": 0, "TOP": 1.0, "ROUNDING": "", "E8M0": False, "EMAX": 0, "MANTISSA": 0, "MANTISSA_BITS": 0,
                "SATURATE": False}
    e8m0 = fmt.scale == "e8m0"
    return {"E2M1": e2m1_kind(fmt, x), "TOP": fmt.elem.max, "ROUNDING": rounding if e8m0 else "", "E8M0": e8m0,
            "EMAX": fmt.elem.emax, "MANTISSA": mantissa(fmt.elem.max), "MANTISSA_BITS": MANTISSA_BITS[fmt.element],
            "SATURATE": e8m0 and rounding != "rceil"}
