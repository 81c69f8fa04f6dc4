"""One MoE layer of a Hugging Face FP8, MXFP8 or MXFP4 checkpoint on disk, as the stacked expert weights that the ops take.

What is read: a folder with `config.json` and safetensors files, one or many with `model.safetensors.index.json`. Each
expert has a gate, an up and a down projection, `[N, K]` E4M3, with one scale for each 128 x 128 block,
`[ceil(N/128), ceil(K/128)]`. Values are payload times scale, also where the scale is called `weight_scale_inv`.

The files are memory-mapped and every tensor is copied once, to its place in the stack, so that reading a layer takes
the layer's own memory and no second copy of it.

Definition: DeepSeek-V3's FP8 checkpoints, which Qwen3-FP8, MiniMax-M2 and transformers' `FineGrainedFP8Config` follow.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import Unsupported, expect
from ..formats import FP8_128x128, ScaledTensor
from . import mx_checkpoint

if TYPE_CHECKING:
    from ..testing.models import MoEModel

SCALE_NAMES = ("weight_scale_inv", "weight_scale", "scale")
PROJECTIONS = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
EXPERT_COUNT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts")
BLOCK = 128

_EXPERT_KEY = re.compile(r"(?P<block>(?:.*\.)?layers\.(?P<layer>\d+)\.\w+)\.experts\.(?P<expert>\d+)\."
                         rf"(?P<proj>{'|'.join(PROJECTIONS)})\.(?P<what>weight|weight_packed|{'|'.join(SCALE_NAMES)})")


class CheckpointError(ValueError):
    """The checkpoint is there, and what it holds is not what it should hold. The message names file and tensor."""


@dataclass(frozen=True, eq=False)
class MoELayer:
    """The routed experts of one layer. H hidden, I intermediate size of one expert, E experts that were loaded.

    `gate_up`: `[E, 2I, H]`, the gate's rows before the up projection's, or `interleaved` with them (GPT-OSS). `down`:
    `[E, H, I]`. Both FP8_128x128, with E8M0 scales where the file holds those, MXFP8 or MXFP4. `gate_up_bias`, `down_bias`,
    `router_logit_bias`: GPT-OSS's, `[E, 2I]`, `[E, H]`, `[E_total]`, or None.
    `router`: `[E_total, H]` in the file's dtype, or None if the layer has none.
    `router_bias`: `[E_total]`, DeepSeek's bias for choosing experts, or None. `routing`: what config.json says about
    routing, as keywords of `narrowgemm.ops.route.route`. Shared experts are not part of it.
    """

    gate_up: ScaledTensor
    down: ScaledTensor
    router: Tensor | None
    router_bias: Tensor | None
    layer: int
    experts: range
    num_experts: int
    top_k: int
    routing: dict[str, Any]
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    router_logit_bias: Tensor | None = None
    interleaved: bool = False

    @property
    def hidden(self) -> int:
        return self.down.shape[1]

    @property
    def inter(self) -> int:
        return self.down.shape[2]


class Checkpoint:
    """A checkpoint folder: its config and which file holds which tensor. Files are mapped on first use, until `close`.

    Raises FileNotFoundError where the folder, config.json or every safetensors file is missing; CheckpointError where
    config.json or the index can't be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise FileNotFoundError(f"checkpoint folder {self.path}: no such folder")
        if not (self.path / "config.json").is_file():
            raise FileNotFoundError(f"checkpoint {self.path}: it has no config.json")
        config = _read_json(self.path / "config.json")
        self.config: dict[str, Any] = config | config.get("text_config", {})
        self._stack = ExitStack()
        self._open: dict[Path, Any] = {}
        self.files = self._weight_map()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()
        self._open.clear()

    def _weight_map(self) -> dict[str, Path]:
        index = self.path / "model.safetensors.index.json"
        if index.is_file():
            names = _read_json(index).get("weight_map")
            if not isinstance(names, dict):
                raise CheckpointError(f"{index}: it has no 'weight_map'")
            return {key: self.path / name for key, name in names.items()}
        found = sorted(self.path.glob("*.safetensors"))
        if not found:
            raise FileNotFoundError(f"checkpoint {self.path}: it has no *.safetensors file and no index")
        return {key: file for file in found for key in self._file(file).keys()}  # noqa: SIM118 - not a dict

    def _file(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self._open:
            if not path.is_file():
                raise FileNotFoundError(f"checkpoint {self.path}: shard {path.name} is missing")
            try:
                self._open[path] = self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except SafetensorError as e:
                raise CheckpointError(f"{path}: it can't be read as safetensors: {e}") from e
        return self._open[path]

    def header(self, name: str) -> tuple[str, tuple[int, ...]]:
        """(dtype as safetensors names it, shape) of a tensor, without reading it."""
        from safetensors import SafetensorError

        if name not in self.files:
            raise CheckpointError(f"checkpoint {self.path}: tensor {name!r} is missing")
        try:
            part = self._file(self.files[name]).get_slice(name)
        except SafetensorError as e:
            raise CheckpointError(f"{self.files[name]}: the index puts tensor {name!r} there, and it isn't: {e}") from e
        return str(part.get_dtype()), tuple(part.get_shape())

    def tensor(self, name: str) -> Tensor:
        """The tensor, on the CPU and backed by the mapped file: copy it before the checkpoint is closed."""
        self.header(name)
        return self._file(self.files[name]).get_tensor(name)

    def moe_layers(self) -> list[int]:
        """Numbers of the layers that have per-expert weights."""
        return sorted({int(m["layer"]) for m in map(_EXPERT_KEY.fullmatch, self.files) if m})

    def num_experts(self, layer: int) -> int:
        """Experts that a layer holds by the names of its tensors; 0 where it has none."""
        return len({int(m["expert"]) for m in map(_EXPERT_KEY.fullmatch, self.files) if m and int(m["layer"]) == layer})


def load_moe_layer(path: str | Path, layer: int, *, experts: range | None = None,
                   device: torch.device | str = "cpu") -> MoELayer:
    """Read one layer's routed experts into stacks, on `device`: FP8 ones, MXFP8 and MXFP4 (`mx_checkpoint.py`).

    `experts`: which of them, e.g. `range(rank * n, (rank + 1) * n)` under expert parallelism; default all.

    Raises FileNotFoundError (folder, config or shard missing), CheckpointError (tensors missing, or of a wrong dtype or
    shape; not an FP8 checkpoint), ValueError (no such layer, experts out of range), Unsupported (blocks that are not
    128 x 128; an intermediate size that is no multiple of 128, where gate and up can't share one stack of blocks).
    """
    with Checkpoint(path) as ckpt:
        if kind := mx_checkpoint.kind_of(ckpt.config):
            return mx_checkpoint.load(ckpt, kind, layer, experts, device)
        _check_quantization(ckpt)
        block, names = _layer_names(ckpt, layer)
        total = len(names)
        _check_experts(ckpt, layer, sorted(names))
        chosen = range(total) if experts is None else experts
        expect(chosen.step == 1 and 0 <= chosen.start <= chosen.stop <= total, "experts", chosen,
               f"a range with step 1 inside [0, {total}]")
        parts = [_expert_parts(ckpt, layer, e, names[e]) for e in (chosen or range(1))]
        inter, hidden = parts[0]["gate"].shape
        scale = parts[0]["gate"].scale_kind
        for e, part in zip(chosen, parts):
            for proj, want in (("gate", (inter, hidden)), ("up", (inter, hidden)), ("down", (hidden, inter))):
                if part[proj].shape != want or part[proj].scale_kind != scale:
                    raise CheckpointError(f"checkpoint {ckpt.path}: {part[proj].weight}: got {part[proj].shape} with "
                                          f"{part[proj].scale_kind} scales, expected {want} with {scale} scales, as "
                                          f"expert {chosen.start}'s gate projection implies (expert {e})")
        if inter % BLOCK:
            raise Unsupported(f"layer {layer} has an intermediate size of {inter}, no multiple of {BLOCK}: the 128 x "
                              "128 blocks of gate and up don't line up in one stack",
                              "pad the experts to a multiple of 128")
        gate_up = _empty(len(chosen), 2 * inter, hidden, scale, device)
        down = _empty(len(chosen), hidden, inter, scale, device)
        for slot, part in enumerate(parts[:len(chosen)]):
            _copy(ckpt, part["gate"], gate_up, slot, 0)
            _copy(ckpt, part["up"], gate_up, slot, inter)
            _copy(ckpt, part["down"], down, slot, 0)
        router = _router(ckpt, f"{block}.gate.weight", (total, hidden), device)
        bias = next((_router(ckpt, f"{block}.{name}", (total,), device)
                     for name in ("gate.e_score_correction_bias", "e_score_correction_bias")
                     if f"{block}.{name}" in ckpt.files), None)
        top_k = int(ckpt.config.get("num_experts_per_tok", 1))
        routing = _routing(ckpt.config, bias)
    return MoELayer(gate_up, down, router, bias, layer, chosen, total, top_k, routing)


@dataclass(frozen=True, slots=True)
class _Part:
    weight: str
    scale: str
    shape: tuple[int, ...]
    scale_kind: str


def _read_json(path: Path) -> dict[str, Any]:
    try:
        doc = json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise CheckpointError(f"{path}: it is no JSON: {e}") from e
    if not isinstance(doc, dict):
        raise CheckpointError(f"{path}: got a {type(doc).__name__}, expected a JSON object")
    return doc


def _check_quantization(ckpt: Checkpoint) -> None:
    quant = ckpt.config.get("quantization_config") or {}
    method = quant.get("quant_method")
    if method == "compressed-tensors":
        groups = quant.get("config_groups") or {}
        blocks: list[Any] = [(g.get("weights") or {}).get("block_structure") for g in groups.values()]
    elif method == "fp8":
        blocks = [quant.get("weight_block_size")]
    else:
        raise CheckpointError(f"{ckpt.path / 'config.json'}: quantization_config.quant_method: got {method!r}, "
                              "expected 'fp8', 'mxfp8', 'mxfp4', 'modelopt' with MXFP8, or 'compressed-tensors' with FP8 blocks, "
                              "mxfp8-quantized or mxfp4-pack-quantized")
    if not blocks or any(b != [BLOCK, BLOCK] for b in blocks):
        raise Unsupported(f"{ckpt.path / 'config.json'}: weight blocks {blocks}, and only 128 x 128 ones are read",
                          "requantise the layer with narrowgemm.quantize(w, FP8_128x128)")


def _layer_names(ckpt: Checkpoint, layer: int) -> tuple[str, dict[int, dict[str, dict[str, str]]]]:
    """The layer's name prefix, and tensor names by expert, projection ('gate', 'up', 'down') and kind."""
    blocks: dict[str, dict[int, dict[str, dict[str, str]]]] = {}
    for name in ckpt.files:
        m = _EXPERT_KEY.fullmatch(name)
        if m and int(m["layer"]) == layer:
            expert = blocks.setdefault(m["block"], {}).setdefault(int(m["expert"]), {})
            expert.setdefault(PROJECTIONS[m["proj"]], {})[m["what"]] = name
    main = [b for b in blocks if b.startswith(("model.", "layers."))] or list(blocks)
    if not main:
        there = ckpt.moe_layers()
        raise ValueError(f"layer: got {layer}, expected one with per-expert weights: "
                         + (f"{there}" if there else f"{ckpt.path} has none at all"))
    if len(main) > 1:
        raise CheckpointError(f"checkpoint {ckpt.path}: layer {layer} stands under several names: {sorted(main)}")
    return main[0], blocks[main[0]]


def _check_experts(ckpt: Checkpoint, layer: int, there: list[int]) -> None:
    want = next((int(ckpt.config[k]) for k in EXPERT_COUNT_KEYS if k in ckpt.config), len(there))
    missing = sorted(set(range(max(want, len(there)))) - set(there))
    if missing or len(there) != want:
        which = f"; missing: {missing[:8]}{'...' if len(missing) > 8 else ''}" if missing else ""
        raise CheckpointError(f"checkpoint {ckpt.path}: layer {layer} holds {len(there)} experts, config.json says "
                              f"{want}{which}")


def _expert_parts(ckpt: Checkpoint, layer: int, expert: int, names: dict[str, dict[str, str]]) -> dict[str, _Part]:
    """The three projections, their headers checked: dtype, shape, and scales that fit."""
    parts = {}
    for proj in ("gate", "up", "down"):
        kinds = names.get(proj, {})
        where = f"checkpoint {ckpt.path}: layer {layer}, expert {expert}, {proj} projection"
        scale = next((kinds[s] for s in SCALE_NAMES if s in kinds), None)
        if "weight" not in kinds or scale is None:
            raise CheckpointError(f"{where}: got {sorted(kinds.values()) or 'nothing'}, expected a weight and a scale "
                                  f"named one of {SCALE_NAMES}")
        dtype, shape = ckpt.header(kinds["weight"])
        if dtype != "F8_E4M3" or len(shape) != 2:
            raise CheckpointError(f"{where}: {kinds['weight']}: got {dtype} {shape}, expected F8_E4M3 [N, K]")
        sdtype, sshape = ckpt.header(scale)
        want = FP8_128x128.scale_shape(shape)
        kind = {"F32": "fp32", "BF16": "fp32", "F16": "fp32", "F8_E8M0": "e8m0", "U8": "e8m0"}.get(sdtype)
        if kind is None or sshape != want:
            raise CheckpointError(f"{where}: {scale}: got {sdtype} {sshape}, expected {want} in F32, BF16, F16 or, as "
                                  "E8M0 codes, F8_E8M0 or U8")
        parts[proj] = _Part(kinds["weight"], scale, shape, kind)
    return parts


def _routing(config: dict[str, Any], bias: Tensor | None) -> dict[str, Any]:
    """DeepSeek's and Qwen's names for how tokens are routed. Weights are renormalised unless the config says no."""
    return {"scoring": config.get("scoring_func", "softmax" if bias is None else "sigmoid"),
            "renormalize": bool(config.get("norm_topk_prob", True)),
            "num_expert_group": config.get("n_group"), "topk_group": config.get("topk_group"),
            "scaling_factor": float(config.get("routed_scaling_factor") or 1.0)}


def _empty(experts: int, rows: int, cols: int, scale: str, device: torch.device | str) -> ScaledTensor:
    fmt = FP8_128x128.with_scale(scale)
    shape = (experts, rows, cols)
    return ScaledTensor(torch.empty(shape, dtype=torch.float8_e4m3fn, device=device),
                        torch.empty(fmt.scale_shape(shape), device=device, dtype=fmt.scale_dtype), fmt)


def _copy(ckpt: Checkpoint, part: _Part, stack: ScaledTensor, slot: int, row: int) -> None:
    rows = part.shape[0]
    stack.data[slot, row:row + rows].copy_(ckpt.tensor(part.weight))
    scale = ckpt.tensor(part.scale)
    if stack.format.scale == "e8m0":
        scale = scale.view(torch.uint8)
    assert stack.scale is not None
    stack.scale[slot, row // BLOCK:-(-(row + rows) // BLOCK)].copy_(scale)


def _router(ckpt: Checkpoint, name: str, shape: tuple[int, ...], device: torch.device | str) -> Tensor | None:
    if name not in ckpt.files:
        return None
    dtype, given = ckpt.header(name)
    if given != shape or dtype not in ("F32", "BF16", "F16"):
        raise CheckpointError(f"checkpoint {ckpt.path}: {name}: got {dtype} {given}, expected {shape} in F32, BF16 or "
                              "F16")
    return ckpt.tensor(name).to(device, copy=True)


def write_fp8_checkpoint(path: str | Path, shape: MoEModel, layers: int = 1, shards: int = 2, seed: int = 0, *,
                         device: torch.device | str = "cpu",
                         progress: Callable[[int, int], None] | None = None) -> Path:
    """Write a small valid FP8 checkpoint of random MoE layers `0 .. layers-1` (routed experts and router); its folder.

    Weights are normal with standard deviation 1/sqrt(K), quantised to 128 x 128 blocks on `device`, and depend on
    `seed` and on the order of the tensors, never on `shards`. One shard is held in memory at a time. The index is
    written last, so that a folder with an index is complete. `progress(done, all)` is called after each expert.

    Raises ValueError for no layer, no shard or more shards than experts, FileExistsError where a checkpoint is there.
    """
    from safetensors.torch import save_file

    from ..ops.quantize import quantize

    total = layers * shape.experts
    expect(layers >= 1, "layers", layers, "at least 1")
    expect(1 <= shards <= total, "shards", shards, f"at least 1 and at most one for each of the {total} experts")
    path = Path(path)
    if (path / "config.json").exists():
        raise FileExistsError(f"{path}: it has a checkpoint already")
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(rows: int, cols: int) -> Tensor:
        return torch.randn(rows, cols, generator=generator, device=device) * cols ** -0.5

    def layer_units(layer: int) -> Iterator[dict[str, Tensor]]:
        block = f"model.layers.{layer}.mlp"
        for e in range(shape.experts):
            unit: dict[str, Tensor] = {}
            for proj, rows, cols in (("gate", shape.inter, shape.hidden), ("up", shape.inter, shape.hidden),
                                     ("down", shape.hidden, shape.inter)):
                q = quantize(normal(rows, cols), FP8_128x128)
                assert q.scale is not None
                name = f"{block}.experts.{e}.{proj}_proj.weight"
                unit |= {name: q.data.cpu(), f"{name}_scale_inv": q.scale.cpu().contiguous()}
            if e == 0:
                unit[f"{block}.gate.weight"] = normal(shape.experts, shape.hidden).bfloat16().cpu()
            yield unit

    units = (unit for layer in range(layers) for unit in layer_units(layer))
    weight_map: dict[str, str] = {}
    size = done = 0
    for i in range(shards):
        shard: dict[str, Tensor] = {}
        while done < total * (i + 1) // shards:
            shard |= next(units)
            done += 1
            if progress:
                progress(done, total)
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file(shard, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
        size += sum(t.numel() * t.element_size() for t in shard.values())
    config = {"model_type": shape.name, "hidden_size": shape.hidden, "moe_intermediate_size": shape.inter,
              "num_experts": shape.experts, "num_experts_per_tok": shape.top_k, "num_hidden_layers": layers,
              "hidden_act": "silu", "torch_dtype": "bfloat16",
              "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                                      "weight_block_size": [BLOCK, BLOCK]}}
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return path
