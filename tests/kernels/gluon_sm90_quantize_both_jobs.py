"""Launches of the Hopper kernels behind `quantize_both` for the compile tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from narrowgemm.formats import FP8_ROW, Format, FP8_1x128
from narrowgemm.ops.quantize_both import quantize_both


def both(fmt: Format, dtype: torch.dtype = torch.bfloat16, groups: int = 8) -> None:
    quantize_both(torch.zeros(4096, 2048, dtype=dtype), fmt, torch.zeros(groups + 1, dtype=torch.int64), backend="gluon_sm90")


def jobs(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for fmt in (FP8_1x128, FP8_ROW, FP8_1x128.with_scale("e8m0"), FP8_1x128.with_element("e5m2")):
        yield fmt.name, lambda f=fmt: both(f)
    yield "fp32", lambda: both(FP8_1x128, torch.float32)
    yield "fp16, many groups", lambda: both(FP8_ROW, torch.float16, 700)
    for fmt in (FP8_1x128, FP8_ROW):
        yield f"weights {fmt.name}", lambda f=fmt: quantize_both(torch.zeros(2, 500, 2048, dtype=torch.bfloat16), f, backend="gluon_sm90")
