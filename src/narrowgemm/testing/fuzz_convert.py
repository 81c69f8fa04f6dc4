"""Random conversions between layouts for `fuzz_steps`: on the device as on the CPU, bit for bit."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..layout_convert import (
    aligned_capacity,
    contiguous_from_offsets,
    contiguous_from_psum,
    group_lens,
    masked_from_offsets,
    offsets_from_contiguous,
    offsets_from_group_lens,
    offsets_from_masked,
    offsets_from_psum,
    offsets_from_routed,
    psum_from_offsets,
    routed_from_offsets,
)
from ..layouts import Contiguous, Layout, Masked, Psum
from .fuzz_call import Call


def run(c: Call) -> None:
    """Layouts from layouts: on the device as on the CPU."""
    groups, alignment, block, top_k = c.pick((1, 2, 5, 33)), c.pick((1, 8, 128)), c.pick((1, 4, 16)), c.pick((1, 2, 4))
    sizes = torch.tensor([c.pick((0, 0, 1, 7, 33, 128)) for _ in range(groups)], dtype=c.pick((torch.int32, torch.int64)))
    tokens = -(-int(sizes.sum()) // top_k)
    rows, most = tokens * top_k, max(1, int(sizes.max()))
    capacity = aligned_capacity(rows, groups, alignment) + c.pick((0, 5, 200))
    short = max(1, rows - c.pick((0, 0, 3)))

    def all_of(device: torch.device) -> dict[str, Any]:
        packed = offsets_from_group_lens(sizes.to(device))
        slots = torch.randperm(rows, generator=torch.Generator().manual_seed(5)).to(device)
        contiguous = contiguous_from_offsets(packed, capacity, alignment=alignment)
        psum = psum_from_offsets(packed, capacity, alignment=alignment)
        masked = masked_from_offsets(packed, most)
        routed = routed_from_offsets(packed, slots, block_m=block, top_k=top_k, num_slots=rows)
        assert isinstance(contiguous.layout, Contiguous) and isinstance(psum.layout, Psum) and isinstance(masked.layout, Masked)
        return {"contiguous": contiguous, "psum": psum, "masked": masked, "routed": routed, "k": group_lens(masked.layout),
                "from contiguous": offsets_from_contiguous(contiguous.layout, groups),
                "from psum": offsets_from_psum(psum.layout, rows), "psum too short": offsets_from_psum(psum.layout, short),
                "m_indices": contiguous_from_psum(psum.layout, capacity),
                "from masked": offsets_from_masked(masked.layout, most, rows),
                "from routed": offsets_from_routed(routed, groups), "lens": group_lens(routed, groups)}

    def tensors(x: Any) -> list[Tensor]:
        if isinstance(x, Tensor):
            return [x]
        inside = x if isinstance(x, tuple) else [getattr(x, f.name) for f in fields(x)] if isinstance(x, Layout) else ()
        return [t for v in inside for t in tensors(v)]

    want, got = all_of(torch.device("cpu")), all_of(c.device)
    for name, x in want.items():
        for i, (y, z) in enumerate(zip(tensors(got[name]), tensors(x))):
            c.same(f"{sizes.tolist()} alignment {alignment} block {block} top_k {top_k} capacity {capacity}: {name} {i}", y, z)
