"""Text from a Mixture-of-Experts model on disk, its experts on narrowgemm; on a GPU or any CPU, without a network.

    python examples/generate.py                                    # makes a small model first: seconds
    python examples/generate.py --quantize mxfp4                   # experts quantised as they are read
    python examples/generate.py --model PATH --prompt "..."        # a model of your own

The small model is a Qwen3-MoE of two layers that learns one sentence by heart, so that what it writes can be read. Its text is
compared with what transformers' own experts write. Needs `pip install '.[transformers]'` in a checkout.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from narrowgemm.integrations import transformers as narrow

TEXT = "A router sends each token to a few of many experts, and sums what comes back."
PROMPT = "A router sends"


def write_model(folder: Path, steps: int = 60) -> Path:
    """A small model and its tokenizer, as `save_pretrained` writes them, trained on TEXT."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<end>", pad_token="<pad>")
    config = Qwen3MoeConfig(hidden_size=128, intermediate_size=128, moe_intermediate_size=128, num_experts=8,
                            num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                            head_dim=32, vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                            pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    ids = torch.tensor([[*tokenizer.encode(TEXT), tokenizer.eos_token_id]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(f"a model of {size:.1f} million parameters in {folder}, loss {loss.item():.3f}")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompt: str, tokens: int) -> tuple[str, float]:
    """Greedy text, and the seconds it took; on a GPU the second time, since kernels compile in the first."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    for _ in range(1 if model.device.type == "cpu" else 2):
        start = time.perf_counter()
        out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0]
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return tokenizer.decode(out, skip_special_tokens=True), seconds


def main(argv: list[str] | None = None) -> dict[str, str]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a model and its tokenizer")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--tokens", type=int, default=100, help="to generate, at most")
    parser.add_argument("--quantize", choices=sorted(narrow.WEIGHTS), help="quantise the experts as they are read")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = args.model or write_model(Path(tempfile.mkdtemp(prefix="narrowgemm-")))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    narrow.register()
    texts = {}
    for name in ("eager", "narrowgemm"):
        if name == "narrowgemm" and args.quantize:
            model = narrow.from_pretrained(str(folder), quantize=args.quantize, dtype="auto").to(args.device)
        else:
            model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=name, dtype="auto").to(args.device)
        texts[name], seconds = generate(model.eval(), tokenizer, args.prompt, args.tokens)
        how = f", {args.quantize}" if args.quantize and name == "narrowgemm" else ""
        print(f"\n{name}{how}, {seconds:.2f} s on {args.device}:\n{texts[name]}")
    print(f"\nthe same text: {'yes' if texts['eager'] == texts['narrowgemm'] else 'no'}")
    return texts


if __name__ == "__main__":
    main()
