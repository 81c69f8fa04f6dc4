"""Launches of the kernels behind `quantize_both` for the compile tests: every kind of scale, with and without groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from narrowgemm.formats import FP8_ROW, FP8_TENSOR, Format, FP8_1x128, FP8_128x128
from narrowgemm.kernels.triton import k_major
from narrowgemm.ops.quantize_both import quantize_both


def both(fmt: Format, **options) -> None:
    quantize_both(torch.zeros(4096, 2048, dtype=torch.bfloat16), fmt, torch.zeros(9, dtype=torch.int64), backend="triton", **options)


def jobs(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for fmt in (FP8_TENSOR, FP8_ROW, FP8_1x128, FP8_1x128.with_scale("e8m0")):
        yield fmt.name, lambda f=fmt: both(f)
    yield "weights", lambda: quantize_both(torch.zeros(2, 512, 2048, dtype=torch.bfloat16), FP8_128x128, backend="triton")
    yield "scale given", lambda: both(FP8_TENSOR, scale=torch.ones(1))
    for fmt in (FP8_TENSOR, FP8_128x128):
        yield f"FP32 weights {fmt.name}", lambda f=fmt: quantize_both(torch.zeros(2, 512, 2048), f, backend="triton")
    yield "scale given, maxima", lambda: both(FP8_TENSOR, scale=torch.ones(1), amax=torch.ones(1))


def k_major_jobs(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    space = torch.zeros(1 << 20, dtype=torch.uint8)
    for turned in (False, True):
        x = torch.zeros(512, 1024).to(torch.float8_e4m3fn)
        x = x.mT.contiguous().mT if turned else x
        offsets = torch.zeros(5, dtype=torch.int64)
        _, segments = k_major.find_segments(offsets, 1024, 4, space, 0)
        for index, seg, groups in ((None, None, 0), (offsets, segments, 4)):
            yield f"turned {turned} groups {groups}", lambda x=x, i=index, s=seg, g=groups: k_major.copy(x, space, 4096, i, s, g)[0].run()
