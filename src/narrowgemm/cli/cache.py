"""`narrowgemm cache`: where compiled kernels are kept, clearing them, and compiling a model's shapes ahead."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool

import click

from ..arch import Arch, detect, get_arch
from ..errors import Unsupported
from ..problem import Plan
from ..runtime import cache as store
from ..testing.models import MODELS, get_model
from .bench import Progress, split

LAYOUTS = ("dense", "contiguous", "psum", "offsets", "masked")
ACTIVATIONS = {"fp8_128x128": "fp8_1x128", "mxfp8": "mxfp8", "mxfp4": "bf16"}   # what goes with weights of a format
CONTEXT_BYTES = 1 << 30   # that a process takes on a GPU beside its tensors
Work = list[tuple[store.Unit, Plan]]


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
    """Remove compiled kernels; they are compiled again when they are needed."""
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
              help=f"How rows belong to groups: {', '.join(LAYOUTS)}; several times, or with commas.")
@click.option("--max-m", type=click.IntRange(1), default=4096, show_default=True, help="Most rows (masked: of a group).")
@click.option("--a", "a", metavar="FORMAT", help="Format of activations.  [default: what suits the model's weights]")
@click.option("--out-dtype", type=click.Choice(["bf16", "fp16", "fp32"]), default="bf16", show_default=True)
@click.option("--processes", type=click.IntRange(1), default=min(8, os.cpu_count() or 1), show_default=True,
              help="Processes that compile side by side; fewer if memory is short.")
@click.option("--device", default=None, help="A GPU (cuda, cuda:1); or a device name (h200), to list what it would compile.")
def warm(model: str, tp: int, ep: int, layouts: tuple[str, ...], max_m: int, a: str | None, out_dtype: str,
         processes: int, device: str | None) -> None:
    """Compile what the two products of a model's experts need, ahead of the first call.

    \b
    narrowgemm cache warm --model deepseek-v3 --ep 8 --layout offsets,masked --max-m 8192
    """
    import torch

    names = split(layouts)
    for name in names:
        if name not in LAYOUTS:
            raise click.BadParameter(f"{name!r} is none of {', '.join(LAYOUTS)}", param_hint="--layout")
    arch, where = target(device)
    try:
        work = plan_work(model, tp, ep, names, max_m, a, out_dtype, arch)
    except Unsupported as e:
        raise click.ClickException(str(e)) from e
    except ValueError as e:
        raise click.UsageError(str(e)) from e
    compiled = [(u, p) for u, p in work if p.backend != "reference"]
    for text in described(work, arch):
        click.echo(text)
    if where is None or not torch.cuda.is_available():
        need = max((u.bytes for u, _ in compiled), default=0.0) / 1e9
        raise click.ClickException(
            f"nothing was compiled: compiling ahead launches every kernel once, which takes a GPU of the kind that will "
            f"serve, here {arch.name}, with {need:.1f} GB free for each process. "
            + ("--device h200 lists what an H200 needs." if arch.name == "cpu" else ""))
    free = torch.cuda.mem_get_info(torch.device(where))[0]
    need = max((u.bytes for u, _ in compiled), default=0.0) + CONTEXT_BYTES
    run(compiled, where, max(1, min(processes, len(compiled), int(0.9 * free / need))))


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


def plan_work(model: str, tp: int, ep: int, layouts: Sequence[str], max_m: int, a: str | None, out_dtype: str,
              arch: Arch) -> Work:
    """A unit for each Plan of each product and layout. Raises ValueError (a format), Unsupported."""
    m = get_model(model)
    work: Work = []
    for n, k in dict.fromkeys((m.gate_up(tp), m.down(tp))):
        for layout in layouts:
            unit = store.Unit(layout, 1 if layout == "dense" else m.local_experts(ep), n, k, a or ACTIVATIONS[m.weights],
                              m.weights, out_dtype, max_m, store.buckets(max_m))
            work += store.split(unit, arch)
    return work


def described(work: Work, arch: Arch) -> list[str]:
    lines = [f"on {arch.name} ({arch.target}):"]
    for unit, plan in work:
        rows = ",".join(map(str, unit.sizes))
        what = plan.kernel if plan.backend != "reference" else "reference, nothing to compile"
        lines.append(f"  {unit.layout:10s} G{unit.groups} N{unit.n} K{unit.k} rows {rows}: {what} {plan.config}")
    return lines


def run(work: Work, where: str, processes: int) -> None:
    """Compile every unit in a pool of processes. ClickException where one failed."""
    errors = []
    with Progress(len(work)) as bar, ProcessPoolExecutor(
            processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        bar.describe(f"compiling in {processes} processes")
        jobs: dict[Future[int], store.Unit] = {pool.submit(store.compile_unit, u, where): u for u, _ in work}
        for job in as_completed(jobs):
            unit = jobs[job]
            try:
                job.result()
            except BrokenProcessPool:
                errors.append(f"{unit}: its process died")
            except (RuntimeError, ValueError, TypeError, OSError) as e:
                errors.append(f"{unit}: {type(e).__name__}: {e}")
            bar.advance()
    click.echo(f"compiled {len(work) - len(errors)} of {len(work)} into {store.folder()}")
    if errors:
        raise click.ClickException("; ".join(errors[:3]))
