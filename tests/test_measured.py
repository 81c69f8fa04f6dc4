"""docs/measured.md: every line has a topic with a page, every kernel is such a topic, and the tool moves lines without changing them."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from narrowgemm.kernels.registry import kernels

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("file_measured", ROOT / "tools" / "file_measured.py")
assert spec and spec.loader
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

ENTRY = """# Measured facts

| page | topics |
| --- | --- |
| [One](measured/one.md) | `fold`, Two words |
| [Portable](measured/portable.md) | `triton` |

## 2026-11-27, a GPU

- **fold**: new,
  on two lines.
- **nobody**: knows this.
- **gluon_sm90.fold** again: newer than what is there.

## 2026-11-20, another GPU

- **two words of many**: old.
- **triton.mx**: portable.
"""
ONE = """# Measured: one

About it.

## 2026-11-27, a GPU

- **fold**: was there.

## 2026-11-10, a GPU

Of that day.

- **fold**: oldest.
"""


def measured() -> tuple[dict[str, str], list]:
    intro, sections = tool.parse((ROOT / tool.ENTRY).read_text())
    return tool.topics(intro), sections


def test_lines_move_to_their_pages_and_stay_as_they_were(tmp_path: Path) -> None:
    (tmp_path / "docs" / "measured").mkdir(parents=True)
    (tmp_path / tool.ENTRY).write_text(ENTRY)
    one, portable = (tmp_path / "docs" / "measured" / f"{name}.md" for name in ("one", "portable"))
    one.write_text(ONE)
    portable.write_text("# Measured: portable\n")
    unknown = tool.file(tmp_path)
    assert len(unknown) == 1 and "nobody" in unknown[0]
    assert one.read_text() == ONE.replace("- **fold**: was", "- **fold**: new,\n  on two lines.\n- **gluon_sm90.fold** again: newer than what is "
                                          "there.\n- **fold**: was").replace(
        "## 2026-11-10", "## 2026-11-20, another GPU\n\n- **two words of many**: old.\n\n## 2026-11-10")
    assert portable.read_text() == "# Measured: portable\n\n## 2026-11-20, another GPU\n\n- **triton.mx**: portable.\n"
    left = (tmp_path / tool.ENTRY).read_text()
    assert left.endswith("## 2026-11-27, a GPU\n\n- **nobody**: knows this.\n") and left.startswith(ENTRY.split("## ")[0])
    before = one.read_text()
    tool.file(tmp_path)
    assert (one.read_text(), (tmp_path / tool.ENTRY).read_text()) == (before, left)


def test_every_kernel_and_every_page_is_in_the_table() -> None:
    pages, _ = measured()
    for name in kernels():
        assert tool.page_of(f"- **{name}**: x", pages), f"{tool.ENTRY} has no page for {name}"
    for topic, page in (("triton.mx", "portable"), ("Triton", "toolchain"), ("Triton 3.9", "toolchain"), ("training", "training")):
        assert tool.page_of(f"- **{topic}**: x", pages) == f"measured/{page}.md"
    assert set(pages.values()) == {f"measured/{p.name}" for p in (ROOT / "docs" / "measured").glob("*.md")}


def test_every_new_line_has_a_topic_that_the_table_knows() -> None:
    pages, sections = measured()
    lines = [line for _, _, lines in sections for line in lines]
    assert [line[:80] for line in lines if tool.page_of(line, pages) is None] == []
