"""Reads of registers that nothing has written, in SASS as `cuobjdump` lists it.

ptxas of Triton 3.6 and 3.8 leaves such where it puts bytes together: bits of a word that is made from the stack's pointer, R1; or a half of a
word of E4M3 that is converted back before the word is made.
"""

from __future__ import annotations

import re

FROM_STACK = re.compile(r"(?:LOP3\.LUT|SHF[A-Z0-9.]*) R\d+, [^;]*\bR1\b[^;]*;")
# the mnemonic, the first register behind it, what follows
LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d\s+)?([A-Z0-9_]+[A-Z0-9_.]*)\s+(?:!?P[\dT]+, )*\[?R(\d+)\b(?:\.\w+)*,?\s*([^;]*);")
BACK = "F2FP.F16.E4M3.UNPACK_B"
WIDTHS = {".64": 2, ".WIDE": 2, "CS2R": 2, ".128": 4, "M88.4": 4, "M88.2": 2}
NO_RESULT = ("ST", "RED", "BAR", "ISETP", "HSETP", "FSETP", "R2P", "R2UR", "LDGSTS")


def unwritten(code: str) -> int:
    """How many there are: from the stack's pointer, or of a word of E4M3 that no instruction listed before has made."""
    known: set[int] = set()
    count = len(FROM_STACK.findall(code))
    for line in code.splitlines():
        found = LINE.search(line)
        if found is None:
            continue
        name, to, rest = found[1], int(found[2]), found[3]
        if name.startswith(BACK):
            source = re.match(r"R(\d+)", rest)
            count += source is not None and int(source[1]) not in known
        if not name.startswith(NO_RESULT):
            known.update(range(to, to + max([n for mark, n in WIDTHS.items() if mark in name], default=1)))
    return count
