"""Tokens a second of a transformers model by experts implementation: decode through `generate`, prefill by one forward.

    python benchmarks/transformers_tokens.py --layers 4 --batch 1 --batch 16 --out tokens.json

A Qwen3-MoE model of Qwen3-30B-A3B's layer sizes (128 experts, 8 a token) with random weights. All implementations run in
turn, round by round, in one process on the same weights; those that quantise run last, on the weights they quantised.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from narrowgemm.integrations import transformers as narrow


def build(layers: int, device: str, small: bool) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 8} if small else \
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128}
    config = Qwen3MoeConfig(**sizes, num_hidden_layers=layers, num_attention_heads=16, num_key_value_heads=4,
                            head_dim=sizes["hidden_size"] // 16, num_experts_per_tok=8 if not small else 2, vocab_size=32768,
                            intermediate_size=sizes["moe_intermediate_size"], bos_token_id=1, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, experts_implementation="eager").eval()


def seconds(f: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, action="append", help="sequences that are decoded together (default 1, 16)")
    parser.add_argument("--new", type=int, default=16, help="tokens each")
    parser.add_argument("--prefill", type=int, default=4096, help="tokens of the one forward")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantize", action="append", help="fp8, mxfp8, mxfp4 (default fp8)")
    parser.add_argument("--only", action="append", help="implementations to run (default eager, grouped_mm, narrowgemm)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="a toy model, to try the script")
    parser.add_argument("--warm", action="store_true", help="run everything once and measure nothing")
    parser.add_argument("--out")
    args = parser.parse_args()
    narrow.register()
    model = build(args.layers, args.device, args.small)
    rows: list[dict[str, Any]] = []

    def work(batch: int) -> Callable[[], Any]:
        if batch == 0:
            ids = torch.arange(args.prefill, device=args.device)[None] % 32000 + 3
            return lambda: model(ids, use_cache=False, logits_to_keep=1)
        ids = (torch.arange(batch * 32, device=args.device).view(batch, 32) * 7) % 32000 + 3
        mask = torch.ones_like(ids)
        return lambda: model.generate(ids, attention_mask=mask, max_new_tokens=args.new, do_sample=False)

    @torch.no_grad()
    def measure(names: list[str], label: str) -> None:
        for batch in (*(args.batch or [1, 16]), 0):
            run, times = work(batch), {n: [] for n in names}
            for i in range(1 if args.warm else args.rounds + 1):  # the first round warms up
                for name in names:
                    model.set_experts_implementation(name)
                    t = seconds(run, args.device)
                    if i:
                        times[name].append(t)
            for name in names:
                if times[name]:
                    t = statistics.median(times[name])
                    tokens = args.prefill if batch == 0 else batch * args.new
                    rows.append({"implementation": name, "weights": label, "batch": batch, "tokens": tokens, "seconds": t})
                    what = "prefill" if batch == 0 else f"decode batch {batch}"
                    print(f"{label:6s} {name:11s} {what:16s} {tokens / t:10.1f} tokens/s  {1e3 * t:8.2f} ms", flush=True)

    measure(args.only or ["eager", "grouped_mm", "narrowgemm"], "bf16")
    for quantize in args.quantize or ["fp8"]:
        model = None  # frees it first
        model = build(args.layers, args.device, args.small)
        narrow.quantize(model, quantize)
        measure(["narrowgemm"], quantize)
    if args.out:
        device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        with open(args.out, "w") as f:
            json.dump({"device": device, "torch": torch.__version__, "rows": rows}, f, indent=1)


if __name__ == "__main__":
    main()
