"""`import deep_gemm` gives this package, for callers that can't change their imports: `install()` and `uninstall()`.

Nothing is written to disk and no top-level `deep_gemm` is shipped: the entries live in `sys.modules` of this process.
Call `install()` before the caller's first import, since callers keep what they found (`from deep_gemm import ...`,
cached capability look-ups).
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

from . import delegate

SUBMODULES = ("utils", "utils.math", "utils.layout", "testing", "testing.bench", "testing.numeric", "testing.utils")
_HERE = __name__.rpartition(".")[0]
_lock = threading.RLock()


def install() -> ModuleType:
    """Put this package into `sys.modules` as `deep_gemm`, with its submodules, and return it.

    A `deep_gemm` that was imported before is kept for the names that this one lacks, and comes back with `uninstall()`.
    A second call changes nothing.
    """
    with _lock:
        current = sys.modules.get(delegate.NAME)
        if current is not None and hasattr(current, delegate.MARK):
            return current
        made = {path: _facade(path) for path in ("", *SUBMODULES)}
        ours = {f"{_HERE}.{path}".rstrip("."): module for path, module in made.items()}
        for path, module in made.items():
            for key, value in list(vars(module).items()):  # attributes that are modules name the made ones
                if isinstance(value, ModuleType):
                    setattr(module, key, ours[value.__name__])
            name = _full(path)
            if name in sys.modules:
                delegate.replaced[name] = sys.modules[name]
            sys.modules[name] = module
        return made[""]


def uninstall() -> None:
    """Undo `install()`: what was in `sys.modules` before is back. Does nothing where nothing is installed."""
    with _lock:
        for path in ("", *SUBMODULES):
            name = _full(path)
            if not hasattr(sys.modules.get(name), delegate.MARK):
                delegate.replaced.pop(name, None)  # somebody else's by now
            elif name in delegate.replaced:
                sys.modules[name] = delegate.replaced.pop(name)
            else:
                del sys.modules[name]
        delegate.forget()


def installed() -> bool:
    """Whether `import deep_gemm` gives this package."""
    return hasattr(sys.modules.get(delegate.NAME), delegate.MARK)


def _full(path: str) -> str:
    return f"{delegate.NAME}.{path}" if path else delegate.NAME


def _facade(path: str) -> ModuleType:
    """A module with the public names of ours and a spec of its own, so that `importlib.util.find_spec` works."""
    source = import_module(f"{_HERE}.{path}" if path else _HERE)
    package = hasattr(source, "__path__")
    module = ModuleType(_full(path), source.__doc__)
    module.__dict__.update({name: getattr(source, name) for name in source.__all__})
    module.__spec__ = ModuleSpec(_full(path), None, origin=source.__file__, is_package=package)
    module.__file__ = source.__file__
    module.__package__ = _full(path) if package else _full(path).rpartition(".")[0]
    if package:
        module.__path__ = []
    if not path:
        module.__dict__["__version__"] = vars(source)["__version__"]
    module.__dict__[delegate.MARK] = True
    module.__dict__["__getattr__"] = partial(delegate.attribute, path=path)
    return module
