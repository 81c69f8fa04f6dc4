"""The process-wide settings: bounds, what they change, threads, and the real package that follows them."""

from __future__ import annotations

import threading

import pytest
import torch

from narrowgemm.compat.deep_gemm import dense, grouped, state

from . import _caller as caller


@pytest.fixture
def h200(monkeypatch):
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")


def test_num_sms(deep_gemm, h200):
    assert deep_gemm.get_num_sms() == 132
    deep_gemm.set_num_sms(100)
    assert deep_gemm.get_num_sms() == 100
    deep_gemm.set_num_sms(0)
    assert deep_gemm.get_num_sms() == 132
    for bad, error in ((133, ValueError), (-1, ValueError), ("8", TypeError), (True, TypeError)):
        with pytest.raises(error, match=r"num_sms: got .*expected an integer in"):
            deep_gemm.set_num_sms(bad)


@pytest.mark.parametrize(("num_sms", "passed"), [(0, 0), (20, 20), (132, 0)])
def test_num_sms_becomes_the_option_of_each_call(deep_gemm, monkeypatch, num_sms, passed):
    seen = []
    monkeypatch.setattr(dense, "gemm", lambda *a, max_sms, **k: seen.append(max_sms))
    monkeypatch.setattr(grouped, "grouped_gemm", lambda *a, max_sms, **k: seen.append(max_sms))
    a, b, _, d, _ = caller.dense(deep_gemm, 8, 128, 128, "cpu")
    stacked = (b[0][None], b[1][None])
    monkeypatch.setenv("NARROWGEMM_ARCH", "h200")
    deep_gemm.set_num_sms(num_sms)
    deep_gemm.fp8_gemm_nt(a, b, d)
    deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, stacked, d, torch.zeros(8, dtype=torch.int32))
    assert seen == [passed, passed]


def test_alignment(deep_gemm):
    assert deep_gemm.get_mk_alignment_for_contiguous_layout() == 128
    deep_gemm.set_mk_alignment_for_contiguous_layout(64)
    for get in (deep_gemm.get_mk_alignment_for_contiguous_layout, deep_gemm.get_m_alignment_for_contiguous_layout,
                deep_gemm.utils.layout.get_k_alignment_for_contiguous_layout):
        assert get() == 64
    with pytest.raises(ValueError, match="expected an integer of at least 1"):
        deep_gemm.set_mk_alignment_for_contiguous_layout(0)


@pytest.mark.parametrize("arch", ["h200", "cpu", "mi350x", "rtx5090"])
def test_theoretical_alignment(deep_gemm, monkeypatch, arch):
    monkeypatch.setenv("NARROWGEMM_ARCH", arch)
    theoretical = deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout
    assert {theoretical(), theoretical(20), theoretical(4096, 32)} == {128}


def test_theoretical_alignment_on_capability_10(deep_gemm, monkeypatch):
    monkeypatch.setenv("NARROWGEMM_ARCH", "b200")
    theoretical = deep_gemm.get_theoretical_mk_alignment_for_contiguous_layout
    assert [theoretical(m) for m in (None, 0, 1, 32, 33, 200, 224, 5000)] == [224, 32, 32, 32, 64, 224, 224, 224]
    assert theoretical(640, 10) == 64 and theoretical(expected_m=641, num_groups=10) == 96
    with pytest.raises(ValueError, match="num_groups"):
        theoretical(640, 0)


def test_recorded_settings(deep_gemm):
    assert (deep_gemm.get_tc_util(), deep_gemm.get_pdl(), deep_gemm.get_compile_mode()) == (100, False, 0)
    deep_gemm.set_tc_util(80)
    deep_gemm.set_pdl(True)
    deep_gemm.set_ignore_compile_dims(True)
    deep_gemm.use_deterministic_algorithms(True)
    assert (deep_gemm.get_tc_util(), deep_gemm.get_pdl(), deep_gemm.get_deterministic_algorithms()) == (80, True, True)
    for value, want in ((16, (16, 16)), ((64, 32), (64, 32)), ([8, 8], (8, 8))):
        deep_gemm.set_block_size_multiple_of(value)
        assert state.settings.block_size_multiple_of == want
    for setter, bad in ((deep_gemm.set_tc_util, 101), (deep_gemm.set_compile_mode, 2),
                        (deep_gemm.set_block_size_multiple_of, 0), (deep_gemm.set_block_size_multiple_of, (1, 2, 3))):
        with pytest.raises(ValueError, match=r"got .*, expected"):
            setter(bad)


def test_compile_mode_launches_each_choice_once(deep_gemm, monkeypatch):
    launched = []
    monkeypatch.setattr(dense, "gemm", lambda a, b, **k: launched.append(a.shape[0]))
    _, b, *_ = caller.dense(deep_gemm, 1, 128, 128, "cpu")
    deep_gemm.set_compile_mode(1)
    for m in (*range(65, 97), 70):
        a, _, _, d, _ = caller.dense(deep_gemm, m, 128, 128, "cpu")
        deep_gemm.fp8_gemm_nt(a, b, d)
    assert launched == [65, 81]     # the first of each bucket of rows: to 80, and to 96
    deep_gemm.set_compile_mode(0)
    deep_gemm.fp8_gemm_nt(a, b, d)
    assert launched == [65, 81, 70]
    deep_gemm.set_compile_mode(1)       # anew: what was launched before counts for nothing; an output of another type is another choice
    for out in (d, d.float(), d.float()):
        deep_gemm.fp8_gemm_nt(a, b, out)
    assert launched == [65, 81, 70, 70, 70]


def test_threads_do_not_lose_settings(deep_gemm):
    def work(n: int) -> None:
        for _ in range(200):
            deep_gemm.set_num_sms(n)
            deep_gemm.set_mk_alignment_for_contiguous_layout(n)

    threads = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3, 4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert state.calls["set_num_sms"] == state.settings.num_sms
    assert state.calls["set_mk_alignment_for_contiguous_layout"] == state.settings.mk_alignment
