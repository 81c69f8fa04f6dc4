"""What a kernel is as far as its speed goes, in twelve digits: rows of tuned tables name what they were measured with.

It covers the source of everything that the kernel's `configs`, `launches` and `launch` reach within its own folder: device
code, tiles, candidates, grid. Not the cost model, which picks and doesn't run; not comments, docstrings and spacing.
"""

from __future__ import annotations

import ast
import hashlib
from functools import lru_cache
from pathlib import Path

from ..kernels.registry import kernels

ROOTS = ("configs", "launches", "launch")
Symbol = tuple[Path, str]


def fingerprint(kernel: str) -> str:
    """Of the kernel of that name; '' where there is none, or its source can't be read."""
    path = getattr(kernels().get(kernel), "__file__", None)
    return of_file(Path(path)) if path and Path(path).is_file() else ""


@lru_cache(maxsize=64)
def of_file(path: Path) -> str:
    """Of the kernel whose host part is that file."""
    todo: list[Symbol] = [(path, name) for name in ROOTS]
    seen: set[Symbol] = set()
    parts: list[str] = []
    while todo:
        symbol = todo.pop()
        if symbol in seen:
            continue
        seen.add(symbol)
        file, name = symbol
        source = _source(file)
        if name in source.imported:
            todo.append(source.imported[name])
            continue
        for node in source.defined.get(name, ()):
            parts.append(f"{file.name} {name}\n{source.text(node)}")
            todo += source.uses(node)
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:12] if parts else ""


class _Source:
    """A file: what it defines at its top, and what it imports from files beside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        text = path.read_text(encoding="utf-8")
        self.lines = text.splitlines()
        tree = ast.parse(text)
        self.defined: dict[str, list[ast.stmt]] = {}
        for node in tree.body:
            for name in _names(node):
                self.defined.setdefault(name, []).append(node)
        self.imported: dict[str, Symbol] = {}       # a name of another file
        self.modules: dict[str, Path] = {}          # another file
        for x in ast.walk(tree):
            if isinstance(x, ast.ImportFrom) and x.level == 1:
                for alias in x.names:
                    self._take(x.module, alias.name, alias.asname or alias.name)

    def _take(self, module: str | None, name: str, local: str) -> None:
        if module is None:
            if (file := self.path.parent / f"{name}.py").is_file():
                self.modules[local] = file
        elif (file := self.path.parent / f"{module.replace('.', '/')}.py").is_file():
            self.imported[local] = (file, name)

    def uses(self, node: ast.stmt) -> list[Symbol]:
        """What a definition names, of this file and of those beside it."""
        out: list[Symbol] = []
        for x in ast.walk(node):
            if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Load):
                out.append((self.path, x.id))
            elif isinstance(x, ast.Attribute) and isinstance(x.value, ast.Name) and x.value.id in self.modules:
                out.append((self.modules[x.value.id], x.attr))
        return out

    def text(self, node: ast.stmt) -> str:
        """The source of a definition, without docstrings, comments and spacing."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        skip: set[int] = set()
        for x in ast.walk(node):
            if isinstance(x, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(x, clean=False) is not None:
                skip |= set(range(x.body[0].lineno, (x.body[0].end_lineno or 0) + 1))
        kept = []
        for number in range(first, (node.end_lineno or first) + 1):
            line = self.lines[number - 1].split("  # ")[0].strip()
            if number not in skip and line and not line.startswith("#"):
                kept.append("".join(line.split()))
        return "\n".join(kept)


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    alone = [node.target] if isinstance(node, (ast.AnnAssign, ast.AugAssign)) else []
    targets = node.targets if isinstance(node, ast.Assign) else alone
    return [x.id for t in targets for x in ast.walk(t) if isinstance(x, ast.Name)]


@lru_cache(maxsize=256)
def _source(path: Path) -> _Source:
    return _Source(path)
