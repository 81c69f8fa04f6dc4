"""Hopper FP8 block-scaled GEMM for few rows a group (decode): weights stream at memory bandwidth, tokens are columns.

1x128 activations x 128x128 weights, E4M3, FP32 or E8M0 scales; dense, contiguous, offsets, psum and masked. A
persistent, warp-specialised grid with the operands swapped; how it works: `fp8_decode_device.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem, Step
from ...operands import Operands
from .launcher import Box, Cache, Launcher

NAME = "gluon_sm90.fp8_decode"
BACKEND = "gluon_sm90"
LAYOUT_IDS = {"dense": 0, "contiguous": 1, "offsets": 2, "psum": 3, "masked": 4}
MAX_ROWS = 128               # rows a group above which weights are no longer all of the traffic
MAX_GROUPS = 1024            # the group table is held in the registers of one warp
COUNTERS = 1024              # int32 words for the arrivals of shared tiles
ZERO_ROWS = 16               # padding rows a program of the preparing kernel looks at
MAX_INDICES = 1 << 15        # rows of m_indices that one block goes through in front of the kernel
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
TOKENS = (8, 16, 32, 64)
MAX_STAGES = 16
LAUNCH_SECONDS = 3.5e-6      # launch, schedule, first bytes
PREPARE_SECONDS = 2.0e-6     # the kernel in front: counters, segments, padding rows
SHARE_SECONDS = 1.5e-6       # the last arriver's sum
CTA_BANDWIDTH = 90e9         # bytes/s that one SM can take in
LATENCY_BYTES = 5.0e6        # bytes in flight that saturate the memory
BLOCK_SECONDS = 0.2e-6       # a consumer's K block of 64 x 64: wait, wgmma, promotion, release


@dataclass(frozen=True)
class Static:
    """What the device code is compiled for; its fields are read by `fp8_decode_device.py`."""

    LAYOUT: int
    BT: int                  # token columns
    BN: int                  # weight rows
    CONSUMERS: int           # warpgroups that share the weight rows
    STAGES: int
    STREAM: int              # 0: whole tiles only; else the fewest K blocks a CTA takes of a shared tile
    GROUPS: int              # size of the group table, a power of two from 32
    STORE_VEC: int           # elements of 16 bytes of output
    ACCUMULATE: bool
    PDL: bool
    LOADER_REGS: int
    CONSUMER_REGS: int

    @property
    def WR(self) -> int:
        """Weight rows of one consumer."""
        return self.BN // self.CONSUMERS

    @property
    def SCALE_ROWS(self) -> int:
        """Blocks of 128 weight rows in a tile."""
        return max(1, self.BN // 128)

    @property
    def PARTS_AHEAD(self) -> int:
        """Partial sums loaded before the first is added."""
        return max(1, min(4, 8192 // (self.WR * self.BT)))


def extra(config: Config, name: str, default: int = 0) -> int:
    return next((v for k, v in config.extra if k == name), default)


def slot_bytes(config: Config) -> int:
    """A ring slot: weights, tokens, scales, two barriers."""
    bt, bn = config.block_m, config.block_n
    return (bn + bt) * 128 + max(1, bn // 128) * bt * 4 + 16


def smem_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a CTA: the ring, and where consumers transpose a tile. Never less than the compiler's figure."""
    wide = problem.out_dtype == "fp32" or problem.accumulate
    transpose = config.block_m * config.block_n * 4 if wide else 2048 * (config.num_warps // 4)
    return config.num_stages * slot_bytes(config) + transpose + 256


def smem_budget(config: Config, arch: Arch) -> int:
    """What one of the CTAs on an SM may use; each costs 1 KB on top."""
    ctas = extra(config, "ctas", 1)
    return min(arch.smem, (arch.smem + 1024) // ctas - 1024)


def max_registers(config: Config) -> int:
    """Registers a thread that let the CTAs of one SM be resident together; warps are allocated by fours."""
    warps = config.num_warps + 4
    return min(232, 65536 // (extra(config, "ctas", 1) * warps * 32) // 8 * 8)


def static(problem: Problem, config: Config, groups: int) -> Static:
    table = 32
    while table < groups and problem.layout in ("offsets", "psum", "masked"):
        table *= 2
    regs = max_registers(config)
    loader = min(regs, 56 if table <= 256 else 88 if table <= 512 else 128)
    consumer = min(232, (regs * (config.num_warps + 4) - 4 * loader) // config.num_warps // 8 * 8)
    return Static(LAYOUT_IDS[problem.layout], config.block_m, config.block_n, config.num_warps // 4, config.num_stages,
                  extra(config, "stream"), table, 16 // ITEMSIZE[problem.out_dtype], problem.accumulate,
                  bool(extra(config, "pdl")), loader, consumer)


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    consumers = config.num_warps // 4
    if config.block_m not in TOKENS:
        return f"block_m={config.block_m}, expected one of {TOKENS} token columns"
    if config.num_warps not in (4, 8) or config.block_n // consumers not in (64, 128):
        return f"block_n={config.block_n} with {config.num_warps} warps, expected 64 or 128 weight rows for 4 warps"
    if config.block_m * config.block_n // consumers > 64 * 128:
        return f"{config.block_m} x {config.block_n // consumers} sums do not fit a warpgroup's registers"
    if config.block_k != 128 or config.split_k != 1 or not config.swap_ab or not config.persistent:
        return "expected block_k=128, split_k=1 (extra stream=... shares tiles), swap_ab and persistent"
    if not 1 <= extra(config, "ctas", 1) <= 4:
        return f"ctas={extra(config, 'ctas', 1)}, expected 1 to 4 on an SM"
    if arch.sms * extra(config, "ctas", 1) * consumers > COUNTERS:
        return f"{arch.sms} x {extra(config, 'ctas', 1)} CTAs pass the {COUNTERS} counters"
    if extra(config, "stream") and (problem.batch_invariant or extra(config, "sms") < 1):
        return "stream cuts K by the work at hand: not batch-invariant, and needs sms=... for its workspace"
    if config.num_stages < 3 or smem_bytes(problem, config) > smem_budget(config, arch):
        need = smem_bytes(problem, config)
        return f"{config.num_stages} stages take {need} bytes of shared memory; expected 3 or more that fit"
    return None


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
    rows = problem.m if problem.layout == "dense" else problem.rows
    if rows > MAX_ROWS:
        return f"is for {MAX_ROWS} rows a group and fewer, where weights are the traffic, not {rows}"
    if problem.layout == "contiguous" and problem.m > MAX_INDICES:
        return f"lists the segments of {MAX_INDICES} rows and fewer in one block, not {problem.m}"
    return None


def configs(problem: Problem, arch: Arch) -> list[Config]:
    rows = problem.m if problem.layout == "dense" else problem.rows
    token = next((t for t in TOKENS if t >= rows), TOKENS[-1])
    columns = [token] + [t for t in TOKENS if t == 2 * token and token > 8]
    out = []
    for bt in columns:
        for bn, warps, ctas in ((128, 4, 1), (128, 8, 1), (256, 8, 1), (64, 4, 2), (128, 4, 2), (64, 4, 3)):
            if bt != token and (bn, warps, ctas) not in ((128, 8, 1), (64, 4, 2)):
                continue
            for stream in (0, 4):
                more = (("ctas", ctas),) * (ctas > 1) + (("sms", arch.sms), ("stream", stream)) * (stream > 0)
                c = Config(bt, bn, 128, warps, 0, swap_ab=True, persistent=True, extra=more)
                stages = min(MAX_STAGES, (smem_budget(c, arch) - smem_bytes(problem, c)) // slot_bytes(c))
                c = replace(c, num_stages=stages)
                if legal(problem, c, arch) is None:
                    out.append(c)
    return out


def programs(config: Config, sms: int, max_sms: int) -> int:
    """CTAs of the persistent grid."""
    limit = [sms, *([max_sms] if max_sms else []), *([extra(config, "sms")] if extra(config, "stream") else [])]
    return min(limit) * extra(config, "ctas", 1)


def needs_prepare(problem: Problem, config: Config) -> bool:
    """Whether a small kernel has to run first: counters, the table of segments, padding rows."""
    return bool(extra(config, "stream")) or problem.layout == "contiguous" or pads(problem)


def pads(problem: Problem) -> bool:
    return problem.zero_padding and problem.layout in ("contiguous", "psum")


def sections(problem: Problem, config: Config, m: int, ctas: int) -> tuple[int, int, int]:
    """Bytes of the workspace's parts: partial sums (two tiles a CTA), counters, table of segments."""
    stream = extra(config, "stream")
    return (8 * ctas * config.block_m * config.block_n if stream else 0, 4 * COUNTERS if stream else 0,
            4 * (4 + 3 * m) if problem.layout == "contiguous" else 0)


def workspace(problem: Problem, config: Config) -> int:
    return sum(sections(problem, config, problem.m, programs(config, 1 << 20, problem.max_sms)))


def estimate(problem: Problem, config: Config, arch: Arch) -> float:
    """Bytes over the bandwidth of a full machine, with idle SMs in the last wave; or the K blocks' latency."""
    ctas = programs(config, arch.sms, problem.max_sms)
    rows = max(1, problem.m if problem.layout == "dense" else problem.rows)
    groups = problem.active_groups
    pieces = -(-rows // config.block_m)
    tiles = groups * pieces * -(-problem.n // config.block_n)
    blocks = problem.k // 128
    if stream := extra(config, "stream"):
        rest = tiles % ctas * blocks
        depth = tiles // ctas * blocks + min(blocks, max(-(-rest // ctas), stream if rest else 0))
    else:
        depth = -(-tiles // ctas) * blocks
    moved = (config.block_n + config.block_m) * 128
    in_flight = ctas * config.num_stages * moved
    rate = arch.bandwidth * min(0.94, in_flight / LATENCY_BYTES)
    per_cta = min(rate / min(ctas, max(1, tiles) if not stream else ctas), CTA_BANDWIDTH / extra(config, "ctas", 1))
    streaming = max(depth * moved / max(per_cta * (moved / (config.block_n * 128)), 1.0), problem.bytes / rate)
    math = depth * BLOCK_SECONDS * (config.block_n // (config.num_warps // 4) // 64 + config.block_m / 64) / 2
    seconds = LAUNCH_SECONDS + max(streaming, math)
    if needs_prepare(problem, config):
        seconds += PREPARE_SECONDS
    if stream:
        seconds += SHARE_SECONDS
    return seconds


class Prepared:
    """What launches of one step have in common; made at its first launch."""

    def __init__(self, step: Step, problem: Problem, groups: int) -> None:
        from . import fp8_decode_device as device
        from .fp8_decode_prepare_device import prepare_kernel

        self.step, self.problem, self.config = step, problem, step.config
        self.cfg = cfg = static(problem, step.config, groups)
        self.masked, self.zero = problem.layout == "masked", pads(problem)
        self.before: Launcher | None = None
        if needs_prepare(problem, self.config):
            self.before = Launcher(
                prepare_kernel,
                (problem.layout == "contiguous", self.zero, problem.layout == "psum", cfg.BT, ZERO_ROWS, cfg.PDL),
                {"num_warps": 4})
        options = {"num_warps": 4, "maxnreg": max_registers(self.config), **({"launch_pdl": True} if cfg.PDL else {})}
        self.main = Launcher(device.fp8_decode_kernel, (cfg,), options, lambda: device.layouts(cfg))

    def calls(self, x: Operands, workspace: Tensor | None, sms: int) -> list[Call]:
        """The launches of one call, in order."""
        c, cfg = self.config, self.cfg
        a, b, out, sa, sb = x.a.data, x.b.data, x.out, x.a.scale, x.b.scale
        assert sa is not None and sb is not None
        ctas = programs(c, sms, self.problem.max_sms)
        at = out.data_ptr()
        parts = counters = table = at
        ids, ids_dtype = (at, torch.int32) if x.index is None else (x.index.data_ptr(), x.index.dtype)
        som = out.stride(-2)
        calls = []
        if self.before is not None:
            count = 0
            if workspace is not None:
                n_parts, n_counters, _ = sections(self.problem, c, x.m, ctas)
                parts = workspace.data_ptr()
                counters = parts + n_parts
                table = counters + n_counters
                count = n_counters // 4
            calls.append(Call(
                self.before, 1 + (-(-x.m // ZERO_ROWS) if self.zero else 0), (), (ids, at, counters, table),
                (ids_dtype, out.dtype, torch.int32, torch.int32), (count, x.m, x.n, x.groups, x.alignment, x.m, som)))
        if not cfg.STREAM:
            ctas = min(ctas, tiles_at_most(self.problem.layout, x, cfg.BT) * -(-x.n // cfg.BN))
        calls.append(Call(
            self.main, ctas, (_box(b, cfg.BN), _box(a, cfg.BT)),
            (at, sa.data_ptr(), sb.data_ptr(), ids, parts, counters, table),
            (out.dtype, sa.dtype, sb.dtype, ids_dtype, torch.float32, torch.int32, torch.int32),
            (x.m, x.n, x.k // 128, x.groups, x.alignment, x.m,
             sa.stride(0) if self.masked else 0, sa.stride(-2), sa.stride(-1),
             sb.stride(0) if sb.dim() == 3 else 0, sb.stride(-2), sb.stride(-1),
             out.stride(0) if self.masked else 0, som)))
        return calls


class Call(NamedTuple):
    """One launch: see `Launcher.__call__`."""

    launcher: Launcher
    grid: int
    boxes: tuple[Box, ...]
    pointers: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    ints: tuple[int, ...]


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


def launch(step: Step, problem: Problem, operands: Operands, workspace: Tensor | None) -> None:
    index = operands.out.device.index
    if index is None:
        index = torch.cuda.current_device()
    for call in prepared(step, problem, operands.groups).calls(operands, workspace, _sms(index)):
        call.launcher(index, *call[1:])
