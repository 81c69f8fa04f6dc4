"""The documentation as a whole: every complaint has its answer, pictures are what is drawn, the site builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
COMMIT = re.compile("[0-9a-f]{10}")


def complaints() -> dict[int, str]:
    """Row by number of the table of complaints."""
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", (DOCS / "complaints.md").read_text(), re.MULTILINE)
    return {int(n): text for n, text in rows}


def test_every_complaint_has_a_row_with_source_and_answer() -> None:
    rows = complaints()
    assert sorted(rows) == list(range(1, 43))
    for n, row in rows.items():
        complaint, answer = row.split(" | ")
        assert "https://github.com/" in complaint, n
        assert len(answer) > 10, n


def test_tests_that_are_named_exist() -> None:
    named = [m for page in DOCS.glob("*.md") for m in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text())]
    assert len(named) > 40
    for path, name in named:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), f"{path} has no {name}"


def test_names_in_backticks_are_in_the_code() -> None:
    """Functions, options and files that a page written by hand names; what was measured may name what is gone."""
    folders = ("src", "tests", "benchmarks", "tools", "examples")
    files = [ROOT / "pyproject.toml", ROOT / "Makefile", *(p for f in folders for p in (ROOT / f).rglob("*.py"))]
    known = {word for p in files for word in re.findall(r"\w+", p.read_text() + " " + p.as_posix())}
    elsewhere = {"k_grouped_bf16_gemm_tn_contiguous"}      # DeepGEMM's, said to be missing here
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]
    names = [(page.name, name) for page in pages if page.name != "performance.md"
             for name in re.findall(r"`(?:[a-z]\w*\.)*([A-Za-z]\w+)(?:\([^`]*\))?`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))]
    assert len(names) > 300
    assert [(page, name) for page, name in names if name not in known | elsewhere and not COMMIT.fullmatch(name)] == []


def test_rows_that_say_gpu_name_tests_that_run_on_one() -> None:
    named = [m for row in complaints().values() for m in re.findall(r"\*GPU\* `(tests/[\w/]+\.py)::(\w+)`", row)]
    assert len(named) > 5
    for path, name in named:
        text = (ROOT / path).read_text()
        decorators, _, rest = text.partition(f"\ndef {name}(")
        decorators = decorators.rpartition("\n\n")[2]
        signature = rest.partition(":\n")[0]
        marked = "mark.gpu" in decorators or "device" in signature or re.search(r"^pytestmark = .*mark\.gpu", text, re.MULTILINE)
        assert rest and marked, f"{path}::{name} does not run on a GPU"


def test_pictures_are_what_the_tool_draws() -> None:
    spec = importlib.util.spec_from_file_location("layout_pictures", ROOT / "tools" / "layout_pictures.py")
    assert spec and spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    drawn = {p.stem for p in (DOCS / "pictures").glob("*.svg") if not p.stem.startswith("performance-")}
    assert drawn == set(tool.PICTURES)
    for name, draw in tool.PICTURES.items():
        assert (DOCS / "pictures" / f"{name}.svg").read_text() == draw(), f"run tools/layout_pictures.py: {name} is old"


def test_every_page_is_in_the_menu_and_on_the_first_page_or_that_of_what_was_measured() -> None:
    menu = set(re.findall(r"- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    pages = {str(p.relative_to(DOCS)) for p in DOCS.glob("**/*.md")}
    assert menu == pages
    linked = {link for page in ("index.md", "measured.md") for link in re.findall(r"\]\(([\w/-]+\.md)\)", (DOCS / page).read_text())}
    assert pages - {"index.md"} == linked


def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "complaints.html").exists()


def test_training_figures_are_those_of_the_committed_runs() -> None:
    done = subprocess.run([sys.executable, "benchmarks/make_training.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
