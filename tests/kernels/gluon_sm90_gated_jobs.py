"""Launches of the gated product on Hopper for the compile tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import FP8_1x128, FP8_128x128, ScaledTensor
from narrowgemm.kernels.gluon.sm90 import fp8_gated
from narrowgemm.kernels.operands import Operands
from narrowgemm.problem import Config, Operand, Problem, Step

from .gluon_sm90_cluster_jobs import check_places

M, I, K, G = 4096, 1536, 1024, 16


def describe(groups: int = G, activation: str = "swiglu") -> Problem:
    return Problem("gated_gemm", "offsets", M, 2 * I, K, groups, Operand(FP8_1x128, scale_dtype="fp32", scale_major="mn"),
                   Operand(FP8_128x128, scale_dtype="fp32"), rows=M // G, epilogue=fp8_gated.epilogue(activation))


def call(p: Problem, config: Config) -> None:
    empty, f8 = torch.empty, torch.float8_e4m3fn
    x = Operands(ScaledTensor(empty(M, K, dtype=f8), empty(K // 128, M).mT, FP8_1x128),
                 ScaledTensor(empty(p.groups, 2 * I, K, dtype=f8), empty(p.groups, 2 * I // 128, K // 128), FP8_128x128),
                 empty(M, I, dtype=f8), M, 2 * I, K, p.groups, empty(p.groups + 1, dtype=torch.int64),
                 out_scale=empty(I // 128, M).mT)
    launch, = fp8_gated.launches(Step(fp8_gated.NAME, config), p, x, None)
    compiled = launch.run()
    tile = launch.arguments[-1]
    assert compiled.packed_metadata[1] == launch.cluster == tile.CLUSTER
    metas = compiled.metadata.tensordesc_meta
    assert [[*metas[i]["block_size"]] for i in (0, 2)] == [[1, tile.A_BOX, 128], [1, tile.B_BOX, 128]]
    check_places(compiled.asm["ptx"], tile)


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    arch = get_arch(target)
    for groups, activation in ((G, "swiglu"), (256, "swiglu_oai")):
        p = describe(groups, activation)
        alone = fp8_gated.configs(p, arch)
        assert alone
        for c in (*alone, replace(alone[0], extra=(("cluster_n", 2),))):
            assert fp8_gated.legal(p, c, arch) is None
            yield f"{activation} {c}", lambda p=p, c=c: call(p, c)
