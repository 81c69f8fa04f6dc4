"""Launches of the Hopper prefill kernel on clusters for the compile tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from narrowgemm.arch import get_arch
from narrowgemm.kernels.gluon.sm90 import fp8_cluster
from narrowgemm.problem import Config, Problem, Step

from .gluon_sm90_prefill_jobs import LAYOUTS, describe, operands


def call(p: Problem, config: Config) -> None:
    launch, = fp8_cluster.launches(Step(fp8_cluster.NAME, config), p, operands(p), None)
    compiled = launch.run()
    assert compiled.packed_metadata[1] == launch.cluster == launch.arguments[-1].CLUSTER
    check_boxes(compiled.metadata.tensordesc_meta, launch.arguments[-1])
    check_places(compiled.asm["ptx"], launch.arguments[-1])


def check_boxes(metas: list[dict], tile) -> None:
    """Triton's launcher will encode the boxes that the kernel waits for: another number of bytes would be waited for in vain."""
    a, b = metas[0]["block_size"], metas[2 if tile.A_SCALE_TMA else 1]["block_size"]
    assert [*a] == [1, tile.A_BOX, 128] and [*b] == [1, tile.B_BOX, 128], (metas, tile)
    assert tile.B_BOX * tile.CLUSTER_M == tile.BN and tile.B_BOX <= 256
    if tile.WIDER:
        assert [*metas[3 if tile.A_SCALE_TMA else 2]["block_size"]] == [1, tile.WIDER.BN, 128]


def check_places(ptx: str, tile) -> None:
    """The kernel takes descriptors by the numbers of their parameters, and its ring by where shared memory starts."""
    maps = [int(i) for i in re.findall(rf"\.param \.align 64 \.b8 {tile.KERNEL}_param_(\d+)\[128\]", ptx)]
    numbers = [0, tile.SA_PARAMETER, tile.B_PARAMETER] if tile.A_SCALE_TMA else [0, tile.B_PARAMETER]
    numbers += [tile.WIDER.B_PARAMETER] if tile.WIDER else []
    assert maps[:len(numbers)] == numbers, (maps, numbers)
    if tile.A_SCALE_TMA:    # read by way of Gluon's view of the ring, written by TMA to an address
        assert re.search(rf"(ld\.shared\.[^;]*\+|add\.s32 [^;]*, ){tile.SA_AT}\b", ptx), "A's scales are not where their TMA brings them"


def jobs(target: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': what is chosen, and another kind of tile; 'all': every config of the search space and every option."""
    arch = get_arch(target)
    chosen = fp8_cluster._GROUPED[0]
    if which == "few":
        e8m0 = describe("masked", e8m0=True, a_scale="k")
        yield f"contiguous {chosen}", lambda: call(describe("contiguous"), chosen)
        yield "offsets, two widths", lambda: call(describe("offsets"), fp8_cluster._GROUPED[-1])
        yield "dense, 192 columns", lambda: call(describe("dense"), fp8_cluster._DENSE[1])
        yield "dense, 192 and 128 columns", lambda: call(describe("dense"), fp8_cluster._MIXED)
        yield "dense, 144 columns", lambda: call(describe("dense"), fp8_cluster._DENSE[-1])
        yield "masked, E8M0, 192 columns", lambda: call(e8m0, fp8_cluster._config(128, 192, 5, cluster_m=2))
        return
    problems = {layout: describe(layout) for layout in LAYOUTS} | {
        "fp32": describe("offsets", out_dtype="fp32"), "accumulate": describe("contiguous", accumulate=True, out_dtype="fp16"),
        "plain stores": describe("psum", out_aligned=False)}
    for name, p in problems.items():
        configs = fp8_cluster.configs(replace(p, rows=4096), arch)
        assert configs
        for c in configs:
            yield f"{name} {c}", lambda p=p, c=c: call(p, c)
