"""Which chip. Records carry what kernels and the cost model need; nothing here touches a driver until `detect` is called.

Ceilings are measured where docs/measured.md says so (H200, H100), else the vendor's datasheet.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from .errors import expect
from .runtime import env


@dataclass(frozen=True, slots=True)
class Arch:
    """A target. Rates are FLOP/s and bytes/s; `smem` is bytes a block may use."""

    name: str                   # device name, key of tuned tables
    target: str                 # 'sm90', 'sm100', 'sm120', 'gfx942', 'gfx950', 'cpu', or 'sm80', ...
    sms: int
    smem: int
    l2: int
    bandwidth: float
    fp8_flops: float
    bf16_flops: float
    warp: int = 32

    @property
    def vendor(self) -> str:
        return "amd" if self.target.startswith("gfx") else "nvidia" if self.target.startswith("sm") else "cpu"

    @property
    def capability(self) -> int:
        """NVIDIA compute capability as an integer (90, 100), 0 elsewhere."""
        return int(self.target[2:]) if self.vendor == "nvidia" else 0


ARCHS: dict[str, Arch] = {
    a.name: a
    for a in (
        Arch("h200", "sm90", 132, 232448, 60 << 20, 4.66e12, 1.40e15, 0.76e15),
        Arch("h100", "sm90", 132, 232448, 50 << 20, 3.13e12, 1.40e15, 0.76e15),
        Arch("h20", "sm90", 78, 232448, 60 << 20, 3.80e12, 0.29e15, 0.146e15),
        Arch("b200", "sm100", 148, 232448, 126 << 20, 7.60e12, 4.00e15, 2.00e15),
        Arch("rtx5090", "sm120", 170, 101376, 96 << 20, 1.70e12, 0.80e15, 0.40e15),
        Arch("mi300x", "gfx942", 304, 65536, 256 << 20, 4.30e12, 2.00e15, 1.00e15, 64),
        Arch("mi350x", "gfx950", 256, 163840, 256 << 20, 6.50e12, 3.60e15, 1.80e15, 64),
        Arch("l40s", "sm89", 142, 101376, 96 << 20, 0.80e12, 0.70e15, 0.36e15),
        Arch("a100", "sm80", 108, 166912, 40 << 20, 1.80e12, 0.0, 0.28e15),
        Arch("cpu", "cpu", 1, 0, 0, 2.0e10, 1.0e11, 1.0e11, 1),
    )
}
GENERIC = {"sm90": "h100", "sm100": "b200", "sm120": "rtx5090", "gfx942": "mi300x", "gfx950": "mi350x", "sm89": "l40s",
           "sm80": "a100"}


def get_arch(name: str, what: str = "device") -> Arch:
    """An arch record by device name ('h200') or by target ('sm90': that target's usual device). `what`: who gave the name."""
    expect(isinstance(name, str), what, f"{name!r}", "the name of a device, or a torch.device", error=TypeError)
    key = GENERIC.get(name.lower(), name.lower())
    expect(key in ARCHS, what, repr(name), f"one of {sorted(ARCHS)} or a target of {sorted(GENERIC)}")
    return ARCHS[key]


def detect(device: torch.device | None = None) -> Arch:
    """The arch of a torch device; NARROWGEMM_ARCH overrides it, for compile-only use and for tests."""
    if override := env.get("NARROWGEMM_ARCH"):
        return get_arch(override, "NARROWGEMM_ARCH")
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type != "cuda":
        return ARCHS["cpu"]
    return _detect_gpu(device.index if device.index is not None else torch.cuda.current_device())


@lru_cache(maxsize=64)
def _detect_gpu(index: int) -> Arch:
    try:
        p = torch.cuda.get_device_properties(index)
    except (AssertionError, RuntimeError):
        if torch.cuda.is_available():
            raise
        return ARCHS["cpu"]     # torch's fake tensors have such a device anywhere
    if torch.version.hip:
        target = p.gcnArchName.split(":")[0]
        base = ARCHS.get(GENERIC.get(target, ""), ARCHS["mi300x"])
        return replace(base, target=target, sms=p.multi_processor_count)
    target = f"sm{p.major}{p.minor}"
    for name in ("h200", "h100", "h20", "b200", "l40s", "a100"):        # h20 behind h200, which holds it
        if name in p.name.lower() and ARCHS[name].target == target:
            return replace(ARCHS[name], sms=p.multi_processor_count)
    base = ARCHS.get(GENERIC.get(target, ""), ARCHS["a100"])
    smem = getattr(p, "shared_memory_per_block_optin", base.smem)
    slug = p.name.lower().replace("nvidia", "").strip().replace(" ", "-")
    return replace(base, name=slug, target=target, sms=p.multi_processor_count, smem=smem, l2=getattr(p, "L2_cache_size", base.l2))
