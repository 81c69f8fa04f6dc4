"""`prepack`: narrow weights in the order in which the Hopper kernels' threads read them. A permutation, and reversible.

A `PackedWeight` is opaque: `narrowgemm.gemm`, `grouped_gemm` and `routed_gemm` take it in place of a ScaledTensor, `unpack`
gives back the ScaledTensor that it was made from, bit for bit. `PREPACK` is the order's id and version; a stored weight of
another order is refused, never reinterpreted.

The order `narrow_sm90/1`: rows in tiles of 64 (`NT`), K in chunks of 128 (`KC`), both padded with zeros. One thread of a
warpgroup reads 16 bytes: one row, one block of 32 of K (E4M3: half a block).

    data   uint8 [E, NT, KC, 64, 64]      E2M1, the bits of every 4 bytes permuted
           uint8 [E, NT, KC, 2, 64, 64]   E4M3, likewise
    scale  uint8 [E, NT, ceil(KC/2), 4 (warp), 8 (row), 4 (block of 32), 2 (chunk), 2 (row + 8)]: the exponent field of a BF16

The element's bits are placed into BF16's exponent and mantissa, and one multiplication by a power of two gives the value:
exact while a row's scales lie in a window of 134 (E2M1) or 132 (E4M3) powers of two that ends at 2^1 or 2^7. A row outside
is shifted into it, and `factor` takes the shift back in FP32; a row with a NaN has NaN there. See `prepack_scales.shifts`.

The order `narrow_fp8_sm90/1` is the same for E2M1 weights of FP8 and BF16 activations, whose scales fold into E4M3 (`top`), with
other bits in a word: magnitudes stay, in the nibbles that a table is looked up by, and signs lie where bytes have theirs. It takes
seven operations for eight codes to E4M3, where the other order takes 19, and 21 to BF16, where the other takes 15.

The order `rows_sm90/1` is that of the weights themselves: dense MXFP8 weights of MXFP8 activations are fastest as they are.

    data   uint8 [1, N, K]                E4M3
    scale  uint8 [1, N, K / 32]           E8M0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import Unsupported, expect
from .formats import MXFP4, MXFP8, Format, ScaledTensor, check_device, get_format
from .prepack_bits import FP8_PREPACK, ORDERS, PREPACK, ROWS_PREPACK, TILE, pack_data, unpack_data
from .prepack_folded import FEWEST_ROWS, FOLDED, FoldedCopy, fold
from .prepack_scales import BIAS, in_window, pack_scale, power_of_two, row_codes, shifts, unpack_scale
from .scales import float_to_e8m0

ACTIVATIONS = ("bf16", "fp8", "mxfp8")
PAIRS = ("", "halves", "interleaved")
KNOWN = (*ORDERS, ROWS_PREPACK)
CHUNK, SLAB = 128, 16
CHUNK_BYTES = 1 << 26            # source bytes that are permuted at a time
FOLD = 14                        # E2M1 times 2^-d is exact in E4M3 for d up to it


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Weights in the order `prepack`. `shape` is logical: `(E, N, K)` or `(N, K)`, as the weights came.

    data, scale: see the module. factor: None, or FP32 `[E, NT * 64]`, what a packed row's sum is multiplied by.
    codes: None, or the scales as they came, where `scale` can't give them back. top: None, or uint8 `[E, NT * 64]`, the largest
    scale code of a packed row (lowered as in `scale`; blocks of zeros don't count): E2M1 only, where each row's codes lie within
    `FOLD` of it, so that they can be folded into E4M3 without loss; `scale` and `data` say the same. pair: how gate and up rows lay
    in the weights that came ('halves' or 'interleaved'; here they lie eight rows apart), or '' where rows are in their order.
    plain: the weights `[N, K]` as they came, in the same memory, where that is their order (`ROWS_PREPACK`), else None.
    folded: None, or what products with many rows take MXFP8 weights folded by (`prepack_folded.py`): a second copy; of weights that
    stay as they came what goes with one, which each call makes.
    """

    data: Tensor
    scale: Tensor
    format: Format
    shape: tuple[int, ...]
    pair: str = ""
    factor: Tensor | None = None
    codes: Tensor | None = None
    prepack: str = PREPACK
    top: Tensor | None = None
    folded: FoldedCopy | None = None
    plain: ScaledTensor | None = field(init=False)

    def __post_init__(self) -> None:
        plain = None
        if self.prepack == ROWS_PREPACK:
            self.check()
            plain = ScaledTensor(self.data[0].view(self.format.elem.dtype), self.scale[0], self.format)
        object.__setattr__(self, "plain", plain)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "plain"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    def __repr__(self) -> str:
        pair = f", {self.pair}" if self.pair else ""
        copy = ", folded beside" if self.folded is not None else ""
        return f"PackedWeight({self.format.name} {list(self.shape)}, {self.prepack}{pair}{copy}, {self.device})"

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def groups(self) -> int:
        return self.data.shape[0]

    @property
    def n(self) -> int:
        return self.shape[-2]

    @property
    def k(self) -> int:
        return self.shape[-1]

    def plain_for(self, rows: int, asked: bool = False) -> ScaledTensor | None:
        """`plain`, but None where a product with so many rows of activations may take the weights folded: any, where a kernel was
        `asked` for."""
        return None if self.folded is not None and (asked or rows >= FEWEST_ROWS) else self.plain

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by name."""
        found = {"data": self.data, "scale": self.scale, "factor": self.factor, "codes": self.codes, "top": self.top}
        return {k: v for k, v in found.items() if v is not None}

    def to(self, device: torch.device | str) -> PackedWeight:
        """A copy on `device`; TypeError for a dtype."""
        check_device(device, "`unpack` and `dequantize(dtype)` give values of one")
        moved = {k: v.to(device) for k, v in self.tensors().items()}
        return PackedWeight(format=self.format, shape=self.shape, pair=self.pair, prepack=self.prepack,
                            folded=None if self.folded is None else self.folded.to(device), **moved)

    def state_dict(self) -> dict[str, Any]:
        """Plain tensors, strings and numbers: what `from_state_dict` takes, and `torch.save` with `weights_only` keeps."""
        f = self.folded
        copy = {} if f is None else {"folded": FOLDED, "folded_rest": f.rest, "folded_sizes": [f.columns, f.picks]}
        if f is not None and f.data is not None:
            copy["folded_data"] = f.data
        return {**self.tensors(), "format": self.format.name, "shape": list(self.shape), "pair": self.pair,
                "prepack": self.prepack, **copy}

    @staticmethod
    def from_state_dict(state: Mapping[str, Any]) -> PackedWeight:
        """The weight that `state_dict` gave `state` for. ValueError for another version's order, or shapes that don't fit."""
        missing = [k for k in ("data", "scale", "format", "shape", "pair", "prepack") if k not in state]
        expect(not missing, "state of a packed weight, missing", missing, "data, scale, format, shape, pair, prepack")
        expect(state["prepack"] in KNOWN, "prepack order", repr(state["prepack"]),
               f"one of {KNOWN}: unpack with the version that packed it, and pack again")
        expect(state.get("folded", FOLDED) == FOLDED, "order of the folded copy", repr(state.get("folded")),
               f"{FOLDED!r}: unpack with the version that packed it, and pack again")
        copy = FoldedCopy(state.get("folded_data"), state["folded_rest"], *state["folded_sizes"]) if "folded" in state else None
        out = PackedWeight(state["data"], state["scale"], get_format(state["format"]), tuple(state["shape"]), state["pair"],
                           state.get("factor"), state.get("codes"), state["prepack"], state.get("top"), copy)
        out.check()
        return out

    def check(self) -> None:
        """Shapes and dtypes agree with each other. ValueError or TypeError elsewhere."""
        expect(self.prepack in KNOWN, "prepack order", repr(self.prepack), f"one of {KNOWN}")
        expect(self.pair in PAIRS, "pair", repr(self.pair), f"one of {PAIRS}")
        expect(self.format.name in (MXFP4.name, MXFP8.name), "format of a packed weight", self.format.name, "mxfp4 or mxfp8")
        data: tuple[int, ...]
        scale: tuple[int, ...]
        if self.prepack == ROWS_PREPACK:
            expect(self.format == MXFP8 and len(self.shape) == 2 and self.pair == "", f"weights in the order {self.prepack}",
                   f"{self.format.name} {self.shape}{self.pair and ' in pairs'}", "mxfp8 [N, K], not in pairs")
            data, scale, rows = (1, self.n, self.k), (1, self.n, -(-self.k // 32)), 0
        else:
            folds = self.format == MXFP4 and self.top is not None
            expect(self.prepack == PREPACK or folds, f"weights in the order {self.prepack}", self.format.name,
                   "mxfp4 with `top`, which says that scales fold into E4M3")
            groups = self.shape[0] if len(self.shape) == 3 else 1
            tiles, chunks = tiles_of(self.n), -(-self.k // CHUNK)
            halves = (2,) if self.format.element == "e4m3" else ()
            data, scale = (groups, tiles, chunks, *halves, TILE, TILE), (groups, tiles, -(-chunks // 2), 4, 8, 4, 2, 2)
            rows = tiles * TILE
        expect(tuple(self.data.shape) == data, f"packed data of {self.shape}, shape", tuple(self.data.shape), str(data))
        expect(tuple(self.scale.shape) == scale, f"packed scale of {self.shape}, shape", tuple(self.scale.shape), str(scale))
        for name, x in self.tensors().items():
            dtype = torch.float32 if name == "factor" else torch.uint8
            expect(name not in ("factor", "top") or tuple(x.shape) == (data[0], rows), f"packed {name}, shape", tuple(x.shape),
                   f"{(data[0], rows)}")
            expect(x.dtype == dtype, f"packed {name}, dtype", x.dtype, str(dtype), error=TypeError)
            expect(x.device == self.device, f"packed {name}, device", x.device, f"the data's, {self.device}")
            expect(x.is_contiguous(), f"packed {name}, strides", x.stride(), "contiguous")
        if self.folded is not None:
            expect(self.format == MXFP8 and not self.pair, "weights with a folded copy", f"{self.format.name}, pair {self.pair!r}",
                   "mxfp8 without pair")
            kept = self.folded.data is not None
            expect(kept != (self.prepack == ROWS_PREPACK), f"codes of the copy of weights in the order {self.prepack}",
                   "kept" if kept else "none", f"none in the order {ROWS_PREPACK}, else kept")
            self.folded.check(data[0], self.n, self.k)


torch.serialization.add_safe_globals([PackedWeight, FoldedCopy])


def prepack(weights: ScaledTensor, *, pair: str = "", activations: str = "bf16", folded: bool | None = None) -> PackedWeight:
    """`weights` MXFP4 or MXFP8 (E4M3), `[E, N, K]` or `[N, K]`, for the Hopper kernels that expand them in registers.

    pair: for gate_up weights whose activation is to be fused, how gate and up rows lie in `weights`: 'halves' ([gate; up]) or
        'interleaved' (gate, up, gate, up, ... as GPT-OSS). N must then be even.
    activations: what the weights will be multiplied with, as far as it is known.
        'bf16': an order that is fast with activations of every format.
        'fp8': MXFP4 weights whose scales fold into E4M3 get the order `FP8_PREPACK`, for FP8 tensor cores: with FP8 activations,
            1x128 or row-wise, and with BF16 ones, as two E4M3 numbers each. MXFP4 ones then run on the kernel for many rows,
            whatever their number, FP16 and MXFP8 ones on the reference.
        'mxfp8': dense MXFP8 weights, `[N, K]` with K a multiple of 128, stay as they are (`ROWS_PREPACK`), which is how the kernels
            for MXFP8 activations read them; memory is shared where scales lie row by row. Other activations then run on the
            portable kernels.
        Weights of another kind than 'fp8' or 'mxfp8' is for get the order of 'bf16'.
    folded: for MXFP8 without `pair`: products with many rows of MXFP8 activations run on FP8 tensor cores instead of BF16 ones,
        just as exactly, by a second copy, as large as the first. Dense weights that 'mxfp8' leaves as they are need none: each
        call folds them anew, by a table of a few per cent of their size. None: those of them that lie on a GPU, no others.
        `PackedWeight.folded` is None where too much of the weights does not fold.

    Works on any device, some experts at a time. It waits for the device a few times, so call it when loading. Raises TypeError or
    ValueError for weights that are not of this kind, and Unsupported if the scales of one row are further apart than BF16 can
    represent exactly (more than 2^131); such weights can be used unpacked.
    """
    _check_weights(weights, pair, activations, folded)
    assert weights.scale is not None
    fmt, shape = weights.format, tuple(weights.shape)
    scale = weights.scale if weights.scale.dtype == torch.uint8 else float_to_e8m0(weights.scale)
    data = weights.data.view(torch.uint8)
    if len(shape) == 2:
        data, scale = data.unsqueeze(0), scale.unsqueeze(0)
    if as_they_are(fmt, shape, pair, activations):
        return PackedWeight(_from_16_bytes(data), _from_16_bytes(scale), fmt, shape, prepack=ROWS_PREPACK,
                            folded=fold(data, scale, keep=False) if folded or (folded is None and data.is_cuda) else None)
    wanted = FP8_PREPACK if activations == "fp8" and fmt.element == "e2m1" and _all_fold(data, scale, fmt) else PREPACK
    order = row_order(shape[-2], pair).to(data.device)
    packed, fields, factor, top, regular = _permuted(data, scale, fmt, order, shape[-1], wanted)
    copy = fold(data, scale) if folded else None
    if regular:
        return PackedWeight(packed, fields, fmt, shape, pair, prepack=wanted, top=top, folded=copy)
    return PackedWeight(packed, fields, fmt, shape, pair, factor, scale.contiguous(), wanted, top, copy)


def _check_weights(weights: ScaledTensor, pair: str, activations: str, folded: bool | None) -> None:
    """Arguments of `prepack`. TypeError, ValueError; Unsupported for a format, or weights without memory."""
    expect(isinstance(weights, ScaledTensor), "weights", type(weights).__name__,
           "a ScaledTensor in MXFP4 or MXFP8 (narrowgemm.quantize or ScaledTensor.make)", error=TypeError)
    expect(isinstance(weights.format, Format), "weights.format", type(weights.format).__name__, "a Format", error=TypeError)
    fmt, shape = weights.format, tuple(weights.shape)
    check_packable(fmt)
    expect(weights.data.dtype == fmt.elem.dtype, f"weights ({fmt.name}), dtype", weights.data.dtype,
           f"{fmt.elem.dtype}: ScaledTensor.make takes bytes, too", error=TypeError)
    expect(weights.data.dim() in (2, 3), "weights, shape", shape, "[E, N, K] or [N, K]")
    scale = weights.scale
    expect(isinstance(scale, Tensor), "weights, scale", type(scale).__name__, "a torch.Tensor", error=TypeError)
    assert scale is not None
    expect(tuple(scale.shape) == fmt.scale_shape(shape), f"weights ({fmt.name}) of shape {shape}: scale shape", tuple(scale.shape),
           f"{fmt.scale_shape(shape)}: ScaledTensor.make takes other layouts")
    expect(scale.device == weights.data.device, "weights, scale device", scale.device, f"the payload's, {weights.data.device}")
    expect(pair in PAIRS, "pair", repr(pair), f"one of {PAIRS}")
    expect(activations in ACTIVATIONS, "activations", repr(activations), f"one of {ACTIVATIONS}")
    expect(shape[-2] > 0 and shape[-1] > 0, "weights, shape", shape, "no empty axis")
    if not torch.compiler.is_compiling() and weights.data.numel() and not weights.data.data_ptr():
        raise Unsupported(f"prepack of weights without memory, on {weights.device}: what order they get depends on their scales",
                          "pack them once they are loaded; explain and experts_workspace size packed weights without any")
    expect(pair == "" or shape[-2] % 2 == 0, f"N of {pair} gate and up rows", shape[-2], "an even number")
    expect(folded is None or isinstance(folded, bool), "folded", repr(folded), "True, False or None", error=TypeError)
    expect(not folded or (fmt == MXFP8 and not pair), "folded, of weights", f"{fmt.name}, pair {pair!r}", "mxfp8 without pair")
    expect(not folded or activations != "fp8", "activations, folded", repr(activations), "'bf16' or 'mxfp8'")


def _permuted(data: Tensor, scale: Tensor, fmt: Format, order: Tensor, k: int, prepack: str
              ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, bool]:
    """What `PackedWeight` holds: data, scale, factor and top; and whether factor and the original codes can be left out.

    data: uint8 `[E, N, K or K / 2]`; scale: E8M0 codes `[E, N, K / 32]`; order: `row_order`. Raises Unsupported.
    """
    groups, rows, chunks, device = data.shape[0], order.numel(), -(-k // CHUNK), data.device
    halves = (2,) if fmt.element == "e4m3" else ()
    packed = torch.empty((groups, rows // TILE, chunks, *halves, TILE, TILE), dtype=torch.uint8, device=device)
    fields = torch.empty((groups, rows // TILE, -(-chunks // 2), 4, 8, 4, 2, 2), dtype=torch.uint8, device=device)
    factor = torch.ones((groups, rows), dtype=torch.float32, device=device)
    top = torch.zeros((groups, rows), dtype=torch.uint8, device=device) if fmt.element == "e2m1" else None
    regular, exact, folds = (torch.ones((), dtype=torch.bool, device=device) for _ in range(3))     # read back once all is done
    step = _experts_at_a_time(data)
    for e in range(0, groups, step):
        d = _rows(data[e:e + step], order, chunks * CHUNK // fmt.elem.per_byte)
        s = scale[e:e + step]
        shift, fits = shifts(data[e:e + step], s, fmt)
        exact &= fits.all()
        regular &= shift.nan_to_num(1.0).eq(0).all() & in_window(s, fmt)
        factor[e:e + step] = torch.where(order >= 0, power_of_two(_take(shift, order)), 1.0)
        packed[e:e + step] = pack_data(d, fmt, prepack)
        whole = shift.nan_to_num(0.0).to(torch.int16)
        if top is not None:
            high, low = row_codes(data[e:e + step], s, fmt)
            folds &= _fold(high, low)
            top[e:e + step] = torch.where(order >= 0, _take((high - whole).clamp(min=0).to(torch.uint8), order), 0)
        field = (s.to(torch.int16) - whole.unsqueeze(-1) + BIAS[fmt.element]).clamp(0, 254)
        fields[e:e + step] = pack_scale(_rows(field.to(torch.uint8), order, 8 * fields.shape[2]))
    if not bool(exact):
        raise Unsupported(f"a row of these {fmt.name} weights has scales further apart than BF16 holds exactly",
                          "use the weights as they are, which the portable kernels take")
    return packed, fields, factor, top if bool(folds) else None, bool(regular)


def as_they_are(fmt: Format, shape: tuple[int, ...], pair: str, activations: str) -> bool:
    """Whether `prepack` leaves weights in the order that they came in."""
    return activations == "mxfp8" and fmt == MXFP8 and len(shape) == 2 and not pair and shape[-1] % CHUNK == 0


def _from_16_bytes(x: Tensor) -> Tensor:
    """Contiguous, and at a multiple of 16 bytes: itself where it is."""
    return x.clone(memory_format=torch.contiguous_format) if x.data_ptr() % 16 else x.contiguous()


def _fold(high: Tensor, low: Tensor) -> Tensor:
    """Whether rows of such largest and smallest codes can be folded into E4M3, all of them."""
    return ((high < 0) | (high - low <= FOLD)).all()


def _experts_at_a_time(data: Tensor) -> int:
    return max(1, CHUNK_BYTES // max(1, data[:1].numel()))


def _all_fold(data: Tensor, scale: Tensor, fmt: Format) -> bool:
    step = _experts_at_a_time(data)
    return all(bool(_fold(*row_codes(data[e:e + step], scale[e:e + step], fmt))) for e in range(0, data.shape[0], step))


def unpack(packed: PackedWeight) -> ScaledTensor:
    """The weights that `packed` was made from, bit for bit (a scale that came as FP32 comes back as its E8M0 code).

    Weights that were left in their order are not copied. Raises TypeError for what is no PackedWeight."""
    expect(isinstance(packed, PackedWeight), "packed", type(packed).__name__, "a PackedWeight", error=TypeError)
    packed.check()
    if packed.plain is not None:
        return packed.plain
    fmt, n, k = packed.format, packed.n, packed.k
    where = inverse_order(n, packed.pair).to(packed.device)
    groups = packed.groups
    data = torch.empty((groups, n, k // fmt.elem.per_byte), dtype=torch.uint8, device=packed.device)
    step = _experts_at_a_time(data)
    for e in range(0, groups, step):
        data[e:e + step] = unpack_data(packed.data[e:e + step], fmt, packed.prepack)[:, where, :data.shape[-1]]
    if packed.codes is not None:
        scale = packed.codes
    else:
        fields = unpack_scale(packed.scale)[:, where, :-(-k // 32)]
        scale = (fields.to(torch.int16) - BIAS[fmt.element]).to(torch.uint8)
    if len(packed.shape) == 2:
        data, scale = data[0], scale[0] if scale.dim() == 3 else scale
    return ScaledTensor(data.view(fmt.elem.dtype), scale, fmt)


def check_packable(fmt: Format) -> None:
    """Unsupported for weights of a format that has no packed order."""
    if fmt.name not in (MXFP4.name, MXFP8.name):
        raise Unsupported(f"prepack takes mxfp4 and mxfp8 (E4M3), not {fmt.name}", "other formats are taken as they are")


# ---------------------------------------------------------------- rows
def tiles_of(n: int) -> int:
    """Tiles of 64 packed rows for N logical ones; paired, a tile is 32 features, gate and up."""
    return -(-n // TILE)


def row_order(n: int, pair: str = "") -> Tensor:
    """int64 `[NT * 64]`: the logical row that each packed row holds, -1 for padding."""
    packed = torch.arange(tiles_of(n) * TILE, device="cpu")
    if not pair:
        return torch.where(packed < n, packed, -1)
    feature = packed // SLAB * (SLAB // 2) + packed % (SLAB // 2)
    up = packed % SLAB // (SLAB // 2)
    row = up * (n // 2) + feature if pair == "halves" else 2 * feature + up
    return torch.where(feature < n // 2, row, -1)


def inverse_order(n: int, pair: str = "") -> Tensor:
    """int64 `[N]`: the packed row that holds each logical row."""
    order = row_order(n, pair)
    return order.argsort()[order.numel() - n:]      # padding, -1, is in front


def _take(x: Tensor, order: Tensor) -> Tensor:
    """`x` `[E, N]` in packed rows; padding rows hold whatever row 0 holds."""
    return x[:, order.clamp(min=0)]


def _rows(x: Tensor, order: Tensor, columns: int) -> Tensor:
    """`x` `[E, N, C]` bytes in packed rows and `columns` columns, zeros where there is nothing."""
    out = torch.zeros((x.shape[0], order.numel(), columns), dtype=torch.uint8, device=x.device)
    taken = x[:, order.clamp(min=0)]
    out[..., :x.shape[-1]] = taken.masked_fill_((order < 0).view(1, -1, 1), 0)
    return out
