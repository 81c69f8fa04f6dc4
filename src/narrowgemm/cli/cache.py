"""`narrowgemm cache`: where compiled kernels are kept, clearing them, and compiling a model's shapes ahead."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import click

from ..arch import Arch, detect, get_arch
from ..errors import Unsupported, expect
from ..ops.compile_ahead import Layer, Products, Workload, by_kernels
from ..problem import Plan, buckets
from ..runtime import cache as store
from ..testing.models import MODELS, get_model
from .bench import Progress, split

LAYOUTS = ("dense", "contiguous", "psum", "offsets", "masked", "experts")
PACKED = ("bf16", "fp8", "mxfp8", "no")
ACTIVATIONS = {"fp8_128x128": "fp8_1x128", "mxfp8": "mxfp8", "mxfp4": "bf16"}   # what goes with weights of a format
CONTEXT_BYTES = 1 << 30   # that a process takes on a GPU beside its tensors
Work = list[tuple[Workload, list[str]]]    # what to call, and the kernels with their configs that it launches


@click.group()
def cache() -> None:
    """Triton's compile cache: where it is, clearing it, compiling a model's shapes ahead."""


@cache.command()
def info() -> None:
    """Where compiled kernels are kept, how many and how large."""
    root = store.folder()
    found = store.entries(root)
    if not root.is_dir():
        click.echo(f"folder    {root} (not there yet)")
        return
    own = [e for e in found if e.own]
    click.echo(f"folder    {root} ({'writable' if os.access(root, os.W_OK) else 'NOT writable'})")
    click.echo(f"entries   {len(found)}, {size(found)}")
    click.echo(f"of these  {len(own)} are narrowgemm's, {size(own)}")
    for name, count in sorted(Counter(e.kernel for e in own).items()):
        click.echo(f"  {count:5d}  {name}  {size([e for e in own if e.kernel == name])}")


@cache.command()
@click.option("--all", "everything", is_flag=True, help="Also remove other packages' kernels and Triton's helpers.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def clear(everything: bool, yes: bool) -> None:
    """Remove compiled kernels; they are compiled again when needed."""
    root = store.folder()
    found = [e for e in store.entries(root) if everything or e.own]
    if not found:
        click.echo(f"nothing to remove in {root}")
        return
    if not yes:
        click.confirm(f"remove {len(found)} entries, {size(found)}, from {root}?", abort=True)
    count, freed = store.clear(found)
    click.echo(f"removed {count} entries, {freed / 1e6:.1f} MB")
    if count < len(found):
        raise click.ClickException(f"{len(found) - count} entries could not be removed from {root}")


def size(found: Sequence[store.Entry]) -> str:
    return f"{sum(e.bytes for e in found) / 1e6:.1f} MB"


@cache.command()
@click.option("--model", type=click.Choice(sorted(MODELS)), required=True)
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Ranks of tensor parallelism.")
@click.option("--ep", type=click.IntRange(1), default=1, show_default=True, help="Ranks of expert parallelism.")
@click.option("--layout", "layouts", multiple=True, default=["offsets", "masked"], show_default=True,
              help="How rows belong to groups: dense, contiguous, psum, offsets, masked; or experts, the whole layer in one call; "
                   "several times, or with commas.")
@click.option("--max-m", type=click.IntRange(1), default=4096, show_default=True,
              help="Most rows (masked: of a group; experts: tokens).")
@click.option("--a", "a", metavar="FORMAT", help="Format of activations.  [default: what suits the model's weights]")
@click.option("--packed", type=click.Choice(PACKED), help="MXFP4 and MXFP8 weights went through `prepack`, for activations of that "
              "kind.  [default: bf16 on Hopper, elsewhere no]")
@click.option("--out-dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--processes", type=click.IntRange(1), default=min(8, os.cpu_count() or 1), show_default=True,
              help="Processes that compile side by side; fewer if memory is short.")
@click.option("--device", default=None, help="A GPU (cuda, cuda:1); or a device name (h200), to list what it would compile.")
def warm(model: str, tp: int, ep: int, layouts: tuple[str, ...], max_m: int, a: str | None, packed: str | None, out_dtype: str,
         processes: int, device: str | None) -> None:
    """Compile what a model's experts need, ahead of the first call: their two products, or the whole layer.

    \b
    narrowgemm cache warm --model deepseek-v3 --ep 8 --layout offsets,masked --max-m 8192
    narrowgemm cache warm --model gpt-oss-120b --layout experts
    narrowgemm cache warm --model gpt-oss-120b --layout experts --device h200       lists the kernels; needs no GPU
    """
    import torch

    names = split(layouts)
    for name in names:
        if name not in LAYOUTS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(LAYOUTS)}", param_hint="--layout")
    arch, where = target(device)
    try:
        work = plan_work(model, tp, ep, names, max_m, a, packed, out_dtype, arch)
    except Unsupported as e:
        raise click.ClickException(str(e)) from e
    except ValueError as e:
        raise click.UsageError(str(e)) from e
    compiled = [(calls, kernels) for calls, kernels in work if kernels]
    for text in described(work, arch):
        click.echo(text)
    need = max((calls.bytes for calls, _ in compiled), default=0.0)
    takes = f"a GPU of the kind that will serve, here {arch.name}, with {need / 1e9:.1f} GB free for each process"
    if where is None and arch.name != "cpu":
        click.echo(f"listed, not compiled: compiling launches every kernel once, which takes {takes}")
        return
    if where is None or not torch.cuda.is_available():
        raise click.ClickException(f"nothing was compiled: compiling ahead launches every kernel once, which takes {takes}. "
                                   "--device h200 lists what an H200 needs.")
    free = torch.cuda.mem_get_info(torch.device(where))[0]
    run(compiled, where, max(1, min(processes, len(compiled), int(0.9 * free / (need + CONTEXT_BYTES)))))


def target(device: str | None) -> tuple[Arch, str | None]:
    """What to plan for, and the torch device to compile on, None for a device that is only named."""
    import torch

    if device is None or device.partition(":")[0] in ("cuda", "cpu"):
        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        if where.startswith("cuda") and not torch.cuda.is_available():
            raise click.ClickException(f"--device {where}: there is no GPU here")
        return detect(torch.device(where)), where if where.startswith("cuda") else None
    try:
        return get_arch(device), None
    except ValueError as e:
        raise click.BadParameter(str(e), param_hint="--device") from e


def plan_work(model: str, tp: int, ep: int, layouts: Sequence[str], max_m: int, a: str | None, packed: str | None, out_dtype: str,
              arch: Arch) -> Work:
    """Calls of each product and layout, in parts by kernel. Raises ValueError (a format), Unsupported."""
    m = get_model(model)
    narrow = m.weights in ("mxfp4", "mxfp8")
    expect(narrow or packed in (None, "no"), "packed", packed, f"no: {model}'s weights are {m.weights}, which needs no packing")
    pack = packed or ("bf16" if narrow and arch.target == "sm90" else "no")
    pack = "" if pack == "no" else pack
    work: Work = []
    for n, k in dict.fromkeys((m.gate_up(tp), m.down(tp))):
        for layout in (x for x in layouts if x != "experts"):
            products = Products(layout, 1 if layout == "dense" else m.local_experts(ep), n, k, a or ACTIVATIONS[m.weights],
                                m.weights, out_dtype, max_m, buckets(max_m), pack)
            work += [(part, kernels_of(plans)) for part, plans in by_kernels(products, arch)]
    if "experts" in layouts:
        layer = Layer(m.local_experts(ep), m.experts, m.hidden, m.inter // tp, m.top_k, m.weights, m.activation,
                      m.oss, m.oss, out_dtype, buckets(max_m), pack, a)
        work += [(part, kernels_of(plans)) for part, plans in by_kernels(layer, arch)]
    return work


def kernels_of(plans: Mapping[str, Plan]) -> list[str]:
    """The kernels that are compiled, each after the name of its step."""
    return [f"{name} {p.kernel} {p.config}".strip() for name, p in plans.items() if p.backend not in ("reference", "torch")]


def described(work: Work, arch: Arch) -> list[str]:
    return [f"on {arch.name} ({arch.target}):",
            *(f"  {calls}: {'; '.join(kernels) or 'reference, nothing to compile'}" for calls, kernels in work)]


def compile_ahead(calls: Workload, where: str) -> int:
    """What a process of the pool does; a function of the module, because it is pickled by name."""
    return calls.compile(where)


def run(work: Work, where: str, processes: int) -> None:
    """Compile every part in a pool of processes. ClickException where one failed."""
    errors = []
    with Progress(len(work)) as bar, ProcessPoolExecutor(
            processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        bar.describe(f"compiling in {processes} processes")
        jobs: dict[Future[int], Workload] = {pool.submit(compile_ahead, calls, where): calls for calls, _ in work}
        for job in as_completed(jobs):
            try:
                job.result()
            except BrokenProcessPool:
                errors.append(f"{jobs[job]}: its process died")
            except (RuntimeError, ValueError, TypeError, OSError) as e:
                errors.append(f"{jobs[job]}: {type(e).__name__}: {e}")
            bar.advance()
    click.echo(f"compiled {len(work) - len(errors)} of {len(work)} into {store.folder()}")
    if errors:
        raise click.ClickException("; ".join(errors[:3]))
