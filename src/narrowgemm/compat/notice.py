"""Warnings that a process gives once: what was asked for and has no effect, or costs more than it need."""

from __future__ import annotations

import sys
import warnings

_given: set[str] = set()
_PACKAGE = __name__.split(".")[0]


def warn_once(message: str) -> None:
    """UserWarning with `message` at the caller of this package, the first time that the process has cause for it."""
    if message in _given:
        return
    _given.add(message)
    level = 1
    while sys._getframe(level).f_globals.get("__name__", "").split(".")[0] == _PACKAGE:
        level += 1
    warnings.warn(message, stacklevel=level + 1)
