"""Launches of the quantising kernels for the compile tests: every kind of block, input and output."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from narrowgemm.formats import FP8_ROW, FP8_TENSOR, MXFP4, MXFP8, Format, FP8_1x128, FP8_128x128
from narrowgemm.ops.quantize import quantize

CASES: tuple[tuple[Format, torch.dtype], ...] = (
    (FP8_1x128, torch.bfloat16), (FP8_1x128.with_element("e5m2"), torch.float16), (FP8_1x128, torch.float32),
    (MXFP8, torch.bfloat16), (MXFP4, torch.bfloat16), (MXFP4, torch.float32), (FP8_128x128, torch.bfloat16),
    (FP8_128x128.with_scale("e8m0"), torch.bfloat16), (FP8_ROW, torch.bfloat16), (FP8_TENSOR, torch.bfloat16),
)


def call(fmt: Format, dtype: torch.dtype, rows: int, k: int, **options) -> None:
    quantize(torch.zeros(rows, k, dtype=dtype), fmt, backend="triton", **options)


def jobs(target: str, sizes: str = "1,4096") -> Iterator[tuple[str, Callable[[], object]]]:
    for fmt, dtype in CASES:
        for rows in map(int, sizes.split(",")):
            yield f"{fmt.name} {dtype} {rows}", lambda f=fmt, d=dtype, r=rows: call(f, d, r, 2048)
    yield "ragged", lambda: call(FP8_1x128, torch.bfloat16, 512, 2000)
    yield "MN-major scales", lambda: call(FP8_1x128, torch.bfloat16, 512, 2048, scale_layout="mn_major")
    yield "floor", lambda: call(MXFP8, torch.bfloat16, 512, 2048, rounding="floor")
    yield "transposed", lambda: quantize(torch.zeros(2048, 512, dtype=torch.bfloat16).mT, FP8_1x128, backend="triton")
    yield "long rows", lambda: call(FP8_ROW, torch.bfloat16, 64, 32768)
