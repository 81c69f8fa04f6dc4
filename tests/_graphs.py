"""CUDA graphs, and calls that may not wait for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


@contextmanager
def unsynchronised() -> Iterator[None]:
    """What synchronises inside raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """`call`, made once and then captured without a sync."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with unsynchronised(), torch.cuda.graph(graph):
        call()
    return graph
