"""Launches of the kernels behind `activate_both` and `activate_backward` for the compile tests: every kind of scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from narrowgemm.formats import FP8_ROW, FP8_TENSOR, FP8_1x128
from narrowgemm.layouts import Offsets
from narrowgemm.ops.activate_both import activate_backward, activate_both


def jobs(target: str) -> Iterator[tuple[str, Callable[[], object]]]:
    h, dy = torch.zeros(1024, 4096, dtype=torch.bfloat16), torch.zeros(1024, 2048, dtype=torch.bfloat16)
    layout = Offsets(torch.zeros(9, dtype=torch.int64))
    one = torch.ones(1)
    for fmt, more in ((FP8_TENSOR, {"scale": one, "amax": one.clone()}), (FP8_ROW, {}), (FP8_1x128, {})):
        yield f"backward {fmt.name}", lambda f=fmt, m=more: activate_backward(h, dy, layout, f, backend="triton", **m)
    yield "forward", lambda: activate_both(h, layout, FP8_1x128.with_scale("e8m0"), backend="triton")
    yield "backward copy", lambda: activate_backward(h, dy, layout, backend="triton")
    yield "backward oai", lambda: activate_backward(h, dy, layout, FP8_TENSOR, activation="swiglu_oai", backend="triton")
