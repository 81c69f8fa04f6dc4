"""Roofline of a result: achieved TFLOPS over FLOPs a byte, under the ceilings measured in the same run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from ..testing.cases import SUITES
from ..testing.results import Row


def points(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """(FLOPs a byte, TFLOPS) by who computed: ours by suite, peers by name."""
    cases = {(c.suite, c.id): c for members in SUITES.values() for c in members}
    out: dict[str, dict[tuple[Any, ...], tuple[float, float]]] = {}
    for r in rows:
        case = cases.get((r["suite"], r["case"]))
        if case is None or not r["us"] or r["error"] or not case.flops:
            continue
        x = case.flops / case.bytes
        out.setdefault(f"{r['suite']} ({r['asked']})", {})[(r["suite"], r["case"])] = (x, case.flops / r["us"] * 1e-6)
        if r["peer_us"] and r["peer"] != "floor":
            out.setdefault(r["peer"], {})[(r["suite"], r["case"])] = (x, case.flops / r["peer_us"] * 1e-6)
    return {name: list(p.values()) for name, p in out.items()}


def roofline(path: Path, header: dict[str, Any], rows: Sequence[Row]) -> None:
    """Draw to a PNG. ClickException without matplotlib or without a single figure."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as e:
        raise click.ClickException(f"--plot needs matplotlib ({e}): pip install '.[bench]' in a checkout") from e
    series = points(rows)
    if not series:
        raise click.ClickException("--plot: no row has a figure")
    figure, axes = pyplot.subplots(figsize=(9, 6))
    xs = [x for p in series.values() for x, _ in p]
    low, high = min(xs) / 1.5, max(xs) * 1.5
    grid = [low * (high / low) ** (i / 100) for i in range(101)]
    ceilings = header.get("ceilings") or {}
    for name, rate in ceilings.items():
        if name.startswith("flops"):
            axes.plot(grid, [min(rate, x * ceilings["read_gbs"] * 1e-3) for x in grid], "--", lw=1, color="grey",
                      label=f"measured: {ceilings['read_gbs']:.3g} GB/s, {rate:.3g} TFLOPS ({name.split('_')[1]}-bit)")
    for (name, p), marker in zip(series.items(), "o^sDvP*X<>" * 10):
        axes.scatter([x for x, _ in p], [y for _, y in p], s=22, marker=marker, label=name, alpha=0.8)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte (operands in use and output, once)", ylabel="TFLOPS",
             title=", ".join(str(header.get(k) or "")[:n] for k, n in (("device", 40), ("commit", 10), ("date", 10))))
    axes.grid(True, which="both", lw=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
