"""Files the lines of docs/measured.md by topic: `python tools/file_measured.py` moves them to the pages under docs/measured/.

A line is added to docs/measured.md, under a heading with its date and device, and begins with its topic in bold. The table there
says which page a topic belongs to. A page keeps headings and lines as they were, newest first. Lines whose topic is in no row of
the table stay where they are, and are named.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ENTRY = Path("docs/measured.md")
ROW = re.compile(r"^\| \[[^]]+\]\((measured/[\w-]+\.md)\) \| (.+) \|$", re.MULTILINE)
TOPIC = re.compile(r"- \*\*(.+?)\*\*")
Section = tuple[str, str, list[str]]        # heading, text in front of the lines, lines


def topics(text: str) -> dict[str, str]:
    """Topic -> page, from the table; in small letters, too, where these are no topic of their own: `triton` is a backend, Triton a
    compiler."""
    found = {topic.strip(" `"): page for page, names in ROW.findall(text) for topic in names.split(",")}
    return {topic.lower(): page for topic, page in found.items()} | found


def page_of(line: str, pages: dict[str, str]) -> str | None:
    """The page of the line's topic, or of the topic that its first words are. A kernel is found by its name without the backend of
    Hopper's, and by its backend: 'gluon_sm90.fold', 'triton.mx'."""
    found = TOPIC.match(line)
    name = found[1].strip(" `").removeprefix("gluon_sm90.") if found else ""
    words = name.split()
    tries = [name.partition(".")[0], *(" ".join(words[:n]) for n in range(1, len(words) + 1))]
    return next((pages[t] for t in reversed([*map(str.lower, tries), *tries]) if t in pages), None)


def parse(text: str) -> tuple[str, list[Section]]:
    """(what is in front of the first heading, sections). A line goes on until the next one, or a blank line, begins."""
    intro, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    sections: list[Section] = []
    for part in rest:
        heading, _, body = part.partition("\n")
        before, *lines = re.split(r"^(?=- )", body, flags=re.MULTILINE)
        sections.append((heading, before.strip("\n"), [x.strip("\n") for x in lines]))
    return intro, sections


def render(intro: str, sections: list[Section]) -> str:
    out = [intro.rstrip("\n")]
    for heading, before, lines in sections:
        out += [f"## {heading}", *([before] if before else []), *(["\n".join(lines)] if lines else [])]
    return "\n\n".join(out) + "\n"


def add(sections: list[Section], heading: str, lines: list[str]) -> None:
    """Lines on top of the section of that heading, which is made, newest date first, if there is none."""
    for i, (known, before, old) in enumerate(sections):
        if known == heading:
            sections[i] = (known, before, [*lines, *old])
            return
    at = next((i for i, (known, *_) in enumerate(sections) if known[:10] <= heading[:10]), len(sections))
    sections.insert(at, (heading, "", lines))


def file(root: Path) -> list[str]:
    """Move every line that has a page; the beginnings of those that have none."""
    entry = root / ENTRY
    intro, sections = parse(entry.read_text())
    pages = topics(intro)
    moved: dict[str, list[tuple[str, list[str]]]] = {}
    left, unknown = [], []
    for heading, before, lines in sections:
        stay = []
        for line in lines:
            page = page_of(line, pages)
            if page is None:
                stay.append(line)
                unknown.append(f"{heading}: {line[:80]}")
                continue
            groups = moved.setdefault(page, [])
            if not groups or groups[-1][0] != heading:
                groups.append((heading, []))
            groups[-1][1].append(line)
        if stay or before:
            left.append((heading, before, stay))
    for page, groups in moved.items():
        path = entry.parent / page
        head, known = parse(path.read_text())
        for heading, lines in reversed(groups):
            add(known, heading, lines)
        path.write_text(render(head, known))
    entry.write_text(render(intro, left))
    return unknown


def main() -> int:
    unknown = file(Path(__file__).parents[1])
    for line in unknown:
        print(f"no page has the topic of this line: {line}", file=sys.stderr)
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
