"""TOVA: the tokens that the newest query attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spectralkv.policies.attention import attention_logits
from spectralkv.policies.base import Policy, Tracker
from spectralkv.policies.queries import QueryTracker


@dataclass(frozen=True, kw_only=True)
class TOVA(Policy):
    r"""Keep the tokens with the highest attention of the newest query.

    .. math:: S_j = \mathrm{mean}_h \, A^{h}_{T, j}

    over all query heads h of the layer, so all its heads keep the same tokens. As published there
    are neither sinks nor a window.

    References
    ----------
    Oren et al., "Transformers are Multi-State RNNs", arXiv:2401.06104.
    """

    name: ClassVar[str] = "tova"

    window: int = 0
    sinks: int = 0

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return fresh state for `num_layers` layers."""
        return [_TOVATracker(self, 1) for _ in range(num_layers)]


class _TOVATracker(QueryTracker[TOVA]):
    def scores(self) -> torch.Tensor:
        """Return the newest query's attention, the same for all heads."""
        seen, query = self._observed(), self._newest_queries()
        logits = attention_logits(
            query,
            seen.keys,
            scaling=seen.scaling,
            softcap=seen.softcap,
            valid=seen.valid,
            offset=seen.keys.shape[2] - 1,
        )
        attention = logits.softmax(-1).nan_to_num(0.0)  # (B, Hkv, G, 1, S)
        mean = attention.mean(dim=(1, 2)).to(torch.float32)
        return mean.expand(-1, seen.keys.shape[1], -1)
