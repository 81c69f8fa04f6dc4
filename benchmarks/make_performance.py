"""Writes docs/performance.md and its pictures from the committed result files: figures are never typed.

    python benchmarks/make_performance.py            needs matplotlib
    python benchmarks/make_performance.py --check    exits with 1 where the page is not what the files say

A device's pictures: speed against each peer by suite, the roofline, and the time of one product against tokens. Which rows count
is decided as in `make_tables.py`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import make_tables

ROOT = make_tables.ROOT
PAGE = Path("docs/performance.md")
PICTURES = Path("docs/pictures")
HEAD = """# Performance

Every figure and picture here is made from the result files in `benchmarks/results/` by `benchmarks/make_performance.py`. A
ratio is the peer's time over ours, both from one interleaved run on that device, with L2 flushed before every call: above 1
ours is faster, below 1 the peer is. The worst case is the one with the smallest ratio; its name says layout, groups (g), rows a
group (m), N and K, and how rows are spread (`topk_64_8`: 64 tokens, 8 experts each). Times of different runs, and of different
devices, are not compared. What was tried on the way, kept or dropped, is in [measured.md](measured.md); what was run on which
chip at all, in [chips.md](chips.md).

`floor` is no library but a bound: the larger of a streaming read of the same bytes in the same run and the FLOPs over the rate
that the device was measured to have. A ratio of 0.90 means that a tenth of our time could be saved at the most. The read keeps
its lines in L2, as loads do: a kernel whose weights pass through L2 can be a tenth faster than that.

| peer | what it is |
| --- | --- |
| `deepgemm` | DeepGEMM, FP8 in blocks; for MXFP4 weights, which it doesn't take on Hopper, FP8 weights of that shape |
| `deepgemm_block` | DeepGEMM, FP8 in blocks, from the same sources as an MXFP8 case |
| `deepgemm_layer`, `triton_kernels_layer` | a whole layer: DeepGEMM with Triton steps around it; triton_kernels |
| `triton_moe` | a whole layer in Triton, as vLLM's fused MoE is built |
| `triton_kernels` | Triton's own MoE product, BF16 x MXFP4 |
| `humming`, `humming_w4a8_token` | Humming, BF16 activations; FP8 ones with a scale a row |
| `torch_bf16`, `torch_row` | torch: the product in BF16; its row-wise FP8 grouped product |
| `torch_step`, `torch_step_fused` | a training step in BF16 by torch alone; with our SwiGLU |
| `dequant_bf16`, `dot_scaled` | both sides to BF16 in every call, then torch; Triton's `tl.dot_scaled` in one fixed tile |
| `triton`, `triton_best`, `own_fp8` | ours: the portable kernel; its best config; our FP8 kernel for that shape |
"""


# suites whose aims are other ones where bytes bound a case
BY_BOUND = ("mxfp4-256", "mxfp4-256-row", "mxfp4-masked", "mxfp4-masked-few")


def rows_of(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that count of one device."""
    return make_tables.rows_of(make_tables.in_order(make_tables.newest(files)))


def pictured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that pictures show: what a call gets, without transforms inside."""
    return [r for r in rows if r["asked"] == "auto"]


def newest(files: list[dict[str, Any]]) -> dict[str, Any]:
    return max(files, key=lambda d: str(d["date"]))


def shapes(rows: Sequence[dict[str, Any]]) -> dict[str, dict[int, dict[str, float]]]:
    """Product or layer -> tokens -> whose time in us: those that were measured at three numbers of tokens or more."""
    from narrowgemm.testing.cases import SUITES

    cases = {(c.suite, c.id): c for members in SUITES.values() for c in members}
    out: dict[str, dict[int, dict[str, float]]] = {}
    for r in rows:
        case = cases.get((r["suite"], r["case"]))
        if case is None or not r["us"] or r["error"]:
            continue
        tokens, name = place(case)
        if not tokens:
            continue
        times = out.setdefault(name, {}).setdefault(tokens, {})
        times["narrowgemm"] = r["us"]
        if r["peer_us"]:
            times[r["peer"]] = r["peer_us"]
    return {name: dict(sorted(t.items())) for name, t in sorted(out.items()) if len(t) >= 3}


def place(case: Any) -> tuple[int, str]:
    """(tokens, what it is besides), 0 where tokens say nothing."""
    from narrowgemm.testing.layer import LayerCase

    if isinstance(case, LayerCase):
        return case.tokens, f"layer {case.model}, EP {case.ep}, {case.weights}"
    formats = f"{case.a.name} x {case.b.name}"
    if case.sizes.startswith("topk:"):
        return int(case.sizes.split(":")[1]), f"routed, {case.groups} experts of {case.n} x {case.k}, {formats}"
    if case.layout == "dense":
        return case.m, f"dense {case.n} x {case.k}, {formats}"
    return 0, ""


def suites(seen: set[str]) -> list[str]:
    """What the suites that have rows measure."""
    from narrowgemm.testing.cases import TITLES

    return ["| suite | what it measures |", "| --- | --- |", *(f"| `{name}` | {TITLES[name]} |" for name in TITLES if name in seen)]


def bounds(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The suites of BY_BOUND, by what the floor of a case is."""
    from narrowgemm.testing import results

    rows = [r for r in rows if r["suite"] in BY_BOUND and r["asked"] == "auto"]
    of = {(r["suite"], r["case"]): r["note"].rpartition("floor by ")[2] for r in rows if r["peer"] == "floor" and r["note"]}
    lines = []
    for bound in ("bytes", "FLOPs"):
        for x in results.summarise([r for r in rows if of.get((r["suite"], r["case"])) == bound]):
            lines.append((x.suite, f"| `{x.suite}` | {bound} | {x.peer} | {x.cases} | {x.mean:.2f} | {x.worst:.2f} |"))
    if not lines:
        return []
    return ["MXFP4 by what bounds a case: bytes, where they take longer to be read than its FLOPs at the FP8 rate above.", "",
            "| suite | bound by | against | cases | geometric mean | worst |", "| --- | --- | --- | ---: | ---: | ---: |",
            *(line for _, line in sorted(lines, key=lambda x: BY_BOUND.index(x[0]))), ""]


def page_of(devices: dict[str, list[dict[str, Any]]], rows: dict[str, list[dict[str, Any]]]) -> str:
    """The text of the page. `devices`: result files by device; `rows`: those of each that count."""
    from narrowgemm.cli.report import markdown_table
    from narrowgemm.testing import results

    seen = {r["suite"] for mine in rows.values() for r in mine}
    parts = [HEAD, *suites(seen), ""]
    for name, files in devices.items():
        header, mine = newest(files), rows[name]
        chosen = make_tables.newest(files)
        used = [*{id(d): d for some in chosen.values() for d in some}.values()]
        c = header["ceilings"] or {}
        parts += [f"## {header['device']}", "", make_tables.described("Measured with", used), "",
                  f"Measured in the newest of these runs: {c.get('read_gbs', 0):.0f} GB/s streaming read, "
                  f"{c.get('flops_8', 0):.0f} TFLOPS in FP8 and {c.get('flops_16', 0):.0f} in BF16 through torch.",
                  "", *markdown_table(results.summarise(mine)), "", *bounds(mine),
                  *make_tables.not_asked(make_tables.left_out(chosen)), *make_tables.wrong(mine)]
        parts += [f"![{what}](pictures/performance-{name}-{kind}.svg)\n" for kind, what in drawn(pictured(mine))]
    return "\n".join(parts).rstrip() + "\n"


def drawn(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(kind, what the picture shows) of a device's pictures."""
    out = [("speed", "Each case's time against each peer, by suite: a dot a case, the bar their geometric mean"),
           ("roofline", "TFLOPS over FLOPs a byte")]
    return out + [("tokens", "Time of one product or layer over tokens")] * bool(shapes(rows))


def draw(folder: Path, name: str, rows: list[dict[str, Any]], header: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "narrowgemm"      # the same file from the same figures
    matplotlib.rcParams["svg.fonttype"] = "none"            # text as text: half the bytes
    from matplotlib import pyplot

    from narrowgemm.cli import plot

    folder.mkdir(parents=True, exist_ok=True)
    for kind, _ in drawn(rows):
        path = folder / f"performance-{name}-{kind}.svg"
        if kind == "roofline":
            plot.roofline(path, header, rows)
            continue
        figure = speed(pyplot, rows) if kind == "speed" else tokens(pyplot, shapes(rows))
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def speed(pyplot: Any, rows: Sequence[dict[str, Any]]) -> Any:
    """Ratios by suite and peer, the floor left out."""
    groups: dict[tuple[str, str], list[float]] = {}
    for r in rows:
        if r["ratio"] and r["peer"] != "floor":
            groups.setdefault((r["suite"], r["peer"]), []).append(r["ratio"])
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.28 * max(1, len(groups))))
    for y, found in enumerate(reversed(groups.values())):
        axes.plot(found, [y] * len(found), "o", ms=3, alpha=0.5, color="C0")
        mean = statistics.geometric_mean(found)
        axes.plot([mean, mean], [y - 0.35, y + 0.35], color="C3", lw=2)
    axes.axvline(1, color="grey", lw=1)
    axes.set(xscale="log", yticks=range(len(groups)), xlabel="peer's time / ours",
             yticklabels=[f"{s} vs {p}" for s, p in reversed(groups)])
    axes.set_xticks(ticks := [x for x in (0.5, 0.7, 1, 1.5, 2, 3, 5, 10) if axes.get_xlim()[0] < x < axes.get_xlim()[1]],
                    [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.tick_params(labelsize=7)
    axes.grid(True, axis="x", lw=0.3)
    return figure


def tokens(pyplot: Any, found: dict[str, dict[int, dict[str, float]]]) -> Any:
    """A small panel a product."""
    across = 3
    down = -(-len(found) // across)
    figure, panels = pyplot.subplots(down, across, figsize=(12, 2.6 * down), squeeze=False)
    for panel in panels.flat[len(found):]:
        panel.set_axis_off()
    for panel, (name, by_tokens) in zip(panels.flat, found.items()):
        whose = list(dict.fromkeys(w for t in by_tokens.values() for w in t))
        for w in whose:
            at = [(t, times[w]) for t, times in by_tokens.items() if w in times]
            panel.plot(*zip(*at), "--" if w == "floor" else "o-", ms=3, lw=1, label=w, color="grey" if w == "floor" else None)
        panel.set(xscale="log", yscale="log")
        panel.set_title(name, fontsize=6)
        panel.minorticks_off()
        panel.tick_params(labelsize=6)
        panel.grid(True, which="major", lw=0.3)
        panel.legend(fontsize=5)
    for panel in panels[-1]:
        panel.set_xlabel("tokens", fontsize=7)
    for panel in panels[:, 0]:
        panel.set_ylabel("us", fontsize=7)
    return figure


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    sys.path.insert(0, str(root / "src"))
    devices = make_tables.by_device(make_tables.committed(root))
    rows = {name: rows_of(files) for name, files in devices.items()}
    text, page = page_of(devices, rows), root / PAGE
    if args.check:
        missing = [name for name in rows for kind, _ in drawn(pictured(rows[name]))
                   if not (root / PICTURES / f"performance-{name}-{kind}.svg").exists()]
        same = page.exists() and page.read_text() == text
        if missing or not same:
            print(f"{PAGE} differs from the committed results: run python benchmarks/make_performance.py", file=sys.stderr)
        return int(bool(missing) or not same)
    page.write_text(text)
    for name, mine in rows.items():
        draw(root / PICTURES, name, pictured(mine), newest(devices[name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
