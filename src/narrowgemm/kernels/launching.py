"""Launching Triton and Gluon kernels, the second time at the driver's own cost.

Triton's launch works out anew what a kernel was specialised for and encodes every TMA descriptor: 45 to 80 us a call. All of
that depends on a call's signature alone: shapes, strides, dtypes, alignment, options. So a signature's first launch is Triton's
own; behind it the argument list is taken down as it reaches Triton's C launcher, with a slot for every address. Later launches
fill in addresses and the stream, and call the C launcher.

No address is kept, but for encoded TMA descriptors, which are found by the address in them; all else that is in one belongs to
the signature. So a freed and reallocated tensor meets its own descriptor or one that is equal. A launch fills in a copy of the
list, so threads don't meet in it; the stream is asked for in every launch; a signature names its device.

How the C launcher is called differs between Triton 3.6 and 3.9, so nothing is assumed that can be looked at: what was taken
down must be, argument by argument, what was passed. Where it is not, where a profiler has asked Triton for launch hooks, or
where a pointer is off the 16 bytes that it was on, Triton's own launch runs. `unbound()` says which kernels always do.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import ScaledTensor
from ..problem import Plan, Problem, Step
from . import context
from .operands import Operands
from .step_operands import StepOperands
from .tensor_map import widen

MAPS = 256          # encoded descriptors kept for one argument of one signature
READY = "ready"     # where `Operands.memo` holds a Plan's bound launches
NVIDIA = "triton.backends.nvidia.driver"
_unbound: dict[str, str] = {}


class Pointer:
    """`tensor`'s address plus `offset` bytes, as a pointer to `dtype`: what Triton takes for a tensor, without a view's cost."""

    __slots__ = ("dtype", "offset", "tensor")

    def __init__(self, tensor: Tensor, dtype: torch.dtype, offset: int = 0) -> None:
        self.tensor, self.dtype, self.offset = tensor, dtype, offset

    def data_ptr(self) -> int:
        return self.tensor.data_ptr() + self.offset

    def view(self) -> Tensor:
        """As a tensor; of a contiguous one."""
        return self.tensor.view(torch.uint8)[self.offset:].view(self.dtype)


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
    by_256: Sequence[int] = ()      # which of its descriptors fetch into L2 by 256 bytes, once bound
    boxes: Sequence[tuple[int, int]] = ()       # (which descriptor, rows of its box), where they are no power of two

    def run(self) -> Any:
        """Launch Triton's way; the compiled kernel, or None from the interpreter."""
        from triton.runtime.jit import JITFunction

        arguments = self.arguments
        if not isinstance(self.kernel, JITFunction):    # the interpreter copies storages, so it wants tensors
            arguments = [p.view() if isinstance(p, Pointer) else p for p in arguments]
        if self.boxes:
            with_boxes(self.warm(), self.boxes)
        if self.cluster > 1:
            with_clusters(self.warm(), self.cluster)
        return self.kernel[self.grid](*arguments, **self.keywords)

    def warm(self) -> Any:
        """Compile what the launch runs, without a launch: tensors may be on 'meta'."""
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
    """Make a step's launches on the current stream, and bind them if the signature's have not been.

    What `describe` returns may depend on all that is in the signature, and on no address.
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


def unbound() -> dict[str, str]:
    """Kernels of this process that are launched Triton's way every time, each with the reason."""
    return dict(_unbound)


def _aliased(x: Any, workspace: Tensor | None) -> tuple[Any, Tensor | None]:
    """The same operands, each tensor an object of its own: what is one tensor in this call may be two in the next."""
    def own(t: Any) -> Any:
        if isinstance(t, ScaledTensor):
            return ScaledTensor(own(t.data), own(t.scale), t.format)
        return t.detach() if isinstance(t, Tensor) else t

    return replace(x, **{name: own(getattr(x, name)) for name in x.__dataclass_fields__}), own(workspace)


# ---------------------------------------------------------------- bound launches
class Ready:
    """A Plan's launches, bound to a signature. Called with addresses in the order of `Operands.addresses`; False where
    nothing was launched, because it has to go Triton's way."""

    __slots__ = ("_bound", "_current", "_device", "_odd", "_runtime", "_stream", "workspace_bytes")

    def __init__(self, bound: Sequence[Bound], device: int, workspace_bytes: int, addresses: Sequence[int]) -> None:
        self._bound, self._device, self.workspace_bytes = tuple(bound), device, workspace_bytes
        self._current, self._stream, self._runtime = _driver()
        odd = tuple(p & 15 for p in addresses)
        self._odd = odd if any(odd) else None

    def __call__(self, addresses: tuple[int, ...]) -> bool:
        bits = 0
        for p in addresses:
            bits |= p
        if bits & 15 if self._odd is None else tuple(p & 15 for p in addresses) != self._odd:
            return False
        return self.launch(addresses)

    def aligned(self, bits: int) -> bool:
        """Whether all operands are on 16 bytes, as far as the signature says, and the addresses that `bits` is the OR of too."""
        return not bits & 15 and self._odd is None

    def launch(self, addresses: tuple[int, ...]) -> bool:
        """As a call, for addresses whose alignment is known to be that of the signature."""
        runtime, device = self._runtime, self._device
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook      # a chain of hooks, or one, or None
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or self._current() != device:
            return False
        stream = self._stream(device)
        for bound in self._bound:
            bound(stream, addresses)
        return True

    def calls(self, addresses: tuple[int, ...]) -> list[Callable[[], None]]:
        """The C launcher with its arguments, once a launch: to measure what is left where nothing is worked out."""
        stream = self._stream(self._device)
        return [partial(bound._raw, *bound.arguments(stream, addresses)) for bound in self._bound]


def joined(parts: Sequence[tuple[Ready, Sequence[int]]], operands: int) -> Ready | None:
    """All launches of several, over one table of addresses: operand i of each is at its i-th place. None if one is off 16 bytes."""
    if any(ready._odd is not None for ready, _ in parts):
        return None
    return Ready([b.moved(at) for ready, at in parts for b in ready._bound], parts[0][0]._device, 0, (0,) * operands)


class Bound:
    """One launch with everything fixed but addresses and stream. It keeps no tensor alive, but the compiled kernel."""

    __slots__ = ("_given", "_maps", "_offsets", "_pointers", "_raw", "_runs", "_stream_at", "compiled")

    def __init__(self, raw: Callable[..., None], given: list[Any], stream_at: int, pointers: Sequence[tuple[int, int, int]],
                 maps: Sequence[tuple[int, int, Maps]]) -> None:
        """`given`: what the C launcher gets.

        `pointers`: (place, operand, offset in bytes); `maps`: (place, operand, descriptors); places are in `given`.
        """
        self.compiled: Any = None       # Triton unloads a kernel that nothing holds
        self._raw, self._given, self._stream_at, self._maps = raw, given, stream_at, tuple(maps)
        self._pointers, self._runs = tuple(pointers), tuple(_runs(pointers))
        self._offsets = tuple((at, offset) for at, _, offset in pointers if offset)

    def moved(self, at: Sequence[int]) -> Bound:
        """The same launch, operand i found at `at[i]` of the addresses."""
        other = copy.copy(self)
        other._pointers = tuple((place, at[operand], offset) for place, operand, offset in self._pointers)
        other._runs = tuple(_runs(other._pointers))
        other._maps = tuple((place, at[operand], maps) for place, operand, maps in self._maps)
        return other

    def __call__(self, stream: int, addresses: Sequence[int]) -> None:
        self._raw(*self.arguments(stream, addresses))

    def arguments(self, stream: int, addresses: Sequence[int]) -> list[Any]:
        """What the C launcher gets for these addresses."""
        arguments = self._fill(addresses)
        arguments[self._stream_at] = stream
        return arguments

    def _fill(self, addresses: Sequence[int]) -> list[Any]:
        arguments = self._given.copy()
        for places, pick in self._runs:
            arguments[places] = pick(addresses)
        for at, offset in self._offsets:
            arguments[at] += offset
        for at, operand, maps in self._maps:
            arguments[at] = maps[addresses[operand]]
        return arguments


def _runs(pointers: Sequence[tuple[int, int, int]]) -> Iterator[tuple[slice, Callable[[Sequence[int]], tuple[int, ...]]]]:
    """Pointers that follow each other, and what picks their addresses, all at once."""
    start = 0
    for i in range(1, len(pointers) + 1):
        if i == len(pointers) or pointers[i][0] != pointers[i - 1][0] + 1:
            operands = [operand for _, operand, _ in pointers[start:i]]
            # a slice brings a tuple, as several indices do
            pick = itemgetter(*operands) if len(operands) > 1 else itemgetter(slice(operands[0], operands[0] + 1))
            yield slice(pointers[start][0], pointers[i - 1][0] + 1), pick
            start = i


class BoundNested(Bound):
    """From Triton 3.7 on: the C launcher takes the kernel's arguments as one list, behind the others."""

    __slots__ = ("_outer",)

    def __init__(self, raw: Callable[..., None], given: list[Any], stream_at: int, pointers: Sequence[tuple[int, int, int]],
                 maps: Sequence[tuple[int, int, Maps]], outer: Sequence[Any]) -> None:
        """`given`, `pointers`, `maps`: of the kernel's arguments; `stream_at`: among the `outer` ones."""
        super().__init__(raw, given, 0, pointers, maps)
        self._outer = tuple(outer[:stream_at]), tuple(outer[stream_at + 1:])

    def arguments(self, stream: int, addresses: Sequence[int]) -> list[Any]:
        before, after = self._outer
        return [*before, stream, *after, self._fill(addresses)]


class Maps(dict[int, Any]):
    """An operand's address to the encoded TMA descriptor on it, all else being fixed. A race encodes one twice."""

    def __init__(self, encode: Callable[[Any], Any], descriptor: Any) -> None:
        self._encode, self._descriptor = encode, copy.copy(descriptor)
        self._dtype, self._offset = descriptor.base.dtype, descriptor.base.offset if isinstance(descriptor.base, Pointer) else 0
        self._descriptor.base = None

    def __missing__(self, address: int) -> Any:
        descriptor = copy.copy(self._descriptor)
        descriptor.base = types.SimpleNamespace(data_ptr=lambda: address + self._offset, dtype=self._dtype)
        if len(self) >= MAPS:
            self.clear()
        context.ensure()
        made = self[address] = self._encode(descriptor)
        return made


def bind(compiled: Any, x: Launch, slots: dict[int, int]) -> Bound | None:
    """The launch `x`, which has just run as `compiled`, bound; `slots`: id of a tensor to its place in `Operands.addresses`.

    None where it can't be: `unbound()` has the reason.
    """
    found = _bind(compiled, x, slots)
    if isinstance(found, str):
        _unbound[getattr(x.kernel, "__name__", str(x.kernel))] = found
        return None
    found.compiled = compiled
    return found


def _bind(compiled: Any, x: Launch, slots: dict[int, int]) -> Bound | str:
    if getattr(compiled, "function", None) is None:
        return "no kernel was loaded (Triton's interpreter, or cross-compilation)"
    parameters = x.parameters()
    grid = (*x.grid, 1, 1)[:3]
    stream = (1 << 62) + 12345      # an object that nothing else is
    recorded = record(compiled.run, *grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *parameters)
    if isinstance(recorded, str):
        return recorded
    raw, given = recorded
    expected: list[Any] = []
    pointers, descriptors = [], []
    for p in parameters:
        base = getattr(p, "base", None) if hasattr(p, "block_shape") else None
        pointer = p if base is None else base
        tensor = pointer.tensor if isinstance(pointer, Pointer) else pointer
        if isinstance(tensor, Tensor) and id(tensor) not in slots:
            return "an argument is made from operands in every call"
        if base is not None:
            descriptors.append((len(expected), slots[id(tensor)], p))
            expected += [p, *p.shape, *p.strides]
            continue
        if isinstance(tensor, Tensor):
            pointers.append((len(expected), slots[id(tensor)], p.offset if isinstance(p, Pointer) else 0))
        expected.append(p)
    nested = bool(given) and isinstance(given[-1], list | tuple) and len(given[-1]) == len(expected)
    outer, arguments = (given[:-1], given[-1]) if nested else (given[:-len(expected)], given[-len(expected):])
    at = [i for i, value in enumerate(outer) if value is stream]
    encoded = {i for i, *_ in descriptors}
    same = len(arguments) == len(expected) and all(
        got is not want if i in encoded else got is want or (type(want) is int and got == want)
        for i, (got, want) in enumerate(zip(arguments, expected)))
    if len(at) != 1 or not same:
        return "this Triton's C launcher takes its arguments in another way"
    encode = _encoder(compiled)
    if isinstance(encode, str) and descriptors:
        return encode
    metas = [*(getattr(compiled.metadata, "tensordesc_meta", None) or ())]
    if len(metas) != len(descriptors) or None in metas:
        return "this Triton doesn't encode the kernel's descriptors on the host"
    template = [None if isinstance(v, Tensor | Pointer) or i in encoded else v for i, v in enumerate(arguments)]
    first = 0 if nested else len(outer)
    maps = [(first + i, slot, Maps(partial(_encode, encode, meta, which in x.by_256), desc))
            for which, ((i, slot, desc), meta) in enumerate(zip(descriptors, metas))]
    if nested:
        return BoundNested(raw, template, at[0], pointers, maps, outer)
    return Bound(raw, [*outer, *template], at[0], [(first + i, slot, offset) for i, slot, offset in pointers], maps)


def _encode(encode: Any, meta: Any, by_256: bool, descriptor: Any) -> Any:
    made = encode(descriptor, meta)
    if by_256:
        widen(made, descriptor, meta)
    return made


def record(run: Any, *arguments: Any) -> tuple[Callable[..., None], tuple[Any, ...]] | str:
    """The C launcher behind a compiled kernel's `run`, and what it would be given for `arguments`; nothing is launched.

    A sentence where that can't be told.
    """
    wrapper = getattr(run, "launch", None)
    if wrapper is None:
        return "this Triton's launcher object has no `launch`"
    if getattr(run, "global_scratch_size", 0) or getattr(run, "profile_scratch_size", 0) or getattr(run, "gsan_enabled", False):
        return "the kernel takes scratch memory, or is instrumented"
    seen: list[tuple[Any, ...]] = []
    recording = copy.copy(run)
    if isinstance(wrapper, types.FunctionType) and "launcher" in wrapper.__code__.co_freevars:
        # it encodes descriptors and calls its `launcher`
        cells = dict(zip(wrapper.__code__.co_freevars, wrapper.__closure__ or ()))
        raw = cells["launcher"].cell_contents
        cells["launcher"] = types.CellType(lambda *given: seen.append(given))
        recording.launch = types.FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__,
                                              tuple(cells.values()))
    else:
        raw = wrapper
        recording.launch = lambda *given: seen.append(given)
    recording(*arguments)
    return (raw, seen[0]) if len(seen) == 1 else "this Triton's launcher object calls its `launch` in another way"


def _encoder(compiled: Any) -> Callable[[Any, Any], Any] | str:
    """Encodes (descriptor, what the compiler says of it) as Triton's own launch does."""
    encode = getattr(sys.modules.get(NVIDIA), "make_tensordesc_arg", None)
    if type(compiled.run).__module__ != NVIDIA or encode is None:
        return "TMA descriptors of another Triton, or of another vendor"
    more = len(inspect.signature(encode).parameters) - 2
    if more not in (0, 1):
        return "this Triton encodes descriptors in another way"
    return lambda descriptor, meta: encode(descriptor, meta, *(None,) * more)[0]


@lru_cache(maxsize=1)
def _driver() -> tuple[Callable[[], int], Callable[[int], int], Any]:
    """Current device, current stream of a device, Triton's hooks: as bare functions, where torch is built with them."""
    from triton import knobs
    from triton.runtime import driver

    return (getattr(torch._C, "_cuda_getDevice", None) or driver.active.get_current_device,
            getattr(torch._C, "_cuda_getCurrentRawStream", None) or driver.active.get_current_stream, knobs.runtime)
