"""Quantisation on any GPU, bit-exact with `reference/quantize.py`. Device code: `quantize_device.py`.

1xN blocks (FP8 and E2M1), 128x128 blocks, rows and whole tensors; input of any strides, scales of any strides. All are
bound by bandwidth: one read and one write, but two reads for whole tensors and for rows beyond 16384 elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...arch import Arch, detect
from ...formats import Format
from ...problem import Config, Problem, Step
from ...reference.quantize import MANTISSA_BITS, mantissa
from ..launching import Launch, Pointer
from ..operands import Operands
from .common import LAUNCH_SECONDS

NAME = "triton.quantize"
BACKEND = "triton"
SOURCES = ("bf16", "fp16", "fp32")
GROUP_COLUMNS = (32, 64, 128)
PARTS = 1024               # partial maxima of a matrix, tensor-wise
ROW_ONCE = 16384           # elements of a row that a program holds in registers
EFFICIENCY = 0.85          # of bandwidth


def supports(problem: Problem, arch: Arch) -> str | None:
    if problem.op != "quantize":
        return f"quantises, it has no {problem.op}"
    if arch.vendor == "cpu":
        return "runs on a GPU"
    if arch.vendor == "nvidia" and arch.capability < 89:
        return f"{arch.target} converts no FP8"
    source, fmt = problem.a.format, problem.b.format
    if source.name not in SOURCES:
        return f"reads BF16, FP16 and FP32, not {source.name}"
    if fmt.element == "e2m1":
        ok = fmt.group[0] == 1 and fmt.group[1] in GROUP_COLUMNS
    elif fmt.element in ("e4m3", "e5m2"):
        ok = kind(fmt) != ""
    else:
        return f"writes E4M3, E5M2 and E2M1, not {fmt.element}"
    if not ok or fmt.scale == "none" or (fmt.scale == "e8m0" and kind(fmt) in ("rows", "tensor")):
        return f"has no {fmt.element} with {fmt.scale} scales of {fmt.group}"
    return None


def kind(fmt: Format) -> str:
    """Which of the kernels writes a format: '' for none."""
    rows, cols = fmt.group
    if rows == 1:
        return "groups" if cols in GROUP_COLUMNS else "rows" if cols == 0 else ""
    return {(128, 128): "tiles", (0, 0): "tensor"}.get(fmt.group, "")


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """`block_m` x `block_k`: rows (1xN: blocks) x columns of a program's tile."""
    how, cols = kind(problem.b.format), problem.b.format.group[1]
    if how == "groups":
        return [Config(e // cols, 1, cols, warps(e, arch), 1) for e in (4096, 2048, 8192, 1024)]
    if how == "tiles":
        return [Config(128, 1, 128, w, 1) for w in (8, 16)]
    if how == "rows":
        block = min(max(next_pow2(problem.k), 64), ROW_ONCE)
        tall = max(1, 4096 // block)
        many = min(16, 1024 // arch.warp)
        return [Config(rows, 1, block, w, 1) for rows in dict.fromkeys((tall, 1))
                for w in ((4, 8) if rows * block <= 4096 else (8, many))]
    return [Config(1, 1, e, warps(e, arch), 1) for e in (4096, 8192, 2048)]


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    how, cols = kind(problem.b.format), problem.b.format.group[1]
    rows, columns = config.block_m, config.block_k
    for name, v in (("block_m", rows), ("block_k", columns), ("num_warps", config.num_warps)):
        if v < 1 or v & (v - 1):
            return f"{name}={v}, expected a power of two"
    if config.num_warps > 1024 // arch.warp:
        return f"num_warps={config.num_warps}, the device has {1024 // arch.warp}"
    if how in ("groups", "tiles") and columns != cols:
        return f"block_k={columns}, the format's blocks have {cols} columns"
    if (how == "tiles" and rows != 128) or (how == "tensor" and rows != 1):
        return f"block_m={rows}, expected {128 if how == 'tiles' else 1}"
    if not 16 <= rows * columns <= 32768:
        return f"a tile of {rows * columns} elements, expected 16 to 32768"
    return None


def warps(elements: int, arch: Arch) -> int:
    """Warps that leave a thread 16 elements: two 16-byte loads of BF16, one 16-byte store of FP8."""
    return max(1, elements // (16 * arch.warp))


def next_pow2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def workspace(problem: Problem, config: Config) -> int:
    return 4 * PARTS * problem.groups if kind(problem.b.format) == "tensor" else 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    source, fmt = problem.a.format, problem.b.format
    size = problem.m * problem.k
    reads = 2 if kind(fmt) == "tensor" or (kind(fmt) == "rows" and problem.k > ROW_ONCE) else 1
    moved = reads * source.storage_bytes(problem.m, problem.k) + fmt.storage_bytes(problem.m, problem.k)
    tile = config.block_m * config.block_k
    programs = -(-size // tile)
    # what a program moves at once takes about 1.5 us from its SM; up to 2048 threads an SM
    resident = max(1, 2048 // (config.num_warps * arch.warp))
    waves = max(1.0, programs / (arch.sms * resident))
    busy = min(1.0, programs / (2 * arch.sms))
    return LAUNCH_SECONDS * (2 if kind(fmt) == "tensor" else 1) + max(
        moved / (arch.bandwidth * EFFICIENCY * max(busy, 0.05)), waves * (1.0e-6 + tile * 4e-11))


def matrices(x: Tensor) -> Tensor:
    """`[..., R, C]` as `[B, R, C]`; copies only where the leading axes have no common stride."""
    return x.unsqueeze(0) if x.dim() == 2 else x if x.dim() == 3 else x.flatten(0, -3)


def e2m1_kind(fmt: Format, x: Tensor) -> int:
    """How device code rounds to E2M1: 0 it doesn't, 1 an element at a time, 2 pairs of BF16 (see `quantize_device.PAIRS`)."""
    if fmt.element != "e2m1":
        return 0
    pairs = x.dtype == torch.bfloat16 and fmt.scale == "e8m0" and detect(x.device).capability >= 90
    return 2 if pairs and native(x) else 1


def native(x: Tensor) -> bool:
    """Whether device code may use NVIDIA's own instructions: they are not interpreted."""
    from triton import knobs

    arch = detect(x.device)
    return arch.vendor == "nvidia" and arch.capability >= 89 and not knobs.runtime.interpret


def merge(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, R, C]` tensors as `[1, B * R, C]`, where the strides of all of them allow it."""
    if tensors[0].shape[0] == 1 or any(t.stride(0) != t.shape[1] * t.stride(1) for t in tensors):
        return tensors
    return tuple(t.as_strided((1, t.shape[0] * t.shape[1], t.shape[2]), (0, *t.stride()[1:])) for t in tensors)


def is_wide(*tensors: Tensor) -> bool:
    """An offset inside one matrix passes 2^31 elements."""
    return any(sum((n - 1) * s for n, s in zip(t.shape[1:], t.stride()[1:])) >= 2**31 for t in tensors)


def launches(step: Step, problem: Problem, operands: Operands, workspace: Tensor | None) -> list[Launch]:
    from . import quantize_device as device

    c, fmt = step.config, problem.b.format
    elem, how = fmt.elem, kind(fmt)
    assert operands.out_scale is not None
    x, out, scale = matrices(operands.a.data), matrices(operands.out), matrices(operands.out_scale)
    if how in ("groups", "rows"):
        x, out, scale = merge(x, out, scale)
    b, r, k = x.shape
    # where these are views, kernels take the operands themselves: a view's address is theirs
    px, pout, pscale = (t if v.data_ptr() == t.data_ptr() else v for v, t in
                        ((x, operands.a.data), (out, operands.out), (scale, operands.out_scale)))
    clamp = operands.amax_clamp
    is_e8m0 = fmt.scale == "e8m0"
    e8m0 = {"ROUNDING": operands.rounding if is_e8m0 else "", "E8M0": is_e8m0, "EMAX": elem.emax,
            "MANTISSA": mantissa(elem.max), "MANTISSA_BITS": MANTISSA_BITS[fmt.element],
            "SATURATE": is_e8m0 and operands.rounding != "rceil"}
    if how == "groups":
        cols = fmt.group[1]
        s = -(-k // cols)
        dense = b == 1 and x.stride(2) == 1 and k % cols == 0 and (r == 1 or x.stride(1) == k)
        flat = dense and out.is_contiguous() and scale.is_contiguous()
        if scale.stride(1) == 1 and s > 1:
            wide = 32 // scale.element_size()  # rows whose scales fill a sector
            bg = max(1, c.block_m // wide)
        else:
            bg = 1 if x.stride(2) != 1 else min(c.block_m, next_pow2(s))
        br = c.block_m // bg
        grid = -(-r * s // c.block_m) if flat else b * -(-r // br) * -(-s // bg)
        return [Launch(
            device.groups_kernel, (grid,),
            (px, pout, pscale, r, k, s, clamp, x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1),
             *scale.stride()),
            dict(N=cols, BR=br, BG=bg, FLAT=flat, WIDE=is_wide(x, out, scale), E2M1=e2m1_kind(fmt, x),
                 TOP=elem.max, NATIVE=native(x), **e8m0, num_warps=c.num_warps, num_stages=1))]
    if how == "tiles":
        grid = b * -(-r // 128) * -(-k // 128)
        far = 128 * max(x.stride(1), x.stride(2), out.stride(1)) >= 2**31
        return [Launch(
            device.tiles_kernel, (grid,),
            (px, pout, pscale, r, k, clamp, *x.stride(), out.stride(0), out.stride(1), *scale.stride()),
            dict(BR=128, BK=128, WIDE=far, TOP=elem.max, **e8m0, num_warps=c.num_warps, num_stages=1))]
    if how == "rows":
        return [Launch(
            device.rows_kernel, (b * -(-r // c.block_m),),
            (px, pout, pscale, r, k, clamp, *x.stride(), out.stride(0), out.stride(1), scale.stride(0), scale.stride(1)),
            dict(BR=c.block_m, BK=c.block_k, ONCE=k <= c.block_k, TOP=elem.max, num_warps=c.num_warps, num_stages=1))]
    assert workspace is not None
    part = Pointer(workspace, torch.int32)
    parts = min(PARTS, -(-r * k // c.block_k))
    flat = x.stride(2) == 1 and (r == 1 or x.stride(1) == out.stride(1) == k)
    shape = {"BLOCK": c.block_k, "FLAT": flat, "num_warps": c.num_warps, "num_stages": 1}
    return [Launch(device.tensor_amax_kernel, (b * parts,), (px, part, r, k, *x.stride(), parts), shape),
            Launch(device.tensor_cast_kernel, (b * parts,),
                   (px, part, pout, pscale, r, k, clamp, *x.stride(), out.stride(0), out.stride(1), scale.stride(0), parts),
                   dict(PARTS=PARTS, TOP=elem.max, **shape))]
