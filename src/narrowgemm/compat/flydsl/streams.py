"""The `stream` argument of a launcher: a torch stream, a raw handle, or None for the current stream."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ...errors import expect

_HERE: AbstractContextManager[Any] = nullcontext()


def on_stream(stream: torch.Stream | int | None, device: torch.device) -> AbstractContextManager[Any]:
    """A context in which work on `device` goes to `stream`. A handle is the integer `cudaStream_t` or `hipStream_t`.

    ValueError where the stream is another device's, TypeError for what is no stream.
    """
    known = stream is None or (isinstance(stream, (torch.Stream, int)) and not isinstance(stream, bool))
    expect(known, "stream", repr(stream), "a torch stream, an integer handle or None", error=TypeError)
    if device.type != "cuda":
        expect(stream is None or stream == 0, f"stream for tensors on {device}", repr(stream), "None")
        return _HERE
    here = torch.cuda.current_stream(device)
    wanted = here if stream is None else _of_handle(stream, device) if isinstance(stream, int) else stream
    expect(wanted.device == here.device, "stream, device", wanted.device, f"the tensors', {here.device}")
    if wanted == here and torch.cuda.current_device() == here.device_index:
        return _HERE
    if not isinstance(wanted, torch.cuda.Stream):
        wanted = torch.cuda.Stream(stream_id=wanted.stream_id, device_index=wanted.device_index,
                                   device_type=wanted.device_type)
    return torch.cuda.stream(wanted)


def _of_handle(handle: int, device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.ExternalStream(handle, device=device) if handle else torch.cuda.default_stream(device)
