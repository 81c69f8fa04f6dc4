"""`experts` with prepacked narrow weights: two products that take rows by slot, the activation and the combine inside them.

    route -> sort -> gate_up with bias and activation -> down with bias, routing weight and the sum over a token's slots

Activations in a narrow format are quantised in front of each product. Buffers of routing and of the activation come from
the workspace; what the products themselves need for partial sums, they allocate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import expect
from ..formats import Format
from ..layouts import Offsets
from ..prepack import PackedWeight
from ..reference.activate import OAI_ARGS
from ..reference.route import Routing
from . import activate as activate_op
from . import experts_check, steps
from .experts_plan import Pool
from .gemm import gemm
from .quantize import quantize
from .route import route, sort_by_expert
from .routed import routed_gemm


def pool_of(tokens: int, top_k: int, experts: int, inter: int, dtype: torch.dtype) -> Pool:
    """What `experts` keeps in its workspace."""
    pool = Pool()
    pool.plain("topk_weights", (tokens, top_k), torch.float32)
    pool.plain("topk_ids", (tokens, top_k), torch.int32)
    for name, length, kind in (("row_map", tokens * top_k, torch.int32), ("inverse", tokens * top_k, torch.int32),
                               ("offsets", experts + 1, torch.int64)):
        pool.plain(name, (length,), kind)
    pool.plain("act", (tokens * top_k, inter), dtype)
    return pool


def layer(x: Tensor, gate_up: PackedWeight, down: PackedWeight, *, router_logits: Tensor | None, top_k: int,
          topk_weights: Tensor | None, topk_ids: Tensor | None, routing: dict[str, Any], router_bias: Tensor | None,
          kind: tuple[str, tuple[float, ...], bool], fmt: Format | None, gate_up_bias: Tensor | None,
          down_bias: Tensor | None, shared: tuple[Any, Any] | None, shared_output: Tensor | None,
          expert_map: Tensor | None, first_expert: int, out: Tensor | None, workspace: Tensor | None,
          backend: str | None, max_sms: int, on_unsupported: str) -> Tensor:
    """See `experts.experts`."""
    world, top_k = check(x, gate_up, down, kind, router_logits, top_k, topk_weights, topk_ids, router_bias, routing,
                         expert_map, shared, shared_output, out)
    del world
    tokens, (experts, hidden, inter) = x.shape[0], down.shape
    name, args, interleaved = kind
    if out is None:
        out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    if tokens == 0:
        return out
    pool = pool_of(tokens, top_k, experts, inter, x.dtype)
    if workspace is None:
        workspace = torch.empty(pool.bytes, dtype=torch.uint8, device=x.device)
    experts_check.workspace(workspace, pool.bytes, x.device)
    space = workspace[:pool.bytes]
    bases = {d: space.view(d) for d in {b.dtype for b in pool.buffers.values()}}
    at = {key: b.view(bases) for key, b in pool.buffers.items()}
    portable = backend if backend in ("triton", "reference") else None
    common: dict[str, Any] = {"backend": backend, "max_sms": max_sms, "on_unsupported": on_unsupported, "top_k": top_k}
    if router_logits is not None:
        topk_weights, topk_ids = route(router_logits, top_k, bias=router_bias, backend=portable,
                                       out=(at["topk_weights"], at["topk_ids"]), **routing)
    assert topk_weights is not None and topk_ids is not None
    where = Routing(at["row_map"], at["offsets"], at["inverse"], top_k)
    sort_by_expert(topk_ids, experts, expert_map=expert_map, first_expert=first_expert, out=where, backend=portable)
    layout = Offsets(where.offsets)

    def narrow(rows: Tensor) -> Any:
        if fmt is None or not fmt.scaled:
            return rows
        return quantize(rows, fmt, scale_layout=steps.scale_layout_of(fmt), backend=portable)

    alpha, limit = args or OAI_ARGS
    act = routed_gemm(narrow(x), gate_up, layout, row_map=where.row_map, a_div=top_k, bias=gate_up_bias, activation=name,
                      alpha=alpha, limit=limit, interleaved=interleaved, out=at["act"], **common)
    if shared is not None:
        h = gemm(narrow(x), shared[0], out_dtype=x.dtype, backend=backend)
        y = activate_op.activate(h, activation=name, args=args, interleaved=interleaved, backend=portable)
        shared_output = gemm(narrow(y), shared[1], out_dtype=x.dtype, backend=backend)
    last: dict[str, Any] = {"row_map": where.row_map, "a_div": 1, "bias": down_bias, "combine": True,
                            "routing_weight": steps.rows_contiguous(topk_weights), **common}
    if shared_output is None:
        return routed_gemm(narrow(act), down, layout, out=out, **last)
    y = routed_gemm(narrow(act), down, layout, out_dtype=torch.float32, **last)
    return out.copy_(y.add_(shared_output))


def check(x: Tensor, gate_up: PackedWeight, down: PackedWeight, kind: tuple[str, tuple[float, ...], bool],
          router_logits: Tensor | None, top_k: int, topk_weights: Tensor | None, topk_ids: Tensor | None,
          router_bias: Tensor | None, routing: dict[str, Any], expert_map: Tensor | None, shared: tuple[Any, Any] | None,
          shared_output: Tensor | None, out: Tensor | None) -> tuple[int, int]:
    """(experts over all ranks, top_k), once the call is a layer. `routed_gemm` checks its own part."""
    expect(isinstance(x, Tensor), "x", type(x).__name__, "a torch.Tensor", error=TypeError)
    expect(x.dtype in steps.FLOATS, "x, dtype", x.dtype, f"one of {steps.FLOATS}", error=TypeError)
    for name, w in (("gate_up", gate_up), ("down", down)):
        expect(isinstance(w, PackedWeight), name, type(w).__name__, "a PackedWeight, as the other one is", error=TypeError)
        expect(len(w.shape) == 3, f"{name}, shape", w.shape, "[E, N, K]")
        expect(w.device == x.device, f"{name}, device", w.device, f"x's, {x.device}")
    experts, two, hidden = gate_up.shape
    expect(x.dim() == 2 and x.shape[1] == hidden, "x, shape", tuple(x.shape), f"[T, {hidden}]")
    expect(tuple(down.shape) == (experts, hidden, two // 2), "down, shape", tuple(down.shape), str((experts, hidden, two // 2)))
    if gate_up.pair:
        expect((gate_up.pair == "interleaved") == kind[2], "interleaved", kind[2], f"as gate_up was packed, {gate_up.pair!r}")
    expect(shared is None or shared_output is None, "shared and shared_output", "both", "one of them")
    if shared_output is not None:
        expect(tuple(shared_output.shape) == tuple(x.shape), "shared_output, shape", tuple(shared_output.shape),
               str(tuple(x.shape)))
    if out is not None:
        steps.check_like(out, "out", tuple(x.shape), x.dtype, x.device, rows_only=True)
    return experts_check.routing(x, experts, router_logits, top_k, topk_weights, topk_ids, router_bias, routing, expert_map)
