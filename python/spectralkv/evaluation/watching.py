"""A cache policy that keeps everything and watches how much attention some tokens get.

Apart from `story`, since its classes need torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from spectralkv.policies import Observation, Policy, ScoreTracker
from spectralkv.policies.attention import attention_blocks
from spectralkv.policies.base import Tracker


@dataclass(frozen=True, kw_only=True)
class AttentionWatch(Policy):
    """Keep all tokens, and hand out the attention that some of them get.

    Parameters
    ----------
    first, last : int
        The tokens, as slots from `first` to before `last`.
    record : callable
        Called after each pass and layer with (the layer's place among those with a cache,
        float32 (Hq, Q): the attention that each head of each new token pays to them together).
    """

    name: ClassVar[str] = "attention_watch"

    budget: int | None = None
    first: int
    last: int
    record: Callable[[int, torch.Tensor], None]

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return the watchers of `num_layers` layers."""
        return [_Watcher(self, layer) for layer in range(num_layers)]


class _Watcher(ScoreTracker[AttentionWatch]):
    def __init__(self, policy: AttentionWatch, layer: int) -> None:
        super().__init__(policy)
        self._layer = layer

    def observe(self, observation: Observation) -> None:
        super().observe(observation)
        blocks = [
            attention[0, ..., self._policy.first : self._policy.last].sum(-1).flatten(0, 1)
            for _, attention in attention_blocks(
                observation.query,
                observation.keys,
                scaling=observation.scaling,
                softcap=observation.softcap,
                valid=observation.valid,
            )
        ]
        self._policy.record(self._layer, torch.cat(blocks, -1))

    def scores(self) -> torch.Tensor:
        keys = self._observed().keys
        return torch.zeros(keys.shape[:3], device=keys.device)
