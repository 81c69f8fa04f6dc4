"""What is found in SASS: by lines of kernels that were wrong on a GPU, and of the same kernels as they are right."""

from __future__ import annotations

import pytest

from ._sass import unwritten
from ._sass_slots import Late, arrivals

LOADED = """
        /*1ad0*/                   LDS.128 R20, [R24+UR8] ;
        /*1af0*/                   F2FP.F16.E4M3.UNPACK_B R46, R20 ;
        /*1b00*/                   F2FP.F16.E4M3.UNPACK_B R52, R23.H1 ;
"""
# E4M3 is compared with what it was made from, before the word is there
EARLY = """
        /*22f0*/                   F2FP.F16.E4M3.UNPACK_B R42, R42 ;
        /*2320*/                   HMUL2 R21, R60, R61.reuse.H1_H1 ;
        /*2350*/                   HSETP2.NEU.AND P2, P3, R42, R21, PT ;
        /*2d60*/                   F2FP.SATFINITE.E4M3.F16.UNPACK_B_MERGE_C R20, R61, R22 ;
"""
LATE = """
        /*2130*/                   F2FP.SATFINITE.E4M3.F16.UNPACK_B_MERGE_C R72, R71, RZ ;
        /*2140*/                   F2FP.SATFINITE.E4M3.F16.UNPACK_B_MERGE_C R20, R67, R72 ;
        /*2150*/                   PRMT R23, R20.reuse, 0x7610, R23 ;
        /*2180*/              @!P1 F2FP.F16.E4M3.UNPACK_B R23, R23 ;
"""


def test_halves_of_words_that_are_not_there_yet() -> None:
    assert unwritten(LOADED + EARLY) == 1 and unwritten(LOADED + LATE) == 0 and unwritten(LOADED) == 0


def test_bits_of_the_stack_pointer() -> None:
    assert unwritten("        /*0010*/    LOP3.LUT R4, R1, 0xff, RZ, 0xc0, !PT ;\n        /*0020*/    IADD3 R1, R1, -0x8, RZ ;") == 1


def test_what_stores_and_sets_predicates_writes_no_register() -> None:
    code = "        /*0010*/    STG.E.128 desc[UR4][R4.64], R20 ;\n        /*0020*/    F2FP.F16.E4M3.UNPACK_B R2, R21 ;"
    assert unwritten(code) == 1


def listing(text: str) -> str:
    """As `cuobjdump` has it. A line begins with the scoreboard that an instruction counts on and those it waits for, or "-"."""
    lines = []
    for n, line in enumerate(text.strip().splitlines()):
        scoreboard, waits, code = line.split(maxsplit=2)
        control = (int(scoreboard) if scoreboard != "-" else 7) << 46 | sum(1 << 52 + int(x) for x in waits if x != "-")
        lines += [f"        /*{16 * n:04x}*/ {code} ; /* 0x{0:016x} */", f"        /* 0x{control:016x} */"]
    return "\n".join(lines)


# of `narrow_prefill`: the second K block's scale is waited for by the FFMA, behind the barrier
RING = """
- - UMOV UR21, URZ
- - ULEA UR29, UR21, UR4, 0x3
- - SHF.L.U32 R5, R2, 0x2, RZ
0 - SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR29+0x100], R16
- 0 @!P0 BRA 0x110
- - LDS R70, [R5+UR29+0x400]
1 - LDSM.16.M88 R44, [R5+0x800]
- 1 QGMMA.64x8x32.F32.E4M3.E4M3 R24, R44, gdesc[UR12], RZ, !UPT, gsb0
2 - LDS R17, [R5+UR29+0x500]
- - WARPGROUP.DEPBAR.LE gsb0, 0x0
- {0} UIADD3 UR22, UR21, 0x1, URZ
- - BAR.SYNC.DEFER_BLOCKING 0x0, 0x80
- 2 FFMA R62, R25, R17, R62
- - @!P6 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR29+0x180], RZ
- - USEL UR21, UR22, URZ, UP0
- - @P1 BRA 0x10
- - EXIT
0 - SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR29+0x100], R16
- 0 @P0 BRA 0x50
- - BRA 0x110
"""


def late(text: str) -> list[str]:
    found, = arrivals(listing(text))
    return [str(x) for x in found.loads]


def test_a_load_that_is_waited_for_behind_the_barrier_is_late() -> None:
    assert late(RING.format("-")) == ["80 LDS R17, [R5+UR29+0x500]"]
    assert late(RING.format("2")) == []


def test_loads_come_in_order() -> None:
    """R70 has no scoreboard: it is there when R44 is, that was asked for later."""
    unasked = RING.replace("- 1 QGMMA", "- - QGMMA")
    assert late(unasked.format("2")) == []
    assert late(unasked.format("1")) == ["80 LDS R17, [R5+UR29+0x500]"]
    assert late(unasked.format("-")) == [f"{x} [R5+{y}]" for x, y in (
        ("50 LDS R70,", "UR29+0x400"), ("60 LDSM.16.M88 R44,", "0x800"), ("80 LDS R17,", "UR29+0x500"))]
    # one that may not be issued says nothing of those in front
    assert late(unasked.replace("1 - LDSM", "1 - @P2 LDSM").format("1"))[0].startswith("50 LDS R70")


def test_a_wait_that_may_be_jumped_over_is_none() -> None:
    jump = "- - @P0 BRA 0xc0\n- 2 STS [R3], R17\n- - BAR.SYNC"
    text = RING.replace("0x110", "0x120").replace("- {0} UIADD3 UR22, UR21, 0x1, URZ\n- - BAR.SYNC", jump)
    assert late(text) == ["80 LDS R17, [R5+UR29+0x500]"]
    assert late(text.replace("@P0 BRA 0xc0", "NOP")) == []
    # of a store that never runs its own predicate may be false: it waits all the same
    assert late(RING.replace("- {0} UIADD3 UR22", "- 2 @!PT STS [R3], R17\n- - UIADD3 UR22").replace("0x110", "0x120")) == []


def test_loads_of_another_slot() -> None:
    """The arrival is for the slot before; the load that was asked for last is of the one that has been waited for."""
    text = RING.replace("UR29+0x180", "UR30+0x180").replace("- - UMOV UR21, URZ", "- - UMOV UR30, URZ")
    text = text.replace("- - USEL", "- - UMOV UR30, UR29\n- - USEL").replace("0x110", "0x120")
    assert late(text.format("-")) == []


@pytest.mark.parametrize("left, there", ((0, True), (1, True), (2, False)))
def test_depbar_leaves_some_on_their_way(left: int, there: bool) -> None:
    wait = f"2 - LDS R18, [R3]\n- - DEPBAR.LE SB2, 0x{left:x}\n- - UIADD3 UR22"
    found = late(RING.replace("- {0} UIADD3 UR22", wait).replace("0x110", "0x130"))
    assert ("80 LDS R17, [R5+UR29+0x500]" not in found) == there


def test_a_warp_that_arrives_for_itself() -> None:
    def only(text: str) -> Late:
        found, = arrivals(listing(text))
        return found

    text = RING.replace("BAR.SYNC.DEFER_BLOCKING 0x0, 0x80", "NOP").replace("@!P6 SYNCS", "@P6 SYNCS")
    assert not only(text.format("-")).barrier and not only(text.format("-")).loads
    late_own = only(text.replace("- 2 FFMA", "- - FFMA").format("-"))
    assert not late_own.barrier and [i.at for i in late_own.loads] == [0x80]


def test_arrivals_with_bytes_to_come_are_no_slots_given_back() -> None:
    assert arrivals(listing(RING.replace(".A1T0 RZ", " RZ").format("-"))) == []


# two slots of a ring that the loop goes round once a trip, each given back a K block later
CONSTANT = """
0 - SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+0x100], R16
1 0 LDS R17, [R5+0x400]
0 - SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4+0x108], R16
2 0 LDS R18, [R5+0x480]
- {0} FFMA R62, R25, R17, R62
- - BAR.SYNC.DEFER_BLOCKING 0x0, 0x80
- - @!P6 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x180], RZ
- {1} FFMA R62, R25, R18, R62
- - BAR.SYNC.DEFER_BLOCKING 0x0, 0x80
- - @!P6 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR4+0x188], RZ
- 12 @P1 BRA 0x0
- - EXIT
"""


@pytest.mark.parametrize("first, second, want", (
    ("1", "2", []), ("-", "2", ["10 LDS R17, [R5+0x400]"]), ("1", "-", ["30 LDS R18, [R5+0x480]"])))
def test_slots_that_differ_by_constants(first: str, second: str, want: list[str]) -> None:
    assert [str(x) for late in arrivals(listing(CONSTANT.format(first, second))) for x in late.loads] == want
