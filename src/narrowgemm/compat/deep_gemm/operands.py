"""DeepGEMM's `(payload, scales)` pairs and recipes, as `ScaledTensor`s; and what every GEMM checks about `d` and `c`.

A recipe gives the rows and columns of K that share a scale: `recipe_a` and `recipe_b` are `(rows, cols)`, and
`recipe` is `(rows of A's, rows of B's, cols)`. Without one, A is 1x128 and B is what its scales' shape says. FP4: `fp4.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ...errors import Unsupported, expect
from ...formats import MXFP8, Format, FP8_1x128, FP8_128x128, ScaledTensor
from ...prepack import PackedWeight
from . import fp4
from .fp4 import FP4

Pair = Sequence[Tensor]
Weight = Pair | PackedWeight
Block = tuple[int, int]

FP8 = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
E8M0 = getattr(torch, "float8_e8m0fnu", torch.uint8)
SCALES = (torch.float32, torch.uint8, E8M0, torch.int32)
BLOCKS = {(1, 128): FP8_1x128, (128, 128): FP8_128x128, (1, 32): MXFP8}
OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)

_checked: dict[tuple[Any, ...], tuple[Format, Format]] = {}  # calls whose operands need no more looking at
_LIMIT = 8192


@lru_cache(maxsize=64)
def format_of(block: Block, element: str, e8m0: bool) -> Format:
    """The format of an FP8 operand with that scale block. Unsupported for a block that no format has."""
    if block not in BLOCKS:
        raise Unsupported(f"scale blocks of {block[0]}x{block[1]} for FP8", "1x128, 128x128 or 1x32")
    fmt = BLOCKS[block]
    return (fmt.with_scale("e8m0") if e8m0 else fmt).with_element(element)


def prepare(a: Pair, b: Weight, d: Tensor, dims: tuple[int, int], recipe: Sequence[int] | None,
            recipe_a: Sequence[int] | None, recipe_b: Sequence[int] | None) -> tuple[ScaledTensor, ScaledTensor | PackedWeight]:
    """A and B of `dims` dimensions as ScaledTensors (B may be packed), checked against each other and against `d`.

    Calls that differ in nothing but data are checked once: what follows costs a look-up.
    """
    key: tuple[Any, ...] | None
    try:
        (x, sx), (y, sy) = a, b  # type: ignore[misc]  # a packed weight is no pair
        key = (dims, recipe, recipe_a, recipe_b, x.shape, x.dtype, x.device, sx.shape, sx.dtype, sx.device, y.shape,
               y.dtype, y.device, sy.shape, sy.dtype, sy.device, d.shape, d.stride(), d.dtype, d.device)
        formats = _checked.get(key)
    except (TypeError, ValueError, AttributeError):  # no pairs, no tensors, recipes as lists: the long way says which
        key = formats = None
    if formats is not None:
        return ScaledTensor(x, sx, formats[0]), ScaledTensor(y, sy, formats[1])
    block_a, block_b = blocks(recipe, recipe_a, recipe_b)
    p = operand(a, "a", block_a, dims[0])
    q = b if isinstance(b, PackedWeight) else operand(b, "b", block_b, dims[1])
    expect(len(q.shape) == dims[1], "b, shape", tuple(q.shape), f"{dims[1]} dimensions")
    expect(dims[0] == 2 or p.shape[0] == q.shape[0], "groups of a and b", f"{p.shape[0]} and {q.shape[0]}", "the same")
    expect(p.shape[-1] == q.shape[-1], "K of a and b", f"{p.shape[-1]} and {q.shape[-1]}",
           f"the same: a is [..., M, K] and b [..., N, K], here (as nt) {tuple(p.shape)} and {tuple(q.shape)}")
    expect(p.device == q.device, "b, device", q.device, f"a's, {p.device}")
    check_out(d, (*p.shape[:-1], q.shape[-2]), p.device)
    if key is not None and isinstance(q, ScaledTensor) and (p.data is x and q.data is y) and (p.scale is sx and q.scale is sy):
        if len(_checked) >= _LIMIT:
            _checked.clear()
        _checked[key] = p.format, q.format
    return p, q


def split(pair: Pair, name: str) -> tuple[Tensor, Tensor]:
    """Payload and scales of a pair, both tensors, the payload FP8 or FP4. TypeError otherwise."""
    ok = isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(x, Tensor) for x in pair)
    expect(ok, name, _describe(pair), "a pair (payload, scales) of tensors", error=TypeError)
    data, scale = pair
    expect(data.dtype in FP8 or data.dtype in FP4, f"{name}, payload dtype", data.dtype,
           "torch.float8_e4m3fn or torch.float8_e5m2 (view FP8 bytes as that); FP4: torch.int8 or torch.int32", error=TypeError)
    expect(scale.dtype in SCALES, f"{name}, scales dtype", scale.dtype,
           "float32, float8_e8m0fnu or uint8 E8M0 codes, or int32 with four E8M0 codes", error=TypeError)
    expect(scale.device == data.device, f"{name}, device of the scales", scale.device, f"the payload's, {data.device}")
    return data, scale


def transposed(pair: Weight, name: str) -> tuple[Tensor, Tensor]:
    """The pair with the two last axes of payload and scales exchanged: views, no copies."""
    if isinstance(pair, PackedWeight):
        raise Unsupported(f"{name}: packed weights, which lie as [N, K], where a transpose is asked for", "the nt names")
    data, scale = split(pair, name)
    expect(data.dim() >= 2 and scale.dim() >= 2, f"{name}, shapes", f"{tuple(data.shape)} and {tuple(scale.shape)}",
           "at least two dimensions each")
    return data.mT, scale.mT


def blocks(recipe: Sequence[int] | None, recipe_a: Sequence[int] | None,
           recipe_b: Sequence[int] | None) -> tuple[Block | None, Block | None]:
    """A's and B's scale blocks; None is left to `operand`. ValueError for recipes that contradict each other."""
    if recipe is None and recipe_a is None and recipe_b is None:
        return None, None
    for name, given in (("recipe", recipe), ("recipe_a", recipe_a), ("recipe_b", recipe_b)):
        expect(given is None or isinstance(given, Sequence), name, repr(given), "a tuple of numbers", error=TypeError)
    expect((recipe_a is None) == (recipe_b is None), "recipe_a and recipe_b", f"{recipe_a} and {recipe_b}",
           "both or neither")
    if recipe is None:
        assert recipe_a is not None and recipe_b is not None
        expect(len(recipe_a) == 2 and len(recipe_b) == 2, "recipe_a and recipe_b", f"{recipe_a} and {recipe_b}",
               "(rows, columns of K) that share a scale")
        return (int(recipe_a[0]), int(recipe_a[1])), (int(recipe_b[0]), int(recipe_b[1]))
    expect(recipe_a is None, "recipe together with recipe_a and recipe_b", f"{recipe}, {recipe_a}, {recipe_b}",
           "either recipe or the two others")
    expect(len(recipe) == 3, "recipe", tuple(recipe), "(rows of A, rows of B, columns of K) that share a scale")
    rows_a, rows_b, cols = (int(x) for x in recipe)
    return (rows_a, cols), (rows_b, cols)


def weight_block(shape: torch.Size, scale: Tensor, name: str) -> Block:
    """128x128 or 1x128, by the shape of the scales of a `[..., N, K]` operand; ValueError where neither fits."""
    rows, k = shape[-2:]
    cols = -(-k // 128)
    tall, wide = (-(-rows // 128), cols), (rows, cols)
    if scale.dtype == torch.int32:
        tall, wide = (tall[0], -(-cols // 4)), (rows, -(-cols // 4))
    got = tuple(scale.shape[-2:])
    if got == tall:
        return 128, 128
    if got == wide:
        return 1, 128
    if scale.dtype != torch.int32 and got in (tall[::-1], wide[::-1]):
        return (128, 128) if got == tall[::-1] else (1, 128)
    raise ValueError(f"{name}, scales for a payload of {tuple(shape)}: got {tuple(scale.shape)} {scale.dtype}, "
                     f"expected [..., {tall[0]}, {tall[1]}] for 128x128 or [..., {wide[0]}, {wide[1]}] for 1x128; "
                     "give recipe_a and recipe_b for others")


def operand(pair: Pair, name: str, block: Block | None, dim: int) -> ScaledTensor:
    """The pair as a `ScaledTensor`: payload `[M, K]` or `[G, M, K]` (`dim` 2 or 3), scales in any layout.

    FP32 scales stay FP32: nothing is rounded to E8M0 here. Packed scales of 128x128 blocks that were expanded to one
    row each (`[N, K/512]`) are thinned to one row a block.
    """
    data, scale = split(pair, name)
    expect(data.dim() == dim, f"{name}, payload shape", tuple(data.shape), f"{dim} dimensions")
    expect(scale.dim() == dim, f"{name}, scales shape", tuple(scale.shape), f"{dim} dimensions, as the payload")
    if data.dtype in FP4:
        return fp4.operand(data, scale, name, block)
    if block is None:
        block = weight_block(data.shape, scale, name) if name == "b" else (1, 128)
    fmt = format_of(block, FP8[data.dtype], scale.dtype != torch.float32)
    if scale.dtype == torch.float32 and tuple(scale.shape) == fmt.scale_shape(data.shape):
        return ScaledTensor(data, scale, fmt)
    if scale.dtype == torch.int32 and block[0] > 1 and scale.shape[-2] == data.shape[-2]:
        scale = scale[..., :: block[0], :]
    return ScaledTensor.make(data, scale, fmt)


def check_options(compiled_dims: str, epilogue: object) -> None:
    """`compiled_dims` names dimensions (nothing is compiled a shape, so it has no effect); no epilogue is offered."""
    if epilogue is None and compiled_dims in ("nk", "mn"):
        return
    expect(isinstance(compiled_dims, str) and set(compiled_dims) <= set("mnk"), "compiled_dims", repr(compiled_dims),
           "letters of 'mnk'")
    if epilogue is not None:
        raise Unsupported(f"epilogue {epilogue!r}", "None; apply it to d")


def check_out(d: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """`d` has that shape, an output dtype, unit stride along N, and lies on `device`."""
    expect(isinstance(d, Tensor), "d", type(d).__name__, "a torch.Tensor", error=TypeError)
    expect(d.dtype in OUTPUTS, "d, dtype", d.dtype, " or ".join(map(str, OUTPUTS)), error=TypeError)
    expect(tuple(d.shape) == shape, "d, shape", tuple(d.shape), str(shape))
    expect(d.device == device, "d, device", d.device, f"the operands', {device}")
    expect(d.stride(-1) == 1 or d.shape[-1] <= 1, "d, strides", d.stride(), "1 along N")


def take_c(c: Tensor | None, d: Tensor) -> bool:
    """Whether the product is added to `d`: `c` is `d` itself or is copied there. Call it after every other check."""
    if c is None:
        return False
    expect(isinstance(c, Tensor), "c", type(c).__name__, "a torch.Tensor or None", error=TypeError)
    expect(c.dtype == d.dtype, "c, dtype", c.dtype, f"d's, {d.dtype}", error=TypeError)
    expect(c.shape == d.shape, "c, shape", tuple(c.shape), f"d's, {tuple(d.shape)}")
    expect(c.device == d.device, "c, device", c.device, f"d's, {d.device}")
    if c.data_ptr() == d.data_ptr():
        expect(c.stride() == d.stride() or d.numel() <= 1, "c at d's address, strides", c.stride(),
               f"d's, {d.stride()}")
    else:
        d.copy_(c)
    return True


def _describe(x: object) -> str:
    if isinstance(x, (tuple, list)):
        return f"{type(x).__name__} of {[type(i).__name__ for i in x]}"
    return type(x).__name__
