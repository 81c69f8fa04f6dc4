"""DeepGEMM's process-wide settings, kept here and read once a call. Nothing outside compat has state like this.

What changes a result's layout or its use of the device is honoured: `set_num_sms` (the per-call `max_sms`),
`set_mk_alignment_for_contiguous_layout` (the alignment of psum and k-grouped psum layouts), `set_compile_mode`. What
tunes DeepGEMM's own kernels (`set_tc_util`, `set_pdl`, `set_ignore_compile_dims`, `set_block_size_multiple_of`) is
checked, recorded and has no effect; `use_deterministic_algorithms` is always on here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from torch import Tensor

from ... import arch
from ...errors import expect
from ...formats import ScaledTensor
from ...prepack import PackedWeight
from ...problem import bucket

LEGACY_ALIGNMENT = 128  # rows; DeepGEMM's fixed value everywhere but on compute capability 10


@dataclass(slots=True)
class Settings:
    """One value for each setter; writers hold `_lock`, readers take the attribute."""

    num_sms: int = 0
    tc_util: int = 0
    pdl: bool = False
    ignore_compile_dims: bool = False
    block_size_multiple_of: tuple[int, int] = (1, 1)
    mk_alignment: int = LEGACY_ALIGNMENT
    compile_mode: int = 0
    deterministic: bool = False
    compiled: set[Hashable] = field(default_factory=set)


settings = Settings()
calls: dict[str, object] = {}                          # setter name -> its last argument
listeners: list[Callable[[str, object], None]] = []    # a real deep_gemm that was loaded for other names
_lock = threading.RLock()


def _set(setter: str, attribute: str, value: object, argument: object) -> None:
    with _lock:
        setattr(settings, attribute, value)
        calls[setter] = argument
        for tell in listeners:
            tell(setter, argument)


def _integer(value: object, what: str, low: int, high: int | None = None) -> int:
    bound = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
    expect(isinstance(value, int) and not isinstance(value, bool), what, repr(value), bound, error=TypeError)
    assert isinstance(value, int)
    expect(value >= low and (high is None or value <= high), what, value, bound)
    return value


def set_num_sms(num_sms: int) -> None:
    """Let following calls use at most `num_sms` multiprocessors; 0 is all. ValueError for more than the GPU has."""
    here = arch.detect()
    n = _integer(num_sms, "num_sms", 0, None if here.vendor == "cpu" else here.sms)
    _set("set_num_sms", "num_sms", n, n)


def get_num_sms() -> int:
    """The limit, or the number of multiprocessors of the current device where none is set."""
    return settings.num_sms or arch.detect().sms


def max_sms(d: Tensor) -> int:
    """The per-call option where `d` lies: 0 where the limit is no limit there, so that plans and tables still match."""
    n = settings.num_sms
    return 0 if n == 0 or n >= arch.detect(d.device).sms else n


def set_tc_util(tc_util: int) -> None:
    """Record a tensor-core utilisation in percent, 0 to 100. No effect here."""
    n = _integer(tc_util, "tc_util", 0, 100)
    _set("set_tc_util", "tc_util", n, n)


def get_tc_util() -> int:
    """The recorded utilisation in percent; 100 where it is unset or 0."""
    return settings.tc_util or 100


def set_pdl(enable_pdl: bool) -> None:
    """Record whether programmatic dependent launch is wanted. No effect here."""
    _set("set_pdl", "pdl", bool(enable_pdl), bool(enable_pdl))


def get_pdl() -> bool:
    """What `set_pdl` recorded."""
    return settings.pdl


def set_ignore_compile_dims(new_value: bool) -> None:
    """Record whether `compiled_dims` is ignored. It always is: nothing here is compiled a shape."""
    _set("set_ignore_compile_dims", "ignore_compile_dims", bool(new_value), bool(new_value))


def set_block_size_multiple_of(new_value: int | tuple[int, int]) -> None:
    """Record what tile rows and columns should be multiples of, one number or a pair. No effect here."""
    pair = tuple(new_value) if isinstance(new_value, (tuple, list)) else (new_value, new_value)
    expect(len(pair) == 2, "block_size_multiple_of", new_value, "an integer or a pair of them")
    m, n = (_integer(x, "block_size_multiple_of", 1) for x in pair)
    _set("set_block_size_multiple_of", "block_size_multiple_of", (m, n), new_value)


def set_mk_alignment_for_contiguous_layout(new_value: int) -> None:
    """Set the rows (k-grouped: columns of K) that a group's start is a multiple of in psum layouts; at first 128.

    Layouts with `m_indices` don't need it: segments may have any length here.
    """
    n = _integer(new_value, "mk_alignment_for_contiguous_layout", 1)
    _set("set_mk_alignment_for_contiguous_layout", "mk_alignment", n, n)


def get_mk_alignment_for_contiguous_layout() -> int:
    """The alignment in rows; 128 until it is set."""
    return settings.mk_alignment


get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
get_k_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None,
                                                       num_groups: int | None = None) -> int:
    """The alignment DeepGEMM asks for, in rows: 128; on compute capability 10 the least multiple of 32, up to 224, that
    covers a group.

    `expected_m`: rows a group, or rows of all groups where `num_groups` is given too. A smaller alignment is right here
    as well, since no kernel needs one; callers size their buffers by this value, so it is DeepGEMM's.
    """
    rows = None if expected_m is None else _integer(expected_m, "expected_m", 0)
    groups = None if num_groups is None else _integer(num_groups, "num_groups", 1)
    if arch.detect().capability // 10 != 10:
        return LEGACY_ALIGNMENT
    if rows is None:
        return 224
    if groups is not None:
        rows = -(-rows // groups)
    return min(224, max(32, -(-rows // 32) * 32))


def set_compile_mode(new_compile_mode: int) -> None:
    """1: calls compile what they need and launch at most once for each kernel choice; 0: calls run (the default)."""
    n = _integer(new_compile_mode, "compile_mode", 0, 1)
    with _lock:
        settings.compiled.clear()
    _set("set_compile_mode", "compile_mode", n, n)


def get_compile_mode() -> int:
    """What `set_compile_mode` set."""
    return settings.compile_mode


def skips(kind: str, a: ScaledTensor, b: ScaledTensor | PackedWeight, d: Tensor, expected_m: int = 0) -> bool:
    """In compile mode: whether a call that chooses like this one was made already. Sizes of M, G and k are in buckets."""
    *groups, n, k = b.shape
    rows = bucket(expected_m or a.shape[-2])
    key = (kind, a.format, b.format, d.dtype, d.device, rows, n, bucket(k) if kind == "k_grouped" else k,
           *map(bucket, groups))
    with _lock:
        seen = key in settings.compiled
        settings.compiled.add(key)
    return seen


def use_deterministic_algorithms(mode: bool) -> None:
    """Record the wish. Every kernel reached from here gives the same bits for the same inputs either way."""
    _set("use_deterministic_algorithms", "deterministic", bool(mode), bool(mode))


def get_deterministic_algorithms() -> bool:
    """What `use_deterministic_algorithms` recorded."""
    return settings.deterministic
