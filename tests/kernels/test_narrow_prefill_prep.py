"""The launch in front of the Hopper prefill kernel for narrow weights: entries, gathered rows in the weights' order, what goes with them."""

from __future__ import annotations

import pytest
import torch

from narrowgemm.formats import MXFP4, MXFP8, FP8_1x128
from narrowgemm.kernels.gluon.sm90 import narrow_tile
from narrowgemm.kernels.gluon.sm90.narrow_prefill import FP8_ORDER, NIBBLE_ORDER, PREP_K, ROW_ORDER, TWO_ORDER, PrepStatic
from narrowgemm.kernels.gluon.sm90.narrow_tile import KINDS, TABLE_HEAD
from narrowgemm.reference.quantize import dequantize, quantize
from narrowgemm.scales import e8m0_to_float

BT, K, A_DIV = 64, 200, 2


def weight_order(x: torch.Tensor) -> torch.Tensor:
    """[R, K] as the expanded weights have it, zeros up to the next 128: out[m * 8 + q * 2 + r] = in[q * 32 + m * 2 + r]."""
    rows, k = x.shape
    out = torch.zeros(rows, -(-k // 128) * 128, dtype=x.dtype, device=x.device)
    out[:, :k] = x
    return out.view(rows, -1, 4, 16, 2).permute(0, 1, 3, 2, 4).reshape(rows, -1)


def run(device: str, kind: str, xkind: int, x: torch.Tensor, xs: torch.Tensor | None, index: torch.Tensor, slots: torch.Tensor | None,
        weight: torch.Tensor | None, groups: int, positions: int, num_slots: int, group: int = 32,
        blocks: tuple[torch.Tensor, torch.Tensor, int] | None = None, by_k: bool = False) -> dict[str, torch.Tensor]:
    """`blocks`: experts, positions in use and positions a block of the routed layout."""
    from narrowgemm.kernels.gluon.sm90.narrow_prefill_prep_device import narrow_prefill_prep_kernel as kernel

    total = positions * (groups if kind == "masked" else 1)
    kx = -(-K // 128) * 128
    wide = 2 * kx if xkind in (4, TWO_ORDER) else kx
    cap = total // BT + (total if blocks else groups)
    payload = torch.float8_e4m3fn if xkind in (FP8_ORDER, ROW_ORDER, TWO_ORDER) else torch.bfloat16
    out = {"x": torch.full((total, wide), 7.0, device=device).to(payload), "factor": torch.full((total,), 7.0, device=device),
           "weight": torch.full((total,), 7.0, device=device), "live": torch.full((num_slots,), 9, dtype=torch.int8, device=device),
           "table": torch.full((TABLE_HEAD + 3 * cap,), -9, dtype=torch.int32, device=device)}
    experts, posted, block_m = blocks or (index, index, 1)
    cfg = PrepStatic(KINDS[kind], BT, 8, xkind, group, slots is not None, PREP_K, slots is not None, weight is not None, block_m,
                     BY_K=by_k)
    order = index if slots is None else slots
    scale, ssm, ssk = (x, 0, 0) if xs is None else (xs, xs.stride(0), xs.stride(1))
    sxg, ssg = (positions * x.stride(0), positions * ssm) if kind == "masked" else (0, 0)
    out["ratios"] = torch.full((kx // 128, total, 4) if by_k else (total, kx // 128, 4), 7.0, device=device)
    share = 2
    kernel[(1 + (groups * share if kind == "masked" else total),)](x, scale, out["x"], out["factor"], out["ratios"], out["weight"] if weight is None else weight, out["weight"], index, order,
                         order if blocks is None else experts, order if blocks is None else posted, out["table"], out["live"], x, x, K, kx,
                         sxg, x.stride(0), ssg, ssm, ssk, groups, num_slots, positions, block_m, cap,
                         A_DIV if slots is not None else 1, share, 1, cfg)
    if by_k:
        out["ratios"] = out["ratios"].transpose(0, 1)
    out["entries"] = out["table"][TABLE_HEAD:].view(3, cap)[:, :int(out["table"][0])].t()
    return out


def expected_entries(bounds: list[tuple[int, int]]) -> list[list[int]]:
    return [[e, a + i, min(BT, b - a - i)] for e, (a, b) in enumerate(bounds) for i in range(0, b - a, BT)]


def test_gathers_by_slot(device: str) -> None:
    g = torch.Generator().manual_seed(0)
    sizes = [3, 0, 70, 5]
    r = sum(sizes)
    index = torch.tensor([0, 3, 3, 73, 78], dtype=torch.int64, device=device)
    slots = torch.randperm(r, generator=g).int()
    slots[4], slots[9] = -1, r      # nobody's
    slots = slots.to(device)
    x = torch.randn(-(-r // A_DIV), K, generator=g).bfloat16().to(device)
    weight = torch.randn(r, generator=g).to(device)
    got = run(device, "offsets", 0, x, None, index, slots, weight, 4, r, r)
    assert got["entries"].tolist() == expected_entries([(0, 3), (3, 3), (3, 73), (73, 78)])
    ok = (slots >= 0) & (slots < r)
    where = slots[ok].long()
    assert torch.equal(got["x"][ok], weight_order(x[where // A_DIV]))
    assert torch.equal(got["weight"][ok], weight[where])
    assert bool((got["x"][~ok] == 7).all())
    live = torch.zeros(r, dtype=torch.int8, device=device)
    live[where] = 1
    assert torch.equal(got["live"], live)


def test_blocks_of_a_routed_layout(device: str) -> None:
    """Padding, inside blocks, behind those in use and in blocks of nobody's, is neither listed nor gathered."""
    slots = torch.tensor([4, 1, 6, 6, 0, 6, 6, 6, 3, 2, 5, 6, 1, 1, 1, 1], dtype=torch.int32, device=device)      # 6: padding
    experts = torch.tensor([2, 0, 2, 1], dtype=torch.int32, device=device)
    posted = torch.tensor([12], dtype=torch.int32, device=device)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(3)).bfloat16().to(device)
    got = run(device, "routed", 0, x, None, slots, slots, None, 2, 16, 6, blocks=(experts, posted, 4))
    assert got["entries"].tolist() == [[0, 4, 1]]       # of two experts: expert 2 is out of range
    held = torch.tensor([0, 1, 4, 8, 9, 10], device=device)
    assert torch.equal(got["x"][held], weight_order(x[slots[held].long() // A_DIV]))
    assert bool((got["x"][[2, 3, 5, 6, 7, 11]] == 7).all())
    assert got["live"].tolist() == [1, 0, 0, 0, 0, 0]
    got = run(device, "routed", 0, x, None, slots, slots, None, 3, 16, 6, blocks=(experts, posted, 4))
    assert got["entries"].tolist() == [[2, 0, 2], [0, 4, 1], [2, 8, 3]] and got["live"].tolist() == [1] * 6


def test_positions_behind_the_last_group_are_left_alone(device: str) -> None:
    x = torch.randn(9, K, generator=torch.Generator().manual_seed(5)).bfloat16().to(device)
    slots = torch.arange(18, dtype=torch.int32, device=device).flip(0)
    got = run(device, "offsets", 0, x, None, torch.tensor([0, 2, 5], device=device), slots, None, 2, 18, 18)
    assert torch.equal(got["x"][:5], weight_order(x[slots[:5].long() // A_DIV])) and bool((got["x"][5:] == 7).all())


@pytest.mark.parametrize("kind", ["dense", "masked"])
def test_positions_are_rows(device: str, kind: str) -> None:
    x = torch.randn(6, K, generator=torch.Generator().manual_seed(1)).bfloat16().to(device)
    index = torch.tensor([2, 0, 3], dtype=torch.int32, device=device) if kind == "masked" else torch.zeros(1, dtype=torch.int32, device=device)
    groups, positions = (3, 2) if kind == "masked" else (1, 6)
    got = run(device, kind, 0, x, None, index, None, None, groups, positions, 6)
    # a masked size past what a group can hold is cut
    assert got["entries"].tolist() == ([[0, 0, 2], [2, 4, 2]] if kind == "masked" else [[0, 0, 6]])
    used = torch.tensor([0, 1, 4, 5] if kind == "masked" else range(6), device=device)
    assert torch.equal(got["x"][used], weight_order(x)[used])
    assert kind == "dense" or bool((got["x"][[2, 3]] == 7).all()), "rows that a group doesn't use are not brought"


def test_programs_share_the_rows_of_a_masked_group(device: str) -> None:
    """Two programs a group, however many rows it has."""
    x = torch.randn(15, K, generator=torch.Generator().manual_seed(7)).bfloat16().to(device)
    got = run(device, "masked", 0, x, None, torch.tensor([5, -1, 1], dtype=torch.int32, device=device), None, None, 3, 5, 15)
    used = torch.tensor([*range(5), 10], device=device)
    assert torch.equal(got["x"][used], weight_order(x)[used]) and bool((got["x"][[*range(5, 10), *range(11, 15)]] == 7).all())


def test_fp16_is_two_bf16_numbers(device: str) -> None:
    """Every 128 columns in BF16, then what BF16 leaves of them: together exact, from the smallest subnormal to the largest."""
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(4)).half()
    x[1] = torch.linspace(-65504, 65504, K).half()
    x[2] = torch.arange(1, K + 1).to(torch.int16).view(torch.float16)       # subnormals
    x[3, :3] = torch.tensor([float("inf"), float("-inf"), 65504.0])
    got = run(device, "dense", 4, x.to(device), None, torch.zeros(1, dtype=torch.int32, device=device), None, None, 1, 5, 5)
    high, rest = got["x"].float().cpu().view(5, -1, 2, 128).unbind(2)
    want = weight_order(x.float()).view(5, -1, 128)
    assert torch.equal(high + rest, want) and torch.equal(high, want.bfloat16().float())
    assert bool(rest[4].any()) and not bool(rest[3, want[3].isinf()].any())


@pytest.mark.parametrize("fmt, xkind", [(MXFP8, 1), (MXFP4, 2)], ids=["mxfp8", "mxfp4"])
def test_narrow_rows_are_exact(device: str, fmt, xkind: int) -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(4, K, generator=g) * torch.tensor([1.0, 2.0**-100, 2.0**100, 3.0]).unsqueeze(1)
    q = quantize(torch.nn.functional.pad(x, (0, 24)), fmt)      # whole blocks of 32
    data, scale = q.data.view(torch.uint8)[:, :K // fmt.elem.per_byte], q.scale[:, :-(-K // 32)].clone()
    scale[3, 2] = 255
    want = dequantize(q)[:, :K]
    data = data.contiguous()
    data = (data if xkind == 2 else data.view(torch.float8_e4m3fn)).to(device)
    got = run(device, "dense", xkind, data, scale.to(device), torch.zeros(1, dtype=torch.int32, device=device), None, None, 1, 4, 4)
    back = got["x"].float().cpu() * got["factor"].cpu()[:, None]
    assert torch.equal(back[:3], weight_order(want)[:3])
    assert bool(got["factor"][3].isnan())


@pytest.mark.parametrize("by_k", [False, True], ids=["by position", "by K block"])
@pytest.mark.parametrize("scale_type", ["fp32", "e8m0"])
def test_fp8_rows_for_weights_packed_for_them(device: str, scale_type: str, by_k: bool) -> None:
    """Words of four of the four blocks of 32 in turn; scales as they are, of positions 1, 0, 9 and 8 further on."""
    g = torch.Generator().manual_seed(6)
    x = torch.randint(0, 120, (11, K), generator=g, dtype=torch.uint8)
    codes = torch.tensor([[0, 1], [127, 130], [255, 3], [254, 9], [100, 90], *([i, 9 * i] for i in range(6))]).byte()
    scale = torch.rand(11, 2, generator=g) if scale_type == "fp32" else codes
    got = run(device, "dense", FP8_ORDER, x.view(torch.float8_e4m3fn).to(device), scale.to(device), torch.zeros(1, dtype=torch.int32, device=device),
              None, None, 1, 11, 11, by_k=by_k)
    want = torch.zeros(11, 256, dtype=torch.uint8)
    want[:, :K] = x
    want = want.view(11, 2, 4, 8, 4).permute(0, 1, 3, 2, 4).reshape(11, 256)
    assert torch.equal(got["x"].cpu().view(torch.uint8), want)
    value = scale if scale_type == "fp32" else e8m0_to_float(scale)
    expected = torch.full((11, 2, 4), 7.0)
    for j, on in enumerate((1, 0, 9, 8)):
        expected[:11 - on, :, j] = value[on:].nan_to_num(7.0)
    assert torch.equal(got["ratios"].cpu().nan_to_num(7.0), expected)


def test_scales_of_masked_groups_by_k_block(device: str) -> None:
    """Positions of all groups side by side; of rows that a group doesn't have, none."""
    g = torch.Generator().manual_seed(11)
    x, scale = torch.randint(0, 120, (9, K), generator=g, dtype=torch.uint8), torch.rand(9, 2, generator=g)
    sizes = torch.tensor([3, 0, 1], dtype=torch.int32, device=device)
    got = run(device, "masked", FP8_ORDER, x.view(torch.float8_e4m3fn).to(device), scale.to(device), sizes, None, None, 3, 3, 9, by_k=True)
    expected = torch.full((9, 2, 4), 7.0)
    for row in (0, 1, 2, 6):
        for j, on in enumerate((1, 0, 9, 8)):
            if row >= on:
                expected[row - on, :, j] = scale[row]
    assert torch.equal(got["ratios"].cpu(), expected)


def fp8_order(x: torch.Tensor) -> torch.Tensor:
    """[R, K] to [R, blocks, 128], as weights packed for FP8 have K: words of four of the four blocks of 32 in turn."""
    rows, k = x.shape
    out = torch.zeros(rows, -(-k // 128) * 128, dtype=x.dtype)
    out[:, :k] = x
    return out.view(rows, -1, 4, 8, 4).permute(0, 1, 3, 2, 4).reshape(rows, -1, 128)


def test_fp8_rows_with_one_scale(device: str) -> None:
    """K as above; a position has its row's scale, and no others."""
    g = torch.Generator().manual_seed(9)
    x = torch.randint(0, 120, (6, K), generator=g, dtype=torch.uint8)
    scale, slots = torch.rand(6, 1, generator=g), torch.tensor([7, 2, 0, -1, 11, 12], dtype=torch.int32)
    index = torch.tensor([0, 2, 6], dtype=torch.int64, device=device)
    got = run(device, "offsets", ROW_ORDER, x.view(torch.float8_e4m3fn).to(device), scale.to(device), index, slots.to(device), None, 2, 6, 12)
    ok = (slots >= 0) & (slots < 12)
    where = slots[ok].long() // A_DIV
    assert torch.equal(got["x"].cpu().view(torch.uint8)[ok], fp8_order(x)[where].flatten(1))
    assert torch.equal(got["factor"].cpu(), torch.where(ok, scale[slots.clamp(0, 11).long() // A_DIV, 0], 7.0))
    assert bool((got["ratios"] == 7).all())


def bf16_rows() -> torch.Tensor:
    """Values over 8 powers of two, over all of BF16's, at both ends of it, and what is no number."""
    g = torch.Generator().manual_seed(7)
    x = torch.randn(7, K, generator=g)
    x[0] = (x[0].sign() * (1 + x[0].abs().fmod(1))) * 2.0 ** torch.arange(K).remainder(8)
    x[1] *= 2.0 ** torch.randint(-100, 100, (K,), generator=g)
    x[2] *= 2.0**-131
    x[3] *= 2.0**125
    x[4, 5], x[4, 6] = torch.inf, -torch.inf
    x[5, 7] = torch.nan
    x[6] = 0.0
    return x.bfloat16()


def check_two(first: torch.Tensor, second: torch.Tensor, unit: torch.Tensor, x: torch.Tensor) -> None:
    """first, second [R, blocks, 128] in `unit` [R, blocks]: exact where the largest is at most 2^8 times a value, within 2^-17 of it
    elsewhere; infinities and NaN where they are."""
    want, finite = fp8_order(x.float()), torch.ones(len(x), dtype=torch.bool)
    finite[4:6] = False
    back = (first.float() + second) * unit[..., None]
    top = (128 * unit)[..., None]
    assert torch.equal(back[0], want[0]) and bool((want.abs().amax(-1) >= top[..., 0])[0].all())
    error = (back - want).abs()[finite]
    assert bool((error <= torch.where(want.abs() >= top * 2**-8, 0.0, torch.maximum(top * 2**-17, torch.tensor(2.0**-133)))[finite]).all())
    assert not bool(back[6].any())
    block = fp8_order((x[4:5].isinf()).float())[0] * fp8_order(x[4:5].float().sign())[0]
    at = unit[4].isinf()
    assert bool(at.any()) and torch.equal(first[4].float()[at], block[at]) and not bool(second[4][at].any())
    assert torch.equal(back[5].isnan(), want[5].isnan())


def test_bf16_as_two_numbers_in_units_of_128(device: str) -> None:
    x = bf16_rows()
    got = run(device, "dense", TWO_ORDER, x.to(device), None, torch.zeros(1, dtype=torch.int32, device=device), None, None, 1, 7, 7)
    first, second = got["x"].cpu().float().view(7, -1, 2, 128).unbind(2)
    units = got["ratios"].cpu()
    assert torch.equal(units[:-1, :, 0], units[1:, :, 1])       # beside each position's own, those further on
    check_two(first, second, units[..., 1], x)


def test_bf16_for_weights_packed_for_fp8(device: str) -> None:
    """Code i of a word's eight beside code i + 4."""
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(8)).bfloat16()
    got = run(device, "dense", NIBBLE_ORDER, x.to(device), None, torch.zeros(1, dtype=torch.int32, device=device), None, None, 1, 5, 5)
    want = torch.zeros(5, 256, dtype=torch.bfloat16)
    want[:, :K] = x
    assert torch.equal(got["x"].cpu(), want.view(5, 2, 4, 4, 2, 4).permute(0, 1, 3, 5, 2, 4).reshape(5, 256))


@pytest.mark.parametrize("part", [256, 512])
def test_bf16_as_two_numbers_in_units_of_a_row(device: str, part: int) -> None:
    """In the launch in front of the kernel for few tokens: second numbers in 32nds."""
    from narrowgemm.kernels.gluon.sm90.narrow_prep_device import narrow_prep_kernel as kernel

    x, kx = bf16_rows(), 512
    out, unit = torch.full((7, 2 * kx), 7.0, device=device).to(torch.float8_e4m3fn), torch.zeros(7, device=device)
    i32 = torch.zeros(64, dtype=torch.int32, device=device)
    cfg = narrow_tile.PrepStatic(KINDS["dense"], 8, 1, TWO_ORDER, 32, 1, False, part, False)
    kernel[(1 + 7 * (512 // part),)](x.to(device), out, out, unit, i32, i32, i32, i32, i32, i32, i32, 7, K, kx, 0, K, 0, 0, 0, 1, 7, 7, 1, 8, 4, cfg)
    first, second = out.cpu().float().view(7, -1, 2, 128).unbind(2)
    assert not bool(first[:, 2:].any() or second[:, 2:].any())
    check_two(first[:, :2], second[:, :2] / 32, unit.cpu()[:, None].expand(7, 2), x)


@pytest.mark.parametrize("largest", [5, 300])
def test_the_unit_is_that_of_the_whole_row(device: str, largest: int) -> None:
    """Whichever piece of it holds the largest number."""
    from narrowgemm.kernels.gluon.sm90.narrow_prep_device import narrow_prep_kernel as kernel

    x = torch.randn(3, 400, generator=torch.Generator().manual_seed(4)).clamp(-2, 2).bfloat16()
    x[:, largest] = 24.0
    out, unit = torch.zeros(3, 1024, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn), torch.zeros(3, device=device)
    i32 = torch.zeros(64, dtype=torch.int32, device=device)
    cfg = narrow_tile.PrepStatic(KINDS["dense"], 8, 1, TWO_ORDER, 32, 1, False, 256, False)
    kernel[(1 + 3 * 2,)](x.to(device), out, out, unit, i32, i32, i32, i32, i32, i32, i32, 3, 400, 512, 0, 400, 0, 0, 0, 1, 3, 3, 1, 8, 4, cfg)
    first, second = out.cpu().float().view(3, 4, 2, 128).unbind(2)
    want = torch.zeros(3, 512)
    want[:, :400] = x
    assert (unit.cpu() == 0.125).all() and torch.equal((first + second / 32) * 0.125, fp8_order(want))


def test_ratios_of_scales_take_a_sum_from_block_to_block(device: str) -> None:
    """sum = sum * ratio + payload sum, and at the end * factor, is the sum of payload * scale; zero scales, and NaN ones."""
    g = torch.Generator().manual_seed(3)
    q = quantize(torch.randn(5, K, generator=g) * torch.tensor([1.0, 1e-20, 1e20, 3.0, 1.0]).unsqueeze(1), FP8_1x128)
    scale = q.scale.clone()
    scale[1, 0], scale[2, 1], scale[3] = 0.0, 0.0, 0.0
    scale[4, 1] = torch.nan
    got = run(device, "dense", 3, q.data.to(device), scale.to(device), torch.zeros(1, dtype=torch.int32, device=device), None, None, 1, 5, 5)
    x, ratios = got["x"].float().cpu(), got["ratios"].cpu()
    assert torch.equal(ratios, ratios[..., :1].expand_as(ratios)) or bool(ratios.isnan().any())
    total = torch.zeros(5)
    for c in range(x.shape[1] // 128):
        total = total * ratios[:, c, 0] + x[:, 128 * c: 128 * c + 128].sum(1)
    total *= got["factor"].cpu()
    want = sum(q.data[:, 128 * c: 128 * c + 128].float().sum(1) * scale[:, c] for c in range(scale.shape[1]))
    assert bool(total[4].isnan()) and torch.allclose(total[:4], want[:4], rtol=1e-5)
    assert not x[3].any() and not x[1, :128].any()
