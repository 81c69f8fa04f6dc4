"""Adapters get their arguments right: each peer's function is replaced by a plain one that checks what it is given."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from narrowgemm.formats import FP8_ROW, FP8_TENSOR, MXFP4, FP8_1x128, FP8_128x128, ScaledTensor
from narrowgemm.testing import peers
from narrowgemm.testing.case import Case
from narrowgemm.testing.cases import SUITES, build
from narrowgemm.testing.inputs import Inputs, check_outputs
from narrowgemm.testing.peer import import_error

UNEVEN = "uniform:0.3:1.7"
CASES = [
    Case("t", "dense", 1, 40, 192, 384), Case("t", "masked", 3, 20, 192, 384, max_m=128, sizes=UNEVEN),
    Case("t", "contiguous", 3, 100, 192, 384, sizes=UNEVEN), Case("t", "offsets", 4, 100, 192, 384, sizes="empty:0.5"),
    Case("t", "psum", 3, 100, 192, 384, sizes=UNEVEN, alignment=16),
    Case("t", "contiguous", 3, 50, 192, 384, sizes=UNEVEN, order="repeated", alignment=1, slack=7),
]


def values(pair: tuple[torch.Tensor, torch.Tensor], fmt) -> torch.Tensor:
    return ScaledTensor(pair[0], pair[1], fmt).dequantize()


def mn_major(scale: torch.Tensor) -> bool:
    return scale.stride(-2) == 1 and scale.stride(-1) % 4 == 0 and scale.stride(-1) >= scale.shape[-2]


def fake_deep_gemm(transformed: bool) -> types.ModuleType:
    """DeepGEMM's three products, in torch, with its conditions on the arguments."""
    module = types.ModuleType("deep_gemm")

    def a_of(pair):
        assert mn_major(pair[1]) == transformed or pair[1].shape[-2] == 1
        return values(pair, FP8_1x128)

    def fp8_gemm_nt(a, b, d):
        d.copy_(a_of(a) @ values(b, FP8_128x128).mT)

    def masked(a, b, d, masked_m, expected_m):
        assert masked_m.dtype == torch.int32 and expected_m > 0
        x, w = a_of(a), values(b, FP8_128x128)
        for g, n in enumerate(masked_m.tolist()):
            d[g, :n] = (x[g, :n] @ w[g].mT).to(d.dtype)

    def contiguous(a, b, d, m_indices):
        assert m_indices.dtype == torch.int32 and m_indices.numel() == a[0].shape[0] == d.shape[0]
        assert d.shape[0] % 128 == 0
        x, w = a_of(a), values(b, FP8_128x128)
        for block in range(0, d.shape[0], 128):
            ids = m_indices[block : block + 128]
            live = ids[ids >= 0]
            assert (live == ids[0]).all()  # one group a block, valid rows first
            if ids[0] >= 0:
                assert (ids[: live.numel()] >= 0).all()
                d[block : block + 128] = (x[block : block + 128] @ w[int(ids[0])].mT).to(d.dtype)

    def k_grouped(a, b, d, ks, ks_device, c):
        assert ks == ks_device.tolist() and c is d and mn_major(a[1]) and mn_major(b[1])
        at = 0
        for g, k in enumerate(ks):
            x, y = (ScaledTensor(flat[rows * at : rows * (at + k)].view(rows, k), s[:, at // 128 : (at + k) // 128], FP8_1x128)
                    for (flat, s), rows in ((a, d.shape[1]), (b, d.shape[2])))
            d[g] += x.dequantize() @ y.dequantize().T
            at += k

    module.k_grouped_fp8_gemm_nt_contiguous = k_grouped
    module.fp8_gemm_nt, module.m_grouped_fp8_gemm_nt_masked = fp8_gemm_nt, masked
    module.m_grouped_fp8_gemm_nt_contiguous = contiguous
    return module


def checked(case: Case, inputs: Inputs, peer: str) -> None:
    prepared = peers.get_peer(peer).prepare(case, inputs)
    prepared.run()
    check_outputs(inputs, {peer: (prepared.rows, {prepared.gate: prepared.limit})})[peer].assert_(case.id)


@pytest.mark.parametrize("scale_layout", ["mn_major", "row_major"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_deepgemm_gets_what_it_takes(monkeypatch: pytest.MonkeyPatch, case: Case, scale_layout: str) -> None:
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_deep_gemm(scale_layout == "mn_major"))
    assert peers.computes("deepgemm", case)
    checked(case, build(case, scale_layout=scale_layout), "deepgemm")


@pytest.mark.parametrize("fmt", [FP8_1x128, FP8_ROW, FP8_TENSOR], ids=lambda f: f.name)
def test_deepgemm_weight_gradient(monkeypatch: pytest.MonkeyPatch, fmt) -> None:
    """Row- and tensor-wise scales are written for every K block: DeepGEMM has 1x128 alone."""
    monkeypatch.setitem(sys.modules, "deep_gemm", fake_deep_gemm(True))
    case = Case("t", "k_grouped", 3, 64, 96, 256, a=fmt, b=fmt, sizes="skew128:3", out_dtype="fp32", accumulate=True)
    assert peers.computes("deepgemm", case)
    checked(case, build(case), "deepgemm")


def test_deepgemm_end_to_end_quantises_padded_rows_of_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("t", "offsets", 4, 100, 192, 384, sizes="empty:0.5", e2e=True)
    module = fake_deep_gemm(True)
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    inputs = build(case, seed=3)
    inputs.reset_out()
    assert not inputs.check().ok        # nothing is there before the call
    inputs.call()
    inputs.check().assert_(case.id)
    assert not inputs.faults()
    prepared = peers.get_peer("deepgemm").prepare(case, inputs)
    prepared.run()
    for t in (inputs.tokens.x, inputs.a.data.view(torch.uint8)):
        t.zero_()                       # what was prepared holds copies of neither rows nor products
    prepared.run()
    assert all(not prepared.rows(g).any() for g in inputs.groups), "the peer's rows were not made from the tokens in this call"
    inputs = build(case, seed=4)
    inputs.call()
    checked(case, inputs, "deepgemm")


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_bf16_is_the_product_of_the_sources(case: Case) -> None:
    assert peers.computes("torch_bf16", case)
    checked(case, build(case), "torch_bf16")


@pytest.mark.parametrize("case", [*CASES, Case("t", "dense", 1, 40, 64, 128, accumulate=True)], ids=lambda c: c.id)
def test_a_backend_of_ours_is_a_peer_with_an_output_of_its_own(case: Case) -> None:
    inputs = build(case)
    inputs.call()
    before = inputs.out.buffer.clone()
    checked(case, inputs, "reference")
    assert torch.equal(inputs.out.buffer, before)


def test_torch_gets_its_scales_in_blocks_of_four(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled_mm(a, b, sa, ra, sb, rb, *, output_dtype):
        m, k, n = *a.shape, b.shape[1]
        assert (ra.name, rb.name) == ("BlockWise1x128", "BlockWise128x128")
        assert sa.shape == (m, k // 128) and sa.stride() == (1, m)
        blocks = -(-k // 512) * 4
        assert sb.shape == (blocks, -(-n // 128)) and sb.stride() == (1, blocks)
        return (values((a, sa), FP8_1x128) @ values((b.mT, sb.mT[:, : k // 128]), FP8_128x128).mT).to(output_dtype)

    monkeypatch.setattr(torch.nn.functional, "scaled_mm", scaled_mm)
    case = Case("t", "dense", 1, 40, 192, 768)
    assert peers.computes("torch", case) and not peers.computes("torch", CASES[1])
    checked(case, build(case), "torch")


def test_a_wrong_peer_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fake_deep_gemm(True)
    right = module.fp8_gemm_nt
    module.fp8_gemm_nt = lambda a, b, d: (right(a, b, d), d[0].zero_())
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    with pytest.raises(AssertionError, match="kernel gate FAILED"):
        checked(CASES[0], build(CASES[0]), "deepgemm")


@pytest.mark.parametrize(("case", "reason"), [
    (Case("t", "dense", 1, 8, 128, 128, a=FP8_1x128, b=FP8_1x128), "take fp8_1x128 x fp8_128x128"),
    (Case("t", "dense", 1, 8, 128, 128, out_dtype="fp16"), "output is BF16"),
    (Case("t", "dense", 1, 8, 128, 192), "K in blocks of 128"), (Case("t", "dense", 1, 0, 128, 128), "no rows"),
    (Case("t", "k_grouped", 2, 8, 128, 128), "1x128 scales on both sides")])
def test_what_deepgemm_does_not_compute(case: Case, reason: str) -> None:
    assert reason in peers.get_peer("deepgemm").supports(case)


def test_triton_kernels_gets_weights_in_its_layout_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases that share weights share the swizzled ones; they go with the weights."""
    from narrowgemm.testing import mx_peers

    swizzled: list[torch.Tensor] = []
    tensor = types.SimpleNamespace(FP4="fp4", wrap_torch_tensor=lambda t, dtype=None: t,
                                   convert_layout=lambda t, layout, **_: swizzled.append(t.clone()) or swizzled[-1])
    layout = types.SimpleNamespace(make_default_matmul_mxfp4_w_layout=lambda mx_axis: ("values", {}),
                                   make_default_matmul_mxfp4_w_scale_layout=lambda mx_axis, num_warps: ("scales", {}))
    monkeypatch.setitem(sys.modules, "triton_kernels.tensor", tensor)
    monkeypatch.setitem(sys.modules, "triton_kernels.tensor_details.layout", layout)
    monkeypatch.setattr(mx_peers, "_swizzled", [])

    def weights(byte: int) -> ScaledTensor:
        return ScaledTensor(torch.full((2, 64, 32), byte, dtype=torch.uint8).view(MXFP4.elem.dtype), torch.full((2, 64, 2), 127, dtype=torch.uint8), MXFP4)

    b, other = weights(0x21), weights(0x43)
    first = mx_peers.ogs_weights(b)
    assert mx_peers.ogs_weights(b)[0] is first[0] and len(swizzled) == 2
    assert not torch.equal(mx_peers.ogs_weights(other)[0], first[0]) and len(swizzled) == 4
    del b
    mx_peers.ogs_weights(other)
    assert len(mx_peers._swizzled) == 1 and len(swizzled) == 4


def test_nothing_is_imported_until_it_is_asked_for() -> None:
    assert peers.get_peer("deepgemm").available(torch.device("cpu")).startswith("DeepGEMM needs an NVIDIA GPU")
    assert "compute capability 9.0" in peers.get_peer("torch").available(torch.device("cpu"))
    assert import_error("no_such_peer").startswith("no_such_peer can't be imported")
    assert peers.version("torch_bf16") == ""
    for name in ("floor", "cutlass"):
        with pytest.raises(ValueError, match=f"peer: got '{name}'"):
            peers.get_peer(name)


def test_a_floor_exists_for_all_work_there_is() -> None:
    assert all(peers.computes("floor", c) == (c.rows > 0) for c in SUITES["cpu-small"])
