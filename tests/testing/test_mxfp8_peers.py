"""Peers of MXFP8 products compute the product that they are compared on, in the formats that they say."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from narrowgemm.arch import get_arch
from narrowgemm.formats import MXFP4, MXFP8
from narrowgemm.kernels.triton import mx
from narrowgemm.testing import peers
from narrowgemm.testing.case import Case
from narrowgemm.testing.cases import SUITES, build
from narrowgemm.testing.mxfp8_peers import STOCK
from narrowgemm.tuning import store
from narrowgemm.tuning.space import problem_of

from .test_peers import checked, fake_deep_gemm

CASES = [Case("t", "dense", 1, 40, 192, 384, a=MXFP8, b=MXFP8, packed=True),
         Case("t", "offsets", 4, 40, 192, 256, sizes="empty:0.5", a=MXFP8, b=MXFP8, packed=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_deepgemm_gets_blocks_of_the_same_sources(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_deep_gemm(True))
    assert peers.computes("deepgemm_block", case)
    checked(case, build(case), "deepgemm_block")
    assert "second time" in peers.get_peer("deepgemm_block").supports(replace(case, layout="offsets", groups=256, n=4096, k=7168))


FOUR_BITS = [Case("t", "contiguous", 2, 128, 64, 128, a=MXFP8, b=MXFP4, packed=True),
             Case("t", "dense", 1, 24, 64, 160, a=MXFP4, b=MXFP4, packed=True)]


@pytest.mark.interpret
@pytest.mark.parametrize("case", [*CASES, *FOUR_BITS], ids=lambda c: c.id)
def test_dequantising_is_exact_and_the_product_is_of_the_same_bits(case: Case) -> None:
    from narrowgemm.testing.mxfp8_peers import dequantize

    inputs = build(case)
    for x in (inputs.a, inputs.b):
        out = torch.full(x.shape, float("nan"), dtype=torch.bfloat16)
        dequantize(x, out)
        live = slice(0, case.rows) if x is inputs.a else slice(None)
        assert torch.equal(out[live].float(), x.dequantize()[live])
    checked(case, inputs, "dequant_bf16")


def test_the_stock_config_runs_every_case_it_is_compared_on() -> None:
    for suite in ("mxfp8-dense-decode", "mxfp8-routed"):
        for case in SUITES[suite]:
            assert peers.computes("dot_scaled", case)
            assert mx.legal(problem_of(replace(case, packed=False)), STOCK, get_arch("h100")) is None


def test_what_the_peers_refuse() -> None:
    odd = replace(CASES[0], k=96)
    assert "multiples of 128" in peers.get_peer("dot_scaled").supports(odd)
    plain = Case("t", "dense", 1, 40, 192, 384)
    for name in ("dot_scaled", "dequant_bf16", "deepgemm_block"):
        assert peers.get_peer(name).supports(plain)
        assert peers.get_peer(name).available(torch.device("cpu"))


def test_packed_weights_have_tables_of_their_own() -> None:
    """Other kernels take them, so a row of one must never stand for the other."""
    packed, plain = (problem_of(replace(CASES[0], packed=p)) for p in (True, False))
    assert store.table_name(packed) == "gemm-dense-mxfp8-mxfp8-packed.json"
    assert store.table_name(plain) == "gemm-dense-mxfp8-mxfp8.json"
    assert problem_of(replace(CASES[0], packed="mxfp8")) == plain, "weights that prepack left in their order are plain ones"


def test_the_h200_table_covers_the_points_of_the_source() -> None:
    """Time, runner-up and error beside each choice."""
    rows = store.read_rows(store.PACKAGED / "h200" / "gemm-dense-mxfp8-mxfp8.json")
    have = {store.row_key(r) for r in rows}
    assert have >= {(c.n, c.k, c.m) for c in SUITES["mxfp8-plain-decode"]} and len(SUITES["mxfp8-plain-decode"]) == 105
    assert all(r["us"] > 0 and r["runner_up_us"] > 0 and r["calc_diff"] <= 5e-6 for r in rows)


def test_a_row_of_packed_weights_says_nothing_of_more_rows(tmp_path: Path) -> None:
    case = Case("t", "dense", 1, 64, 768, 6144, a=MXFP8, b=MXFP8, packed=True)
    row = {"n": case.n, "k": case.k, "rows": 64, "kernel": "gluon_sm90.narrow", "config": {}, "us": 1.0}
    store.write_table(tmp_path, "h100", store.table_name(problem_of(case)), {}, [row])
    found = {m: store._found(problem_of(replace(case, m=m)), "h100", str(tmp_path)) for m in (33, 64, 65, 128)}
    assert found[64] is not None and found[33] is found[64] and found[65] is None and found[128] is None
