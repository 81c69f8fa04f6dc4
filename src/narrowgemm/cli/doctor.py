"""`narrowgemm doctor`: is this installation sound, and does every kernel compute right on this device?"""

from __future__ import annotations

import json
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import click

from ..runtime import cache, env
from ..testing.selftest import NOT_HERE
from ..tuning import store

LEAST = {"torch": (2, 10), "triton": (3, 6)}
OPTIONAL_LEAST = {"transformers": (5, 7)}
FREE_BYTES = 1 << 30
SELFTEST = "narrowgemm.testing.selftest"
PROCESSES = 6        # of the self-test on a GPU, at most


@dataclass(frozen=True, slots=True)
class Finding:
    """`status`: 'ok', 'failed', 'warning' or 'not here'."""

    what: str
    status: str
    detail: str = ""


@click.command()
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda[:N].")
@click.option("--budget", type=click.FloatRange(0), default=45.0, show_default=True,
              help="Seconds after which only kernels without a result yet are tried.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor(device: str, budget: float, as_json: bool) -> None:
    """Check versions, driver, compile cache and tuned tables, and run every kernel against the reference. Under a minute.

    The exit status is 1 where something failed. `narrowgemm env` shows more of the installation, for an issue.
    """
    start = time.monotonic()
    found: list[Finding] = []
    for finding in findings(device, budget):
        found.append(finding)
        if not as_json:
            click.echo(f"{finding.status:9s} {finding.what:34s} {finding.detail}".rstrip())
    counts = {s: sum(f.status == s for f in found) for s in ("ok", "warning", NOT_HERE, "failed")}
    if as_json:
        click.echo(json.dumps({"findings": [asdict(f) for f in found], "counts": counts}, indent=1))
    else:
        click.echo(", ".join(f"{n} {s}" for s, n in counts.items() if n) + f", in {time.monotonic() - start:.0f} s")
    if counts["failed"]:
        raise SystemExit(1)


def findings(device: str, budget: float) -> Iterator[Finding]:
    """Everything that is looked at, as it is found."""
    yield from versions()
    where, finding = target(device)
    yield finding
    yield compile_cache()
    yield from tables(arch_name(where) if where else "")
    if where:
        yield from selftest(where, budget)


def versions() -> Iterator[Finding]:
    """Of what the package needs, and of what parts of it do."""
    for name, least in (LEAST | OPTIONAL_LEAST).items():
        wanted = ".".join(map(str, least))
        try:
            there = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in LEAST:
                missing = "failed" if name == "torch" else "warning"
                yield Finding(name, missing, f"not installed; >= {wanted} is needed" + " for GPU kernels" * (name == "triton"))
            continue
        enough = tuple(map(int, re.findall(r"\d+", there)[:2])) >= least
        yield Finding(name, "ok" if enough else "failed" if name in LEAST else "warning",
                      there if enough else f"{there}; >= {wanted} is needed")


def target(device: str) -> tuple[str, Finding]:
    """The device to test, '' where there is none, and what is to be said of it."""
    import torch

    from ..arch import detect
    from .demo import pick_device

    try:
        where = pick_device(device)
    except ValueError as e:
        return "", Finding("device", "failed", str(e))
    arch = detect(where)
    if where.type == "cpu":
        hidden = shutil.which("nvidia-smi") is not None and not torch.cuda.is_available()
        why = "; a GPU driver is here, but this torch sees no GPU" if hidden else ""
        return "cpu", Finding("device", "warning" if hidden else "ok", f"CPU: reference kernels{why}")
    name = torch.cuda.get_device_name(where)
    free, total = torch.cuda.mem_get_info(where)
    return str(where), Finding("device", "ok", f"{name} ({arch.target}), {free / 1e9:.0f} of {total / 1e9:.0f} GB free, "
                                               f"CUDA {torch.version.cuda or torch.version.hip}")


def arch_name(device: str) -> str:
    import torch

    from ..arch import detect

    return detect(torch.device(device)).name


def compile_cache() -> Finding:
    """Whether Triton's cache can be written, and has room."""
    root = cache.folder()
    there = next(p for p in (root, *root.parents) if p.exists())
    if not os.access(there, os.W_OK):
        return Finding("compile cache", "failed", f"{root} can't be written: set TRITON_CACHE_DIR")
    free = shutil.disk_usage(there).free
    return Finding("compile cache", "ok" if free > FREE_BYTES else "warning",
                   f"{root}, {len(cache.entries(root))} entries, {free / 1e9:.0f} GB free")


def tables(device: str = "") -> Iterator[Finding]:
    """The user's tables and the packaged ones. Rows that are passed over are a warning where `device`, an arch's name, would read
    them; those of the user's own folder always are."""
    own = env.get("NARROWGEMM_TABLES")
    for root in (Path(own) if own else None, store.PACKAGED):
        if root is None:
            continue
        try:
            rows = {path: store.read_rows(path) for path in sorted(root.glob("*/*.json"))}
            old = Counter({path.parent.name: 0 for path in rows})
            for path in rows:
                old[path.parent.name] += len(store.outdated(rows[path]))
        except (ValueError, OSError) as e:
            yield Finding("tuned tables", "failed", str(e))
            continue
        passed = "".join(f"; {n} of them, for the {name}, are passed over, because their kernels have changed since: "
                         "`narrowgemm tune` there makes new ones" for name, n in old.items() if n)
        read = (device, store.SIBLINGS.get(device, ""))
        matters = any(n and (root != store.PACKAGED or name in read) for name, n in old.items())
        yield Finding("tuned tables", "warning" if matters else "ok", f"{sum(map(len, rows.values()))} rows in {root}{passed}")


def selftest(device: str, budget: float) -> Iterator[Finding]:
    """In processes of their own: a kernel that takes the device with it is a line here, and no end of the report. On a GPU several,
    each with its share of the kernels, because what takes time is compiling them."""
    count = 1 if device == "cpu" else max(1, min(PROCESSES, (os.cpu_count() or 1) // 2))
    lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
    children: list[subprocess.Popen[str]] = []
    said = [tempfile.TemporaryFile("w+", errors="replace") for _ in range(count)]  # noqa: SIM115 - closed below
    env_ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}

    def read(i: int) -> None:
        for line in children[i].stdout or ():
            lines.put((i, line))
        lines.put((i, None))

    try:
        for i in range(count):
            children.append(subprocess.Popen([sys.executable, "-m", SELFTEST, device, str(budget), f"{i}/{count}"],
                                             stdout=subprocess.PIPE, stderr=said[i], text=True, env=env_))
            threading.Thread(target=read, args=(i,), daemon=True).start()
        failed, running = set(), count
        while running:
            i, line = lines.get()
            if line is None:
                running -= 1
                if children[i].wait() and i not in failed:
                    said[i].seek(0)
                    last = said[i].read()[-2000:].strip().splitlines()
                    why = f"its process ended with {children[i].returncode}: {last[-1] if last else ''}"
                    yield Finding("self-test", "failed", why)
            elif line.startswith("{"):
                r = json.loads(line)
                if r["status"] == "failed":
                    failed.add(i)
                detail = f"{r['case']}: {r['detail']}, {r['seconds']:.1f} s" if r["case"] else r["detail"]
                yield Finding(r["kernel"], r["status"], detail)
    finally:
        for child, file in zip(children, said):
            child.kill()
            child.wait()
            file.close()
