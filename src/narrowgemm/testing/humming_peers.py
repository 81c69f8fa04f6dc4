"""Humming as a peer of products with MX weights, by BF16 and by FP8 activations. See `peers.py`; inert until asked for.

Left to itself, a layer of Humming compiles and loads a kernel for every range of rows that its heuristics tell apart, 22 to 28.
The adapters ask the same heuristics and compile what the rows of the case take. Weights are brought into Humming's order once.
"""

from __future__ import annotations

import importlib
import json
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..formats import FP8_ROW, MXFP4, MXFP8, Format, FP8_1x128, ScaledTensor
from .case import Case
from .inputs import Inputs
from .mx_peers import bf16_rows, hopper, sorted_rows, tight
from .numerics import recipe_gate
from .peer import SAME_BITS_LIMIT, Prepared, import_error
from .timers import make_timer

BLOCKS = (128, 256)     # its tiles have 128 or 256 of N and at most 256 of K
UNIT_SCALE = 127


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def library() -> Any:
    return importlib.import_module("humming.layer")


@dataclass(frozen=True)
class Tile:
    """A kernel for a case: the layer that it is compiled for, of padded N and K, and the tuning that the heuristics choose."""

    n: int
    k: int
    layer: Any
    meta: Any
    tuning: dict[str, Any]
    kind: str

    @property
    def configs(self) -> tuple[str, str, str]:
        """What Humming compiles and looks kernels up by."""
        return self.meta.to_str(), json.dumps({"gemm_type": self.kind}), json.dumps(self.tuning)


_ordered: list[tuple[weakref.ref[Tensor], tuple[str, int, int], dict[str, Tensor]]] = []


@dataclass(frozen=True)
class Humming:
    """Humming's layer over the payload and scales of a case.

    `element` of the activations: BF16, or FP8 that share a scale a row and are quantised anew from the sources. Scales of 32 or 128
    of K beside MX weights are left out by its kernels (0.1.10): MXFP8 x MXFP8 and FP8 1x128 x MXFP4 give a calc_diff of 1.
    """

    name: str
    element: str = "bfloat16"

    def available(self, device: torch.device) -> str | None:
        if reason := hopper(device):
            return reason
        # or its import starts processes that load the library again, and the first call waits for their lock
        os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")
        return import_error("humming.layer")

    def supports(self, case: Case) -> str | None:
        laid_out = tight(case) or case.layout == "dense"
        if not laid_out or case.b not in (MXFP4, MXFP8) or case.out_dtype != "bf16" or case.accumulate:
            return "is compared on MXFP4 and MXFP8 weights, dense and with rows sorted by expert"
        if self.element != "bfloat16" and (case.a not in (FP8_1x128, FP8_ROW) or case.b != MXFP4):
            return f"takes {FP8_1x128.name} and {FP8_ROW.name} x {MXFP4.name}"
        return None if case.rows else "no rows"

    # ---- kernels ---------------------------------------------------------------------------------------------------

    def described(self, b: Format, n: int, k: int, experts: int | None) -> tuple[Any, Any]:
        """(an empty layer, its description) of weights `[n, k]` in Humming's terms."""
        humming, layer = library(), torch.nn.Module()
        weights = humming.HummingWeightSchema(b_dtype="float4e2m1" if b == MXFP4 else "float8e4m3", bs_dtype="float8e8m0",
                                              weight_scale_group_size=32)
        activations = humming.HummingInputSchema(a_dtype=self.element, input_scale_group_size=0)
        meta = humming.HummingLayerMethod.prepare_layer_meta(layer, n, k, weights, activations, experts, torch_dtype=torch.bfloat16)
        return layer, meta

    def tiles(self, case: Case) -> list[Tile]:
        """The kernels to choose from: N padded as little as the tile allows, K to blocks of 128 and, if it differs, of 256."""
        method = library().HummingLayerMethod
        kind = "dense" if case.layout == "dense" else "grouped_contiguous"
        experts = None if case.layout == "dense" else case.groups
        found: dict[int, Tile] = {}
        for block_n in BLOCKS:
            for block_k in BLOCKS:
                n, k = (-(-x // block) * block for x, block in ((case.n, block_n), (case.k, block_k)))
                layer, meta = self.described(case.b, n, k, experts)
                by_rows = method.get_default_tuning_configs(layer, gemm_type=kind)
                tuning = next(t for low, high, t in by_rows if low < case.rows <= high)
                if not (n % tuning["block_shape"][1] or k % tuning["block_shape"][2]):
                    found.setdefault(k, Tile(n, k, layer, meta, tuning, kind))
        return list(found.values())

    def compile(self, case: Case) -> None:
        """Compile ahead, into HUMMING_CACHE_DIR, what `prepare` needs: weights of the case's size are not."""
        kernel = importlib.import_module("humming.kernel.humming").HummingKernel
        device = _device()
        payload = torch.zeros((1, 256, 256 // case.b.elem.per_byte), dtype=torch.uint8, device=device).view(case.b.elem.dtype)
        scale = torch.full((1, 256, 8), UNIT_SCALE, dtype=torch.uint8, device=device)
        self.order(ScaledTensor(payload, scale, case.b), *self.described(case.b, 256, 256, 1), 256, 256)
        for tile in self.tiles(case):
            kernel.prepare_kernels(*tile.configs)

    # ---- operands --------------------------------------------------------------------------------------------------

    def order(self, b: ScaledTensor, layer: Any, meta: Any, n: int, k: int) -> dict[str, Tensor]:
        """Weights `[(E,) N, K]`, padded to `n` and `k`, and their scales as Humming's kernels read them, by its names."""
        assert b.scale is not None
        grow_n, per_byte = n - b.scale.shape[-2], b.format.elem.per_byte
        data = pad(b.data.view(torch.uint8), (0, k // per_byte - b.data.shape[-1], 0, grow_n))
        scale = pad(b.scale, (0, k // 32 - b.scale.shape[-1], 0, grow_n), value=UNIT_SCALE)
        for name, tensor in (("weight", data.view(torch.int32)), ("weight_scale", scale.view(torch.float8_e8m0fnu))):
            setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))
        library().HummingLayerMethod.transform_humming_layer(layer)
        return dict(layer.state_dict())

    def weights(self, b: ScaledTensor, tile: Tile) -> None:
        """Put the ordered weights into the tile's layer. They are kept while `b` lives: the cases of a suite share them."""
        _ordered[:] = [x for x in _ordered if x[0]() is not None]
        wanted = (self.name, tile.n, tile.k)
        made = next((t for source, key, t in _ordered if source() is b.data and key == wanted), None)
        if made is None:
            _ordered[:] = [x for x in _ordered if x[0]() is b.data]
            made = self.order(b, tile.layer, tile.meta, tile.n, tile.k)
            _ordered.append((weakref.ref(b.data), wanted, made))
        for name, tensor in made.items():
            setattr(tile.layer, name, torch.nn.Parameter(tensor, requires_grad=False))
        tile.layer.locks = torch.zeros(1024, dtype=torch.int32, device=b.data.device)

    def activations(self, case: Case, inputs: Inputs) -> tuple[Tensor, Tensor | None]:
        """(rows, their scales): brought to what Humming takes once, outside the timing, as ours come quantised."""
        if self.element == "bfloat16":
            return bf16_rows(case, inputs), None
        x = torch.cat([inputs.source_a(g) for g in inputs.groups])
        return library().ops.quant_input(inputs=x, dtype=self.element, group_size=0)

    # ---- the call --------------------------------------------------------------------------------------------------

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        x, scale = self.activations(case, inputs)
        calls: dict[int, tuple[Callable[[], object], Tensor]] = {}
        for tile in self.tiles(case):
            self.weights(inputs.b, tile)
            calls[tile.k] = self.bound(case, tile, x, scale)
        best = next(iter(calls))
        if len(calls) > 1:
            times = make_timer(inputs.device, 3).measure({str(k): call for k, (call, _) in calls.items()})
            best = int(min(times, key=lambda k: times[k].us))
        call, y = calls[best]
        rows = sorted_rows(case) if case.layout != "dense" else {0: slice(0, case.rows)}
        gate, limit = ("kernel", SAME_BITS_LIMIT) if self.element == "bfloat16" else ("recipe", recipe_gate(case.a, case.b))
        return Prepared(call, lambda g: y[rows[g], : case.n], gate, limit)

    def bound(self, case: Case, tile: Tile, x: Tensor, scale: Tensor | None) -> tuple[Callable[[], object], Tensor]:
        """(a call, the rows that it writes, N as padded)."""
        forward = library().HummingLayerMethod.forward_layer
        _, compute, tuning = tile.configs
        grown = pad(x.view(torch.uint8) if x.element_size() == 1 else x, (0, tile.k - case.k)).view(x.dtype).contiguous()
        y = torch.full((case.rows, tile.n), float("nan"), dtype=torch.bfloat16, device=x.device)
        options: dict[str, Any] = {"compute_config": compute, "tuning_config": tuning}
        if case.layout != "dense":
            options["expert_layout"] = torch.tensor((0, *case.group_sizes), device=x.device).cumsum(0).to(torch.int32)
        return (lambda: forward(tile.layer, grown, outputs=y, input_scale=scale, **options)), y


ADAPTERS = (Humming("humming"), Humming("humming_w4a8_token", "float8e4m3"))
