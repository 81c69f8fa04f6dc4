"""MXFP4 experts from GPT-OSS, compressed-tensors and DeepSeek-V4 checkpoints, MXFP8 ones: bit for bit, and every defect is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import save_file

import narrowgemm as ng
from narrowgemm.integrations.checkpoints import CheckpointError, MoELayer, load_moe_layer
from narrowgemm.integrations.mx_checkpoint import from_blocks

E, H, I, TOP_K = 4, 96, 64, 2
QUANT = {"gpt-oss": {"quant_method": "mxfp4"},
         "compressed-tensors": {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized", "config_groups": {"g": {}}},
         "deepseek": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def raw(rows: int, cols: int, seed: int, lead: tuple[int, ...] = ()) -> tuple[torch.Tensor, torch.Tensor]:
    """Every byte and every scale code may come."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 256, (*lead, rows, cols // 2), generator=g, dtype=torch.uint8),
            torch.randint(0, 255, (*lead, rows, cols // 32), generator=g, dtype=torch.uint8))


def write(folder: Path, kind: str, change=lambda tensors: None) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    t: dict[str, torch.Tensor] = {}
    if kind == "gpt-oss":
        base = "model.layers.3.mlp"
        for proj, (n, k), seed in (("gate_up", (2 * I, H), 1), ("down", (H, I), 2)):
            data, scale = raw(n, k, seed, (E,))
            t |= {f"{base}.experts.{proj}_proj_blocks": data.view(E, n, k // 32, 16), f"{base}.experts.{proj}_proj_scales": scale,
                  f"{base}.experts.{proj}_proj_bias": torch.randn(E, n).bfloat16()}
        t |= {f"{base}.router.weight": torch.randn(E, H).bfloat16(), f"{base}.router.bias": torch.randn(E).bfloat16()}
    else:
        base = "model.layers.3.mlp" if kind == "compressed-tensors" else "layers.3.ffn"
        names = ("gate_proj", "up_proj", "down_proj") if kind == "compressed-tensors" else ("w1", "w3", "w2")
        for e in range(E):
            for i, name in enumerate(names):
                data, scale = raw(*((I, H) if i < 2 else (H, I)), 10 * e + i)
                if kind == "compressed-tensors":
                    t |= {f"{base}.experts.{e}.{name}.weight_packed": data, f"{base}.experts.{e}.{name}.weight_scale": scale}
                else:
                    t |= {f"{base}.experts.{e}.{name}.weight": data.view(torch.int8),
                          f"{base}.experts.{e}.{name}.scale": scale.view(torch.float8_e8m0fnu)}
        t[f"{base}.gate.weight"] = torch.randn(E, H).bfloat16()
        t[f"{base}.gate.bias"] = torch.randn(E)
    change(t)
    save_file({k: v.contiguous() for k, v in t.items()}, folder / "model.safetensors")
    config = {"num_experts_per_tok": TOP_K, "num_experts" if kind != "deepseek" else "n_routed_experts": E,
              "quantization_config": QUANT[kind]} | ({"expert_dtype": "fp4"} if kind == "deepseek" else {})
    (folder / "config.json").write_text(json.dumps(config))
    return t


def expected(kind: str, t: dict[str, torch.Tensor], e: int) -> list[torch.Tensor]:
    """[gate_up data, its scales, down data, its scales] of an expert, as bytes."""
    if kind == "gpt-oss":
        return [t[f"model.layers.3.mlp.experts.{p}_proj_{w}"][e].flatten(1) for p in ("gate_up", "down") for w in ("blocks", "scales")]
    base = "model.layers.3.mlp" if kind == "compressed-tensors" else "layers.3.ffn"
    names, parts = ((("gate_proj", "up_proj", "down_proj"), ("weight_packed", "weight_scale")) if kind == "compressed-tensors" else
                    (("w1", "w3", "w2"), ("weight", "scale")))
    gate, up, down = ([t[f"{base}.experts.{e}.{n}.{p}"].view(torch.uint8) for p in parts] for n in names)
    return [torch.cat((gate[0], up[0])), torch.cat((gate[1], up[1])), *down]


@pytest.mark.parametrize("kind", QUANT)
def test_bit_for_bit(kind: str, tmp_path: Path) -> None:
    t = write(tmp_path, kind)
    for experts in (None, range(1, 3)):
        layer = load_moe_layer(tmp_path, 3, experts=experts)
        assert layer.gate_up.format == layer.down.format == ng.MXFP4
        assert layer.gate_up.shape == (len(layer.experts), 2 * I, H) and (layer.hidden, layer.inter) == (H, I)
        assert (layer.num_experts, layer.top_k, layer.interleaved) == (E, TOP_K, kind == "gpt-oss")
        for slot, e in enumerate(layer.experts):
            got = [layer.gate_up.data[slot], layer.gate_up.scale[slot], layer.down.data[slot], layer.down.scale[slot]]
            assert all(torch.equal(a, b) for a, b in zip(got, expected(kind, t, e)))
    if kind == "gpt-oss":
        assert torch.equal(layer.gate_up_bias, t["model.layers.3.mlp.experts.gate_up_proj_bias"][1:3])
        assert torch.equal(layer.router_logit_bias, t["model.layers.3.mlp.router.bias"])
    else:
        assert layer.router.shape == (E, H) and layer.router_bias.shape == (E,)


@pytest.mark.parametrize("kind", QUANT)
def test_what_is_read_computes(kind: str, tmp_path: Path) -> None:
    """Packed, in the order of its gate and up rows, the weights give what they give as they are."""
    def tame(t: dict[str, torch.Tensor]) -> None:
        for name, x in t.items():
            if name.endswith(("scales", "scale")):
                x.view(torch.uint8).remainder_(8).add_(122)

    write(tmp_path, kind, tame)
    layer: MoELayer = load_moe_layer(tmp_path, 3)
    packed = ng.prepack(layer.gate_up, pair="interleaved" if layer.interleaved else "halves")
    x = torch.randn(6, H).bfloat16()
    offsets = ng.Offsets(torch.tensor([0, 2, 2, 5, 6]))
    got = ng.routed_gemm(x, packed, offsets, activation="swiglu", out_dtype=torch.float32)
    want = ng.routed_gemm(x, layer.gate_up, offsets, activation="swiglu", interleaved=layer.interleaved, out_dtype=torch.float32)
    assert torch.equal(got, want) and got.shape == (6, I)


DEFECTS = {
    ("gpt-oss", "experts.down_proj_scales"): (lambda x: x[..., :-1], r"down_proj: scales, shape: got \(4, 96, 1\)"),
    ("gpt-oss", "experts.gate_up_proj_blocks"): (lambda x: x.flatten(2), r"gate_up_proj_blocks: got U8 \(4, 128, 48\)"),
    ("compressed-tensors", "experts.2.up_proj.weight_packed"): (lambda x: x[:-1], r"expert 2, up projection.*got U8 \(63, 48\)"),
    ("compressed-tensors", "experts.1.gate_proj.weight_scale"): (lambda x: x.float(), r"weight_scale: got F32"),
    ("deepseek", "experts.0.w2.scale"): (None, r"expert 0, down projection: got .*expected weight and scale"),
    ("deepseek", "experts.3.w1.weight"): (lambda x: x.to(torch.bfloat16), r"got BF16"),
    ("gpt-oss", "experts.down_proj_blocks"): (lambda x: x[:-1], r"down_proj_blocks: got U8 \(3, 96, 2, 16\), expected U8 \[4, N"),
}


@pytest.mark.parametrize("kind, name", DEFECTS, ids=lambda x: x)
def test_defects_are_named(kind: str, name: str, tmp_path: Path) -> None:
    how, match = DEFECTS[kind, name]

    def change(t: dict[str, torch.Tensor]) -> None:
        key = next(k for k in t if k.endswith(name))
        x = t.pop(key)
        if how is not None:
            t[key] = how(x)

    write(tmp_path, kind, change)
    with pytest.raises(CheckpointError, match=match):
        load_moe_layer(tmp_path, 3)


MXFP8 = {"mxfp8": ("weight_scale_inv", {"quant_method": "mxfp8"}), "modelopt": ("weight_scale", {"quant_method": "modelopt", "quant_algo": "MXFP8"}),
         "compressed-tensors": ("weight_scale", {"quant_method": "compressed-tensors", "config_groups": {"g": {"format": "mxfp8-quantized"}}})}


@pytest.mark.parametrize("kind", MXFP8)
def test_mxfp8(kind: str, tmp_path: Path) -> None:
    """An intermediate size that is no multiple of 128, scales as bytes or as E8M0; experts 1 and 2 alone."""
    name, quant = MXFP8[kind]
    made = {(e, proj): ng.quantize(torch.randn(*shape), ng.MXFP8) for e in range(E)
            for proj, shape in (("gate", (I, H)), ("up", (I, H)), ("down", (H, I)))}
    t = {}
    for (e, proj), q in made.items():
        key = f"model.layers.3.mlp.experts.{e}.{proj}_proj"
        t |= {f"{key}.weight": q.data, f"{key}.{name}": q.scale.contiguous().view(torch.float8_e8m0fnu if kind == "modelopt" else torch.uint8)}
    save_file(t, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_experts_per_tok": TOP_K, "num_experts": E, "quantization_config": quant}))
    layer = load_moe_layer(tmp_path, 3, experts=range(1, 3))
    assert layer.gate_up.format == layer.down.format == ng.MXFP8 and layer.gate_up.shape == (2, 2 * I, H)
    for slot, e in enumerate((1, 2)):
        want = torch.cat([made[e, "gate"].dequantize(), made[e, "up"].dequantize()])
        assert torch.equal(layer.gate_up[slot].dequantize(), want) and torch.equal(layer.down[slot].dequantize(), made[e, "down"].dequantize())
    x = torch.randn(5, H).bfloat16()
    out = ng.experts(x, layer.gate_up, layer.down, router_logits=torch.randn(5, 2), top_k=2)
    assert out.shape == (5, H) and bool(out.isfinite().all())
    t["model.layers.3.mlp.experts.2.up_proj.weight"] = torch.zeros(I, H).bfloat16()
    save_file(t, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"expert 2, up projection.*got BF16 \(64, 96\), expected \(64, 96\) in F8_E4M3"):
        load_moe_layer(tmp_path, 3)


def test_gate_and_up_of_other_sizes_do_not_belong_together(tmp_path: Path) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        for key in [k for k in t if ".up_proj." in k]:
            t[key] = t[key][:32]

    write(tmp_path, "compressed-tensors", change)
    with pytest.raises(CheckpointError, match="don't belong together"):
        load_moe_layer(tmp_path, 3)


def test_deepseeks_expert_dtype_may_stand_beside_the_method(tmp_path: Path) -> None:
    write(tmp_path, "deepseek")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["expert_dtype"] = config.pop("expert_dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_moe_layer(tmp_path, 3).gate_up.format == ng.MXFP4


def test_other_ways_to_say_the_same(tmp_path: Path) -> None:
    """compressed-tensors' format of a group of its own; GPT-OSS's older name for top-k."""
    for kind, change in (("compressed-tensors", {"quantization_config": {"quant_method": "compressed-tensors", "format": "mixed-precision",
                                                                          "config_groups": {"g": {"format": "mxfp4-pack-quantized"}}}}),
                         ("gpt-oss", {"num_experts_per_tok": None, "experts_per_token": 4})):
        write(tmp_path / kind, kind)
        file = tmp_path / kind / "config.json"
        config = json.loads(file.read_text()) | change
        file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        layer = load_moe_layer(tmp_path / kind, 3)
        assert layer.gate_up.format == ng.MXFP4 and layer.top_k == (4 if kind == "gpt-oss" else TOP_K)


def test_no_such_layer_or_experts(tmp_path: Path) -> None:
    write(tmp_path, "gpt-oss")
    with pytest.raises(ValueError, match=r"layer: got 2, expected one with experts: \[3\]"):
        load_moe_layer(tmp_path, 2)
    with pytest.raises(ValueError, match=r"experts: got range\(0, 9\)"):
        load_moe_layer(tmp_path, 3, experts=range(9))
    with pytest.raises(TypeError, match="blocks, dtype"):
        from_blocks(torch.zeros(2, 3, 16), torch.zeros(2, 3))
