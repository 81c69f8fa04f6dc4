"""Scores and the top-k of each token in one launch, a warp a token. Device code: `route_device.py`."""

from __future__ import annotations

from torch import Tensor

from ...arch import Arch
from ...problem import Config, Problem, Step
from ..launching import Launch
from ..step_operands import RouteOperands
from . import steps
from .common import LAUNCH_SECONDS
from .quantize import next_pow2

NAME = "triton.route"
BACKEND = "triton"
OPS = ("route",)
MAX_EXPERTS = 4096         # a warp holds the scores of all of them
MAX_TOP_K = 64


def supports(problem: Problem, arch: Arch) -> str | None:
    if reason := steps.refuse(problem, arch, "route"):
        return reason
    if problem.n > MAX_EXPERTS or problem.k > MAX_TOP_K:
        return f"chooses at most {MAX_TOP_K} of {MAX_EXPERTS} experts, not {problem.k} of {problem.n}"
    return None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """`block_n`: experts, padded."""
    block = next_pow2(max(problem.n, arch.warp))
    return [Config(1, block, 1, max(1, block // (16 * arch.warp)), 1), Config(1, block, 1, 4, 1)]


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    nbytes = problem.a.format.storage_bytes(problem.m, problem.n) + 8.0 * problem.m * problem.k
    # a maximum over the experts after another, each a walk over a lane's scores and a reduction over the lanes
    rounds = problem.k * (40e-9 + 2e-9 * config.block_n / (config.num_warps * arch.warp) + 30e-9 * (config.num_warps > 1))
    resident = arch.sms * max(1, min(32, 64 // config.num_warps))
    return LAUNCH_SECONDS + max(nbytes / arch.bandwidth, max(1.0, problem.m / resident) * (1e-6 + rounds))


def launches(step: Step, problem: Problem, operands: RouteOperands, workspace: Tensor | None) -> list[Launch]:
    from . import route_device as device

    o = operands
    (tokens, experts), top_k = o.logits.shape, o.out.shape[1]
    groups = max(1, o.num_expert_group)
    best = 0 if groups == 1 else 1 if o.bias is None else min(2, experts // groups)
    size = experts // groups
    return [Launch(device.route_kernel, (tokens,), (
        o.logits, o.bias, o.weights, o.out, *o.logits.stride(), o.scaling_factor, groups, size, o.topk_group),
        {"K": top_k, "KP": next_pow2(top_k), "GP": next_pow2(groups), "SP": next_pow2(size), "BEST": best,
         "SOFTMAX": o.scoring == "softmax", "BIAS": o.bias is not None, "RENORMALIZE": o.renormalize,
         "num_warps": step.config.num_warps, "num_stages": 1})]
