"""An eviction policy of one's own, beside two that are there.

python examples/own_policy.py --model HuggingFaceTB/SmolLM2-135M-Instruct --text long.txt
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from spectralkv import evaluation, policies


@dataclass(frozen=True, kw_only=True)
class LongValues(policies.Policy):
    """Keep the tokens with the longest values; sinks and the window always stay."""

    name: ClassVar[str] = "long_values"

    def trackers(self, num_layers: int) -> list[policies.Tracker]:
        return [LongValuesTracker(self) for _ in range(num_layers)]


class LongValuesTracker(policies.ScoreTracker[LongValues]):
    """State of one layer: the last observation is enough here."""

    def scores(self) -> torch.Tensor:
        """Return float32 (B, Hkv, S): the higher, the sooner a token stays."""
        return self._observed().values.float().norm(dim=-1)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--length", type=int, default=2048, help="tokens of the text")
parser.add_argument("--budget", type=int, default=409, help="tokens that each KV head keeps")
options = parser.parse_args()

loaded = evaluation.load_model(options.model)
tokens = loaded.tokenizer.encode(options.text.read_text(encoding="utf-8"))[: options.length]
for policy in (
    policies.Full(budget=None),
    policies.create("spectral", budget=options.budget),
    policies.create("h2o", budget=options.budget),
    LongValues(budget=options.budget),
):
    cache = evaluation.create_cache(loaded.model, policy)
    read = evaluation.stream(loaded.model, tokens, cache)
    nats = read.nll[options.budget :]  # of the tokens behind the budget
    print(f"{policy.name:12} perplexity {math.exp(sum(nats) / len(nats)):8.2f}")
