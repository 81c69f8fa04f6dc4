"""FlyDSL's launchers as its callers use them: arguments of a launch by name, and the launcher."""

from __future__ import annotations

import pytest
import torch

from narrowgemm.compat import flydsl, notice
from narrowgemm.compat.flydsl import weights
from narrowgemm.testing.cases import Case, build

GPU = pytest.mark.gpu
FACTORIES = {"contiguous": flydsl.compile_grouped_gemm_blockscale_contiguous,
             "masked": flydsl.compile_grouped_gemm_blockscale_masked}
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16"}


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


def problem(layout="contiguous", m=256, n=128, k=256, groups=2, device="cpu", out=torch.bfloat16):
    """Arguments of a launch, unflattened, by name."""
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


def run(args, b=None, layout="contiguous"):
    args = {**args, "d": torch.full_like(args["d"], 7)} | ({} if b is None else {"b": b})
    launcher(layout)(**args)
    return args["d"]
