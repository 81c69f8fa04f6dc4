"""One problem with its group sizes, as tests, benchmarks and the tuner enumerate them. Pure data: nothing is allocated.

Group sizes are a function of the case alone (seeded by its sizes and shape), so FLOPs and bytes are known without a
device, and a case means the same rows on every machine; only the values in the tensors follow a seed of the run.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache

from ..errors import expect
from ..formats import BF16, ELEMENTS, Format, FP8_1x128, FP8_128x128

OPS = ("gemm", "grouped_gemm", "grouped_gemm_wgrad")
LAYOUTS = ("dense", "contiguous", "psum", "offsets", "masked", "k_grouped")
FOLDED = {"folded": "bf16", "folded_mxfp8": "mxfp8"}    # `Case.packed` -> `activations` of `prepack`, folded
ORDERS = ("sorted", "reversed", "repeated")


@dataclass(frozen=True, slots=True)
class Case:
    """A product of `groups` weights `[n, k]` with about `m` rows each.

    k_grouped: `groups` outputs `[m, n]` of about `k` columns each. `sizes`: how rows (columns) spread over groups, see
    `spread`. `world`: experts over all ranks when this one holds only `groups` of them; `m` is then the mean over the
    world. `max_m`: rows a group can hold (masked). `alignment`: a group's segment starts at a multiple of it
    (contiguous, psum). `order`: of the segments of a contiguous layout; 'repeated' cuts every group in two. `slack`:
    rows of A behind the last group. `e2e`: timed from BF16 tokens, see `tokens.py`. `packed`: B goes through
    `narrowgemm.prepack` first; 'fp8', 'mxfp8': for such activations; 'folded': with a folded copy beside; 'folded_mxfp8':
    for MXFP8, where each call folds dense weights. `fast_accum`: partial sums are never promoted, ours and a peer's.
    `outliers`: one column of A in a hundred is 30 times as large as the others.
    """

    suite: str
    layout: str
    groups: int
    m: int
    n: int
    k: int
    a: Format = FP8_1x128
    b: Format = FP8_128x128
    max_m: int = 0
    sizes: str = "balanced"
    world: int = 0
    out_dtype: str = "bf16"
    zero_padding: bool = True
    accumulate: bool = False
    alignment: int = 128
    order: str = "sorted"
    slack: int = 0
    e2e: bool = False
    packed: bool | str = False
    fast_accum: bool = False
    outliers: bool = False

    def __post_init__(self) -> None:
        expect(self.layout in LAYOUTS, "layout", self.layout, f"one of {LAYOUTS}")
        expect(self.order in ORDERS, "order", self.order, f"one of {ORDERS}")
        expect(self.layout != "masked" or self.max_m > 0, "max_m of a masked case", self.max_m, "rows a group can hold")
        expect(not self.e2e or (self.layout, self.a, self.slack) == ("offsets", FP8_1x128, 0), "an end-to-end case",
               f"{self.layout}, {self.a.name}, slack {self.slack}", "offsets, fp8_1x128, no slack")

    @property
    def op(self) -> str:
        return {"dense": "gemm", "k_grouped": "grouped_gemm_wgrad"}.get(self.layout, "grouped_gemm")

    @property
    def id(self) -> str:
        """Unique within the suite and stable: what a result file calls the case."""
        groups = f"-g{self.groups}" if self.layout != "dense" else ""
        out = f"{self.layout}{groups}-m{self.m}-n{self.n}-k{self.k}"
        if self.max_m:
            out += f"-x{self.max_m}"
        if self.sizes != "balanced":
            out += "-" + self.sizes.replace(":", "_")
        if self.world:
            out += f"-of{self.world}"
        if (self.a, self.b) != (FP8_1x128, FP8_128x128):
            out += f"-{self.a.name}-{self.b.name}".replace(":", "_")
        for shown, text in ((self.out_dtype != "bf16", self.out_dtype), (not self.zero_padding, "nozero"),
                            (self.accumulate, "acc"), (self.alignment != 128, f"align{self.alignment}"),
                            (self.order != "sorted", self.order), (self.slack > 0, f"slack{self.slack}"), (self.e2e, "e2e"),
                            (bool(self.packed), "packed"), (self.fast_accum, "fast"),
                            (self.outliers, "outliers")):
            if shown:
                out += f"-{text}"
        return out

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Rows of each group; columns of K for `k_grouped`."""
        mean, limit = (self.k, 0) if self.layout == "k_grouped" else (self.m, self.max_m)
        return spread(self.sizes, self.groups, mean, self.world, limit)

    @property
    def rows(self) -> int:
        """Rows (columns, for `k_grouped`) that belong to a group."""
        return sum(self.group_sizes)

    @property
    def column_alignment(self) -> int:
        """What a k_grouped layout may say of its groups: 128 where all of them are multiples of it."""
        return 1 if any(s % 128 for s in self.group_sizes) else 128

    @property
    def expected_m(self) -> int:
        """The host-side hint of a masked call: the mean rows of a group, rounded up."""
        return max(1, -(-self.rows // max(self.groups, 1)))

    @property
    def segments(self) -> tuple[tuple[int, int, int], ...]:
        """(group, first row, rows) of every piece of a flat layout, in the order in which A holds them."""
        return _segments(self)

    @property
    def a_rows(self) -> int:
        """Rows of A, padding included: of one group for masked, of the operand else."""
        if self.layout == "masked":
            return self.max_m
        if self.layout == "k_grouped":
            return self.m
        end = max((start + size for _, start, size in self.segments), default=0)
        if self.layout in ("contiguous", "psum"):
            end = -(-end // self.alignment) * self.alignment
        return end + self.slack

    @property
    def flops(self) -> float:
        """2·M·N·K over the rows that belong to a group."""
        if self.layout == "k_grouped":
            return 2.0 * self.m * self.n * self.rows
        return 2.0 * self.rows * self.n * self.k

    @property
    def bytes(self) -> float:
        """Fewest bytes through device memory: rows in use (e2e: BF16 ones), weights of groups with rows, the output, each once."""
        out_bytes = ELEMENTS[self.out_dtype].bits // 8 * (1 + self.accumulate)
        if self.layout == "k_grouped":
            return (self.a.storage_bytes(self.m, self.rows) + self.b.storage_bytes(self.n, self.rows)
                    + self.groups * self.m * self.n * out_bytes)
        active = sum(s > 0 for s in self.group_sizes)
        a = BF16 if self.e2e else self.a
        return (a.storage_bytes(self.rows, self.k) + active * self.b.storage_bytes(self.n, self.k)
                + self.rows * self.n * out_bytes)


@lru_cache(maxsize=4096)
def spread(sizes: str, groups: int, mean: int, world: int = 0, limit: int = 0) -> tuple[int, ...]:
    """Rows of each of `groups` groups of a world of `world` (0: these are all), about `mean` each, at most `limit`.

    | `sizes` | rows |
    | --- | --- |
    | `balanced` | `mean` each |
    | `uniform:0.7:1.3` | `mean` times a number drawn evenly from that range, at least 1; `uniform:0.7:1.3:4`: another draw |
    | `skew:30` | the same total, the fullest group 30 times the emptiest, evenly in between, in random order |
    | `skew128:30` | as `skew`, in whole blocks of 128 |
    | `few:8` | the same total, all of it on 8 groups, which are among the first `groups` |
    | `empty:0.5` | like `uniform:0.7:1.3`, and half of the groups have none |
    | `topk:16:8` | 16 tokens choose 8 different ones of the world's experts each, evenly at random |
    | `zero` | none at all |
    """
    kind, *args = sizes.split(":")
    total = world or groups
    rng = random.Random(f"{sizes}/{groups}/{mean}/{world}")
    if kind == "balanced":
        out = [mean] * total
    elif kind == "topk":
        tokens, top_k = map(int, args)
        out = [0] * total
        for _ in range(tokens):
            for g in rng.sample(range(total), top_k):
                out[g] += 1
    elif kind == "zero":
        out = [0] * total
    elif kind in ("uniform", "empty"):
        low, high = (float(x) for x in args[:2]) if kind == "uniform" else (0.7, 1.3)
        out = [max(1, int(mean * rng.uniform(low, high))) for _ in range(total)]
        if kind == "empty":
            for i in rng.sample(range(total), int(total * float(args[0]))):
                out[i] = 0
    elif kind in ("skew", "skew128"):
        r = float(args[0])
        weights = [1 + (r - 1) * i / max(total - 1, 1) for i in range(total)]
        rng.shuffle(weights)
        unit = 128 if kind == "skew128" else 1
        out = [unit * x for x in apportion(mean * total // unit, weights)]
    elif kind == "few":
        hot = set(rng.sample(range(groups), min(int(args[0]), groups)))
        out = apportion(mean * total, [float(i in hot) for i in range(total)])
    else:
        raise ValueError(f"sizes: got {sizes!r}, expected balanced, uniform:LOW:HIGH, skew:R, few:N, empty:F, topk:T:K or zero")
    return tuple(min(x, limit) if limit else x for x in out[:groups])


def apportion(total: int, weights: list[float]) -> list[int]:
    """`total` cut in proportion to `weights`, exactly, by largest remainders."""
    scale = total / sum(weights)
    out = [int(w * scale) for w in weights]
    order = sorted(range(len(weights)), key=lambda i: (out[i] - weights[i] * scale, i))
    for i in order[: total - sum(out)]:
        out[i] += 1
    return out


@lru_cache(maxsize=4096)
def _segments(case: Case) -> tuple[tuple[int, int, int], ...]:
    pieces = [(g, s) for g, s in enumerate(case.group_sizes) if s]
    if case.order == "reversed":
        pieces.reverse()
    elif case.order == "repeated":
        pieces = [(g, s - s // 2) for g, s in pieces] + [(g, s // 2) for g, s in pieces if s // 2]
    align = case.alignment if case.layout in ("contiguous", "psum") else 1
    out, row = [], 0
    for g, s in pieces:
        row = -(-row // align) * align
        out.append((g, row, s))
        row += s
    return tuple(out)
