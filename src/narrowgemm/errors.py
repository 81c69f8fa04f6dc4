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
