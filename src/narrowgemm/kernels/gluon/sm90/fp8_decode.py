"""Hopper FP8 block-scaled GEMM for few rows a group (decode): weights stream at memory bandwidth, tokens are columns.

1x128 activations x 128x128 weights, E4M3, FP32 or E8M0 scales; dense, contiguous, offsets, psum and masked. A
persistent, warp-specialised grid with the operands swapped; how it works: `fp8_decode_device.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ...operands import Operands
from .fp8_decode_model import estimate, expected_rows, tiles_expected
from .fp8_decode_tile import (
    ITEMSIZE,
    LAYOUT_IDS,
    MAX_SPLIT,
    TOKENS,
    extra,
    legal,
    max_registers,
    pads,
    slot_bytes,
    smem_budget,
    smem_bytes,
    static,
)
from .launcher import Box, Cache, Launcher, current_device, current_stream, hooked

__all__ = ["BACKEND", "LAYOUT_IDS", "NAME", "configs", "estimate", "extra", "launch", "legal", "max_registers", "pads",
           "smem_bytes", "supports", "workspace"]

NAME = "gluon_sm90.fp8_decode"
BACKEND = "gluon_sm90"
MAX_ROWS = 128               # rows a group above which weights are no longer all of the traffic
MAX_GROUPS = 1024            # the group table is held in the registers of one warp
MAX_INDICES = 1 << 15        # rows of m_indices that every CTA goes through at its start
MAX_STAGES = 16
SHAPES = ((64, 4, 3), (64, 4, 2), (128, 4, 2), (128, 8, 1))      # weight rows, warps of consumers, CTAs on an SM
KEEP_BYTES = 16e6            # an output of so many bytes and fewer is asked to stay in L2, where its reader finds it


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


def columns(problem: Problem) -> list[tuple[int, int]]:
    """(token columns, columns of a tile with few rows). How groups differ in size is not known: where there are groups, a
    width for the expected size and one for several times that share a kernel."""
    rows = expected_rows(problem)
    token = next((t for t in TOKENS if t >= rows), TOKENS[-1])
    half = [(token // 2, 0)] if token >= 32 else []
    if problem.layout == "dense":
        return [(token, 0), *half]
    if token == TOKENS[-1]:
        return [(token, token // 2), *half]
    wide = [(128, token)] if token < 64 < problem.m and problem.layout != "masked" else []
    return [(max(64, 2 * token), token), *wide, (token, 0)]


def configs(problem: Problem, arch: Arch) -> list[Config]:
    sms = min(arch.sms, problem.max_sms or arch.sms)
    rows = problem.groups * problem.rows if problem.layout == "masked" else problem.m
    keep = (("keep", 1),) * (rows * problem.n * ITEMSIZE[problem.out_dtype] <= KEEP_BYTES)
    out = []
    for bt, narrow in columns(problem):
        for bn, warps, ctas in SHAPES:
            if bt == 128 and bn == 64 and 0 < narrow < 64:
                continue            # takes in as much for a large group as 64 columns on 128 weight rows do
            more = (("ctas", ctas),) * (ctas > 1) + (("narrow", narrow),) * (narrow > 0) + keep
            c = Config(bt, bn, 128, warps, 0, swap_ab=True, persistent=True, extra=more)
            stages = min(MAX_STAGES, (smem_budget(c, arch) - smem_bytes(problem, c)) // slot_bytes(c))
            c = replace(c, num_stages=stages)
            # cut tiles along K where they are fewer than half the CTAs, to at least 4 K blocks. Two widths and partial sums
            # are too much for the registers
            room = sms * ctas // tiles_expected(problem, c) if ctas < 3 and not narrow else 1
            most = min(MAX_SPLIT, room, problem.k // 512)
            for split in sorted({1, max(1, most), max(1, most // 2)}):
                # a dependent launch pays for the kernel behind it, the sum, and costs where there is none
                s = replace(c, split_k=split, extra=(*more, ("pdl", 1), ("sms", arch.sms)) if split > 1 else more)
                if legal(problem, s, arch) is None:
                    out.append(s)
    return out


def programs(config: Config, sms: int, max_sms: int) -> int:
    """CTAs of the persistent grid."""
    limit = [sms, *([max_sms] if max_sms else []), *([extra(config, "sms")] if config.split_k > 1 else [])]
    return min(limit) * extra(config, "ctas", 1)


def part_bytes(config: Config, ctas: int) -> int:
    """One tile of partial sums a CTA."""
    return 4 * ctas * config.block_m * config.block_n if config.split_k > 1 else 0


def workspace(problem: Problem, config: Config) -> int:
    """Partial sums, then the table of segments."""
    table = 4 * (4 + 3 * problem.m) if problem.layout == "contiguous" else 0
    return part_bytes(config, programs(config, 1 << 20, problem.max_sms)) + table


# ---------------------------------------------------------------- launch
class Call(NamedTuple):
    """One launch: see `Launcher.__call__`."""

    launcher: Launcher
    grid: int
    boxes: tuple[Box, ...]
    pointers: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    ints: tuple[int, ...]


class Prepared:
    """What launches of one step have in common; made at its first launch."""

    def __init__(self, step: Step, problem: Problem, groups: int) -> None:
        from . import fp8_decode_device as device

        self.step, self.problem, self.config = step, problem, step.config
        self.cfg = cfg = static(problem, step.config, groups)
        pdl = {"launch_pdl": True} if cfg.PDL else {}
        self.main = Launcher(device.fp8_decode_kernel, (cfg,), {"num_warps": 4, "maxnreg": max_registers(self.config), **pdl},
                             lambda: device.layouts(cfg))
        self.sum = Launcher(device.fp8_decode_sum_kernel, (cfg,), {"num_warps": 4, **pdl}) if cfg.SPLIT > 1 else None

    def parts(self, sms: int) -> int:
        """Bytes of partial sums, in front of the table of segments."""
        return part_bytes(self.config, programs(self.config, sms, self.problem.max_sms))

    def calls(self, x: Operands, workspace: Tensor | None, sms: int) -> list[Call]:
        """The launches of one call, in order."""
        cfg = self.cfg
        a, b, out, sa, sb = x.a.data, x.b.data, x.out, x.a.scale, x.b.scale
        assert sa is not None and sb is not None
        masked = self.problem.layout == "masked"
        tiles = tiles_at_most(self.problem.layout, x, cfg.BT) * -(-x.n // cfg.BN)
        ctas = min(programs(self.config, sms, self.problem.max_sms), tiles * cfg.SPLIT)
        at = out.data_ptr()
        index, ids = (at, torch.int32) if x.index is None else (x.index.data_ptr(), x.index.dtype)
        parts = at if workspace is None else workspace.data_ptr()
        table = at if workspace is None else parts + self.parts(sms)
        som, sog = out.stride(-2), out.stride(0) if masked else 0
        calls = [Call(
            self.main, ctas, (_box(b, cfg.BN), _box(a, cfg.BT), _box(a, cfg.NARROW or cfg.BT)),
            (at, sa.data_ptr(), sb.data_ptr(), index, parts, table),
            (out.dtype, sa.dtype, sb.dtype, ids, torch.float32, torch.int32),
            (x.m, x.n, x.k // 128, x.groups, x.alignment, x.m,
             sa.stride(0) if masked else 0, sa.stride(-2), sa.stride(-1),
             sb.stride(0) if sb.dim() == 3 else 0, sb.stride(-2), sb.stride(-1), sog, som))]
        if self.sum is not None:
            grid = max(1, min(tiles, ctas // 2)) * cfg.BN // 16
            calls.append(Call(
                self.sum, grid, (), (at, index, parts, table), (out.dtype, ids, torch.float32, torch.int32),
                (x.m, x.n, x.k // 128, x.groups, x.alignment, x.m, ctas, sog, som)))
        return calls


def tiles_at_most(layout: str, x: Operands, tokens: int) -> int:
    """Tiles of rows that there can be; how many there are, only the device knows."""
    if layout == "contiguous":
        return x.m
    if layout == "masked":
        return x.groups * -(-x.m // tokens)
    return -(-x.m // tokens) + (x.groups if layout != "dense" else 0)


def _box(x: Tensor, rows: int) -> Box:
    """[G, R, K] (or [R, K]) as three dimensions, so that a tile's rows past R read as zero, not as the next group's."""
    # an axis of size 1 may carry any stride: give it one that TMA takes
    r, k = x.shape[-2:]
    row = x.stride(-2) if r > 1 else k
    groups, group = (x.shape[0], x.stride(0)) if x.dim() == 3 and x.shape[0] > 1 else (1, r * row)
    return Box(x, (groups, r, k), (group, row, 1), (1, rows, 128))


@lru_cache(maxsize=64)
def _sms(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


_prepared = Cache(1024)


def prepared(step: Step, problem: Problem, groups: int) -> Prepared:
    """By identity of the step, which its Plan keeps: no hash of a Problem on the way to a launch."""
    found = _prepared.find((id(step), groups))
    if found is None or found.step is not step or found.problem is not problem:
        found = Prepared(step, problem, groups)
        _prepared.replace((id(step), groups), found)
    return found


class Ready:
    """A step bound to one signature of calls: only addresses and the stream are still open."""

    __slots__ = ("_bound", "_index", "_parts", "step")

    def __init__(self, step: Step, index: int, bound: list, parts: int) -> None:
        self.step, self._index, self._bound, self._parts = step, index, bound, parts

    def __call__(self, x: Operands, workspace: Tensor | None) -> bool:
        """Launch; False where it has to go the ordinary way."""
        index = self._index
        if current_device() != index or hooked():
            return False
        out = x.out.data_ptr()
        ids = out if x.index is None else x.index.data_ptr()
        parts = table = out
        if workspace is not None:
            parts = workspace.data_ptr()
            if parts % 16:
                return False
            table = parts + self._parts
        stream = current_stream(index)
        a, b = x.a.data, x.b.data
        main = self._bound[0]
        main(stream, main.maps((b, a, a), (b.data_ptr(), a.data_ptr())),
             out, x.a.scale.data_ptr(), x.b.scale.data_ptr(), ids, parts, table)  # type: ignore[union-attr]
        if len(self._bound) > 1:
            self._bound[1](stream, (), out, ids, parts, table)
        return True


def launch(step: Step, problem: Problem, operands: Operands, workspace: Tensor | None) -> None:
    ready = operands.memo.get(NAME)
    if ready is not None and ready.step is step and ready(operands, workspace):
        return
    index = operands.out.device.index
    if index is None:
        index = torch.cuda.current_device()
    sms = _sms(index)
    p = prepared(step, problem, operands.groups)
    calls = p.calls(operands, workspace, sms)
    for call in calls:
        call.launcher(index, *call[1:])
    bound = [call.launcher.bind(index, *call[1:]) for call in calls]
    if all(b is not None for b in bound):
        operands.memo[NAME] = Ready(step, index, bound, p.parts(sms))
