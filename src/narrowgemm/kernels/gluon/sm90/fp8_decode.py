"""Hopper FP8 block-scaled GEMM for few rows a group (decode): weights stream at memory bandwidth, tokens are columns.

1x128 activations x 128x128 weights, E4M3, FP32 or E8M0 scales; dense, contiguous, offsets, psum and masked. A
persistent, warp-specialised grid with the operands swapped; how it works: `fp8_decode_device.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ....arch import Arch, detect
from ....problem import Config, Problem, Step
from ...launching import Launch, Pointer
from ...operands import Operands
from .fp8_decode_model import estimate, expected_rows, tiles_expected
from .fp8_decode_tile import (
    AHEADS,
    LAYOUT_IDS,
    MAX_SPLIT,
    TOKENS,
    TRIPS,
    in_workspace,
    legal,
    slot_bytes,
    smem_bytes,
    static,
)
from .occupancy import KEEP_BYTES, ROOM, STREAM_CACHES, max_registers, smem_budget
from .tensor_maps import planes, planes_by_eight

__all__ = ["BACKEND", "LAYOUT_IDS", "NAME", "configs", "estimate", "launches", "legal", "max_registers",
           "smem_bytes", "supports", "workspace"]

NAME = "gluon_sm90.fp8_decode"
BACKEND = "gluon_sm90"
MAX_ROWS = 192               # rows a group above which weights are no longer most of the traffic
MAX_GROUPS = 1024            # the group table is held in the registers of one warp
MAX_INDICES = 1 << 15        # rows of m_indices that every CTA goes through at its start
MAX_STAGES = 16
SHORT = 512                  # K of tiles that a trip is all of
LONG = 4096                  # K from which on a tile of 32 columns waits for scales
Shape = tuple[int, int, int]
SHAPES: tuple[Shape, ...] = ((64, 4, 3), (64, 4, 2), (128, 4, 2), (128, 8, 1))  # weight rows, warps of consumers, CTAs on an SM
GUESS = 3                    # K blocks of weights fetched on a guess, before group sizes are known
EARLY = 4                    # of a dense product, before the warps part
BY_128 = 4e12                # bytes/s of a memory that is read by 128 bytes
SPLITS = (1, 2, 4, 8)
BOX_CACHES = 4               # weights of so many times L2 pass through it by boxes


def supports(problem: Problem, arch: Arch) -> str | None:
    a, b = problem.a, problem.b
    if arch.target != "sm90":
        return f"runs on sm90, not {arch.target}"
    if problem.op not in ("gemm", "grouped_gemm") or problem.layout not in LAYOUT_IDS:
        return f"computes gemm and grouped_gemm, not {problem.op} with layout {problem.layout}"
    if (a.format.element, a.format.group, b.format.element, b.format.group) != ("e4m3", (1, 128), "e4m3", (128, 128)):
        return f"takes E4M3 in 1x128 x 128x128 blocks, not {a.format.name} x {b.format.name}"
    if a.prepack or b.prepack or not problem.epilogue.plain or problem.gather:
        return "takes plain operands, with no fused gather and no epilogue beyond the sum"
    if a.major != "k" or b.major != "k" or not a.aligned or not b.aligned or problem.wide:
        return "needs both operands K-major, on 16 bytes in base and strides (TMA), and tiles within 2^31 elements"
    if problem.k % 128:
        return f"needs K a multiple of 128, not {problem.k}"
    if problem.groups > MAX_GROUPS:
        return f"holds a table of {MAX_GROUPS} groups, not {problem.groups}"
    rows = expected_rows(problem)
    if rows > MAX_ROWS:
        return f"is for {MAX_ROWS} rows a group and fewer, where weights are the traffic, not {rows}"
    if problem.layout == "contiguous" and problem.m > MAX_INDICES:
        return f"lists the segments of {MAX_INDICES} rows and fewer, not {problem.m}"
    return None


def widths(problem: Problem) -> list[tuple[int, int, int, tuple[Shape, ...]]]:
    """(token columns, columns of a tile with few rows, of one in between, shapes). How groups differ in size is not known:
    where there are groups, one candidate has widths for few rows and for many in one kernel. Shapes are those that measured
    best somewhere."""
    rows = expected_rows(problem)
    token = next((t for t in TOKENS if t >= rows), TOKENS[-1])
    if problem.layout == "dense":
        if problem.k <= SHORT and token >= 32:          # the fewer tiles, the less often one is stored
            return [(min(token, 64), 0, 0, SHAPES[1:3])]
        # two CTAs beat three, and one or two with 128 weight rows
        return [(t, 0, 0, SHAPES[1:2]) for t in ((token, token // 2) if token >= 32 else (token,))]
    if token <= 32:
        # as wide as nearly all groups need. Few that have all the rows go by 128 at a time, which a layer pays less for elsewhere
        most = min(32, next(t for t in TOKENS if t >= 1.5 * rows))
        narrow, middle = (most, 64) if problem.front and most > 8 else (8, 32)
        return [(64, most, 0, SHAPES[:3]), (128, narrow, middle, SHAPES[3:])]
    # with 128 rows a group 1.7 times what tiles of 64 tokens and 128 weight rows take
    wide = [(128, 16, 64, SHAPES[3:])] if rows <= 48 or problem.layout == "masked" else []
    return [(64, 0, 0, SHAPES[:3]), *wide]


def configs(problem: Problem, arch: Arch) -> list[Config]:
    rows = problem.groups * problem.rows if problem.layout == "masked" else problem.m
    kept = rows * problem.n * problem.out_bytes <= KEEP_BYTES
    found = []
    for bt, narrow, middle, shapes in widths(problem):
        for bn, warps, ctas in shapes:
            c = Config(bt, bn, 128, warps, 0, swap_ab=True, persistent=True)
            found += offers(problem, arch, c, ctas=ctas, narrow=narrow, middle=middle, keep=kept)
        if problem.layout == "dense":
            found += alone(problem, arch, bt, kept)
            if bt >= min(rows, 64):             # narrower ones read the weights twice for nothing
                found += at_once(problem, arch, bt, kept)
    boxes = boxed(problem, arch, kept)
    if any(c.option("stream") for c in boxes):
        return boxes        # nothing else is as fast there: tiles cut along K take 1.1 to 1.25 of it where one expert has a token
    found += boxes
    few = Config(8, 64, 128, 4, 0, swap_ab=True, persistent=True)
    if problem.layout == "offsets" and expected_rows(problem) == 1 and tiles_expected(problem, few) <= 2 * arch.sms:
        # one or two experts with a token, as a rank of many has them at one token. Cut along K they take 0.79-0.97 of what the
        # others do; where more experts have tokens than there is room for, the kernel doesn't cut
        cut = [c for c in offers(problem, arch, few, ctas=2, narrow=0, middle=0, keep=kept) if c.split_k > 1]
        return cut or found
    return found


def alone(problem: Problem, arch: Arch, tokens: int, keep: bool) -> list[Config]:
    """Of a dense product with a tile an SM at most, a CTA alone on each: its ring is as long as can be, and so are the batches of
    scales, whose latency is what holds it where K is long."""
    tiles = -(-problem.m // tokens) * -(-problem.n // 64)
    if not (tokens == 64 or (tokens == 32 and problem.k >= LONG)) or tiles > arch.sms:
        return []
    c = Config(tokens, 64, 128, 4, 0, swap_ab=True, persistent=True)
    c = with_stages(problem, arch, c, {"keep": int(keep), "trip": TRIPS[-1], "ahead": AHEADS[1], "guess": EARLY})
    return [c] if legal(problem, c, arch) is None else []


def boxed(problem: Problem, arch: Arch, keep: bool) -> list[Config]:
    """Of groups of few rows in a layer: tiles of the same widths by a CTA alone on each SM, whose slots are several K blocks.
    Memory gives more where rows of weights are read by 256 and 512 bytes than by 128. Where
    weights pass through L2, of 8 columns."""
    found = []
    for tokens, narrow, middle, _ in widths(problem) if problem.front else ():
        rows, warps, box, ahead = (64, 4, 4, AHEADS[2]) if tokens == 64 else (128, 8, 2, 0)
        c = Config(tokens, rows, 128, warps, 0, swap_ab=True, persistent=True)
        stream = streams(problem, c, arch, BOX_CACHES if narrow == TOKENS[0] else STREAM_CACHES)
        if narrow and (not stream or (warps == 4 and narrow == TOKENS[0])):
            found.append(with_stages(problem, arch, c, {
                "keep": int(keep), "box": box, "ahead": ahead, "narrow": narrow, "middle": middle, "trip": box,
                "stream": int(stream), "guess": int(warps == 4 and not stream)}))
    return [c for c in found if legal(problem, c, arch) is None]


def at_once(problem: Problem, arch: Arch, tokens: int, keep: bool) -> list[Config]:
    """Of a dense product whose tiles are so few that all of them, cut along K, a cluster each, are on the chip at once."""
    tiles = -(-problem.m // tokens) * -(-problem.n // 64)
    found = []
    for blocks, room in ROOM.items():
        if tiles <= round(arch.sms * room):
            c = Config(tokens, 64, 128, 4, 0, swap_ab=True, persistent=True, split_k=blocks)
            ahead = AHEADS[1] if tokens < 128 else 0        # with more, scales of 128 columns spill
            found.append(with_stages(problem, arch, c, {"cluster": blocks, "keep": int(keep), "trip": TRIPS[-1], "ahead": ahead,
                                                        "guess": EARLY}))
    return [c for c in found if legal(problem, c, arch) is None]


def with_stages(problem: Problem, arch: Arch, config: Config, options: dict[str, int]) -> Config:
    """The config with as many stages as fit, and no more fetched early than that."""
    def put(options: dict[str, int], stages: int) -> Config:
        return replace(config, num_stages=stages, extra=tuple(sorted((k, v) for k, v in options.items() if v)))

    c = put(options, 0)
    stages = min(MAX_STAGES, (smem_budget(c, arch) - smem_bytes(problem, c)) // slot_bytes(c))
    return put(options | {"guess": min(options.get("guess", 0), stages - 1)}, stages)


def offers(problem: Problem, arch: Arch, config: Config, *, ctas: int, narrow: int, middle: int, keep: bool) -> list[Config]:
    """A tile with as many stages as fit, whole and cut along K."""
    two, dense = config.block_n > 16 * config.num_warps, problem.layout == "dense"
    sms = min(arch.sms, problem.max_sms or arch.sms)
    wanted = {"ctas": ctas if ctas > 1 else 0, "narrow": narrow, "middle": middle, "keep": int(keep)}
    if streams(problem, config, arch):
        wanted["stream"] = 1
    tiles = tiles_expected(problem, replace(config, extra=tuple(sorted((k, v) for k, v in wanted.items() if v))))
    # overlapping wgmma and promotions of several K blocks pays where steps are what a CTA waits for
    slow = two or config.block_m <= 16 or (tiles <= sms * ctas or problem.k <= SHORT if dense else config.num_warps == 4)
    wanted["trip"] = TRIPS[-1] if ctas < 3 and not narrow and slow else 0
    # a wrong guess at a CTA's first tile, where groups are of several, costs what it fetched; in a single wave another CTA finds
    # that in L2. With one CTA of two consumers on an SM it gains nothing
    if dense:
        wanted["guess"] = EARLY
    elif config.num_warps == 4 and (expected_rows(problem) <= config.block_m or tiles <= sms * ctas):
        wanted["guess"] = GUESS if ctas < 3 else 2       # one more spills with Triton 3.7

    def cut(split: int) -> dict[str, int]:
        """Options of tiles cut so: which part of K a CTA has, only the sizes of groups say."""
        return ({"sms": arch.sms} if split > 1 else {}) | ({} if split == 1 or dense else {"guess": 0})

    # cut tiles along K where they are fewer than half the CTAs, to at least 4 K blocks. Two widths and partial sums are too
    # much for the registers
    room = sms * ctas // tiles if ctas == 2 and not two and not narrow else 1
    most = min(MAX_SPLIT, room, problem.k // 512)
    out = [with_stages(problem, arch, replace(config, split_k=split), wanted | cut(split))
           for split in SPLITS if split <= max(1, most)]
    return [c for c in out if legal(problem, c, arch) is None]


def streams(problem: Problem, config: Config, arch: Arch, caches: float = STREAM_CACHES) -> bool:
    """Whether weights pass through L2, so that it keeps what others wrote: those of groups, which are read once, of so many times
    L2 and fewer."""
    weights = groups_met(problem) * problem.b.format.storage_bytes(problem.n, problem.k)
    return problem.layout != "dense" and expected_rows(problem) <= config.block_m and weights <= caches * arch.l2


def groups_met(problem: Problem) -> float:
    """Groups expected to have rows, of a layer whose rows are as few as its groups: some get several."""
    if not problem.front or problem.layout != "offsets" or problem.m > 2 * problem.groups:
        return problem.active_groups
    return problem.groups * (1 - (1 - 1 / problem.groups) ** problem.m)


def programs(config: Config, sms: int, max_sms: int) -> int:
    """CTAs of the persistent grid."""
    limit = [sms, *([max_sms] if max_sms else []), *([config.option("sms")] if in_workspace(config) else [])]
    return min(limit) * config.option("ctas", 1)


def part_bytes(config: Config, ctas: int) -> int:
    """One tile of partial sums a CTA."""
    return 4 * ctas * config.block_m * config.block_n if in_workspace(config) else 0


def count_bytes(config: Config, ctas: int) -> int:
    """A counter for each consumer of a tile, of which there are no more than CTAs."""
    return 8 * ctas * (config.num_warps // 4) if in_workspace(config) else 0


def workspace(problem: Problem, config: Config) -> int:
    """Partial sums, then the table of segments."""
    table = 4 * (4 + 3 * problem.m) if problem.layout == "contiguous" else 0
    ctas = programs(config, 1 << 20, problem.max_sms)
    return part_bytes(config, ctas) + count_bytes(config, ctas) + table


def fetches_by_256(problem: Problem, arch: Arch) -> bool:
    """Whether L2 fetches weights by 256 bytes, not by 128: those of groups, from an H100's memory. A dense product gets 1-2% slower
    by it, and from an H200's memory, weights of groups come 3-5% slower."""
    return problem.layout != "dense" and arch.bandwidth < BY_128


# ---------------------------------------------------------------- launch
def launches(step: Step, problem: Problem, x: Operands, workspace: Tensor | None) -> list[Launch]:
    from . import fp8_decode_device as device

    config, arch = step.config, detect(x.out.device)
    sms = arch.sms
    cfg = static(problem, config, x.groups)
    a, b, out, sa, sb = x.a.data, x.b.data, x.out, x.a.scale, x.b.scale
    assert sa is not None and sb is not None
    masked = problem.layout == "masked"
    tiles = tiles_at_most(problem.layout, x, cfg.BT) * -(-x.n // cfg.BN)
    ctas = tiles if cfg.CLUSTER > 1 else min(programs(config, sms, problem.max_sms), tiles * cfg.SPLIT)
    # what there is none of, no code reads
    index = Pointer(out, torch.int32) if x.index is None else x.index
    scratch = out if workspace is None else workspace
    parts = Pointer(scratch, torch.float32)
    most = programs(config, sms, problem.max_sms)
    before = 0 if workspace is None else part_bytes(config, most)
    counts = Pointer(scratch, torch.int64, before)
    table = Pointer(scratch, torch.int32, before + (0 if workspace is None else count_bytes(config, most)))
    som, sog = out.stride(-2), out.stride(0) if masked else 0
    widths = cfg.BT, cfg.MIDDLE or cfg.BT, cfg.NARROW or cfg.BT
    weights = planes(b, x.k, cfg.BN) if cfg.BOX == 1 else planes_by_eight(b, x.k, cfg.BN, cfg.BOX)
    descriptors = [weights, *(planes(a, x.k, w) for w in widths)]
    sizes = (x.m, x.n, x.k // 128 // cfg.BOX, x.groups, x.alignment, x.m)
    return [Launch(
        device.fp8_decode_kernel, (ctas,),
        (*descriptors, out, sa, sb, index, parts, counts, table, *sizes,
         sa.stride(0) if masked else 0, sa.stride(-2), sa.stride(-1),
         sb.stride(0) if sb.dim() == 3 else 0, sb.stride(-2), sb.stride(-1), sog, som, cfg),
        {"num_warps": 4, "maxnreg": max_registers(config)} | ({"launch_pdl": True} if cfg.FRONT else {}), cfg.CLUSTER,
        by_256=(0,) if fetches_by_256(problem, arch) else ())]


def tiles_at_most(layout: str, x: Operands, tokens: int) -> int:
    """Tiles of rows that there can be; how many there are, only the device knows."""
    if layout == "contiguous":
        return x.m
    if layout == "masked":
        return x.groups * -(-x.m // tokens)
    return -(-x.m // tokens) + (x.groups if layout != "dense" else 0)
