"""Names, parameter order, defaults and aliases are DeepGEMM's (2.6.1, its `csrc/apis/*.hpp` and `utils`)."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

GEMM = "a b d c=None recipe=None recipe_a=None recipe_b=None compiled_dims={dims} disable_ue8m0_cast=False"
GROUPED = ("a b d grouped_layout recipe=None recipe_a=None recipe_b=None compiled_dims='nk' disable_ue8m0_cast=False "
           "use_psum_layout=False ensure_zero_padding=True")
K_GROUPED = "a b d ks_cpu grouped_layout c=None recipe=(1,1,128) compiled_dims='mn' use_psum_layout=False"
CAST = "x use_ue8m0 gran_k=128"

SIGNATURES = {
    "fp8_fp4_gemm_nt": GEMM.format(dims="'nk'"),
    "fp8_fp4_gemm_nn": GEMM.format(dims="'nk'"),
    "fp8_fp4_gemm_tn": GEMM.format(dims="'mn'"),
    "fp8_fp4_gemm_tt": GEMM.format(dims="'mn'"),
    "m_grouped_fp8_fp4_gemm_nt_contiguous": GROUPED + " expected_m_for_psum_layout=None",
    "m_grouped_fp8_fp4_gemm_nn_contiguous": GROUPED,
    "m_grouped_fp8_fp4_gemm_nt_masked": "a b d masked_m expected_m recipe=None recipe_a=None recipe_b=None "
                                        "compiled_dims='nk' disable_ue8m0_cast=False",
    "k_grouped_fp8_gemm_nt_contiguous": K_GROUPED,
    "k_grouped_fp8_gemm_tn_contiguous": K_GROUPED,
    "transform_sf_into_required_layout": "sf mn k recipe num_groups=None is_sfa=None disable_ue8m0_cast=False "
                                         "psum_layout=None",
    "get_tma_aligned_size": "x element_size",
    "get_mn_major_tma_aligned_tensor": "sf",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor": "sf psum_layout=None",
    "get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor": "sf grouped_layout ks_cpu gran_k=128 k_alignment=None "
                                                              "use_psum_layout=False",
    "set_num_sms": "num_sms", "get_num_sms": "", "set_tc_util": "tc_util", "get_tc_util": "", "set_pdl": "enable_pdl",
    "get_pdl": "", "set_ignore_compile_dims": "new_value", "set_block_size_multiple_of": "new_value",
    "set_mk_alignment_for_contiguous_layout": "new_value", "get_mk_alignment_for_contiguous_layout": "",
    "get_m_alignment_for_contiguous_layout": "", "get_k_alignment_for_contiguous_layout": "",
    "get_theoretical_mk_alignment_for_contiguous_layout": "expected_m=None num_groups=None",
    "set_compile_mode": "new_compile_mode", "get_compile_mode": "", "use_deterministic_algorithms": "mode",
    "ceil_div": "x y", "align": "x y", "ceil_to_ue8m0": "x", "pack_ue8m0_to_int": "x",
    "unpack_ue8m0_from_int": "packed_sf",
    "per_token_cast_to_fp8": CAST + " use_packed_ue8m0=False", "per_channel_cast_to_fp8": CAST,
    "per_block_cast_to_fp8": CAST, "per_custom_dims_cast_to_fp8": "x dims use_ue8m0",
    "per_token_cast_to_fp4": CAST + " use_packed_ue8m0=False", "transpose_packed_fp4": "a",
    "cast_back_from_fp4": "packed sf gran_k=128 use_packed_ue8m0=False",
    "testing.calc_diff": "x y", "testing.get_arch_major": "", "testing.test_filter": "condition",
    "testing.ignore_env": "name condition", "testing.bench": "fn num_warmups=5 num_tests=10 high_precision=False",
    "testing.bench_kineto": "fn kernel_names num_tests=30 suppress_kineto_output=False trace_path=None flush_l2=True "
                            "with_multiple_kernels=False barrier=None",
}
ALIASES = {f"fp8_gemm_{x}": f"fp8_fp4_gemm_{x}" for x in ("nt", "nn", "tn", "tt")} | {
    "m_grouped_fp8_gemm_nt_contiguous": "m_grouped_fp8_fp4_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nn_contiguous": "m_grouped_fp8_fp4_gemm_nn_contiguous",
    "m_grouped_fp8_gemm_nt_masked": "m_grouped_fp8_fp4_gemm_nt_masked",
    "fp8_m_grouped_gemm_nt_masked": "m_grouped_fp8_fp4_gemm_nt_masked",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_parameters(deep_gemm, name):
    function = deep_gemm
    for part in name.split("."):
        function = getattr(function, part)
    given = [str(p).split(":")[0].strip() + ("" if p.default is p.empty else f"={p.default!r}".replace(" ", ""))
             for p in inspect.signature(function).parameters.values()]
    want = SIGNATURES[name].split()
    assert given[: len(want)] == want
    assert all("=" in p for p in given[len(want) :]), "what later releases and forks added has defaults"


@pytest.mark.parametrize("name", ALIASES)
def test_aliases_are_the_same_function(deep_gemm, name):
    assert getattr(deep_gemm, name) is getattr(deep_gemm, ALIASES[name])


@pytest.mark.parametrize("name", [n for n in SIGNATURES if n.startswith(("fp8", "m_grouped"))])
def test_later_arguments(deep_gemm, name):
    assert inspect.signature(getattr(deep_gemm, name)).parameters["epilogue"].default is None


@pytest.mark.parametrize(("module", "names"), [
    ("deep_gemm.utils", "align per_token_cast_to_fp8 get_tma_aligned_size get_mk_alignment_for_contiguous_layout"),
    ("deep_gemm.utils.math", "align ceil_div ceil_to_ue8m0 per_block_cast_to_fp8 pack_ue8m0_to_int"),
    ("deep_gemm.utils.layout", "get_mn_major_tma_aligned_tensor get_m_alignment_for_contiguous_layout"),
    ("deep_gemm.testing", "bench bench_kineto calc_diff count_bytes get_arch_major test_filter ignore_env"),
    ("deep_gemm.testing.bench", "bench bench_kineto"),
    ("deep_gemm.testing.numeric", "calc_diff count_bytes assert_bitwise_equal"),
    ("deep_gemm.testing.utils", "get_arch_major test_filter ignore_env"),
])
def test_submodules(deep_gemm, module, names):
    found = import_module(module)
    assert all(callable(getattr(found, n)) for n in names.split())


def test_every_public_function_says_what_it_does(deep_gemm):
    for name in deep_gemm.__dict__:
        value = getattr(deep_gemm, name)
        if inspect.isfunction(value):
            assert value.__doc__, name
