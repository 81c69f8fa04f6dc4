"""A CUDA driver that launches nothing: Triton compiles, and its own launcher class, of whatever version, calls a recorder in
place of the C launcher. So the way to a launch can be run, held against Triton's and timed with no GPU.

`install()` is for a process of its own: the driver is the process's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

CALLS: list[tuple[Any, ...]] = []
FUNCTION = 4242


def record(*args: Any) -> None:
    CALLS.append(args)


def fill(*args: Any) -> tuple[Any, ...]:
    """What stands for an encoded descriptor: all that would be in one."""
    return "map", *(tuple(a) if isinstance(a, list) else a for a in args)


class StubDriver:
    def __init__(self, launch: Any) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.backends.nvidia import driver as nvidia

        self.target, self.stream = GPUTarget("cuda", 90, 32), 7
        self.launcher_cls = nvidia.CudaLauncher
        self.utils = SimpleNamespace(
            launch=launch, build_signature_metadata=lambda *args: b"", fill_tma_descriptor=fill, fill_tma_descriptor_tiled=fill,
            get_device_properties=lambda device: {"max_shared_mem": 232448},
            load_binary=lambda *args: ("module", FUNCTION, 0, 0, 1024), unload_module=lambda module: None)
        # Triton 3.6 compiles a C launcher for each signature; from 3.7 on there is one, in utils
        nvidia.library_dirs = list
        nvidia.compile_module_from_src = lambda *args, **kwargs: SimpleNamespace(launch=launch)
        nvidia.PyKernelArg = lambda *args, **kwargs: None
        nvidia.ARG_CONSTEXPR, nvidia.ARG_KERNEL, nvidia.ARG_TUPLE = range(3)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return -1       # what a CPU tensor says of its device

    def get_current_stream(self, device: int | None = None) -> int:
        return self.stream

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")


def install(launch: Any = record) -> StubDriver:
    import triton

    from narrowgemm.kernels import bound

    stub = StubDriver(launch)
    triton.runtime.driver.set_active(stub)
    bound._driver = lambda: (  # type: ignore[assignment]
        stub.get_current_device, stub.get_current_stream, triton.knobs.runtime)
    return stub
