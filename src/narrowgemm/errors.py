"""Typed refusals. `ValueError` and `TypeError` are raised by `ops/` for bad input; what is here is about support."""

from __future__ import annotations


class Unsupported(NotImplementedError):
    """No kernel computes this problem on this device, though the problem itself is well formed.

    `reason` says what is missing, `hint` names the nearest thing that works.
    """

    def __init__(self, reason: str, hint: str = "") -> None:
        self.reason, self.hint = reason, hint
        super().__init__(f"{reason} ({hint})" if hint else reason)


def expect(condition: bool, what: str, given: object, expected: str, *, error: type[Exception] = ValueError) -> None:
    """Raise `error` naming what was wrong, what was given and what is expected."""
    if not condition:
        raise error(f"{what}: got {given}, expected {expected}")


def expect_count(x: object, what: str, least: int = 1, unit: str = "") -> None:
    """Raise unless `x` is a whole number known on the host, at least `least`: a tensor would be read back, a float be cut off."""
    # torch.compile traces isinstance of a size, not hasattr
    whole = not isinstance(x, bool) and (isinstance(x, int) or (hasattr(x, "__index__") and not hasattr(x, "stride")))
    expect(whole, what, type(x).__name__, "an int, known on the host", error=TypeError)
    expect(x >= least, what, x, f"at least {least}{unit}")  # type: ignore[operator]
