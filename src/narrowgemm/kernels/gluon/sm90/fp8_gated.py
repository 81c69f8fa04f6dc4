"""Gated FP8 block-scaled product on Hopper for many rows: gate_up of an expert layer, SwiGLU, and its quantisation, in one launch.

1x128 activations x 128x128 weights, E4M3, FP32 scales, groups by offsets. The result is E4M3 with 1x128 scales, MN-major, bit for
bit that of the product in BF16 and of `activate`. What `fp8_cluster.py` does on tiles of 128x256, with another store: what
the activation would read, and the product write for it, stays on the chip, for the time that SwiGLU takes from the tensor cores.
Device code: `fp8_gated_device.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from ....arch import Arch
from ....formats import FP8_1x128
from ....problem import Config, Epilogue, Problem, Step
from ....reference.activate import OAI_ARGS
from ...launching import Launch
from ...operands import Operands
from ...triton.activate import is_bf16
from . import fp8_cluster
from .fp8_block_tile import LAYOUTS, group_table
from .fp8_gated_tile import BLOCK, GatedTile
from .tensor_maps import planes, row_tiles, stride

NAME = "gluon_sm90.fp8_gated"
BACKEND = "gluon_sm90"
OPS = ("gated_gemm",)
ACTIVATIONS = ("swiglu", "swiglu_oai")
MIN_ROWS = 128              # of a group: what it takes less than the two steps with fewer was not measured
STORE_SECONDS = 0.8e-6      # of a tile, that SwiGLU takes more than a plain store
_EXTRA = {"cluster_n": (1, 2)}


def epilogue(activation: str = "swiglu", args: tuple[float, ...] = ()) -> Epilogue:
    return Epilogue(activation=activation if activation in ACTIVATIONS else "swiglu", activation_args=args, quantize=FP8_1x128)


def plain(problem: Problem) -> Problem:
    """The product that is inside."""
    return replace(problem, op="grouped_gemm", epilogue=Epilogue())


def supports(problem: Problem, arch: Arch) -> str | None:
    e = problem.epilogue
    if e != epilogue(e.activation, e.activation_args) or problem.op not in OPS or problem.layout != "offsets":
        return "computes products of groups by offsets, with SwiGLU and E4M3 in 1x128 blocks behind"
    if reason := fp8_cluster.supports(plain(problem), arch):
        return reason
    if problem.b.scale_dtype != "fp32" or problem.out_dtype != "bf16" or problem.accumulate:
        return "takes FP32 scales, and rounds to BF16 between"
    if problem.n % (2 * BLOCK) or not problem.out_aligned:
        return f"needs a multiple of {BLOCK} results, not {problem.n / 2}, in rows that start on 16 bytes"
    return None if problem.rows >= MIN_ROWS else f"is for {MIN_ROWS} rows a group and more, not {problem.rows}"


def configs(problem: Problem, arch: Arch) -> list[Config]:
    """Tiles of 128 rows x 256 columns of gate and up. Pairs that share A are legal, and 1-3% behind where the plain product takes
    them: not offered."""
    alone = Config(128, 256, 128, 9, 4, 16, persistent=True)
    return [alone] if legal(problem, alone, arch) is None else []


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    extra = dict(config.extra)
    for name, value in extra.items():
        if value not in _EXTRA.get(name, ()):
            return f"{name}={value!r}, expected one of {_EXTRA.get(name, 'no such option')}"
    if (config.block_m, config.block_n) != (128, 256):
        return f"tile {config.block_m}x{config.block_n}, expected 128x256"
    if reason := fp8_cluster.legal(plain(problem), config, arch):
        return reason
    return None if tile_of(problem, config).shared_bytes <= arch.smem else "needs more shared memory than the device has"


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config) -> GatedTile:
    groups = group_table(problem)
    clamped = 0 if problem.epilogue.activation == "swiglu" else 2 if is_bf16(numbers(problem)[1]) else 1
    return GatedTile(LAYOUTS[problem.layout], CLUSTER_N=config.option("cluster_n", 1), STAGES=config.num_stages,
                     STRIP=config.group_m, GROUPS=groups, CLAMPED=clamped)


def numbers(problem: Problem) -> tuple[float, float]:
    """(alpha, limit) of the activation."""
    e = problem.epilogue
    alpha, limit = (1.0, 0.0) if e.activation == "swiglu" else e.activation_args or OAI_ARGS
    return alpha, limit


def workspace(problem: Problem, config: Config) -> int:
    return 0


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """The product's, and what a tile's store takes more."""
    tiles = -(-problem.m // 128) * -(-problem.n // 256)
    return fp8_cluster.estimate(plain(problem), config, arch) + STORE_SECONDS * max(1.0, tiles / arch.sms)


# ---------------------------------------------------------------- launch
def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from ....arch import detect
    from . import fp8_gated_device as device

    arch, tile = detect(x.out.device), tile_of(problem, step.config)
    a, b, sa, sb, out = x.a.data, x.b.data, x.a.scale, x.b.scale, x.out
    assert sa is not None and sb is not None and x.out_scale is not None and x.out_scale.stride(0) == 1
    column, row, blocks = stride(sa, -1, -(-x.m // 4) * 4), stride(out, -2, x.n // 2), x.k // 128
    sa_desc = TensorDescriptor(sa, [blocks, x.m], [column, 1], [1, tile.BM],
                               gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2))
    box = [64, tile.OUT_COLS]
    out_desc = TensorDescriptor(out, [x.m, x.n // 2], [row, 1], box, gl.NVMMASharedLayout.get_default_for(box, gl.float8e4nv))
    clusters = min(problem.max_sms or arch.sms, arch.sms) // tile.CLUSTER
    grid = max(1, min(clusters, row_tiles(problem, x, tile.UNIT.BM) * -(-x.n // tile.UNIT.BN)))
    return [Launch(device.fp8_gated_kernel, (grid,), (
        planes(a, x.k, tile.A_BOX), sa_desc, planes(b, x.k, tile.B_BOX), out_desc, out, x.out_scale, sb, x.index, x.m, x.n, blocks,
        x.groups, x.alignment, sb.stride(0), sb.stride(-2), sb.stride(-1), row, x.out_scale.stride(1), x.amax_clamp,
        *numbers(problem), tile),
        {"num_warps": 4, "maxnreg": tile.max_registers}, tile.CLUSTER)]
