"""Just enough of PTX to run the straight-line blocks that kernels hold as inline assembly, on 32-bit numpy words."""

from __future__ import annotations

import re

import numpy as np


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Four bytes of {b, a} by the nibbles of `selector`; bit 3 of a nibble replicates the byte's sign."""
    both = [(x >> np.uint32(8 * i)) & np.uint32(255) for x in (a, b) for i in range(4)]
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = np.choose(nibble & np.uint32(7), both)
        byte = np.where(nibble >= 8, np.where(byte >= 128, 255, 0), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def min_of_halves(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    low, high = (np.minimum(a >> np.uint32(n) & np.uint32(0xFFFF), b >> np.uint32(n) & np.uint32(0xFFFF)) for n in (0, 16))
    return low | high << np.uint32(16)


OPS = {"shl": np.left_shift, "shr": np.right_shift, "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "add": np.add,
       "sub": np.subtract, "min.u32": np.minimum, "min.u16x2": min_of_halves, "prmt": prmt}


def run(code: str, *inputs: np.ndarray) -> list[np.ndarray]:
    """The outputs $0, $1, ... of `code`, whose inputs follow them. Words of one shape."""
    places = sorted({int(p) for p in re.findall(r"\$(\d+)", code)})
    count = len(places) - len(inputs)
    words = {f"${count + i}": np.asarray(x, np.uint32) for i, x in enumerate(inputs)}
    shape = np.broadcast_shapes(*(x.shape for x in words.values()))

    def value(name: str) -> np.ndarray:
        word = words[name] if name in words else np.uint32(int(name, 0))
        return np.broadcast_to(word, shape).astype(np.uint32)

    for line in code.strip().strip("{}").split(";"):
        line = line.strip()
        if not line or line.startswith(".reg"):
            continue
        op, _, rest = line.partition(" ")
        to, *args = (x.strip() for x in rest.split(","))
        name = op if op.startswith("min.") else op.partition(".")[0]
        if name == "lop3":
            assert int(args[3], 0) == 0xEA, "only (a & b) | c"
            words[to] = value(args[0]) & value(args[1]) | value(args[2])
        else:
            words[to] = OPS[name](*(value(a) for a in args))
    return [words[f"${i}"] for i in range(count)]
