"""Trains a small Mixture-of-Experts transformer on bytes of text, in BF16 and with FP8 experts, from several seeds.

    python examples/train_moe.py --recipes bf16,block --seeds 0,1,2 --steps 300 --out training.json --plot training.png

The text is the Python standard library's own sources (PSF licence), which every machine with Python has. A seed fixes the
weights and the order of the text, so two runs of one seed differ in the recipe alone. `bf16-moved` is BF16 from weights moved by a
quarter of a BF16 number's last place: what it differs by from BF16 is chance, and what FP8 is to be held against. On a GPU a step
is one CUDA graph. Every `--snr-every` steps the gradients of every layer's experts are held against BF16's,
on the same weights and text.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, pad, rms_norm, scaled_dot_product_attention

import narrowgemm as ng
from narrowgemm.nn import ExpertMLP

RECIPES = ("bf16", "bf16-moved", "tensorwise", "delayed", "rowwise", "block")
HELD_OUT = 1 / 16       # of the text, its end, is not trained on
MOVED = 2.0**-10        # of a weight, at most about: BF16 keeps 8 bits
AVERAGED = 100          # last steps whose mean is a run's final training loss


@dataclass(frozen=True)
class Size:
    hidden: int = 512
    layers: int = 3
    heads: int = 4
    head: int = 64
    experts: int = 8
    top_k: int = 4
    inter: int = 768
    length: int = 256
    batch: int = 16

    @property
    def flops(self) -> tuple[float, float]:
        """(experts', all) of a token forward: two a weight, and attention over half of the length."""
        expert = 2.0 * self.layers * self.top_k * 3 * self.hidden * self.inter
        wide = self.heads * self.head
        rest = self.layers * (2 * 4 * self.hidden * wide + 2 * self.hidden * self.experts + 2 * self.length * wide)
        return expert, expert + rest + 2 * 256 * self.hidden


SMALL = Size(hidden=128, layers=2, heads=2, head=16, experts=4, top_k=2, inter=128, length=32, batch=2)


# ---------------------------------------------------------------- the model
class Permute(torch.autograd.Function):
    """Rows in another order; its gradient is a gather too, so sums have no order of their own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy[ctx.saved_tensors[1]], None, None


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Queries or keys `[..., L, D]` turned by their position: pairs (i, i + D / 2) by `turns` `[2, L, D / 2]`, cosine and sine."""
    a, b = x.chunk(2, -1)
    cos, sin = turns
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Block(nn.Module):
    def __init__(self, size: Size, recipe: str) -> None:
        super().__init__()
        self.size = size
        wide = size.heads * size.head
        self.qkv = nn.Parameter(torch.randn(3 * wide, size.hidden) * size.hidden**-0.5)
        self.out = nn.Parameter(torch.randn(size.hidden, wide) * (wide * 2 * size.layers) ** -0.5)
        self.router = nn.Parameter(torch.randn(size.experts, size.hidden) * size.hidden**-0.5)
        self.norms = nn.Parameter(torch.ones(2, size.hidden))
        delayed = recipe == "delayed"
        recipe = {"delayed": "tensorwise", "bf16-moved": "bf16"}.get(recipe, recipe)
        self.mlp = ExpertMLP(size.experts, size.hidden, size.inter, recipe=recipe, delayed=delayed)
        with torch.no_grad():
            self.mlp.down.mul_((2 * size.layers) ** -0.5)

    def forward(self, x: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        """`x` `[B, L, H]` BF16, and the loss that keeps experts evenly used."""
        s = self.size
        b, n, h = x.shape
        y = linear(rms_norm(x, (h,), self.norms[0].to(x.dtype)), self.qkv.to(x.dtype))
        q, k, v = y.view(b, n, 3, s.heads, s.head).permute(2, 0, 3, 1, 4)
        y = scaled_dot_product_attention(rotate(q, turns), rotate(k, turns), v, is_causal=True).transpose(1, 2).reshape(b, n, -1)
        x = x + linear(y, self.out.to(x.dtype))
        rows = rms_norm(x, (h,), self.norms[1].to(x.dtype)).view(-1, h)
        scores = linear(rows.float(), self.router).softmax(-1)
        weights, ids = scores.topk(s.top_k)
        weights = weights / weights.sum(-1, keepdim=True)
        routing = ng.sort_by_expert(ids.to(torch.int32), s.experts)
        order, inverse = routing.row_map.long(), routing.inverse.long()
        slots = rows[:, None].expand(-1, s.top_k, -1).reshape(-1, h)
        z = self.mlp(Permute.apply(slots, order, inverse), group_offs=routing.offsets)
        z = Permute.apply(z, inverse, order).view(-1, s.top_k, h)
        share = torch.zeros_like(scores).scatter(1, ids, 1.0).mean(0)
        return x + (z * weights[..., None].to(z.dtype)).sum(1).view(b, n, h), s.experts / s.top_k * (share * scores.mean(0)).sum()


class Model(nn.Module):
    """A byte enters with the one before it, so that a head can look for what followed it earlier in one layer, not two. Without,
    the loss stands still and falls at once, and runs differ by when chance lets it."""

    turns: Tensor

    def __init__(self, size: Size, recipe: str) -> None:
        super().__init__()
        self.embed = nn.Parameter(torch.randn(2, 256, size.hidden) * 0.02)
        angles = torch.arange(size.length)[:, None] * 10000.0 ** (-torch.arange(size.head // 2) * 2 / size.head)
        self.register_buffer("turns", torch.stack([angles.cos(), angles.sin()]).bfloat16())
        self.blocks = nn.ModuleList(Block(size, recipe) for _ in range(size.layers))
        self.norm = nn.Parameter(torch.ones(size.hidden))

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(cross entropy of `text` `[B, L + 1]`, in nats a byte; the experts' balance)."""
        now, last = self.embed
        bytes_ = text[:, :-1]
        x = (now[bytes_] + last[pad(bytes_[:, :-1], (1, 0))]).bfloat16()
        balance = x.new_zeros((), dtype=torch.float32)
        for block in self.blocks:
            x, one = block(x, self.turns)
            balance = balance + one
        x = linear(rms_norm(x, x.shape[-1:], self.norm.to(x.dtype)), now.to(x.dtype)).float()
        return cross_entropy(x.flatten(0, 1), text[:, 1:].flatten()), balance / len(self.blocks)

    def experts(self) -> list[ExpertMLP]:
        return [b.mlp for b in self.blocks]  # type: ignore[misc]


# ---------------------------------------------------------------- text
def corpus(most: int) -> Tensor:
    """uint8: the top-level modules of the standard library, in order of their names, `most` bytes at most."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    data = b"".join(f.read_bytes() for f in files)[:most]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def batches(count: int, size: Size, low: int, high: int, seed: int) -> Tensor:
    """Where the texts of `count` steps start, `[count, batch]`, in `[low, high - length)`."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(low, high - size.length - 1, (count, size.batch), generator=g)


# ---------------------------------------------------------------- training
class Training:
    """One run: everything that a step needs is on the device, the step's number too."""

    def __init__(self, size: Size, recipe: str, seed: int, steps: int, device: str, lr: float, text: Tensor) -> None:
        torch.manual_seed(seed)
        self.size, self.recipe, self.steps, self.device, self.lr = size, recipe, steps, device, lr
        self.model = Model(size, recipe).to(device)
        if recipe == "bf16-moved":
            with torch.no_grad():
                for p in self.model.parameters():
                    p.mul_(1 + MOVED * (2 * torch.rand_like(p) - 1))
        self.text = text.to(device)
        self.cut = int(len(text) * (1 - HELD_OUT))
        self.starts = batches(steps, size, 0, self.cut, seed).to(device)
        self.held_out = batches(1 if size == SMALL else 32, size, self.cut, len(text), 1).to(device)
        self.reach = torch.arange(size.length + 1, device=device)
        self.at = torch.zeros((), dtype=torch.long, device=device)
        self.losses = torch.zeros(steps, device=device)
        self.rate = torch.zeros((), device=device)
        params = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(params, lr=self.rate, betas=(0.9, 0.95), weight_decay=0.1, capturable=device != "cpu",
                                           foreach=device != "cpu")
        self.params = params

    def batch(self, starts: Tensor) -> Tensor:
        return self.text[starts[:, None] + self.reach].long()

    def step(self) -> None:
        at = self.at.float()
        decay = 0.51 + 0.49 * torch.cos(math.pi * at / self.steps)
        self.rate.copy_(self.lr * torch.minimum((at + 1) / max(20, self.steps // 10), decay))
        loss, balance = self.model(self.batch(self.starts.index_select(0, self.at[None])[0]))
        (loss + 0.01 * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        if self.recipe == "delayed":
            for mlp in self.model.experts():
                mlp.update_scales()
        self.losses.index_copy_(0, self.at[None], loss.detach()[None])
        self.at.add_(1)
        self.optimizer.zero_grad(set_to_none=True)

    def stepper(self) -> Callable[[], None]:
        """A step as a CUDA graph, the state being what it was before; itself on a CPU."""
        if self.device == "cpu":
            return self.step
        before = [p.detach().clone() for p in self.params]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        with torch.no_grad():
            for p, old in zip(self.params, before):
                p.copy_(old)
            for state in self.optimizer.state.values():
                for t in state.values():
                    t.zero_()
            self.at.zero_()
            self.losses.zero_()
        self.forget()
        return graph.replay

    def forget(self) -> None:
        """A graph's replay has changed the weights."""
        for mlp in self.model.experts():
            mlp.invalidate()

    def gradients(self, text: Tensor, recipe: str) -> list[tuple[Tensor, ...]]:
        """Of every layer's experts, with their products in `recipe`."""
        mlps = self.model.experts()
        own = [(m.recipe, m.delayed) for m in mlps]
        for m in mlps:
            if recipe == "bf16":
                m.recipe, m.delayed = "bf16", False
        weights = [w for m in mlps for w in (m.gate_up, m.down)]
        kept = [m.amax.clone() if m.delayed else None for m in mlps]
        grads = torch.autograd.grad(self.model(text)[0], weights)
        for m, (name, delayed), amax in zip(mlps, own, kept):
            m.recipe, m.delayed = name, delayed
            if amax is not None:
                m.amax.copy_(amax)
        return list(zip(grads[::2], grads[1::2]))

    def snr(self, at: int) -> list[list[float]]:
        """dB of gate_up's and down's gradient in each layer against BF16's, on the next step's text."""
        self.forget()
        text = self.batch(self.starts[min(at, self.steps - 1)])
        pairs = zip(self.gradients(text, self.recipe), self.gradients(text, "bf16"))
        return [[decibel(a, b) for a, b in zip(x, y)] for x, y in pairs]

    @torch.no_grad()
    def validate(self) -> float:
        self.forget()
        return statistics.mean(float(self.model(self.batch(s))[0]) for s in self.held_out)


def decibel(x: Tensor, want: Tensor) -> float:
    return round(float(10 * torch.log10(want.float().square().sum() / (x - want).float().square().sum().clamp_min(1e-30))), 2)


def run(size: Size, recipe: str, seed: int, steps: int, device: str, lr: float, snr_every: int, most: int) -> dict[str, Any]:
    """One run's figures."""
    text = corpus(most)
    training = Training(size, recipe, seed, steps, device, lr, text)
    step = training.stepper()
    snr: dict[int, list[list[float]]] = {}
    started = time.perf_counter()
    for i in range(steps):
        if snr_every and i % snr_every == 0:
            if not recipe.startswith("bf16"):
                snr[i] = training.snr(i)
            last = float(training.losses[i - 1]) if i else math.nan
            print(f"{recipe}, seed {seed}: step {i}, loss {last:.4f}, {time.perf_counter() - started:.1f} s", flush=True)
        step()
    losses = training.losses.tolist()
    seconds = time.perf_counter() - started
    count = sum(p.numel() for p in training.params)
    name = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    return {"recipe": recipe, "seed": seed, "device": name, "torch": torch.__version__, "narrowgemm": ng.__version__,
            "losses": [round(x, 5) for x in losses], "final": statistics.mean(losses[-AVERAGED:]),
            "held_out": training.validate(), "snr_db": snr, "seconds": round(seconds, 2), "parameters": count,
            "text_bytes": len(text)}


# ---------------------------------------------------------------- several runs
def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each recipe against BF16, by seed and in the mean: relative differences of the final losses, and their standard deviation
    over the seeds."""
    base = {r["seed"]: r for r in runs if r["recipe"] == "bf16"}
    out = []
    for recipe in dict.fromkeys(r["recipe"] for r in runs if r["recipe"] != "bf16"):
        mine = {r["seed"]: r for r in runs if r["recipe"] == recipe and r["seed"] in base}
        for figure in ("final", "held_out"):
            pairs = {s: r[figure] / base[s][figure] - 1 for s, r in mine.items()}
            if pairs:
                mean = sum(r[figure] for r in mine.values()) / sum(base[s][figure] for s in mine) - 1
                seeds = {s: round(v, 5) for s, v in pairs.items()}
                spread = round(statistics.stdev(pairs.values()), 5) if len(pairs) > 1 else None
                out.append({"recipe": recipe, "loss": figure, "seeds": seeds, "mean": round(mean, 5), "spread": spread})
    return out


def plot(path: str, runs: list[dict[str, Any]], window: int = 50) -> None:
    """All loss curves; and how far runs are from BF16 of their seed, means of `window` steps."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.2))
    recipes = list(dict.fromkeys(r["recipe"] for r in runs))
    bf16 = {r["seed"]: r["losses"] for r in runs if r["recipe"] == "bf16"}
    for r in runs:
        style = {"color": f"C{recipes.index(r['recipe'])}", "linewidth": 0.9, "linestyle": ("-", "--", ":", "-.")[r["seed"] % 4]}
        axes[0].plot(r["losses"], label=f"{r['recipe']}, seed {r['seed']}", **style)
        if r["recipe"] != "bf16" and r["seed"] in bf16:
            pairs = list(zip(r["losses"], bf16[r["seed"]]))
            spans = [pairs[i : i + window] for i in range(len(pairs) - window + 1)]
            apart = [100 * (sum(a for a, _ in x) / sum(b for _, b in x) - 1) for x in spans]
            axes[1].plot(range(window, len(pairs) + 1), apart, **style)
    for axis in axes:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss, nats a byte")
    axes[1].set_ylabel(f"from BF16 of the seed, {window} steps, %")
    axes[0].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(given: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", default="bf16,block")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--snr-every", type=int, default=50)
    parser.add_argument("--text-bytes", type=int, default=4 << 20)
    parser.add_argument("--small", action="store_true", help="a model that a CPU trains a few steps of in seconds")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--read", help="files of --out, separated by commas, whose runs are taken instead of training")
    parser.add_argument("--out", help="JSON")
    parser.add_argument("--plot", help="PNG")
    o = parser.parse_args(given)
    wanted = [(r, int(s)) for s in o.seeds.split(",") for r in o.recipes.split(",")]
    if unknown := {r for r, _ in wanted} - set(RECIPES):
        parser.error(f"--recipes: got {sorted(unknown)}, expected some of {RECIPES}")
    size = SMALL if o.small else Size()
    if o.read:
        runs = [r for path in o.read.split(",") for r in json.loads(Path(path).read_text())["runs"]]
    else:
        runs = []
        for recipe, seed in wanted:
            runs.append(run(size, recipe, seed, o.steps, o.device, o.lr, o.snr_every, o.text_bytes))
            if o.out:
                Path(o.out).write_text(dump(report(size, o, runs)))
    result = report(size, o, runs)
    for r in runs:
        print(f"{r['recipe']:10s} seed {r['seed']}: final loss {r['final']:.4f}, held out {r['held_out']:.4f}, {r['seconds']:.1f} s"
              f"{', SNR dB ' + str(list(r['snr_db'].items())[-1]) if r['snr_db'] else ''}", flush=True)
    for c in result["against_bf16"]:
        print(f"{c['recipe']} against bf16, {c['loss']}: mean {c['mean']:+.3%}, by seed {c['seeds']}")
    if o.out:
        Path(o.out).write_text(dump(result))
    if o.plot:
        plot(o.plot, runs)
    return result


def report(size: Size, o: argparse.Namespace, runs: list[dict[str, Any]]) -> dict[str, Any]:
    experts, whole = size.flops
    return {"steps": o.steps, "averaged": AVERAGED, "size": asdict(size), "tokens_a_step": size.batch * size.length,
            "learning_rate": o.lr, "experts_share_of_flops": round(experts / whole, 4), "against_bf16": compare(runs), "runs": runs}


def dump(result: dict[str, Any]) -> str:
    """JSON, a run's losses on one line."""
    rest = {k: v for k, v in result.items() if k != "runs"}
    runs = ",\n".join("  " + json.dumps(r) for r in result["runs"])
    return f'{json.dumps(rest, indent=1)[:-2]},\n "runs": [\n{runs}\n ]\n}}\n'


if __name__ == "__main__":
    main()
