"""Launching Triton and Gluon kernels: the first time as Triton does it, from then on at the driver's own cost.

In every launch Triton works out anew what a kernel was specialised for and encodes every TMA descriptor: 45 to 80 us. All of that
depends on a call's signature alone: shapes, strides, dtypes, alignment, options. So only a signature's first launch is Triton's.
Behind it, the argument list is recorded as it reaches Triton's C launcher, with a gap for every address (`binding.py`); later
launches fill in addresses and the stream, and call the C launcher (`bound.py`). `unbound()` names the kernels where that does not
work, which are launched Triton's way every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor

from ..formats import ScaledTensor
from ..problem import Plan, Problem, Step
from . import cache_keys, context
from .binding import bind, unbound
from .bound import Pointer, Ready, joined
from .operands import Operands
from .step_operands import StepOperands

__all__ = ["READY", "Describe", "Launch", "Pointer", "Ready", "collect", "joined", "launch", "unbound", "with_clusters"]

READY = "ready"     # where `Operands.memo` holds a Plan's bound launches


class Launch(NamedTuple):
    """`kernel[grid](*arguments, **keywords)`; keywords are constexpr parameters and Triton's options (num_warps, ...).

    Tensors among the arguments are the operands' own, the workspace, a `Pointer` into one of these, or a TensorDescriptor on
    either. A launch with any other tensor works, but goes Triton's way each time.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: Sequence[Any]
    keywords: dict[str, Any]
    cluster: int = 1        # blocks that run together; the grid is of clusters
    by_256: Sequence[int] = ()      # numbers of the descriptors that fetch into L2 by 256 bytes, once bound (`tensor_map.py`)
    boxes: Sequence[tuple[int, int]] = ()       # (number of a descriptor, rows of its box), where these are no power of two

    def run(self) -> Any:
        """Launch Triton's way; the compiled kernel, or None from the interpreter."""
        from triton.runtime.jit import JITFunction

        arguments = self.arguments
        if not isinstance(self.kernel, JITFunction):    # the interpreter copies storages, so it wants tensors
            arguments = [p.view() if isinstance(p, Pointer) else p for p in arguments]
        cache_keys.settle(self.kernel)
        if self.boxes:
            with_boxes(self.warm(), self.boxes)
        if self.cluster > 1:
            with_clusters(self.warm(), self.cluster)
        return self.kernel[self.grid](*arguments, **self.keywords)

    def warm(self) -> Any:
        """Compile what the launch runs, without a launch: tensors may be on 'meta'."""
        cache_keys.settle(self.kernel)
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self.keywords)

    def parameters(self) -> list[Any]:
        """The argument for every parameter of the kernel, in their order."""
        named = {k: v for k, v in self.keywords.items() if k in self.kernel.arg_names}
        bound = self.kernel.signature.bind(*self.arguments, **named)
        bound.apply_defaults()
        return list(bound.arguments.values())


def with_clusters(compiled: Any, blocks: int) -> None:
    """Have Triton's C launcher launch a kernel that was compiled for single blocks as clusters.

    It takes (warps, blocks a cluster, bytes of shared memory) of the compiled kernel in every launch, in Triton 3.6 to 3.9.
    """
    warps, _, shared = compiled.packed_metadata
    compiled.packed_metadata = (warps, blocks, shared)


def with_boxes(compiled: Any, boxes: Sequence[tuple[int, int]]) -> None:
    """Have Triton encode descriptors of a compiled kernel with boxes of so many rows, whatever its frontend was told.

    Its launcher takes them from the kernel's metadata in every launch, in Triton 3.6 to 3.9. The kernel asks for them by PTX.
    """
    for which, rows in boxes:
        compiled.metadata.tensordesc_meta[which]["block_size"][-2] = rows


Describe = Callable[[Step, Problem, Any, Tensor | None], Sequence[Launch]]


def launch(describe: Describe, step: Step, problem: Problem, operands: Operands | StepOperands, workspace: Tensor | None) -> None:
    """Make a step's launches on the current stream, and bind them where this is the signature's first call.

    describe: a kernel's `launches`. What it returns may depend on all that is in the signature, and on no address.
    """
    context.ensure()
    compiled = [x.run() for x in describe(step, problem, operands, workspace)]
    if operands.memo is None or step in operands.memo:
        return
    own, own_workspace = _aliased(operands, workspace)
    slots = {id(t): i for i, t in enumerate((own_workspace, *own.tensors())) if t is not None}
    bound = [bind(k, x, slots) for k, x in zip(compiled, describe(step, problem, own, own_workspace))]
    operands.memo[step] = tuple(bound) if all(b is not None for b in bound) else ()


def collect(plan: Plan, operands: Operands | StepOperands, workspace: Tensor | None) -> Ready | None:
    """All launches of a Plan that has just run, if every step is bound."""
    memo = operands.memo or {}
    steps = [memo.get(step, ()) for step in plan.steps]
    if not all(steps):
        return None
    return Ready([b for step in steps for b in step], operands.out.get_device(), plan.workspace_bytes,
                 operands.addresses(workspace))


def _aliased(x: Any, workspace: Tensor | None) -> tuple[Any, Tensor | None]:
    """The same operands, each tensor an object of its own: what is one tensor in this call may be two in the next."""
    def own(t: Any) -> Any:
        """The same value in objects of its own."""
        if isinstance(t, ScaledTensor):
            return ScaledTensor(own(t.data), own(t.scale), t.format)
        return t.detach() if isinstance(t, Tensor) else t

    return replace(x, **{name: own(getattr(x, name)) for name in x.__dataclass_fields__}), own(workspace)
