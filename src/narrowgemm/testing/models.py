"""Shapes of real Mixture-of-Experts models: one table for the demo, tests, benchmarks and the tuner.

gate_up has N = 2·inter / TP and K = hidden; down has N = hidden and K = inter / TP. Expert parallelism splits the
experts and leaves N and K alone. Sizes are those of the published `config.json` files; `shared` experts are extra.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import expect


@dataclass(frozen=True, slots=True)
class MoEModel:
    """One MoE layer's sizes: `hidden` H, `inter` I of one routed expert, `experts` E, `top_k` experts a token."""

    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int
    shared: int = 0
    activation: str = "swiglu"      # 'swiglu_oai': clamped, alpha 1.702, limit 7
    weights: str = "fp8_128x128"    # the narrow format that the model ships in, or is served in most

    @property
    def oss(self) -> bool:
        """GPT-OSS's layer: rows of gate and up alternate, and both products have biases."""
        return self.name.startswith("gpt-oss")

    def gate_up(self, tp: int = 1) -> tuple[int, int]:
        """(N, K) of the first product under tensor parallelism `tp`."""
        return 2 * self.inter // tp, self.hidden

    def down(self, tp: int = 1) -> tuple[int, int]:
        """(N, K) of the second product under tensor parallelism `tp`."""
        return self.hidden, self.inter // tp

    def local_experts(self, ep: int = 1) -> int:
        """Experts a device holds under expert parallelism `ep`."""
        return -(-self.experts // ep)

    def scaled(self, *, hidden: int = 0, inter: int = 0, experts: int = 0, top_k: int = 0) -> MoEModel:
        """The same model with some sizes replaced; 0 keeps a size. `top_k` never exceeds the experts that are left."""
        e = experts or self.experts
        return replace(self, hidden=hidden or self.hidden, inter=inter or self.inter, experts=e,
                       top_k=min(top_k or self.top_k, e))


MODELS: dict[str, MoEModel] = {
    m.name: m
    for m in (
        MoEModel("deepseek-v3", 7168, 2048, 256, 8, shared=1),
        MoEModel("kimi-k2", 7168, 2048, 384, 8, shared=1),
        MoEModel("kimi-k3", 3584, 3072, 896, 16),
        MoEModel("qwen3-235b", 4096, 1536, 128, 8),
        MoEModel("minimax-m2", 3072, 1536, 256, 8),
        MoEModel("minimax-m3", 6144, 3072, 128, 4, shared=1, activation="swiglu_oai", weights="mxfp8"),
        MoEModel("gpt-oss-120b", 2880, 2880, 128, 4, activation="swiglu_oai", weights="mxfp4"),
        MoEModel("gpt-oss-20b", 2880, 2880, 32, 4, activation="swiglu_oai", weights="mxfp4"),
        MoEModel("gpt-oss-120b-padded", 3072, 3072, 128, 4, activation="swiglu_oai", weights="mxfp4"),
        MoEModel("tiny", 256, 128, 8, 2),
        MoEModel("gpt-oss-20b-padded", 3072, 3072, 32, 4, activation="swiglu_oai", weights="mxfp4"),
    )
}


def get_model(name: str) -> MoEModel:
    """A model by name; ValueError names the ones there are."""
    expect(name in MODELS, "model", repr(name), f"one of {sorted(MODELS)}")
    return MODELS[name]


class ModelSizes:
    """What reports read of a case that is `tokens` tokens of a `model`'s layer, beside its own `group_sizes`."""

    __slots__ = ()
    model: str
    tokens: int

    @property
    def group_sizes(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def m(self) -> int:
        return self.tokens

    @property
    def n(self) -> int:
        return get_model(self.model).inter

    @property
    def k(self) -> int:
        return get_model(self.model).hidden

    @property
    def rows(self) -> int:
        return sum(self.group_sizes)
