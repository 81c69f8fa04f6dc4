"""Hopper products of few tokens with prepacked MXFP4 / MXFP8 weights, in every layout; bias, activation, combine.

Activations are BF16, FP16 (two BF16 numbers), or MXFP8, MXFP4, FP8 1x128 with E8M0 scales, which a launch in front brings to BF16
without loss; FP32 scales of FP8 1x128 are left to the product, once for 128 of K. With weights packed for FP8, tokens are BF16 and
two E4M3 numbers each, in one unit a row. The launch also lists the experts that have rows.
How it works: `narrow_device.py`; the order of the weights: `narrowgemm.prepack`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from ....arch import Arch
from ....prepack_bits import FP8_PREPACK, ORDERS
from ....problem import Config, Operand, Problem, Step
from ...launching import Launch, Pointer
from ...operands import Operands
from .narrow_model import active_experts, estimate, rows_expected
from .narrow_split import ctas_at_most, splits
from .narrow_tile import (
    ACT_IDS,
    CHUNK,
    KINDS,
    MAX_CTAS,
    PAIR_IDS,
    ROWS,
    TABLE_HEAD,
    TOKENS,
    PrepStatic,
    Static,
    by_row,
    chunks_of,
    doubles,
    entries_at_most,
    in_two,
    legal,
    packed_for_fp8,
    promotes,
    registers,
    smem_bytes,
)
from .occupancy import KEEP_BYTES, STREAM_CACHES

__all__ = ["BACKEND", "NAME", "configs", "estimate", "launches", "legal", "make_config", "smem_bytes", "supports",
           "workspace"]

NAME = "gluon_sm90.narrow"
BACKEND = "gluon_sm90"
MAX_GROUPS = 1024
STREAM_ROWS = 4              # of an expert
# bytes of the workspace, less, for all rows that a masked A has room for, by bytes of a number: no more was run
MASKED_BYTES = {1: 1 << 30, 2: 1 << 32, 4: 1 << 32}
PREP_K = 2048                # of K that one program of the launch in front converts
SHARE = 2                    # programs of it to an expected row of a masked group, which may have more rows
PREP_ROW = 8192              # at most, where it has to know a row's largest number first
COMBINE_N = 1024
# A's formats: element, scale -> how `narrow_prep_kernel` reads them
XKINDS = {("bf16", ""): 0, ("e4m3", "e8m0"): 1, ("e2m1", "e8m0"): 2, ("e4m3", "fp32"): 3, ("e5m2", "fp32"): 3,
          ("fp16", ""): 4}
TWO_ORDER = 6                # BF16 for weights that were packed for FP8
# (weight rows, block_k, stages, CTAs on an SM) by token columns
SHAPES: dict[str, dict[int, tuple[tuple[int, int, int, int], ...]]] = {
    "e2m1": {8: ((64, 512, 2, 4), (64, 256, 4, 4), (128, 512, 2, 2)),
             16: ((128, 512, 2, 2), (64, 512, 2, 3), (64, 256, 3, 4), (128, 256, 4, 2)),
             32: ((128, 256, 3, 2), (128, 256, 2, 2)), 64: ((64, 256, 2, 2),)},
    "e4m3": {8: ((64, 256, 2, 4), (64, 256, 3, 3), (128, 256, 2, 2)),
             16: ((64, 256, 2, 4), (64, 256, 2, 3), (64, 256, 3, 2), (128, 256, 2, 2)),
             32: ((64, 256, 3, 2), (64, 256, 2, 3), (128, 256, 2, 2)), 64: ((64, 256, 2, 2),)}}
# of FP16 tokens, which take twice the room
DOUBLE_SHAPES: dict[str, dict[int, tuple[tuple[int, int, int, int], ...]]] = {
    "e2m1": {8: ((64, 256, 2, 4), (128, 512, 2, 2)), 16: ((64, 256, 2, 3),), 32: ((64, 256, 2, 2),), 64: ((64, 256, 2, 1),)},
    "e4m3": {8: ((64, 256, 2, 4),), 16: ((64, 256, 2, 3),), 32: ((64, 256, 2, 2),), 64: ((64, 256, 2, 1),)}}
# of dense products of short K whose tiles about fill the SMs: a deep ring, and no tile is cut
SHORT_K = 1024
WHOLE: dict[int, tuple[tuple[int, int, int, int], ...]] = {8: ((64, 256, 5, 2),), 16: ((64, 256, 4, 2),)}


def supports(problem: Problem, arch: Arch) -> str | None:
    reason = takes(problem, arch, ORDERS)
    if reason is None and packed_for_fp8(problem) and not in_two(problem):
        reason = f"multiplies weights in the order {FP8_PREPACK} by BF16 activations, not {problem.a.format.name}"
    return reason


def xkind(a: Operand) -> int:
    """How the launch in front reads A."""
    return XKINDS[a.format.element, a.scale_dtype]


def takes(problem: Problem, arch: Arch, orders: tuple[str, ...]) -> str | None:
    """Why a kernel over packed weights in one of `orders` can't run the problem, or None."""
    a, b, e = problem.a, problem.b, problem.epilogue
    if arch.target != "sm90":
        return f"runs on sm90, not {arch.target}"
    if problem.op not in ("gemm", "grouped_gemm", "routed_gemm") or problem.layout not in KINDS:
        return f"computes gemm, grouped_gemm and routed_gemm, not {problem.op} with layout {problem.layout}"
    order, _, pair = b.prepack.partition(":")
    if order not in orders:
        given = f"the order {order}" if order else f"{b.format.name} as they are"
        return f"takes weights that narrowgemm.prepack() brought to the order {' or '.join(orders)}, not {given}"
    rows = by_row(problem)
    if (a.format.element, a.scale_dtype) not in XKINDS or (a.format.group not in ((0, 0), (1, 32), (1, 128)) and not rows):
        return (f"brings BF16, FP16, MXFP8, MXFP4 and FP8 1x128 to BF16 without loss, not {a.format.name}, "
                f"{a.scale_dtype or 'no'} scales")
    if a.scale_dtype == "fp32" and not promotes(problem) and not rows:
        return f"takes E8M0 scales of {a.format.name}, not {a.scale_dtype}"
    if a.major != "k" or a.prepack:
        return "needs A K-major, as it is"
    if problem.accumulate or e.quantize is not None:
        return "writes its output, with no accumulation and no quantised output"
    if e.activation not in ACT_IDS or (e.activation and not pair):
        return f"activation {e.activation!r} needs weights packed with pair=, one of {sorted(ACT_IDS)}"
    if problem.groups > MAX_GROUPS:
        return f"lists {MAX_GROUPS} experts, not {problem.groups}"
    slots = problem.m * (problem.groups if problem.layout == "masked" else 1)
    if slots * (problem.k + CHUNK) >= 2**31:
        return "needs A within 2^31 elements"
    each = 1 if order == FP8_PREPACK else 4 if doubles(problem) else 2
    size = slots * row_stride(problem.k) * each
    if problem.layout == "masked" and size >= MASKED_BYTES[each]:
        return f"has room for less than {MASKED_BYTES[each]} bytes of a masked A, not for all {slots} rows of {size // slots}"
    return None


def columns(problem: Problem) -> list[int]:
    """Token columns: about twice the expected rows, so that an expert of more rows costs few passes, and one size down."""
    rows = rows_expected(problem)
    if problem.layout == "dense":
        rows = rows / 1.5
    at = next((i for i, t in enumerate(TOKENS) if t >= 1.45 * rows), len(TOKENS) - 1)
    return [TOKENS[i] for i in (at, at - 1, at + 1) if 0 <= i < len(TOKENS)]


def configs(problem: Problem, arch: Arch) -> list[Config]:
    out = []
    slots = problem.m * (problem.groups if problem.layout == "masked" else 1)
    keep = slots * problem.n * problem.out_bytes <= KEEP_BYTES
    stream = passes_through(problem, arch)
    for bt in columns(problem):
        for rows, bk, stages, ctas in (DOUBLE_SHAPES if doubles(problem) else SHAPES)[problem.b.format.element][bt]:
            c = make_config(bt, rows, bk, stages, ctas, keep, whole=problem.batch_invariant, stream=stream)
            if legal(problem, c, arch) is None:
                out += [c, *splits(problem, c, arch)]
        tiles = -(-problem.m // bt) * -(-problem.n // ROWS)
        short = problem.layout == "dense" and problem.b.format.element == "e4m3" and problem.k <= SHORT_K
        if short and arch.sms // 2 <= tiles <= 2 * arch.sms:
            made = [make_config(bt, *shape, keep, whole=True, stream=stream) for shape in WHOLE.get(bt, ())]
            out += [c for c in made if legal(problem, c, arch) is None and c not in out]
    return out


def passes_through(problem: Problem, arch: Arch) -> bool:
    """Whether L2 is to give up weights first. What else is there stays then: tokens of many rows, which every tile of weights reads
    again, and what others wrote, which memory takes when it must. Beside more weights than that, with few tokens, it costs 1.5%."""
    weights = active_experts(problem) * problem.b.format.storage_bytes(problem.n, problem.k)
    return rows_expected(problem) >= STREAM_ROWS or weights <= STREAM_CACHES * arch.l2


def make_config(bt: int, rows: int, bk: int, stages: int, ctas: int, keep: bool = True, wide: bool = True,
                whole: bool = False, stream: bool = False) -> Config:
    """`whole`: no tile is cut along K, so that a token's sum does not depend on how many tiles there are. `stream`: L2 gives up
    weights first."""
    options = (("keep", keep), ("stream", stream), ("whole", whole), ("wide", wide))
    more = (("ctas", ctas), *((name, 1) for name, given in options if given))
    return Config(bt, rows, bk, rows // 16, stages, swap_ab=True, persistent=True, extra=more)


# ---------------------------------------------------------------- workspace
class Regions(NamedTuple):
    """Byte offsets of the parts of the workspace, and its size."""

    table: int
    counts: int
    live: int
    x: int
    xfactor: int
    xscale: int
    parts: int
    y: int
    size: int


def regions(problem: Problem, config: Config, slots: int, rows: int) -> Regions:
    """`slots`: rows of the output before combine; `rows`: rows of A."""
    e = problem.epilogue
    n = problem.n // 2 if e.activation else problem.n
    positions = slots // problem.groups if problem.layout == "masked" else slots
    entries = entries_at_most(problem.layout, positions, problem.groups, config.block_m)
    sizes = (4 * (TABLE_HEAD + 3 * entries), 4 * MAX_CTAS, slots if e.combine else 0, 2 * rows * row_stride(problem.k),
             4 * rows if in_two(problem) or (problem.a.format.scaled and not promotes(problem)) else 0,
             rows * row_stride(problem.k) * (2 if doubles(problem) else 0) + 4 * rows * (row_stride(problem.k) // CHUNK)
             * promotes(problem),
             4 * 2 * MAX_CTAS * config.block_n * config.block_m, 4 * slots * n if e.combine else 0)
    ends = list(accumulate(-(-s // 256) * 256 for s in sizes))
    return Regions(0, *ends)


def row_stride(k: int) -> int:
    """Of A in BF16: K up to a multiple of 512, the longest ring step."""
    return -(-k // 512) * 512


def workspace(problem: Problem, config: Config) -> int:
    slots = problem.m * (problem.groups if problem.layout == "masked" else 1)
    return regions(problem, config, slots, -(-slots // problem.a_div)).size


# ---------------------------------------------------------------- launch
def share(problem: Problem, room: int) -> int:
    """Programs of the launch in front to a masked group, which has room for so many rows."""
    return max(1, min(room, SHARE * power_of_two(problem.rows)))


def power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def statics(problem: Problem, config: Config, x: Operands) -> tuple[Static, PrepStatic]:
    """What both kernels are compiled for."""
    e = problem.epilogue
    assert x.packed is not None
    alpha, limit, *_ = (*e.activation_args, 0.0, 0.0)
    two = in_two(problem)
    kind = TWO_ORDER if two else xkind(problem.a)
    ch = config.block_k // CHUNK
    even = chunks_of(problem) % ch == 0 and -(-problem.n // ROWS) % (config.block_n // ROWS) == 0
    cfg = Static(
        E4M3=problem.b.format.element == "e4m3", BT=config.block_m, ROWS=config.block_n, CH=ch, STAGES=config.num_stages, EVEN=even,
        SLOTS=x.slots is not None, FACTOR=x.factor is not None, XFACTOR=kind in (1, 2, TWO_ORDER), PAIR=PAIR_IDS[x.packed.pair],
        ACT=ACT_IDS[e.activation], ALPHA=alpha, LIMIT=limit, BIAS=x.bias is not None, WEIGHT=x.weight is not None, PDL=True,
        KEEP=bool(config.option("keep")), WIDE=bool(config.option("wide")), XSCALE=promotes(problem), DOUBLE=doubles(problem),
        DENSE=problem.layout == "dense", STREAM=bool(config.option("stream")), WAYS=8 if config.block_m <= 16 else 4,
        FP8=two, EARLY=registers(config) > 96)
    prep = PrepStatic(
        KIND=KINDS[problem.layout], BT=config.block_m, GROUPS=power_of_two(problem.groups), XKIND=kind,
        GROUP=problem.a.format.group[1] or 32, BLOCK=power_of_two(x.block_m), LIVE=e.combine,
        BK=min(power_of_two(row_stride(problem.k)), PREP_ROW) if two else PREP_K, PDL=True)
    return cfg, prep


def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    """The launch in front, the product, and the combine, if there is one."""
    from . import narrow_device, narrow_prep_device

    fields = x.b.scale
    assert workspace is not None and fields is not None
    config, e = step.config, problem.epilogue
    cfg, prep = statics(problem, config, x)
    masked = problem.layout == "masked"
    slots = x.num_slots or x.m * (x.groups if masked else 1)
    rows = -(-slots // problem.a_div)
    i32, f32 = torch.int32, torch.float32
    at = regions(problem, config, slots, rows)
    table, counts = Pointer(workspace, i32, at.table), Pointer(workspace, i32, at.counts)
    live, xfactor = Pointer(workspace, torch.int8, at.live), Pointer(workspace, f32, at.xfactor)
    xscale = Pointer(workspace, torch.bfloat16 if cfg.DOUBLE else f32, at.xscale)
    xp = Pointer(workspace, torch.float8_e4m3fn if cfg.FP8 else torch.bfloat16, at.x)
    parts, y = Pointer(workspace, f32, at.parts), Pointer(workspace, f32, at.y)
    a, scale, n = x.a.data, x.a.scale, x.n // 2 if e.activation else x.n
    chunks, tiles = chunks_of(problem), -(-x.n // ROWS)
    steps = -(-chunks // cfg.CH)
    cap = entries_at_most(problem.layout, x.m if masked else slots, problem.groups, config.block_m)
    sms = sms_of(x.out.device)
    most = ctas_at_most(cap * -(-x.n // config.block_n), steps, config)
    grid = max(1, min(min(sms, problem.max_sms or sms) * config.option("ctas", 1), MAX_CTAS, most))
    kx, each = row_stride(x.k), share(problem, x.m)
    index = table if x.index is None else x.index
    order = table if x.slots is None else x.slots
    out, som = (y, n) if e.combine else (x.out, x.out.stride(-2))
    made = [
        Launch(narrow_prep_device.narrow_prep_kernel, (1 + (x.groups * each if masked else rows) * -(-kx // prep.BK),),
               (a, xp if scale is None else scale, xp, xscale if cfg.XSCALE or cfg.DOUBLE else xfactor, index, order,
                table if x.experts is None else x.experts, table if x.posted is None else x.posted, table, counts, live, each, x.k,
                kx, *a_strides(x, masked), x.groups, slots,
                x.positions or x.m, x.alignment if problem.layout == "psum" else x.block_m, cap, grid, prep),
               {"num_warps": max(4, prep.BK // 512)}),
        Launch(narrow_device.narrow_kernel, (grid,),
               (x.b.data, Pointer(fields, i32), xp, xscale, out, order, xfactor if x.factor is None else x.factor,
                table if x.top is None else x.top, xfactor,
                xfactor if x.bias is None else x.bias, xfactor if x.weight is None else x.weight, table, counts, parts,
                tiles, steps, chunks, slots, problem.a_div, cap, steps if config.option("whole") else 1, x.n, kx, som, cfg),
               {"num_warps": config.num_warps, "maxnreg": registers(config), "launch_pdl": True})]
    if problem.zeroes:
        made.insert(0, zero_padding_rows(problem, x))
    if e.combine:
        made.append(combine(x, y, live, n, slots, True))
    return made


def a_strides(x: Operands, masked: bool) -> tuple[int, int, int, int, int]:
    """Strides of A's groups and rows, of its scales' groups, rows and columns."""
    a, s = x.a.data, x.a.scale
    return (a.stride(0) if masked else 0, a.stride(-2), s.stride(0) if masked and s is not None else 0,
            0 if s is None else s.stride(-2), 0 if s is None else s.stride(-1))


def zero_padding_rows(problem: Problem, x: Operands) -> Launch:
    """Zeros into the rows of `out` that belong to no group, contiguous and psum."""
    from . import narrow_rows_device

    return Launch(narrow_rows_device.zero_rows_kernel, (x.m,),
                  (x.out, x.index, x.m, x.n, x.groups, x.alignment, x.out.stride(-2)),
                  {"KIND": KINDS[problem.layout], "GROUPS": power_of_two(x.groups), "BN": 1024, "num_warps": 4})


def combine(x: Operands, y: Pointer, live: Pointer, n: int, slots: int, pdl: bool) -> Launch:
    """The launch behind: a token's slots summed. `pdl`: it starts while the product ends."""
    from .narrow_prep_device import narrow_combine_kernel

    return Launch(narrow_combine_kernel, (slots // x.top_k * -(-n // COMBINE_N),),
                  (y, live, x.out if x.add is None else x.add, x.out, n, x.top_k, 0 if x.add is None else x.add.stride(-2),
                   x.out.stride(-2)),
                  {"BN": COMBINE_N, "ADD": x.add is not None, "PDL": pdl, "num_warps": 4} | ({"launch_pdl": True} if pdl else {}))


@lru_cache(maxsize=64)
def sms_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
