"""DeepGEMM's scale-layout helpers. The GEMMs here take any layout, so none of these is needed; callers call them.

Definition: deepseek-ai/DeepGEMM, `csrc/apis/layout.hpp` and `csrc/utils/layout.hpp`. One difference: where upstream
packs FP32 scales into E8M0 by dropping their mantissas, only zero (code 0, 2^-127) and powers of two are packed here.
Others raise ValueError where the values can be read without waiting for a device, and become NaN elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import arch
from ...errors import Unsupported, expect, expect_count
from ...runtime import env
from ...scales import mn_major_tma_aligned
from . import state
from .operands import E8M0, SCALES


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """`x` elements of `element_size` bytes rounded up to a multiple of 16 bytes, in elements."""
    expect(element_size > 0 and 16 % element_size == 0, "element_size", element_size, "a divisor of 16")
    unit = 16 // element_size
    return -(-x // unit) * unit


def get_mn_major_tma_aligned_tensor(sf: Tensor) -> Tensor:
    """Scales `[M, S]` or `[G, M, S]` (float32, or packed int32) with M contiguous and columns on 16 bytes.

    The very tensor that was given where it lies so already: never another tensor over the same memory.
    """
    check_scales(sf, (torch.float32, torch.int32))
    return mn_major_tma_aligned(sf)


def get_mn_major_tma_aligned_packed_ue8m0_tensor(sf: Tensor, psum_layout: Tensor | None = None) -> Tensor:
    """float32 powers of two `[M, S]` or `[G, M, S]` as int32 `[.., M, ceil(S/4)]`, four E8M0 codes along K, MN-major.

    The lowest byte is the first column, the last word is filled with zeros. `psum_layout` int32 `[G]`, ends of groups
    in rows: rows in gaps may hold anything and become zeros.
    """
    check_scales(sf, (torch.float32,))
    live = None
    if psum_layout is not None:
        expect(sf.dim() == 2, "sf with psum_layout, shape", tuple(sf.shape), "[M, S]")
        live = rows_in_groups(psum_layout, sf.shape[0], state.settings.mk_alignment)[:, None]
    return mn_major_tma_aligned(pack(exact_codes(sf, live)))


def get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor(sf: Tensor, grouped_layout: Tensor,
                                                           ks_cpu: Sequence[int] | None, gran_k: int = 128,
                                                           k_alignment: int | None = None,
                                                           use_psum_layout: bool = False) -> Tensor:
    """float32 powers of two `[sum(ceil(k_g / gran_k)), M]` as int32 `[sum(ceil(k_g / (4 gran_k))), M]`, group by group.

    `grouped_layout` int32 `[G]`: the `k_g`, or with `use_psum_layout` the end of each group along K, groups starting at
    multiples of `k_alignment` (default: the process's). `ks_cpu`: the sizes on the host; with `use_psum_layout` it may
    be None or empty, then the result has the most rows that could be needed. Rows beyond the last group hold zeros.
    """
    check_scales(sf, (torch.float32,))
    expect(sf.dim() == 2, "sf, shape", tuple(sf.shape), "[scales along K, M]")
    expect(gran_k in (32, 128), "gran_k", gran_k, "32 or 128")
    check_index(grouped_layout, "grouped_layout")
    alignment = state.settings.mk_alignment if k_alignment is None else k_alignment
    expect(alignment > 0 and alignment % 32 == 0, "k_alignment", alignment, "a multiple of 32")
    groups, rows = grouped_layout.numel(), sf.shape[0]
    if ks_cpu is not None and len(ks_cpu):
        expect(len(ks_cpu) == groups, "ks_cpu, length", len(ks_cpu), f"the number of groups, {groups}")
        held = sum(-(-k // gran_k) for k in ks_cpu)
        expect(use_psum_layout or held == rows, "sf, rows", rows, f"those of ks_cpu, {held}")
        packed_rows = sum(-(-k // (4 * gran_k)) for k in ks_cpu)
    else:
        expect(use_psum_layout, "ks_cpu without use_psum_layout", ks_cpu, "the sizes of the groups along K")
        packed_rows = (rows + 3 * groups) // 4
    codes = exact_codes(sf)
    if groups == 0 or packed_rows == 0 or rows == 0:
        return torch.zeros((packed_rows, sf.shape[1]), dtype=torch.int32, device=sf.device)
    ends = grouped_layout.long()
    ks = ends - aligned_starts(ends, alignment) if use_psum_layout else ends
    count = (ks + gran_k - 1) // gran_k
    first = count.cumsum(0) - count
    words = (count + 3) // 4
    last_word = words.cumsum(0)
    row = torch.arange(packed_rows, device=sf.device)
    group = torch.searchsorted(last_word, row, right=True)
    inside = group.clamp(max=groups - 1)
    offset = ((row - (last_word - words)[inside])[:, None] * 4 + torch.arange(4, device=sf.device))  # [packed, 4]
    valid = (offset < count[inside][:, None]) & (group < groups)[:, None]
    source = torch.where(valid, first[inside][:, None] + offset, 0).clamp(max=rows - 1)
    picked = torch.where(valid[..., None], codes[source], 0).to(torch.uint8)  # [packed, 4, M]
    return picked.mT.contiguous().view(torch.int32).squeeze(-1)


def transform_sf_into_required_layout(sf: Tensor, mn: int, k: int, recipe: Sequence[int], num_groups: int | None = None,
                                      is_sfa: bool | None = None, disable_ue8m0_cast: bool = False,
                                      psum_layout: Tensor | None = None) -> Tensor:
    """Scales of a `[mn, k]` or `[num_groups, mn, k]` operand in the layout that DeepGEMM's kernels of this device read.

    `recipe`: (rows, cols) of a scale block, or (rows of A's, rows of B's, cols) with `is_sfa`. 1-row blocks become
    MN-major TMA-aligned, 128x128 ones stay; on compute capability 10 without `disable_ue8m0_cast` FP32 scales become
    packed int32, one row a row of the operand. E8M0 codes stay as they are. ValueError for shapes that don't fit.
    """
    rows, cols = _block(recipe, is_sfa)
    expect_count(mn, "mn", 0)
    expect_count(k, "k", 0)
    check_scales(sf, SCALES)
    packed = sf.dtype == torch.int32
    lead = () if num_groups is None else (num_groups,)
    want = (*lead, -(-mn // rows), -(-k // (cols * (4 if packed else 1))))
    expect(tuple(sf.shape) == want, f"sf of {(*lead, mn, k)} with {rows}x{cols} blocks, shape", tuple(sf.shape),
           str(want))
    if sf.dtype in (torch.uint8, E8M0):
        return sf
    if packed:
        expect(rows == 1, "packed scales with a recipe of rows", rows, "1: one row of scales a row of the operand")
        return mn_major_tma_aligned(sf)
    if arch.detect(sf.device).capability // 10 == 10 and not disable_ue8m0_cast:
        if rows == 1:
            return get_mn_major_tma_aligned_packed_ue8m0_tensor(sf, psum_layout)
        # weights, at load time: waiting for the device is fine, a wrong scale is not
        codes = exact_codes(sf, check=True)
        return mn_major_tma_aligned(pack(codes.repeat_interleave(rows, -2)[..., :mn, :]))
    return mn_major_tma_aligned(sf) if rows == 1 else sf


def check_scales(sf: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    expect(isinstance(sf, Tensor), "sf", type(sf).__name__, "a torch.Tensor", error=TypeError)
    expect(sf.dtype in dtypes, "sf, dtype", sf.dtype, " or ".join(map(str, dtypes)), error=TypeError)
    expect(sf.dim() in (2, 3), "sf, shape", tuple(sf.shape), "[M, S] or [G, M, S]")


def check_index(index: Tensor, name: str) -> None:
    ok = isinstance(index, Tensor) and index.dtype == torch.int32 and index.dim() == 1 and index.is_contiguous()
    expect(ok, name, f"{getattr(index, 'dtype', type(index).__name__)} {tuple(getattr(index, 'shape', ()))}",
           "a contiguous int32 tensor of one dimension", error=TypeError)


def exact_codes(sf: Tensor, live: Tensor | None = None, *, check: bool = False) -> Tensor:
    """uint8 E8M0 codes of float32 zeros and powers of two; NaN, and what is neither, is 255. Rows not `live` are 0.

    Raises ValueError for what is neither where `check` asks for it, on the CPU, and under NARROWGEMM_VALIDATE=sync.
    """
    bits = sf.view(torch.int32)
    tiny = bits == 0x00400000  # 2^-127, the one subnormal that is a code
    exact = (((bits & 0x007FFFFF) == 0) & (bits >= 0)) | tiny
    code = torch.where(exact, torch.where(tiny, 0, bits >> 23), 255)
    if live is not None:
        exact, code = exact | ~live, torch.where(live, code, 0)
    if check or sf.device.type == "cpu" or env.wants_sync():
        expect(bool((exact | sf.isnan()).all()), "float32 scales to pack as E8M0", "values that are no powers of two",
               "powers of two: quantise with use_ue8m0=True; scales are never rounded after the payload was quantised")
    return code.to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    """uint8 `[.., S]` to int32 `[.., ceil(S/4)]`, lowest byte first, filled up with zeros as upstream does."""
    return torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4)).contiguous().view(torch.int32)


def aligned_starts(ends: Tensor, alignment: int) -> Tensor:
    """First row of each group of a psum layout, on the device."""
    return torch.nn.functional.pad((ends[:-1] + (alignment - 1)) // alignment * alignment, (1, 0))


def rows_in_groups(ends: Tensor, rows: int, alignment: int) -> Tensor:
    """bool `[rows]`: whether a row of a psum layout belongs to a group."""
    check_index(ends, "psum_layout")
    row = torch.arange(rows, dtype=ends.dtype, device=ends.device)
    if ends.numel() == 0:
        return row < 0
    group = torch.searchsorted(ends, row, right=True)
    inside = group.clamp(max=ends.numel() - 1)
    return (group < ends.numel()) & (row >= aligned_starts(ends, alignment)[inside])


def _block(recipe: Sequence[int], is_sfa: bool | None) -> tuple[int, int]:
    expect(isinstance(recipe, Sequence), "recipe", repr(recipe), "(rows, cols) or (rows of A's, B's, cols)", error=TypeError)
    if len(recipe) == 3:
        expect(is_sfa is not None, "is_sfa with a recipe of three", is_sfa, "True for A's scales, False for B's")
        rows, cols = int(recipe[0] if is_sfa else recipe[1]), int(recipe[2])
    else:
        expect(len(recipe) == 2, "recipe", tuple(recipe), "(rows, cols) or (rows of A's, rows of B's, cols)")
        expect(is_sfa is None, "is_sfa with a recipe of two", is_sfa, "None")
        rows, cols = int(recipe[0]), int(recipe[1])
    if (rows, cols) not in ((1, 128), (128, 128), (1, 32)):
        raise Unsupported(f"scale blocks of {rows}x{cols}", "1x128, 128x128 or 1x32")
    return rows, cols
