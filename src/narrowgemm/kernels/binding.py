"""Recording a launch as it reaches Triton's C launcher, so that it can be repeated with other addresses.

How the C launcher is called differs between Triton 3.6 and 3.9, so nothing is assumed that can be checked: the recorded list must
be, argument by argument, what was passed. Triton's own launch runs where it is not, where a profiler has asked Triton for launch
hooks, and where a pointer is no longer aligned to 16 bytes as it was. `unbound()` names the kernels that always run that way.
"""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .bound import Bound, BoundNested, Maps, Pointer
from .tensor_map import widen

if TYPE_CHECKING:
    from .launching import Launch

NVIDIA = "triton.backends.nvidia.driver"
_unbound: dict[str, str] = {}


def unbound() -> dict[str, str]:
    """Kernels of this process that are launched Triton's way every time, each with the reason."""
    return dict(_unbound)


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
