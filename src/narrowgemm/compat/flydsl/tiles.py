"""`tile_m`, `tile_n`, `tile_k`: a `Config` with those tiles, for the kernel that runs anyway, where it can run it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ...arch import detect
from ...formats import ScaledTensor
from ...kernels.registry import kernels
from ...layouts import Layout
from ...ops import common, grouped
from ...ops.plan_cache import signature_of
from ...problem import Config
from ...runtime import dispatch
from ..notice import warn_once

DEFAULT = (128, 128, 128)
_LIMIT = 1024


@dataclass(slots=True)
class Tiles:
    """The tiles a launcher was made with. The default is no wish: tuned tables and the cost model decide then."""

    shape: tuple[int, int, int]
    _known: dict[tuple[Any, ...], tuple[str, Config] | None] = field(default_factory=dict)

    def options(self, a: ScaledTensor, b: ScaledTensor, layout: Layout, d: Tensor) -> dict[str, Any]:
        """`backend` and `config` for `grouped_gemm`, or nothing where there is no wish, or none that can be met."""
        if self.shape == DEFAULT:
            return {}
        key = signature_of(a, b, d, layout.kind)
        if key not in self._known:
            if len(self._known) >= _LIMIT:
                self._known.clear()
            self._known[key] = self._find(a, b, layout, d)
        found = self._known[key]
        return {} if found is None else {"backend": found[0], "config": found[1]}

    def _find(self, a: ScaledTensor, b: ScaledTensor, layout: Layout, d: Tensor) -> tuple[str, Config] | None:
        plan = grouped.plan_of(a, b, layout, d, d.dtype, False, False, common.Options())
        if plan is None:
            return None
        kernel, arch, problem = kernels()[plan.kernel], detect(d.device), plan.problem
        offers = [plan.config, *kernel.configs(problem, arch)]
        for c in offers:  # the kernel's own choice for these tiles, if it has one
            if (c.block_m, c.block_n, c.block_k) == self.shape and dispatch.illegal(kernel, problem, c, arch) is None:
                return plan.backend, c
        m, n, k = self.shape
        offers.sort(key=lambda c: abs(c.block_m - m) + abs(c.block_n - n))  # stages and warps of the most similar one
        for c in offers:
            c = replace(c, block_m=m, block_n=n, block_k=k)
            if dispatch.illegal(kernel, problem, c, arch) is None:
                return plan.backend, c
        reason = dispatch.illegal(kernel, problem, replace(offers[0], block_m=m, block_n=n, block_k=k), arch)
        warn_once(f"tile_m={m}, tile_n={n}, tile_k={k} has no effect: {plan.kernel} can't run it ({reason}); it runs "
                  f"{plan.config}")
        return None
