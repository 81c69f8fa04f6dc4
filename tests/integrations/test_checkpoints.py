"""Reading one MoE layer from an FP8 checkpoint: what comes back is what was written, and every defect is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from safetensors.torch import load_file, save_file

from narrowgemm.errors import Unsupported
from narrowgemm.integrations.checkpoints import (
    Checkpoint,
    CheckpointError,
    load_moe_layer,
    write_fp8_checkpoint,
)
from narrowgemm.testing.models import MoEModel

TINY = MoEModel("tiny", hidden=320, inter=128, experts=4, top_k=2)  # hidden leaves a ragged last block of 64
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_fp8_checkpoint(tmp_path / "ckpt", TINY, layers=2, shards=3, seed=1)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for f in sorted(folder.glob("*.safetensors")) for k, v in load_file(f).items()}


def rewrite(folder: Path, change) -> Path:
    """The same checkpoint as one file without an index, after `change(tensors)`."""
    found = tensors(folder)
    change(found)
    for f in folder.glob("*.safetensors"):
        f.unlink()
    (folder / INDEX).unlink()
    save_file(found, folder / "model.safetensors")
    return folder


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def key(expert: int, proj: str, layer: int = 1) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{proj}_proj.weight"


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8)


def test_round_trip(folder: Path) -> None:
    layer = load_moe_layer(folder, 1)
    disk = tensors(folder)
    assert layer.gate_up.shape == (4, 256, 320) and layer.down.shape == (4, 320, 128)
    assert layer.gate_up.scale.shape == (4, 2, 3) and layer.down.scale.shape == (4, 3, 1)
    assert (layer.hidden, layer.inter, layer.num_experts, layer.top_k) == (320, 128, 4, 2)
    for e in range(4):
        gate_up = torch.cat([disk[key(e, "gate")], disk[key(e, "up")]])
        scale = torch.cat([disk[key(e, "gate") + "_scale_inv"], disk[key(e, "up") + "_scale_inv"]])
        assert torch.equal(bits(layer.gate_up.data[e]), bits(gate_up))
        assert torch.equal(layer.gate_up.scale[e], scale)
        assert torch.equal(bits(layer.down.data[e]), bits(disk[key(e, "down")]))
        assert torch.equal(layer.down.scale[e], disk[key(e, "down") + "_scale_inv"])
    assert torch.equal(layer.router, disk["model.layers.1.mlp.gate.weight"]) and layer.router_bias is None


def test_weights_are_usable(folder: Path) -> None:
    layer = load_moe_layer(folder, 0)
    gate_up = layer.gate_up.dequantize()
    assert gate_up.shape == (4, 256, 320)
    assert gate_up.std().item() == pytest.approx(320 ** -0.5, rel=0.02)


def test_writer_ignores_sharding_and_follows_the_seed(tmp_path: Path) -> None:
    a, b, c = (tensors(write_fp8_checkpoint(tmp_path / name, TINY, shards=shards, seed=seed))
               for name, shards, seed in (("a", 1, 7), ("b", 4, 7), ("c", 1, 8)))
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = bits(value) if value.element_size() == 1 else value
        other = bits(b[name]) if value.element_size() == 1 else b[name]
        assert torch.equal(same, other), name
    assert not torch.equal(bits(a[key(0, "gate", 0)]), bits(c[key(0, "gate", 0)]))


def test_writer_spreads_over_shards_and_refuses_to_overwrite(folder: Path) -> None:
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    assert len(set(names.values())) == 3
    with pytest.raises(FileExistsError, match="checkpoint already"):
        write_fp8_checkpoint(folder, TINY)
    with pytest.raises(ValueError, match="shards"):
        write_fp8_checkpoint(folder / "x", TINY, shards=5)


def test_writer_reports_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_fp8_checkpoint(tmp_path / "p", TINY, progress=lambda done, all_: seen.append((done, all_)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_expert_range(folder: Path) -> None:
    whole, part = load_moe_layer(folder, 0), load_moe_layer(folder, 0, experts=range(1, 3))
    assert part.experts == range(1, 3) and part.num_experts == 4
    assert torch.equal(bits(part.gate_up.data), bits(whole.gate_up.data[1:3]))
    assert torch.equal(part.down.scale, whole.down.scale[1:3])
    assert torch.equal(part.router, whole.router)  # routing is over all experts
    assert load_moe_layer(folder, 0, experts=range(2, 2)).gate_up.shape == (0, 256, 320)


def test_expert_range_reads_only_its_shards(folder: Path) -> None:
    names = json.loads((folder / INDEX).read_text())["weight_map"]
    keep = {names[k] for k in names if ".layers.0.mlp.experts.0." in k or ".layers.0.mlp.gate." in k}
    for f in folder.glob("*.safetensors"):
        if f.name not in keep:
            f.unlink()
    assert load_moe_layer(folder, 0, experts=range(0, 1)).gate_up.shape == (1, 256, 320)


@pytest.mark.parametrize("experts", [range(0, 5), range(-1, 2), range(0, 4, 2), range(3, 1)])
def test_expert_range_errors(folder: Path, experts: range) -> None:
    with pytest.raises(ValueError, match=r"experts: got range.*expected .*\[0, 4\]"):
        load_moe_layer(folder, 0, experts=experts)


def test_unknown_layer_names_those_there_are(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"layer: got 5, expected .*\[0, 1\]"):
        load_moe_layer(folder, 5)
    with Checkpoint(folder) as ckpt:
        assert ckpt.moe_layers() == [0, 1]


@pytest.mark.parametrize("alias", ["weight_scale", "scale"])
def test_scale_names(folder: Path, alias: str) -> None:
    want = load_moe_layer(folder, 1)

    def rename(t: dict[str, torch.Tensor]) -> None:
        for k in [k for k in t if k.endswith("weight_scale_inv")]:
            t[k.replace("weight_scale_inv", alias)] = t.pop(k)

    got = load_moe_layer(rewrite(folder, rename), 1)
    assert torch.equal(got.gate_up.scale, want.gate_up.scale)


def test_other_projection_names_and_prefix(folder: Path) -> None:
    want = load_moe_layer(folder, 1)

    def rename(t: dict[str, torch.Tensor]) -> None:
        for k in list(t):
            new = k.replace("model.layers", "model.language_model.layers").replace(".mlp.", ".block_sparse_moe.")
            for old, name in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                new = new.replace(old, name)
            t[new] = t.pop(k)
        t["model.language_model.layers.1.block_sparse_moe.e_score_correction_bias"] = torch.arange(4.0)
        t["mtp.layers.1.mlp.experts.0.gate_proj.weight"] = torch.zeros(1)  # a draft layer with the same number

    got = load_moe_layer(rewrite(folder, rename), 1)
    assert torch.equal(bits(got.gate_up.data), bits(want.gate_up.data)) and torch.equal(got.down.scale, want.down.scale)
    assert torch.equal(got.router, want.router) and torch.equal(got.router_bias, torch.arange(4.0))


def test_bf16_scales_are_widened_and_e8m0_scales_stay_codes(folder: Path) -> None:
    def to_bf16(t: dict[str, torch.Tensor]) -> None:
        t.update({k: v.bfloat16() for k, v in t.items() if k.endswith("_scale_inv")})

    got = load_moe_layer(rewrite(folder, to_bf16), 1)
    stored = tensors(folder)[key(0, "down") + "_scale_inv"]
    assert got.down.scale.dtype == torch.float32 and torch.equal(got.down.scale[0], stored.float())

    def to_e8m0(t: dict[str, torch.Tensor]) -> None:
        t.update({k: torch.full(v.shape, 120, dtype=torch.uint8) for k, v in t.items() if k.endswith("_scale_inv")})

    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(tensors(folder), "model.safetensors")}))
    got = load_moe_layer(rewrite(folder, to_e8m0), 1)
    assert got.down.format.name == "fp8_128x128_ue8m0" and got.down.scale.dtype == torch.uint8
    assert torch.equal(got.down.dequantize()[0], got.down.data[0].float() * 2.0 ** -7)


def test_nested_config_and_compressed_tensors(folder: Path) -> None:
    doc = json.loads((folder / "config.json").read_text())
    quant = {"quant_method": "compressed-tensors", "format": "float-quantized",
             "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "block_structure": [128, 128]}}}}
    (folder / "config.json").write_text(json.dumps({"text_config": doc | {"quantization_config": quant}}))
    assert load_moe_layer(folder, 0).top_k == 2
    outer = {"text_config": doc | {"quantization_config": quant}, "num_experts_per_tok": 1}       # of the vision part, say
    (folder / "config.json").write_text(json.dumps(outer))
    assert load_moe_layer(folder, 0).top_k == 2


def test_weights_are_renormalised_unless_the_config_says_no(folder: Path) -> None:
    assert load_moe_layer(folder, 0).routing["renormalize"] is True
    edit_config(folder, norm_topk_prob=False, routed_scaling_factor=2.5, n_group=2, topk_group=1)
    assert load_moe_layer(folder, 0).routing == {"scoring": "softmax", "renormalize": False, "num_expert_group": 2, "topk_group": 1,
                                                 "scaling_factor": 2.5}


def test_missing_pieces(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_moe_layer(tmp_path / "nowhere", 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_moe_layer(tmp_path / "empty", 0)
    (tmp_path / "empty" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="safetensors"):
        load_moe_layer(tmp_path / "empty", 0)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"shard model-00002-of-00003\.safetensors is missing"):
        load_moe_layer(folder, 0)
        load_moe_layer(folder, 1)


def test_corrupt_pieces(folder: Path) -> None:
    shard = folder / "model-00001-of-00003.safetensors"
    whole = shard.read_bytes()
    for broken in (whole[: len(whole) // 2], b"\xff" * 64, b""):
        shard.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model-00001-of-00003\.safetensors: it can't be read"):
            load_moe_layer(folder, 0)
    shard.write_bytes(whole)
    (folder / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="no JSON"):
        load_moe_layer(folder, 0)
    (folder / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="weight_map"):
        load_moe_layer(folder, 0)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        load_moe_layer(folder, 0)


def test_index_that_points_to_the_wrong_shard(folder: Path) -> None:
    doc = json.loads((folder / INDEX).read_text())
    name = key(0, "down", 0)
    doc["weight_map"][name] = "model-00003-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(doc))
    with pytest.raises(CheckpointError, match=r"model-00003.*the index puts tensor 'model\.layers\.0\.mlp\."):
        load_moe_layer(folder, 0)


def drop_expert(t: dict[str, torch.Tensor]) -> None:
    for k in [k for k in t if ".layers.1.mlp.experts.3." in k]:
        t.pop(k)


DOWN, SCALE = key(1, "down"), key(1, "down") + "_scale_inv"


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop(key(2, "up")), r"expert 2, up projection: got .*expected a weight and a scale"),
    (lambda t: t.pop(key(2, "up") + "_scale_inv"), r"expert 2, up projection: got .*expected a weight and a scale"),
    (drop_expert, r"holds 3 experts, config.json says 4; missing: \[3\]"),
    (lambda t: t.update({DOWN: t[DOWN].float()}), r"F32 .*expected F8_E4M3"),
    (lambda t: t.update({DOWN: t[DOWN].view(torch.uint8)}), r"U8 .*expected F8_E4M3"),
    (lambda t: t.update({DOWN: t[DOWN].flatten()}), r"F8_E4M3 \(40960,\), expected F8_E4M3 \[N, K\]"),
    (lambda t: t.update({DOWN: t[DOWN][:64].contiguous()}), r"weight_scale_inv: got .*expected \(1, 1\)"),
    (lambda t: t.update({DOWN: t[DOWN][:300].contiguous()}), r"got \(300, 128\) .*expected \(320, 128\)"),
    (lambda t: t.update({SCALE: torch.zeros(3, 1, dtype=torch.int32)}), r"got I32 \(3, 1\), expected"),
    (lambda t: t.update({SCALE: torch.zeros(3, 1, dtype=torch.uint8)}), r"with e8m0 scales, expected"),
    (lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.zeros(3, 320)}), r"gate\.weight: got F32 \(3, 320\)"),
], ids=["no weight", "no scale", "no expert", "float weight", "byte weight", "flat weight", "few rows", "other rows",
        "int scale", "mixed scales", "router"])
def test_wrong_tensors(folder: Path, change, message: str) -> None:
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load_moe_layer(folder, 1)
    load_moe_layer(folder, 0)  # the other layer is whole


def test_other_quantisations_are_refused(folder: Path, tmp_path: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CheckpointError, match=r"quant_method: got 'gptq', expected 'fp8'"):
        load_moe_layer(folder, 0)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [64, 64]})
    with pytest.raises(Unsupported, match=r"\[64, 64\].*128 x 128"):
        load_moe_layer(folder, 0)
    edit_config(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match="got None"):
        load_moe_layer(folder, 0)
    odd = write_fp8_checkpoint(tmp_path / "odd", MoEModel("odd", 256, 192, 2, 1))
    with pytest.raises(Unsupported, match="192, no multiple of 128"):
        load_moe_layer(odd, 0)


MEMORY_PROBE = """
import sys, threading
from narrowgemm.integrations.checkpoints import load_moe_layer

def private():
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("RssAnon")) * 1024

load_moe_layer(sys.argv[1], 0, experts=range(0, 1))
before, peak, done = private(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, private())

thread = threading.Thread(target=watch)
thread.start()
layer = load_moe_layer(sys.argv[1], 0)
done.set()
thread.join()
size = sum(t.numel() * t.element_size() for w in (layer.gate_up, layer.down) for t in (w.data, w.scale))
print((max(peak, private()) - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_loading_takes_the_memory_of_one_copy(tmp_path: Path) -> None:
    folder = write_fp8_checkpoint(tmp_path / "big", MoEModel("big", 2048, 1024, 8, 2))
    run = subprocess.run([sys.executable, "-c", MEMORY_PROBE, str(folder)], capture_output=True, text=True,
                         env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) < 1.3
