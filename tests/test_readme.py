"""The documentation's Python runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

pytest.importorskip("safetensors")

from narrowgemm.cli.group import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line number, text) of every fenced block of a language."""
    text = page.read_text()
    return [(text[: m.start()].count("\n") + 2, m[1])
            for m in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=name)
def test_python(page: Path) -> None:
    """Blocks run in order in one namespace. Line numbers in a failure are those of the page."""
    if page.name == "transformers.md":
        pytest.importorskip("transformers")
    torch.manual_seed(0)
    scope: dict[str, object] = {"__name__": "docs"}
    try:
        for line, code in blocks(page, "python"):
            exec(compile("\n" * (line - 1) + code, str(page), "exec"), scope)
    finally:
        from narrowgemm.compat import deep_gemm

        deep_gemm.uninstall()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_parse(page: Path) -> None:
    text = "\n".join(code for _, code in blocks(page, "sh"))
    inline = re.findall(r"`(narrowgemm (?:demo|explain|bench|report|doctor|env)[^`]*)`", page.read_text())
    for line in [line for line in text.splitlines() if line.startswith("narrowgemm ")] + inline:
        command, *args = shlex.split(line, comments=True)[1:]
        found = cli.get_command(cli.make_context("narrowgemm", [command]), command)
        assert found is not None, line
        if args and command != "report":  # its arguments are files that are yet to be made
            found.make_context(command, args)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_in_backticks_exist(page: Path) -> None:
    """Files that the prose names, relative to the repository or to the package."""
    for path in re.findall(r"`((?:[\w.-]+/)+[\w.-]*\w\.(?:py|md|txt))`", page.read_text()):
        places = (ROOT, ROOT / "src", ROOT / "src" / "narrowgemm")
        assert any((place / path).exists() for place in places), f"{name(page)} names {path}"


def test_the_results_table_has_its_place() -> None:
    text = (ROOT / "README.md").read_text()
    assert 0 < text.index("<!-- results:begin -->") < text.index("<!-- results:end -->")
