"""The `narrowgemm` command group. A command's module is imported when the command is asked for: none breaks another."""

from __future__ import annotations

from importlib import import_module

import click

from ..version import __version__

# name: (module under this package, attribute, one line for `narrowgemm --help`)
COMMANDS: dict[str, tuple[str, str, str]] = {
    "demo": ("demo", "demo", "Run an expert block of a real model in FP8 and BF16, step by step."),
    "explain": ("explain", "explain", "Say which kernel a problem gets, why, and how fast it should be."),
    "bench": ("bench", "bench", "Measure suites of cases side by side with peers."),
    "tune": ("tune", "tune", "Measure every kernel and config, and keep what beats the cost model."),
    "report": ("report", "report", "Print tables from result files."),
    "cache": ("cache", "cache", "Inspect or clear Triton's compile cache; compile a model's shapes in advance."),
    "doctor": ("doctor", "doctor", "Check the installation; run every kernel on this device against the reference."),
    "parallel": ("parallel", "parallel", "Print, or run, the command for expert parallelism over several processes."),
    "env": ("env", "command", "Print versions, devices, drivers, variables and caches; works on a broken install."),
}


class LazyGroup(click.Group):
    """Looks commands up in `COMMANDS` and imports only the one that runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[name]
        try:
            return getattr(import_module(f".{module}", __package__), attribute)
        except ImportError as e:
            raise click.ClickException(
                f"`narrowgemm {name}` can't be loaded: {e}. `narrowgemm env` shows what is installed; "
                "`pip install '.[cli,bench,hf]'` in a checkout installs what commands need.") from e

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, _, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="narrowgemm")
def cli() -> None:
    """Matrix products in narrow number formats for Mixture-of-Experts models."""
