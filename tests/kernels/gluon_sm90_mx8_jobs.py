"""Launches of the Hopper kernels for plain MXFP8 weights and few tokens, for the compile tests; problems for the others."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType

import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import MXFP8, ScaledTensor, dtype_of
from narrowgemm.kernels.gluon.sm90 import mx8_bf16, mx8_decode, mx8_f16, mx8_rows
from narrowgemm.kernels.launching import with_boxes
from narrowgemm.kernels.operands import Operands
from narrowgemm.problem import Config, Operand, Problem, Step

ARCH = get_arch("h200")
KERNELS = {k.NAME.rpartition(".")[2]: k for k in (mx8_decode, mx8_rows, mx8_bf16, mx8_f16)}
# rows, N, K, output; which config, bytes that rows of scales are apart beyond K / 32
FEW = {
    mx8_decode: (((1, 9216, 6144, "bf16"), 0, 0), ((16, 6144, 6144, "bf16"), 1, 3), ((32, 768, 6144, "fp32"), -1, 0), ((5, 6144, 768, "fp16"), 0, 0)),
    mx8_rows: (((64, 9216, 6144, "bf16"), 0, 0), ((40, 768, 6144, "fp32"), -1, 1)),
    mx8_bf16: (((40, 768, 6144, "fp32"), -1, 1), ((300, 768, 6144, "bf16"), -1, 0)),
    mx8_f16: (((512, 2304, 6144, "bf16"), 0, 0), ((200, 768, 768, "fp32"), -1, 1)),
}
MORE = {mx8_decode: (), mx8_rows: (), mx8_bf16: (((64, 9216, 6144, "bf16"), 0, 0), ((50, 6144, 6144, "fp16"), 0, 4)),
        mx8_f16: (((1000, 6144, 8192, "fp16"), 0, 4), )}


def problem(m: int, n: int, k: int, out: str) -> Problem:
    side = Operand(MXFP8, scale_dtype="e8m0", scale_major="k")
    return Problem("gemm", "dense", m, n, k, 1, side, side, rows=m, out_dtype=out)


def operands(p: Problem, off: int = 0) -> Operands:
    def side(rows: int) -> ScaledTensor:
        data = torch.empty(rows, p.k, dtype=torch.float8_e4m3fn, device="meta")
        return ScaledTensor(data, torch.empty(rows, p.k // 32 + off, dtype=torch.uint8, device="meta")[:, :p.k // 32], MXFP8)

    return Operands(side(p.m), side(p.n), torch.empty(p.m, p.n, dtype=dtype_of(p.out_dtype), device="meta"), p.m, p.n, p.k)


def compile_step(kernel: ModuleType, p: Problem, config: Config, x: Operands) -> None:
    work = torch.empty(kernel.workspace(p, config), dtype=torch.uint8, device="meta")
    for made in kernel.launches(Step(kernel.NAME, config), p, x, work):
        compiled = made.warm()
        if made.kernel.__name__ == kernel.NAME.replace("gluon_sm90.", "") + "_kernel":
            with_boxes(compiled, made.boxes)
            check_places(kernel, compiled, config)


def check_places(kernel: ModuleType, compiled, config: Config) -> None:
    """Of the product: boxes are as large as it waits for. It takes descriptors by the numbers of their parameters, and `mx8_decode` its ring by
    where shared memory starts: tokens' boxes are where Gluon's view of the ring has them, and where they are brought to."""
    boxes = [[1, config.block_n, 128], [1, config.block_m, 128]]
    if kernel is mx8_bf16:
        boxes = [[1, config.block_n // 2, 128], [config.block_m, 64]]
    elif kernel is mx8_f16:
        boxes = [[1, config.block_n, 128], [config.block_m, 64]]
    assert [m["block_size"] for m in compiled.metadata.tensordesc_meta][:2] == boxes
    ptx = compiled.asm["ptx"]
    assert re.findall(r"\.param \.align 64 \.b8 mx8_\w+_kernel_param_(\d+)\[128\]", ptx)[:2] == ["0", "7"]
    assert wgmma_of(kernel, config) in ptx
    if kernel is mx8_f16:       # the upper half of tokens' descriptors, which the emulation doesn't see: how rows are swizzled
        assert str(0x4000004000010000) in ptx
    if kernel is mx8_decode:
        assert len(re.findall(rf"add\.s32 [^;]*, {config.num_stages * mx8_decode.ROWS * 128};", ptx)) >= 3


def wgmma_of(kernel: ModuleType, config: Config) -> str:
    if kernel is mx8_f16:
        return f"m64n{config.block_m}k16.f32.f16.f16"
    if kernel is mx8_bf16:
        return f"m64n{config.block_m}k16.f32.bf16.bf16"
    return f"m64n{config.block_n if kernel is mx8_rows else config.block_m}k32.f32.e4m3.e4m3"


def jobs(target: str, name: str, which: str = "few") -> Iterator[tuple[str, Callable[[], object]]]:
    """'few': a config of each shape of FEW; 'all': every config, of MORE, too."""
    kernel = KERNELS[name]
    for shape, number, off in FEW[kernel] + (MORE[kernel] if which == "all" else ()):
        p = problem(*shape)
        found = kernel.configs(p, ARCH)
        for c in found if which == "all" else [found[number]]:
            yield f"{shape} | {c} | {kernel.smem_bytes(p, c)}", partial(compile_step, kernel, p, c, operands(p, off))
