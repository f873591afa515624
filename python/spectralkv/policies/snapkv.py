"""SnapKV: the tokens that the last window of queries attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch.nn import functional

from spectralkv.policies.attention import attention_blocks
from spectralkv.policies.base import Policy, Tracker
from spectralkv.policies.queries import QueryTracker


@dataclass(frozen=True, kw_only=True)
class SnapKV(Policy):
    r"""Keep the tokens that the last queries vote for, and the window they stand in.

    .. math:: S = \mathrm{pool}_k \Big( \sum_{t > T - w} \mathrm{mean}_g \, A_{t, :T-w} \Big)

    with A the softmax attention of query t over all tokens up to itself, averaged over the query
    heads g that share a KV head, w the number of `queries`, and pool a stride-1 pooling of
    `kernel_size` that lets a token's neighbours stay with it. Defaults are those of the published
    code; there are no sinks. The paper's ablations have window 32, kernel 7, maximum.

    Parameters
    ----------
    window : int
        Newest tokens that always stay, at least 1.
    queries : int or None
        Newest queries that vote, from 1 to `window`. None: as many as `window`, as published.
    kernel_size : int
        Width of the pooling, odd. 1: no pooling.
    pooling : {"avg", "max"}
        Kind of pooling.

    Notes
    -----
    Published for the prompt alone. Here the vote is taken again at each cut; its queries attend to
    the keys that are left then.

    References
    ----------
    Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv:2404.14469.
    """

    name: ClassVar[str] = "snapkv"

    interval: int = 128
    window: int = 64
    sinks: int = 0
    queries: int | None = None
    kernel_size: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        self._require_int("window", minimum=1)
        if self.queries is not None:
            self._require_int("queries", minimum=1)
            self._require(self.queries <= self.window, "queries", f"at most window = {self.window}")
        self._require_int("kernel_size", minimum=1)
        self._require(self.kernel_size % 2 == 1, "kernel_size", "odd")
        self._require(self.pooling in ("avg", "max"), "pooling", "'avg' or 'max'")
        super().__post_init__()

    @property
    def num_queries(self) -> int:
        """Newest queries that vote."""
        return self.window if self.queries is None else self.queries

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return fresh state for `num_layers` layers."""
        return [_SnapKVTracker(self, self.num_queries) for _ in range(num_layers)]


class _SnapKVTracker(QueryTracker[SnapKV]):
    def scores(self) -> torch.Tensor:
        """Return the pooled votes; 0 for the tokens of the voting queries."""
        seen, query = self._observed(), self._newest_queries()
        batch, heads, size, _ = seen.keys.shape
        before = max(0, size - self._policy.num_queries)
        votes = torch.zeros(batch, heads, size, device=seen.keys.device)
        for _, attention in attention_blocks(
            query, seen.keys, scaling=seen.scaling, softcap=seen.softcap, valid=seen.valid
        ):
            per_head = attention[..., :before].mean(2)  # (B, Hkv, q, before)
            votes[..., :before] += per_head.sum(2)
        if before:
            votes[..., :before] = self._pool(votes[..., :before])
        return votes

    def _pool(self, votes: torch.Tensor) -> torch.Tensor:
        width = self._policy.kernel_size
        if width == 1:
            return votes
        pool = functional.avg_pool1d if self._policy.pooling == "avg" else functional.max_pool1d
        return pool(votes.contiguous(), width, stride=1, padding=width // 2)
