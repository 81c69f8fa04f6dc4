"""What is fixed when the Hopper FP8 decode kernel is compiled, and the shared memory and registers that follow from it."""

from __future__ import annotations

from dataclasses import dataclass

from ....arch import Arch
from ....problem import Config, Problem

LAYOUT_IDS = {"dense": 0, "contiguous": 1, "offsets": 2, "psum": 3, "masked": 4}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
TOKENS = (8, 16, 32, 64, 128)
MAX_SPLIT = 16


@dataclass(frozen=True)
class Static:
    """What the device code is compiled for; its fields are read by `fp8_decode_device.py`."""

    LAYOUT: int
    BT: int                  # token columns
    NARROW: int              # token columns of a tile with so few rows; 0: always BT
    BN: int                  # weight rows, 128 at most: one row of weight scales
    CONSUMERS: int           # warpgroups that share the weight rows
    STAGES: int
    SPLIT: int               # most units a tile is cut into along K
    GROUPS: int              # size of the group table, a power of two from 32
    STORE_VEC: int           # elements of 16 bytes of output
    ACCUMULATE: bool
    ZERO: bool               # rows of no group are written as zero
    KEEP: bool               # output stays in L2
    PDL: bool
    LOADER_REGS: int
    CONSUMER_REGS: int

    @property
    def WR(self) -> int:
        """Weight rows of one consumer."""
        return self.BN // self.CONSUMERS


def extra(config: Config, name: str, default: int = 0) -> int:
    return next((v for k, v in config.extra if k == name), default)


def slot_bytes(config: Config) -> int:
    """A ring slot: weights, tokens, scales, two barriers."""
    return (config.block_n + config.block_m) * 128 + config.block_m * 4 + 16


def smem_bytes(problem: Problem, config: Config) -> int:
    """Shared memory of a CTA: the ring, and where consumers transpose a tile. Never less than the compiler's figure."""
    wide = problem.out_dtype == "fp32" or problem.accumulate
    transpose = config.block_m * config.block_n * 4 if wide else 2048 * (config.num_warps // 4)
    return config.num_stages * slot_bytes(config) + transpose + 256


def smem_budget(config: Config, arch: Arch) -> int:
    """What one of the CTAs on an SM may use; each costs 1 KB on top."""
    ctas = extra(config, "ctas", 1)
    return min(arch.smem, (arch.smem + 1024) // ctas - 1024)


def max_registers(config: Config) -> int:
    """Registers a thread that let the CTAs of one SM be resident together; warps are allocated by fours."""
    warps = config.num_warps + 4
    return min(232, 65536 // (extra(config, "ctas", 1) * warps * 32) // 8 * 8)


def register_split(config: Config, table: int) -> tuple[int, int]:
    """(registers of a loader's thread, of a consumer's), with a group table of that size in each loader."""
    regs = max_registers(config)
    loader = min(regs, 56 + 16 * (config.block_m == 128) if table <= 256 else 88 if table <= 512 else 128)
    return loader, min(232, (regs * (config.num_warps + 4) - 4 * loader) // config.num_warps // 8 * 8)


def pads(problem: Problem) -> bool:
    return problem.zero_padding and problem.layout in ("contiguous", "psum")


def static(problem: Problem, config: Config, groups: int) -> Static:
    table = 32
    while table < groups and problem.layout in ("offsets", "psum", "masked"):
        table *= 2
    loader, consumer = register_split(config, table)
    return Static(LAYOUT_IDS[problem.layout], config.block_m, extra(config, "narrow"), config.block_n,
                  config.num_warps // 4, config.num_stages, config.split_k, table, 16 // ITEMSIZE[problem.out_dtype],
                  problem.accumulate, pads(problem), bool(extra(config, "keep")), bool(extra(config, "pdl")), loader, consumer)


def legal(problem: Problem, config: Config, arch: Arch) -> str | None:
    """Why `config` can't run the problem, or None."""
    consumers = config.num_warps // 4
    bt, narrow = config.block_m, extra(config, "narrow")
    if bt not in TOKENS or narrow not in (0, *TOKENS) or narrow >= bt:
        return f"block_m={bt} and narrow={narrow}, expected two of {TOKENS} token columns, or narrow=0"
    if config.num_warps not in (4, 8) or config.block_n > 128 or config.block_n // consumers not in (64, 128):
        return f"block_n={config.block_n} with {config.num_warps} warps, expected 64 or 128 weight rows for 4 warps, 128 for 8"
    if config.block_k != 128 or not config.swap_ab or not config.persistent:
        return "expected block_k=128, swap_ab and persistent"
    if not 1 <= extra(config, "ctas", 1) <= 4:
        return f"ctas={extra(config, 'ctas', 1)}, expected 1 to 4 on an SM"
    need = 2 * bt * (config.block_n // consumers) // 128 + 40
    if need > register_split(config, 32)[1]:
        return f"{bt} x {config.block_n // consumers} sums take about {need} registers, {register_split(config, 32)[1]} there"
    if not 1 <= config.split_k <= MAX_SPLIT:
        return f"split_k={config.split_k}, expected 1 to {MAX_SPLIT}"
    if config.split_k > 1 and (narrow or extra(config, "ctas", 1) > 2):
        return "split_k takes registers that two widths (narrow) or three CTAs on an SM don't leave"
    if config.split_k > 1 and (problem.batch_invariant or extra(config, "sms") < 1):
        return "split_k cuts K by the work at hand: not batch-invariant, and needs sms=... for its workspace"
    if config.num_stages < 3 or smem_bytes(problem, config) > smem_budget(config, arch):
        need = smem_bytes(problem, config)
        return f"{config.num_stages} stages take {need} bytes of shared memory; expected 3 or more that fit"
    return None
