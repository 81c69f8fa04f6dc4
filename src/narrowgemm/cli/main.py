"""The entry point, standard library only: `env` must answer where torch, triton or click is missing or broken."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. `argv` without the program's name, default `sys.argv[1:]`."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args[:1] == ["env"]:
        from . import env

        return env.main(args[1:])
    try:
        import click  # noqa: F401
    except ImportError as e:
        print(f"narrowgemm: the command line needs click and rich ({e}): pip install '.[cli]' in a checkout\n"
              "`python -m narrowgemm env` works without them.", file=sys.stderr)
        return 2
    from .group import cli

    return cli.main(args, prog_name="narrowgemm", standalone_mode=True) or 0
