"""Which adopted rows of the packaged tables no call gets, because their kernel has changed since it was measured; and new stamps.

    python tools/stamp_tables.py                            lists them; exits with 1 where there are any
    python tools/stamp_tables.py gluon_sm90.mx8_decode      this kernel's rows, of every table, name it as it is now

A new stamp says that a kernel's figures still hold. That is so where `tools/same_ptx.py` finds the machine code of its tables'
configs unchanged, and its candidates are the same; elsewhere tune again, or set "adopted" to false.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

from narrowgemm.kernels.registry import kernels
from narrowgemm.tuning import store
from narrowgemm.tuning.fingerprint import fingerprint


def outdated(root: Path) -> dict[Path, Counter[str]]:
    """Of each table, adopted rows that nothing gets, by kernel."""
    found = {path: Counter(row["kernel"] for row in store.outdated(store.read_rows(path))) for path in sorted(root.rglob("*.json"))}
    return {path: kernels_ for path, kernels_ in found.items() if kernels_}


def stamp(root: Path, kernel: str) -> int:
    """Writes the kernel's fingerprint into the rows that were made with it; how many stamps changed."""
    now, changed = fingerprint(kernel), 0
    for path in sorted(root.rglob("*.json")):
        text = path.read_text(encoding="utf-8")
        old = re.findall(rf'"{re.escape(kernel)}": "([0-9a-f]{{12}})"', text)
        if any(o != now for o in old):
            changed += sum(o != now for o in old)
            path.write_text(re.sub(rf'("{re.escape(kernel)}": )"[0-9a-f]{{12}}"', rf'\1"{now}"', text), encoding="utf-8")
    return changed


def main(names: list[str], root: Path = store.PACKAGED) -> int:
    if unknown := [n for n in names if n not in kernels()]:
        print(f"{unknown[0]}: no kernel of that name; there are {', '.join(kernels())}", file=sys.stderr)
        return 2
    for name in names:
        print(f"{name}: {stamp(root, name)} stamps renewed")
    left = outdated(root)
    for path, by_kernel in left.items():
        print(f"{path.relative_to(root)}: no call gets", ", ".join(f"{n} rows of {k}" for k, n in by_kernel.items()))
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
