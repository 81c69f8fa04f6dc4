"""What is found in SASS: by lines of kernels that were wrong on a GPU, and of the same kernels as they are right."""

from __future__ import annotations

from ._sass import unwritten

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
