"""Bad input: a clear error that says what was given and what is expected, before anything is written."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import narrowgemm as ng
from narrowgemm.testing.guard import guarded_empty

G, M, N, K = 3, 24, 64, 256
I32 = torch.int32


def operands(groups: int = 0) -> tuple[ng.ScaledTensor, ng.ScaledTensor]:
    a = ng.quantize(torch.randn(M, K), ng.FP8_1x128)
    return a, ng.quantize(torch.randn(groups, N, K) if groups else torch.randn(N, K), ng.FP8_128x128)


def with_scale(x: ng.ScaledTensor, scale) -> ng.ScaledTensor:
    return replace(x, scale=scale)


DENSE = {
    "a is a list": (lambda a, b: ng.gemm([1.0], b), TypeError, "a: got list, expected a ScaledTensor"),
    "a has an integer dtype": (lambda a, b: ng.gemm(torch.zeros(M, K, dtype=torch.int8), b), TypeError, "a, dtype: got torch.int8"),
    "a is 3-D": (lambda a, b: ng.gemm(ng.ScaledTensor(a.data[None], a.scale[None], a.format), b), ValueError, r"a, shape: got \(1, 24, 256\), expected 2 dim"),
    "payload of another dtype": (lambda a, b: ng.gemm(replace(a, data=a.data.float()), b), TypeError, r"a \(fp8_1x128\), dtype: got torch.float32"),
    "K differs": (lambda a, b: ng.gemm(a, ng.quantize(torch.randn(N, 128), ng.FP8_128x128)), ValueError, r"K of b: got 128 \(b is \(64, 128\)\), expected a's, 256 .*: a is \[M, K\], b is \[N, K\]"),
    "scale missing": (lambda a, b: ng.gemm(with_scale(a, None), b), ValueError, r"scale: got None, expected a tensor of shape \(24, 2\)"),
    "scale transposed": (lambda a, b: ng.gemm(with_scale(a, a.scale.mT), b), ValueError, r"scale shape: got \(2, 24\), expected \(24, 2\): ScaledTensor.make takes"),
    "scale of half precision": (lambda a, b: ng.gemm(with_scale(a, a.scale.half()), b), TypeError, "scale dtype: got torch.float16"),
    "E8M0 bytes for an FP32 format": (lambda a, b: ng.gemm(with_scale(a, a.scale.to(torch.uint8)), b), TypeError, "scale dtype: got torch.uint8, expected float32"),
    "scale for a plain format": (lambda a, b: ng.gemm(ng.ScaledTensor(torch.zeros(M, K).bfloat16(), a.scale, ng.BF16), b), ValueError, "scale of unscaled format bf16"),
    "b on another device": (lambda a, b: ng.gemm(a, b.to("meta")), ValueError, "b, device: got meta, expected a's, cpu"),
    "scale on another device": (lambda a, b: ng.gemm(with_scale(a, a.scale.to("meta")), b), ValueError, "a: scale device: got meta"),
    "out of wrong shape": (lambda a, b: ng.gemm(a, b, out=torch.zeros(N, M)), ValueError, r"out, shape: got \(64, 24\), expected \(24, 64\)"),
    "out of wrong dtype": (lambda a, b: ng.gemm(a, b, out=torch.zeros(M, N, dtype=torch.float64)), TypeError, "out, dtype: got torch.float64"),
    "out against out_dtype": (lambda a, b: ng.gemm(a, b, out=torch.zeros(M, N), out_dtype=torch.bfloat16), TypeError, "out, dtype: got torch.float32, expected out_dtype"),
    "out column-major": (lambda a, b: ng.gemm(a, b, out=torch.zeros(N, M).T), ValueError, r"out, strides: got \(1, 24\), expected contiguous rows"),
    "out expanded": (lambda a, b: ng.gemm(a, b, out=torch.zeros(1, N).expand(M, N)), ValueError, "no row stored twice"),
    "out on another device": (lambda a, b: ng.gemm(a, b, out=torch.zeros(M, N, device="meta")), ValueError, "out, device: got meta"),
    "accumulate without out": (lambda a, b: ng.gemm(a, b, accumulate=True), ValueError, "out with accumulate=True: got None"),
    "out_dtype int": (lambda a, b: ng.gemm(a, b, out_dtype=torch.int32), TypeError, "out_dtype: got torch.int32"),
    "negative max_sms": (lambda a, b: ng.gemm(a, b, max_sms=-1), ValueError, "max_sms: got -1"),
    "unknown validate": (lambda a, b: ng.gemm(a, b, validate="yes"), ValueError, "validate: got 'yes'"),
    "unknown backend": (lambda a, b: ng.gemm(a, b, backend="cuda"), ValueError, "backend: got 'cuda', expected one of"),
    "unknown on_unsupported": (lambda a, b: ng.gemm(a, b, on_unsupported="warn"), ValueError, "on_unsupported: got 'warn'"),
    "config of wrong type": (lambda a, b: ng.gemm(a, b, config={"block_m": 64}), TypeError, "config: got dict"),
}


@pytest.mark.parametrize("name", DENSE)
def test_gemm(name: str) -> None:
    call, error, message = DENSE[name]
    with pytest.raises(error, match=message):
        call(*operands())


def layouts() -> dict[str, ng.Layout]:
    return {"contiguous": ng.Contiguous(torch.zeros(M, dtype=I32)), "offsets": ng.Offsets(torch.tensor([0, 8, 16, M])),
            "psum": ng.Psum(torch.tensor([8, 16, M], dtype=I32), 8)}


GROUPED = {
    "layout is a tensor": (lambda a, b: ng.grouped_gemm(a, b, torch.zeros(M, dtype=I32)), TypeError, "layout: got Tensor, expected Contiguous"),
    "k-grouped layout": (lambda a, b: ng.grouped_gemm(a, b, ng.KGrouped(torch.zeros(G + 1, dtype=I32))), ng.Unsupported, "no k_grouped layout"),
    "b without groups": (lambda a, b: ng.grouped_gemm(a, b[0], layouts()["contiguous"]), ValueError, r"b, shape: got \(64, 256\), expected 3 dim"),
    "m_indices too short": (lambda a, b: ng.grouped_gemm(a, b, ng.Contiguous(torch.zeros(M - 1, dtype=I32))), ValueError, "m_indices, length: got 23, expected M = 24"),
    "m_indices int64": (lambda a, b: ng.Contiguous(torch.zeros(M, dtype=torch.int64)), TypeError, "m_indices, dtype: got torch.int64, expected torch.int32"),
    "m_indices strided": (lambda a, b: ng.Contiguous(torch.zeros(2 * M, dtype=I32)[::2]), ValueError, r"m_indices, strides: got \(2,\)"),
    "m_indices 2-D": (lambda a, b: ng.Contiguous(torch.zeros(M, 1, dtype=I32)), ValueError, r"m_indices, shape: got \(24, 1\)"),
    "offsets of wrong length": (lambda a, b: ng.grouped_gemm(a, b, ng.Offsets(torch.zeros(G, dtype=I32))), ValueError, r"offsets, length: got 3, expected groups \+ 1 = 4"),
    "offsets float": (lambda a, b: ng.Offsets(torch.zeros(4)), TypeError, "offsets, dtype: got torch.float32"),
    "psum ends of wrong length": (lambda a, b: ng.grouped_gemm(a, b, ng.Psum(torch.zeros(G + 1, dtype=I32))), ValueError, "psum ends, length: got 4"),
    "psum alignment 0": (lambda a, b: ng.Psum(torch.zeros(G, dtype=I32), 0), ValueError, "psum alignment: got 0"),
    "masked with flat a": (lambda a, b: ng.grouped_gemm(a, b, ng.Masked(torch.zeros(G, dtype=I32))), ValueError, r"a, shape: got \(24, 256\), expected 3 dimensions, \[G, max_m, K\]"),
    "masked_m of wrong length": (lambda a, b: ng.grouped_gemm(masked_a(), b, ng.Masked(torch.zeros(G + 2, dtype=I32))), ValueError, "masked_m, length: got 5, expected the number of groups, 3"),
    "masked groups differ": (lambda a, b: ng.grouped_gemm(ng.ScaledTensor(masked_a().data[:2], masked_a().scale[:2], a.format), b, ng.Masked(torch.zeros(G, dtype=I32))), ValueError, "groups of a: got 2, expected b's, 3"),
    "expected_m negative": (lambda a, b: ng.Masked(torch.zeros(G, dtype=I32), -1), ValueError, "expected_m: got -1"),
    "expected_m on the device": (lambda a, b: ng.Masked(torch.zeros(G, dtype=I32), torch.tensor(4)), TypeError, "expected_m: got Tensor, expected an int, known on the host"),
    "expected_m of psum on the device": (lambda a, b: ng.Psum(torch.zeros(G, dtype=I32), 8, torch.tensor(4)), TypeError, "expected_m: got Tensor"),
    "index on another device": (lambda a, b: ng.grouped_gemm(a, b, ng.Contiguous(torch.zeros(M, dtype=I32, device="meta"))), ValueError, "contiguous index, device: got meta"),
    "a in 128-row blocks": (lambda a, b: ng.grouped_gemm(ng.quantize(torch.randn(M, K), ng.FP8_128x128), b, layouts()["offsets"]), ValueError, "a's scale block"),
    "wgrad with offsets": (lambda a, b: ng.grouped_gemm_wgrad(a, a, layouts()["offsets"]), TypeError, "layout: got Offsets, expected KGrouped"),
    "wgrad K differs": (lambda a, b: ng.grouped_gemm_wgrad(a, ng.quantize(torch.randn(8, 128), ng.FP8_1x128), ng.KGrouped(torch.tensor([0, 128]))), ValueError, "K of b: got 128"),
}


def masked_a() -> ng.ScaledTensor:
    return ng.quantize(torch.randn(G, 8, K), ng.FP8_1x128)


@pytest.mark.parametrize("name", GROUPED)
def test_grouped(name: str) -> None:
    call, error, message = GROUPED[name]
    with pytest.raises(error, match=message):
        call(*operands(G))


SYNC = {
    "id out of range": (lambda a, b, out: ng.grouped_gemm(a, b, ng.Contiguous(torch.tensor([0] * 5 + [3] + [1] * 18, dtype=I32)), out=out, validate="sync"), r"m_indices\[5\]: got group 3, expected -1 or a group in \[0, 3\)"),
    "id below -1": (lambda a, b, out: ng.grouped_gemm(a, b, ng.Contiguous(torch.tensor([-2] * M, dtype=I32)), out=out, validate="sync"), r"m_indices\[0\]: got group -2"),
    "offsets decrease": (lambda a, b, out: ng.grouped_gemm(a, b, ng.Offsets(torch.tensor([0, 9, 4, M])), out=out, validate="sync"), r"offsets group 1: got \[9, 4\)"),
    "offsets past the end": (lambda a, b, out: ng.grouped_gemm(a, b, ng.Offsets(torch.tensor([0, 9, 9, M + 1])), out=out, validate="sync"), r"offsets group 2: got \[9, 25\)"),
    "psum past the end": (lambda a, b, out: ng.grouped_gemm(a, b, ng.Psum(torch.tensor([8, 16, 99], dtype=I32), 8), out=out, validate="sync"), r"psum group 2: got \[16, 99\)"),
    "NaN scale": (lambda a, b, out: ng.grouped_gemm(with_scale(a, a.scale.index_put((torch.tensor(7), torch.tensor(1)), torch.tensor(float("nan")))), b, layouts()["offsets"], out=out, validate="sync"), r"scale of a at \(7, 1\): got NaN"),
    "negative scale": (lambda a, b, out: ng.grouped_gemm(a, with_scale(b, -b.scale), layouts()["offsets"], out=out, validate="sync"), r"scale of b at \(0, 0, 0\): got NaN, infinite or negative"),
    "FP32 scale that is no power of two": (lambda a, b, out: ng.grouped_gemm(ng.ScaledTensor(a.data, torch.full((M, 2), 0.3), ng.FP8_1x128.with_scale("e8m0")), b, layouts()["offsets"], out=out, validate="sync"), r"scale of a at \(0, 0\): got no power of two"),
}


@pytest.mark.parametrize("name", SYNC)
def test_validate_sync_names_the_row_and_writes_nothing(name: str) -> None:
    call, message = SYNC[name]
    out = guarded_empty((M, N), torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=message):
        call(*operands(G), out.tensor)
    out.assert_clean([out.tensor])


def test_masked_m_out_of_range() -> None:
    b = operands(G)[1]
    for bad in ([0, 9, 0], [0, -1, 0]):
        with pytest.raises(ValueError, match=rf"masked_m\[1\]: got {bad[1]} rows, expected 0 to max_m = 8"):
            ng.grouped_gemm(masked_a(), b, ng.Masked(torch.tensor(bad, dtype=I32)), validate="sync")


def test_good_data_passes_validation() -> None:
    a, b = operands(G)
    for layout in layouts().values():
        ng.grouped_gemm(a, b, layout, validate="sync")
    full = masked_a()
    ng.grouped_gemm(full, b, ng.Masked(torch.tensor([full.shape[1], 0, full.shape[1]], dtype=I32)), validate="sync")     # as many as there is room for


OWN = ng.sort_by_expert(torch.tensor([[0, 1], [2, 0], [1, 2]], dtype=I32), G)
TOKENS, ROWS = torch.randn(3, 64).bfloat16(), torch.randn(6, 64).bfloat16()


def narrow_out(dtype: torch.dtype) -> ng.ScaledTensor:
    return ng.ScaledTensor(torch.zeros(6, 64, dtype=torch.float8_e4m3fn), torch.zeros(6, 1, dtype=dtype), ng.FP8_1x128)


PACKED = ng.prepack(ng.quantize(torch.randn(G, 64, 64), ng.MXFP4))
LAYER = torch.randn(G, 64, 64).bfloat16(), torch.randn(G, 64, 32).bfloat16()
GROUPS = ng.Masked(torch.zeros(G, dtype=I32))

MORE = {
    "accumulate of packed weights is no flag": (lambda: ng.grouped_gemm(torch.randn(G, 8, 64).bfloat16(), PACKED, GROUPS, out=torch.zeros(G, 8, 64), accumulate="no"), TypeError, "accumulate: got 'no', expected True or False"),
    "zero_padding of packed weights is no flag": (lambda: ng.grouped_gemm(torch.randn(G, 8, 64).bfloat16(), PACKED, GROUPS, zero_padding="no"), TypeError, "zero_padding: got 'no', expected True or False"),
    "gaps between groups to write, with packed weights": (lambda: ng.grouped_gemm(torch.randn(G, 8, 64).bfloat16(), PACKED, GROUPS, out=torch.zeros(G, 9, 64)[:, :8]), ValueError, r"out, strides: got \(576, 64, 1\), expected groups one behind the other"),
    "fast_accum of packed weights": (lambda: ng.gemm(torch.randn(4, 64).bfloat16(), ng.prepack(ng.quantize(torch.randn(64, 64), ng.MXFP4)), fast_accum=True), ValueError, "fast_accum of packed mxfp4: got True"),
    "accumulate is no flag": (lambda: ng.gemm(*operands(), out=torch.zeros(M, N), accumulate="no"), TypeError, "accumulate: got 'no', expected True or False"),
    "workspace is a size": (lambda: ng.gemm(*operands(), workspace=4096), TypeError, "workspace: got int, expected a torch.Tensor"),
    "alignment is a float": (lambda: ng.Psum(torch.zeros(G, dtype=I32), 128.5), TypeError, "psum alignment: got float, expected an int"),
    "alignment is a tensor": (lambda: ng.KGrouped(torch.zeros(G, dtype=I32), torch.tensor(128)), TypeError, "k_grouped alignment: got Tensor"),
    "negative num_slots": (lambda: ng.Routed(torch.zeros(16, dtype=I32), torch.zeros(1, dtype=I32), torch.zeros(1, dtype=I32), -1, 2, 16), ValueError, "num_slots: got -1, expected at least 0"),
    "scales of another dtype to write": (lambda: ng.gather_quantize(TOKENS, OWN, ng.FP8_1x128, out=narrow_out(torch.uint8)), TypeError, "out, scale dtype: got torch.uint8, expected torch.float32"),
    "no scales to write": (lambda: ng.gather_quantize(TOKENS, OWN, ng.FP8_1x128, out=replace(narrow_out(torch.float32), scale=None)), TypeError, "out, scale: got NoneType"),
    "a routing of another dtype": (lambda: ng.gather_quantize(TOKENS, replace(OWN, row_map=OWN.row_map.long()), ng.FP8_1x128), TypeError, "routing, row_map, dtype: got torch.int64, expected torch.int32"),
    "offsets of another dtype": (lambda: ng.combine(ROWS, replace(OWN, offsets=OWN.offsets.int()), torch.rand(3, 2)), TypeError, "routing, offsets, dtype: got torch.int32, expected torch.int64"),
    "an inverse too short": (lambda: ng.combine(ROWS, replace(OWN, inverse=OWN.inverse[:5]), torch.rand(3, 2)), ValueError, r"routing, inverse, shape: got \(5,\), expected \(6,\)"),
    "a routing to write of another dtype": (lambda: ng.sort_by_expert(torch.zeros(3, 2, dtype=I32), G, out=replace(OWN, offsets=OWN.offsets.int())), TypeError, "routing, offsets, dtype"),
    "negative first expert": (lambda: ng.sort_by_expert(torch.zeros(3, 2, dtype=I32), G, first_expert=-1), ValueError, "first_expert: got -1"),
    "no top_k": (lambda: ng.route(torch.randn(4, 8), None), TypeError, "top_k: got NoneType, expected an int"),
    "top_k is a flag": (lambda: ng.route(torch.randn(4, 9), True), TypeError, "top_k: got bool, expected an int"),
    "no scaling factor": (lambda: ng.route(torch.randn(4, 8), 2, scaling_factor=None), TypeError, "scaling_factor: got NoneType, expected a number"),
    "renormalize is no flag": (lambda: ng.route(torch.randn(4, 8), 2, renormalize="no"), TypeError, "renormalize: got 'no', expected True or False"),
    "a layer's top_k": (lambda: ng.experts(TOKENS, *LAYER, router_logits=torch.randn(3, G), top_k=None), TypeError, "top_k: got NoneType"),
    "interleaved is no flag": (lambda: ng.experts(TOKENS, *LAYER, router_logits=torch.randn(3, G), top_k=2, interleaved="no"), TypeError, "interleaved: got 'no'"),
    "tokens of a workspace": (lambda: ng.experts_workspace(torch.tensor(4), *LAYER, top_k=2), TypeError, "tokens: got Tensor, expected an int"),
    "top_k of a workspace": (lambda: ng.experts_workspace(4, *LAYER, top_k=2.5), TypeError, "top_k: got float, expected an int"),
    "a format in a list": (lambda: ng.quantize(TOKENS, [ng.FP8_1x128]), TypeError, "format: got list, expected a Format, or the name of one"),
    "scales in a list": (lambda: ng.ScaledTensor.make(ROWS.to(torch.float8_e4m3fn), [1.0], ng.FP8_TENSOR), TypeError, "scale of fp8_tensor: got list"),
    "a number for a device": (lambda: ng.explain("gemm", m=4, n=64, k=64, device=0), TypeError, "device: got 0, expected the name of a device"),
    "sparse rows": (lambda: ng.gather(TOKENS.to_sparse(), OWN), TypeError, "x: got torch.sparse_coo torch.bfloat16, expected a dense"),
    "weights to pack of another element": (lambda: ng.prepack(replace(ng.quantize(torch.randn(64, 64), ng.MXFP8), data=torch.zeros(64, 64, dtype=torch.float8_e4m3fnuz))), TypeError, r"weights \(mxfp8\), dtype: got torch.float8_e4m3fnuz, expected torch.float8_e4m3fn"),
    "weights to pack of a format's name": (lambda: ng.prepack(replace(ng.quantize(torch.randn(64, 64), ng.MXFP8), format="mxfp8")), TypeError, "weights.format: got str, expected a Format"),
    "top_k is a float": (lambda: ng.route(torch.randn(4, 8), 2.0), TypeError, "top_k: got float, expected an int"),
    "args in a list": (lambda: ng.activate(ROWS, activation="swiglu_oai", args=[1.7, 7.0]), TypeError, r"args: got list, expected a tuple"),
    "layout of activate": (lambda: ng.activate(ROWS, layout=OWN.offsets), TypeError, "layout: got Tensor, expected Offsets"),
    "bias of a layer's step": (lambda: ng.activate(ROWS, layout=OWN.layout, bias=1.0), TypeError, "bias: got float, expected a torch.Tensor"),
    "bias of a routed product": (lambda: ng.routed_gemm(ROWS, ng.quantize(torch.randn(G, 64, 64), ng.MXFP4), OWN.layout, bias=[1.0]), TypeError, "bias: got list, expected a torch.Tensor"),
    "a sparse operand": (lambda: ng.gemm(torch.eye(4).to_sparse(), torch.eye(4)), TypeError, "a, layout: got torch.sparse_coo, expected a dense"),
    "a number for scales": (lambda: ng.gemm(with_scale(operands()[0], 1.0), operands()[1]), TypeError, "scale of a: got float, expected a torch.Tensor"),
    "an array to quantise": (lambda: ng.quantize_both(torch.randn(4, 128).numpy(), ng.FP8_ROW), TypeError, "input of quantize: got ndarray"),
    "offsets in a list": (lambda: ng.quantize_both(torch.randn(4, 128), ng.FP8_ROW, [0, 4]), TypeError, "offsets: got list, expected a torch.Tensor"),
    "a tensor to write rows to": (lambda: ng.gather_quantize(TOKENS, OWN, ng.FP8_1x128, out=ROWS), TypeError, "out: got Tensor, expected a ScaledTensor"),
    "segments are a tensor": (lambda: ng.activate_both(ROWS, OWN.layout, ng.FP8_ROW, segments=OWN.offsets), TypeError, "segments: got Tensor"),
    "negative max_sms of a layer": (lambda: ng.experts(TOKENS, torch.randn(G, 64, 64).bfloat16(), torch.randn(G, 64, 32).bfloat16(), router_logits=torch.randn(3, G), top_k=2, max_sms=-3), ValueError, "max_sms: got -3"),
}


@pytest.mark.parametrize("name", MORE)
def test_what_was_taken_in_silence(name: str) -> None:
    call, error, message = MORE[name]
    with pytest.raises(error, match=message):
        call()


STEPS = {
    "gemm": lambda **kw: ng.gemm(*operands(), **kw),
    "grouped_gemm": lambda **kw: ng.grouped_gemm(*operands(G), layouts()["offsets"], **kw),
    "quantize": lambda **kw: ng.quantize(TOKENS, ng.FP8_1x128, **kw),
    "route": lambda **kw: ng.route(torch.randn(4, 8), 2, **kw),
    "sort_by_expert": lambda **kw: ng.sort_by_expert(torch.zeros(3, 2, dtype=I32), G, **kw),
    "gather_quantize": lambda **kw: ng.gather_quantize(TOKENS, OWN, ng.FP8_1x128, **kw),
    "activate": lambda **kw: ng.activate(ROWS, **kw),
    "combine": lambda **kw: ng.combine(ROWS, OWN, torch.rand(3, 2), **kw),
}


@pytest.mark.parametrize("name", STEPS)
def test_what_cannot_be_hashed_is_named(name: str) -> None:
    """Signatures are looked up in front of all checks."""
    with pytest.raises(TypeError, match="config: got dict, expected a "):
        STEPS[name](config={"block_m": 64})
    with pytest.raises(TypeError, match="backend: got list, expected the name of a backend or of a kernel"):
        STEPS[name](backend=["triton"])
