"""H2O: the tokens that have drawn the most attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spectralkv.policies.attention import attention_blocks
from spectralkv.policies.base import Observation, Policy, Tracker
from spectralkv.policies.slot_state import SlotTracker


@dataclass(frozen=True, kw_only=True)
class H2O(Policy):
    r"""Keep heavy hitters: tokens with the largest accumulated attention.

    .. math:: S_j = \sum_{t \ge j} \gamma^{T - t} \; \mathrm{mean}_g \, A_{t, j}

    with A the float32 softmax attention of query t on token j, averaged over the query heads g
    that share a KV head, T the newest query and γ = `decay`. As published, half of the budget goes
    to the heaviest tokens and half to the most recent, and there are no sinks.

    Parameters
    ----------
    window : int or None
        Most recent tokens that always stay. None: half of the budget, as published.
    decay : float
        Factor of all sums for each new token, in (0, 1]. 1: as published.

    Notes
    -----
    After a roll-back (:meth:`Tracker.truncate`) the attention that the withdrawn queries paid to
    older tokens stays counted.

    References
    ----------
    Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
    Models", arXiv:2306.14048.
    """

    name: ClassVar[str] = "h2o"

    window: int | None = None  # type: ignore[assignment] # readers go by protected_window
    sinks: int = 0
    decay: float = 1.0

    def __post_init__(self) -> None:
        self._require_number("decay", minimum=0, maximum=1)
        self._require(self.decay > 0, "decay", "more than 0")
        super().__post_init__()

    @property
    def protected_window(self) -> int:
        """Newest tokens that a cut never takes."""
        if self.window is not None:
            return self.window
        return 0 if self.budget is None else self.budget // 2

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return fresh state for `num_layers` layers."""
        return [_H2OTracker(self) for _ in range(num_layers)]


class _H2OTracker(SlotTracker[H2O]):
    def __init__(self, policy: H2O) -> None:
        super().__init__(policy, 1)

    def observe(self, observation: Observation) -> None:
        super().observe(observation)
        query = observation.query
        dtype = torch.promote_types(query.dtype, torch.float32)
        sums = self._take_in(observation, dtype)[..., 0]
        weight = self._query_weights(observation)
        if weight is not None:
            sums *= self._decay_of_chunk(observation)
        for block, attention in attention_blocks(
            query,
            observation.keys,
            scaling=observation.scaling,
            softcap=observation.softcap,
            valid=observation.valid,
        ):
            if weight is None:
                drawn = attention.sum(dim=(2, 3))
            else:
                drawn = (attention * weight[:, None, None, block, None]).sum(dim=(2, 3))
            sums.add_(drawn, alpha=1.0 / attention.shape[2])

    def scores(self) -> torch.Tensor:
        """Return the accumulated attention."""
        return self._held()[..., 0].to(torch.float32)

    def _query_weights(self, observation: Observation) -> torch.Tensor | None:
        """Return what each new query weighs, (B, Q) or (1, Q); None: 1."""
        count = observation.query.shape[2]
        if self._policy.decay == 1.0 and observation.new_valid is None:
            return None
        dtype = torch.promote_types(observation.query.dtype, torch.float32)
        device = observation.query.device
        if observation.new_valid is None:
            newer = torch.arange(count - 1, -1, -1, dtype=dtype, device=device)[None]
            return self._policy.decay**newer
        real = observation.new_valid.to(dtype)
        newer = real.flip(1).cumsum(1).flip(1) - real
        return self._policy.decay**newer * real

    def _decay_of_chunk(self, observation: Observation) -> torch.Tensor | float:
        if observation.new_valid is None:
            return self._policy.decay ** observation.query.shape[2]
        tokens = observation.new_valid.sum(1).to(torch.float64)
        return (self._policy.decay**tokens)[:, None, None]
