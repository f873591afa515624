"""R-KV: tokens that matter to the newest queries and do not repeat others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from spectralkv.policies.attention import attention_logits
from spectralkv.policies.base import Observation, Policy, Tracker
from spectralkv.policies.keydiff import key_directions
from spectralkv.policies.queries import QueryTracker

# Similarities that one block of keys may fill: 64 MiB in float32.
_BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class RKV(Policy):
    r"""Keep tokens that are important and not redundant.

    .. math:: S = \lambda I - (1 - \lambda) R

    Importance I: the logits of the last `queries` queries, maximum over the query heads that share
    a KV head, softmax over the tokens before them, mean over the queries, max-pooled over
    `kernel_size` tokens. Redundancy R: the cosine similarities of the keys, each key with itself
    left out and, in each row, the most recent key above `threshold`, too; mean over the rows,
    softmax. There are no sinks.

    Parameters
    ----------
    window : int
        Newest tokens that always stay, at least 1.
    queries : int or None
        Newest queries that vote, from 1 to `window`. None: 8 as published, or `window` if that is
        less.
    mix : float
        λ, from 0 to 1. 0.07 in the published code, 0.1 in the paper; more is better for plain
        text.
    kernel_size : int
        Width of the pooling, odd. 1: no pooling.
    threshold : float
        Cosine above which a key repeats another.

    Notes
    -----
    In a row without a key above `threshold` nothing more is left out; the published code leaves the
    first token out of it.

    References
    ----------
    Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models",
    arXiv:2505.24133.
    """

    name: ClassVar[str] = "rkv"

    interval: int = 128
    window: int = 8
    sinks: int = 0
    queries: int | None = None
    mix: float = 0.07
    kernel_size: int = 7
    threshold: float = 0.5

    def __post_init__(self) -> None:
        self._require_int("window", minimum=1)
        if self.queries is not None:
            self._require_int("queries", minimum=1)
            self._require(self.queries <= self.window, "queries", f"at most window = {self.window}")
        self._require_number("mix", minimum=0, maximum=1)
        self._require_int("kernel_size", minimum=1)
        self._require(self.kernel_size % 2 == 1, "kernel_size", "odd")
        self._require_number("threshold", minimum=-1, maximum=1)
        super().__post_init__()

    @property
    def num_queries(self) -> int:
        """Newest queries that vote."""
        return min(8, self.window) if self.queries is None else self.queries

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return fresh state for `num_layers` layers."""
        return [_RKVTracker(self, self.num_queries) for _ in range(num_layers)]


class _RKVTracker(QueryTracker[RKV]):
    def scores(self) -> torch.Tensor:
        """Return importance less redundancy; 0 for the tokens of the voting queries."""
        seen, mix = self._observed(), self._policy.mix
        batch, heads, size, _ = seen.keys.shape
        before = max(0, size - self._policy.num_queries)
        scores = torch.zeros(batch, heads, size, device=seen.keys.device)
        if before:
            importance = self._importance(seen, before)
            redundancy = self._redundancy(seen)[..., :before]
            scores[..., :before] = mix * importance - (1.0 - mix) * redundancy
        return scores

    def _importance(self, seen: Observation, before: int) -> torch.Tensor:
        query = self._newest_queries()
        logits = attention_logits(
            query,
            seen.keys,
            scaling=seen.scaling,
            softcap=seen.softcap,
            valid=seen.valid,
            offset=seen.keys.shape[2] - query.shape[2],
        )
        attention = logits.amax(2)[..., :before].softmax(-1).nan_to_num(0.0)  # (B, Hkv, w, before)
        width = self._policy.kernel_size
        return functional.max_pool1d(attention.mean(2), width, stride=1, padding=width // 2)

    def _redundancy(self, seen: Observation) -> torch.Tensor:
        direction = key_directions(seen.keys, seen.valid)
        batch, heads, size, _ = direction.shape
        slot = torch.arange(size, dtype=torch.int32, device=direction.device)
        total = direction.new_zeros(batch, heads, size)
        step = max(1, _BLOCK_ELEMENTS // max(1, batch * heads * size))
        for start in range(0, size, step):
            cosine = direction[:, :, start : start + step] @ direction.transpose(2, 3)
            cosine.diagonal(start, 2, 3).zero_()
            repeats = torch.where(cosine > self._policy.threshold, slot, -1)
            newest = repeats.amax(-1, keepdim=True)
            total += cosine.masked_fill_(slot == newest, 0.0).sum(2)
        if seen.valid is None:
            return (total / max(1, size)).softmax(-1)
        # Counted where it lies: the lengths of `seen` would have to be copied to the device.
        mean = total / seen.valid.sum(-1).clamp_min(1)[:, None, None]
        return mean.masked_fill(~seen.valid[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
