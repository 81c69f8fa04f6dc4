"""Random products against the reference: every kernel that says it can, on tensors as no suite has them.

    python -m narrowgemm.testing.fuzz cuda 60                    # a seed of its own, printed; a line a finding
    python -m narrowgemm.testing.fuzz cuda 60 --seed 7 --share 0/4
    python -m narrowgemm.testing.fuzz cuda --replay '{...}'      # a finding's line again

A `Draw` is a case, how its tensors are stored, what is in them, and a kernel with its config. What is looked for: a result that
misses the kernel gate, or a single element that is off by more than a sum can be; other bits the second time; bytes written
outside the output, the workspace or a group's rows; an error that is not ours; a device that is lost.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..arch import detect
from ..errors import Unsupported
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
from ..kernels.registry import PRODUCTS, kernels
from ..problem import Config, Plan
from ..runtime import dispatch
from .case import Case
from .fuzz_inputs import CORRUPT, VALUES, Store, build, differences, run
from .worker import FAILURES, failure

LOST = 75       # exit status: the device can't be used any more

E8M0 = FP8_1x128.with_scale("e8m0"), FP8_128x128.with_scale("e8m0")
E5M2 = {f: f.with_element("e5m2") for f in (FP8_1x128, FP8_128x128, FP8_ROW, FP8_TENSOR, MXFP8)}
# pairs of formats, and how often each is drawn
PAIRS: dict[tuple[Format, Format], int] = {
    (FP8_1x128, FP8_128x128): 8, E8M0: 2, (FP8_1x128, FP8_1x128): 1, (E5M2[FP8_1x128], FP8_128x128): 1,
    (FP8_1x128, E5M2[FP8_128x128]): 1,
    **{(a, b): 1 for a in (FP8_ROW, FP8_TENSOR) for b in (FP8_ROW, FP8_TENSOR)}, (E5M2[FP8_ROW], FP8_ROW): 1,
    (FP8_TENSOR, E5M2[FP8_TENSOR]): 1,
    (MXFP8, MXFP8): 5, (MXFP8, MXFP4): 4, (MXFP4, MXFP4): 3, (FP8_1x128, MXFP4): 4, (E8M0[0], MXFP4): 1, (BF16, MXFP4): 4,
    (FP16, MXFP4): 1, (BF16, MXFP8): 3, (FP8_1x128, MXFP8): 1, (BF16, BF16): 4, (FP16, FP16): 1,
}
COLUMNS = (1, 2, 7, 8, 9, 16, 24, 31, 63, 64, 65, 72, 104, 127, 128, 129, 136, 176, 192, 200, 256, 264, 384, 520, 576, 640, 1088,
           2112)
DEPTHS = (1, 2, 8, 16, 31, 32, 33, 48, 64, 96, 100, 112, 127, 129, 144, 160, 272, 400)
ROWS = (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 96, 100, 127, 128, 129, 160, 191, 193, 256, 300, 513, 1000)
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
    max_m = max(1, m * rng.choice((1, 1, 2, 3)) + rng.choice((0, 0, 1, 5))) if layout == "masked" else 0
    alignment = rng.choice((1, 4, 16, 64, 128, 128, 128)) if layout in ("contiguous", "psum") else 128
    return Case("fuzz", layout, groups, m, n, k, a=a, b=b, max_m=max_m, sizes="balanced" if layout == "dense" else sizes,
                out_dtype=rng.choice(("bf16", "bf16", "bf16", "fp16", "fp32")), zero_padding=rng.random() < 0.8,
                accumulate=rng.random() < 0.2, alignment=alignment,
                order=rng.choice(("sorted", "sorted", "reversed", "repeated")) if layout == "contiguous" else "sorted",
                slack=rng.choice((0, 0, 1, 7, 128, 200)) if layout in ("contiguous", "psum", "offsets") else 0, packed=packed)


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
                values=rng.choices(VALUES, (5, 2, 2, 1, 1))[0],
                corrupt=rng.choice(CORRUPT) if grouped and rng.random() < 0.1 else "",
                hint=rng.choice((0, 1, 8, 64, 100000)) if rng.random() < 0.5 else -1,
                columns=rng.choice((0, 0, 1, 128, 200)) if case.layout == "k_grouped" else 0,
                wide_index=rng.random() < 0.4, own_scales=case.layout == "k_grouped" and rng.random() < 0.3,
                max_sms=rng.choice((1, 2, 7, 64)) if rng.random() < 0.1 else 0)


def choose(draw_: Draw, rng: random.Random, device: torch.device, every: bool = False) -> Iterator[Draw]:
    """The draw with a kernel that takes it and one of its configs; `every`: with each kernel. None where no kernel takes it."""
    inputs = build(draw_, device)
    plan: Plan | None = inputs.plan(backend="reference", max_sms=draw_.max_sms)
    if plan is None:
        yield draw_
        return
    arch = detect(device)
    able = [x for x in kernels().values() if plan.problem.op in getattr(x, "OPS", PRODUCTS) and x.BACKEND != "reference"
            and x.supports(plan.problem, arch) is None and x.configs(plan.problem, arch)]
    own = [3 if x.BACKEND.startswith("gluon") else 1 for x in able]
    for kernel in able if every or not able else rng.choices(able, own):
        configs = kernel.configs(plan.problem, arch)
        assert all(dispatch.illegal(kernel, plan.problem, c, arch) is None for c in configs), "a candidate is not legal"
        yield replace(draw_, kernel=kernel.NAME, config=rng.choice(configs) if rng.random() < 0.7 else None)
    if not able or rng.random() < 0.1:
        yield draw_


def neighbours(draw_: Draw, rng: random.Random, count: int) -> Iterator[Draw]:
    """The draw, and others that need little or no compiling after it: other rows, group sizes and values."""
    yield draw_
    case = draw_.case
    for _ in range(count):
        m = rng.choice([m for m in ROWS if m <= 2 * case.m])
        sizes = case.sizes if case.layout in ("dense", "k_grouped") else rng.choice(SIZES)
        max_m = max(m, case.max_m) if case.layout == "masked" else 0
        like = (8, 16, 64, 128, 256)
        n = rng.choice([n for n in COLUMNS if n <= 2 * case.n and all((n % x == 0) == (case.n % x == 0) for x in like)])
        k = case.k if case.k % 128 or case.layout == "k_grouped" else 128 * rng.randint(1, max(1, case.k // 64))
        groups = rng.choice([g for g in GROUPS if g <= 2 * case.groups]) if case.layout != "dense" else 1
        near = replace(case, m=m, sizes=sizes, max_m=max_m, n=n, k=k, groups=groups)
        yield replace(draw_, case=near, seed=rng.randrange(1 << 31), values=rng.choices(VALUES, (5, 2, 2, 1, 1))[0])


def attempt(one: Draw, device: torch.device) -> tuple[str, list[str]]:
    """(what happened, findings): 'ok', 'refused' or 'wrong'."""
    try:
        found = run(one, device)
    except (Unsupported, ValueError, TypeError) as e:
        ours = isinstance(e, Unsupported) or ": got " in str(e) or "can't run" in str(e)
        return ("refused", []) if ours else ("wrong", [failure(e)])
    except FAILURES as e:
        return "wrong", [failure(e)]
    return ("wrong" if found else "ok"), found


def fuzz(device: torch.device, seconds: float, seed: int, variants: int = 8, trace: str = "", limit: int = 0
         ) -> Iterator[tuple[Draw, str, list[str]]]:
    """Draws with what came of each, for so many seconds. `trace`: a file that names the one that runs."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        first = draw(rng, limit or LIMIT[device.type])
        try:
            chosen = list(choose(first, rng, device))
        except (Unsupported, ValueError, TypeError) as e:
            yield first, "refused" if ": got " in str(e) or isinstance(e, Unsupported) else "wrong", [failure(e)]
            continue
        for one in chosen:
            for each in neighbours(one, rng, variants):
                if trace:
                    Path(trace).write_text(each.to_json())
                yield each, *attempt(each, device)
                if time.monotonic() > end:
                    return


def smaller(draw_: Draw, device: torch.device, tries: int = 40) -> Draw:
    """The draw made plainer, one thing after another, as long as something is found in it."""
    plain: list[dict[str, Any]] = [
        {"values": "normal"}, {"corrupt": ""}, {"a": PLAIN}, {"b": PLAIN}, {"out": PLAIN}, {"hint": -1}, {"max_sms": 0},
        {"columns": 0}, {"wide_index": False}, {"own_scales": False}, {"scale": "mn_major"}, {"config": None}]
    of_case: list[dict[str, Any]] = [
        {"accumulate": False}, {"slack": 0}, {"out_dtype": "bf16"}, {"order": "sorted"}, {"sizes": "balanced"}, {"groups": 1},
        {"groups": 2}, {"m": 1}, {"m": 16}, {"n": 128}, {"k": 128}]
    best = draw_
    for change in [*plain, *({"case": c} for c in of_case)][:tries]:
        one = replace(best, case=replace(best.case, **change["case"])) if "case" in change else replace(best, **change)
        if one == best:
            continue
        try:
            what, _ = attempt(one, device)
        except FAILURES:
            continue
        if what == "wrong":
            best = one
    return best


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m narrowgemm.testing.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("device")
    parser.add_argument("seconds", type=float, nargs="?", default=60.0)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    parser.add_argument("--share", default="0/1")
    parser.add_argument("--replay", default="")
    parser.add_argument("--only", default="")
    parser.add_argument("--trace", default="")
    parser.add_argument("--variants", type=int, default=8)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--steps", action="store_true")
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    if given.steps:
        return steps(given, device)
    if given.replay:
        one = Draw.from_json(given.replay)
        what, found = attempt(one, device)
        print(what, found, *differences(one, device), sep="\n", flush=True)
        return int(what == "wrong")
    which, _, of = given.share.partition("/")
    seed = given.seed * int(of) + int(which)
    print(f"seed {seed}", flush=True)
    counts: Counter[str] = Counter()
    by: Counter[str] = Counter()
    faulthandler.dump_traceback_later(60, exit=True)
    for one, what, found in fuzz(device, given.seconds, seed, given.variants, given.trace, given.limit):
        faulthandler.dump_traceback_later(45, exit=True)    # a kernel that hangs: the last line says which
        counts[what] += 1
        by[f"{one.kernel or 'auto'} {what}"] += 1
        if what == "wrong":
            print(f"WRONG {'; '.join(found)[:600]}\n  {one.to_json()}", flush=True)
            if lost(device):
                print("the device is lost", flush=True)
                return LOST
    print(f"seed {seed}: {dict(counts)}; {dict(sorted(by.items()))}", flush=True)
    return int(counts["wrong"] > 0)


def steps(given: argparse.Namespace, device: torch.device) -> int:
    """`fuzz_steps` in place of products."""
    from . import fuzz_steps

    def once(op: str, seed: int) -> list[str]:
        try:
            return fuzz_steps.run(op, seed, device)
        except (Unsupported, ValueError, TypeError) as e:
            return [] if isinstance(e, Unsupported) or ": got " in str(e) else [failure(e)]
        except FAILURES as e:
            return [failure(e)]

    if given.replay:
        one = json.loads(given.replay)
        print(*once(one["op"], one["seed"]), sep="\n", flush=True)
        return 0
    which, _, of = given.share.partition("/")
    seed = given.seed * int(of) + int(which)
    print(f"seed {seed}", flush=True)
    rng, end, counts = random.Random(seed), time.monotonic() + given.seconds, Counter[str]()
    names = [x for x in fuzz_steps.OPS if not given.only or x in given.only.split(",")]
    while time.monotonic() < end:
        faulthandler.dump_traceback_later(60, exit=True)
        op, number = rng.choice(names), rng.randrange(1 << 31)
        if given.trace:
            Path(given.trace).write_text(json.dumps({"op": op, "seed": number}))
        found = once(op, number)
        counts[f"{op} {'wrong' if found else 'ok'}"] += 1
        if found:
            print(f"WRONG {'; '.join(found)[:600]}\n  {json.dumps({'op': op, 'seed': number})}", flush=True)
            if lost(device):
                print("the device is lost", flush=True)
                return LOST
    print(f"seed {seed}: {dict(sorted(counts.items()))}", flush=True)
    return int(any(k.endswith("wrong") for k in counts))


def lost(device: torch.device) -> bool:
    """Whether the device answers no more."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
