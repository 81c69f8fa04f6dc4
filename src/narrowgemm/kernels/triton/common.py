"""What the portable GEMM kernels share on the host: which operands they take, tile candidates, and their cost."""

from __future__ import annotations

from torch import Tensor

from ...arch import Arch, detect
from ...formats import ScaledTensor
from ...problem import Config, Problem
from ..operands import Operands

LAYOUT_IDS = {"dense": 0, "contiguous": 1, "offsets": 2, "psum": 3, "masked": 4}     # as `tiles_device.py` knows them
FP8 = ("e4m3", "e5m2")
LAUNCH_SECONDS = 3e-6
SPLIT_SECONDS = 0.8e-6    # the second launch, and what it waits for (fitted to six dense shapes, H100)
SPLIT_FACTOR = 1.35       # of all but the launch, where tiles are cut: 64, 128 x 576 x 7168 (H100), 16 x 2112 x 7168 (H200)
BLOCK_SECONDS = 0.42e-6   # least time of one K block of one tile, however small: loads' latency through the pipeline
# rate of a tile over that of 128x128: two blocks of 64x128 an SM hide each other's promotions (measured, H200)
RATE = {(128, 128): 1.0, (64, 128): 0.95, (128, 64): 0.85, (64, 64): 0.75}
LEFT_OUT = 1.12           # measured over predicted, median over small and large tiles
STREAMING = 0.66          # of the read bandwidth that these kernels sustain where weights are the traffic
A_GROUPS = ((1, 128), (1, 0), (0, 0))
B_GROUPS = ((128, 128), (1, 128), (1, 0), (0, 0))


def refuse(problem: Problem, arch: Arch) -> str | None:
    """Why the portable FP8 kernels can't take the operands, or None."""
    a, b = problem.a.format, problem.b.format
    if arch.vendor == "cpu":
        return "runs on a GPU"
    if arch.vendor == "nvidia" and arch.capability < 89:
        return f"{arch.target} has no FP8 tensor cores"
    if a.element not in FP8 or b.element not in FP8:
        return f"takes FP8 on both sides, not {a.element} x {b.element}"
    if a.group not in A_GROUPS or b.group not in B_GROUPS:
        return f"takes scales of 1x128, 128x128, rows or whole tensors, not {a.group} x {b.group}"
    if problem.a.prepack or problem.b.prepack:
        return "takes plain operands, not prepacked ones"
    if not problem.epilogue.plain or problem.gather:
        return "has no fused gather and no epilogue beyond the sum"
    return None


def kernel_scale(x: ScaledTensor) -> tuple[Tensor, bool, tuple[int, int, int]]:
    """(scale tensor, is E8M0, strides of group, row and K block); an axis with one scale gets stride 0."""
    s = x.scale
    assert s is not None
    gr, gc = x.format.group
    return s, s.element_size() == 1, (s.stride(0) if s.dim() == 3 else 0, s.stride(-2) if gr else 0, s.stride(-1) if gc else 0)


def smem_bytes(config: Config, arch: Arch) -> int:
    """Upper bound of the shared memory of a software-pipelined tile; the compile tests hold it against the compiler's figure."""
    buffers = config.num_stages if arch.vendor == "nvidia" else max(1, config.num_stages - 1)
    ring = buffers * ((config.block_m + config.block_n) * config.block_k + config.block_m * 4)
    return ring + 2048


def tile_configs(problem: Problem, arch: Arch) -> list[Config]:
    """Tiles for the expected rows a group, that fit the device. Order is by preference among equals."""
    rows = max(problem.rows, 1)
    if arch.vendor == "amd":
        cand = [(64, 128, 4, 2, False), (32, 128, 4, 2, False), (16, 64, 4, 2, False)]
        if arch.target != "gfx942":
            cand.insert(0, (128, 128, 8, 2, False))  # spills on gfx942, which widens E4M3FN to FP16 in registers
    elif rows <= 64:
        # weights on the MMA's M side: a 16-row tile on the M side would leave wgmma for mma.sync
        cand = [(16, 128, 4, 5, True), (16, 64, 4, 6, True), (32, 64, 4, 5, True), (64, 64, 4, 4, False),
                (64, 128, 4, 4, False), (16, 128, 4, 3, True)]
        if arch.target == "sm90":
            cand.insert(2, (32, 128, 4, 5, True))  # spills on sm100, where the sum comes back through tensor memory
    else:
        cand = [(128, 128, 8, 4, False), (128, 128, 8, 3, False), (64, 128, 4, 4, False), (64, 64, 4, 4, False),
                (64, 64, 4, 2, False)]
        if arch.target != "sm100":
            cand.insert(4, (128, 64, 4, 3, False))  # spills there in the contiguous layout
    persistent = problem.layout == "masked" or problem.max_sms > 0
    base = [Config(bm, bn, 128, w, s, swap_ab=swap, persistent=persistent) for bm, bn, w, s, swap in cand]
    return [c for c in base if smem_bytes(c, arch) <= arch.smem]


def slots(problem: Problem, x: Operands, block_m: int) -> int:
    """Tiles of rows that there can be at most: only the device knows the groups' sizes."""
    if problem.layout == "masked":
        return x.groups * -(-x.m // block_m)
    return x.m // block_m + x.groups if problem.layout in ("offsets", "psum") else -(-x.m // block_m)


def resident(out: Tensor, smem: int) -> int:
    """Programs of a persistent grid on the device of `out`: as many of `smem` bytes as are resident at once."""
    arch = detect(out.device)
    return arch.sms * max(1, min(4, arch.smem // smem))


def tiles(problem: Problem, config: Config) -> int:
    """Tiles of the output that do work."""
    num_n = -(-problem.n // config.block_n)
    if problem.layout in ("dense", "contiguous"):
        return -(-problem.m // config.block_m) * num_n
    if problem.layout == "masked":
        return problem.groups * -(-max(problem.rows, 1) // config.block_m) * num_n
    per_group = -(-max(problem.rows, 1) // config.block_m)
    return problem.active_groups * per_group * num_n


def estimate(problem: Problem, config: Config, arch: Arch, efficiency: float) -> float:
    """Seconds: whole waves of tiles, each the slower of its arithmetic and its loads, and the bytes of the problem."""
    sms = min(arch.sms, problem.max_sms or arch.sms)
    work = tiles(problem, config) * config.split_k
    k = -(-problem.k // config.split_k)
    rate = max(arch.fp8_flops, 1.0) / arch.sms * efficiency * RATE.get((config.block_m, config.block_n), 0.55)
    # a tile is at least 64 wide on the tensor core's M side
    bm, bn = (config.block_m, max(config.block_n, 64)) if config.swap_ab else (max(config.block_m, 64), config.block_n)
    math = 2.0 * bm * bn * k / rate
    per_sm_bandwidth = 2.0 * arch.bandwidth / arch.sms  # L2 serves what a strip shares
    loads = (config.block_m + config.block_n) * k / per_sm_bandwidth
    resident = max(1, min(4, arch.smem // max(smem_bytes(config, arch), 1)))
    waves = -(-work // sms) if work <= sms else work / sms + 0.5 / resident
    seconds = max(waves * max(math, loads), -(-work // (sms * resident)) * -(-k // 128) * BLOCK_SECONDS)
    if config.split_k > 1:
        seconds += SPLIT_SECONDS + 8.0 * config.split_k * problem.m * problem.n / arch.bandwidth
    busy = min(1.0, work / sms)
    memory = problem.bytes / (arch.bandwidth * STREAMING * max(busy, 0.1))
    return LEFT_OUT * (LAUNCH_SECONDS + max(seconds, memory) * (SPLIT_FACTOR if config.split_k > 1 else 1.0))
