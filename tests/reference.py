"""Plain references: slow, obvious, without a line in common with what they check."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from spectralkv.hf import cache_argument

# -- eviction by masking: a full cache in which evicted tokens are never looked at

DENSE = "dense_reference"


@dataclass
class _Alive:
    """What each layer may still look at: bool (B, Hkv, columns)."""

    layers: dict[int, torch.Tensor] = field(default_factory=dict)


_alive = _Alive()


def _dense_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,  # noqa: ARG001
) -> tuple[torch.Tensor, None]:
    group = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + attention_mask
    alive = _alive.layers.get(module.layer_idx)
    if alive is not None:
        new = alive.new_ones(*alive.shape[:2], logits.shape[-1] - alive.shape[-1])
        alive = torch.cat((alive, new), -1).repeat_interleave(group, 1)
        logits = logits.masked_fill(~alive[:, :, None], float("-inf"))
    weights = logits.softmax(-1).nan_to_num(0.0)
    return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None


AttentionInterface.register(DENSE, _dense_attention)
AttentionMaskInterface.register(DENSE, eager_mask)


def dense_run(
    model: Any,
    chunks: Sequence[torch.Tensor],
    events: Sequence[Any],
    attention_mask: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Feed `chunks` (B, Q) with a full cache in which what `events` evicted is masked.

    `model` runs the attention implementation DENSE and has the weights of the model that caused
    the events. Returns the logits of each chunk.
    """
    cache = DynamicCache(config=model.config)
    batch = chunks[0].shape[0]
    total = sum(chunk.shape[1] for chunk in chunks)
    mask = chunks[0].new_ones(batch, total) if attention_mask is None else attention_mask
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    logits, seen = [], 0
    for chunk in chunks:
        _alive.layers.clear()
        for event in events:
            if event.tokens_seen <= seen:
                _alive.layers[event.layer] = _alive_columns(event, mask, seen)
        end = seen + chunk.shape[1]
        with torch.no_grad():
            output = model(
                chunk,
                attention_mask=mask[:, :end],
                position_ids=position_ids[:, seen:end],
                **cache_argument(cache),
            )
        logits.append(output.logits)
        seen = end
    _alive.layers.clear()
    return logits


def _alive_columns(event: Any, mask: torch.Tensor, seen: int) -> torch.Tensor:
    batch, heads, _ = event.positions.shape
    alive = torch.zeros(batch, heads, seen, dtype=torch.bool)
    alive[:, :, event.tokens_seen :] = True
    keep, positions = event.keep.tolist(), event.positions.tolist()
    for row in range(batch):
        columns = mask[row].nonzero()[:, 0].tolist()
        for head in range(heads):
            for slot in keep[row][head]:
                if slot >= 0:
                    alive[row, head, columns[positions[row][head][slot]]] = True
    return alive.to(mask.device)


# -- the cut


def kept_positions(scores: Sequence[float], *, budget: int, window: int, sinks: int) -> list[int]:
    """Return which tokens of one head stay, by the rule as it is written down."""
    count = len(scores)
    stay = [i for i in range(count) if i < sinks or i >= count - window]
    rest = [i for i in range(count) if i not in stay]
    worst_first = sorted(rest, key=lambda i: (scores[i], i))
    return sorted(stay + worst_first[len(rest) - (budget - len(stay)) :])


# -- attention and the policies' scores, of one sequence: lists of lists


def attention(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, softcap: float | None = None
) -> torch.Tensor:
    """Return (Hq, Q, S) of queries (Hq, Q, D), the newest Q of the keys' (Hkv, S, D) tokens."""
    query_heads, count, _ = queries.shape
    heads, size, _ = keys.shape
    weights = torch.zeros(query_heads, count, size, dtype=torch.float64)
    for head in range(query_heads):
        for i in range(count):
            seen = size - count + i + 1
            logits = [
                scaling
                * float(queries[head, i].double() @ keys[head * heads // query_heads, j].double())
                for j in range(seen)
            ]
            if softcap is not None:
                logits = [softcap * math.tanh(logit / softcap) for logit in logits]
            largest = max(logits)
            exponentials = [math.exp(logit - largest) for logit in logits]
            for j in range(seen):
                weights[head, i, j] = exponentials[j] / sum(exponentials)
    return weights


def by_kv_head(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Average (Hq, ...) over the query heads that share a KV head."""
    return torch.stack([part.mean(0) for part in weights.chunk(heads)])


def h2o_scores(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, decay: float = 1.0
) -> torch.Tensor:
    weights = by_kv_head(attention(queries, keys, scaling), keys.shape[0])
    count = weights.shape[1]
    return sum(decay ** (count - 1 - i) * weights[:, i] for i in range(count))


def tova_scores(queries: torch.Tensor, keys: torch.Tensor, scaling: float) -> torch.Tensor:
    newest = attention(queries[:, -1:], keys, scaling)[:, 0].mean(0)
    return newest.expand(keys.shape[0], -1)


def snapkv_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    *,
    window: int,
    kernel_size: int,
    pooling: str,
) -> torch.Tensor:
    weights = by_kv_head(attention(queries[:, -window:], keys, scaling), keys.shape[0])
    votes = weights.sum(1)[:, :-window]
    pooled = torch.zeros(keys.shape[0], keys.shape[1], dtype=torch.float64)
    reach = kernel_size // 2
    for j in range(votes.shape[1]):
        near = votes[:, max(0, j - reach) : j + reach + 1]
        pooled[:, j] = near.amax(1) if pooling == "max" else near.sum(1) / kernel_size
    return pooled


def keydiff_scores(keys: torch.Tensor) -> torch.Tensor:
    scores = torch.zeros(keys.shape[:2], dtype=torch.float64)
    for head, k in enumerate(keys.double()):
        mean = torch.stack([key / key.norm() for key in k]).mean(0)
        for j, key in enumerate(k):
            scores[head, j] = -float(key @ mean) / float(key.norm() * mean.norm())
    return scores


def rkv_scores(
    queries: torch.Tensor,
    keys: torch.Tensor,
    scaling: float,
    *,
    window: int,
    mix: float,
    kernel_size: int,
    threshold: float,
) -> torch.Tensor:
    heads, size, _ = keys.shape
    before = size - window
    group = queries.shape[0] // heads
    scores = torch.zeros(heads, size, dtype=torch.float64)
    for head in range(heads):
        k = keys[head].double()
        importance = torch.zeros(before, dtype=torch.float64)
        for i in range(window):
            logits = torch.stack(
                [
                    scaling * (k[:before] @ queries[head * group + g, -window + i].double())
                    for g in range(group)
                ]
            )
            importance += logits.amax(0).softmax(-1) / window
        reach = kernel_size // 2
        pooled = [float(importance[max(0, j - reach) : j + reach + 1].max()) for j in range(before)]
        cosine = torch.zeros(size, size, dtype=torch.float64)
        for i in range(size):
            for j in range(size):
                if i != j:
                    cosine[i, j] = k[i] @ k[j] / (k[i].norm() * k[j].norm())
            similar = [j for j in range(size) if cosine[i, j] > threshold]
            if similar:
                cosine[i, similar[-1]] = 0.0
        redundancy = cosine.mean(0).softmax(-1)
        for j in range(before):
            scores[head, j] = mix * pooled[j] - (1 - mix) * redundancy[j]
    return scores


def lazy_scores(
    queries: torch.Tensor, keys: torch.Tensor, scaling: float, *, threshold: float
) -> torch.Tensor:
    # The largest share that any of the query heads of a KV head gives.
    weights = torch.stack(
        [part.amax(0) for part in attention(queries, keys, scaling).chunk(keys.shape[0])]
    )
    heads, count, _ = weights.shape
    scores = torch.zeros(heads, count, dtype=torch.float64)
    for head in range(heads):
        for j in range(count):
            # Token j's own query is step j + 1.
            activations = [j, *(i + 1 for i in range(count) if weights[head, i, j] >= threshold)]
            intervals = [b - a for a, b in itertools.pairwise(activations)]
            if intervals:
                longest, silence = max(intervals), count - activations[-1]
                scores[head, j] = 2 / (1 + math.exp(silence / longest))
                scores[head, j] += 2 / (1 + math.exp(longest - 1))
    return scores
