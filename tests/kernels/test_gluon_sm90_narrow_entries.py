"""Entries that a block of the Hopper prefill kernel for narrow weights finds by itself, and the order in which its producer asks for
K blocks, on the CPU, emulated (tests/_gluon)."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from narrowgemm.kernels.gluon.sm90.fp8_block_tile import LAYOUTS

from .. import _gluon as emu

BT = 32
# sizes of groups, or where they start, and rows that a masked group can hold, or that A has
INDEX = {"masked": ([3, 0, 40, 200, -5, 32, 1], 96), "many groups": ([0, 1, 33] * 40, 64), "offsets": ([0, 3, 3, 80, 70, 300, 310], 305),
         "nothing": ([0, 0, 0], 8), "dense": ([0], 77)}


@pytest.fixture(scope="module")
def entries_device() -> types.ModuleType:
    return emu.load_device_module("narrow_entries_device")


def layout_of(name: str) -> str:
    return name if name in LAYOUTS else "masked"


def expected(name: str) -> list[tuple[int, int, int]]:
    """(expert, first position, tokens) of every entry."""
    index, room = INDEX[name]
    if layout_of(name) == "offsets":
        starts = [min(max(i, 0), room) for i in index]
        groups = [(a, max(b - a, 0)) for a, b in zip(starts, starts[1:])]
    elif name == "dense":
        groups = [(0, room)]
    else:
        groups = [(g * room, min(max(n, 0), room)) for g, n in enumerate(index)]
    return [(e, first + i, min(BT, rows - i)) for e, (first, rows) in enumerate(groups) for i in range(0, rows, BT)]


@pytest.mark.parametrize("name", INDEX)
def test_entries_of_a_block(name: str, entries_device: types.ModuleType) -> None:
    index, room = INDEX[name]
    layout, want = layout_of(name), expected(name)
    groups = len(index) - (layout == "offsets")
    cfg = types.SimpleNamespace(GROUPS=128 if groups > 32 else 32, BT=BT, LAYOUT=LAYOUTS[layout])
    found: list[tuple[Any, ...]] = []

    def kernel(index_ptr: emu.Pointer, groups: Any, room: Any) -> None:
        table = emu.allocate_shared_memory(emu.int32, [cfg.GROUPS], None)
        entries_device.sum_up(table, index_ptr, groups, room, cfg)
        sums = entries_device.entry_sums(table, cfg, 4)
        assert int(emu.raw(sums).max()) == len(want)
        for b in range(len(want) + 2):
            live = b < len(want)
            found.append((live, *(int(emu.raw(x)) for x in entries_device.entry_at(b, live, sums, index_ptr, groups, room, cfg, 4))))

    emu.launch(kernel, 1, emu.Pointer(np.asarray(index, np.int64 if layout == "offsets" else np.int32)), groups, room)
    assert [x[1:] for x in found if x[0]] == want
    assert all(tokens <= 0 for live, *_, tokens in found if not live)


@pytest.mark.parametrize(("ahead", "blocks", "box"), [(True, 5, 1), (True, 2, 1), (False, 5, 1), (True, 9, 2), (True, 3, 2), (False, 8, 2)])
def test_producer_asks_for_the_first_weights_ahead(ahead: bool, blocks: int, box: int) -> None:
    """Every K block of every tile once, or pair of them, in order, a slot of the ring after the other, each behind a wait for it; tokens
    behind the launch in front, weights of as many blocks as the ring has slots before that. Each tile is announced
    before the first tokens of the one before it are asked for, and behind the last one that there is none."""
    kb = -(-blocks // box)
    module = emu.load_device_module("narrow_prefill_device")
    stages, tiles, programs = 3, 4, 5
    want = expected("masked")
    cfg = types.SimpleNamespace(AHEAD=ahead, GROUPS=32, BT=BT, LAYOUT=LAYOUTS["masked"], UNITS=2, STAGES=stages, BOX=box,
                                WIDTHS=((8, 0), (16, 0), (32, 0)))
    table = np.zeros(16 + 3 * 64, np.int32)
    table[0], table[16:].reshape(3, 64)[:, :len(want)] = len(want), np.array(want).T
    index, room = INDEX["masked"]
    log: list[tuple[Any, ...]] = []

    def number(*xs: Any) -> tuple[int, ...]:
        return tuple(int(emu.raw(x)) for x in xs)

    given = module.producer.__globals__
    given["mbarrier"] = types.SimpleNamespace(wait=lambda bar, phase: log.append(("wait", *number(bar, phase))))
    given["gdc_wait"] = lambda: log.append(("launch in front", ))
    given["load_weights"] = lambda descs, rings, full, slot, unit, k, cfg: log.append(("weights", *number(slot, unit, k)))
    given["load_activations"] = lambda descs, rings, full, slot, first, k, cfg, p, q: log.append(("tokens", *number(slot, first, k), p))
    given["advance"] = lambda slot, phase, stages: ((slot + 1) % stages, phase ^ ((slot + 1) // stages))

    taken = iter(range(10**6))
    given["number_after"].__globals__["take"] = lambda counter: next(taken)
    given["announce"] = lambda i, tile, cfg: log.append(("announced", *number(i, *tile)))

    class Slots:
        def index(self, i: Any) -> Any:
            return i

    def kernel(index_ptr: emu.Pointer, blocks: Any, tiles: Any, cap: Any, groups: Any) -> None:
        sums = emu.allocate_shared_memory(emu.int32, [32], None)
        if ahead:
            given["sum_up"](sums, index_ptr, groups, cap, cfg)
        module.producer((), (), (None, Slots()), sums, index_ptr, None, (blocks, 2 * tiles, None, None, cap, groups), cfg)

    seen = []
    for program in range(programs):
        log.clear()
        block = emu.Block(program)
        emu.start(block, (program, programs))
        try:
            kernel(*emu.arguments((emu.Pointer(np.asarray(index, np.int32) if ahead else table), blocks, tiles, room if ahead else 64, len(index))))
        finally:
            block.end()
        at = {kind: [i for i, x in enumerate(log) if x[0] == kind] for kind in ("weights", "tokens", "announced")}
        weights, tokens, told = ([log[i] for i in places] for places in at.values())
        assert [x[1] for x in weights] == [x[1] for x in tokens] == [i % stages for i in range(len(tokens))]
        assert [x[1:] for x in log if x[0] == "wait"] == [(i % stages, 1 ^ i // stages % 2) for i in range(len(tokens))]
        if ahead:
            front = log.index(("launch in front", ))
            early = min(kb, stages) if tokens else 0
            assert log[:front] == weights[:early] and not any(x[0] == "launch in front" for x in log[front + 1:])
        assert len(weights) == len(tokens) and len(tokens) % kb == 0
        for i, (w, x) in enumerate(zip(weights, tokens)):
            assert w[3] == x[3] == i % kb and at["weights"][i] < at["tokens"][i]
        assert [x[1] for x in told] == list(range(1, 1 + len(tokens) // kb))
        for place, now, x, after in zip(at["announced"], at["tokens"][::kb], told, [*tokens[kb::kb], None]):
            assert place < now and (x[5] <= 0 if after is None else (x[4], x[5] > 0) == (after[2], True))
        for w, x in zip(weights[::kb], tokens[::kb]):
            seen.append((w[2] // (2 * tiles), w[2] % (2 * tiles) // 2, x[2], x[4]))
    assert sorted(seen) == sorted((e, n, first, next(p for p, _ in cfg.WIDTHS if p >= rows)) for e, first, rows in want for n in range(tiles))
