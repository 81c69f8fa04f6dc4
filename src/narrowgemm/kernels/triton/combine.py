"""Rows back to tokens: the weighted sum in order of choice, in one launch. Device code: `combine_device.py`."""

from __future__ import annotations

from torch import Tensor

from ...arch import Arch
from ...problem import Config, Problem, Step
from ..launching import Launch
from ..step_operands import CombineOperands
from . import steps
from .quantize import next_pow2

NAME = "triton.combine"
BACKEND = "triton"
OPS = ("combine",)


def supports(problem: Problem, arch: Arch) -> str | None:
    return steps.refuse(problem, arch, "combine")


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """`block_n` columns of a token a program."""
    return [Config(1, b, 1, max(1, b // (8 * arch.warp)), 1) for b in (1024, 512, 256, 2048)
            if b <= max(256, next_pow2(problem.n))]


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    nbytes = problem.a.format.storage_bytes(problem.m * problem.k, problem.n) + 4.0 * problem.m * problem.n
    return steps.seconds(nbytes, problem.m * -(-problem.n // config.block_n), config, arch)


def launches(step: Step, problem: Problem, operands: CombineOperands, workspace: Tensor | None) -> list[Launch]:
    from . import combine_device as device

    o, c = operands, step.config
    tokens, n = o.out.shape
    experts = o.offsets.numel() - 1
    return [Launch(device.combine_kernel, (tokens * -(-n // c.block_n),), (
        o.y, o.inverse, o.offsets, o.weights, o.bias, o.add, o.out, tokens, n, experts, o.y.stride(0), o.weights.stride(0),
        0 if o.add is None else o.add.stride(0), o.out.stride(0)),
        {"TOP_K": o.weights.shape[1], "BN": c.block_n, "EVEN": n % c.block_n == 0, "STEPS": experts.bit_length(),
         "BIAS": o.bias is not None, "ADD": o.add is not None, **steps.follows(problem, o.y), "num_warps": c.num_warps,
         "num_stages": 1})]
