"""vLLM's tuned files of fused MoE kernels, read as candidates and written from a sweep.

Such a file, `E=8,N=2048,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json`, says for numbers of tokens which tile
vLLM's Triton kernel takes, one for both products of a layer. The portable kernel here has the same parameters. What is read is
no choice: a tile that is best there was never measured here, so the tuner measures it beside its own candidates, through both
gates. What is written is the portable kernel's best, for vLLM to read. SGLang's files have the same form.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import json_rows
from ..arch import Arch
from ..errors import expect
from ..kernels.triton import fp8_block as kernel
from ..problem import Config, Problem
from .space import Candidate
from .sweep import Record, timed

KERNEL = kernel.NAME
BLOCKS = {"BLOCK_SIZE_M": "block_m", "BLOCK_SIZE_N": "block_n", "BLOCK_SIZE_K": "block_k", "GROUP_SIZE_M": "group_m"}
OPTIONAL = {"num_warps": "num_warps", "num_stages": "num_stages"}


def read(path: Path) -> list[Config]:
    """The distinct tiles of a file. ValueError where it is none of these files."""
    expect(path.is_file(), "vLLM config file", str(path), "a file that is there")
    data = json_rows.read(path, "a tuned file of vLLM")
    expect(isinstance(data, dict), f"{path}", type(data).__name__, "an object of tiles by number of tokens")
    found: dict[Config, None] = {}
    for tokens, tile in data.items():
        if not tokens.isdigit():
            continue  # 'triton_version'
        missing = [name for name in BLOCKS if not isinstance(tile, dict) or name not in tile]
        expect(not missing, f"{path}, tile for {tokens} tokens, missing", missing, str(list(BLOCKS)))
        found[Config(**{ours: tile[theirs] for theirs, ours in (BLOCKS | OPTIONAL).items() if theirs in tile})] = None
    expect(bool(found), f"{path}, tiles", 0, "at least one")
    return list(found)


def candidates(problem: Problem, arch: Arch, configs: Iterable[Config], have: Iterable[Candidate]) -> list[Candidate]:
    """Those of `configs` that the portable kernel can run the problem with, and that are not in `have`."""
    if kernel.supports(problem, arch) is not None:
        return []
    labels = {c.label for c in have}
    made = [Candidate(KERNEL, kernel.BACKEND, c, kernel.estimate(problem, c, arch) * 1e6)
            for c in configs if kernel.legal(problem, c, arch) is None]
    return [c for c in made if c.label not in labels]


def write(folder: Path, records: Iterable[Record], device: str, top_k: int) -> list[Path]:
    """Files for every pair of products in a sweep that make a layer: gate_up `[2I, H]` and down `[H, I]`, as many experts and rows.

    For each number of tokens (rows / top_k) the portable tile whose two times sum to the least; `device`: as torch names it.
    """
    expect(top_k >= 1, "top_k", top_k, "at least 1")
    products: dict[tuple[int, int, int, int], dict[str, tuple[float, dict[str, Any]]]] = defaultdict(dict)
    for r in records:
        if r["error"] is None and "offsets" in r["table"] and "fp8_1x128-fp8_128x128" in r["table"]:
            best = products[r["groups"], r["m"], r["n"], r["k"]]
            for c in timed(r):
                if c["kernel"] == KERNEL and Config.from_dict(c["config"]).split_k == 1:
                    key = json.dumps(c["config"], sort_keys=True)
                    best[key] = min(best[key][0], c["us"]) if key in best else c["us"], c["config"]
    files: dict[str, dict[int, dict[str, int]]] = defaultdict(dict)
    for (groups, m, n, k), up in products.items():
        down = products.get((groups, m, k, n // 2), {})
        both = {key: up[key][0] + down[key][0] for key in up if key in down}
        if n % 2 or not both:
            continue
        tile = Config.from_dict(up[min(both, key=lambda key: both[key])][1])
        name = f"E={groups},N={n // 2},device_name={device.replace(' ', '_')},dtype=fp8_w8a8,block_shape=[128,128].json"
        files[name][max(1, m // top_k)] = {theirs: getattr(tile, ours) for theirs, ours in (BLOCKS | OPTIONAL).items()}
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for name, tiles in files.items():
        path = folder / name
        path.write_text(json.dumps({str(t): tiles[t] for t in sorted(tiles)}, indent=4) + "\n")
        out.append(path)
    return out
