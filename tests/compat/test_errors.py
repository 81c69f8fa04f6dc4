"""Bad input: the error's type and text, and nothing written."""

from __future__ import annotations

import pytest
import torch

from narrowgemm import Unsupported

M, N, K, G = 16, 128, 256, 2
E4M3 = torch.float8_e4m3fn


def a(m=M, k=K, dtype=E4M3, scale=(M, 2), scale_dtype=torch.float32, lead=()):
    return torch.zeros((*lead, m, k), dtype=dtype), torch.ones((*lead, *scale)).to(scale_dtype)


def b(n=N, k=K, dtype=E4M3, scale=(1, 2), scale_dtype=torch.float32, lead=()):
    return a(n, k, dtype, scale, scale_dtype, lead)


def b3(**kw):
    return b(**{"lead": (G,), **kw})


def d(*shape, dtype=torch.bfloat16):
    return torch.full(shape or (M, N), 7.0).to(dtype)


def ids(n=M, dtype=torch.int32):
    return torch.zeros(n, dtype=dtype)


def refuses(function, error, match, *args, out, **kw):
    before = out.clone() if isinstance(out, torch.Tensor) else None
    with pytest.raises(error, match=match) as info:
        function(*args, **kw)
    assert "got" in str(info.value) or error is Unsupported
    if before is not None:
        assert torch.equal(out, before), "nothing is written"


PAIRS = {
    "a alone": (dict(a=torch.zeros(M, K)), TypeError, r"a: got Tensor, expected a pair"),
    "triple": (dict(a=(*a(), None)), TypeError, r"a: got tuple of \['Tensor', 'Tensor', 'NoneType'\]"),
    "scales a number": (dict(a=(a()[0], 1.0)), TypeError, r"a: got tuple of \['Tensor', 'float'\]"),
    "bf16 payload": (dict(a=a(dtype=torch.bfloat16)), TypeError, r"a, payload dtype: got torch.bfloat16"),
    "byte payload": (dict(b=(b()[0].view(torch.uint8), b()[1])), TypeError, r"b, payload dtype: got torch.uint8"),
    "bf16 scales": (dict(a=a(scale_dtype=torch.bfloat16)), TypeError, r"a, scales dtype: got torch.bfloat16"),
    "three dimensions": (dict(a=a(lead=(1,))), ValueError, r"a, payload shape: got \(1, 16, 256\), expected 2 dim"),
    "scales of two groups": (dict(b=(b()[0], b3()[1])), ValueError, r"b, scales shape: got \(2, 1, 2\), expected 2"),
    "scale rows": (dict(a=a(scale=(M + 1, 2))), ValueError, r"scale of fp8_1x128 .*got \(17, 2\), expected \(16, 2\)"),
    "scale columns": (dict(a=a(scale=(M, 3))), ValueError, r"got \(16, 3\), expected \(16, 2\)"),
    "weight scales": (dict(b=b(scale=(3, 2))), ValueError, r"b, scales for .*got \(3, 2\).*expected \[\.\.\., 1, 2\]"),
    "packed scales": (dict(a=a(scale=(M, 2), scale_dtype=torch.int32)), ValueError, r"packed UE8M0 .*\(16, 1\)"),
    "packed weights": (dict(b=b(scale=(N, 2), scale_dtype=torch.int32)), ValueError, r"got \(128, 2\) torch.int32"),
    "K": (dict(b=b(k=384, scale=(1, 3))), ValueError, r"K of a and b: got 256 and 384"),
    "d shape": (dict(d=d(M, N + 1)), ValueError, r"d, shape: got \(16, 129\), expected \(16, 128\)"),
    "d dtype": (dict(d=d(dtype=torch.float64)), TypeError, r"d, dtype: got torch.float64"),
    "d strides": (dict(d=d(N, M).t()), ValueError, r"d, strides: got \(1, 16\), expected 1 along N"),
    "d none": (dict(d=None), TypeError, r"d: got NoneType"),
    "c shape": (dict(c=d(M, 1)), ValueError, r"c, shape: got \(16, 1\), expected d's"),
    "c dtype": (dict(c=d(dtype=torch.float32)), TypeError, r"c, dtype: got torch.float32, expected d's"),
    "c type": (dict(c=1.0), TypeError, r"c: got float"),
    "one recipe": (dict(recipe_a=(1, 128)), ValueError, r"recipe_a and recipe_b: got \(1, 128\) and None"),
    "both recipes": (dict(recipe=(1, 128, 128), recipe_a=(1, 128), recipe_b=(1, 128)), ValueError, r"recipe together"),
    "short recipe": (dict(recipe=(1, 128)), ValueError, r"recipe: got \(1, 128\), expected \(rows of A"),
    "long recipe": (dict(recipe_a=(1, 1, 128), recipe_b=(1, 128)), ValueError, r"expected \(rows, columns of K\)"),
    "compiled_dims": (dict(compiled_dims="xy"), ValueError, r"compiled_dims: got 'xy', expected letters of 'mnk'"),
    "fp4 a": (dict(a=a(dtype=torch.int8)), ValueError, r"a, scales of an FP4 payload of \(16, 512\): got \(16, 2\).*1x32 or"),
    "fp4 b": (dict(b=b(dtype=torch.int32)), ValueError, r"b, scales of an FP4 payload of \(128, 2048\)"),
    "fp4 recipe": (dict(b=b(k=128, dtype=torch.int8, scale=(N, 8)), recipe_a=(1, 128), recipe_b=(1, 128)), ValueError,
                   r"recipe says 128"),
    "fp4 blocks": (dict(b=b(k=128, dtype=torch.int8, scale=(N, 8)), recipe=(1, 128, 128)), Unsupported,
                   r"b: scale blocks of 128x128"),
    "fp4 along rows": (dict(b=(b(k=128, dtype=torch.int8)[0].t().contiguous().t(), b()[1])), Unsupported,
                       r"b: FP4 packed along rows"),
    "fp4 K": (dict(b=b(k=96, dtype=torch.int8, scale=(N, 6))), ValueError, r"K of a and b: got 256 and 192"),
    "unknown block": (dict(recipe=(1, 64, 64)), Unsupported, r"scale blocks of 1x64 for FP8 \(1x128, 128x128 or"),
    "epilogue": (dict(epilogue="relu"), Unsupported, r"epilogue 'relu'"),
}


@pytest.mark.parametrize("case", PAIRS)
def test_dense(deep_gemm, case):
    change, error, match = PAIRS[case]
    good = {"a": a(), "b": b(), "d": d()}
    args = good | change
    deep_gemm.fp8_gemm_nt(**good | {"d": d()})  # what was checked before hides nothing
    refuses(deep_gemm.fp8_gemm_nt, error, match, out=args["d"], **args)


def test_c_at_the_address_of_d_with_other_strides(deep_gemm):
    storage = d(2 * M, N)
    refuses(deep_gemm.fp8_gemm_nt, ValueError, r"c at d's address, strides: got \(256, 1\), expected d's, \(128, 1\)",
            a(), b(), storage[:M], storage[::2], out=storage)


def test_c_is_not_copied_before_the_checks(deep_gemm):
    out = d()
    refuses(deep_gemm.fp8_gemm_nt, ValueError, r"K of a and b", a(), b(k=384, scale=(1, 3)), out, torch.zeros_like(out),
            out=out)


@pytest.mark.parametrize("name", ["fp8_gemm_nn", "fp8_gemm_tn", "fp8_gemm_tt"])
def test_other_majors_check_their_own_shapes(deep_gemm, name):
    out = d()
    refuses(getattr(deep_gemm, name), ValueError, r"K of a and b|scale", a(), b(), out, out=out)
    refuses(getattr(deep_gemm, name), TypeError, r"expected a pair", torch.zeros(2), torch.zeros(2), out, out=out)


GROUPED = {
    "ids dtype": (dict(grouped_layout=ids(dtype=torch.int64)), TypeError, r"m_indices, dtype: got torch.int64"),
    "ids length": (dict(grouped_layout=ids(M - 1)), ValueError, r"grouped_layout, length: got 15, expected .* 16"),
    "ids shape": (dict(grouped_layout=ids(M).view(4, 4)), ValueError, r"m_indices, shape: got \(4, 4\)"),
    "ids type": (dict(grouped_layout=[0] * M), TypeError, r"m_indices: got list"),
    "ends length": (dict(grouped_layout=ids(3), use_psum_layout=True), ValueError, r"psum ends, length: got 3.*2"),
    "hint without psum": (dict(expected_m_for_psum_layout=4), ValueError, r"without use_psum_layout: got 4"),
    "hint a tensor": (dict(grouped_layout=ids(G), use_psum_layout=True, expected_m_for_psum_layout=torch.tensor(3)),
                      TypeError, r"expected_m_for_psum_layout: got tensor.*known to the host"),
    "weights 2-d": (dict(b=b()), ValueError, r"b, payload shape: got \(128, 256\), expected 3 dimensions"),
    "A blocks of 128 rows": (dict(recipe_a=(128, 128), recipe_b=(128, 128), a=a(scale=(1, 2))), ValueError,
                             r"a's scale block \(128, 128\)"),
    "K": (dict(b=b3(k=384, scale=(1, 3))), ValueError, r"K of a and b: got 256 and 384"),
    "fp4": (dict(b=b3(dtype=torch.int8)), ValueError, r"b, scales of an FP4 payload"),
    "epilogue": (dict(epilogue=object()), Unsupported, r"epilogue <object"),
}


@pytest.mark.parametrize("case", GROUPED)
def test_contiguous(deep_gemm, case):
    change, error, match = GROUPED[case]
    args = {"a": a(), "b": b3(), "d": d(), "grouped_layout": ids()} | change
    for name in ("m_grouped_fp8_gemm_nt_contiguous", "m_grouped_fp8_fp4_gemm_nt_contiguous"):
        refuses(getattr(deep_gemm, name), error, match, out=args["d"], **args)


MASKED = {
    "masked_m dtype": (dict(masked_m=ids(G, torch.int64)), TypeError, r"masked_m, dtype: got torch.int64"),
    "masked_m length": (dict(masked_m=ids(3)), ValueError, r"masked_m, length: got 3"),
    "groups": (dict(b=b(lead=(3,))), ValueError, r"groups of a and b: got 2 and 3"),
    "expected_m": (dict(expected_m=-1), ValueError, r"expected_m: got -1, expected at least 0"),
    "expected_m a tensor": (dict(expected_m=torch.tensor(4)), TypeError, r"expected_m: got tensor"),
    "expected_m a float": (dict(expected_m=4.5), TypeError, r"expected_m: got 4.5"),
    "d": (dict(d=d(G, M, N + 8)), ValueError, r"d, shape"),
    "overlap": (dict(enable_overlap=True), Unsupported, r"enable_overlap with a signal"),
    "signal": (dict(signal=ids(4)), Unsupported, r"enable_overlap with a signal"),
}


@pytest.mark.parametrize("case", MASKED)
def test_masked(deep_gemm, case):
    change, error, match = MASKED[case]
    args = {"a": a(lead=(G,)), "b": b3(), "d": d(G, M, N), "masked_m": ids(G), "expected_m": 4} | change
    refuses(deep_gemm.fp8_m_grouped_gemm_nt_masked, error, match, out=args["d"], **args)


X = torch.zeros(M, K)
WRONG_KINDS = {
    "recipe": ("fp8_gemm_nt", dict(a=a(), b=b(), d=d(), recipe=128), r"recipe: got 128, expected a tuple"),
    "recipe of scales": ("transform_sf_into_required_layout", dict(sf=torch.ones(M, 1), mn=M, k=128, recipe=None), r"recipe: got None"),
    "mn": ("transform_sf_into_required_layout", dict(sf=torch.ones(M, 1), mn=None, k=128, recipe=(1, 128)), r"mn: got NoneType, expected an int"),
    "cast of no tensor": ("per_token_cast_to_fp8", dict(x=[1.0], use_ue8m0=False), r"x: got list, expected a torch.Tensor"),
    "cast of FP8": ("per_block_cast_to_fp8", dict(x=X.to(torch.float8_e4m3fn), use_ue8m0=False), r"x: got torch.float8_e4m3fn.*expected dense numbers"),
    "FP4 without scales": ("prepack_fp4", dict(b=(torch.zeros(64, 32, dtype=torch.int8), None)), r"b, scales: got NoneType, expected a torch.Tensor"),
    "recipe of FP4": ("prepack_fp4", dict(b=(torch.zeros(64, 32, dtype=torch.int8), torch.ones(64, 2)), recipe_b=32), r"recipe_b: got 32, expected \(1, 32\)"),
    "sizes": ("k_grouped_fp8_gemm_tn_contiguous", dict(a=a(), b=b(), d=torch.zeros(1, M, N), ks_cpu=128, grouped_layout=ids(1)), r"ks_cpu: got 128, expected a list"),
}


@pytest.mark.parametrize("case", WRONG_KINDS)
def test_arguments_of_a_wrong_kind(deep_gemm, case):
    name, args, match = WRONG_KINDS[case]
    with pytest.raises(TypeError, match=match):
        getattr(deep_gemm, name)(**args)


KS = [128, 256]
K_GROUPED = {
    "ks length": (dict(ks_cpu=[384]), ValueError, r"ks_cpu, length: got 1, expected the number of groups, 2"),
    "ks multiple": (dict(ks_cpu=[100, 284]), ValueError, r"ks_cpu\[0\]: got 100, expected a multiple of 128"),
    "ks negative": (dict(ks_cpu=[-128, 512]), ValueError, r"ks_cpu\[0\]: got -128"),
    "no ks": (dict(ks_cpu=None), ValueError, r"ks_cpu.*: got None"),
    "empty ks": (dict(ks_cpu=[]), ValueError, r"ks_cpu.*: got \[\]"),
    "ks differ": (dict(ks_cpu=[256, 128]), ValueError, r"grouped_layout: got \[128, 256\], expected ks_cpu, \[256"),
    "sizes dtype": (dict(grouped_layout=torch.tensor(KS)), TypeError, r"grouped_layout, dtype: got torch.int64"),
    "sizes length": (dict(grouped_layout=ids(3)), ValueError, r"grouped_layout, length: got 3"),
    "recipe": (dict(recipe=(1, 1, 32)), Unsupported, r"k-grouped recipe \(1, 1, 32\)"),
    "d": (dict(d=d(M, N)), ValueError, r"d, shape: got \(16, 128\), expected \[G, M, N\]"),
    "d strides": (dict(d=torch.full((M, G, 32), 7.0).transpose(0, 1)), ValueError, r"d, strides: got .*contiguous"),
    "c": (dict(c=torch.zeros(1)), ValueError, r"c, shape"),
}


def k_args(flat: bool) -> dict:
    total = sum(KS)
    pairs = [(torch.zeros((total, r), dtype=E4M3), torch.ones((total // 128, r))) for r in (M, 32)]
    if flat:
        pairs = [(x.flatten(), s.t()) for x, s in pairs]
    return {"a": pairs[0], "b": pairs[1], "d": torch.full((G, M, 32), 7.0), "ks_cpu": KS,
            "grouped_layout": torch.tensor(KS, dtype=torch.int32)}


@pytest.mark.parametrize("case", K_GROUPED)
@pytest.mark.parametrize("name", ["nt", "tn"])
def test_k_grouped(deep_gemm, case, name):
    change, error, match = K_GROUPED[case]
    args = k_args(name == "nt") | change
    refuses(getattr(deep_gemm, f"k_grouped_fp8_gemm_{name}_contiguous"), error, match, out=args["d"], **args)


def test_k_grouped_layouts(deep_gemm):
    nt, tn = deep_gemm.k_grouped_fp8_gemm_nt_contiguous, deep_gemm.k_grouped_fp8_gemm_tn_contiguous
    args = k_args(True)
    refuses(nt, Unsupported, r"with use_psum_layout \(k_grouped_fp8_gemm_tn", **args, use_psum_layout=True,
            out=args["d"])
    refuses(nt, ValueError, r"a, elements: got 6144, expected .* 17 x 384",
            **args | {"d": torch.full((G, 17, 32), 7.0)}, out=args["d"])
    args = k_args(False)
    refuses(tn, ValueError, r"sum of ks_cpu: got 256", **args | {"ks_cpu": [128, 128]}, out=args["d"])
    deep_gemm.set_mk_alignment_for_contiguous_layout(32)
    refuses(tn, Unsupported, r"k-grouped psum layout with alignment 32", **args, use_psum_layout=True, out=args["d"])


@pytest.mark.gpu
def test_devices(deep_gemm):
    there = [(x.cuda(), s.cuda()) for x, s in (a(), b())]
    out = d().cuda()
    refuses(deep_gemm.fp8_gemm_nt, ValueError, r"a, device of the scales: got cpu", (there[0][0], a()[1]), there[1],
            out, out=out)
    refuses(deep_gemm.fp8_gemm_nt, ValueError, r"d, device: got cpu", *there, d(), out=out)
    refuses(deep_gemm.fp8_gemm_nt, ValueError, r"device", there[0], b(), out, out=out)
