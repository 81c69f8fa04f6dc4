"""Writes what docs/training.md says of the committed training runs, and their picture: figures are never typed.

    python benchmarks/make_training.py            needs matplotlib
    python benchmarks/make_training.py --check    exits with 1 where the page is not what the files say

The files are `benchmarks/results/*/*-train-moe.json`, as `examples/train_moe.py --out` writes them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path("docs/training.md")
PICTURES = Path("docs/pictures")
BEGIN, END = "<!-- training:begin -->\n", "<!-- training:end -->"


def example(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_moe", root / "examples" / "train_moe.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_moe"] = module       # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def apart(data: dict[str, Any], recipe: str, loss: str) -> str:
    """How far a recipe's loss is from BF16's: seed by seed, and in the mean."""
    found = next((c for c in data["against_bf16"] if c["recipe"] == recipe and c["loss"] == loss), None)
    return f"{found['mean']:+.2%} ({', '.join(f'{x:+.2%}' for x in found['seeds'].values())})" if found else ""


def section(name: str, data: dict[str, Any]) -> list[str]:
    """The text of one file's runs."""
    runs, size = data["runs"], data["size"]
    first, share = runs[0], data["experts_share_of_flops"]
    apart_head = "against BF16 (by seed)"
    heads = ("seeds", "training loss", apart_head, "loss on held-out text", apart_head, "SNR of gradients")
    out = [f"{first['device']}, torch {first['torch']}: {first['parameters'] / 1e6:.1f} million parameters, "
           f"{size['layers']} layers, {size['top_k']} of {size['experts']} experts a token, the experts {share:.0%} of "
           f"the FLOPs; {data['steps']} steps of {data['tokens_a_step']} tokens. Losses are means over seeds, in nats a byte; "
           f"a run's training loss is that of its last {data['averaged']} steps. `bf16-moved`: BF16 from weights moved by a "
           "quarter of a last place, so what chance does. SNR: of the experts' gradients against BF16's on the same weights, "
           "over layers and seeds, when last measured.", "",
           "| recipe | " + " | ".join(heads) + " |",
           "| --- | " + " | ".join("---:" for _ in heads) + " |"]
    for recipe in dict.fromkeys(r["recipe"] for r in runs):
        mine = [r for r in runs if r["recipe"] == recipe]
        snr = [db for r in mine if r["snr_db"] for layer in list(r["snr_db"].values())[-1] for db in layer]
        cells = [str(len(mine))]
        for loss in ("final", "held_out"):
            cells += [f"{statistics.mean(r[loss] for r in mine):.4f}", apart(data, recipe, loss)]
        cells.append(f"{min(snr):.1f} to {max(snr):.1f} dB" if snr else "")
        out.append(f"| `{recipe}` | " + " | ".join(cells) + " |")
    return [*out, "", f"![Loss over steps, every recipe and seed](pictures/{name}.png)", ""]


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    args = parser.parse_args(argv)
    files = {f"training-{p.parent.name}": json.loads(p.read_text())
             for p in sorted((root / "benchmarks" / "results").glob("*/*-train-moe.json"))}
    page = root / PAGE
    text = page.read_text()
    before, rest = text.split(BEGIN)
    made = "\n".join(line for name, data in files.items() for line in section(name, data))
    new = f"{before}{BEGIN}{made}{END}{rest.split(END)[1]}"
    if args.check:
        missing = [n for n in files if not (root / PICTURES / f"{n}.png").exists()]
        if new != text or missing:
            print(f"{PAGE} differs from the committed runs: run python benchmarks/make_training.py", file=sys.stderr)
        return int(new != text or bool(missing))
    page.write_text(new)
    for name, data in files.items():
        example(root).plot(str(root / PICTURES / f"{name}.png"), data["runs"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
