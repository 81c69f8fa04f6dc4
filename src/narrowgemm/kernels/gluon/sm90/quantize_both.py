"""`quantize_both` on Hopper where both copies have scales of their own, 1x128 or row-wise: one read, two writes.

The portable kernel finds each tile's scales many times over and reads it twice; this one doesn't. Launches in front are the
portable kernel's; row-wise it needs none for segments. Device code: `quantize_both_device.py`.
"""

from __future__ import annotations

from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ....reference.quantize import MANTISSA_BITS, mantissa
from ... import launching
from ...launching import Launch
from ...operands import Operands
from ...triton import quantize_both as portable

NAME = "gluon_sm90.quantize_both"
BACKEND = "gluon_sm90"
OPS = ("quantize_both",)
EFFICIENCY = 0.9        # of the streaming rate
REGISTERS = 128         # two blocks of 256 threads an SM
STRIP = 4               # tiles that a program finds the maxima of
CHUNKS = (32, 128, 512)


def supports(problem: Problem, arch: Arch) -> str | None:
    if arch.target != "sm90":
        return f"runs on NVIDIA Hopper (sm90), not {arch.target}"
    if (reason := portable.supports(problem, arch)) is not None:
        return reason
    if problem.b.format.group not in ((1, 128), (1, 0)):
        return f"takes copies with scales of their own, 1x128 or row-wise, not {problem.b.format.group}"
    return None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    return [Config(128, 1, 128, 8, 1)]


def workspace(problem: Problem, config: Config) -> int:
    return portable.workspace(problem, config)


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    return portable.seconds(problem, config, arch, EFFICIENCY)


def launch(step: Step, problem: Problem, operands: Operands, workspace: Tensor | None) -> None:
    launching.launch(launches, step, problem, operands, workspace)


def launches(step: Step, problem: Problem, operands: Operands, workspace: Tensor | None) -> list[Launch]:
    from . import quantize_both_device as device

    o, fmt = operands, problem.b.format
    x, blocks, grouped = o.a.data, fmt.group[1] == 128, problem.layout == "offsets"
    batch, t, k = (1, *x.shape) if x.dim() == 2 else x.shape
    first, maxima, arguments = portable.prepare(problem, o, workspace)
    tiles_t, wide = arguments[12], portable.wide(o)
    if not blocks:
        first = maxima
        row_amax, col_amax = arguments[5:7]
        first.append(Launch(device.amax_kernel, (batch * -(-t // 128) * -(-k // (128 * STRIP)),),
                            (x, arguments[7], row_amax, col_amax, t, k, o.groups, -(-t // 128), arguments[14], x.stride(-2)),
                            {"SPAN": STRIP, "GROUPED": grouped, "WIDE": wide, "num_warps": 8, "maxnreg": REGISTERS}))
    is_e8m0 = fmt.scale == "e8m0"
    chunk = next((n for n in CHUNKS if n >= o.groups), CHUNKS[-1])
    options = dict(BLOCKS=blocks, GROUPED=grouped, EVEN=t % 128 == 0, WIDE=wide, CHUNK=chunk,
                   ROUNDING=o.rounding if is_e8m0 else "", E8M0=is_e8m0, TOP=fmt.elem.max, EMAX=fmt.elem.emax,
                   MANTISSA=mantissa(fmt.elem.max), MANTISSA_BITS=MANTISSA_BITS[fmt.element], num_warps=8, maxnreg=REGISTERS)
    return [*first, Launch(device.both_kernel, (batch * tiles_t * -(-k // 128),), arguments, options)]
