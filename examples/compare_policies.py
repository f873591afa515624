"""What each policy loses of your own text, and in how much memory.

python examples/compare_policies.py --text long.txt --policy spectral --policy h2o --policy tova
"""

import argparse
import math
from pathlib import Path

from spectralkv import evaluation, policies

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--length", type=int, default=2048, help="tokens of the text")
parser.add_argument("--budget", type=float, action="append", help="part of the text; repeatable")
parser.add_argument("--policy", action="append", help="by name; repeatable")
options = parser.parse_args()
names = options.policy or ["spectral", "h2o", "snapkv", "keydiff"]

loaded = evaluation.load_model(options.model)
tokens = loaded.tokenizer.encode(options.text.read_text(encoding="utf-8"))[: options.length]
budgets = [round(share * len(tokens)) for share in options.budget or [0.1, 0.2, 0.5]]


def read(policy: policies.Policy) -> tuple[float, float]:
    """Return nats a token behind the largest budget, and MiB of keys and values."""
    cache = evaluation.create_cache(loaded.model, policy)
    nats = evaluation.stream(loaded.model, tokens, cache).nll[max(budgets) :]
    return sum(nats) / len(nats), cache.stats().kv_bytes / 2**20


full, memory = read(policies.Full())
print(f"{'policy':14} {'budget':>7} {'perplexity':>11} {'lost nats':>10} {'KV MiB':>7}")
print(f"{'full':14} {len(tokens):7,} {math.exp(full):11.2f} {0.0:10.4f} {memory:7.2f}")
for budget in budgets:
    for name in names:
        nats, memory = read(policies.create(name, budget=budget))
        lost = nats - full
        print(f"{name:14} {budget:7,} {math.exp(nats):11.2f} {lost:10.4f} {memory:7.2f}")
