"""Hopper products of many tokens with prepacked MXFP4 / MXFP8 weights: dense, offsets, masked, routed; bias, activation, combine.

Tokens are brought to BF16 and gathered by a launch in front; the product runs at wgmma's BF16 rate, weights staying narrow in
memory. With weights packed for FP8, FP8 tokens stay FP8, and BF16 ones are two E4M3 numbers each or, where they are many,
BF16. How it works: `narrow_prefill_device.py`. It takes what the kernel for few tokens takes: `narrow.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ....arch import Arch
from ....prepack_bits import FP8_PREPACK, ORDERS
from ....problem import Config, Problem, Step
from ...launching import Launch, Pointer
from ...operands import Operands
from . import narrow, narrow_fp8_front, narrow_fp8_model, narrow_prefill_model
from . import narrow_prefill_ring as ring
from .fp8_block_tile import LAYOUTS
from .narrow import TWO_ORDER, combine, power_of_two, sms_of, xkind
from .narrow_columns import BOTH, FP8_COLUMNS, OF_ROWS, offered
from .narrow_prefill_tile import BOXES, RATIO_BYTES, SCALE_BYTES, Tile
from .narrow_tile import (
    ACT_IDS,
    CHUNK,
    KINDS,
    PAIR_IDS,
    ROWS,
    TABLE_HEAD,
    TAKEN,
    by_row,
    chunks_of,
    doubles,
    entries_at_most,
    in_two,
    k_blocks,
    packed_for_fp8,
    promotes,
)
from .occupancy import smem_budget

NAME = "gluon_sm90.narrow_prefill"
BACKEND = "gluon_sm90"
PREP_K = 2048           # of K that one program of the launch in front converts


# how `narrow_prefill_prep_kernel` brings FP8 tokens for weights that were packed for them, and BF16 ones that stay BF16
FP8_ORDER, NIBBLE_ORDER, ROW_ORDER = 5, 7, 8
# element and group of A that weights packed for FP8 are multiplied by
FOR_FP8 = (("e4m3", (1, CHUNK)), ("e4m3", (1, 0)), ("bf16", (0, 0)))


def supports(problem: Problem, arch: Arch) -> str | None:
    reason = narrow.takes(problem, arch, ORDERS)
    a = problem.a.format
    if reason is None and packed_for_fp8(problem) and (a.element, a.group) not in FOR_FP8:
        reason = f"multiplies weights in the order {FP8_PREPACK} by FP8 1x128, FP8 row-wise and BF16 activations, not {a.name}"
    if reason is None and problem.layout == "routed" and not problem.positions:
        return "gathers tokens in the order of positions: a routed layout has to say how many there are"
    if reason is None and ":" in problem.b.prepack and not problem.epilogue.activation:
        return "stores gate and up rows together: weights packed with pair= need their activation"
    return reason


# ---------------------------------------------------------------- configs
# most tokens of a tile, 64-row units of a consumer -> ring slots of E2M1 and of E4M3 weights
SHAPES = {(32, 1): (12, 8), (64, 1): (7, 5), (64, 2): (5, 3), (128, 1): (4, 3), (128, 2): (3, 2), (192, 1): (3, 3)}


# the same of FP8 tokens and weights packed for them: ring slots
FP8_SHAPES = {(32, 2): 9, (64, 1): 10, (64, 2): 7, (128, 1): 6}
FP8_PAIR = (32, 1)      # two blocks an SM
# of BF16 ones
TWO_SHAPES = {(32, 2): 7, (64, 1): 7, (64, 2): 5}
TWO_PAIR_STAGES = 5
# tiles where those weights become BF16, as BF16 tokens are many: "bf16" of a config
WIDE_SHAPES = ((128, 1), (192, 1))
# those of SHAPES that run with FP32 scales of A: two units of E2M1 were seen to hang
PROMOTED = {"e2m1": ((32, 1), (64, 1), (128, 1), (192, 1)), "e4m3": ((64, 2),)}
TOUCHED = 8             # K blocks of a block's first tile that the launch in front asks for
TOUCHED_ROWS = 4        # expected ones of a masked group: with fewer, some have none, and weights that nobody needs would come
FEWEST = {"e2m1": 0, "e4m3": 32}     # tiles of so many tokens and fewer are left to the kernel for few


def _config(tokens: int, units: int, stages: int, warpgroups: int = 2, box: int = 1) -> Config:
    return Config(tokens, warpgroups * units * ROWS, CHUNK, 4 * warpgroups + 1, stages, swap_ab=True, persistent=True,
                  extra=(("box", box), ) if box > 1 else ())


def consumers(config: Config) -> int:
    """Warpgroups that multiply."""
    return config.num_warps // 4


def by_fp8(problem: Problem, config: Config) -> bool:
    """Whether the product is FP8 wgmma's."""
    return packed_for_fp8(problem) and not config.option("bf16")


def in_columns(problem: Problem, config: Config) -> bool:
    """Whether FP8 tokens are multiplied in widths of COLUMNS."""
    return by_fp8(problem, config) and not in_two(problem) and (config.block_m, config.block_n // ROWS) in FP8_COLUMNS


def piece_of(config: Config) -> int:
    """Most columns of a product of a tile of FP8_COLUMNS whose consumers multiply in no order; 0: in turns, all columns."""
    return FP8_COLUMNS[config.block_m, config.block_n // ROWS][3]


def configs(problem: Problem, arch: Arch) -> list[Config]:
    if packed_for_fp8(problem):
        shapes, pair = TWO_SHAPES, replace(_config(*FP8_PAIR, TWO_PAIR_STAGES), extra=(("ctas", 2), ))
        if not in_two(problem):
            shapes, pair = FP8_SHAPES, replace(_config(*FP8_PAIR, ring.SLOTS), extra=ring.options(problem, arch))
        wide = [replace(_config(*x, SHAPES[x][0]), extra=(("bf16", 1), )) for x in WIDE_SHAPES]
        columns = [_config(t, u // w, s, w, b) for (t, u), (w, s, b, p) in FP8_COLUMNS.items() if offered(problem, t, u, p)]
        every = (*(_config(t, u, s) for (t, u), s in shapes.items()), *columns, pair, *wide)
        return [c for c in every if legal(problem, c, arch) is None]
    e4m3 = problem.b.format.element == "e4m3"
    packed = [_config(t, u, stages[e4m3]) for (t, u), stages in SHAPES.items() if t > FEWEST[problem.b.format.element]]
    return [c for c in packed if legal(problem, c, arch) is None]


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    fp8, columns = by_fp8(problem, config), in_columns(problem, config)
    units = config.block_n // (2 * ROWS)
    shapes = list(WIDE_SHAPES if packed_for_fp8(problem) else SHAPES)
    if fp8:
        shapes = [FP8_PAIR, *(TWO_SHAPES if in_two(problem) else FP8_SHAPES)]
    shape = (config.block_m, units)
    if (not columns and (shape not in shapes or config.block_n % (2 * ROWS))) or config.block_k != CHUNK:
        shapes += [*FP8_COLUMNS] if fp8 and not in_two(problem) else []
        return f"tile {config.block_m}x{config.block_n}x{config.block_k}, expected tokens and units of {shapes}, and {CHUNK}"
    if columns and piece_of(config) and by_row(problem) and (config.block_m, config.block_n // ROWS) not in OF_ROWS:
        return f"tile {config.block_m}x{config.block_n} is for tokens with scales of 128 of K, not {problem.a.format.name}"
    if columns and not by_row(problem) and (config.block_m, config.block_n // ROWS) in OF_ROWS:
        return f"tile {config.block_m}x{config.block_n} is for tokens with one scale, not {problem.a.format.name}"
    if config.option("bf16") and not in_two(problem):
        return f"bf16=1 is for BF16 tokens and weights in the order {FP8_PREPACK}, not {problem.a.format.name}, {problem.b.prepack}"
    if promotes(problem) and not fp8 and shape not in PROMOTED[problem.b.format.element]:
        return f"tokens and units {shape} have not run right with FP32 scales of A, expected {PROMOTED[problem.b.format.element]}"
    warps = 4 * FP8_COLUMNS[config.block_m, config.block_n // ROWS][0] + 1 if columns else 9
    if config.num_warps != warps or not config.swap_ab or not config.persistent or config.split_k != 1:
        return f"expected {warps} warps, swap_ab and persistent, without split_k"
    if config.option("unroll", 2) not in (2, 4):
        return f"unroll={config.option('unroll')}, expected 2 or 4"
    paired = fp8 and shape == FP8_PAIR
    if config.option("ctas", 1) != (2 if paired else 1):
        return f"ctas={config.option('ctas', 1)}, expected 2 for {FP8_PAIR} FP8 tokens and units, else 1"
    tile = tile_of(problem, config)
    several = tile.PIECE > 0 and not (tile.ROW or tile.CHAIN)
    if tile.BOX not in (1, 2) or (tile.BOX > 1 and (not fp8 or several or tile.UNROLL != tile.BOX)):
        return f"box={tile.BOX} K blocks a slot, expected 1, or 2 for FP8 tiles of one product and trips of two"
    if config.option("stream") and not tile.RING:
        return "stream takes tiles whose weights have more of the ring than their tokens"
    if config.num_stages < 2 or tile.shared_bytes > smem_budget(config, arch):
        return f"{config.num_stages} stages take {tile.shared_bytes} bytes of shared memory; expected 2 or more, in {arch.smem}"
    return None


def chains(problem: Problem, config: Config) -> bool:
    """Whether sums of two K blocks go on in units of the second one's scale: one product has all columns, a slot both blocks."""
    return piece_of(config) in (0, config.block_m) and config.option("box", 1) == 2 and narrow_fp8_front.gives_ratios(problem)


@lru_cache(maxsize=4096)
def tile_of(problem: Problem, config: Config, slots: bool = True, factor: bool = False) -> Tile:
    """The compile-time constants of a config. `slots`: positions are mapped to slots; `factor`: weight rows have factors."""
    e = problem.epilogue
    columns, row = in_columns(problem, config), by_row(problem)
    box = config.option("box", 1)
    unroll = box if columns and not row else config.option("unroll", 2)
    args = (*e.activation_args, 0.0, 0.0)
    pair, fp8 = problem.b.prepack.partition(":")[2], by_fp8(problem, config)
    fp32, ahead = e.combine or problem.out_dtype == "fp32", starts_ahead(problem, config)
    return Tile(BT=config.block_m, MP=config.block_n // (consumers(config) * ROWS), STAGES=config.num_stages, UNROLL=unroll,
                REST=k_blocks(problem) % unroll if box == 1 else 0,     # slots of several end with zeros
                E4M3=problem.b.format.element == "e4m3", SLOTS=slots, FACTOR=factor,
                XFACTOR=problem.a.format.scaled and (not fp8 or row), PAIR=PAIR_IDS[pair], ACT=ACT_IDS[e.activation],
                ALPHA=args[0], LIMIT=args[1], BIAS=e.bias, WEIGHT=e.routing_weight, CHUNKED=promotes(problem) and not fp8,
                DOUBLE=doubles(problem), FP8=fp8, NIBBLES=packed_for_fp8(problem) and not fp8, TWO=fp8 and in_two(problem),
                OUT_BYTES=4 if fp32 else problem.out_bytes,
                ROW=row, CONSUMERS=consumers(config), COLUMNS=columns, PIECE=piece_of(config) if columns else 0, AHEAD=ahead,
                BOX=box, CHAIN=columns and chains(problem, config), BOTH=BOTH.get((config.block_m, config.block_n // ROWS), 0),
                BY_K=fp8 and not row, STREAM=bool(config.option("stream")),
                OUT_TOKENS=16 if box > 1 and config.option("ctas", 1) == 2 else 32,
                LAYOUT=LAYOUTS[problem.layout] if ahead else 0,
                GROUPS=max(32, power_of_two(problem.groups)) if ahead else 32,
                **({"CTAS": 2, "CONSUMER_REGISTERS": 104, "PRODUCER_REGISTERS": 24} if config.option("ctas", 1) == 2 else
                   {"CONSUMER_REGISTERS": 160, "PRODUCER_REGISTERS": 24} if consumers(config) == 3 else
                   {"CONSUMER_REGISTERS": 240, "PRODUCER_REGISTERS": 24} if fp8 else {}))


def starts_ahead(problem: Problem, config: Config) -> bool:
    """Whether the product starts while the launch in front runs, and asks for weights: it finds its entries itself."""
    return by_fp8(problem, config) and narrow_fp8_model.starts_ahead(problem)


def touched(problem: Problem, config: Config) -> int:
    """K blocks that the launch in front has L2 fetch for each block of the product: where nearly all groups have one entry."""
    few = problem.layout == "masked" and TOUCHED_ROWS <= problem.rows <= config.block_m
    return TOUCHED if starts_ahead(problem, config) and few else 0


# ---------------------------------------------------------------- workspace
class Regions(NamedTuple):
    """Byte offsets of the parts of the workspace, and its size."""

    table: int
    live: int
    x: int
    xfactor: int
    ratios: int
    weight: int
    y: int
    size: int


def regions(problem: Problem, config: Config, slots: int, rows: int) -> Regions:
    """`slots`: rows of the output before combine; `rows`: positions of all groups, as many or, routed, more."""
    e = problem.epilogue
    n, tile = problem.n // 2 if e.activation else problem.n, tile_of(problem, config)
    sizes = (4 * (TABLE_HEAD + 3 * capacity(problem, config, rows)), slots if e.combine else 0,
             (1 if packed_for_fp8(problem) and not in_two(problem) else 2) * rows * k_blocks(problem) * CHUNK,
             4 * rows if problem.a.format.scaled else 0,
             RATIO_BYTES * rows * scale_blocks(problem, tile) if tile.SCALES else 0,
             4 * rows if e.routing_weight else 0, 4 * slots * n if e.combine else 0)
    return Regions(*accumulate((-(-s // 256) * 256 for s in sizes), initial=0))


def scale_blocks(problem: Problem, tile: Tile) -> int:
    """K blocks that a token has scales of: in pairs where every other one is a ratio."""
    chunks = chunks_of(problem)
    return chunks + chunks % 2 if tile.CHAIN else chunks


def capacity(problem: Problem, config: Config, rows: int) -> int:
    """Entries that the table may come to hold."""
    each = -(-rows // problem.groups) if problem.layout == "masked" else rows
    return entries_at_most(problem.layout, each, problem.groups, config.block_m)


def workspace(problem: Problem, config: Config) -> int:
    slots = problem.m * (problem.groups if problem.layout == "masked" else 1)
    return regions(problem, config, slots, max(slots, problem.positions)).size


# ---------------------------------------------------------------- cost
def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Seconds."""
    return (narrow_fp8_model if by_fp8(problem, config) else narrow_prefill_model).estimate(problem, config, arch)


# ---------------------------------------------------------------- launch
@dataclass(frozen=True)
class PrepStatic:
    """What `narrow_prefill_prep_kernel` is compiled for: fields of narrow_tile's PrepStatic, and what else it brings."""

    KIND: int
    BT: int
    GROUPS: int
    XKIND: int
    GROUP: int
    LIVE: bool
    BK: int
    SLOTS: bool              # positions are mapped to slots
    WEIGHT: bool             # slots have routing weights
    BLOCK: int = 1           # positions of a block (routed), a power of two no less
    LIST: bool = True        # the entries are listed
    BY_K: bool = False       # tokens' scales lie K block by K block
    PDL: bool = False        # the product starts meanwhile
    TOUCHED: int = 0         # K blocks that L2 is asked for, for each block of the product, a power of two
    UNITS: int = 0           # of a tile


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    """The launch in front, the product, and the combine, if there is one."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from . import narrow_prefill_device, narrow_prefill_parts_device, narrow_prefill_prep_device

    fields = x.b.scale
    assert workspace is not None and fields is not None
    config, e, masked = step.config, problem.epilogue, problem.layout == "masked"
    each = x.positions or x.m
    rows = each * (x.groups if masked else 1)
    slots = x.num_slots or rows
    tile = tile_of(problem, config, x.slots is not None, x.factor is not None)
    at, cap = regions(problem, config, slots, rows), capacity(problem, config, rows)
    i32, f32, bf16 = torch.int32, torch.float32, torch.bfloat16
    taken = Pointer(workspace, i32, at.table + 4 * TAKEN)
    table, live = Pointer(workspace, i32, at.table), Pointer(workspace, torch.int8, at.live)
    xfactor, weight = Pointer(workspace, f32, at.xfactor), Pointer(workspace, f32, at.weight)
    ratios = Pointer(workspace, f32, at.ratios)
    tokens, y = Pointer(workspace, torch.float8_e4m3fn if tile.FP8 else bf16, at.x), Pointer(workspace, f32, at.y)
    a, scale, n = x.a.data, x.a.scale, x.n // 2 if e.activation else x.n
    chunks, tiles = chunks_of(problem), -(-x.n // ROWS)
    kx = chunks * CHUNK
    index = table if x.index is None else x.index
    share = narrow.share(problem, each)
    order = table if x.slots is None else x.slots
    order_of_k = (NIBBLE_ORDER if tile.NIBBLES else TWO_ORDER if tile.TWO else ROW_ORDER if tile.ROW else FP8_ORDER if tile.FP8
                  else xkind(problem.a))
    prep = PrepStatic(
        KIND=KINDS[problem.layout], BT=config.block_m, GROUPS=power_of_two(x.groups), XKIND=order_of_k,
        GROUP=problem.a.format.group[1] or 32, LIVE=e.combine, BK=PREP_K, SLOTS=x.slots is not None, WEIGHT=x.weight is not None,
        BLOCK=power_of_two(x.block_m), LIST=not tile.AHEAD or e.combine, BY_K=tile.BY_K, PDL=tile.AHEAD,
        TOUCHED=touched(problem, config), UNITS=tile.UNITS)
    x_tile = narrow_prefill_parts_device.X8_TILE.value if tile.FP8 else narrow_prefill_parts_device.X_TILE.value
    planes = narrow_prefill_parts_device.PLANES.value
    wide = k_blocks(problem) * CHUNK * (2 if tile.TWO else 1)
    boxes = [TensorDescriptor(tokens, [rows, wide], [wide, 1], [p, CHUNK], x_tile) for p in BOXES]
    of_units = [tile.BOX_UNITS, tile.BOX * tile.WEIGHT_ROWS, 256]
    for base, deep, box in ((Pointer(x.b.data, i32), chunks * tile.WEIGHT_ROWS, of_units),
                            (Pointer(fields, i32), -(-chunks // 2), [tile.BOX_UNITS, 1, SCALE_BYTES // 4])):
        boxes.append(TensorDescriptor(base, [x.groups * tiles, deep, box[2]], [deep * box[2], box[2], 1], box, planes))
    flat = narrow_prefill_parts_device.RATIO_TILE.value
    by_k = tile.SCALES and tile.BY_K
    deep, across, box = rows, 4 * chunks, [16, 4]
    if by_k:
        deep, across, box = scale_blocks(problem, tile), 4 * rows, [tile.BOX, 256 if tile.COLUMNS else 64]
    boxes.append(TensorDescriptor(ratios, [deep, across], [across, 1], box, flat) if tile.SCALES else boxes[0])
    out, om = (y, n) if e.combine else (x.out, x.out.stride(-2))
    sms = sms_of(x.out.device)
    grid = max(1, min(min(sms, problem.max_sms or sms) * tile.CTAS, cap * -(-tiles // tile.UNITS)))
    made = [
        Launch(narrow_prefill_prep_device.narrow_prefill_prep_kernel,
               (1 + (x.groups * share if masked else rows) * -(-kx // PREP_K) + (grid if prep.TOUCHED else 0),),
               (a, tokens if scale is None else scale, tokens, xfactor, ratios, weight if x.weight is None else x.weight, weight,
                index, order, order if x.experts is None else x.experts, order if x.posted is None else x.posted, table, live,
                Pointer(x.b.data, torch.uint8), Pointer(fields, torch.uint8), x.k, kx, *narrow.a_strides(x, masked), x.groups,
                slots, each, x.alignment if problem.layout == "psum" else x.block_m, cap, problem.a_div, share, tiles, prep),
               {"num_warps": 4}),
        Launch(narrow_prefill_device.narrow_prefill_kernel, (grid,),
               (*boxes, out, order, xfactor if x.factor is None else x.factor, xfactor, xfactor if x.bias is None else x.bias,
                weight, table if x.top is None else x.top, index if tile.AHEAD else table, taken, k_blocks(problem), tiles, slots,
                each if tile.AHEAD else cap, x.groups, x.n, om, tile),
               {"num_warps": 4, "maxnreg": tile.max_registers, "launch_pdl": tile.AHEAD})]
    assert narrow_fp8_front.takes(problem, x, tile) or not tile.CHAIN, "no other launch in front gives ratios"
    if narrow_fp8_front.takes(problem, x, tile):
        made[0] = narrow_fp8_front.launch(problem, x, tile, rows, (tokens, xfactor, ratios), taken, kx)
    if problem.zeroes:
        made.insert(0, narrow.zero_padding_rows(problem, x))
    if e.combine:
        made.append(combine(x, y, live, n, slots, False))
    return made
