"""The order of work of the Hopper kernel for few tokens, run on the CPU: its control flow as it stands in the device module, with
copies and products that only say what they would touch."""

from __future__ import annotations

import inspect
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import narrowgemm.kernels.gluon.sm90 as sm90

TABLE, CAP = 1000, 64       # an address, and the entries that a column of the table holds


class Log:
    """What one block does: `copied` and `computed` steps as (expert, tile, K step), `pieces` as (first block, pieces, own)."""

    def __init__(self) -> None:
        self.weights: list[tuple] = []
        self.tokens: list[tuple] = []
        self.computed: list[tuple] = []
        self.stored: list[tuple] = []
        self.pieces: list[tuple] = []
        self.tops: list[tuple] = []


def module(log: Log, table: list[tuple[int, int, int]], program: int, programs: int) -> dict[str, Any]:
    """The device module's functions over Python integers."""
    def load(p: Any, mask: Any = True, other: Any = 0, **_: Any) -> Any:
        if p == TABLE:
            return len(table)
        column, row = divmod(p - TABLE - 16, CAP)
        return table[row][column] if mask else other

    gl = types.SimpleNamespace(
        constexpr=lambda x: x, where=lambda c, a, b: a if c else b, minimum=min, maximum=max, cdiv=lambda a, b: -(-a // b), to_tensor=lambda x: x,
        static_range=range, load=load, program_id=lambda _: program, num_programs=lambda _: programs, zeros=lambda *_: 0,
        float32=None, uint8=None, int8=None, int32=None, int64=None, bfloat16=None, float8e4nv=None, allocate_shared_memory=lambda *_: None,
        **{n: (lambda *a, **k: None) for n in ("NVMMADistributedLayout", "SliceLayout", "BlockedLayout", "SwizzledSharedLayout",
                                               "NVMMASharedLayout")})
    source = Path(sm90.__path__[0], "narrow_device.py").read_text()
    body = "\n".join(line for line in source.split("\n\n\n", 1)[1].splitlines() if not line.startswith("@gluon"))
    names: dict[str, Any] = {"gl": gl, "HEAD": 16, "gdc_wait": lambda: None, "block_barrier": lambda: None,
                             "fence_async_shared": lambda: None, "warpgroup_mma_wait": lambda n, deps: deps[0], "FLAT": None,
                             "BYTES": None, "first_place": lambda *_: None, "view_as": lambda *_: None, "wait": lambda n: None,
                             "commit": lambda: None}
    exec(compile(body, "narrow_device", "exec"), names)

    def issue_weights(weights, e, nt, k, slot, *_: Any) -> None:
        log.weights.append((e, nt, k, slot))

    def issue_tokens(x, xs, xo, live, k, slot, *_: Any) -> None:
        log.tokens.append((xo, live, k, slot))

    def multiply(acc, rings, slot, *_: Any):
        log.computed.append(slot)
        return acc + 1

    def tile_tops(ptr, e, nt, tiles, cfg) -> tuple:
        return e, nt

    def multiply8(acc, rings, slot, tops, tables, cfg):
        log.tops.append(tops)
        return multiply(acc, rings, slot)

    def leave(acc, part, count, piece, first_cta, *_: Any) -> int:
        log.pieces.append((first_cta, piece, acc))
        return -1

    def vectors(e, nt, slots, *_: Any) -> tuple:
        return e, nt, slots

    def finish(acc, nt, slots, given, *_: Any) -> None:
        assert given[1:] == (nt, slots)
        log.stored.append((*given, acc))

    names |= {"tile_tops": tile_tops, "lane_table": lambda: None, "X8_TILE": None, "issue_weights": issue_weights, "issue_tokens": issue_tokens, "multiply": multiply, "multiply8": multiply8, "leave": leave, "vectors": vectors, "finish": finish,
              "load_slots": lambda p, first, rows, cfg, layout: (first, rows), "x_offsets": lambda slots, *_: (slots, 1)}
    return names


@pytest.mark.parametrize("kind", ("gathered", "in order", "dense"))
@pytest.mark.parametrize(("entries", "tiles", "steps", "programs", "stages", "quantum"), [
    (3, 5, 4, 7, 2, 1), (1, 3, 6, 8, 3, 1), (9, 4, 3, 5, 4, 1), (2, 2, 2, 30, 2, 1), (5, 1, 7, 3, 3, 7), (0, 4, 4, 4, 2, 1),
    (4, 45, 6, 132, 2, 1), (40, 3, 2, 16, 3, 2)])
def test_every_step_once_and_what_is_copied_is_what_is_computed(entries, tiles, steps, programs, stages, quantum, kind):
    """`quantum`: steps that a block's stretch is a multiple of. `kind`: slots are looked up, or follow from positions; dense: so do
    the entries of the one expert, and nothing is read of a table."""
    table = [(100 + b, 10 * b, 1 + b % 7) for b in range(entries)]
    if kind == "dense":
        table = [(0, 8 * b, 8 if b < entries - 1 else 3) for b in range(entries)]
    cfg = types.SimpleNamespace(BT=8, STAGES=stages, ROWS=64, CW=1, CH=1, PDL=True, XSCALE=False, DOUBLE=False, WAYS=4,
                                SLOTS=kind == "gathered", DENSE=kind == "dense", EARLY=stages == 2, FP8=stages == 3, W_BOX=0, S_BOX=0, RING_ROWS=0)
    done: Counter = Counter()
    sums: Counter = Counter()
    places: set[int] = set()
    for program in range(programs):
        log = Log()
        names = module(log, table, program, programs)
        kernel = names["narrow_kernel"]
        given = {"table_ptr": TABLE, "NT": tiles, "KB": steps, "KC": steps, "R": max(0, 8 * entries - 5), "a_div": 1, "cap": CAP, "quantum": quantum,
                 "N": 64 * tiles, "KX": 64, "som": 64, "cfg": cfg}
        if kind == "dense":
            names["gl"].load = None
        kernel(**dict.fromkeys(inspect.signature(kernel).parameters) | given)
        assert [(x[2], x[3]) for x in log.weights] == [(k, slot) for _, _, k, slot in log.tokens]
        assert [x[3] for x in log.weights] == log.computed == [i % stages for i in range(len(log.weights))]
        # a dense entry is told by its tokens
        log.weights = [(tokens[0] if kind == "dense" else e, *rest) for (e, *rest), (tokens, *_) in zip(log.weights, log.tokens)]
        log.stored = [(slots[0] if kind == "dense" else e, nt, slots, acc) for e, nt, slots, acc in log.stored]
        rows = {first if kind == "dense" else e: (first, n) for e, first, n in table}
        assert all(tokens == rows[e] and live for (e, *_), (tokens, live, *_) in zip(log.weights, log.tokens))
        runs: list[list[tuple]] = []
        for e, nt, k, _ in log.weights:
            done[e, nt, k] += 1
            if runs and runs[-1][0] == (e, nt):
                runs[-1].append((e, nt))
            else:
                runs.append([(e, nt)])
        whole = [r for r in runs if len(r) == steps]
        assert [(e, nt, rows[e], steps) for (e, nt), *_ in whole] == log.stored
        assert log.tops == ([(0 if kind == "dense" else e, nt) for run in runs for e, nt in run] if cfg.FP8 else [])
        assert len(log.pieces) == len(runs) - len(whole) <= 2
        for first, piece, acc in log.pieces:
            sums[first] += acc
            assert piece not in places and piece // 2 == program
            places.add(piece)
    assert done == Counter({(first if kind == "dense" else e, nt, k): 1 for e, first, _ in table for nt in range(tiles) for k in range(steps)})
    assert all(n == steps for n in sums.values())          # the pieces that one counter counts are one whole tile
