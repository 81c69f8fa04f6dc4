"""Repairs Triton's interpreter, so that what it computes is what the compiled kernel computes.

Triton 3.6's interpreter multiplies BF16 operands of `tl.dot` as raw integers, truncates casts to BF16, makes FP8 casts
that are off by up to 2x, lets NaN through `maxnum`, has no BF16 constants and no `dot_scaled`, makes loop variables Python
ints, and cannot loop over a runtime bound with NumPy >= 2.4. Each fault is probed first: a fix that the installed Triton
has made itself is not patched over. `repair()` says which faults it found. The last three cost nothing but time: more than half of it.

Narrow floats go through float32 and torch: round to nearest even, FP8 saturating (infinities too, NaN stays NaN), which
is what `cvt.rn.satfinite` does on the device. Rounding toward zero stays with Triton's own code.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as ti

Builder = ti.InterpreterBuilder
Handle = ti.TensorHandle

NARROW = {  # raw in numpy: Triton type -> torch type, largest finite value (None: overflow is infinite)
    tl.bfloat16: (torch.bfloat16, None),
    tl.float8e4nv: (torch.float8_e4m3fn, 448.0),
    tl.float8e5: (torch.float8_e5m2, 57344.0),
    tl.float8e4b8: (torch.float8_e4m3fnuz, 240.0),
    tl.float8e5b16: (torch.float8_e5m2fnuz, 57344.0),
}


def decode(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """The values of a raw array as float32 (float64 stays)."""
    if dtype not in NARROW:
        return data if data.dtype == np.float64 else data.astype(np.float32)
    raw = torch.from_numpy(np.array(data, order="C").view(np.int16 if dtype == tl.bfloat16 else np.uint8))
    return raw.view(NARROW[dtype][0]).float().numpy()


def encode(data: np.ndarray, dtype: tl.dtype) -> np.ndarray:
    """float32 values as the numpy array that holds `dtype`: nearest even, FP8 saturating."""
    if dtype not in NARROW:
        return data.astype(ti._get_np_dtype(dtype))
    target, top = NARROW[dtype]
    x = torch.from_numpy(np.array(data, dtype=np.float32, order="C"))
    x = x if top is None else x.clamp(-top, top)
    return x.to(target).view(torch.int16 if dtype == tl.bfloat16 else torch.uint8).numpy().view(ti._get_np_dtype(dtype))


def handle(values: list[float], dtype: tl.dtype) -> Handle:
    return Handle(encode(np.array(values, dtype=np.float32), dtype), dtype)


def same(got: Handle, want: np.ndarray) -> bool:
    return got.data.dtype == want.dtype and got.data.shape == want.shape and bool((got.data == want).all())


# -- casts -------------------------------------------------------------------------------------------------------------

VALUES = [0.0, 1.0, -1.00390625, 1.01171875, 3.0e-3, -7.0e-4, 447.0, 17.0, 1.1, 0.3, -1.0e9, 1.0e-9, 0.02, -0.0,
          250.0, float("inf")]


def casts_wrong() -> bool:
    b = ti.interpreter_builder
    x = handle(VALUES, tl.float32)
    for dtype in NARROW:
        cast = b.create_fp_trunc if dtype == tl.bfloat16 else \
            lambda s, t: b.create_fp_to_fp(s, t, ti._ir.ROUNDING_MODE.RTNE)
        raw = encode(x.data, dtype)
        back = b.create_fp_ext if dtype == tl.bfloat16 else lambda s, t: b.create_fp_to_fp(s, t, None)
        with np.errstate(all="ignore"):
            if not same(cast(x, tl.block_type(dtype, [len(VALUES)])), raw):
                return True
            if not same(back(Handle(raw, dtype), tl.block_type(tl.float32, [len(VALUES)])), decode(raw, dtype)):
                return True
    ints = b.create_si_to_fp(Handle(np.array([3], dtype=np.int32), tl.int32), tl.block_type(tl.bfloat16, [1]))
    return not same(ints, encode(np.array([3.0]), tl.bfloat16))


def fix_casts() -> None:
    plain_cast, plain_fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp

    def cast_impl(self, src, dst_type):
        s, d = src.dtype.scalar, dst_type.scalar
        if s not in NARROW and d not in NARROW:
            return plain_cast(self, src, dst_type)
        return Handle(encode(decode(src.data, s), d), d)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if rounding_mode not in (None, ti._ir.ROUNDING_MODE.RTNE):
            return plain_fp_to_fp(self, src, dst_type, rounding_mode)
        s, d = src.dtype.scalar, dst_type.scalar
        return Handle(encode(decode(src.data, s), d), d)

    Builder.cast_impl, Builder.create_fp_to_fp = cast_impl, create_fp_to_fp


# -- arithmetic --------------------------------------------------------------------------------------------------------


def arithmetic_wrong() -> bool:
    b = ti.interpreter_builder
    x, y = handle([1.5, -2.0], tl.bfloat16), handle([0.25, 3.0], tl.bfloat16)
    return not (same(b.create_fadd(x, y), encode(np.array([1.75, 1.0]), tl.bfloat16))
                and same(b.create_fcmpOLT(x, y), np.array([False, True])))


def fix_arithmetic() -> None:
    plain_binary, plain_ternary, plain_fma = Builder.binary_op, Builder.ternary_op, Builder.create_fma
    bitwise = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)

    def binary_op(self, lhs, rhs, op):
        dtype = lhs.dtype.scalar
        if dtype not in NARROW or op in bitwise:
            return plain_binary(self, lhs, rhs, op)
        out = op(decode(lhs.data, dtype), decode(rhs.data, rhs.dtype.scalar))
        return Handle(out if out.dtype == bool else encode(out, dtype), dtype)

    def ternary_op(self, lhs, rhs, other, op):
        dtype = other.dtype.scalar
        if dtype not in NARROW or op is np.where:
            return plain_ternary(self, lhs, rhs, other, op)
        return Handle(encode(op(*(decode(x.data, dtype) for x in (lhs, rhs, other))), dtype), dtype)

    def create_fma(self, x, y, z):
        dtype = z.dtype.scalar
        if dtype not in NARROW:
            return plain_fma(self, x, y, z)
        return Handle(encode(decode(x.data, dtype) * decode(y.data, dtype) + decode(z.data, dtype), dtype), dtype)

    Builder.binary_op, Builder.ternary_op, Builder.create_fma = binary_op, ternary_op, create_fma


def fma_wrong() -> bool:
    e = 2.0**-12
    x = handle([1 + e], tl.float32)
    return float(ti.interpreter_builder.create_fma(x, x, handle([-(1 + 2 * e)], tl.float32)).data[0]) != e * e


def fix_fma() -> None:
    before = Builder.create_fma

    def create_fma(self, x, y, z):
        if z.dtype.scalar != tl.float32:
            return before(self, x, y, z)
        out = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)  # one rounding, not two
        return Handle(out.astype(np.float32), tl.float32)

    Builder.create_fma = create_fma


def maxnum_wrong() -> bool:
    one, nan = handle([1.0], tl.float32), handle([float("nan")], tl.float32)
    return bool(np.isnan(ti.interpreter_builder.create_maxnumf(one, nan).data[0]))


def fix_maxnum() -> None:
    Builder.create_maxnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmax)
    Builder.create_minnumf = lambda self, lhs, rhs: self.binary_op(lhs, rhs, np.fmin)


def constants_wrong() -> bool:
    return not hasattr(ti.interpreter_builder, "get_bf16")


def fix_constants() -> None:
    Builder.get_bf16 = lambda self, value: handle([value], tl.bfloat16)


# -- dot ---------------------------------------------------------------------------------------------------------------


def dot_wrong() -> bool:
    acc = Handle(np.zeros((1, 1), dtype=np.float32), tl.float32)
    for dtype in NARROW:
        a = Handle(encode(np.array([[1.5, -2.0]]), dtype), dtype)
        b = Handle(encode(np.array([[3.0], [0.5]]), dtype), dtype)
        with np.errstate(all="ignore"):
            if float(ti.interpreter_builder.create_dot(a, b, acc, None, 0).data[0, 0]) != 3.5:
                return True
    return False


def fix_dot() -> None:
    plain_dot = Builder.create_dot

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        if a.dtype.scalar not in NARROW and b.dtype.scalar not in NARROW:
            return plain_dot(self, a, b, d, input_precision, max_num_imprecise_acc)
        out = np.matmul(decode(a.data, a.dtype.scalar), decode(b.data, b.dtype.scalar)) + d.data.astype(np.float32)
        return Handle(encode(out, d.dtype.scalar), d.dtype.scalar)

    Builder.create_dot = create_dot


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float32)


def dot_scaled_wrong() -> bool:
    return not hasattr(ti.interpreter_builder, "create_dot_scaled")


def fix_dot_scaled() -> None:
    ty = ti._ir.ScaleDotElemTypeTY
    types = {ty.E4M3: tl.float8e4nv, ty.E5M2: tl.float8e5, ty.BF16: tl.bfloat16, ty.FP16: tl.float16}

    def values(x: Handle, kind, axis: int) -> np.ndarray:
        """Float32 values; E2M1 is two a byte along `axis`, low nibble first."""
        if kind != ty.E2M1:
            return decode(x.data.view(ti._get_np_dtype(types[kind])), types[kind])
        raw = np.moveaxis(x.data.view(np.uint8), axis, -1)
        both = np.stack([E2M1[raw & 15], E2M1[raw >> 4]], axis=-1)
        return np.moveaxis(both.reshape(*raw.shape[:-1], -1), -1, axis)

    def scaled(x: np.ndarray, scale: Handle | None) -> np.ndarray:
        """`x` [.., R, K] times 2^(code-127) of `scale` [.., R, K/32]."""
        if scale is None:
            return x
        code = torch.from_numpy(np.array(scale.data).view(np.uint8)).view(torch.float8_e8m0fnu).float().numpy()
        return x * np.repeat(code, x.shape[-1] // code.shape[-1], axis=-1)

    def create_dot_scaled(self, lhs, lhs_scale, lhs_kind, rhs, rhs_scale, rhs_kind, fast_math, lhs_k_pack, rhs_k_pack,
                          acc):
        a = scaled(values(lhs, lhs_kind, -1 if lhs_k_pack else -2), lhs_scale)
        b = np.swapaxes(values(rhs, rhs_kind, -2 if rhs_k_pack else -1), -1, -2)
        out = np.matmul(a, np.swapaxes(scaled(b, rhs_scale), -1, -2)) + acc.data.astype(np.float32)
        return Handle(encode(out, acc.dtype.scalar), acc.dtype.scalar)

    plain = ti.TritonSemantic.dot_scaled

    def dot_scaled(self, lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, *rest):
        """Literals are plain strings here; the compiler's front end makes them constexpr."""
        lhs_format, rhs_format = (tl.constexpr(f) if isinstance(f, str) else f for f in (lhs_format, rhs_format))
        return plain(self, lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, *rest)

    Builder.create_dot_scaled, ti.TritonSemantic.dot_scaled = create_dot_scaled, dot_scaled


# -- Python protocol ---------------------------------------------------------------------------------------------------


def index_wrong() -> bool:
    """Whether NumPy refuses, or warns about, what the interpreter does to use a scalar as a loop bound."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            int(np.array([1]))
        except (TypeError, DeprecationWarning):
            return True
    return False


def fix_index() -> None:
    plain = ti._patch_lang_tensor

    def patch_lang_tensor(tensor, *scope):
        plain(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())  # undone with the attribute that `plain` has set

    ti._patch_lang_tensor = patch_lang_tensor


def loop_variable_wrong() -> bool:
    """Whether `for i in range(...)` gives a Python int, where the compiler gives a tensor with `.to` and a dtype."""
    return not hasattr(ti.ASTTransformer, "visit_For")


def fix_loop_variable() -> None:
    def visit_For(self, node: ast.For) -> ast.For:
        self.generic_visit(node)
        call = node.iter.func if isinstance(node.iter, ast.Call) else None
        name = call.id if isinstance(call, ast.Name) else call.attr if isinstance(call, ast.Attribute) else ""
        if name == "range" and isinstance(node.target, ast.Name):  # not static_range, whose variable is a constexpr
            convert = ast.parse(f"{node.target.id} = interpreter_semantic.to_tensor({node.target.id}, False)").body
            node.body[:0] = [ast.copy_location(stmt, node.body[0]) for stmt in convert]
        return node

    ti.ASTTransformer.visit_For = visit_For


# -- time: three things that are done again for every call or operation, to no effect ------------------------------------


class _Patched:
    """What `patch_lang` gives a launch: to be undone at its end."""

    def __init__(self, scope: Any, done: set[str]) -> None:
        self.scope, self.done = scope, done

    def restore(self) -> None:
        self.scope.restore()
        self.done.clear()


def patching_slow() -> bool:
    """Whether every call of a device function looks through the language for what the launch has patched already."""
    return "_patch_lang" in ti.InterpretedFunction.__call__.__code__.co_names and not hasattr(ti._patch_lang, "plain")


def fix_patching() -> None:
    plain, done = ti._patch_lang, set()

    def patch_lang(fn):
        seen = {x.__name__ for x in fn.__globals__.values() if x is tl or x is tl.core}
        if seen and seen <= done:
            return None     # nobody undoes what a device function patches
        first = not done
        scope = plain(fn)
        done.update(seen)
        return _Patched(scope, done) if first else scope

    patch_lang.plain = plain
    ti._patch_lang = patch_lang


def overflow_slow() -> bool:
    """Whether integer operations are done in int64, too, for an assertion that the interpreter leaves out."""
    options = ti.interpreter_builder.options
    return options.sanitize_overflow and not options.debug


def fix_overflow() -> None:
    ti.interpreter_builder.options = replace(ti.interpreter_builder.options, sanitize_overflow=False)


def np_dtype_slow() -> bool:
    """Whether a table of all types is made for every type that is looked up."""
    return "np_types" in ti._get_np_dtype.__code__.co_varnames


def fix_np_dtype() -> None:
    plain, known = ti._get_np_dtype, {}

    def get_np_dtype(dtype):
        scalar = dtype.scalar
        if isinstance(scalar, tl.pointer_type):
            return plain(dtype)
        if scalar not in known:
            known[scalar] = plain(scalar)
        return known[scalar]

    ti._get_np_dtype = get_np_dtype


FAULTS: dict[str, tuple[Callable[[], bool], Callable[[], None]]] = {
    "casts to and from BF16 and FP8": (casts_wrong, fix_casts),
    "BF16 arithmetic": (arithmetic_wrong, fix_arithmetic),
    "fma rounds twice": (fma_wrong, fix_fma),
    "maxnum lets NaN through": (maxnum_wrong, fix_maxnum),
    "no BF16 constants": (constants_wrong, fix_constants),
    "dot of BF16 and FP8": (dot_wrong, fix_dot),
    "no dot_scaled": (dot_scaled_wrong, fix_dot_scaled),
    "loops over a runtime bound": (index_wrong, fix_index),
    "loop variables are Python ints": (loop_variable_wrong, fix_loop_variable),
    "device functions patch the language": (patching_slow, fix_patching),
    "overflow is looked for and not reported": (overflow_slow, fix_overflow),
    "types in a table of their own": (np_dtype_slow, fix_np_dtype),
}


@lru_cache(maxsize=1)
def repair() -> tuple[str, ...]:
    """Patch every fault that the installed Triton has, once a process; the faults found, by name."""
    found = []
    for name, (wrong, fix) in FAULTS.items():
        if wrong():
            fix()
            assert not wrong() or fix is fix_index, f"the repair of Triton's interpreter did not take: {name}"
            found.append(name)
    return tuple(found)
