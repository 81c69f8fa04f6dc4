"""Loads from a ring's slot that may still be on their way when the slot is given back, in SASS.

A consumer reads a slot by LDS and LDSM, and then arrives at the slot's barrier; TMA may write the slot from then on. Of a
consumer of several warps one thread arrives, behind a BAR of them all, which waits for no scoreboard: a load that no
instruction in front of the BAR has waited for may be performed when another tile's bytes are there. In `narrow_prefill` it
was, in one of 300 replays of a graph, by any warp but the one that arrives. Where every warp arrives for itself, what counts
is what that warp has not waited for; no value has been seen to be wrong there. Nor does it matter where a slot is filled by
another warp's stores, as scales of `fp8_decode` and `mx8_decode` are: an SM's loads and stores of shared memory pass in
order, and ptxas leaves loads on their way across any BAR.

Found by data flow over a kernel's code. Loads on their way are told by scoreboards: shared memory answers a warp in order, so
waiting for a load is waiting for all in front of it. That one thread arrives for all is told by a BAR with no load or wait
for a barrier behind it: Triton puts it right in front. That a load is of the slot which is given back is told by values: the
last barrier that was waited for in front of it is at the same place as the one arrived at, but for the constant between the
two rings of barriers, or both addresses have a multiple of the same number in them. Where neither can be told, the load
counts as one of that slot.
"""

from __future__ import annotations

import heapq
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tests._sass_flow import SCOREBOARDS, Flow, Instruction, functions
from tests._sass_values import Registers, Values, written

ARRIVAL = re.compile(r"SYNCS\.ARRIVE\.TRANS64(\.RED)?\.A1T0")   # with no bytes to come
MOST = 63       # that a scoreboard counts

Place = tuple[tuple[int, ...], int]     # of a barrier: values and a constant


@dataclass(frozen=True)
class Load:
    """behind: for each scoreboard, loads that count on it, of this one and those issued since; waited: for this place in front of
    it; terms: of its address."""

    behind: tuple[int, ...]
    waited: Place | None            # None: not the same on every way
    terms: frozenset[int] | None


@dataclass(frozen=True)
class Late:
    """An arrival, and loads of its slot that may be on their way; barrier: at the BAR in front of it, else at the arrival."""

    arrival: Instruction
    barrier: bool
    loads: tuple[Instruction, ...]

    def __str__(self) -> str:
        return f"{self.arrival} {'behind a barrier' if self.barrier else 'of each warp'}: {'; '.join(map(str, self.loads))}"


@dataclass
class State:
    """flying: loads on their way, by address; barrier: those at the last BAR, None where a load or a wait for a slot is behind it;
    waited: the place waited for last."""

    registers: Registers = field(default_factory=dict)
    flying: dict[int, Load] = field(default_factory=dict)
    barrier: dict[int, Load] | None = None
    waited: Place | None = None

    def copy(self) -> State:
        return State(dict(self.registers), dict(self.flying), None if self.barrier is None else dict(self.barrier), self.waited)


def same(one: Load, other: Load) -> Load:
    """What holds of both."""
    return Load(tuple(map(min, one.behind, other.behind)), one.waited if one.waited == other.waited else None,
                one.terms if one.terms == other.terms else None)


def both(one: dict[int, Load], other: dict[int, Load]) -> dict[int, Load]:
    return {**one, **{at: same(load, one.get(at, load)) for at, load in other.items()}}


class Walk:
    """States over a function's code, and what they say of its arrivals."""

    def __init__(self, code: list[Instruction]) -> None:
        self.code, self.flow, self.values = code, Flow(code), Values()
        self.changed = {head: {r for n in body for r in written(code[n])} for head, body in self.flow.bodies.items()}
        self.arrivals: dict[int, tuple[State, Place]] = {}
        self.waits: dict[int, Place] = {}
        self._run()

    def late(self) -> list[Late]:
        by_address = {i.at: i for i in self.code}
        found = []
        for at, (state, place) in sorted(self.arrivals.items()):
            flying = {**(state.barrier or {}), **state.flying}
            loads = tuple(by_address[x] for x, load in sorted(flying.items()) if self._of_slot(load, place))
            found.append(Late(by_address[at], state.barrier is not None, loads))
        return found

    def _of_slot(self, load: Load, place: Place) -> bool:
        """Whether a load may be of the slot that an arrival at `place` gives back."""
        values, constant = place
        if load.waited is not None and load.waited[0] == values:
            between = self._between(values)
            return between is None or load.waited[1] + between == constant
        terms = self._terms(values)
        return not load.terms or not terms or not load.terms.isdisjoint(terms)

    def _between(self, values: tuple[int, ...]) -> int | None:
        """From a slot's full barrier to its empty one, of slots that differ by constants: the only constant by which all arrivals are at
        places that are waited for."""
        waits = {c for v, c in self.waits.values() if v == values}
        arrivals = {c for _, (v, c) in self.arrivals.values() if v == values}
        found = {min(arrivals) - w for w in waits}
        fit = [d for d in found if {c - d for c in arrivals} <= waits]
        return fit[0] if len(fit) == 1 else None

    def _terms(self, values: tuple[int, ...]) -> frozenset[int]:
        return frozenset().union(*(self.values.terms[v] for v in values))

    def _run(self) -> None:
        coming: dict[int, dict[int, State]] = defaultdict(dict)
        known: dict[int, State] = {}
        waiting = [(self.flow.order[n], n) for n in self.flow.entries]
        for n in self.flow.entries:
            coming[n][-1] = State()
        heapq.heapify(waiting)
        while waiting:
            _, n = heapq.heappop(waiting)
            state = self._joined(n, coming[n])
            if state is None or known.get(n) == state:
                continue
            known[n] = state.copy()
            while True:
                self._step(self.code[n], state)
                following = self.flow.successors[n]
                if following != [n + 1] or n + 1 in self.flow.leaders:
                    break
                n += 1
            for t in following:
                out = self._aged(state, n, t) if (n, t) in self.flow.back else state.copy()
                if coming[t].get(n) != out:
                    coming[t][n] = out
                    heapq.heappush(waiting, (self.flow.order[t], t))

    def _joined(self, n: int, coming: dict[int, State]) -> State | None:
        """Of what comes to an instruction; to one that begins a loop, with other values in all that the loop writes."""
        at = self.code[n].at
        state: State | None = None
        for first in (True, False):
            for source, other in coming.items():
                if ((source, n) in self.flow.back) == first:
                    continue
                if state is None:
                    if not first:
                        return None
                    state = other.copy()
                else:
                    state = self._join(state, other, at, values=first)
            if first and state is not None:
                state.registers |= {r: self.values.joined(at, r) for r in self.changed.get(n, ())}
        return state

    def _join(self, one: State, other: State, at: int, values: bool) -> State:
        registers = one.registers
        if values:
            names = one.registers.keys() | other.registers.keys()
            pairs = {r: (self.values.of(one.registers, r), self.values.of(other.registers, r)) for r in names}
            registers = {r: a if a == b else self.values.joined(at, r) for r, (a, b) in pairs.items()}
        barriers = [x for x in (one.barrier, other.barrier) if x is not None]
        barrier = both(*barriers) if len(barriers) == 2 else barriers[0] if barriers else None
        return State(registers, both(one.flying, other.flying), barrier, one.waited if one.waited == other.waited else None)

    def _aged(self, state: State, last: int, head: int) -> State:
        """At the end of a loop's trip: values that the next one makes anew under the same numbers say nothing there."""
        begin, end = self.code[head].at, self.code[last].at

        def old(numbers: Iterable[int]) -> bool:
            return any(begin <= at <= end for v in numbers for at in self.values.varies[v])

        def place(x: Place | None) -> Place | None:
            return None if x is None or old(x[0]) else x

        def aged(loads: dict[int, Load]) -> dict[int, Load]:
            return {at: replace(x, waited=place(x.waited), terms=None if x.terms is None or old(x.terms) else x.terms)
                    for at, x in loads.items()}

        barrier = None if state.barrier is None else aged(state.barrier)
        return State(dict(state.registers), aged(state.flying), barrier, place(state.waited))

    def _step(self, i: Instruction, state: State) -> None:
        self._come(state, [(k, 0) for k in range(SCOREBOARDS) if i.waits >> k & 1])
        if i.base == "DEPBAR":
            text = ", ".join(i.arguments)
            some = [(int(k), int(left, 16)) for k, left in re.findall(r"SB(\d), (0x[0-9a-f]+)", text)]
            self._come(state, some + [(int(k), 0) for group in re.findall(r"\{([\d, ]+)\}", text) for k in group.split(",")])
        if ARRIVAL.match(i.name):
            self.arrivals[i.at] = state.copy(), self.values.address(i, state.registers)
        if i.name.startswith(("BAR.SYNC", "BAR.RED")):
            state.barrier = dict(state.flying)
        if i.name.endswith("TRYWAIT"):
            state.waited, state.barrier = self.values.address(i, state.registers), None
            self.waits[i.at] = state.waited
        if i.base in ("LDS", "LDSM", "SHFL"):
            self._load(i, state)
        self.values.write(i, state.registers)

    def _come(self, state: State, waits: list[tuple[int, int]]) -> None:
        """Waits until at most so many are left on scoreboards."""
        for k, left in waits:
            state.flying = {at: x for at, x in state.flying.items() if x.behind[k] <= left}

    def _load(self, i: Instruction, state: State) -> None:
        """Of one that may not be issued nothing is known but that itself waits."""
        if i.always and i.scoreboard < SCOREBOARDS:
            for at, x in state.flying.items():
                more = min(x.behind[i.scoreboard] + 1, MOST)
                state.flying[at] = replace(x, behind=(*x.behind[:i.scoreboard], more, *x.behind[i.scoreboard + 1:]))
        if i.base != "SHFL" and i.arguments[0] != "RZ":
            behind = tuple(int(k == i.scoreboard) for k in range(SCOREBOARDS))
            state.flying[i.at] = Load(behind, state.waited, self._terms(self.values.address(i, state.registers)[0]))
            state.barrier = None


def arrivals(listing: str) -> list[Late]:
    """Every arrival at a slot's barrier in a listing, with the loads that are late for it, mostly none."""
    return [late for code in functions(listing) for late in Walk(code).late()]
