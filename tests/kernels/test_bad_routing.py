"""A routing of the caller's own with rows and slots that are none: they are lost, and nothing outside the output is touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from narrowgemm import FP8_ROW, FP8_1x128, ScaledTensor, combine, gather_quantize, sort_by_expert
from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16
from narrowgemm.kernels.registry import kernels
from narrowgemm.ops.steps import gather_problem, scale_layout_of
from narrowgemm.testing.fuzz_inputs import GuardedView, Store

TOKENS, TOP_K, K, EXPERTS = 6, 2, 128, 3


@pytest.mark.parametrize("fmt", [FP8_1x128, FP8_ROW, BF16], ids=lambda f: f.name)
@pytest.mark.parametrize("bad", ["inverse", "row_map", "offsets"])
def test_nothing_outside_is_touched(device: str, bad: str, fmt, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    ids = torch.tensor([[0, 1], [1, -1], [2, 0], [1, 2], [0, 2], [-1, -1]], dtype=torch.int32, device=device)
    routing = sort_by_expert(ids, EXPERTS, backend="triton")
    wrong = getattr(routing, bad).clone()
    if bad == "offsets":
        wrong[-1] = 10**6
    else:
        wrong[2], wrong[4], wrong[5] = -1, 99999, -2**31
    routing = replace(routing, **{bad: wrong})
    x, rows = torch.randn(TOKENS, K, device=device).bfloat16(), TOKENS * TOP_K
    problem = gather_problem(TOKENS, K, TOP_K, EXPERTS, BF16, fmt, scale_layout_of(fmt))
    configs = kernels()["triton.gather_quantize"].configs(problem, get_arch("h200"))
    for config in {c.persistent: c for c in configs}.values():
        out = GuardedView((rows, K), fmt.elem.dtype, torch.device(device), Store())
        scale = torch.zeros(fmt.scale_shape((rows, K)), device=device) if fmt.scaled else None
        gather_quantize(x, routing, fmt, out=ScaledTensor(out.tensor, scale, fmt), backend="triton", config=config)
        assert out.faults() == []
    y, weights = torch.randn(rows, K, device=device).bfloat16(), torch.rand(TOKENS, TOP_K, device=device)
    got, want = combine(y, routing, weights, backend="triton"), combine(y, routing, weights, backend="reference")
    torch.testing.assert_close(got.float(), want.float(), atol=1e-2, rtol=1e-2)
