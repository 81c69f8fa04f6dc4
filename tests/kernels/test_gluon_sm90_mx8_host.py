"""What the Hopper kernels for plain MXFP8 weights and few tokens take, and the configs that they are given."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16
from narrowgemm.kernels.gluon.sm90 import mx8_bf16, mx8_decode, mx8_rows
from narrowgemm.problem import Config, Operand

from .gluon_sm90_mx8_jobs import problem

H200 = get_arch("h200")
# tokens that a kernel takes, (tokens that it doesn't, what it says of them)
TAKES = {
    mx8_decode: ((1, 16, 32, 64, 65, 256), {257: "256 tokens and fewer"}),
    mx8_rows: ((33, 64), {32: "33 to 64 tokens", 65: "33 to 64 tokens"}),
    mx8_bf16: ((33, 64, 65, 300, 512), {32: "33 to 512 tokens", 513: "33 to 512 tokens"}),
}
# a legal config of 768 x 768, and what it can't be changed to
CONFIGS: dict[ModuleType, tuple[Config, list[tuple[str, dict[str, Any]]]]] = {
    mx8_decode: (Config(8, 64, 128, 4, 4, swap_ab=True), [
        ("token columns", {"block_m": 64}), ("on an SM", {"extra": (("ctas", 4), )}),
        ("registers", {"block_m": 32, "num_warps": 8, "extra": (("ctas", 2), )}), ("consumers", {"num_warps": 12}),
        ("even number", {"num_warps": 8, "num_stages": 5}), ("weight rows", {"block_n": 30})]),
    mx8_rows: (Config(64, 72, 128, 8, 8), [
        ("expected 64 tokens", {"block_m": 32}), ("expected 64 tokens", {"swap_ab": True}), ("8 warps", {"num_warps": 12}),
        ("weight rows", {"block_n": 60}), ("weight rows", {"block_n": 96}), ("a multiple of 2 consumers", {"num_stages": 9}),
        ("4 or more", {"num_stages": 2})]),
    mx8_bf16: (Config(64, 128, 128, 8, 4, swap_ab=True), [
        ("token columns", {"block_m": 16}), ("token columns", {"num_warps": 4}), ("weight rows", {"block_n": 56}),
        ("weight rows", {"block_n": 132}), ("shared memory", {"num_stages": 3})]),
}
ALL = [("blocks of a cluster", {"split_k": 3}), ("have no", {"split_k": 4}), ("shared memory", {"num_stages": 40})]
each = pytest.mark.parametrize("kernel", TAKES, ids=lambda k: k.NAME)


@each
def test_refusals(kernel: ModuleType) -> None:
    takes, others = TAKES[kernel]
    p = problem(takes[0], 768, 768, "bf16")
    assert all(kernel.supports(replace(p, m=m), H200) is None for m in takes)
    assert "sm90" in (kernel.supports(p, get_arch("mi350x")) or "")
    for changes, words in (*(({"m": m}, words) for m, words in others.items()), ({"op": "grouped_gemm"}, "dense"), ({"a": Operand(BF16)}, "MXFP8"),
                           ({"b": replace(p.b, prepack="x/1")}, "plain operands"), ({"accumulate": True}, "accumulation"),
                           ({"b": replace(p.b, aligned=False)}, "16 bytes"), ({"b": replace(p.b, scale_major="mn")}, "row by row"),
                           ({"k": 96}, "multiple of 128"), ({"max_sms": 8}, "SMs")):
        assert words in (kernel.supports(replace(p, **changes), H200) or ""), changes


@each
def test_configs_are_legal(kernel: ModuleType) -> None:
    for m in TAKES[kernel][0]:
        for n, k in ((9216, 6144), (64, 128), (768, 16384)):
            for out in ("bf16", "fp32") if m <= 64 else ("bf16", ):
                p = problem(m, n, k, out)
                found = kernel.configs(p, H200)
                assert found and all(kernel.legal(p, c, H200) is None for c in found)


@each
def test_others_are_told_why(kernel: ModuleType) -> None:
    p = problem(TAKES[kernel][0][0], 768, 768, "bf16")
    config, changed = CONFIGS[kernel]
    assert kernel.legal(p, config, H200) is None
    for words, changes in [*changed, *ALL]:
        assert words in (kernel.legal(p, replace(config, **changes), H200) or ""), changes
    assert "batch-invariant" in (kernel.legal(replace(p, batch_invariant=True), replace(config, split_k=2), H200) or "")


def test_tiles_of_weight_rows_as_columns_have_as_few_rows_as_all_of_them_fit_with() -> None:
    """72 rows bring 9216 onto 132 SMs at once, 48 bring 6144; 128 tokens of these are two waves of as many; no fewer than 24."""
    assert [mx8_rows.rows_of(n, m, 132) for n, m in ((9216, 1), (6144, 1), (9216, 2), (6144, 2), (768, 1))] == [72, 48, 72, 48, 24]
    assert mx8_rows.rows_of(4608, 1, 66) == 72


def test_tiles_of_two_consumers_have_as_few_rows_as_all_of_them_fit_with() -> None:
    """6144 rows on 66 clusters: two consumers of 48; on as many SMs as there are, 36 for 9216."""
    assert mx8_bf16.rows_of(6144, 66) == 48 and mx8_bf16.rows_of(9216, 132) == 36
    assert mx8_bf16.rows_of(768, 132) == 32 and mx8_bf16.rows_of(9216, 66) == 36       # no fewer; two waves
    assert mx8_bf16.rows_of(1 << 20, 132) == 64
    assert [c.split_k for c in mx8_bf16.configs(problem(64, 9216, 6144, "bf16"), H200)] == [1]
    assert [c.split_k for c in mx8_bf16.configs(problem(64, 6144, 6144, "bf16"), H200)] == [1, 2]


def test_how_codes_of_tokens_are_loaded() -> None:
    codes = torch.zeros(36, 64, dtype=torch.uint8)
    assert mx8_rows.token_codes(codes.T, 64) == 2 and mx8_rows.token_codes(codes.T[:62], 62) == 0
    assert mx8_rows.token_codes(codes, 36) == 1 and mx8_rows.token_codes(codes[:, 1:], 36) == 0
