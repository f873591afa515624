"""KeyDiff: the tokens whose keys are least like the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional

from spectralkv.policies.base import Policy, ScoreTracker, Tracker


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    r"""Keep the tokens with the most distinctive keys.

    .. math:: S_j = -\cos\Big(k_j, \; \mathrm{mean}_i \, \frac{k_i}{\lVert k_i \rVert}\Big)

    over the keys k of one KV head. No attention is looked at. As published there are neither sinks
    nor a window.

    References
    ----------
    Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in
    Resource-Constrained Environments", arXiv:2504.15364.
    """

    name: ClassVar[str] = "keydiff"

    window: int = 0
    sinks: int = 0

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return fresh state for `num_layers` layers."""
        return [_KeyDiffTracker(self) for _ in range(num_layers)]


class _KeyDiffTracker(ScoreTracker[KeyDiff]):
    def scores(self) -> torch.Tensor:
        """Return minus the cosine with the mean direction."""
        seen = self._observed()
        direction = key_directions(seen.keys, seen.valid)
        mean = functional.normalize(direction.sum(2, keepdim=True), dim=-1)
        return -(direction * mean).sum(-1).to(torch.float32)


def key_directions(keys: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Return unit keys (B, Hkv, S, D), float32 or wider; zeros in empty slots."""
    direction = functional.normalize(
        keys.to(torch.promote_types(keys.dtype, torch.float32)), dim=-1
    )
    if valid is not None:
        direction = direction.masked_fill(~valid[:, None, :, None], 0.0)
    return direction
