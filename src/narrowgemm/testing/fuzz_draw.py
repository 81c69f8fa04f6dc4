"""What `fuzz` tries: random cases, how their tensors lie, and which kernels take them."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, replace

import torch

from ..arch import detect
from ..formats import (
    BF16,
    FP8_ROW,
    FP8_TENSOR,
    FP16,
    MXFP4,
    MXFP8,
    Format,
    FP8_1x128,
    FP8_128x128,
    get_format,
)
from ..kernels.gluon.sm90 import fold_both
from ..kernels.registry import PRODUCTS, kernels
from ..prepack import as_they_are
from ..prepack_bits import FP8_PREPACK, PREPACK
from ..prepack_folded import STEP
from ..problem import Config, Operand, Plan, Problem, bucket, promotion
from ..runtime import dispatch
from .case import FOLDED, Case
from .fuzz_inputs import CORRUPT, VALUES, Store, build

E8M0 = FP8_1x128.with_scale("e8m0"), FP8_128x128.with_scale("e8m0")
E5M2 = {f: f.with_element("e5m2") for f in (FP8_1x128, FP8_128x128, FP8_ROW, FP8_TENSOR, MXFP8)}
# pairs of formats, and how often each is drawn
PAIRS: dict[tuple[Format, Format], int] = {
    (FP8_1x128, FP8_128x128): 8, E8M0: 2, (FP8_1x128, FP8_1x128): 1, (E5M2[FP8_1x128], FP8_128x128): 1,
    (FP8_1x128, E5M2[FP8_128x128]): 1,
    **{(a, b): 1 for a in (FP8_ROW, FP8_TENSOR) for b in (FP8_ROW, FP8_TENSOR)}, (E5M2[FP8_ROW], FP8_ROW): 1,
    (FP8_TENSOR, E5M2[FP8_TENSOR]): 1,
    (MXFP8, MXFP8): 5, (MXFP8, MXFP4): 4, (MXFP4, MXFP4): 3, (FP8_1x128, MXFP4): 4, (E8M0[0], MXFP4): 1, (BF16, MXFP4): 4,
    (FP16, MXFP4): 1, (BF16, MXFP8): 3, (FP8_1x128, MXFP8): 1, (BF16, BF16): 4, (FP16, FP16): 1, (FP8_ROW, MXFP4): 4,
    (FP8_TENSOR, MXFP4): 1, (E5M2[MXFP8], MXFP8): 1, (MXFP8, E5M2[MXFP8]): 1,
}
COLUMNS = (1, 2, 7, 8, 9, 16, 24, 31, 63, 64, 65, 72, 104, 127, 128, 129, 136, 176, 192, 200, 256, 264, 384, 520, 576, 640, 1088,
           2112)
DEPTHS = (1, 2, 8, 16, 31, 32, 33, 48, 64, 96, 100, 112, 127, 129, 144, 160, 272, 400)
ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129, 160, 191, 193, 256, 300, 400, 512, 513,
        1000)
GROUPS = (1, 2, 3, 4, 5, 7, 8, 16, 17, 31, 32, 33, 64, 65, 128, 129, 255, 256, 257, 300, 512, 1024)
SIZES = ("balanced", "uniform:0.3:1.7", "uniform:0.7:1.3", "skew:30", "skew:1000", "few:1", "few:2", "empty:0.5", "empty:0.9",
         "zero")
PLAIN = Store()
LAYOUTS = {"dense": 5, "contiguous": 3, "psum": 3, "offsets": 5, "masked": 5, "k_grouped": 3}
LIMIT = {"cuda": 1 << 32, "cpu": 1 << 22}       # multiply-adds of a case


@dataclass(frozen=True, slots=True)
class Draw:
    """One thing to try. `kernel` '': whatever dispatch takes; `config` None: whatever the cost model takes.

    `values`, `corrupt`: of `fuzz_inputs`. `hint`: expected rows of a masked or psum layout. `columns`: columns of K behind the last
    group of k_grouped. `wide_index`: int64 offsets. `own_scales`: k_grouped with scales of each group's own.
    """

    case: Case
    seed: int
    kernel: str = ""
    config: Config | None = None
    a: Store = PLAIN
    b: Store = PLAIN
    out: Store = PLAIN
    scale: str = "mn_major"
    values: str = "normal"
    corrupt: str = ""
    hint: int = 0
    columns: int = 0
    wide_index: bool = False
    own_scales: bool = False
    max_sms: int = 0

    def to_json(self) -> str:
        d = asdict(self)
        d["case"] |= {"a": self.case.a.name, "b": self.case.b.name}
        if self.config is not None:
            d["config"] = self.config.to_dict()
        return json.dumps(d)

    @staticmethod
    def from_json(text: str) -> Draw:
        d = json.loads(text)
        c = d.pop("case")
        a, b, out = (Store(**d.pop(k)) for k in ("a", "b", "out"))
        config = d.pop("config")
        return Draw(case=Case(**c | {"a": get_format(c["a"]), "b": get_format(c["b"])}), a=a, b=b, out=out,
                    config=None if config is None else Config.from_dict(config), **d)


def draw_case(rng: random.Random, limit: int) -> Case:
    layout = rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
    pairs = {p: w for p, w in PAIRS.items()
             if layout != "k_grouped" or (p[1].group[0] in (0, 1) and p[0].element[0] == "e" and p[1].element in ("e4m3", "e5m2")
                                          and 32 not in (p[0].group[1], p[1].group[1]))}
    a, b = rng.choices(list(pairs), list(pairs.values()))[0]
    groups = 1 if layout == "dense" else rng.choice(GROUPS)
    n = rng.choice(COLUMNS)
    k = 128 * rng.choice((1, 2, 3, 4, 5, 7, 8, 9, 16, 17)) if rng.random() < 0.75 else rng.choice(DEPTHS)
    if (a, b) == (MXFP8, MXFP8) and rng.random() < 0.5:
        layout, groups, k = "dense", 1, -(-k // 128) * 128
    if rng.random() < 0.02:
        k, n, groups = 128 * rng.randrange(64, 257), min(n, 256), min(groups, 4)
    if "e2m1" in (a.element, b.element):
        k += k % 2
    sizes = rng.choice(SIZES)
    m = rng.choice(ROWS)
    if layout == "k_grouped":
        k = rng.choice((1, 5, 16, 64, 100, 128, 200, 256, 512, 1000))
        sizes = "skew128:3" if rng.random() < 0.5 else sizes
        k = max(k, 128) if sizes == "skew128:3" else k
        if a.group == (1, 128) and sizes != "skew128:3" and rng.random() < 0.5:
            sizes = "skew128:3"
    while groups * n * max(m, 1) * k > limit or groups * max(n * k, m * n, m * k) > limit >> 7:
        if groups > 1:
            groups = (groups + 1) // 2
        elif m > 1:
            m = m // 2
        else:
            break
    packed: bool | str = False
    if b.name in (MXFP4.name, MXFP8.name) and a.name != FP16.name and rng.random() < 0.7:
        packed = "fp8" if b is MXFP4 and rng.random() < 0.5 else True
        packed = "mxfp8" if b is not MXFP4 and rng.random() < 0.3 else packed
        if (a, b) == (MXFP8, MXFP8) and packed is True and layout in fold_both.KINDS and rng.random() < 0.6:
            packed = rng.choice(("folded", "folded", "folded_mxfp8"))
    max_m = max(1, m * rng.choice((1, 1, 2, 3)) + rng.choice((0, 0, 1, 5))) if layout == "masked" else 0
    alignment = rng.choice((1, 4, 16, 64, 128, 128, 128)) if layout in ("contiguous", "psum") else 128
    return Case("fuzz", layout, groups, m, n, k, a=a, b=b, max_m=max_m, sizes="balanced" if layout == "dense" else sizes,
                out_dtype=rng.choice(("bf16", "bf16", "bf16", "fp16", "fp32")), zero_padding=rng.random() < 0.8,
                accumulate=rng.random() < 0.2, alignment=alignment,
                order=rng.choice(("sorted", "sorted", "reversed", "repeated")) if layout == "contiguous" else "sorted",
                slack=rng.choice((0, 0, 1, 7, 128, 200)) if layout in ("contiguous", "psum", "offsets") else 0, packed=packed,
                fast_accum=not packed and promotion(a, b, True) == 0 and rng.random() < 0.2)


def draw_store(rng: random.Random, unit: int) -> Store:
    """How a tensor lies. `unit`: elements of 16 bytes."""
    pick = rng.random()
    if pick < 0.5:
        return Store()
    if pick < 0.75:     # as TMA takes it
        return Store(rng.choice((0, unit, 3 * unit)), rng.choice((0, unit, 5 * unit)), rng.choice((0, 1, 3)))
    return Store(rng.choice((0, 1, 3, unit)), rng.choice((0, 1, 2, unit // 2)), rng.choice((0, 1)), rng.random() < 0.2)


def draw(rng: random.Random, limit: int) -> Draw:
    case = draw_case(rng, limit)
    unit = {"e2m1": 16}.get(case.a.element, 128 // case.a.elem.bits)
    narrow = "e2m1" in (case.a.element, case.b.element)
    stores = [draw_store(rng, unit), draw_store(rng, unit), draw_store(rng, 16 if case.out_dtype == "fp32" else 8)]
    stores = [replace(s, transposed=s.transposed and i < 2 and not narrow and not (i == 1 and case.packed))
              for i, s in enumerate(stores)]
    if case.packed and case.layout == "masked":
        stores[2] = replace(stores[2], gap=0)
    grouped = case.layout not in ("dense", "k_grouped")
    return Draw(case, rng.randrange(1 << 31), a=stores[0], b=stores[1], out=stores[2],
                scale=rng.choice(("mn_major", "mn_major", "mn_major", "row_major", "odd")),
                values=rng.choices(list(VALUES), list(VALUES.values()))[0],
                corrupt=rng.choice(CORRUPT) if grouped and rng.random() < 0.1 else "",
                hint=rng.choice((0, 1, 8, 64, 100000)) if rng.random() < 0.5 else -1,
                columns=rng.choice((0, 0, 1, 128, 200)) if case.layout == "k_grouped" else 0,
                wide_index=rng.random() < 0.4, own_scales=case.layout == "k_grouped" and rng.random() < 0.3,
                max_sms=rng.choice((1, 2, 7, 64)) if rng.random() < 0.1 else 0)


def choose(draw_: Draw, rng: random.Random, device: torch.device, every: bool = False, only: Collection[str] = ()
           ) -> Iterator[Draw]:
    """The draw with a kernel that takes it and one of its configs; `every`: with each kernel; `only`: with one of these or none."""
    inputs = build(draw_, device)
    plan: Plan | None = inputs.plan(backend="reference", max_sms=draw_.max_sms)
    if plan is None:
        if not only:
            yield draw_
        return
    arch = detect(device)
    able = [x for x in kernels().values() if plan.problem.op in getattr(x, "OPS", PRODUCTS) and x.BACKEND != "reference"
            and x.supports(plan.problem, arch) is None and x.configs(plan.problem, arch) and (not only or x.NAME in only)]
    own = [3 if x.BACKEND.startswith("gluon") else 1 for x in able]
    for kernel in able if every or not able else rng.choices(able, own):
        configs = kernel.configs(plan.problem, arch)
        assert all(dispatch.illegal(kernel, plan.problem, c, arch) is None for c in configs), "a candidate is not legal"
        yield replace(draw_, kernel=kernel.NAME, config=rng.choice(configs) if rng.random() < 0.9 else None)
    if not only and (not able or rng.random() < 0.1):
        yield draw_


def likely(case: Case, only: Collection[str], device: torch.device) -> bool:
    """Whether one of the kernels `only` takes the case where its tensors lie as kernels like them; no tensor is made."""
    a, b = (Operand(f, scale_dtype=f.scale if f.scaled else "", scale_major=major if f.scaled else "")
            for f, major in ((case.a, "mn"), (case.b, "mn" if case.layout == "k_grouped" else "k")))
    shape = (case.n, case.k) if case.layout == "dense" else (case.groups, case.n, case.k)
    activations = FOLDED.get(str(case.packed), str(case.packed))
    if case.packed in FOLDED:
        b = replace(b, picks=STEP)
    if case.packed and not as_they_are(case.b, shape, "", activations):
        b = replace(b, prepack=FP8_PREPACK if case.packed == "fp8" else PREPACK, folds=case.b.element == "e2m1", scale_major="")
    rows = case.max_m if case.layout == "masked" else max(1, case.a_rows)
    k, alignment = (case.rows, case.column_alignment) if case.layout == "k_grouped" else (case.k, case.alignment)
    problem = Problem(case.op, case.layout, bucket(rows), case.n, k, case.groups, a, b, rows=bucket(max(1, case.m)),
                      out_dtype=case.out_dtype, accumulate=case.accumulate, promote=promotion(case.a, case.b), alignment=alignment)
    return any(kernels()[name].supports(problem, detect(device)) is None for name in only)


def neighbours(draw_: Draw, rng: random.Random, count: int) -> Iterator[Draw]:
    """The draw, and others that need little or no compiling after it: other rows, group sizes and values; one in four has another
    N, K and number of groups, too."""
    yield draw_
    case = draw_.case
    for _ in range(count):
        m = rng.choice([m for m in ROWS if m <= 2 * case.m])
        sizes = case.sizes if case.layout in ("dense", "k_grouped") else rng.choice(SIZES)
        near = replace(case, m=m, sizes=sizes, max_m=max(m, case.max_m) if case.layout == "masked" else 0)
        if rng.random() < 0.25:
            like = (8, 16, 64, 128, 256)
            n = rng.choice([n for n in COLUMNS if n <= 2 * case.n and all((n % x == 0) == (case.n % x == 0) for x in like)])
            k = case.k if case.k % 128 or case.layout == "k_grouped" else 128 * rng.randint(1, max(1, case.k // 64))
            groups = rng.choice([g for g in GROUPS if g <= 2 * case.groups]) if case.layout != "dense" else 1
            near = replace(near, n=n, k=k, groups=groups)
        few = rng.choice((1, 2, 7)) if rng.random() < 0.15 else draw_.max_sms       # blocks that go from tile to tile
        yield replace(draw_, case=near, seed=rng.randrange(1 << 31), values=rng.choices(list(VALUES), list(VALUES.values()))[0],
                      max_sms=few)
