"""`ExpertMLP`: the trainable expert MLP of a Mixture-of-Experts layer, run by `narrowgemm.ops.expert_mlp`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..errors import expect, expect_count
from ..formats import ELEMENTS, PLAIN
from ..ops.expert_mlp import RECIPES, Scaling, expert_mlp
from ..ops.grouped_linear import quantize_weight
from ..ops.quantize_both import Both
from . import extra_state

STATE = ("scale", "amax", "history")


class ExpertMLP(torch.nn.Module):
    """`y[rows of g] = SwiGLU(x[rows of g] . gate_up[g]^T) . down[g]^T`, FP8 forward and backward, master weights as parameters.

    gate_up `[E, 2I, H]` (gate's rows first) and down `[E, H, I]`, of `dtype` BF16 or FP32. recipe ('bf16', 'tensorwise', 'rowwise',
    'block'), element, grads, activation, args, fast_accum, max_sms: as in `narrowgemm.expert_mlp`.

    Both FP8 orientations of the weights are kept, and made again when a weight has changed (its `_version`), so the micro-batches
    of a step share them. Call `invalidate()` after anything that changes weights but not their version, above all the replay of a
    CUDA graph. While a graph is captured, each forward quantises the weights inside it, unless `quantized()` does so for several.

    If a parameter has an attribute `main_grad` (FP32, of its shape), the gradient is added there and the parameter gets no `grad`.

    delayed: tensor-wise scales of x, the hidden activation and both gradients come from the largest magnitudes of the last
    `history` steps, which needs no extra pass; `update_scales()` ends a step. Before the first one, scales are found in a pass.
    """

    scale: Tensor
    amax: Tensor
    history: Tensor

    def __init__(self, num_experts: int, hidden: int, inter: int, *, recipe: str = "block", element: str = "e4m3", grads: str = "",
                 activation: str = "swiglu", args: tuple[float, ...] = (), delayed: bool = False, history: int = 16,
                 fast_accum: bool = False, max_sms: int = 0, dtype: torch.dtype = torch.float32,
                 device: torch.device | str | None = None) -> None:
        super().__init__()
        expect(recipe in RECIPES, "recipe", repr(recipe), f"one of {RECIPES}")
        expect(not delayed or recipe == "tensorwise", "delayed with recipe", recipe, "'tensorwise'")
        for name, size in (("num_experts", num_experts), ("hidden", hidden), ("inter", inter), ("history", history)):
            expect_count(size, name)
        expect(dtype in PLAIN, "dtype", dtype, f"one of {tuple(PLAIN)}", error=TypeError)
        self.recipe, self.element, self.grads = recipe, element, grads or element
        self.activation, self.args, self.delayed = activation, args, delayed
        self.fast_accum, self.max_sms = fast_accum, max_sms
        self.gate_up = torch.nn.Parameter(torch.empty(num_experts, 2 * inter, hidden, dtype=dtype, device=device))
        self.down = torch.nn.Parameter(torch.empty(num_experts, hidden, inter, dtype=dtype, device=device))
        if delayed:     # rows on 16 bytes, as kernels like addresses; the first of each counts
            for name, rows in zip(STATE, (4, 4, 4 * history)):
                self.register_buffer(name, torch.zeros(rows, 4, dtype=torch.float32, device=device))
        self._ready = False
        self._idle: bool | None = None      # whether all calls of this step were without tokens; None: there was none
        self._held: tuple[Both, Both] | None = None
        self._cached: dict[str, tuple[Any, Both]] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """New weights: normal, with a standard deviation of 1 / sqrt of the contracted length."""
        for w in (self.gate_up, self.down):
            torch.nn.init.normal_(w, std=w.shape[-1]**-0.5)

    def forward(self, x: Tensor, group_lens: Tensor | None = None, *, group_offs: Tensor | None = None) -> Tensor:
        """`x` `[T, H]`, rows sorted by expert, as `[T, H]`. Groups by sizes or offsets on the device, as in `grouped_linear`."""
        mains = (getattr(self.gate_up, "main_grad", None), getattr(self.down, "main_grad", None))
        scaling = Scaling(self.scale, self.amax, self._ready) if self.delayed else None
        y = expert_mlp(x, self.gate_up, self.down, group_lens, group_offs=group_offs, recipe=self.recipe, element=self.element,
                       grads=self.grads, activation=self.activation, args=self.args, quantized=self._weights(), scaling=scaling,
                       main_grads=mains, fast_accum=self.fast_accum, max_sms=self.max_sms)
        if self.delayed:
            self._idle = x.shape[0] == 0 and self._idle is not False
        return y

    # ---------------------------------------------------------------- weights
    @contextmanager
    def quantized(self) -> Iterator[None]:
        """Quantises the weights once, here, for every forward inside: several micro-batches, in a capture or not."""
        self._held = None if self.recipe == "bf16" else (self._quantize("gate_up"), self._quantize("down"))
        try:
            yield
        finally:
            self._held = None

    def invalidate(self) -> None:
        """The weights have changed in a way that their versions don't tell."""
        self._cached.clear()

    def _weights(self) -> tuple[Both, Both] | None:
        if self._held is not None or self.recipe == "bf16" or torch.compiler.is_compiling():
            return self._held       # None: made in the call, as part of the graph
        if self.gate_up.is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        return self._fresh("gate_up"), self._fresh("down")

    def _fresh(self, name: str) -> Both:
        w = getattr(self, name)
        state = (w._version, w.data_ptr(), w.dtype, self.recipe, self.element)
        known = self._cached.get(name)
        if known is None or known[0] != state:
            known = self._cached[name] = state, self._quantize(name)
        return known[1]

    def _quantize(self, name: str) -> Both:
        return quantize_weight(getattr(self, name).detach(), self.recipe, self.element)

    # ---------------------------------------------------------------- delayed scaling
    @torch.no_grad()
    def update_scales(self) -> None:
        """The end of a step: the scales of the next one, from the largest magnitudes of the last `history`. All on the device.

        A step without tokens, as a rank may have, counts for nothing."""
        expect(self.delayed, "update_scales of a module with delayed", self.delayed, "True")
        idle, self._idle = self._idle, None
        if idle:
            return
        past = self.history.view(-1, 4, 4)
        finite = self.amax.isfinite()       # an overflow must not be remembered
        past.copy_(torch.cat([torch.where(finite, self.amax, past[0])[None], past[:-1]]))
        most = past.amax(0)
        for rows, element in ((slice(0, 2), self.element), (slice(2, 4), self.grads)):
            torch.clamp(most[rows] / ELEMENTS[element].max, min=torch.finfo(torch.float32).tiny, out=self.scale[rows])
        self.amax.zero_()
        self._ready = True

    def get_extra_state(self) -> Tensor:
        return extra_state.encode({"ready": self._ready})

    def set_extra_state(self, state: object) -> None:
        self._ready = bool(extra_state.decode(state)["ready"])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": {}, "_held": None}       # copies and pickles make their own

    def extra_repr(self) -> str:
        e, hidden, inter = self.down.shape
        kind = f"{self.recipe}{', delayed' if self.delayed else ''}, {self.element}"
        grads = "" if self.grads == self.element else f", gradients {self.grads}"
        return f"experts {e}, hidden {hidden}, inter {inter}, {kind}{grads}"
