"""`narrowgemm demo`: an expert block of a real model's shapes, FP8 against BF16, each step's error, time and kernel."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..errors import Unsupported, expect
from ..integrations.checkpoints import Checkpoint, MoELayer, load_moe_layer, write_fp8_checkpoint
from ..testing.models import MODELS, MoEModel
from ..testing.timers import make_timer
from .moe_block import Block, Roof, roof_of, run_block

# What fits a laptop's memory and patience, and what fills a GPU. The model's hidden and intermediate sizes are kept.
CPU_SIZES = {"tokens": 64, "experts": 4, "top_k": 2}
GPU_SIZES = {"tokens": 1024, "experts": 32, "top_k": 16}
STEPS = 22  # 8 FP8 steps, the FP32 reference, 5 BF16 steps, 8 measurements: for the progress bar


@click.command()
@click.option("--model", type=click.Choice(sorted(MODELS)), default="deepseek-v3", show_default=True,
              help="The model whose hidden and intermediate sizes are used.")
@click.option("--tokens", type=click.IntRange(1), help="Number of tokens.  [default: 64 on a CPU, 1024 on a GPU]")
@click.option("--experts", type=click.IntRange(1), help="Number of experts.  [default: at most 4 on a CPU, 32 on a GPU]")
@click.option("--top-k", type=click.IntRange(1), help="Experts per token.  [default: the model's; at most 2 on a CPU]")
@click.option("--hidden", type=click.IntRange(128), help="Another hidden size, for a quick run.")
@click.option("--inter", type=click.IntRange(128), help="Another intermediate size (a multiple of 128).")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="FP8 checkpoint on disk.  [default: random weights]")
@click.option("--layer", type=click.IntRange(0), help="Layer of the checkpoint.  [default: the first MoE layer]")
@click.option("--keep", type=click.Path(path_type=Path), help="Write the random checkpoint to this folder and keep it.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda[:N].")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")
def demo(model: str, tokens: int | None, experts: int | None, top_k: int | None, hidden: int | None, inter: int | None,
         checkpoint: Path | None, layer: int | None, keep: Path | None, device: str, seed: int, as_json: bool) -> None:
    """Run one expert block of a model: route, sort, gather, gate_up, SwiGLU, down, combine, and all of it in one op.

    Gather and SwiGLU write FP8. `experts` is the whole layer in one call, and must give the bits that its steps give.
    The weights come from an FP8 checkpoint on disk (128 x 128 blocks), random ones unless --checkpoint names one. The
    same layer runs in BF16 on torch, and both are compared with it in FP32. The exit status is 1 where a product misses
    its numeric gate.
    """
    if checkpoint and (keep or hidden or inter):
        raise click.UsageError("--checkpoint brings its own weights and sizes: not with --keep, --hidden or --inter")
    try:
        target = pick_device(device)
        sizes = GPU_SIZES if target.type == "cuda" else CPU_SIZES
        base = MODELS[model]
        shape = base.scaled(hidden=hidden or 0, inter=inter or 0,
                            experts=experts or min(sizes["experts"], base.experts),
                            top_k=top_k or min(sizes["top_k"], base.top_k))
        tokens = tokens or sizes["tokens"]
        with ExitStack() as stack:
            progress = stack.enter_context(progress_bar(as_json))
            if checkpoint is None:
                folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="narrowgemm-demo-")))
                source = written(folder, shape, seed, target, progress)
                loaded = load_moe_layer(folder, 0, device=target)
            else:
                loaded, shape = from_disk(checkpoint, layer, experts or sizes["experts"], top_k, shape, target)
                source = f"{checkpoint}, layer {loaded.layer}"
            timer = make_timer(target, rounds=7 if target.type == "cuda" else 1)
            roof = roof_of(target, timer)
            x = torch.randn(tokens, loaded.hidden, generator=torch.Generator().manual_seed(seed)).bfloat16().to(target)
            bar = progress.add_task("run", total=STEPS)
            block = run_block(loaded, x, top_k=shape.top_k, activation=shape.activation, timer=timer, roof=roof,
                              on_step=lambda name: progress.update(bar, advance=1, description=name))
            progress.update(bar, completed=STEPS, description="done")
    except (ValueError, OSError, Unsupported) as e:
        raise click.ClickException(str(e)) from e
    doc = document(block, base, shape, loaded, tokens, target, roof, source)
    if as_json:
        click.echo(json.dumps(doc, indent=2))
    else:
        show(Console(), block, doc)
    if not doc["gates_ok"]:
        raise SystemExit(1)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ValueError(f"--device: got {name!r}, expected auto, cpu or cuda[:N]") from e
    expect(device.type in ("cpu", "cuda"), "--device", repr(name), "auto, cpu or cuda[:N]")
    expect(device.type == "cpu" or torch.cuda.is_available(), "--device", repr(name), "cpu: no GPU is visible to torch")
    return device


def progress_bar(quiet: bool) -> Progress:
    return Progress(TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                    console=Console(stderr=True), disable=quiet)


def written(folder: Path, shape: MoEModel, seed: int, device: torch.device, progress: Progress) -> str:
    """Write the checkpoint, or take the one that `--keep` left there before if it is of the same sizes."""
    if (folder / "config.json").exists():
        with Checkpoint(folder) as ckpt:
            names = ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok")
            there = [ckpt.config.get(name) for name in names]
        want = [shape.hidden, shape.inter, shape.experts, shape.top_k]
        expect(there == want, f"checkpoint kept in {folder}, hidden, intermediate, experts, top_k", there,
               f"{want}; choose another folder or read it with --checkpoint")
        return f"{folder}, kept from before"
    bar = progress.add_task("write checkpoint", total=shape.experts)
    write_fp8_checkpoint(folder, shape, seed=seed, shards=min(2, shape.experts), device=device,
                         progress=lambda done, _: progress.update(bar, completed=done))
    return "random weights, written to disk as an FP8 checkpoint and read back"


def from_disk(path: Path, layer: int | None, experts: int, top_k: int | None, shape: MoEModel,
              device: torch.device) -> tuple[MoELayer, MoEModel]:
    """The layer, at most `experts` of its experts, and its sizes as a model's."""
    with Checkpoint(path) as ckpt:
        layers = ckpt.moe_layers()
        expect(bool(layers), f"checkpoint {path}", "no layer with per-expert weights", "at least one")
        number = layers[0] if layer is None else layer
        total = ckpt.num_experts(number)
    loaded = load_moe_layer(path, number, experts=range(min(experts, total)), device=device)
    expect(loaded.router is not None, f"checkpoint {path}, layer {number}", "no router weight", "mlp.gate.weight")
    used = top_k or loaded.top_k
    return loaded, shape.scaled(hidden=loaded.hidden, inter=loaded.inter, experts=len(loaded.experts), top_k=used)


def document(block: Block, base: MoEModel, shape: MoEModel, layer: MoELayer, tokens: int, device: torch.device,
             roof: Roof, source: str) -> dict[str, Any]:
    """Everything that the tables show, as plain data. Times in us, errors as calc_diff."""
    total8, total16 = block.fp8[-1].us, sum(s.us for s in block.bf16)
    return {
        "schema": 1,
        "model": base.name, "weights": source,
        "sizes": {"tokens": tokens, "hidden": layer.hidden, "inter": layer.inter, "experts": len(layer.experts),
                  "top_k": shape.top_k, "active_experts": block.active_experts},
        "full_sizes": {"experts": max(base.experts, layer.num_experts), "top_k": base.top_k},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "roof": {k: getattr(roof, k) for k in roof.__dataclass_fields__},
        "fp8": [s.to_dict() for s in block.fp8], "bf16": [s.to_dict() for s in block.bf16],
        "total_us": {"fp8": total8, "bf16_steps_only": total16},
        "gates": {name: [{"gate": g.name, "limit": g.limit, "overall": g.overall, "worst": g.worst, "expert": g.group,
                          "ok": g.ok} for g in result.gates] for name, result in block.gates.items()},
        "same_bits": block.same_bits,
        "gates_ok": block.same_bits and all(result.ok for result in block.gates.values()),
    }


def show(console: Console, block: Block, doc: dict[str, Any]) -> None:
    s, full = doc["sizes"], doc["full_sizes"]
    cut = f"; the model has top-{full['top_k']} of {full['experts']}" if full["experts"] != s["experts"] else ""
    console.print(f"[bold]{doc['model']}[/]: {s['tokens']} tokens, hidden {s['hidden']}, intermediate {s['inter']}, "
                  f"top-{s['top_k']} of {s['experts']} experts ({s['active_experts']} get tokens){cut}", soft_wrap=True)
    console.print(f"on {doc['device']}, torch {doc['torch']}; weights: {doc['weights']}", soft_wrap=True)
    other = {step.name: step for step in block.bf16}
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in ("step", "time", "TFLOPS", "GB/s", "% roof", "error", "BF16 time", "BF16 err"):
        table.add_column(name, justify="left" if name == "step" else "right", no_wrap=True)
    for step in block.fp8[:-1]:
        twin = other.get(step.name)
        table.add_row(step.name, duration(step.us), f"{step.tflops:.3g}" if step.flops else "", f"{step.gbs:.3g}",
                      f"{100 * step.of_roof:.1f}", number(step.error), duration(twin.us) if twin else "",
                      number(twin.error) if twin else "")
    table.add_section()
    shared = sum(step.us for step in block.fp8 if step.name in ("route", "sort"))
    total = doc["total_us"]
    last = block.fp8[-1]
    table.add_row(last.name, duration(total["fp8"]), f"{last.tflops:.3g}", f"{last.gbs:.3g}", f"{100 * last.of_roof:.1f}",
                  number(last.error),
                  duration(total["bf16_steps_only"] + shared), number(block.bf16[-1].error))
    console.print(table)
    for line in (
            "error: calc_diff against the same layer in FP32, about half the squared relative error.",
            f"roof: the larger of FLOPs and bytes over the device's rates, {doc['roof']['source']}; small steps that "
            "stay in a cache can pass it.",
            "experts: the steps above as one op, router included, with one workspace. BF16: the same layer on "
            "torch.grouped_mm, weights expanded to BF16; its total counts route and sort.",
    ):
        console.print(line, soft_wrap=True, highlight=False)
    for step in block.fp8:
        if step.reason:
            console.print(f"[bold]{step.name}[/] ran on {step.kernel}: {step.reason}", soft_wrap=True, highlight=False)
    console.print("Why each other kernel was passed over: --json has it, and `narrowgemm explain`.", highlight=False)
    bits = "the same bits as" if block.same_bits else "OTHER bits than"
    console.print(f"[bold]experts[/] gives {bits} its steps one by one.", soft_wrap=True, highlight=False)
    for name, result in block.gates.items():
        console.print(f"[bold]{name}[/] {result.message}", soft_wrap=True, highlight=False)
    if doc["device"] == "cpu":
        console.print("On a CPU the reference runs: plain torch in FP32. Its errors are those of the formats; its "
                      "times say nothing about a GPU.", soft_wrap=True)


def duration(us: float) -> str:
    return f"{us:.1f} us" if us < 1e3 else f"{us / 1e3:.1f} ms" if us < 1e6 else f"{us / 1e6:.2f} s"


def number(x: float | None) -> str:
    return "" if x is None else f"{x:.1e}"
