"""Which registers of a kernel's SASS hold the same value: it has a number, the same wherever it is made the same way of the same."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable

from tests._sass_flow import Instruction

REGISTER = re.compile(r"\b(?:UR|R|UP|P)(?:\d+|Z|T)\b")
NAME = re.compile(r"(UR|R|UP|P)(\d+)")
WRITES_NOTHING = {"STS", "STG", "STL", "ST", "STSM", "RED", "BAR", "BRA", "EXIT", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "LDGSTS",
                  "R2P", "UTMALDG", "UTMASTG", "UBLKCP", "NOP", "MEMBAR", "FENCE", "ERRBAR", "CCTL"}
# what is read may have changed since
READS = {"LDS", "LDSM", "LDG", "LDL", "LD", "SHFL", "ATOMS", "ATOMG", "ATOM", "SYNCS", "REDUX", "VOTE", "VOTEU", "MATCH",
         "QGMMA", "HGMMA", "IGMMA"}
COPIES = {"MOV", "UMOV", "R2UR", "IMAD.U32", "IMAD.MOV.U32", "IMAD.MOV"}
SUMS = {"IADD3", "UIADD3", "VIADD"}
LINEAR = re.compile(r"U?LEA|U?IMAD(\.IADD|\.SHL(\.U32)?|\.U32)?|U?IADD3|VIADD|U?SHF\.L\.U32")

Registers = dict[str, int]      # numbers of their values; of the others nothing has been written


def width(name: str) -> int:
    """Registers that a result takes."""
    if ".128" in name or "M88.4" in name or "MT88.4" in name:
        return 4
    return 2 if re.search(r"\.64\b|WIDE|M88\.2|MT88\.2|^CS2R", name) else 1


def results(i: Instruction) -> list[str]:
    """The registers in front of an instruction's operands: predicates, and one that stands for all of its `width`."""
    if i.base in WRITES_NOTHING or (i.base == "SYNCS" and not i.name.endswith("TRYWAIT")):
        return []
    found: list[str] = []
    for x in i.arguments[:2]:
        if not REGISTER.fullmatch(x) or (found and "P" not in x and "P" not in found[0]):
            break
        found.append(x)
    return found


def written(i: Instruction) -> Iterable[str]:
    for x in results(i):
        if (name := NAME.fullmatch(x)):
            yield from (f"{name[1]}{int(name[2]) + w}" for w in range(width(i.name) if "P" not in x else 1))


class Values:
    """varies: addresses of the instructions that make a value differ from trip to trip: where ways join, and reads; terms: values
    that vary and that it is a sum of multiples of; moved: a value and the constant that it is beyond that."""

    def __init__(self) -> None:
        self.numbers: dict[Hashable, int] = {}
        self.varies: list[frozenset[int]] = []
        self.terms: list[frozenset[int]] = []
        self.moved: dict[int, tuple[int, int]] = {}

    def number(self, key: Hashable, of: Iterable[int] = (), at: int | None = None, linear: bool = False) -> int:
        if key not in self.numbers:
            n = self.numbers[key] = len(self.varies)
            of = list(of)
            self.varies.append(frozenset({at} if at is not None else ()).union(*(self.varies[v] for v in of)))
            own = frozenset({n} if self.varies[n] else ())
            self.terms.append(frozenset().union(*(self.terms[v] for v in of)) if linear else own)
        return self.numbers[key]

    def of(self, registers: Registers, name: str) -> int:
        return registers[name] if name in registers else self.number(name)

    def joined(self, at: int, name: str) -> int:
        """Of a register at an instruction that several lead to with different values."""
        return self.number(("joined", at, name), at=at)

    def beyond(self, value: int, more: int) -> int:
        base, offset = self.moved.get(value, (value, 0))
        if offset + more == 0:
            return base
        n = self.number(("beyond", base, offset + more), [base], linear=True)
        self.moved[n] = base, offset + more
        return n

    def address(self, i: Instruction, registers: Registers) -> tuple[tuple[int, ...], int]:
        """What an instruction's address is the sum of: values, and a constant."""
        found = re.search(r"\[([^\]]*)\]", ", ".join(i.arguments))
        text = found[1] if found else ""
        parts = [self.moved.get(v, (v, 0)) for v in (self.of(registers, r) for r in REGISTER.findall(text))]
        constants = [int(x, 16) for x in re.findall(r"-?0x[0-9a-f]+", text)]
        return tuple(sorted(v for v, _ in parts)), sum(x for _, x in parts) + sum(constants)

    def write(self, i: Instruction, registers: Registers) -> None:
        found = results(i)
        sources = i.arguments[len(found):]
        of = [self.of(registers, r) for x in sources for r in REGISTER.findall(x)]
        shape = tuple(REGISTER.sub("#", x) for x in sources)
        made = [("read", i.at) if i.base in READS else (i.name, shape, *of), of, i.at if i.base in READS else None]
        for k, name in enumerate(written(i)):
            value = self._simple(i, sources, registers) if len(found) == 1 and width(i.name) == 1 else None
            if value is None:
                value = self.number((k, made[0]), made[1], made[2], LINEAR.fullmatch(i.name) is not None)
            if not i.always:
                before = self.of(registers, name)
                condition = self.of(registers, i.predicate.lstrip("!"))
                value = self.number(("if", i.predicate[0] == "!", condition, value, before), [condition, value, before])
            registers[name] = value

    def _simple(self, i: Instruction, sources: tuple[str, ...], registers: Registers) -> int | None:
        """A copy of a register, or a register and a constant."""
        some = [x for x in sources if x not in ("RZ", "URZ")]
        if i.name in COPIES and len(some) == 1 and re.fullmatch(r"U?R\d+", some[0]):
            return self.of(registers, some[0])
        if i.name in SUMS:
            names = [x for x in some if re.fullmatch(r"U?R\d+", x)]
            constants = [x for x in some if re.fullmatch(r"-?0x[0-9a-f]+", x)]
            if len(names) == 1 and len(constants) + 1 == len(some) <= 2:
                return self.beyond(self.of(registers, names[0]), sum(int(x, 16) for x in constants))
        return None
