"""Draw each layout and each format from the package's own objects: `python tools/layout_pictures.py` writes docs/pictures/*.svg.

The same five rows of three groups (2, 0 and 3 rows) in every picture, so that they can be compared; four slots of two tokens for
the routed layout. tests/test_docs.py fails where a committed picture is not what this draws.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "pictures"
CELL, GAP, LEFT, TOP, COLUMNS = 22, 2, 12, 34, 7
COLORS = ("#4c78a8", "#e45756", "#54a24b")
PADDING = "#d9d9d9"
SIZES = (2, 0, 3)


def rectangle(x: float, y: float, color: str, width: float = CELL) -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{CELL}" rx="3" fill="{color}"/>'


def words(x: float, y: float, text: str, size: int = 12) -> str:
    return f'<text x="{x}" y="{y}" font-family="monospace" font-size="{size}" fill="#333">{text}</text>'


def picture(title: str, rows: Sequence[tuple[int | None, str]], index: str, block: int = 0) -> str:
    """`rows`: (group, None for padding; what stands beside the row). `block`: a gap behind every so many rows."""
    parts = [words(LEFT, 20, title, 13)]
    y = float(TOP)
    for i, (group, beside) in enumerate(rows):
        if block and i and i % block == 0:
            y += 10
        color = PADDING if group is None else COLORS[group]
        parts += [rectangle(LEFT + c * (CELL + GAP), y, color) for c in range(COLUMNS)]
        parts.append(words(LEFT + COLUMNS * (CELL + GAP) + 10, y + 16, beside))
        y += CELL + GAP
    return svg([*parts, words(LEFT, y + 18, index)], 560, y + 30)


def svg(parts: list[str], width: float, height: float) -> str:
    body = "\n".join(f" {p}" for p in parts)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}">\n'
            f' <rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n')


def contiguous() -> str:
    from narrowgemm import Contiguous

    ids = Contiguous(torch.tensor([0, 0, -1, -1, 2, 2, 2, -1], dtype=torch.int32)).m_indices.tolist()
    rows = [(None if g < 0 else g, f"{g:2d}  {'padding: comes back zero' if g < 0 else f'group {g}'}") for g in ids]
    return picture("Contiguous: one id a row, segments of any length and order", rows, f"m_indices = {ids}")


def psum() -> str:
    from narrowgemm import Psum

    layout = Psum(torch.tensor([2, 4, 7], dtype=torch.int32), alignment=4)
    ends, rows, start = layout.ends.tolist(), [], 0
    owner: dict[int, int] = {}
    for g, end in enumerate(ends):
        owner |= dict.fromkeys(range(start, end), g)
        start = -(-end // layout.alignment) * layout.alignment
    rows = [(owner.get(r), f"row {r}  {f'group {owner[r]}' if r in owner else 'padding: comes back zero'}") for r in range(8)]
    title = f"Psum: groups start at multiples of {layout.alignment}; group 1 is empty"
    return picture(title, rows, f"ends = {ends}", layout.alignment)


def offsets() -> str:
    from narrowgemm import Offsets

    bounds = Offsets(torch.tensor([0, 2, 2, 5])).offsets.tolist()
    rows = [(g, f"row {r}  group {g}") for g, (lo, hi) in enumerate(zip(bounds, bounds[1:])) for r in range(lo, hi)]
    return picture("Offsets: packed tightly, no padding; group 1 is empty", rows, f"offsets = {bounds}")


def masked() -> str:
    from narrowgemm import Masked

    sizes = Masked(torch.tensor(SIZES, dtype=torch.int32), expected_m=2).masked_m.tolist()
    rows = [(g if r < size else None, f"[{g}, {r}]  {f'group {g}' if r < size else 'not written'}")
            for g, size in enumerate(sizes) for r in range(4)]
    return picture("Masked: room for max_m = 4 rows each", rows, f"masked_m = {sizes}", 4)


def routed() -> str:
    from narrowgemm import moe_align_block_size

    made = moe_align_block_size(torch.tensor([[2, 0], [2, 0]]), 4, 3)
    blocks = int(made.num_tokens_post_padded) // made.block_m
    ids, experts = made.sorted_token_ids.tolist()[:blocks * made.block_m], made.expert_ids.tolist()[:blocks]
    rows = []
    for i, slot in enumerate(ids):
        real, expert = slot < made.num_slots, experts[i // made.block_m]
        beside = f"slot {slot}  token {slot // made.top_k}, expert {expert}" if real else f"{slot}  no slot"
        rows.append((expert if real else None, beside))
    return picture("Routed: slots by expert, in blocks of block_m = 4", rows, f"expert_ids = {experts}", made.block_m)


def k_grouped() -> str:
    from narrowgemm import KGrouped

    bounds = KGrouped(torch.tensor([0, 2, 2, 5])).offsets.tolist()
    parts = [words(LEFT, 20, "KGrouped: columns of K belong to groups; one product [M, N] a group", 13)]
    for row in range(3):
        for g, (lo, hi) in enumerate(zip(bounds, bounds[1:])):
            parts += [rectangle(LEFT + c * (2 * CELL + GAP), TOP + row * (CELL + GAP), COLORS[g], 2 * CELL) for c in range(lo, hi)]
    y = TOP + 3 * (CELL + GAP)
    parts += [words(LEFT + c * (2 * CELL + GAP), y + 14, f"k = {c}") for c in range(bounds[-1])]
    return svg([*parts, words(LEFT, y + 38, f"offsets = {bounds}; group 1 is empty and its product is zero")], 560, y + 50)


def formats() -> str:
    """Which elements of a 256 x 256 operand share a scale: 32 stripes stand for the rows where each has its own."""
    from narrowgemm import FORMATS

    parts, cell, size = [], 18, 256
    for i, name in enumerate(("fp8_tensor", "fp8_row", "fp8_1x128", "fp8_128x128", "mxfp8", "mxfp4")):
        fmt = FORMATS[name]
        x0, y0 = LEFT + i % 3 * 190, TOP + i // 3 * 230
        rows, columns = fmt.scale_shape((size, size))
        tall, wide = size // rows, size // columns              # elements that share a scale
        height, width = cell / 4 if tall == 1 else cell * tall / 32, cell * wide / 32
        for r in range(32 if tall == 1 else rows):
            parts += [f'<rect x="{x0 + c * width:g}" y="{y0 + r * height:g}" width="{width:g}" height="{height:g}" '
                      f'fill="{COLORS[(r + c) % len(COLORS)]}"/>' for c in range(columns)]
        scales = f"{rows} x {columns} scales, {fmt.scale.upper()}"
        packed = "two elements a byte" if fmt.elem.per_byte == 2 else ""
        parts += [words(x0, y0 - 6, f"{name}: {fmt.element.upper()}", 13), words(x0, y0 + 8 * cell + 16, scales),
                  words(x0, y0 + 8 * cell + 32, packed)]
    note = "One colour in one piece: elements that share a scale, of an operand of 256 rows and K = 256."
    return svg([*parts, words(LEFT, TOP + 462, note)], 580, TOP + 476)


PICTURES = {"formats": formats, "contiguous": contiguous, "psum": psum, "offsets": offsets, "masked": masked, "routed": routed,
            "k-grouped": k_grouped}


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (OUT / f"{name}.svg").write_text(draw())
    return 0


if __name__ == "__main__":
    sys.exit(main())
