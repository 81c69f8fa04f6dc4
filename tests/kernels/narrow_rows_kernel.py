"""The runs of the contiguous layout alone, for layouts too long for a launch with a program a row in the interpreter."""

import triton
import triton.language as tl

from narrowgemm.kernels.gluon.sm90.narrow_rows_device import contiguous_entries


@triton.jit
def entries_kernel(index_ptr, table_ptr, positions, G, cap, BT: tl.constexpr):
    tl.store(table_ptr, contiguous_entries(index_ptr, table_ptr, positions, G, cap, BT))
