"""What Hopper's kernels that write FP8 along rows and columns share on the host: tiles, how many blocks an SM takes, the launch in
front."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ....arch import Arch
from ....problem import Config
from ...launching import Launch, Pointer

REGISTERS = 128         # a thread; 16 warps an SM
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
CHUNKS = (32, 128, 256)
TILES = 32              # that a program of the launch in front looks up


def config(columns: int, stages: int, band: int) -> Config:
    return Config(128, 1, columns, columns // 16, stages, band, persistent=True)


def tiles(rows: int, groups: int) -> int:
    """Tiles of 128 rows of groups that are filled up to whole ones, at most."""
    return -(-rows // 128) + groups


def shared(columns: int, boxes: int, itemsize: int) -> int:
    """Bytes of shared memory of a block with room for so many boxes of 128 rows."""
    return boxes * 128 * columns * itemsize + 128 * columns + 1024


def resident(c: Config, nbytes: int, arch: Arch) -> int:
    """Blocks an SM takes."""
    return min(512 // (REGISTERS * c.num_warps // 4), (arch.smem + 1024) // (nbytes + 1024))


def registers(blocks: int) -> int:
    """Of a thread, where shared memory lets an SM take so many blocks."""
    return REGISTERS if blocks > 1 else 255


def descriptor(x: Tensor, shape: list[int], strides: list[int], columns: int) -> Any:
    """TMA's, of `[..., rows, columns]` in boxes of 128 rows."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    box = [1] * (len(shape) - 2) + [128, columns]
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * x.element_size(), rank=len(shape))
    return TensorDescriptor(x, shape, strides, box, layout)


Place = Tensor | Pointer


def grouping(grouped: bool, groups: int) -> int:
    """How device code finds the tiles of groups (`both_parts_device.FEW`, `MANY`); 0 where there are none."""
    return 0 if not grouped else 1 if groups <= 32 else 2


def front(offsets: Place, segments: Place, table: Place, maxima: Place, scale: Place, rows: int, groups: int, capacity: int,
          count_tiles: int, count_maxima: int, unseen: bool, matrices: int, grouped: bool, fresh: bool, given: bool) -> Launch:
    """The launch in front: tiles of groups; maxima set to zero (`unseen`: below, so that rows of no group are told), or the
    inverses of `given` scales where maxima would be."""
    from ...triton.quantize_both_device import front_kernel

    chunk = next((n for n in CHUNKS if n >= groups), CHUNKS[-1])
    programs = max(1, -(-count_tiles // TILES), min(64, -(-count_maxima // 1024)))
    return Launch(front_kernel, (programs,),
                  (offsets, segments, table, maxima, scale, maxima, rows, groups, capacity, count_tiles, count_maxima, matrices),
                  {"GROUPED": grouped, "FRESH": fresh, "GIVEN": given, "UNSEEN": unseen, "CHUNK": chunk, "TILES": TILES,
                   "num_warps": 4})


def scales(rows_in: Place, columns_in: Place, rs: Tensor, cs: Tensor, counts: tuple[int, int], clamp: float, top: float) -> Launch:
    """Scales from the maxima of so many rows and columns, which become 1 / scale."""
    from ...triton.quantize_both_device import scales_kernel

    return Launch(scales_kernel, (-(-max(counts) // 256),), (rows_in, columns_in, rs, cs, *counts, clamp, 1, 1),
                  {"BLOCK": 256, "TOP": top, "NATIVE": True, "num_warps": 4})
