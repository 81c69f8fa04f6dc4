"""What the GEMM ops share: their options, operand checks, and the Problem that a checked call is.

Checks depend on nothing but shapes, strides, dtypes, devices, alignment and options, so they run once a signature (`plan_cache`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from ..arch import detect
from ..errors import expect
from ..formats import PLAIN, Format, ScaledTensor, dtype_name
from ..problem import Config, Operand, Plan, Problem, bucket, promotion
from ..runtime import dispatch
from .overlap import share_memory, stored_twice

OUT_DTYPES = tuple(PLAIN)


@dataclass(frozen=True, slots=True)
class Options:
    """What a caller may say about how, not what. See `gemm` for each."""

    backend: str | None = None
    config: Config | None = None
    max_sms: int = 0
    validate: str | None = None
    on_unsupported: str = "portable"
    fast_accum: bool = False

    def check(self) -> None:
        """TypeError, ValueError. `on_unsupported` is checked where it is used, in `dispatch.select`."""
        check_flags(fast_accum=self.fast_accum)
        dispatch.check_choice(self.backend, self.config)
        expect(isinstance(self.max_sms, int) and self.max_sms >= 0, "max_sms", self.max_sms, "0 (all) or a positive count")
        expect(self.validate in (None, "sync"), "validate", repr(self.validate), "None or 'sync'")


def as_operand(x: ScaledTensor | Tensor, name: str) -> ScaledTensor:
    """`x` as a ScaledTensor; BF16, FP16 and FP32 tensors come without scales. TypeError for anything else."""
    if isinstance(x, ScaledTensor):
        return x
    hint = "a ScaledTensor (ScaledTensor.make(data, scale, format) or narrowgemm.quantize), or a BF16 / FP16 / FP32 tensor"
    expect(isinstance(x, Tensor), name, type(x).__name__, hint, error=TypeError)
    expect(x.dtype in PLAIN, f"{name}, dtype", x.dtype, hint, error=TypeError)
    return ScaledTensor(x, None, PLAIN[x.dtype])


def check_kinds(**tensors: object) -> None:
    """TypeError for what is given for a tensor and is none with memory of its own; None is nothing."""
    for name, x in tensors.items():
        expect(x is None or isinstance(x, Tensor), name.replace("_", " "), type(x).__name__, "a torch.Tensor", error=TypeError)
        expect(x is None or x.layout == torch.strided, f"{name.replace('_', ' ')}, layout", getattr(x, "layout", None),     # type: ignore[attr-defined]
               "a dense strided tensor", error=TypeError)


def refuse(error: Exception, **tensors: object) -> NoReturn:
    """Say what `error`, met while shapes and addresses were read, comes from."""
    check_kinds(**tensors)
    if isinstance(error, RuntimeError):
        raise TypeError(f"tensors: got one without memory of its own ({str(error).partition(chr(10))[0]}), expected dense tensors: "
                        "nested ones, and those inside torch.func's vmap and grad, are not taken") from error
    raise error


def check_traced(config: Config | None, out: Tensor | None, accumulate: bool) -> None:
    """What a call can't have under torch.compile; the rest is checked when the compiled graph runs."""
    expect(config is None, "config under torch.compile", "a Config", "None: a tuned table decides there")
    expect(out is not None or not accumulate, "out with accumulate=True", None, "the tensor to add to")


def check_operand(x: ScaledTensor, name: str, shape: str, dims: int, groups: int = 0) -> None:
    """Payload and scale agree with the format and with each other, in dtype, shape, device and strides. `groups`: scales that don't
    run along K may be there once for each of so many groups."""
    expect(isinstance(x.format, Format), f"{name}.format", type(x.format).__name__, "a Format", error=TypeError)
    fmt = x.format
    expect(x.data.dtype == fmt.elem.dtype, f"{name} ({fmt.name}), dtype", x.data.dtype, str(fmt.elem.dtype), error=TypeError)
    expect(x.data.dim() == dims, f"{name}, shape", tuple(x.shape), f"{dims} dimensions, {shape}")
    expect(x.data.layout == torch.strided, f"{name}, layout", x.data.layout, "a dense strided tensor", error=TypeError)
    if not fmt.scaled:
        expect(x.scale is None, f"{name}: scale of unscaled format {fmt.name}", "a tensor", "None")
        return
    want = fmt.scale_shape(x.shape)
    expect(x.scale is not None, f"{name} ({fmt.name}): scale", None, f"a tensor of shape {want}")
    assert x.scale is not None
    expect(x.scale.dtype in (torch.float32, torch.uint8), f"{name} ({fmt.name}): scale dtype", x.scale.dtype,
           "float32, or uint8 with E8M0 codes: ScaledTensor.make converts", error=TypeError)
    expect(x.scale.dtype == torch.float32 or fmt.scale == "e8m0", f"{name} ({fmt.name}): scale dtype", x.scale.dtype,
           "float32", error=TypeError)
    each = groups > 0 and fmt.group[1] == 0 and tuple(x.scale.shape) == (groups, *want)
    expect(each or tuple(x.scale.shape) == want, f"{name} ({fmt.name}) of shape {tuple(x.shape)}: scale shape",
           tuple(x.scale.shape), f"{want}: ScaledTensor.make takes other layouts")
    expect(x.scale.device == x.data.device, f"{name}: scale device", x.scale.device, f"the payload's, {x.data.device}")


def check_pair(a: ScaledTensor, b: ScaledTensor, a_shape: str, b_shape: str, a_dims: int, b_dims: int, groups: int = 0) -> None:
    """`check_operand` of both, and that they fit each other. `a_shape`, `b_shape`: what messages call the shapes."""
    check_operand(a, "a", a_shape, a_dims, groups)
    check_operand(b, "b", b_shape, b_dims, groups)
    expect(a.device == b.device, "b, device", b.device, f"a's, {a.device}")
    expect(a.shape[-1] == b.shape[-1], "K of b", f"{b.shape[-1]} (b is {tuple(b.shape)})",
           f"a's, {a.shape[-1]} (a is {tuple(a.shape)}): a is {a_shape}, b is {b_shape}")


def check_row_scales(a: ScaledTensor) -> None:
    """No scale of `a` spans rows, which may belong to several groups."""
    expect(a.format.group[0] in (0, 1), f"a's scale block {a.format.group}, rows", a.format.group[0],
           "1 or whole tensor: rows of one block may belong to several groups")


def check_flags(**flags: object) -> None:
    """TypeError for what is neither True nor False: 'no' would count as True."""
    for name, given in flags.items():
        expect(isinstance(given, bool), name, repr(given), "True or False", error=TypeError)


def check_out(out: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, accumulate: bool,
              *reads: ScaledTensor | Tensor) -> None:
    """`out` has the shape, dtype and device, or can be allocated so (None). `reads`: what is read while it is written."""
    if out is None:
        expect(dtype in OUT_DTYPES, "out_dtype", dtype, f"one of {OUT_DTYPES}", error=TypeError)
        expect(not accumulate, "out with accumulate=True", None, "the tensor to add to")
        return
    expect(out.dtype in OUT_DTYPES, "out, dtype", out.dtype, f"one of {OUT_DTYPES}", error=TypeError)
    expect(out.dtype == dtype, "out, dtype", out.dtype, f"out_dtype, {dtype}", error=TypeError)
    expect(tuple(out.shape) == shape, "out, shape", tuple(out.shape), str(shape))
    expect(out.device == device, "out, device", out.device, f"the operands', {device}")
    expect(out.stride(-1) == 1 or out.shape[-1] <= 1, "out, strides", out.stride(), "contiguous rows (last stride 1)")
    expect(out.numel() == 0 or not stored_twice(out), "out, strides", out.stride(), "no row stored twice")
    if out.device.type == "meta":
        return
    for x in (t for r in reads for t in ((r.data, r.scale) if isinstance(r, ScaledTensor) else (r,)) if t is not None):
        expect(x.device != out.device or not share_memory(out, x), "out", f"memory of an operand, {tuple(x.shape)}",
               "memory of its own: operands are read while it is written")


def off_16_bytes(x: Tensor) -> int:
    """By how many bytes `x` starts behind a multiple of 16; -1 for a tensor without memory, so that it shares no signature."""
    try:
        at = x.data_ptr()
    except (AttributeError, RuntimeError) as error:
        refuse(error, tensor=x)
    return at & 15 if at else -1


def on_16_bytes(x: Tensor) -> bool:
    """Whether its first element and every row start at multiples of 16 bytes."""
    size = x.element_size()
    s = sorted(x.stride())
    return x.data_ptr() % 16 == 0 and all(v * size % 16 == 0 for v in s[1:])


def _scale_major(x: ScaledTensor) -> str:
    if x.scale is None:
        return ""
    s = x.scale
    if s.stride(-2) == 1 and s.data_ptr() % 16 == 0 and all(v * s.element_size() % 16 == 0 for v in s.stride()[:-2]) \
            and s.stride(-1) * s.element_size() % 16 == 0:
        return "mn"
    return "k" if s.stride(-1) == 1 else "strided"


def operand(x: ScaledTensor, prepack: str = "") -> Operand:
    """The Problem's side of `x`."""
    scale = "" if x.scale is None else "e8m0" if x.scale.dtype == torch.uint8 else "fp32"
    return Operand(x.format, x.major, prepack, scale, _scale_major(x), on_16_bytes(x.data))


def is_wide(*tensors: Tensor | None) -> bool:
    """Whether an offset inside a tile of 256 rows, or a K block of 128, can pass 2^31 elements."""
    return any(256 * max(t.stride()[-2:], default=0) >= 2**31 for t in tensors if t is not None)


def plan(op: str, layout: str, a: ScaledTensor, b: ScaledTensor, out: Tensor, m: int, groups: int, rows: int,
         accumulate: bool, zero_padding: bool, options: Options, alignment: int = 1) -> Plan:
    """Name the Problem and select its Plan."""
    n, k = b.shape[-2], a.shape[-1]
    expect(not options.fast_accum or promotion(a.format, b.format, True) == 0, f"fast_accum of {a.format.name} x {b.format.name}",
           True, "False: sums are scaled, and so promoted, every block of K")
    problem = Problem(
        op, layout, bucket(m), n, k, groups, operand(a), operand(b), rows=bucket(max(rows, 1)),
        out_dtype=dtype_name(out.dtype), out_aligned=on_16_bytes(out), accumulate=accumulate, zero_padding=zero_padding,
        promote=promotion(a.format, b.format, options.fast_accum), max_sms=options.max_sms,
        wide=is_wide(a.data, a.scale, b.data, b.scale, out), alignment=alignment)
    return dispatch.select(problem, detect(a.device), options.backend, options.config, options.on_unsupported)


def out_dtype_of(out: Tensor | None, dtype: torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """What was asked for, else that of the output given, else `default`."""
    if out is not None and not isinstance(out, Tensor):
        expect(False, "out", type(out).__name__, "a torch.Tensor", error=TypeError)
    return dtype if dtype is not None else default if out is None else out.dtype
