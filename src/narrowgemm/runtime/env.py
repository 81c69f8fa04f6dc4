"""Every environment variable that narrowgemm reads, in one table. `narrowgemm env` prints it."""

from __future__ import annotations

import os

VARIABLES: dict[str, str] = {
    "NARROWGEMM_BACKEND": "use only this backend for every call ('triton', 'gluon_sm90', 'reference'); a problem that it "
                          "does not support raises Unsupported",
    "NARROWGEMM_ARCH": "pretend to run on this device ('h200', 'b200', 'mi350x', 'cpu', or a target such as 'sm90')",
    "NARROWGEMM_TABLES": "folder of tuned tables that are read before the packaged ones",
    "NARROWGEMM_VALIDATE": "'sync' reads ids, sizes and scales back and checks them on every call (slow; for debugging)",
    "NARROWGEMM_DEEP_GEMM": "'1': in a process of vLLM or SGLang, `import deep_gemm` gives narrowgemm.compat.deep_gemm",
}


_KEYS = tuple(name.encode() for name in VARIABLES)[:4]


def choice() -> tuple[str | bytes | None, ...]:
    """The first four as they are: they decide which kernel a call gets and what is checked, so they are part of every key under
    which a Plan is kept."""
    raw = getattr(os.environ, "_data", None)    # where os.environ keeps them: reading there takes 0.04 us, through it 1 us
    if raw is None or os.name != "posix":
        return tuple([os.environ.get(key.decode()) for key in _KEYS])
    read = raw.get
    return read(_KEYS[0]), read(_KEYS[1]), read(_KEYS[2]), read(_KEYS[3])


def wants_sync(validate: str | None = None) -> bool:
    """Whether a call with this `validate` reads device data back to check it."""
    return validate == "sync" or get("NARROWGEMM_VALIDATE") == "sync"


def get(name: str) -> str:
    """The variable's value, or '' where it is not set. Raises KeyError for a name that the table lacks."""
    assert name in VARIABLES, name
    return os.environ.get(name, "").strip()
