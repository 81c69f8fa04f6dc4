"""Launches of the Hopper kernels behind `quantize_both`, `activate_both` and `activate_backward` for the compile tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from narrowgemm.formats import FP8_ROW, FP8_TENSOR, Format, FP8_1x128
from narrowgemm.layouts import Offsets
from narrowgemm.ops.activate_both import activate_backward, activate_both
from narrowgemm.ops.quantize_both import quantize_both


def both(fmt: Format, dtype: torch.dtype = torch.bfloat16, groups: int = 8, **options) -> None:
    quantize_both(torch.zeros(4096, 2048, dtype=dtype), fmt, torch.zeros(groups + 1, dtype=torch.int64), backend="gluon_sm90", **options)


def jobs(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    for fmt in (FP8_1x128, FP8_ROW, FP8_1x128.with_scale("e8m0")):
        yield fmt.name, lambda f=fmt: both(f)
    one = torch.ones(1)
    yield "FP32", lambda: both(FP8_1x128, torch.float32)
    yield "FP16, many groups", lambda: both(FP8_TENSOR, torch.float16, 700)
    yield "scale given, maxima", lambda: both(FP8_TENSOR, scale=one, amax=one.clone())
    yield "weights", lambda: quantize_both(torch.zeros(2, 500, 2048, dtype=torch.bfloat16), FP8_1x128, backend="gluon_sm90")


def activation_jobs(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    h, dy = torch.zeros(1024, 4096, dtype=torch.bfloat16), torch.zeros(1024, 2048, dtype=torch.bfloat16)
    layout, one, backend = Offsets(torch.zeros(9, dtype=torch.int64)), torch.ones(1), {"backend": "gluon_sm90"}
    yield "forward, scale given", lambda: activate_both(h, layout, FP8_TENSOR, scale=one, **backend)
    yield "backward, scale given, maxima", lambda: activate_backward(h, dy, layout, FP8_TENSOR, scale=one, amax=one.clone(), **backend)
    yield "backward oai", lambda: activate_backward(h, dy, layout, FP8_ROW, activation="swiglu_oai", **backend)
    yield "backward 1x128", lambda: activate_backward(h, dy, layout, FP8_1x128, **backend)
