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
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..errors import Unsupported
from .fuzz_checks import differences, run
from .fuzz_draw import LIMIT, PLAIN, Draw, choose, draw, likely, neighbours
from .worker import FAILURES, failure

LOST = 75       # exit status: the device can't be used any more


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


def fuzz(device: torch.device, seconds: float, seed: int, variants: int = 8, trace: str = "", limit: int = 0,
         only: Collection[str] = ()) -> Iterator[tuple[Draw, str, list[str]]]:
    """Draws with what came of each, for so many seconds. `variants`: neighbours of a draw. `trace`: a file that names the one that
    runs. `limit`: multiply-adds of a case. `only`: these kernels."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        first = draw(rng, limit or LIMIT[device.type])
        if only and not likely(first.case, only, device):
            continue
        try:
            chosen = list(choose(first, rng, device, only=only))
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
    for one, what, found in fuzz(device, given.seconds, seed, given.variants, given.trace, given.limit,
                                tuple(x for x in given.only.split(",") if x)):
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

    def once(op: str, seed: int) -> tuple[str, list[str]]:
        try:
            found = fuzz_steps.run(op, seed, device)
        except (Unsupported, ValueError, TypeError) as e:
            return ("refused", []) if isinstance(e, Unsupported) or ": got " in str(e) else ("wrong", [failure(e)])
        except FAILURES as e:
            return "wrong", [failure(e)]
        return "wrong" if found else "ok", found

    if given.replay:
        one = json.loads(given.replay)
        what, found = once(one["op"], one["seed"])
        print(what, *found, sep="\n", flush=True)
        return int(what == "wrong")
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
        what, found = once(op, number)
        counts[f"{op} {what}"] += 1
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
