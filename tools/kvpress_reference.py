#!/usr/bin/env python3
"""Write what NVIDIA's kvpress keeps of seeded tensors, as a reference for the tests.

    python -m venv /tmp/kvpress
    /tmp/kvpress/bin/pip install kvpress==0.5.5
    /tmp/kvpress/bin/python tools/kvpress_reference.py

kvpress wants an older transformers than this project is tested with, hence an environment of its
own; SpectralKV need not be in it. `tests/policies/test_kvpress.py` compares its policies with the
file that this writes.

Attention weights are those of transformers' eager attention, under a causal mask. Each press runs
its own `compress`, scores, top-k and gathering, on values that carry the number of their slot.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "tests" / "policies" / "data" / "kvpress.json"
PACKAGES = ("kvpress", "transformers", "torch", "numpy")
CASES = (
    {"seed": 0, "batch": 1, "query_heads": 6, "kv_heads": 2, "tokens": 64, "head_dim": 16},
    {"seed": 1, "batch": 2, "query_heads": 4, "kv_heads": 4, "tokens": 97, "head_dim": 8},
    {"seed": 2, "batch": 1, "query_heads": 9, "kv_heads": 3, "tokens": 160, "head_dim": 64},
)
RATIOS = (0.5, 0.8)
WINDOW, KERNEL, SINKS = 8, 5, 4


def make_tensors(case: dict[str, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries (B, Hq, S, D) and keys (B, Hkv, S, D), float32, the same everywhere.

    `RandomState` is frozen: numpy promises its numbers for all versions to come. As in real models
    keys share a direction, neighbours resemble each other, and attention is uneven.
    """
    random = np.random.RandomState(case["seed"])
    batch, tokens, dim = case["batch"], case["tokens"], case["head_dim"]
    query = 2.5 * random.standard_normal((batch, case["query_heads"], tokens, dim))
    keys = random.standard_normal((batch, case["kv_heads"], tokens, dim))
    keys[:, :, 1:] += 0.5 * keys[:, :, :-1]
    keys += random.standard_normal((1, case["kv_heads"], 1, dim))
    return torch.from_numpy(query).float(), torch.from_numpy(keys).float()


def kept_by(press: Any, query: torch.Tensor, keys: torch.Tensor) -> list[list[list[int]]]:
    """Return the slots that a press keeps, ascending, of each sequence and KV head."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    batch, kv_heads, tokens, dim = keys.shape
    query_heads = query.shape[1]
    module = SimpleNamespace(
        config=SimpleNamespace(num_attention_heads=query_heads, num_key_value_heads=kv_heads),
        num_key_value_groups=query_heads // kv_heads,
        head_dim=dim,
        training=False,
    )
    slots = torch.arange(tokens, dtype=torch.float32)
    values = slots[None, None, :, None].expand(batch, kv_heads, tokens, dim).contiguous()
    unseen = torch.full((tokens, tokens), float("-inf")).triu(1)[None, None]
    _, attentions = eager_attention_forward(module, query, keys, values, unseen, dim**-0.5)
    hidden = torch.zeros(batch, tokens, 1)  # only its length is looked at
    _, kept = press.compress(module, hidden, keys, values, attentions, {})
    slots_kept: list[list[list[int]]] = kept[..., 0].long().sort(-1).values.tolist()
    return slots_kept


def reference() -> list[dict[str, Any]]:
    """Return what each press keeps in each case."""
    import kvpress

    class SummedAttentionPress(kvpress.ObservedAttentionPress):
        """H2O's sums: kvpress's means, times the queries that each is a mean of."""

        def score(self, *arguments: Any, **options: Any) -> torch.Tensor:
            means = super().score(*arguments, **options)
            return means * torch.arange(means.shape[-1], 0, -1)

    presses = {
        "observed_attention": kvpress.ObservedAttentionPress,
        "summed_attention": SummedAttentionPress,
        "snapkv": partial(kvpress.SnapKVPress, window_size=WINDOW, kernel_size=KERNEL),
        "tova": kvpress.TOVAPress,
        "keydiff": kvpress.KeyDiffPress,
        "streaming_llm": partial(kvpress.StreamingLLMPress, n_sink=SINKS),
    }
    found = []
    for case in CASES:
        query, keys = make_tensors(case)
        for ratio, (name, press) in itertools.product(RATIOS, presses.items()):
            kept = kept_by(press(ratio), query, keys)
            found.append({"case": case, "ratio": ratio, "press": name, "kept": kept})
    return found


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    document = {
        "command": "python tools/kvpress_reference.py",
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "settings": {"window": WINDOW, "kernel_size": KERNEL, "sinks": SINKS},
        "results": reference(),
    }
    # A line a result: a change shows where it is.
    results = ",\n  ".join(json.dumps(result) for result in document.pop("results"))
    head = json.dumps(document, indent=1)[1:-2]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(f'{{{head},\n "results": [\n  {results}\n ]\n}}\n')
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
