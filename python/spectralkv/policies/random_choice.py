"""Random eviction: the floor that a policy has to clear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from spectralkv.policies.base import Observation, Policy, ScoreTracker, Tracker

_MASK = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Keep tokens at random, drawn anew at each cut, for each KV head.

    A draw depends on the seed, the layer and how often the sequence was cut before: not on its
    place in the batch, nor on the device.

    Parameters
    ----------
    seed : int
        Seed of the draws.
    """

    name: ClassVar[str] = "random"

    seed: int = 0

    def __post_init__(self) -> None:
        self._require_int("seed", minimum=0)
        super().__post_init__()

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return fresh state for `num_layers` layers."""
        return [_RandomTracker(self, layer) for layer in range(num_layers)]


class _RandomTracker(ScoreTracker[Random]):
    def __init__(self, policy: Random, layer: int) -> None:
        super().__init__(policy)
        self._layer = layer
        self._cuts: list[int] = []  # of each sequence

    def scores(self) -> torch.Tensor:
        """Return uniform numbers, the same until a sequence is cut."""
        seen = self._observed()
        batch, heads, size, _ = seen.keys.shape
        cuts = self._cuts or [0] * batch
        scores = torch.zeros(batch, heads, size)
        for row, length in enumerate(seen.lengths):
            generator = torch.Generator().manual_seed(self._seed_of(cuts[row]))
            # One line a token: the newest tokens of two caches of unequal length differ.
            drawn = torch.rand(length, heads, generator=generator)
            scores[row, :, size - length :] = drawn.T
        return scores.to(seen.keys.device)

    def compact(self, keep: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        before = self._observed().lengths
        super().compact(keep, keys, values)
        cuts = self._cuts or [0] * len(before)
        after = self._observed().lengths
        self._cuts = [
            count + (new < old) for count, old, new in zip(cuts, before, after, strict=True)
        ]

    def select_batch(self, indices: torch.Tensor) -> None:
        super().select_batch(indices)
        if self._cuts:
            self._cuts = [self._cuts[index] for index in indices.tolist()]

    def reset(self) -> None:
        super().reset()
        self._cuts = []

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {**super().state_dict(), "cuts": torch.tensor(self._cuts, dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor], held: Observation) -> None:
        super().load_state_dict(state, held)
        self._cuts = state["cuts"].tolist()

    def _seed_of(self, cuts: int) -> int:
        # splitmix64's finalizer: neighbouring seeds must not give related streams.
        value = self._policy.seed * 0x9E3779B97F4A7C15 + (self._layer << 32) + cuts
        value &= _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return (value ^ (value >> 31)) >> 1
