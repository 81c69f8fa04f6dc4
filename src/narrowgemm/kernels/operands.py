"""The tensors of one call, as kernels take them: validated, scales normalised, real sizes beside the Problem's buckets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import expect
from ..formats import ScaledTensor
from ..prepack import PackedWeight

Memo = dict[Any, Any]       # launches bound to calls of one signature, by Step (`kernels.launching`), and what an op adds


class Tensors:
    """What `kernels.launching` asks of a call's tensors."""

    __slots__ = ()

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Every tensor of the call, in one order."""
        raise NotImplementedError

    def addresses(self, workspace: Tensor | None) -> tuple[int, ...]:
        """The workspace's, then those of `tensors`; 0 where there is none."""
        return tuple([0 if t is None else t.data_ptr() or without_memory(t) for t in (workspace, *self.tensors())])


def without_memory(t: Tensor) -> int:
    """0, the address of a tensor without elements, of one on 'meta' and of a fake one. TypeError for a wrapper around others."""
    expect(not (t.numel() and hasattr(t, "__tensor_flatten__")), "tensor", type(t).__name__, "a tensor with memory of its own: "
           "a DTensor's to_local(), or what wait() gives where a collective is under way", error=TypeError)
    return 0


@dataclass(slots=True, eq=False)
class Operands(Tensors):
    """Of a product, or of `quantize` and `quantize_both`, which have a matrix `a` and the outputs. Shapes are those of the op.

    routed_gemm: row of A = slot // a_div, row of the output = slot; see `layouts.Routed`.
    """

    a: ScaledTensor
    b: ScaledTensor                       # quantise: the output, payload and scales
    out: Tensor                           # written in place
    m: int                                # real sizes, where a Problem has buckets; masked: `m` is the rows a group can hold
    n: int
    k: int
    groups: int = 1
    index: Tensor | None = None           # the layout's device tensor
    alignment: int = 1                    # psum: rows that groups start at multiples of
    out_scale: Tensor | None = None       # quantise: scales of `out`
    rounding: str = "rceil"               # quantise: how an E8M0 scale is rounded
    amax_clamp: float = 1e-4              # quantise: least amax of a block
    packed: PackedWeight | None = None    # what `b` is data and scale of, where weights are prepacked
    factor: Tensor | None = None          # its factors
    slots: Tensor | None = None           # routed_gemm: int32, the slot of each position; None where they are the same
    experts: Tensor | None = None         # routed layout: expert_ids
    posted: Tensor | None = None          # routed layout: num_tokens_post_padded
    bias: Tensor | None = None            # [G, N], in the logical order of the weight's rows
    weight: Tensor | None = None          # routing weights, FP32, one a slot
    num_slots: int = 0
    positions: int = 0
    top_k: int = 1
    block_m: int = 1                      # routed layout: positions of a block
    segments: Tensor | None = None        # quantise both: where each group's columns start, written
    add: Tensor | None = None             # routed_gemm: [tokens, N], contiguous rows, added to a token's sum
    top: Tensor | None = None             # packed weights: largest scale code of each row, where it folds
    folded: Tensor | None = None          # packed weights: their folded copy, `prepack_folded.FoldedCopy`
    folded_rest: Tensor | None = None
    amax: Tensor | None = None            # quantise both: float32 [1], raised to the largest magnitude
    memo: Memo | None = None              # None: bind no launches

    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.a.data, self.a.scale, self.b.data, self.b.scale, self.out, self.index, self.out_scale, self.factor, self.slots,
                self.experts, self.posted, self.bias, self.weight, self.segments, self.add, self.top,
                self.amax, self.folded, self.folded_rest)
