"""What is computed (`Problem`), how (`Config`), and the decision with its reasons (`Plan`). Frozen, hashable, pure Python."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .formats import BF16, Format

LAYOUTS = ("dense", "contiguous", "psum", "offsets", "masked", "routed", "k_grouped")
GROUPED = LAYOUTS[1:]
PADDED = ("contiguous", "psum")       # layouts with rows of padding


@dataclass(frozen=True, slots=True)
class Operand:
    """One side of a product: its format, which axis is contiguous, and the prepack it went through, if any."""

    format: Format
    major: str = "k"          # 'k', 'mn' or 'strided'
    prepack: str = ""         # id and version of a weight permutation, e.g. 'decode_sm90/1'; '' is the plain layout
    scale_dtype: str = ""     # what the scale tensor really holds: 'fp32', 'e8m0', '' where there is none
    scale_major: str = ""     # 'mn': R contiguous, columns 16-byte aligned (what TMA loads); 'k'; 'strided'; '' without scale
    aligned: bool = True      # payload: base and every outer stride are multiples of 16 bytes (what TMA needs)
    folds: bool = False       # packed E2M1: each row's scales lie within 15 powers of two (`PackedWeight.top`)
    picks: int = -1           # packed E4M3: `FoldedCopy.picks`, columns of A that meet what doesn't fold; -1: no folded copy


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What happens to the FP32 sum before it is stored, in this order."""

    bias: bool = False
    activation: str = ""                       # 'swiglu', 'swiglu_oai', ...
    activation_args: tuple[float, ...] = ()    # e.g. (alpha, limit)
    interleaved: bool = False                  # gate and up alternate instead of [gate; up]
    routing_weight: bool = False
    combine: bool = False                      # sum the top-k rows of a token
    add: bool = False                          # a tensor is added to that sum
    quantize: Format | None = None             # quantised output

    @property
    def plain(self) -> bool:
        return self == _PLAIN


_PLAIN = Epilogue()


@dataclass(frozen=True, slots=True)
class Problem:
    """A matrix product, without the tensors. `m` and `rows` are buckets: see `bucket`.

    `m`: rows of A (dense, contiguous, psum, offsets: all rows; masked: rows a group can hold; k_grouped: rows of the output).
    `rows`: rows a group is expected to have (masked: `expected_m`; else ceil(m / groups)).
    `k`: contracted length; for k_grouped the sum over groups.
    """

    op: str                                    # 'gemm', 'grouped_gemm', 'grouped_gemm_wgrad', ...
    layout: str
    m: int
    n: int
    k: int
    groups: int
    a: Operand = field(default_factory=lambda: Operand(BF16))
    b: Operand = field(default_factory=lambda: Operand(BF16))
    rows: int = 0
    out_dtype: str = "bf16"
    out_aligned: bool = True                   # base and row stride are multiples of 16 bytes
    epilogue: Epilogue = _PLAIN
    gather: bool = False                       # A's rows are taken through a row map
    a_div: int = 1                             # A row = slot // a_div (top-k gather)
    accumulate: bool = False                   # out += product
    zero_padding: bool = True                  # padding rows are written as zero, else not written
    promote: int = 128                         # FP32 promotion of partial sums at least every so many of K; 0: never
    deterministic: bool = True
    batch_invariant: bool = False
    max_sms: int = 0                           # 0: all
    wide: bool = False                         # an offset inside one tile passes 2^31 elements
    alignment: int = 1                         # k_grouped, psum: groups start at multiples of it; k_grouped: gaps hold zeros
    # what the launch before may still be writing when this one starts: 'tokens' (A), 'sizes' (the groups' sizes, too); '': nothing
    front: str = ""
    positions: int = 0                         # routed: bucket of the positions, padding among them, that there is room for

    @property
    def flops(self) -> float:
        """2·M·N·K over the rows expected to be live."""
        m = self.groups * self.rows if self.layout == "masked" else self.m
        return 2.0 * m * self.n * self.k

    @property
    def active_groups(self) -> int:
        """Groups expected to have rows at all."""
        live = self.groups * self.rows if self.layout == "masked" else self.m
        return max(1, min(self.groups, live)) if self.layout != "dense" else 1

    @property
    def counted(self) -> bool:
        """Whether the layout's index tells how long groups are, so that tiles are counted on the device."""
        return self.layout not in ("dense", "contiguous")

    @property
    def zeroes(self) -> bool:
        """Whether rows of padding are written as zero."""
        return self.zero_padding and self.layout in PADDED

    @property
    def out_bytes(self) -> int:
        """Of an element of the output."""
        return 4 if self.out_dtype == "fp32" else 2

    @property
    def bytes(self) -> float:
        """Fewest bytes through device memory: each input read once, each output written once."""
        if self.layout == "k_grouped":
            read = self.a.format.storage_bytes(self.m, self.k) + self.b.format.storage_bytes(self.n, self.k)
            return read + self.groups * self.m * self.n * self.out_bytes * (1 + self.accumulate)
        m = self.groups * self.rows if self.layout == "masked" else self.m
        out = m * self.n * self.out_bytes * (1 + self.accumulate)
        return (self.a.format.storage_bytes(m, self.k) + out
                + self.active_groups * self.b.format.storage_bytes(self.n, self.k))


def bucket(m: int) -> int:
    """M up to the next of 0, 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, ...: nothing re-plans at every new count.

    Quarters of a power of two above 64, where whole waves of tiles hang on the rows of a group; halves from 8 to 64.
    """
    if m <= 2:
        return max(m, 0)
    p = 1 << (m - 1).bit_length()
    step = p // 8 if m > 64 else p // 4 if m > 8 else p
    return -(-m // step) * step


def buckets(most: int) -> tuple[int, ...]:
    """Every number of rows that plans differ by, from 1 to `most`."""
    return tuple(sorted({b for b in map(bucket, range(1, most + 1)) if b <= most} | {most}))


def middle(b: int) -> int:
    """The mean of the numbers that `bucket` brings to `b`."""
    p = 1 << (b - 1).bit_length() if b > 2 else 0
    step = p // 8 if b > 64 else p // 4 if b > 8 else p // 2 if b > 2 else 1
    return b - (step - 1) // 2


SCALED_BLOCK = 128          # of K: scales finer than a row's are applied to partial sums in FP32 this often, which promotes them
PROMOTE = 512               # of K, where scales ask for nothing: Hopper's FP8 tensor core keeps about 14 bits of a sum


def promotion(a: Format, b: Format, fast_accum: bool = False) -> int:
    """`Problem.promote` of a product of these formats. `fast_accum`: never promote, where the scales allow it."""
    if a.group[1] or b.group[1] or not (a.scaled and b.scaled):
        return SCALED_BLOCK
    return 0 if fast_accum else PROMOTE


@dataclass(frozen=True, slots=True)
class Config:
    """How a kernel runs. `extra` holds what only one kernel knows, as sorted (name, value) pairs."""

    block_m: int = 128
    block_n: int = 128
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 3
    group_m: int = 8          # tiles of M that share a strip, for L2
    split_k: int = 1
    swap_ab: bool = False     # weights on the MMA's M side, for few rows
    persistent: bool = False
    extra: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        s = f"{self.block_m}x{self.block_n}x{self.block_k} w{self.num_warps} s{self.num_stages} g{self.group_m}"
        s += f" split{self.split_k}" if self.split_k > 1 else ""
        s += " swap" if self.swap_ab else ""
        s += " persistent" if self.persistent else ""
        return s + "".join(f" {k}={v}" for k, v in self.extra)

    def option(self, name: str, default: int = 0) -> int:
        """What `extra` says of a name; `default` where it is silent."""
        return next((v for k, v in self.extra if k == name), default)

    def to_dict(self) -> dict[str, Any]:
        """What differs from the defaults, as plain data; `extra`'s pairs beside the others."""
        d = {f: getattr(self, f) for f in self.__dataclass_fields__ if f != "extra"}
        return {k: v for k, v in d.items() if v != self.__dataclass_fields__[k].default} | dict(self.extra)

    @staticmethod
    def from_dict(d: dict[str, Any]) -> Config:
        """The Config that `to_dict` gave `d` for."""
        own = {k: v for k, v in d.items() if k in Config.__dataclass_fields__ and k != "extra"}
        return replace(Config(**own), extra=tuple(sorted((k, v) for k, v in d.items() if k not in own)))


@dataclass(frozen=True, slots=True)
class Step:
    """One launch: a kernel by registry name, its config, and the workspace it needs."""

    kernel: str
    config: Config
    workspace_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """The decision. `passed_over` names every kernel that was not taken, with the reason."""

    problem: Problem
    arch: str
    backend: str
    steps: tuple[Step, ...]
    reason: str
    predicted_us: float = 0.0
    passed_over: tuple[tuple[str, str], ...] = ()

    @property
    def kernel(self) -> str:
        return self.steps[0].kernel

    @property
    def config(self) -> Config:
        return self.steps[0].config

    @property
    def workspace_bytes(self) -> int:
        return sum(s.workspace_bytes for s in self.steps)
