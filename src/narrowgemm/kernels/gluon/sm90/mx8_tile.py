"""What Hopper's kernels for plain MXFP8 weights and few tokens share on the host: what they take, how K is cut, what all are
compiled for, the shape of a predicted time, the launch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ....arch import Arch
from ....problem import Config, Problem
from ...launching import Launch, Pointer
from ...operands import Operands
from .occupancy import CLUSTERS, KEEP_BYTES, ROOM, STREAM_CACHES
from .tensor_maps import planes

TRIP = 4                     # K blocks of 128 whose codes are 16 bytes of a row


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the device code of each of these kernels is compiled for."""

    BN: int                  # weight rows of a tile
    STAGES: int
    CLUSTER: int             # blocks that share a tile, each with a part of K
    VEC: int                 # codes of weights, by four, that a copy or load brings; 0: rows off 4 bytes, each is loaded
    KEEP: bool               # output stays in L2
    STREAM: bool             # weights pass through L2, which gives them up first
    CONSUMER_REGS: int
    LOADER_REGS: int


@dataclass(frozen=True, kw_only=True)
class Columns(Shared):
    """The same, where tokens are wgmma's columns. Parts of `fp8_decode`'s device code read it, too."""

    BT: int                  # token columns
    TRIPS: int               # of the longest part of K
    STORE_VEC: int           # elements of 16 bytes of output
    ACCUMULATE: bool = False
    LAYOUT: int = 0


def shared(problem: Problem, config: Config, sw: int, consumer: int, loader: int) -> dict[str, Any]:
    """The fields of `Shared`. sw: `row_alignment` of the weights' scales. consumer, loader: registers of a thread of theirs."""
    return {"BN": config.block_n, "STAGES": config.num_stages, "CLUSTER": config.split_k,
            "VEC": min(sw // 4, 1) if blocks_of(problem) % TRIP else sw // 4,
            "KEEP": bool(config.option("keep")), "STREAM": bool(config.option("stream")),
            "CONSUMER_REGS": consumer, "LOADER_REGS": loader}


def columns(problem: Problem, config: Config, chunk: int) -> dict[str, Any]:
    """The fields that `Columns` adds. chunk: `chunk_of`."""
    return {"BT": config.block_m, "TRIPS": chunk // TRIP, "STORE_VEC": 16 // problem.out_bytes}


# ---------------------------------------------------------------- what they take
def supports(problem: Problem, arch: Arch) -> str | None:
    """Why no such kernel takes the problem, whatever its tokens, or None."""
    a, b = problem.a, problem.b
    if arch.target != "sm90":
        return f"runs on sm90, not {arch.target}"
    if problem.op != "gemm" or problem.layout != "dense":
        return f"computes dense gemm, not {problem.op} with layout {problem.layout}"
    for x in (a, b):
        if (x.format.element, x.format.group, x.scale_dtype) != ("e4m3", (1, 32), "e8m0"):
            return f"takes MXFP8 x MXFP8, not {a.format.name} x {b.format.name}"
    if a.prepack or b.prepack:
        return "takes plain operands, not prepacked ones"
    if not problem.epilogue.plain or problem.gather or problem.accumulate:
        return "writes its sum, with no fused gather, epilogue or accumulation"
    if a.major != "k" or b.major != "k" or not a.aligned or not b.aligned or problem.wide:
        return "needs both operands K-major, on 16 bytes in base and strides (TMA), and tiles within 2^31 elements"
    if b.scale_major != "k":
        return "needs scales of weights row by row"
    if problem.k % 128:
        return f"needs K a multiple of 128, not {problem.k}"
    if problem.max_sms:
        return "takes as many SMs as there are"
    return None


def of_tokens(problem: Problem, arch: Arch, fewest: int, most: int) -> str | None:
    """`supports`, for a kernel that takes from `fewest` to `most` tokens."""
    if problem.op == "gemm" and not fewest <= problem.m <= most:
        return f"is for {fewest} to {most} tokens, not {problem.m}"
    return supports(problem, arch)


# ---------------------------------------------------------------- how K is cut
def blocks_of(problem: Problem) -> int:
    """K blocks of 128."""
    return problem.k // 128


def chunk_of(problem: Problem, config: Config, trip: int = TRIP) -> int:
    """K blocks of one block of a cluster: whole trips."""
    trips = -(-blocks_of(problem) // trip)
    return -(-trips // config.split_k) * trip


def illegal_split(problem: Problem, config: Config, trip: int = TRIP) -> str | None:
    """Why K can't be cut into `config.split_k` parts, or None."""
    if config.split_k not in (1, *CLUSTERS):
        return f"split_k={config.split_k}, expected 1 or one of {CLUSTERS}, the blocks of a cluster"
    if config.split_k > 1 and problem.batch_invariant:
        return "split_k cuts K by the work at hand: not batch-invariant"
    if (config.split_k - 1) * chunk_of(problem, config, trip) >= blocks_of(problem):
        return f"{config.split_k} blocks have no {TRIP} K blocks each"
    return None


# ---------------------------------------------------------------- candidates
def clusters_at_once(arch: Arch) -> Iterator[tuple[int, int]]:
    """(blocks of a cluster, how many such clusters are on the chip at the same time), with one block on an SM."""
    yield 1, arch.sms
    for blocks, share in ROOM.items():
        yield blocks, round(arch.sms * share)


def caching(problem: Problem, tiles_m: int, arch: Arch) -> tuple[tuple[str, int], ...]:
    """For `Config.extra`: 'keep' where the output stays in L2, 'stream' where weights are read once and leave it first."""
    keep = problem.m * problem.n * problem.out_bytes <= KEEP_BYTES
    stream = tiles_m == 1 and problem.b.format.storage_bytes(problem.n, problem.k) <= STREAM_CACHES * arch.l2
    return tuple((name, 1) for name, given in (("keep", keep), ("stream", stream)) if given)


def tiles_of(problem: Problem, config: Config) -> int:
    return -(-problem.m // config.block_m) * -(-problem.n // config.block_n)


# ---------------------------------------------------------------- cost
def tiles_at_once(config: Config, arch: Arch) -> int:
    """How many tiles are on the chip at the same time, with one block on an SM."""
    return round(arch.sms * ROOM.get(config.split_k, 1.0))


def read_seconds(problem: Problem, arch: Arch, share: float) -> float:
    """To read the weights, at a share of the bandwidth."""
    return problem.b.format.storage_bytes(problem.n, problem.k) / (arch.bandwidth * share)


def seconds(config: Config, start: float, memory: float, work: float, power: float, cut: float) -> float:
    """Predicted time. memory: of the bytes; work: of a CTA's K blocks, one after another; power: how sharply the longer of these
    two takes over. cut: what a cluster of two takes to add up its sums; each doubling takes as much again."""
    return start + (memory**power + work**power) ** (1 / power) + cut * math.log2(config.split_k)


# ---------------------------------------------------------------- launch
def row_alignment(scale: Tensor) -> int:
    """Bytes that rows of scales start at multiples of: 16, 4, or 0 for neither, and where a row's codes do not lie side by side."""
    if scale.data_ptr() % 16 or scale.stride(-1) != 1:
        return 0
    return next((n for n in (16, 4) if scale.stride(-2) % n == 0), 0)


def weight_codes(scale: Tensor, cfg: Shared) -> tuple[Tensor | Pointer, int]:
    """(codes of weights, how far their rows are apart): four in an int32, or single ones."""
    return (Pointer(scale, torch.int32), scale.stride(-2) // 4) if cfg.VEC else (scale, scale.stride(-2))


def launch(kernel: Any, x: Operands, tokens: int, box: int, x_codes: tuple[Any, ...], chunk: int, registers: int,
           cfg: Shared) -> Launch:
    """The launch of a kernel that takes codes of both sides, for tiles of so many tokens.

    box: rows of the weights' boxes as Triton's frontend is told them, a power of two. x_codes: the tokens' codes and their strides.
    registers: of a thread at the launch.
    """
    assert x.b.scale is not None
    codes, stride = weight_codes(x.b.scale, cfg)
    descriptors = planes(x.b.data, x.k, box), planes(x.a.data, x.k, tokens)
    sizes = x.m, x.n, x.k // 128, chunk
    return Launch(
        kernel, (-(-x.m // tokens) * -(-x.n // cfg.BN),),
        (*descriptors, x.out, codes, x_codes[0], *sizes, stride, *x_codes[1:], x.out.stride(-2), cfg),
        {"num_warps": 4, "maxnreg": registers}, cfg.CLUSTER, boxes=((0, cfg.BN),) if box != cfg.BN else ())
