"""The CUDA context of a thread.

Encoding a TMA descriptor asks the driver for the thread's current context and, unlike a launch, makes none current. A thread that
autograd has just started has none, and the driver then answers "invalid device context".
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import torch

_thread = threading.local()


def ensure() -> None:
    """Make the current device's primary context, which torch uses, current in this thread if it has none. Nothing without a GPU.

    Raises RuntimeError where the driver refuses.
    """
    if getattr(_thread, "ready", False) or not torch.cuda.is_initialized():
        return
    driver = ctypes.CDLL("libcuda.so.1")
    context, device = ctypes.c_void_p(), ctypes.c_int()
    _checked(driver, "cuCtxGetCurrent", ctypes.byref(context))
    if not context.value:
        _checked(driver, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(torch.cuda.current_device()))
        _checked(driver, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)     # torch holds it anyway: never given back
        _checked(driver, "cuCtxSetCurrent", context)
    _thread.ready = True


def _checked(driver: Any, name: str, *arguments: Any) -> None:
    if (code := getattr(driver, name)(*arguments)) != 0:
        raise RuntimeError(f"{name} failed with CUDA driver error {code} in a thread without a CUDA context")
