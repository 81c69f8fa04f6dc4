"""Expert parallelism on torch.distributed: experts spread over ranks, routed rows sent to them and back.

    ep = ExpertParallel(num_experts, group)                  # a process group or a 1-D DeviceMesh; default: the world
    out = ep(x, topk_ids, topk_weights, compute)             # compute(rows [R, H], layout) -> [R, H] on this rank's experts
    out = ep.by_token(x, topk_ids, topk_weights, expert_layer(ep, gate_up, down))       # fewer bytes, inference

`expert_mlp` is a `compute` from two stacks of weights. `python -m torch.distributed.run --nproc-per-node 2 -m
narrowgemm.distributed.demo` shows it at work; `narrowgemm parallel` prints that command.
"""

from .by_token import expert_layer
from .exchange import Exchange, exchange_counts
from .experts import expert_mlp
from .parallel import Dispatched, ExpertParallel, experts_of_rank

__all__ = ["Dispatched", "Exchange", "ExpertParallel", "exchange_counts", "expert_layer", "expert_mlp", "experts_of_rank"]
