"""JSON files of many items, one a line, so that a change of one is a change of one line: tuned tables, sweeps and results."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write(path: Path, header: dict[str, Any], name: str, items: Sequence[Any]) -> None:
    """`{**header, name: items}`, one item a line, in one step: an interrupted run never leaves half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    lines = ",\n".join("  " + json.dumps(x) for x in items)
    head = json.dumps(header, indent=1)[:-2]
    part.write_text(f"{head},\n {json.dumps(name)}: [\n{lines}\n ]\n}}\n")
    os.replace(part, path)


def read(path: Path, expected: str) -> Any:
    """What the file holds. ValueError, naming what was `expected` of it, where it is no JSON."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: got text that is no JSON ({e}), expected {expected}") from e
