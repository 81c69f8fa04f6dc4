"""Triton's compile cache: what lies there, and what of it is ours.

Triton keeps one folder a compiled kernel, named by a hash of everything that the machine code depends on; files are put
in place by renaming, so several processes may fill it at once. Nothing here imports Triton.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

KEY = re.compile(r"[A-Z2-7]{52}|[0-9a-f]{64}")     # how Triton names an entry: base32 or hex of a SHA-256
JITTED = re.compile(r"^@\w*\.?jit\b[^\n]*\n(?:@[^\n]*\n)*def (\w+)", re.MULTILINE)


def folder() -> Path:
    """Where Triton keeps compiled kernels: TRITON_CACHE_DIR, else .triton/cache under TRITON_HOME or the home folder."""
    if named := os.environ.get("TRITON_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"


@dataclass(frozen=True)
class Entry:
    """One folder of the cache. `kernel`: the name of the function, '' for launchers and other helpers."""

    path: Path
    kernel: str
    bytes: int

    @property
    def own(self) -> bool:
        return self.kernel in own_kernels()


@lru_cache(maxsize=1)
def own_kernels() -> frozenset[str]:
    """Names of the package's kernels, read from the `*_device.py` files."""
    package = Path(__file__).resolve().parents[1]
    return frozenset(n for f in package.rglob("*_device.py") for n in JITTED.findall(f.read_text()))


def entries(root: Path) -> list[Entry]:
    """Every entry under `root`, none where there is no such folder. Entries that vanish meanwhile are left out."""
    if not root.is_dir():
        return []
    out = []
    for path in sorted(root.iterdir()):
        if KEY.fullmatch(path.name) and path.is_dir():
            try:
                files = [(f.name, f.stat().st_size) for f in path.iterdir() if f.is_file()]
            except FileNotFoundError:
                continue
            names = [n.removeprefix("__grp__").removesuffix(".json") for n, _ in files if n.endswith(".json")]
            out.append(Entry(path, names[0] if names else "", sum(size for _, size in files)))
    return out


def clear(which: Iterable[Entry]) -> tuple[int, int]:
    """Remove entries: (how many, bytes). A kernel that a process has loaded stays loaded there."""
    count = freed = 0
    for e in which:
        shutil.rmtree(e.path, ignore_errors=True)
        if not e.path.exists():
            count, freed = count + 1, freed + e.bytes
    return count, freed
