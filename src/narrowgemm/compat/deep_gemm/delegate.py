"""Names that are not offered here, from a real DeepGEMM where there is one: attention, mega kernels; and BF16 ones, else ours.

It is looked for only when such a name is asked for: the `deep_gemm` that was imported before `install()`, else one on
the path, loaded under a private name so that `install()`'s entry in `sys.modules` stays, else the one inside vLLM if
that is loaded. Settings that were made here are made there too.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from . import batched, bf16, state

NAME = "deep_gemm"
PRIVATE = "_narrowgemm_real_deep_gemm"
VENDORED = "vllm.third_party.deep_gemm"
OURS = {name: getattr(module, name) for module in (bf16, batched) for name in module.NAMES}     # where the real one lacks them
MARK = "__narrowgemm_compat__"  # attribute of the modules that install() makes

replaced: dict[str, ModuleType] = {}  # what install() found in sys.modules
_lock = threading.RLock()
_found: ModuleType | None = None
_failure = ""      # why a real one that exists could not be imported
_loading = False


def attribute(name: str, path: str = "") -> Any:
    """`deep_gemm[.path].name` of the real package. AttributeError, saying what to do, where there is none."""
    dotted = ".".join(filter(None, (NAME, path, name)))
    if name.startswith("__"):
        raise AttributeError(f"module {dotted.rpartition('.')[0]!r} has no attribute {name!r}")
    module = real()
    if not path and name in OURS and not hasattr(module, name):
        return OURS[name]
    if module is None:
        raise AttributeError(
            f"{dotted} is not offered by narrowgemm.compat.deep_gemm, and "
            + (f"the installed deep_gemm can't be imported ({_failure}); repair it" if _failure else
               "no real deep_gemm is installed to take it from; install one (github.com/deepseek-ai/DeepGEMM)")
            + ", or use a narrowgemm op")
    owner: object = module
    for part in filter(None, path.split(".")):
        owner = getattr(owner, part)
    if not hasattr(owner, name):
        raise AttributeError(f"{dotted} is offered neither by narrowgemm.compat.deep_gemm nor by the real deep_gemm "
                             f"{getattr(module, '__version__', '')} at {getattr(module, '__file__', '?')}")
    return getattr(owner, name)


def real() -> ModuleType | None:
    """The real package, imported at most once; None where there is none, where it fails, and while it is importing."""
    global _found, _failure, _loading
    with _lock:
        if _loading:
            return None
        before = replaced.get(NAME) or _imported()
        if before is not None:
            return _adopt(before)
        if _found is not None or _failure:
            return _found
        _loading = True
        try:
            module = _load()
        except (ImportError, OSError, RuntimeError, AssertionError, AttributeError) as e:
            _failure = f"{type(e).__name__}: {e}"
            return None
        finally:
            _loading = False
        return None if module is None else _adopt(module)


def forget() -> None:
    """Look again at the next unknown name, for example after an installation in a running process."""
    global _found, _failure
    with _lock:
        _found, _failure = None, ""
        state.listeners.clear()


def _adopt(module: ModuleType) -> ModuleType:
    """Make `module` the one; it gets the settings so far, and every later one."""
    global _found
    if _found is not module:
        _found = module

        def tell(setter: str, value: object) -> None:
            function = getattr(module, setter, None)
            if function is not None:
                function(value)

        state.listeners[:] = [tell]
        for setter, value in list(state.calls.items()):
            tell(setter, value)
    return module


def _imported() -> ModuleType | None:
    module = sys.modules.get(NAME)
    return None if module is None or hasattr(module, MARK) else module


def _load() -> ModuleType | None:
    if PRIVATE in sys.modules:
        return sys.modules[PRIVATE]
    spec = _find()
    if spec is None:
        return importlib.import_module(VENDORED) if "vllm" in sys.modules and _has(VENDORED) else None
    private = importlib.util.spec_from_file_location(PRIVATE, spec.origin,
                                                     submodule_search_locations=spec.submodule_search_locations)
    assert private is not None and private.loader is not None
    module = importlib.util.module_from_spec(private)
    sys.modules[PRIVATE] = module
    try:
        private.loader.exec_module(module)
    except BaseException:
        for name in [n for n in sys.modules if n == PRIVATE or n.startswith(PRIVATE + ".")]:
            del sys.modules[name]
        raise
    return module


def _find() -> ModuleSpec | None:
    """The spec of a real package on the path; a folder without an `__init__` is none."""
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(NAME, None) if find is not None else None
        if spec is not None and spec.origin and spec.submodule_search_locations:
            return spec
    return None


def _has(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
