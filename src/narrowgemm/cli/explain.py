"""`narrowgemm explain`: the plan for a problem, on any machine, for any device in the table."""

from __future__ import annotations

import json
from typing import Any

import click

from ..arch import ARCHS, GENERIC
from ..errors import Unsupported
from ..formats import FORMATS
from ..prepack import ACTIVATIONS
from ..problem import LAYOUTS


@click.command()
@click.option("--op", type=click.Choice(["gemm", "grouped_gemm", "grouped_gemm_wgrad", "routed_gemm", "experts"]),
              default="grouped_gemm", show_default=True, help="A product, or `experts` for a whole layer.")
@click.option("--layout", type=click.Choice(LAYOUTS), help="How rows belong to groups.  [default: dense for gemm, "
              "k_grouped for grouped_gemm_wgrad, routed for routed_gemm, else contiguous]")
@click.option("-G", "--groups", type=click.IntRange(1), default=1, show_default=True, help="Groups (experts).")
@click.option("-M", "m", type=click.IntRange(0), required=True,
              help="Rows of A over all groups; masked: expected rows per group; routed_gemm: slots; experts: tokens.")
@click.option("--top-k", type=click.IntRange(1), default=8, show_default=True, help="experts: experts per token.")
@click.option("-N", "n", type=click.IntRange(0), required=True, help="Columns of the output; experts: the intermediate size.")
@click.option("-K", "k", type=click.IntRange(0), required=True, help="Contracted dimension; k_grouped: over all groups; "
              "experts: the hidden size.")
@click.option("--a", "a", metavar="FORMAT", default="fp8_1x128", show_default=True, help="Format of A.")
@click.option("--b", "b", metavar="FORMAT", help="Format of B.  [default: fp8_128x128; fp8_1x128 for wgrad]")
@click.option("--packed", type=click.Choice(ACTIVATIONS), is_flag=False, flag_value=ACTIVATIONS[0],
              help="B went through `prepack` (MXFP8 and MXFP4 weights), for activations of that kind.  [without one: bf16]")
@click.option("--out-dtype", metavar="DTYPE", help="bf16, fp16 or fp32.  [default: bf16; fp32 for wgrad]")
@click.option("--device", metavar="NAME", help=f"A device ({', '.join(ARCHS)}) or a target ({', '.join(GENERIC)}).  "
              "[default: this machine's]")
@click.option("--backend", metavar="NAME", help="Consider only this backend, or only the kernel of this name.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(op: str, layout: str | None, b: str | None, out_dtype: str | None, as_json: bool, top_k: int,
            **options: Any) -> None:
    """Which kernel a problem gets, its config, how fast it should be, and why every other kernel was passed over.

    \b
    narrowgemm explain --layout masked -G 32 -M 20 -N 6144 -K 7168 --device h200
    narrowgemm explain --op gemm -M 16 -N 6144 -K 7168 --a mxfp8 --b mxfp8 --packed --device h200
    narrowgemm explain --op experts -G 256 -M 64 -N 2048 -K 7168 --device h200
    """
    from ..ops.explain import explain as explain_op

    wgrad = op == "grouped_gemm_wgrad"
    layout = layout or {"gemm": "dense", "grouped_gemm_wgrad": "k_grouped", "routed_gemm": "routed"}.get(op, "contiguous")
    b = b or ("fp8_1x128" if wgrad else "fp8_128x128")
    for name in (options["a"], b):
        if name not in FORMATS:
            raise click.BadParameter(f"{name!r} is not one of {', '.join(FORMATS)}", param_hint="--a / --b")
    try:
        out_dtype = out_dtype or ("fp32" if wgrad else "bf16")
        explanation = layer(options, b, top_k) if op == "experts" else explain_op(
            op, layout=layout, b=b, out_dtype=out_dtype, **{**options, "packed": options["packed"] or False})
    except Unsupported as e:
        raise click.ClickException(str(e)) from e
    except (ValueError, TypeError) as e:
        raise click.UsageError(str(e)) from e
    click.echo(json.dumps(explanation.to_dict(), indent=2) if as_json else str(explanation))


def layer(options: dict[str, Any], weights: str, top_k: int) -> Any:
    """An expert layer in the letters of a product: M tokens, G experts, N intermediate, K hidden."""
    from ..ops.explain_experts import explain_experts

    return explain_experts(tokens=options["m"], experts=options["groups"], inter=options["n"], hidden=options["k"],
                           top_k=min(top_k, options["groups"]), weights=weights, device=options["device"],
                           packed=options["packed"] or False, backend=options["backend"])
