"""The Hopper prefill kernel for narrow weights, its host part: what it takes, its configs, workspace, widths and the choice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from narrowgemm.arch import get_arch
from narrowgemm.formats import BF16, FP8_ROW, FP16, MXFP4, MXFP8, Format, FP8_1x128
from narrowgemm.kernels.gluon.sm90 import narrow, narrow_fp8_model, narrow_prefill, narrow_prefill_model
from narrowgemm.kernels.gluon.sm90.narrow_prefill_tile import BOXES, COLUMNS, FP8_WIDTHS, WIDTHS, Tile
from narrowgemm.ops.explain import describe, explain
from narrowgemm.prepack_bits import FP8_PREPACK, PREPACK
from narrowgemm.problem import Config, Epilogue, Operand, Problem
from narrowgemm.runtime import dispatch
from narrowgemm.tuning.store import table_name

ARCH = get_arch("h200")
PLAIN = Epilogue()


def problem(m: int = 16384, n: int = 2880, k: int = 2880, groups: int = 128, layout: str = "offsets", b: Format = MXFP4, pair: str = "",
            epilogue: Epilogue = PLAIN) -> Problem:
    return Problem("gemm" if layout == "dense" else "routed_gemm" if epilogue != PLAIN else "grouped_gemm", layout, m, n, k, groups,
                   Operand(BF16), Operand(b, prepack=f"{PREPACK}:{pair}" if pair else PREPACK, scale_dtype="e8m0"),
                   rows=-(-m // groups), epilogue=epilogue)


@pytest.mark.parametrize("change, reason", [
    (dict(layout="routed", op="routed_gemm"), "routed layout"),
    (dict(b=Operand(MXFP4, scale_dtype="e8m0")), "prepack"),
    (dict(b=Operand(MXFP4, prepack=f"{PREPACK}:halves", scale_dtype="e8m0")), "activation"),
    (dict(a=Operand(MXFP8, scale_dtype="fp32")), "E8M0|BF16"),
    (dict(accumulate=True), "accumulation"),
    (dict(epilogue=Epilogue(activation="swiglu")), "pair"),
])
def test_says_what_it_does_not_take(change: dict, reason: str) -> None:
    import re

    assert narrow_prefill.supports(problem(), ARCH) is None
    said = narrow_prefill.supports(replace(problem(), **change), ARCH)
    assert said is not None and re.search(reason, said)
    assert "sm90" in (narrow_prefill.supports(problem(), get_arch("gfx950")) or "")


@pytest.mark.parametrize("b", [MXFP4, MXFP8], ids=lambda f: f.name)
@pytest.mark.parametrize("epilogue", [Epilogue(), Epilogue(True, "swiglu_oai", (1.702, 7.0), True, True), Epilogue(combine=True)],
                         ids=["plain", "activation", "combine"])
def test_every_shape_fits(b: Format, epilogue: Epilogue) -> None:
    p = problem(b=b, pair="interleaved" if epilogue.activation else "", epilogue=epilogue)
    found = narrow_prefill.configs(p, ARCH)
    assert {(c.block_m, c.block_n) for c in found} == {(t, 128 * u) for t, u in narrow_prefill.SHAPES if t > 32 or b == MXFP4}
    assert all(narrow_prefill.tile_of(p, c, True, True).shared_bytes <= ARCH.smem for c in found)


@pytest.mark.parametrize("change, reason", [
    (dict(block_m=48), "tile"), (dict(block_n=192), "tile"), (dict(block_k=64), "tile"), (dict(num_warps=8), "9 warps"),
    (dict(split_k=2), "split_k"), (dict(num_stages=14), "shared memory"), (dict(num_stages=1), "stages"), (dict(extra=(("unroll", 3),)), "unroll"),
])
def test_illegal_configs(change: dict, reason: str) -> None:
    good = narrow_prefill.configs(problem(), ARCH)[0]
    assert narrow_prefill.legal(problem(), good, ARCH) is None
    assert reason in (narrow_prefill.legal(problem(), replace(good, **change), ARCH) or "")


@pytest.mark.parametrize("b", [MXFP4, MXFP8], ids=lambda f: f.name)
def test_tiles_that_hang_with_scales_of_tokens_are_refused(b: Format) -> None:
    """With FP32 scales of A two units of E2M1 a consumer were seen to hang: neither offered nor taken."""
    p = replace(problem(b=b), a=Operand(FP8_1x128, scale_dtype="fp32", scale_major="mn"))
    taken = narrow_prefill.PROMOTED[b.element]
    assert {(c.block_m, c.block_n // 128) for c in narrow_prefill.configs(p, ARCH)} == set(taken)
    for c in narrow_prefill.configs(problem(b=b), ARCH):
        said = narrow_prefill.legal(p, c, ARCH)
        assert (said is None) == ((c.block_m, c.block_n // 128) in taken) and (said is None or "FP32 scales" in said)


def for_fp8(**kw: object) -> Problem:
    p = problem(**kw)  # type: ignore[arg-type]
    return replace(p, a=Operand(FP8_1x128, scale_dtype="fp32", scale_major="mn"), b=replace(p.b, prepack=FP8_PREPACK, folds=True))


def test_weights_packed_for_fp8() -> None:
    """FP8 1x128 tokens go with them, which the kernel for few tokens leaves to this one, and BF16 ones; every tile fits."""
    p = for_fp8()
    assert narrow_prefill.supports(p, ARCH) is None
    assert narrow_prefill.supports(replace(p, a=Operand(FP8_1x128, scale_dtype="e8m0")), ARCH) is None
    bf16 = replace(p, a=Operand(BF16))
    assert narrow_prefill.supports(bf16, ARCH) is None and narrow.supports(bf16, ARCH) is None
    for a in (Operand(FP16), Operand(MXFP4, scale_dtype="e8m0"), Operand(MXFP8, scale_dtype="e8m0")):
        for kernel in (narrow, narrow_prefill):
            assert "BF16" in (kernel.supports(replace(p, a=a), ARCH) or "")
    assert FP8_PREPACK in (narrow.supports(p, ARCH) or "")
    found = narrow_prefill.configs(p, ARCH)
    shapes = {(t, 2 * u) for t, u in (*narrow_prefill.FP8_SHAPES, narrow_prefill.FP8_PAIR)}
    assert {(c.block_m, c.block_n // 64) for c in found} == shapes | set(narrow_prefill.FP8_COLUMNS) - set(narrow_prefill.OF_ROWS)
    assert {c.block_m for c in found} == {*FP8_WIDTHS, *COLUMNS} - {288}
    assert [dict(c.extra) for c in found if c.extra] == [{"box": 2}, {"box": 2}, {"box": 2}, {"box": 2, "ctas": 2}]
    for slots, factor in ((False, False), (True, True)):
        tiles = [narrow_prefill.tile_of(p, c, slots, factor) for c in found]
        assert all(t.FP8 and not t.CHUNKED and not t.XFACTOR and t.shared_bytes <= ARCH.smem for t in tiles)
    assert all(bool(c.option("bf16")) != narrow_prefill.tile_of(bf16, c).TWO for c in narrow_prefill.configs(bf16, ARCH))
    wide = [c for c in narrow_prefill.configs(bf16, ARCH) if c.option("bf16")]
    two = {(c.block_m, c.block_n // 128) for c in narrow_prefill.configs(bf16, ARCH) if c not in wide}
    assert two == {*narrow_prefill.TWO_SHAPES, narrow_prefill.FP8_PAIR} and len(wide) == len(narrow_prefill.WIDE_SHAPES)
    for c in wide:      # weights become BF16, and no FP8 tokens go with that
        assert narrow_prefill.tile_of(bf16, c).NIBBLES and "bf16=1" in (narrow_prefill.legal(p, c, ARCH) or "")
    assert "tile" in (narrow_prefill.legal(p, narrow_prefill.configs(problem(), ARCH)[-1], ARCH) or "")
    assert narrow_prefill.regions(p, found[0], 100, 100).xfactor - narrow_prefill.regions(p, found[0], 100, 100).x < 2 * 100 * 2944


@pytest.mark.parametrize("layout, rows, blocks", [("masked", 16, 8), ("masked", 4, 8), ("masked", 2, 0), ("masked", 40, 0), ("offsets", 16, 0), ("dense", 16, 0)])
def test_weights_are_asked_for_in_front_where_groups_have_one_entry(layout: str, rows: int, blocks: int) -> None:
    """The launch in front doesn't know which groups have rows."""
    p = describe("gemm" if layout == "dense" else "grouped_gemm", layout=layout, groups=1 if layout == "dense" else 8,
                 m=128 if layout == "masked" else rows, n=7168, k=2048, a="fp8_1x128", b="mxfp4", packed="fp8", expected_m=rows)
    found = [c for c in narrow_prefill.configs(p, ARCH) if c.block_m == 32 and not c.option("bf16")]
    assert len(found) == 2 and all(narrow_prefill.touched(p, c) == blocks for c in found)


def test_rows_with_one_scale_go_with_weights_packed_for_fp8() -> None:
    """Their scale is the epilogue's, and nothing comes beside a K block; weights in the other order have no kernel for them."""
    p = replace(for_fp8(), a=Operand(FP8_ROW, scale_dtype="fp32"))
    assert narrow_prefill.supports(p, ARCH) is None and "BF16" in (narrow.supports(p, ARCH) or "")
    assert "FP8 1x128" in (narrow_prefill.supports(replace(p, b=replace(p.b, prepack=PREPACK)), ARCH) or "")
    found = narrow_prefill.configs(p, ARCH)
    others = [c for c in narrow_prefill.configs(for_fp8(), ARCH) if c not in found]
    assert {(c.block_m, c.block_n // 64) for c in others} == {x for x, (*_, piece) in narrow_prefill.FP8_COLUMNS.items()
                                                              if piece and x not in narrow_prefill.OF_ROWS}
    assert all("scales of 128" in (narrow_prefill.legal(p, c, ARCH) or "") for c in others)
    own = [c for c in found if (c.block_m, c.block_n // 64) in narrow_prefill.OF_ROWS]
    assert len(own) == len(narrow_prefill.OF_ROWS)
    for c in own:
        assert "one scale" in (narrow_prefill.legal(for_fp8(), c, ARCH) or "") and narrow_prefill.tile_of(p, c).shared_bytes <= ARCH.smem
        assert c not in narrow_prefill.configs(replace(p, layout="contiguous"), ARCH)
    for c in (c for c in found if c not in own):
        tile, other = (narrow_prefill.tile_of(x, c, False, False) for x in (p, for_fp8()))
        assert tile.ROW and tile.XFACTOR and not tile.SCALES and not other.ROW and other.SCALES
        assert tile.shared_bytes < other.shared_bytes and tile.COLUMNS == other.COLUMNS
        assert tile.UNROLL == 2 and (tile.BOX if tile.COLUMNS else 2) == other.UNROLL, "a scale for 128 of K is applied to each product"
        at, beside = (narrow_prefill.regions(x, c, 100, 100) for x in (p, for_fp8()))
        assert at.weight == at.ratios and at.size < beside.size


def test_widths_of_any_sixteens_are_for_fp8_tokens() -> None:
    """Two or three consumers of one or two units each; nothing else has these tiles, nor other numbers of warps."""
    for p in (for_fp8(), replace(for_fp8(), a=Operand(FP8_ROW, scale_dtype="fp32"))):
        found = [c for c in narrow_prefill.configs(p, ARCH) if (c.block_m, c.block_n // 64) in narrow_prefill.FP8_COLUMNS]
        row = p.a.format == FP8_ROW
        assert len(found) == sum(row if x in narrow_prefill.OF_ROWS else piece == 0 or not row
                                 for x, (*_, piece) in narrow_prefill.FP8_COLUMNS.items())
        for c in found:
            tile = narrow_prefill.tile_of(p, c)
            assert tile.COLUMNS and (tile.MP * tile.CONSUMERS, c.block_n) == (tile.UNITS, tile.BN) and c.num_warps == 4 * tile.CONSUMERS + 1
            assert tile.UNITS % tile.BOX_UNITS == 0 and tile.BOX_UNITS in (1, 2, 4) and (tile.MP == 1 or tile.PIECE > 0)
            assert f"{c.num_warps} warps" in (narrow_prefill.legal(p, replace(c, num_warps=c.num_warps + 4), ARCH) or "")
            # the tokens' ring is the largest allocation: device code takes its address from the start of shared memory
            assert tile.BOX * tile.STAGES * max(tile.UNITS * 4096, tile.XT * 128) < tile.X_BOXES * 2048
            assert tile.BT <= tile.XT and tile.XT % 32 == 0, "a slot's tokens come in boxes of 32"
            assert "tile" in (narrow_prefill.legal(replace(p, a=Operand(BF16)), c, ARCH) or "")


@pytest.mark.parametrize("piece", [0, 48, 64])
def test_products_in_turn(piece: int) -> None:
    """They cover a tile's columns, none is wider than a piece, and each sum is found once, where its product left it."""
    from narrowgemm.kernels.gluon.sm90 import narrow_columns_device as device

    def value(x: object) -> object:
        return getattr(x, "value", x)

    for widths in COLUMNS.values():
        for p in widths:
            at = [int(value(x)) for x in value(device.cuts(p, piece))]
            wide = [b - a for a, b in zip(at, at[1:], strict=False)]
            assert at[0] == 0 and at[-1] == p // 16 and all(0 < 16 * w <= (piece or p) for w in wide) and max(wide) == value(device.widest(p, piece))
            left = [(u, i) for a, b in zip(at, at[1:], strict=False) for u in range(2) for i in range(a, b)]
            assert [left[value(device.place(p, piece, 2, u, i))] for u in range(2) for i in range(p // 16)] == sorted(left)


@pytest.mark.parametrize("tokens, units", [(160, 2), (96, 3), (80, 4)])
def test_sums_of_two_k_blocks(tokens: int, units: int) -> None:
    """Where the launch in front is the one that gives ratios of scales, whatever the operands are; the last K block's is beside nothing's."""
    def tile(p: Problem) -> Tile | None:
        c = next((c for c in narrow_prefill.configs(p, ARCH) if (c.block_m, c.block_n // 64) == (tokens, units)), None)
        return c and narrow_prefill.tile_of(p, c)

    p = for_fp8(m=4096, groups=64)
    own = tile(p)
    assert own is not None and own.CHAIN and own.BOX == own.UNROLL == 2 and own.PIECE in (0, tokens)
    assert [narrow_prefill.scale_blocks(replace(p, k=k), own) for k in (512, 640, 600)] == [4, 6, 6]
    for other in (replace(p, layout="psum"), replace(p, layout="masked"), replace(p, a_div=2), replace(p, groups=300),
                  replace(p, epilogue=Epilogue(combine=True, routing_weight=True))):
        there = tile(other)
        assert (there is None) == (units == 4) and (there is None or not there.CHAIN)
    assert not any(narrow_prefill.tile_of(p, c).CHAIN for c in narrow_prefill.configs(p, ARCH) if (c.block_m, c.block_n // 64) == (144, 4))


def test_tiles_of_two_units_share_scales() -> None:
    """What brings them holds tiles of many columns, so two units a consumer are chosen where one tile has an expert's rows."""
    def shape(tokens: int) -> tuple[int, int]:
        p = for_fp8(m=8 * tokens, n=4096, k=7168, groups=256)
        c = min(narrow_prefill.configs(p, ARCH), key=lambda c: narrow_fp8_model.estimate(p, c, ARCH))
        return c.block_m, c.block_n // 64

    assert [shape(t) for t in (2048, 4096, 8192)] == [(80, 4), (144, 4), (144, 4)]


@pytest.mark.parametrize("n, k, tokens, tile", [(4096, 7168, 1024, (96, 128)), (4096, 7168, 2048, (96, 192)), (4096, 7168, 4096, (160, 128)),
                                                (4096, 7168, 8192, (288, 128)), (7168, 2048, 1024, (96, 128)), (7168, 2048, 2048, (96, 192)),
                                                (7168, 2048, 4096, (160, 128)), (7168, 2048, 8192, (160, 128))])
def test_tiles_of_tokens_with_one_scale(tokens: int, tile: tuple[int, int], n: int, k: int) -> None:
    """With 32 or 64 rows an expert most are in 96 columns, and 192 rows of weights share 64; with 256 one tile holds an expert's, and its weights are expanded once: slower to
    store, which counts where K is short."""
    p = replace(for_fp8(m=8 * tokens, n=n, k=k, groups=256), a=Operand(FP8_ROW, scale_dtype="fp32"))
    c = min(narrow_prefill.configs(p, ARCH), key=lambda c: narrow_fp8_model.estimate(p, c, ARCH))
    assert (c.block_m, c.block_n) == tile


def test_explain_and_tables_know_the_order() -> None:
    """`packed='fp8'` asks for it; tuned rows of the other order are not read for it."""
    sizes = {"layout": "offsets", "groups": 32, "m": 256, "n": 4096, "k": 7168, "a": FP8_1x128, "b": MXFP4}
    found = {packed: describe("grouped_gemm", **sizes, packed=packed) for packed in (True, "fp8")}
    assert found[True].b.prepack == PREPACK and found["fp8"].b.prepack == FP8_PREPACK
    assert explain("grouped_gemm", **sizes, packed="fp8", device="h200").plan.kernel == narrow_prefill.NAME
    assert table_name(found[True]) != table_name(found["fp8"])


@pytest.mark.parametrize("rows", [1, 8, 16])
def test_few_fp8_rows_are_bound_by_bytes(rows: int) -> None:
    """The kernel is chosen, and predicted at no less than three quarters of the streaming rate."""
    p = for_fp8(m=256 * rows, n=4096, k=7168, groups=256)
    plan = dispatch.select(p, ARCH)
    assert plan.kernel == narrow_prefill.NAME
    experts = min(256, 256 * rows)
    assert narrow_fp8_model.estimate(p, plan.config, ARCH) < (experts * 4096 * 7168 * 0.53125 + 256 * rows * (2 * 4096 + 7168)) / ARCH.bandwidth / 0.75


def test_a_product_that_starts_ahead_is_predicted_to() -> None:
    """Masked groups find their entries themselves; a contiguous layout waits for the launch in front, for microseconds."""
    masked = replace(for_fp8(m=128, n=7168, k=2048, groups=4), layout="masked", rows=8)
    waits = replace(masked, layout="contiguous", m=32)
    config = narrow_prefill.configs(masked, ARCH)[0]
    assert narrow_prefill.starts_ahead(masked, config) and not narrow_prefill.starts_ahead(waits, config)
    assert narrow_fp8_model.estimate(masked, config, ARCH) < narrow_fp8_model.estimate(waits, config, ARCH) - 2e-6


def test_widths_are_pieces_that_tma_brings() -> None:
    for most, widths in COLUMNS.items():
        assert all(w % 16 == 0 for w in widths) and sorted(set(widths)) == list(widths) and widths[-1] == most
        assert [narrow_fp8_model.width(r, most) for r in range(1, most + 1)] == [min(w for w in widths if w >= r) for r in range(1, most + 1)]
    for most, pairs in FP8_WIDTHS.items():
        sums = [p + q for p, q in pairs]
        assert all(p in BOXES and q in (0, *BOXES) for p, q in pairs)
        assert [narrow_fp8_model.width(r, most) for r in range(1, most + 1)] == [min(s for s in sums if s >= r) for r in range(1, most + 1)]
    for most, pairs in WIDTHS.items():
        sums = [p + q for p, q in pairs]
        assert sums == sorted(set(sums)) and sums[-1] == most
        assert all(p in BOXES and q in (0, *BOXES) for p, q in pairs)
        # an entry of any size up to the most has a width, and it holds its tokens
        assert [narrow_prefill_model.width(r, most) for r in range(1, most + 1)] == [min(s for s in sums if s >= r) for r in range(1, most + 1)]


def test_workspace_holds_everything() -> None:
    combine = problem(epilogue=Epilogue(bias=True, routing_weight=True, combine=True), n=2880, k=300)
    config = Config(128, 128, 128, 9, 4, swap_ab=True, persistent=True)
    at = narrow_prefill.regions(combine, config, 16384, 16384)
    assert list(at) == sorted(at) and all(x % 256 == 0 for x in at)
    assert at.live - at.table >= 4 * (16 + 3 * (16384 // 128 + 128)) and at.x - at.live >= 16384
    assert at.xfactor - at.x >= 2 * 16384 * 384 and at.y - at.weight >= 4 * 16384 and at.size - at.y >= 4 * 16384 * 2880
    assert narrow_prefill.workspace(combine, config) == at.size
    masked = replace(problem(layout="masked", groups=8), m=100, rows=60)
    assert narrow_prefill.regions(masked, config, 800, 800).live >= 4 * (16 + 3 * 8)


def test_fp32_scales_of_activations() -> None:
    p = replace(problem(), a=Operand(FP8_1x128, scale_dtype="fp32"))
    assert narrow_prefill.supports(p, ARCH) is None
    for c in narrow_prefill.configs(p, ARCH):
        tile = narrow_prefill.tile_of(p, c, True, True)
        assert tile.CHUNKED and tile.XFACTOR and tile.shared_bytes <= ARCH.smem
        at = narrow_prefill.regions(p, c, p.m, p.m)
        assert at.weight - at.ratios >= 16 * p.m * 23 and at.ratios - at.xfactor >= 4 * p.m
    assert {(c.block_m, c.block_n // 128) for c in narrow_prefill.configs(p, ARCH)} == set(narrow_prefill.PROMOTED["e2m1"])


def test_a_routed_layout_has_room_for_its_padding() -> None:
    """4096 slots in blocks of 64 for 128 experts: up to 12160 positions are gathered, and the output has 4096 rows."""
    slots = replace(problem(4096, layout="routed", epilogue=Epilogue(routing_weight=True, combine=True)), positions=12288)
    assert narrow_prefill.supports(slots, ARCH) is None
    config = Config(128, 128, 128, 9, 4, swap_ab=True, persistent=True)
    at = narrow_prefill.regions(slots, config, 4096, 12160)
    assert at.xfactor - at.x >= 2 * 12160 * 2944 and at.y - at.weight >= 4 * 12160 and 4 * 4096 * 2880 <= at.size - at.y < 4 * 5000 * 2880
    assert narrow_prefill.workspace(slots, config) >= at.size


def test_many_tokens_choose_it_and_few_do_not() -> None:
    for m, kernel in ((4 * 4096, narrow_prefill.NAME), (4 * 16, "gluon_sm90.narrow")):
        assert dispatch.select(problem(m), ARCH).kernel == kernel
    # eight rows an expert, or two where weights are long; what the kernel for few tokens is better at is fewer
    assert dispatch.select(problem(4 * 256, n=5760), get_arch("h100")).kernel == narrow_prefill.NAME
    assert dispatch.select(problem(4 * 16, n=5760), get_arch("h100")).kernel == "gluon_sm90.narrow"
    # sixteen rows an expert: narrow tiles; hundreds: wide ones
    few = min(narrow_prefill.configs(problem(2048), ARCH), key=lambda c: narrow_prefill.estimate(problem(2048), c, ARCH))
    many = min(narrow_prefill.configs(problem(65536), ARCH), key=lambda c: narrow_prefill.estimate(problem(65536), c, ARCH))
    assert few.block_m == 32 and many.block_m == 192


def test_weights_of_few_groups_pass_through_l2() -> None:
    """Where they are up to three times as large as it, and tokens are few: not a dense product's, which another call may find there."""
    def pair(**kw: object) -> dict[str, object]:
        return next(dict(c.extra) for c in narrow_prefill.configs(for_fp8(**kw), ARCH) if c.option("ctas"))

    few = dict(m=64, n=7168, k=2048, layout="masked")
    assert pair(groups=8, **few) == {"box": 2, "ctas": 2, "stream": 1}
    assert pair(groups=32, **few) == pair(m=64, n=7168, k=2048, groups=1, layout="dense") == {"box": 2, "ctas": 2}


def test_what_is_told_of_tiles_lies_behind_the_largest_ring() -> None:
    """Behind the weights' barriers of a ring that is the largest allocation, or behind the tokens."""
    fp8 = [replace(for_fp8(), a=a) for a in (Operand(FP8_1x128, scale_dtype="fp32"), Operand(FP8_ROW, scale_dtype="fp32"), Operand(BF16))]
    for p in (*fp8, problem(), problem(b=MXFP8)):
        for c in narrow_prefill.configs(p, ARCH):
            tile = narrow_prefill.tile_of(p, c)
            of_token, weights = 128 if tile.FP8 and not tile.TWO else 256, tile.UNITS * tile.WEIGHT_ROWS * 1024
            more = weights - max(tile.T0, tile.T1) * of_token
            assert (not tile.COLUMNS and (more > 0 or (more == 0 and tile.FP8))) == tile.RING, c
            slot = weights if tile.RING else (tile.XT if tile.COLUMNS else tile.T0) * of_token
            assert tile.STAGES * tile.BOX * slot + (128 if tile.RING else 0) == tile.TOLD_AT
            assert not tile.RING or 8 * tile.STAGES <= 128, "the weights' barriers"
            assert tile.STAGES + 2 <= 16, "16 tiles are told of: a ring's slots may all be of others"


def test_rings_that_are_refused() -> None:
    """Slots of several K blocks where products are in pieces, or trips are of others; a ring of tokens in front of the weights'."""
    p = for_fp8()
    found = narrow_prefill.configs(p, ARCH)
    pair = next(c for c in found if c.option("ctas"))
    columns, wide, pieces = (next(c for c in found if c.block_m == t) for t in (96, 128, 144))

    def said(config: Config, **extra: int) -> str:
        return narrow_prefill.legal(p, replace(config, extra=tuple(sorted((dict(config.extra) | extra).items()))), ARCH) or ""

    assert "box=4" in said(pair, box=4) and "box=2" in said(pair, unroll=4) and "box=2" in said(pieces, box=2)
    assert said(columns, box=1) == ""
    assert "stream" in said(wide, stream=1) and "stream" in said(columns, stream=1) and said(pair, stream=1) == ""
    assert "box=2" in (narrow_prefill.legal(problem(), replace(narrow_prefill.configs(problem(), ARCH)[0], extra=(("box", 2), )), ARCH) or "")
