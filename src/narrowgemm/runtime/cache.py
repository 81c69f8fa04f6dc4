"""Triton's compile cache: what lies there, what of it is ours, and filling it before a model's first call.

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
from typing import TYPE_CHECKING

from ..arch import Arch
from ..problem import Plan, bucket

if TYPE_CHECKING:
    from ..formats import ScaledTensor
    from ..prepack import PackedWeight

KEY = re.compile(r"[A-Z2-7]{52}|[0-9a-f]{64}")     # how Triton names an entry: base32 or hex of a SHA-256
PACKING = 3     # times the bytes of weights that packing them takes
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


@dataclass(frozen=True)
class Unit:
    """Calls to compile for: weights `[groups, n, k]` (dense: `[n, k]`), and numbers of rows (masked: expected in a group).

    packed: the weights go through `prepack`, with these `activations`; '' for weights as they are.
    """

    layout: str
    groups: int
    n: int
    k: int
    a: str
    b: str
    out_dtype: str
    max_m: int
    sizes: tuple[int, ...]
    packed: str = ""

    def plan(self, rows: int, arch: Arch) -> Plan:
        """The Plan of a call of so many rows on `arch`. Raises Unsupported."""
        from ..ops.explain import explain

        masked = self.layout == "masked"
        return explain("gemm" if self.layout == "dense" else "grouped_gemm", layout=self.layout, groups=self.groups,
                       m=self.max_m if masked else rows, expected_m=rows if masked else 0, n=self.n, k=self.k, a=self.a,
                       b=self.b, out_dtype=self.out_dtype, packed=self.packed or False, device=arch.name).plan

    @property
    def bytes(self) -> float:
        """Device memory that compiling takes: weights, activations and an output."""
        from ..formats import get_format

        rows = self.max_m * (self.groups if self.layout == "masked" else 1)
        return (PACKING ** bool(self.packed) * self.groups * get_format(self.b).storage_bytes(self.n, self.k)
                + get_format(self.a).storage_bytes(rows, self.k) + rows * self.n * 4)


def buckets(max_m: int) -> tuple[int, ...]:
    """Every number of rows that plans differ by, up to `max_m`."""
    return tuple(sorted({b for b in map(bucket, range(1, max_m + 1)) if b <= max_m} | {max_m}))


def split(unit: Unit, arch: Arch) -> list[tuple[Unit, Plan]]:
    """A unit for each Plan that it has on `arch`: two processes then never compile the same thing."""
    plans: dict[tuple, tuple[Plan, list[int]]] = {}
    for rows in unit.sizes:
        plan = unit.plan(rows, arch)
        plans.setdefault(tuple((s.kernel, s.config) for s in plan.steps), (plan, []))[1].append(rows)
    return [(Unit(**{**unit.__dict__, "sizes": tuple(sizes)}), plan) for plan, sizes in plans.values()]


def compile_unit(unit: Unit, device: str) -> int:
    """Launch every Plan of the unit once on weights of zeros, in this process; how many there were. Raises as the calls would."""
    import torch

    from ..formats import FORMATS
    from ..ops.prepare import prepare, zeros
    from ..prepack import prepack

    where = torch.device(device)
    shape = (unit.n, unit.k) if unit.layout == "dense" else (unit.groups, unit.n, unit.k)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[unit.out_dtype]
    masked = unit.layout == "masked"
    plain = zeros(shape, FORMATS[unit.b], where, mn_major=False)
    weight: ScaledTensor | PackedWeight = prepack(plain, activations=unit.packed) if unit.packed else plain
    plans = prepare(weight, layout=unit.layout, max_m=unit.max_m, a_format=unit.a,
                    out_dtype=dtype, expected_m=unit.sizes if masked else (), sizes=() if masked else unit.sizes)
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return len(plans)
