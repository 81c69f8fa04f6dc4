"""`narrowgemm parallel`: the one command that runs expert parallelism over several processes of this machine."""

from __future__ import annotations

import shlex
import subprocess
import sys

import click

MODULE = "narrowgemm.distributed.demo"


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--processes", type=click.IntRange(1), default=2, show_default=True, help="Ranks; one GPU each if there are enough.")
@click.option("--run", "now", is_flag=True, help="Run it, instead of printing it.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def parallel(processes: int, now: bool, arguments: tuple[str, ...]) -> None:
    """Print the command that runs an expert layer over several processes; ARGUMENTS go to it (--help shows them with --run).

    \b
    narrowgemm parallel --run --tokens 256
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m", MODULE,
               *arguments]
    if not now:
        click.echo(shlex.join(command))
        return
    raise SystemExit(subprocess.run(command).returncode)
