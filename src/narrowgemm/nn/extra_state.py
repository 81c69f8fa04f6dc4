"""What a module's state has beside its tensors, as a tensor: safetensors and sharded checkpoints keep nothing else."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from ..errors import expect

STEP = 64       # bytes: sharded checkpoints load in place, so a state that changes keeps its size


def encode(state: dict[str, Any]) -> Tensor:
    """uint8 `[bytes]` of JSON, filled up with spaces, on the CPU."""
    text = json.dumps(state).encode()
    return torch.tensor(list(text.ljust(-(-len(text) // STEP) * STEP)), dtype=torch.uint8, device="cpu")


def decode(state: object) -> dict[str, Any]:
    """What `encode` was given; TypeError or ValueError for anything else. A dict is taken as it is."""
    if isinstance(state, dict):
        return state
    given = state.dtype if isinstance(state, Tensor) else type(state).__name__
    expect(given == torch.uint8, "extra state of a module", given, "uint8 bytes of JSON, as state_dict() has them", error=TypeError)
    assert isinstance(state, Tensor)
    try:
        found = json.loads(bytes(state.cpu().tolist()))
    except ValueError:
        found = None
    expect(isinstance(found, dict), "extra state of a module", f"{state.numel()} bytes that are no JSON object",
           "the bytes that state_dict() has")
    return dict(found)
