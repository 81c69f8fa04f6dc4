"""A kernel's SASS as `cuobjdump -sass` lists it: instructions, the scoreboards they count on and wait for, and the flow between.

Beside an instruction's text there are two words. The second one has, from bit 46 on, the scoreboard (7: none) that is counted down
when its result is there, and from bit 52 on a bit for each of six scoreboards that have to be at zero before it is issued, whether
or not its predicate holds.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z0-9_]\S*)\s*([^;]*);\s+/\* 0x[0-9a-f]{16} \*/")
WORD = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
SCOREBOARDS = 6


@dataclass(frozen=True)
class Instruction:
    at: int
    predicate: str          # with its "!", or nothing
    name: str               # with its modifiers
    arguments: tuple[str, ...]
    scoreboard: int         # of its result, or SCOREBOARDS and above
    waits: int              # a bit a scoreboard

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def always(self) -> bool:
        return self.predicate in ("", "PT", "UPT")

    def __str__(self) -> str:
        return f"{self.at:x} {self.name} {', '.join(self.arguments)}"


def functions(listing: str) -> Iterator[list[Instruction]]:
    """The code of each function of a listing."""
    for text in re.split(r"^\s*Function : ", listing, flags=re.MULTILINE):
        code = []
        for line, below in pairwise([*text.splitlines(), ""]):
            if (found := LINE.search(line)) and (word := WORD.search(below)):
                control = int(word[1], 16)
                arguments = tuple(x.strip().replace(".reuse", "") for x in found[4].split(",")) if found[4].strip() else ()
                at, predicate, name = int(found[1], 16), found[2] or "", found[3]
                code.append(Instruction(at, predicate, name, arguments, control >> 46 & 7, control >> 52 & 63))
        if code:
            yield code


def target(i: Instruction) -> int:
    return int(re.findall(r"0x([0-9a-f]+)", ", ".join(i.arguments))[-1], 16)


def successors(code: list[Instruction]) -> list[list[int]]:
    """For each instruction the numbers of those that may follow. Where an indirect jump goes isn't known: nowhere."""
    number = {i.at: n for n, i in enumerate(code)}
    ends: dict[str, list[int]] = defaultdict(list)      # of a barrier for convergence: where threads go on together
    for i in code:
        if i.base == "BSSY":
            ends[i.arguments[0]].append(number[target(i)])
    found = []
    for n, i in enumerate(code):
        behind = [n + 1] if n + 1 < len(code) else []
        if i.base == "BRA":     # a second predicate is an argument
            goes = i.always and len(i.arguments) == 1 and ".DIV" not in i.name and ".CONV" not in i.name
            found.append([number[target(i)], *([] if goes else behind)])
        elif i.base in ("EXIT", "RET", "BRX", "JMX"):
            found.append([] if i.always else behind)
        elif i.base == "CALL" or i.name.startswith("WARPSYNC.COLLECTIVE"):
            found.append([*([number[target(i)]] if target(i) in number else []), *behind])
        elif i.base == "BSYNC" and n + 1 not in ends[i.arguments[0]]:
            found.append([*ends[i.arguments[0]], *([] if i.always else behind)] or behind)
        else:
            found.append(behind)
    return found


class Flow:
    """entries: where walks over the code begin; leaders: where they may meet or part; order: of instructions, what leads to one
    first; back: edges that close a loop; bodies: what is in a loop, by its first instruction. Instructions go by number."""

    def __init__(self, code: list[Instruction]) -> None:
        self.successors = successors(code)
        self.before: list[list[int]] = [[] for _ in code]
        for n, following in enumerate(self.successors):
            for t in following:
                self.before[t].append(n)
        self.back: set[tuple[int, int]] = set()
        self.entries: list[int] = []
        seen: dict[int, bool] = {}      # whether the walk is still behind it
        done: list[int] = []
        # what nothing is known to lead to, an indirect jump does
        for first in [0, *(n for n in range(len(code)) if not self.before[n]), *range(len(code))]:
            if first not in seen:
                self.entries.append(first)
                self._walk(first, seen, done)
        self.order = {n: len(done) - k for k, n in enumerate(done)}
        joins = {n for n in range(len(code)) if len(self.before[n]) != 1 or len(self.successors[self.before[n][0]]) != 1}
        self.leaders = joins | set(self.entries) | {t for n, s in enumerate(self.successors) if s != [n + 1] for t in s}
        self.bodies: dict[int, set[int]] = defaultdict(set)
        for n, head in self.back:
            self.bodies[head] |= self._body(n, head)

    def _walk(self, first: int, seen: dict[int, bool], done: list[int]) -> None:
        way = [(first, iter(self.successors[first]))]
        seen[first] = True
        while way:
            n, following = way[-1]
            for t in following:
                if t not in seen:
                    seen[t] = True
                    way.append((t, iter(self.successors[t])))
                    break
                if seen[t]:
                    self.back.add((n, t))
            else:
                seen[n] = False
                done.append(n)
                way.pop()

    def _body(self, last: int, head: int) -> set[int]:
        body, left = {head}, [last]
        while left:
            n = left.pop()
            if n not in body:
                body.add(n)
                left.extend(self.before[n])
        return body
