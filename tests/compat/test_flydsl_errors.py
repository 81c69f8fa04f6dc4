"""What FlyDSL's factories and launchers refuse, before anything is written."""

from __future__ import annotations

import pytest
import torch

from narrowgemm import Unsupported

from ._flydsl import fresh, launcher, problem  # noqa: F401 - a fixture

FACTORY_ERRORS = {
    "k": (dict(k=192), ValueError, r"k: got 192, expected a multiple of tile_k=128"),
    "n": (dict(n=192), ValueError, r"n: got 192, expected a multiple of tile_n=128"),
    "tile_k": (dict(tile_k=64), ValueError, r"tile_k: got 64, expected a multiple of scale_block_k=128"),
    "tile_n": (dict(tile_n=64), ValueError, r"tile_n: got 64, expected a multiple of scale_block_n=128"),
    "out_dtype": (dict(out_dtype="f32"), ValueError, r"out_dtype: got 'f32', expected 'bf16' or 'f16'"),
    "zero": (dict(num_groups=0), ValueError, r"num_groups: got 0"),
    "negative": (dict(tile_m=-1), ValueError, r"tile_m: got -1"),
    "float": (dict(n=128.5), TypeError, r"n: got 128.5, expected an integer"),
    "scale_block": (dict(scale_block_k=64, tile_k=128), Unsupported, r"64 of K \(128 and 128\)"),
}


@pytest.mark.parametrize("case", FACTORY_ERRORS)
@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_factory_refuses(layout, case):
    change, error, match = FACTORY_ERRORS[case]
    with pytest.raises(error, match=match):
        launcher(layout, **change)


def as_type(name, dtype):
    return lambda args: {name: args[name].view(torch.uint8).view(dtype) if args[name].element_size() == dtype.itemsize
                         else args[name].to(dtype)}


LAUNCH_ERRORS = {
    "fnuz a": (as_type("a", torch.float8_e4m3fnuz), Unsupported, r"a: E4M3FNUZ payload \(quantise to torch.float8_e4m3fn"),
    "fnuz b": (as_type("b", torch.float8_e4m3fnuz), Unsupported, r"b: E4M3FNUZ payload"),
    "e5m2": (as_type("a", torch.float8_e5m2), TypeError, r"a, dtype: got torch.float8_e5m2"),
    "bf16": (as_type("b", torch.bfloat16), TypeError, r"b, dtype: got torch.bfloat16"),
    "scale": (as_type("scale_a", torch.bfloat16), TypeError, r"scale_a, dtype: got torch.bfloat16"),
    "ids": (as_type("grouped_layout", torch.int64), TypeError, r"grouped_layout, dtype: got torch.int64"),
    "d dtype": (as_type("d", torch.float16), TypeError, r"d, dtype: got torch.float16, expected torch.bfloat16"),
    "d float": (as_type("d", torch.float32), TypeError, r"d, dtype"),
    "no tensor": (lambda x: {"a": None}, TypeError, r"a: got NoneType"),
    "untransposed": (lambda x: {"scale_a": x["scale_a"].T.contiguous()}, ValueError,
                     r"scale_a, shape: got \(256, 2\), expected \(2, 256\), or flat with 512"),
    "short a": (lambda x: {"a": x["a"].view(-1)[:-1]}, ValueError, r"a, shape: got \(65535,\)"),
    "short b": (lambda x: {"b": x["b"][:1]}, ValueError, r"b, shape: got \(1, 128, 256\)"),
    "short ids": (lambda x: {"grouped_layout": x["grouped_layout"][:-1]}, ValueError, r"grouped_layout, shape: got \(255,\)"),
    "scale_b": (lambda x: {"scale_b": x["scale_b"][:, :, :1].contiguous()}, ValueError, r"scale_b, shape"),
    "strides": (lambda x: {"a": x["a"].T.contiguous().T}, ValueError, r"a, strides: got \(1, 256\), expected contiguous"),
    "device": (lambda x: {"b": x["b"].to("meta")}, ValueError, r"b, device: got meta, expected d's, cpu"),
    "M": (lambda x: {"M": 512}, ValueError, r"d, shape: got \(256, 128\), expected \(512, 128\)"),
    "M float": (lambda x: {"M": 256.0}, TypeError, r"M: got 256.0, expected an integer known to the host"),
    "M negative": (lambda x: {"M": -1}, ValueError, r"M: got -1"),
    "n": (lambda x: {"n": 256}, ValueError, r"n, k, num_groups of the launch: got \(256, 256, 2\), expected the factory's"),
    "groups": (lambda x: {"num_groups": 1}, ValueError, r"of the launch: got \(128, 256, 1\)"),
    "stream": (lambda x: {"stream": "s"}, TypeError, r"stream: got 's'"),
    "handle": (lambda x: {"stream": 1234}, ValueError, r"stream for tensors on cpu: got 1234"),
}


@pytest.mark.parametrize("case", LAUNCH_ERRORS)
def test_launch_refuses_before_writing(case):
    change, error, match = LAUNCH_ERRORS[case]
    args, launch = problem(), launcher()
    good = dict(args)
    for _ in range(2):  # before and after a call that went well
        bad = args | change(args)
        bad["d"] = bad["d"].clone() if bad["d"] is args["d"] else bad["d"]
        before = bad["d"].clone()
        with pytest.raises(error, match=match):
            launch(**bad)
        assert torch.equal(bad["d"], before)
        launch(**{**good, "d": torch.empty_like(good["d"])})


def test_bytes_on_gfx942_are_not_taken_for_e4m3fn(monkeypatch):
    from narrowgemm.compat.flydsl import factories

    args = problem()
    monkeypatch.setattr(factories, "is_gfx942", lambda device: True)
    with pytest.raises(Unsupported, match=r"a: FP8 bytes as torch.int8 on gfx942"):
        launcher()(**{**args, "a": args["a"].view(torch.int8)})
    launcher()(**args)
