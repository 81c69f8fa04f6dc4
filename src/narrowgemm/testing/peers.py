"""Other libraries on the same case: adapters that are inert until asked for, and never imported by the package itself.

An adapter says whether the library is here (`available`), whether it computes a case at all (`supports`: pure data, so
a report knows which rows must exist), and prepares a call whose inputs hold the same values. What a user of the peer
would do once (transposing scales, padding groups) is in `prepare`, outside the timing; what every call does is inside.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..formats import MXFP4, FP8_1x128, FP8_128x128, ScaledTensor
from ..scales import mn_major_tma_aligned
from . import humming_peers, training_peers
from .case import Case
from .guard import Guarded
from .inputs import Inputs, Weights, build
from .layer import LayerCase
from .mx_peers import TritonKernels
from .mxfp8_peers import DeepGemmBlock, DequantBf16, DotScaled
from .numerics import RECIPE_GATE
from .peer import Prepared, import_error
from .step import StepCase
from .tokens import Tokens
from .training_peers import BestConfig, StepPeer


class Peer(Protocol):
    """Another library's product, under the name that results and `--peers` know."""

    @property
    def name(self) -> str: ...

    def available(self, device: torch.device) -> str | None:
        """None, or why this peer can't run here."""

    def supports(self, case: Case) -> str | None:
        """None, or why this peer does not compute the case. Depends on the case alone."""

    def prepare(self, case: Case, inputs: Inputs) -> Prepared: ...


@runtime_checkable
class Compiled(Protocol):
    """A peer whose kernels can be compiled without operands of the case's size."""

    def compile(self, case: Case) -> None: ...


def packed(inputs: Inputs, alignment: int = 1) -> tuple[dict[int, slice], int]:
    """Rows of each group with rows, one after the other from multiples of `alignment`, and the rows of the whole."""
    rows, start = {}, 0
    for g in inputs.groups:
        rows[g] = slice(start, start + inputs.case.group_sizes[g])
        start = -(-rows[g].stop // alignment) * alignment
    return rows, start


def padded(inputs: Inputs, alignment: int) -> tuple[Tensor, Tensor, Tensor, dict[int, slice]]:
    """A copy of a flat A whose groups start at multiples of `alignment`: payload, scales, m_indices, each group's rows.

    Padding is zero payload with unit scales, as a user of a padded layout would make it.
    """
    case, a = inputs.case, inputs.a
    rows, start = packed(inputs, alignment)
    ids = torch.full((start,), -1, dtype=torch.int32)
    data = torch.zeros((start, case.k), dtype=a.data.dtype, device=inputs.device)
    assert a.scale is not None
    scale = torch.ones((start, a.scale.shape[1]), dtype=a.scale.dtype, device=inputs.device)
    for g, r in rows.items():
        data[r], scale[r], ids[r] = inputs.rows(a.data, g), inputs.rows(a.scale, g), g
    return data, scale, ids.to(inputs.device), rows


class InFp8:
    """A case in MXFP4 as a user of FP8 has it: the same sources in 1x128 by 128x128 FP8, of the same shape."""

    def __init__(self) -> None:
        self._weights: Weights | None = None     # of the last case: the next one often has the same

    @staticmethod
    def case(case: Case) -> Case:
        return replace(case, a=FP8_1x128, b=FP8_128x128, packed=False) if case.b == MXFP4 else case

    def inputs(self, inputs: Inputs) -> Inputs:
        """They depend on the sources alone, so they are held against those."""
        out = build(self.case(inputs.case), inputs.device, inputs.seed, reuse=self._weights, hollow=bool(inputs.weights_key[-1]))
        self._weights = out.weights
        return out


class OwnFp8:
    """Our own FP8 block-scaled product of an MXFP4 case's shape."""

    name = "own_fp8"

    def __init__(self) -> None:
        self._fp8 = InFp8()

    def available(self, device: torch.device) -> str | None:
        return None

    def supports(self, case: Case) -> str | None:
        return "is compared on MXFP4 weights" if case.b != MXFP4 else None if case.rows else "no rows"

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        own = self._fp8.inputs(inputs)
        return Prepared(own.call, lambda g: own.rows(own.out.tensor, g), "recipe", RECIPE_GATE["e4m3"])


class DeepGemm:
    """DeepGEMM on SM90: 1x128 by 128x128 FP8 with FP32 scales. Offsets and psum run on a padded contiguous copy.

    Cases with MXFP4 weights, which it does not take on SM90, are compared with what its users have: FP8 weights of that shape."""

    name = "deepgemm"
    ALIGNMENT = 128

    def __init__(self) -> None:
        self._fp8 = InFp8()

    def available(self, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 9:
            return "DeepGEMM needs an NVIDIA GPU of compute capability 9.0 or later"
        return import_error("deep_gemm")

    def supports(self, case: Case) -> str | None:
        if case.layout == "k_grouped":
            return training_peers.deepgemm_k_grouped_refuses(case)
        case = InFp8.case(case)
        if (case.a, case.b) != (FP8_1x128, FP8_128x128):
            return f"DeepGEMM's SM90 kernels take fp8_1x128 x fp8_128x128, not {case.a.name} x {case.b.name}"
        if case.out_dtype != "bf16" or case.accumulate:
            return "DeepGEMM's output is BF16, without accumulation"
        if case.k % 128 or case.n % 64:
            return f"DeepGEMM needs K in blocks of 128 and N of 64, not {case.n}x{case.k}"
        return "no rows" if case.rows == 0 else None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        if case.layout == "k_grouped":
            return Prepared(*training_peers.deepgemm_k_grouped(case, inputs))
        if case.b == MXFP4:
            return replace(self.prepare(InFp8.case(case), self._fp8.inputs(inputs)), gate="recipe", limit=RECIPE_GATE["e4m3"])
        dg = importlib.import_module("deep_gemm")
        a, b = inputs.a, inputs.b
        assert a.scale is not None and b.scale is not None
        transformed = a.scale.stride(-1) != 1  # row-major scales: the transform is to be timed, DeepGEMM does it itself
        out = torch.full_like(inputs.out.tensor, float("nan"))
        pa, pb = (a.data, a.scale), (b.data, b.scale)
        if case.layout == "dense":
            return Prepared(lambda: dg.fp8_gemm_nt(pa, pb, out), lambda g: out)
        if case.layout == "masked":
            index = inputs.layout.index  # type: ignore[union-attr]
            return Prepared(lambda: dg.m_grouped_fp8_gemm_nt_masked(pa, pb, out, index, case.expected_m),
                            lambda g: inputs.rows(out, g))
        aligned = case.alignment % self.ALIGNMENT == 0 and case.order == "sorted" and not case.slack
        if case.layout == "contiguous" and aligned:
            ids = inputs.layout.index  # type: ignore[union-attr]
            return Prepared(lambda: dg.m_grouped_fp8_gemm_nt_contiguous(pa, pb, out, ids),
                            lambda g: inputs.rows(out, g))
        data, scale, ids, rows = padded(inputs, self.ALIGNMENT)
        pad = (data, mn_major_tma_aligned(scale) if transformed or inputs.tokens is not None else scale)
        y = torch.full((data.shape[0], case.n), float("nan"), dtype=torch.bfloat16, device=inputs.device)
        if inputs.tokens is not None:
            own_rows, _ = packed(inputs)
            tokens = inputs.tokens.padded(own_rows, rows, data.shape[0])
            return Prepared(lambda: self._end_to_end(tokens, pad, pb, y, ids), lambda g: y[rows[g]])
        return Prepared(lambda: dg.m_grouped_fp8_gemm_nt_contiguous(pad, pb, y, ids), lambda g: y[rows[g]])

    @staticmethod
    def _end_to_end(tokens: Tokens, pad: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], y: Tensor, ids: Tensor) -> None:
        """Gather into padded groups and quantise, in the kernel that ours goes through, then the product."""
        tokens.quantize_into(ScaledTensor(*pad, FP8_1x128))
        importlib.import_module("deep_gemm").m_grouped_fp8_gemm_nt_contiguous(pad, b, y, ids)


class Torch:
    """torch's own scaled product (cuBLASLt) of dense block-scaled FP8."""

    name = "torch"

    def available(self, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
            return "torch's 1x128 by 128x128 product is for NVIDIA compute capability 9.0"
        return None if hasattr(torch.nn.functional, "scaled_mm") else "this torch has no torch.nn.functional.scaled_mm"

    def supports(self, case: Case) -> str | None:
        if case.layout != "dense" or (case.a, case.b) != (FP8_1x128, FP8_128x128):
            return "only dense fp8_1x128 x fp8_128x128 is compared with torch's scaled product"
        if case.accumulate or case.m % 4 or case.n % 16 or case.k % 128 or not case.m:
            return "cuBLASLt needs M in fours, N in sixteens, K in blocks of 128"
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        from torch.nn.functional import ScalingType, scaled_mm

        a, b = inputs.a, inputs.b
        assert a.scale is not None and b.scale is not None
        sa = a.scale.mT.contiguous().mT  # [M, K/128], M contiguous
        sb = torch.zeros((b.scale.shape[0], -(-b.scale.shape[1] // 4) * 4), device=inputs.device)  # K blocks in fours
        sb[:, : b.scale.shape[1]] = b.scale
        dtype = inputs.out.tensor.dtype
        recipes = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
        result: list[Tensor] = []

        def run() -> None:
            result[:] = [scaled_mm(a.data, b.data.mT, sa, recipes[0], sb.mT, recipes[1], output_dtype=dtype)]

        return Prepared(run, lambda g: result[0])


class TorchRow:
    """torch's grouped FP8 product with row-wise scales (CUTLASS), forward and k-grouped."""

    name = "torch_row"

    def available(self, device: torch.device) -> str | None:
        if device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) != (9, 0):
            return "torch's row-wise grouped product is for NVIDIA compute capability 9.0"
        return None if hasattr(torch, "_scaled_grouped_mm") else "this torch has no torch._scaled_grouped_mm"

    def supports(self, case: Case) -> str | None:
        return training_peers.torch_row_refuses(case)

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        return Prepared(*training_peers.torch_row(case, inputs))


class TorchBf16:
    """The unquantised product in BF16: torch.mm, or torch.nn.functional.grouped_mm on tightly packed groups."""

    name = "torch_bf16"

    def available(self, device: torch.device) -> str | None:
        return None if hasattr(torch.nn.functional, "grouped_mm") else "this torch has no nn.functional.grouped_mm"

    def supports(self, case: Case) -> str | None:
        if case.layout == "k_grouped" or case.accumulate or case.e2e:
            return "only forward products without accumulation and steps around them are compared with BF16"
        if case.rows == 0:
            return "no rows"
        return "grouped_mm needs N and K in eights" if case.layout != "dense" and (case.n % 8 or case.k % 8) else None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        from torch.nn.functional import grouped_mm

        limit = 5e-6
        if case.layout == "dense":
            a, b = inputs.source_a(0), inputs.source_b(0)
            y = torch.empty((case.m, case.n), dtype=torch.bfloat16, device=inputs.device)
            return Prepared(lambda: torch.mm(a, b.mT, out=y), lambda g: y, "recipe", limit)
        rows, _ = packed(inputs)
        a = torch.cat([inputs.source_a(g) for g in rows])
        b = torch.empty((case.groups, case.n, case.k), dtype=torch.bfloat16, device=inputs.device)
        for g in range(case.groups):
            b[g] = inputs.source_b(g)
        ends = torch.tensor(case.group_sizes, device=inputs.device).cumsum(0).to(torch.int32)
        result: list[Tensor] = []

        def run() -> None:
            result[:] = [grouped_mm(a, b.mT, offs=ends, out_dtype=torch.bfloat16)]

        return Prepared(run, lambda g: result[0][rows[g]], "recipe", limit)


@dataclass(frozen=True)
class LayerPeer:
    """A whole expert layer, see `layer_peers.py`."""

    name: str

    def available(self, device: torch.device) -> str | None:
        from . import layer_peers

        if device.type != "cuda":
            return f"{self.name} needs a GPU"
        module = layer_peers.MODULES.get(self.name)
        return import_error(module) if module else None

    def supports(self, case: Any) -> str | None:
        from . import layer_peers

        return layer_peers.supports(self.name, case) if isinstance(case, LayerCase) else "computes whole expert layers"

    def prepare(self, case: Any, inputs: Any) -> Prepared:
        from . import layer_peers

        run = layer_peers.MAKERS[self.name](inputs)
        out = run()
        return Prepared(run, lambda g: out, limit=layer_peers.LIMIT)


@dataclass(frozen=True)
class Backend:
    """A backend of ours as a peer of another."""

    name: str

    def available(self, device: torch.device) -> str | None:
        return None

    def supports(self, case: Case) -> str | None:
        return None

    def prepare(self, case: Case, inputs: Inputs) -> Prepared:
        own = Inputs(case, inputs.device, inputs.seed, inputs.a, inputs.b, inputs.layout,
                     Guarded(torch.empty_like(inputs.out.tensor), inputs.out.buffer, inputs.out.guard), tokens=inputs.tokens)
        y = own.out.tensor
        own.write_base()
        return Prepared(lambda: own.call(backend=self.name), lambda g: own.rows(y, g))


ADAPTERS: dict[str, Peer] = {p.name: p for p in (DeepGemm(), OwnFp8(), Torch(), TorchRow(), TorchBf16(), TritonKernels(),
                                                 *humming_peers.ADAPTERS, DotScaled(), DequantBf16(), DeepGemmBlock(),
                                                 LayerPeer("deepgemm_layer"), LayerPeer("triton_moe"),
                                                 LayerPeer("triton_kernels_layer"), StepPeer("torch_step"),
                                                 StepPeer("torch_step_fused"), BestConfig())}
FLOOR = "floor"


def names() -> tuple[str, ...]:
    """Every name that `--peers` takes: adapters, the floor, and our own backends."""
    from ..kernels.registry import backends

    return (*ADAPTERS, FLOOR, *backends())


def get_peer(name: str) -> Peer:
    """The adapter of a peer, or one of a backend of ours. ValueError names the ones there are."""
    if name in ADAPTERS:
        return ADAPTERS[name]
    if name == FLOOR or name not in names():
        raise ValueError(f"peer: got {name!r}, expected one of {[n for n in names() if n != FLOOR]}")
    return Backend(name)


def computes(peer: str, case: Case) -> bool:
    """Whether a result of the case must have a row with this peer. A floor exists for all work there is."""
    if peer == FLOOR:
        return case.flops > 0
    found = get_peer(peer)
    for whole, kind in ((LayerCase, LayerPeer), (StepCase, StepPeer)):
        if isinstance(case, whole) and not isinstance(found, kind):
            return False
    return found.supports(case) is None


def version(peer: str) -> str:
    """Version of the library behind a peer, '' where it has none or is not imported."""
    names = {"deepgemm": "deep_gemm", "deepgemm_layer": "deep_gemm", "deepgemm_block": "deep_gemm",
             **{p.name: "humming" for p in humming_peers.ADAPTERS}}
    found = sys.modules.get(names.get(peer, ""))
    return str(getattr(found, "__version__", ""))
