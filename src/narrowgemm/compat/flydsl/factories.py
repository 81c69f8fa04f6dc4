"""The two factories and their launchers, and what a launcher checks.

Definition: ROCm/FlyDSL pull request 433, `kernels/grouped_gemm_blockscale_{contiguous,masked,common}.py`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...arch import detect
from ...errors import Unsupported, expect
from ...formats import Format, FP8_1x128, FP8_128x128, ScaledTensor
from ...layouts import Contiguous, Masked
from ...ops.grouped import grouped_gemm
from ..notice import warn_once
from .streams import on_stream
from .tiles import Tiles
from .weights import plain_weight

OUTPUTS = {"bf16": torch.bfloat16, "f16": torch.float16}
E4M3, E4M3FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
PAYLOADS = (E4M3, torch.int8, torch.uint8)
SCALES = tuple(d for d in (torch.float32, torch.uint8, getattr(torch, "float8_e8m0fnu", None)) if d is not None)
_LIMIT = 1024
_Stream = torch.Stream | int | None


@lru_cache(maxsize=128)
def compile_grouped_gemm_blockscale_contiguous(
        *, n: int, k: int, num_groups: int, tile_m: int = 128, tile_n: int = 128, tile_k: int = 128,
        scale_block_k: int = 128, scale_block_n: int = 128, out_dtype: str = "bf16",
        waves_per_eu: int | None = None) -> Callable[..., None]:
    """A launcher of `d[rows of g] = a[rows of g] @ b[g].T`; nothing is compiled before it is called.

    `launch(d, a, b, scale_a, scale_b, grouped_layout, M, n, k, num_groups, stream)` writes `d` and returns None.
    Tensors are contiguous, of these shapes or flattened (a flat one may be longer: its front counts):

    `d` `[M, n]` bf16 or f16 as `out_dtype`; `a` E4M3FN `[M, k]`, `b` E4M3FN `[num_groups, n, k]` in the order of
    `shuffle_weight`, both also as int8 or uint8; `scale_a` `[k/128, M]`, `scale_b` `[num_groups, n/128, k/128]`,
    float32 or E8M0 codes; `grouped_layout` int32 `[M]`, the group of each row, -1 for padding, whose rows of `d` are
    not written. `stream`: a torch stream, a handle, or None for the current one. `n`, `k`, `num_groups`: the factory's.

    `tile_*`: other than 128, the tiles that the kernel shall use, where it can; else a warning. `waves_per_eu`: no
    effect, with a warning. Raises ValueError for an `n` or `k` that tiles, or tiles that scale blocks, do not divide,
    and for an unknown `out_dtype`; Unsupported for scale blocks other than 128 x 128.
    """
    spec = _spec(n, k, num_groups, (tile_m, tile_n, tile_k), scale_block_k, scale_block_n, out_dtype, waves_per_eu)

    def launch(d: Tensor, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, grouped_layout: Tensor, M: int,
               n: int, k: int, num_groups: int, stream: _Stream = None) -> None:
        spec.launch(False, d, a, b, scale_a, scale_b, grouped_layout, M, (n, k, num_groups), stream)

    return launch


@lru_cache(maxsize=128)
def compile_grouped_gemm_blockscale_masked(
        *, n: int, k: int, num_groups: int, tile_m: int = 128, tile_n: int = 128, tile_k: int = 128,
        scale_block_k: int = 128, scale_block_n: int = 128, out_dtype: str = "bf16",
        waves_per_eu: int | None = None) -> Callable[..., None]:
    """A launcher of `d[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T`; other rows of `d` are not written.

    `launch(d, a, b, scale_a, scale_b, masked_m, max_m, n, k, num_groups, stream)`. `d` `[num_groups, max_m, n]`; `a`
    `[num_groups, max_m, k]`; `scale_a` `[num_groups, k/128, max_m]`; `masked_m` int32 `[num_groups]`, zero allowed; the
    rest as in `compile_grouped_gemm_blockscale_contiguous`.
    """
    spec = _spec(n, k, num_groups, (tile_m, tile_n, tile_k), scale_block_k, scale_block_n, out_dtype, waves_per_eu)

    def launch(d: Tensor, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, masked_m: Tensor, max_m: int, n: int,
               k: int, num_groups: int, stream: _Stream = None) -> None:
        spec.launch(True, d, a, b, scale_a, scale_b, masked_m, max_m, (n, k, num_groups), stream)

    return launch


def _spec(n: int, k: int, num_groups: int, tiles: tuple[int, int, int], scale_block_k: int, scale_block_n: int,
          out_dtype: str, waves_per_eu: int | None) -> _Spec:
    """Check what a factory was given."""
    tile_m, tile_n, tile_k = tiles
    for name, v in (("n", n), ("k", k), ("num_groups", num_groups), ("tile_m", tile_m), ("tile_n", tile_n),
                    ("tile_k", tile_k), ("scale_block_k", scale_block_k), ("scale_block_n", scale_block_n)):
        expect(isinstance(v, int) and not isinstance(v, bool), name, repr(v), "an integer", error=TypeError)
        expect(v > 0, name, v, "at least 1")
    for name, v, unit, by in (("k", k, "tile_k", tile_k), ("n", n, "tile_n", tile_n),
                              ("tile_k", tile_k, "scale_block_k", scale_block_k),
                              ("tile_n", tile_n, "scale_block_n", scale_block_n)):
        expect(v % by == 0, name, v, f"a multiple of {unit}={by}")
    expect(out_dtype in OUTPUTS, "out_dtype", repr(out_dtype), "'bf16' or 'f16'")
    if (scale_block_n, scale_block_k) != (128, 128):
        raise Unsupported(f"scale blocks of {scale_block_n} columns and {scale_block_k} of K", "128 and 128")
    if waves_per_eu is not None:
        warn_once(f"waves_per_eu={waves_per_eu} has no effect: it is an occupancy hint to FlyDSL's compiler for AMD, "
                  "and the kernels here choose their occupancy themselves")
    return _Spec(n, k, num_groups, OUTPUTS[out_dtype], Tiles(tiles))


@dataclass(slots=True, eq=False)
class _Spec:
    """What a factory fixed, and the calls whose operands need no more looking at."""

    n: int
    k: int
    groups: int
    dtype: torch.dtype
    tiles: Tiles
    checked: set[tuple[Any, ...]] = field(default_factory=set)

    def launch(self, masked: bool, d: Tensor, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, index: Tensor,
               m: int, dims: tuple[int, int, int], stream: _Stream) -> None:
        n, k, groups = self.n, self.k, self.groups
        lead = (groups,) if masked else ()
        tensors = (d, a, b, scale_a, scale_b, index)
        key = None
        if type(m) is int and all(isinstance(t, Tensor) for t in tensors):
            key = (masked, m, dims, *((t.shape, t.dtype, t.device, t.is_contiguous()) for t in tensors))
        if key is None or key not in self.checked:
            m = self._check(masked, lead, tensors, m, dims)
            if len(self.checked) >= _LIMIT:
                self.checked.clear()
            if key is not None:
                self.checked.add(key)
        with on_stream(stream, d.device):
            out = _shaped(d, (*lead, m, n))
            x = _scaled(_shaped(a, (*lead, m, k)), _shaped(scale_a, (*lead, k // 128, m)).mT, FP8_1x128)
            y = _scaled(plain_weight(b, (groups, n, k)), _shaped(scale_b, (groups, n // 128, k // 128)), FP8_128x128)
            rows = groups if masked else m
            index = index if len(index) == rows else index[:rows]
            layout = Masked(index) if masked else Contiguous(index)
            grouped_gemm(x, y, layout, out=out, zero_padding=False, **self.tiles.options(x, y, layout, out))

    def _check(self, masked: bool, lead: tuple[int, ...], tensors: tuple[Tensor, ...], m: int,
               dims: tuple[int, int, int]) -> int:
        """Every argument against the factory's and each other; `m` as an int."""
        n, k, groups = self.n, self.k, self.groups
        rows = "max_m" if masked else "M"
        expect(not isinstance(m, (bool, float, Tensor)) and hasattr(m, "__index__"), rows, repr(m),
               "an integer known to the host", error=TypeError)
        m = operator.index(m)
        expect(m >= 0, rows, m, "at least 0")
        expect(dims == (n, k, groups), "n, k, num_groups of the launch", dims, f"the factory's, {(n, k, groups)}")
        names = ("d", "a", "b", "scale_a", "scale_b", "masked_m" if masked else "grouped_layout")
        shapes = ((*lead, m, n), (*lead, m, k), (groups, n, k), (*lead, k // 128, m), (groups, n // 128, k // 128),
                  (groups,) if masked else (m,))
        dtypes = ((self.dtype,), PAYLOADS, PAYLOADS, SCALES, SCALES, (torch.int32,))
        device = None
        for name, t, shape, allowed in zip(names, tensors, shapes, dtypes):
            expect(isinstance(t, Tensor), name, type(t).__name__, "a torch.Tensor", error=TypeError)
            device = t.device if device is None else device
            if t.dtype == E4M3FNUZ:
                raise Unsupported(f"{name}: E4M3FNUZ payload", "quantise to torch.float8_e4m3fn")
            expect(t.dtype in allowed, f"{name}, dtype", t.dtype, " or ".join(map(str, allowed)), error=TypeError)
            if allowed is PAYLOADS and t.dtype != E4M3 and is_gfx942(t.device):
                raise Unsupported(f"{name}: FP8 bytes as {t.dtype} on gfx942, where FlyDSL's are E4M3FNUZ",
                                  "quantise to torch.float8_e4m3fn and pass that dtype")
            expect(t.device == device, f"{name}, device", t.device, f"d's, {device}")
            expect(t.is_contiguous(), f"{name}, strides", t.stride(), "contiguous")
            _expect_shape(name, t, shape)
        return m


def is_gfx942(device: torch.device) -> bool:
    """Whether FlyDSL's FP8 bytes are E4M3FNUZ there."""
    return device.type == "cuda" and detect(device).target == "gfx942"


def _expect_shape(name: str, t: Tensor, shape: tuple[int, ...]) -> None:
    need = math.prod(shape)
    fits = tuple(t.shape) == shape or (t.dim() == 1 and t.numel() >= need)
    expect(fits, f"{name}, shape", tuple(t.shape), f"{shape}, or flat with {need} elements")


def _shaped(t: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The front of a flat tensor, or the tensor itself, as `shape`: a view."""
    if t.shape == shape:
        return t
    need = math.prod(shape)
    return (t if t.numel() == need else t[:need]).view(shape)


def _scaled(data: Tensor, scale: Tensor, fmt: Format) -> ScaledTensor:
    """Payload, perhaps as bytes, with FP32 scales or E8M0 codes."""
    data = data if data.dtype == E4M3 else data.view(E4M3)
    if scale.dtype == torch.float32:
        return ScaledTensor(data, scale, fmt)
    return ScaledTensor(data, scale if scale.dtype == torch.uint8 else scale.view(torch.uint8), fmt.with_scale("e8m0"))
