"""FlyDSL's launchers: its 30 cases through its call, what they refuse and ignore, and weights that change."""

from __future__ import annotations

import gc
import inspect
import warnings
from dataclasses import replace

import pytest
import torch

from narrowgemm import FP8_1x128, FP8_128x128, Unsupported
from narrowgemm.compat import flydsl, notice
from narrowgemm.compat.flydsl import weights
from narrowgemm.testing.cases import Case, build
from narrowgemm.testing.numerics import calc_diff, check_gates
from narrowgemm.testing.suites import FLYDSL_CONTIGUOUS, FLYDSL_MASKED

GPU = pytest.mark.gpu
FACTORIES = {"contiguous": flydsl.compile_grouped_gemm_blockscale_contiguous,
             "masked": flydsl.compile_grouped_gemm_blockscale_masked}
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}
FULL = [Case("flydsl", "contiguous", g, m, n, k, sizes="uniform:0.8:1.2", zero_padding=False)
        for g, m, n, k in FLYDSL_CONTIGUOUS]
FULL += [Case("flydsl", "masked", g, m, n, k, max_m=x, sizes="empty:0.5" if m == 50 else "uniform:0.8:1.2")
         for g, x, m, n, k in FLYDSL_MASKED]
SMALL = [replace(c, n=min(c.n, 512) if c.n < 2048 else c.n // 8, k=c.k if c.k < 2048 else c.k // 1024 * 128 + 128)
         for c in FULL]
CASES = [pytest.param("cpu", replace(c, out_dtype=d), id=f"cpu-{c.id}-{d}") for c in SMALL for d in ("bf16", "fp16")]
CASES += [pytest.param("cuda", replace(c, out_dtype=d), id=f"cuda-{c.id}-{d}", marks=GPU)
          for c in FULL for d in ("bf16", "fp16")]
E8M0 = [replace(SMALL[4], a=FP8_1x128.with_scale("e8m0"), b=FP8_128x128.with_scale("e8m0")),
        replace(SMALL[9], a=FP8_1x128.with_scale("e8m0"), b=FP8_128x128.with_scale("e8m0"))]


@pytest.fixture(autouse=True)
def fresh():
    """No weights are known, no warning was given, no launcher was made."""
    weights._storages.clear()
    notice._given.clear()
    for factory in FACTORIES.values():
        factory.cache_clear()
    yield


def as_bytes(x):
    return x.contiguous().view(-1).view(torch.int8)


def call(inputs, stream=None, **options):
    """The case through FlyDSL's names, the way its callers do: flat tensors, FP8 as int8, transposed scales."""
    c, a, b, d = inputs.case, inputs.a, inputs.b, inputs.out.tensor
    launch = FACTORIES[c.layout](n=c.n, k=c.k, num_groups=c.groups, out_dtype=NAMES[d.dtype], **options)
    launch(d.view(-1), as_bytes(a.data), as_bytes(flydsl.shuffle_weight(b.data)), a.scale.mT.contiguous().view(-1),
           b.scale.contiguous().view(-1), inputs.layout.index, c.a_rows, c.n, c.k, c.groups, stream)


def problem(layout="contiguous", m=256, n=128, k=256, groups=2, device="cpu", out=torch.bfloat16):
    """Arguments of a launch, unflattened, by name; and the launcher."""
    case = Case("flydsl", layout, groups, m // groups, n, k, max_m=m, zero_padding=False) if layout == "masked" else \
        Case("flydsl", layout, groups, m // groups, n, k, zero_padding=False)
    x = build(case, device)
    index = "masked_m" if layout == "masked" else "grouped_layout"
    rows = "max_m" if layout == "masked" else "M"
    d = torch.full(x.out.tensor.shape, 7.0, dtype=out, device=device)
    return {"d": d, "a": x.a.data, "b": flydsl.shuffle_weight(x.b.data), "scale_a": x.a.scale.mT.contiguous(),
            "scale_b": x.b.scale, index: x.layout.index, rows: m, "n": n, "k": k, "num_groups": groups, "stream": None}


def launcher(layout="contiguous", n=128, k=256, num_groups=2, **options):
    return FACTORIES[layout](n=n, k=k, num_groups=num_groups, **options)


# ---- the 30 cases ----------------------------------------------------------------------------------------------------


def test_the_matrix_has_thirty_cases():
    assert sum(p.values[0] == "cpu" for p in CASES) == 30 == sum(p.values[0] == "cuda" for p in CASES)


@pytest.mark.parametrize(("device", "case"), CASES)
def test_case(device, case):
    inputs = build(case, device)
    call(inputs)
    assert not inputs.faults()
    inputs.check().assert_(case.id)


@pytest.mark.parametrize("case", E8M0, ids=lambda c: c.layout)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_e8m0_scales(device, case):
    inputs = build(case, device)
    assert inputs.a.scale.dtype == torch.uint8
    call(inputs)
    assert not inputs.faults()
    inputs.check().assert_(case.id)


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_callers_quantiser(layout):
    """Scales the way FlyDSL's callers make them, as E8M0 bytes, against the product before quantising."""
    g, m, n, k = 2, 128, 128, 256
    a, b = torch.randn(g, m, k), torch.randn(g, n, k)

    def cast(x, dims):
        scale = flydsl.fp32_to_e8m0(x.abs().amax(dims, keepdim=True).clamp(min=1e-12) / 448)
        return (x / scale).to(torch.float8_e4m3fn), flydsl.fp32_e8m0_to_byte(scale)

    qa, sa = cast(a.view(g, m, k // 128, 128), 3)
    qb, sb = cast(b.view(g, n // 128, 128, k // 128, 128), (2, 4))
    d = torch.zeros(g, m, n, dtype=torch.bfloat16)
    if layout == "masked":
        index, sa = torch.full((g,), m, dtype=torch.int32), sa.view(g, m, -1).mT
    else:
        index, sa = torch.arange(g, dtype=torch.int32).repeat_interleave(m), sa.view(g * m, -1).T
    qb = flydsl.shuffle_weight(qb.view(g, n, k), layout=(16, 16))
    launcher(layout, n, k, g)(d.view(-1), as_bytes(qa), as_bytes(qb), sa.contiguous().view(-1), sb.view(-1), index,
                              m if layout == "masked" else g * m, n, k, g, None)
    same = torch.bmm((qa.float().view(g, m, -1, 128) * (sa if layout == "masked" else sa.T.reshape(g, m, -1).mT).mT
                      .view(torch.uint8).int().sub(127).float().exp2().unsqueeze(-1)).view(g, m, k),
                     (flydsl.unshuffle_weight(qb).float().view(g, n // 128, 128, -1, 128)
                      * sb.int().sub(127).float().exp2()).view(g, n, k).mT)
    check_gates(d, same, torch.bmm(a, b.mT), FP8_1x128, FP8_128x128, rows=list(range(g)), k=k).assert_()


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_shapes_and_longer_flat_buffers(layout):
    args = problem(layout)
    launch = launcher(layout)
    launch(**args)
    want = args["d"].clone()
    rows = "max_m" if layout == "masked" else "M"
    long = {k: torch.cat([v.reshape(-1).view(torch.uint8), torch.full((64,), 9, dtype=torch.uint8)]).view(v.dtype)
            for k, v in args.items() if isinstance(v, torch.Tensor)}
    for step in (long, {**args, "a": args["a"].view(torch.uint8), "scale_a": args["scale_a"].view(-1)}):
        args = {**args, **step, "d": torch.full_like(step["d"], 7)}
        assert launch(*(args[k] for k in inspect.signature(launch).parameters)) is None
        assert torch.equal(args["d"].view(-1)[: want.numel()], want.view(-1))
        assert (args["d"].view(-1)[want.numel() :] == 7).all()
    assert rows in args


def test_no_rows():
    args = problem()
    args |= {"M": 0, "d": args["d"][:0], "a": args["a"][:0], "scale_a": args["scale_a"][:, :0].contiguous(),
             "grouped_layout": args["grouped_layout"][:0]}
    launcher()(**args)


def test_padding_inside_a_tile_is_left_alone():
    args = problem()
    args["grouped_layout"] = args["grouped_layout"].clone()
    args["grouped_layout"][5:9] = -1
    launcher()(**args)
    assert (args["d"][5:9] == 7).all() and not (args["d"][:5] == 7).all() and not (args["d"][9:] == 7).all(0).any()


# ---- signatures ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "names"), [
    ("contiguous", "d a b scale_a scale_b grouped_layout M n k num_groups stream"),
    ("masked", "d a b scale_a scale_b masked_m max_m n k num_groups stream")])
def test_signatures(layout, names):
    factory = inspect.signature(FACTORIES[layout]).parameters
    assert all(p.kind is p.KEYWORD_ONLY for p in factory.values())
    assert {n: p.default for n, p in factory.items() if p.default is not p.empty} == dict(
        tile_m=128, tile_n=128, tile_k=128, scale_block_k=128, scale_block_n=128, out_dtype="bf16", waves_per_eu=None)
    assert list(factory)[:3] == ["n", "k", "num_groups"]
    assert " ".join(inspect.signature(launcher(layout)).parameters) == names
    assert launcher(layout) is launcher(layout)


# ---- shuffling -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (3, 32, 64), (2, 2, 16, 128), (0, 16, 32)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_shuffle_round_trip(shape, dtype):
    x = torch.randint(0, 120, shape, dtype=torch.uint8).view(dtype)
    kept = x.clone()
    y = flydsl.shuffle_weight(x)
    assert y.shape == x.shape and y.dtype == dtype and y.is_contiguous()
    for got in (flydsl.unshuffle_weight(y), flydsl.unshuffle_weight(flydsl.shuffle_weight(x.mT.contiguous().mT))):
        assert torch.equal(got.view(torch.uint8), kept.view(torch.uint8))


def test_shuffle_order():
    """Sixteen rows by sixteen columns lie together, then the next sixteen columns, then the next 32 columns."""
    n, k = 32, 64
    x = torch.arange(n * k).remainder(251).to(torch.uint8).view(n, k)
    y, at = flydsl.shuffle_weight(x).flatten().tolist(), 0
    for row, column, half in ((r, c, h) for r in range(0, n, 16) for c in range(0, k, 32) for h in (0, 16)):
        for r in range(row, row + 16):
            assert y[at : at + 16] == x[r, column + half : column + half + 16].tolist()
            at += 16


@pytest.mark.parametrize(("x", "layout", "error", "match"), [
    (torch.zeros(16, 32), (16, 16), Unsupported, "float32"), (torch.zeros(16, 32).byte(), (32, 16), Unsupported, "32, 16"),
    (torch.zeros(8, 32).byte(), (16, 16), ValueError, r"got \(8, 32\)"), (torch.zeros(16, 48).byte(), (16, 16), ValueError, "K of 32"),
    (torch.zeros(32).byte(), (16, 16), ValueError, "got")])
def test_shuffle_refuses(x, layout, error, match):
    for f in (flydsl.shuffle_weight, flydsl.unshuffle_weight):
        with pytest.raises(error, match=match):
            f(x, layout)


def test_e8m0_bytes():
    x = torch.tensor([2.0**-126, 0.75, 1.0, 1.5, 0.0, 2.0**127, -3.0])
    assert flydsl.fp32_to_e8m0(x).tolist() == [2.0**-126, 1.0, 1.0, 2.0, 2.0**-126, 2.0**127, 4.0]
    assert flydsl.fp32_e8m0_to_byte(flydsl.fp32_to_e8m0(x)).tolist() == [1, 127, 127, 128, 1, 254, 129]
    with pytest.raises(TypeError, match="float32"):
        flydsl.fp32_e8m0_to_byte(x.half())


# ---- weights that stay, change and go --------------------------------------------------------------------------------


@pytest.fixture
def copies(monkeypatch):
    """Every un-shuffling of a launch is counted."""
    made = []
    plain = weights._unshuffle

    def count(b, out):
        made.append(b.data_ptr())
        return plain(b, out)

    monkeypatch.setattr(weights, "_unshuffle", count)
    return made


def run(args, b=None, layout="contiguous"):
    args = {**args, "d": torch.full_like(args["d"], 7)} | ({} if b is None else {"b": b})
    launcher(layout)(**args)
    return args["d"]


def test_one_copy_for_all_views_and_launchers(copies):
    args = problem()
    want = run(args)
    for b in (args["b"].view(-1), args["b"].view(torch.int8), as_bytes(args["b"]), args["b"].detach()):
        assert torch.equal(run(args, b), want)
    launcher(out_dtype="f16")(**{**args, "d": args["d"].half()})
    assert len(copies) == 1


@pytest.mark.parametrize("how", ["copy_", "view", "row", "out"])
def test_changed_in_place(copies, how):
    args = problem()
    before = run(args)
    address = weights.plain_weight(args["b"], (2, 128, 256)).data_ptr()
    b, other = args["b"].view(torch.uint8), flydsl.shuffle_weight(problem(m=384)["b"].view(torch.uint8) ^ 0x80)
    if how == "copy_":
        b.copy_(other)
    elif how == "view":
        b.view(-1)[: b.numel() // 2].copy_(other.view(-1)[: b.numel() // 2])
    elif how == "row":
        b[1, 3].zero_()
    else:
        torch.bitwise_xor(b, 0x80, out=b)
    after = run(args)
    assert not torch.equal(after, before) and torch.equal(after, run(args, args["b"].clone()))
    assert weights.plain_weight(args["b"], (2, 128, 256)).data_ptr() == address, "graphs read it there"
    assert len(copies) == 3


def test_reallocated(copies):
    """New weights again and again at an address that was just freed, and each is read."""
    args = problem()
    first = args.pop("b").view(torch.uint8)
    seen = set()
    for i in range(6):
        b = first.clone()
        b[:, :, : 32 * i] ^= 0x80
        seen.add(b.data_ptr())
        fresh = flydsl.unshuffle_weight(b)
        assert torch.equal(weights.plain_weight(b, (2, 128, 256)).view(torch.uint8), fresh)
        run(args, b)
        del b
        gc.collect()
        assert not weights._storages, "the copy goes with its weight"
    assert len(copies) == 6 + 6  # one more by unshuffle_weight


def test_an_entry_of_another_storage_does_not_count():
    """As if y had come to lie where x was, and x's copies were still known there."""
    x, y = (torch.zeros(16, 32, dtype=torch.uint8) + i for i in (1, 2))
    shape = (1, 16, 32)
    weights.plain_weight(x, shape)
    stale = weights._storages[y.untyped_storage()._cdata] = weights._storages[x.untyped_storage()._cdata]
    stale.copies[y.data_ptr(), shape] = stale.copies[x.data_ptr(), shape]
    assert (weights.plain_weight(y, shape).view(torch.uint8) == 2).all()
    address = x.untyped_storage()._cdata
    weights._storages[address] = weights._storages[y.untyped_storage()._cdata]
    del x, stale
    gc.collect()
    assert address in weights._storages, "x's callback drops x's entry alone"


def test_two_weights_in_one_storage(copies):
    args = problem()
    both = torch.stack([args["b"].view(torch.uint8), args["b"].view(torch.uint8) ^ 0x80])
    for _ in range(2):
        assert torch.equal(run(args, both[0]), run(args)) and torch.equal(run(args, both[1]), -run(args))
    assert len(copies) == 3


def test_storage_exchanged_under_the_tensor():
    args = problem()
    b = torch.nn.Parameter(args["b"].view(torch.uint8).clone(), requires_grad=False)
    want = run(args, b)
    b.data = args["b"].view(torch.uint8) ^ 0x80
    assert torch.equal(run(args, b), -want)


def test_refresh_after_writes_that_torch_does_not_see():
    args = problem()
    want = run(args)
    b = args["b"].view(torch.uint8)
    b.data.bitwise_xor_(0x80)
    flydsl.refresh_weight(b[:1])
    assert torch.equal(run(args), -want)
    flydsl.refresh_weight(torch.zeros(16))  # unknown: nothing happens


def flip(b):
    """Change the sign of every element, in place, as torch sees it."""
    b.copy_((b.view(torch.uint8) ^ 0x80).view(b.dtype))


def test_inference_mode(copies):
    """Views of a normal tensor keep its counter there; tensors and dtype views made there have none."""
    args = problem()
    with torch.inference_mode():
        want = run(args)
        flip(args["b"])
        assert torch.equal(run(args, args["b"].view(-1)), -want) and len(copies) == 2
        made = args["b"].clone()
    flip(args["b"])
    assert torch.equal(run(args), want) and len(copies) == 3
    with pytest.warns(UserWarning, match="freeze_weight") as caught:
        assert torch.equal(run(args, made), -want)
    assert caught[0].filename == __file__
    with torch.inference_mode():
        flip(made)
        assert torch.equal(run(args, made), want) and torch.equal(run(args, args["b"].view(torch.int8)), want)
    assert len(copies) == 6


@pytest.mark.parametrize("made_inside", [True, False])
def test_frozen_in_inference_mode(copies, made_inside):
    args = problem()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("error")
        b = args["b"].clone() if made_inside else args["b"]
        flydsl.freeze_weight(b)
        want = run(args, b)
        for _ in range(3):
            assert torch.equal(run(args, as_bytes(b)), want)
        assert len(copies) == 1
        b.view(torch.uint8).bitwise_xor_(0x80)
        flydsl.refresh_weight(b.view(torch.int8))
        assert torch.equal(run(args, as_bytes(b)), -want) and len(copies) == 2
    del b, args
    gc.collect()
    assert not weights._storages


# ---- what is refused -------------------------------------------------------------------------------------------------

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


# ---- hints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "masked"])
def test_waves_per_eu_is_ignored_with_one_warning(layout):
    args = problem(layout)
    want = run(args, layout=layout)
    with pytest.warns(UserWarning, match="waves_per_eu=2 has no effect") as caught:
        launch = launcher(layout, waves_per_eu=2)
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FACTORIES[layout].cache_clear()
        launcher(layout, waves_per_eu=2)
        launch(**args)
    assert torch.equal(args["d"], want)


def test_tiles_that_the_kernel_lacks_are_ignored_with_one_warning():
    args = problem()
    want = run(args)
    with pytest.warns(UserWarning, match=r"tile_m=64, tile_n=128, tile_k=128 has no effect: reference can't") as caught:
        launcher(tile_m=64)(**args)
    assert len(caught) == 1 and caught[0].filename == __file__ and torch.equal(args["d"], want)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        launcher(tile_m=64)(**args)


@pytest.mark.parametrize(("layout", "tiles", "honoured"), [
    ("contiguous", (64, 128, 128), True), ("masked", (64, 128, 128), True), ("contiguous", (32, 128, 128), True),
    ("contiguous", (96, 128, 128), False), ("contiguous", (128, 256, 128), False), ("masked", (128, 128, 256), False)])
def test_tiles_are_passed_where_the_kernel_can(monkeypatch, layout, tiles, honoured):
    """On an imagined device: what the op is called with, and that it selects that kernel with those tiles."""
    from narrowgemm.compat.flydsl import factories
    from narrowgemm.ops import common, grouped

    n = k = 512
    args = problem(layout, 2048, n, k)
    monkeypatch.setenv("NARROWGEMM_ARCH", "mi350x")
    seen = []
    monkeypatch.setattr(factories, "grouped_gemm", lambda *args, **options: seen.append((args, options)))
    options = dict(zip(("tile_m", "tile_n", "tile_k"), tiles))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        launcher(layout, n, k, **options)(**args)
        launcher(layout, n, k)(**args)
    assert [bool(c) for c in caught] == [True] * (not honoured)
    plans = []
    for operands, given in seen:
        assert given.pop("zero_padding") is False
        out = given.pop("out")
        plans.append(grouped.plan_of(*operands, out, out.dtype, False, False, common.Options(**given)))
    assert bool(seen[0][1]) == honoured and not seen[1][1]
    assert all(p.kernel == "triton.fp8_block" for p in plans)
    c = plans[0].config
    assert ((c.block_m, c.block_n, c.block_k) == tiles) == honoured


# ---- on a device -----------------------------------------------------------------------------------------------------


@GPU
@pytest.mark.parametrize("kind", ["torch", "handle", "null", "none"])
def test_stream(kind):
    """Work goes to the stream that is given: behind a long one there, and not before it."""
    args = problem(device="cuda")
    want = run(args)
    other = torch.cuda.default_stream() if kind == "null" else torch.cuda.Stream()
    a, d = torch.zeros_like(args["a"]), torch.full_like(args["d"], 7)
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(100_000_000)
        a.view(torch.uint8).copy_(args["a"].view(torch.uint8))
    stream = {"torch": other, "handle": other.cuda_stream, "null": 0, "none": None}[kind]
    with torch.cuda.stream(other if kind == "none" else torch.cuda.Stream()):
        here = torch.cuda.current_stream()
        launcher()(**{**args, "a": a, "d": d, "stream": stream})
        assert torch.cuda.current_stream() == here
    torch.cuda.synchronize()
    assert torch.equal(d, want)


@GPU
@pytest.mark.parametrize("known", [True, False])
def test_graph(known):
    """A captured launch reads the copy; of an unknown weight it un-shuffles in the graph, and keeps no copy of that."""
    args, warm = problem(device="cuda"), problem(device="cuda")
    want = run(warm)
    if known:
        run(args)
    graph, d = torch.cuda.CUDAGraph(), torch.full_like(args["d"], 7)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.cuda.graph(graph):
            launcher()(**{**args, "d": d})
    assert bool(caught) != known
    assert (weights._entry(args["b"]) is not None) == known
    graph.replay()
    assert torch.equal(d, want)
    args["b"].view(torch.uint8).bitwise_xor_(0x80)
    if known:
        flydsl.refresh_weight(args["b"])
    graph.replay()
    assert torch.equal(d, -want)


@GPU
@pytest.mark.parametrize(("layout", "tile_m"), [("contiguous", 64), ("masked", 64), ("contiguous", 128)])
def test_tiles_on_the_device(layout, tile_m):
    args = problem(layout, 1024, 512, 512, device="cuda")
    launcher(layout, 512, 512)(**args)
    want = args["d"].clone()
    launcher(layout, 512, 512, tile_m=tile_m)(**args)
    assert calc_diff(args["d"].float(), want.float()) < 5e-6
