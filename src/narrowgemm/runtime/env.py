"""Every environment variable that narrowgemm reads, in one table. `narrowgemm env` prints it."""

from __future__ import annotations

import os

VARIABLES: dict[str, str] = {
    "NARROWGEMM_BACKEND": "use only this backend for every call ('triton', 'gluon_sm90', 'reference'); a problem that it "
                          "does not support raises Unsupported",
    "NARROWGEMM_ARCH": "pretend to run on this device ('h200', 'b200', 'mi350x', 'cpu', or a target such as 'sm90')",
    "NARROWGEMM_TABLES": "folder of tuned tables that are read before the packaged ones",
    "NARROWGEMM_VALIDATE": "'sync' reads ids, sizes and scales back and checks them on every call (slow; for debugging)",
}


def choice() -> tuple[str | None, str | None, str | None]:
    """The variables that decide which kernel a call gets, as they are: part of every key under which a Plan is kept."""
    read = os.environ.get
    return read("NARROWGEMM_BACKEND"), read("NARROWGEMM_ARCH"), read("NARROWGEMM_TABLES")


def get(name: str) -> str:
    """The variable's value, or '' where it is not set. Raises KeyError for a name that the table lacks."""
    assert name in VARIABLES, name
    return os.environ.get(name, "").strip()
