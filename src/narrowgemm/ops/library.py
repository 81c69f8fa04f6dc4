"""Registration with torch: `Library.define` + `impl` + fake, the cheapest way through the dispatcher.

The registered ops only write `out`; allocation stays in Python, where tracing sees it. Eager calls do not pass here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("narrowgemm", "FRAGMENT")
OPERANDS = "Tensor a, Tensor? a_scale, Tensor b, Tensor? b_scale, str a_format, str b_format"
OPTIONS = "bool accumulate, str backend, int max_sms, str on_unsupported, bool fast_accum=False"


def register(name: str, schema: str, impl: Callable[..., None]) -> None:
    """Define `narrowgemm::name` with `schema`, which returns nothing and writes its `Tensor(a!)`."""
    LIBRARY.define(f"{name}({schema}) -> ()")
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"narrowgemm::{name}", lambda *args, **kwargs: None, lib=LIBRARY)
