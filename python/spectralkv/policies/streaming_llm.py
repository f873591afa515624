"""StreamingLLM: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spectralkv.policies.base import Policy, ScoreTracker, Tracker


@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Policy):
    """Keep the attention sinks and the most recent tokens.

    Scores are positions, so the cache holds the `sinks` oldest and the ``budget - sinks`` newest
    tokens. Keys keep the rotary position they were written with.

    References
    ----------
    Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453.
    """

    name: ClassVar[str] = "streaming_llm"

    @property
    def protected_window(self) -> int:
        """Newest tokens that a cut never takes."""
        return (
            self.window if self.budget is None else max(self.window, self.budget - self.sinks - 1)
        )

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return fresh state for `num_layers` layers."""
        return [_StreamingTracker(self) for _ in range(num_layers)]


class _StreamingTracker(ScoreTracker[StreamingLLM]):
    def scores(self) -> torch.Tensor:
        """Return the rank of each token, the oldest slot first."""
        seen = self._observed()
        batch, heads, size, _ = seen.keys.shape
        rank = torch.arange(size, dtype=torch.float32, device=seen.keys.device)
        return rank.expand(batch, heads, size)
