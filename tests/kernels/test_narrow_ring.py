"""The copies of a ring step of the Hopper kernel for few tokens, run from their PTX for every thread: what they read, and where it goes."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest

W, S, SHARED = 1 << 40, 1 << 41, 1024       # addresses: weights, scale fields, shared memory
EVICT_FIRST = 0x12F0000000000000            # what `createpolicy.fractional.L2::evict_first.b64` makes for all of an access
TOKENS = 8192                               # bytes of the ring in front of the weights
OPS = {"mov": lambda a: a, "mad": lambda a, b, c: a * b + c, "mul": lambda a, b: a * b, "add": lambda a, b: a + b, "xor": lambda a, b: a ^ b,
       "shr": lambda a, b: a >> b, "shl": lambda a, b: a << b, "and": lambda a, b: a & b}


@lru_cache(maxsize=64)
def lines_of(code: str) -> list[tuple[str, list[str], str, list[str]]]:
    """(guard, operation in parts, destination, operands) of each instruction."""
    out = []
    for line in (x.strip() for x in code.strip().strip("{}").split(";")):
        if line and not line.startswith(".reg"):
            guard = re.match(r"@(\w+) ", line)
            op, _, rest = line[guard.end() if guard else 0:].partition(" ")
            to, *names = (x.strip() for x in rest.split(","))
            out.append((guard[1] if guard else "", op.split("."), to, names))
    return out


def run(code: str, thread: int, **given: int) -> list[tuple[int, int | None]]:
    """(address in shared memory, address read or None for zeros) of every copy of 16 bytes that a thread makes; `_1` is $1. Without
    any, what $0 is left with."""
    values: dict[str, int] = {"%tid.x": thread, "%laneid": thread % 32} | {k.replace("_", "$"): v for k, v in given.items()}
    copies: list[tuple[int, int | None]] = []

    def value(name: str) -> int:
        return values[name] if name in values else int(name, 0)

    for guard, op, to, names in lines_of(code):
        if guard and not values[guard]:
            continue
        if op[0] == "cp":
            assert names[1] == "16"
            at, source = (sum(value(x.strip()) for x in where.strip("[]").split("+")) for where in (to, names[0]))
            left_out = [values[n] for n in names[2:] if n != "policy"]
            assert (names[-1] == "policy" and values["policy"] == EVICT_FIRST) == ("L2::cache_hint" in op)
            copies.append((at, None if any(left_out) else source))
            continue
        x = [value(n) for n in names]
        if op[0] == "setp":
            found = {"le": x[0] <= x[1], "lt": x[0] < x[1], "ge": x[0] >= x[1], "ne": x[0] != x[1]}[op[1]]
            values[to] = found or bool(x[2]) if op[2] == "or" else found
        else:
            values[to] = OPS[op[0]](*x)
    return copies or [(values["$0"], None)]


def place(code: str, thread: int, **given: int) -> int:
    """What `code` leaves in $0 for a thread."""
    return run(code, thread, **given)[0][0]


@pytest.mark.parametrize(("rows", "chunks_a_step", "e4m3"), [(64, 4, False), (64, 2, False), (128, 4, False), (128, 2, False), (64, 2, True),
                                                           (128, 2, True)])
@pytest.mark.parametrize(("chunks", "tiles", "stream"), [(8, 4, False), (7, 3, True)])
def test_every_byte_of_a_step_comes_once_to_its_place(rows: int, chunks_a_step: int, e4m3: bool, chunks: int, tiles: int, stream: bool) -> None:
    from narrowgemm.kernels.gluon.sm90 import narrow_ring_device as ring

    units, ch, per = rows // 64, chunks_a_step, 2 if e4m3 else 1
    even = chunks % ch == 0 and tiles % units == 0
    w_at, pairs, threads = TOKENS, -(-chunks // 2), 2 * rows
    s_at = w_at + 3 * ch * per * rows * 64
    code = ring.weights_code(rows, ch, ch * per, w_at, s_at, even, stream)
    for nt, k in ((0, 0), (-(-tiles // units) - 1, -(-chunks // ch) - 1)):
        slot = (nt + k) % 3
        tile, chunk = 2 * tiles + nt * units, k * ch        # of expert 2
        got: dict[int, int | None] = {}
        for t in range(threads):
            made = run(code, t, _1=place(ring.weights_at_code(), t, _1=W), _2=place(ring.fields_at_code(units), t, _1=S, _2=pairs),
                       _3=SHARED + 16 * t, _4=tile * chunks + chunk, _5=tile * pairs + chunk // 2, _6=slot, _7=chunks - chunk,
                       _8=tiles - nt * units, _9=chunks)
            assert not set(got) & {to for to, _ in made}
            got |= dict(made)
        want: dict[int, int | None] = {}
        for u in range(units):
            there = nt * units + u < tiles
            for c in range(ch):
                for i in range(0, 4096 * per, 16):      # the ring has a chunk's units of 64 x 64 bytes of one tile beside the other's
                    box = (c * per + i // 4096) * units + u
                    at = SHARED + w_at + slot * ch * per * rows * 64 + box * 4096 + i % 4096
                    want[at] = W + ((tile + u) * chunks + chunk + c) * 4096 * per + i if there and chunk + c < chunks else None
            for pair in range(ch // 2):
                for i in range(0, 512, 16):
                    at = SHARED + s_at + slot * ch * rows * 4 + (pair * units + u) * 512 + i
                    want[at] = S + ((tile + u) * pairs + chunk // 2 + pair) * 512 + i if there and chunk + 2 * pair < chunks else None
        assert got == want


@pytest.mark.parametrize(("tokens", "rows", "columns", "warps"), [(8, 8, 512, 4), (16, 16, 256, 4), (16, 32, 256, 4), (32, 32, 256, 8), (8, 8, 512, 8)])
def test_rows_of_tokens_are_swizzled_as_wgmma_reads_them(tokens: int, rows: int, columns: int, warps: int) -> None:
    from narrowgemm.kernels.gluon.sm90 import narrow_ring_device as ring

    got = {}
    for t in range(32 * warps):
        first = place(ring.place_code(rows), t, _1=SHARED)
        for i in range(-(-tokens // warps)):        # `places`: row w + warps * i
            row = t // 32 + warps * i
            to = (first ^ (i * warps % 8 * 16)) + i * warps * 128
            for at, source in run(ring.rows_code(rows, columns), t, _1=row * 4096 + t % 32 * 8, _2=to, _3=W, _4=int(row < tokens)):
                got[at] = source
    want = {}
    for row in range(tokens):
        for c in range(0, columns, 8):
            at = SHARED + c // 64 * rows * 128 + row * 128 + (c % 64 // 8 ^ row % 8) * 16
            want[at] = W + 2 * (row * 4096 + c)
    assert got == want


def test_a_row_that_is_not_there_is_not_copied() -> None:
    from narrowgemm.kernels.gluon.sm90 import narrow_ring_device as ring

    assert all(source is None for _, source in run(ring.rows_code(8, 512), 5, _1=0, _2=SHARED, _3=W, _4=0))
