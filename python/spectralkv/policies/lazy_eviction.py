"""LazyEviction: the tokens whose attention is due to come back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from spectralkv.policies.attention import attention_blocks
from spectralkv.policies.base import Observation, Policy, Tracker
from spectralkv.policies.slot_state import SlotTracker


@dataclass(frozen=True, kw_only=True)
class LazyEviction(Policy):
    r"""Keep tokens that are no longer unattended than they once were before.

    A query activates the tokens that draw at least `threshold` of its attention. For each token
    are known the step :math:`\tau_j` of its last activation and its maximum recurrence interval
    :math:`m_j`, the longest time from one activation to the next; a token that nobody has
    activated has :math:`m_j = 0`. At step t, with σ the logistic function,

    .. math::
        S_j = 2 \sigma\Big(-\frac{t - \tau_j}{m_j}\Big) + 2 \sigma(1 - m_j) \; [m_j > 0]

    and 0 where :math:`m_j = 0`: a token is likely to come back while its silence is short against
    its longest one, and one that comes back often goes before one that seldom does. Tokens are let
    go every `interval` steps, not at each one, and those of the last `window` steps stay. There
    are no sinks. In the paper `interval` and `window` are one number, W.

    Parameters
    ----------
    threshold : float
        α, the least share of a query's attention that activates a token, in (0, 1].

    Notes
    -----
    W and α are tuned for each model and task: W so that 80 % of all tokens have a shorter
    interval. The defaults are those published for DeepSeek-R1-Distill-Llama-8B on MATH-500; for
    its Qwen models W is 175 and α 0.0001.

    What the paper leaves open, or settles for decoding with one KV head a query head alone:

    - Query heads that share a KV head share its cache. Here one of them suffices to activate a
      token.
    - A step is one query. A prompt's queries count like those of decoded tokens, as its tokens are
      cut like them; published, a prompt is never looked at.
    - The published code adds 1 to :math:`(t - \tau_j) / m_j`; the paper's formula, which stands
      here as others quote it, does not.
    - A new token counts as activated one step before its own: so its own query, if it activates
      it, sets :math:`m_j` to 1. This is from the published code.
    - After a roll-back (:meth:`Tracker.truncate`) time goes on, and what the withdrawn queries
      activated stays so.

    References
    ----------
    Zhang et al., "LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient
    Long Reasoning", arXiv:2506.15969.
    """

    name: ClassVar[str] = "lazy_eviction"

    interval: int = 52
    window: int = 52
    sinks: int = 0
    threshold: float = 0.0005

    def __post_init__(self) -> None:
        self._require_number("threshold", minimum=0, maximum=1)
        # Every query would activate tokens that come after it.
        self._require(self.threshold > 0, "threshold", "more than 0")
        super().__post_init__()

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return fresh state for `num_layers` layers."""
        return [_LazyTracker(self) for _ in range(num_layers)]


class _LazyTracker(SlotTracker[LazyEviction]):
    def __init__(self, policy: LazyEviction) -> None:
        # Of each slot: the step of the last activation, and the maximum recurrence interval.
        super().__init__(policy, 2)
        self._step: torch.Tensor | None = None  # int32 (B, 1): queries of each sequence so far

    def observe(self, observation: Observation) -> None:
        super().observe(observation)
        first = self._size
        last, longest = self._take_in(observation, torch.int32).unbind(-1)
        steps = self._steps(observation)
        last[:, :, first:] = steps[:, None] - 1
        for block, attention in attention_blocks(
            observation.query,
            observation.keys,
            scaling=observation.scaling,
            softcap=observation.softcap,
            valid=observation.valid,
        ):
            active = attention.amax(2) >= self._policy.threshold  # (B, Hkv, q, S)
            if observation.new_valid is not None:
                active &= observation.new_valid[:, None, block, None]
            step = steps[:, None, block, None]
            activated = torch.where(active, step, last[:, :, None]).cummax(2).values
            before = torch.cat((last[:, :, None], activated[:, :, :-1]), 2)
            # 0 where a query does not activate the token.
            longest.copy_(torch.maximum(longest, (activated - before).amax(2)))
            last.copy_(activated[:, :, -1])

    def scores(self) -> torch.Tensor:
        """Return how likely each token's attention comes back, from 0 to 2."""
        last, longest = self._held().to(torch.float32).unbind(-1)
        if self._step is None:
            raise RuntimeError("[lazy_eviction] there are no steps yet")
        silence = self._step[:, :, None] - last
        recurs = 2.0 * torch.sigmoid(-silence / longest)
        often = 2.0 * torch.sigmoid(1.0 - longest)
        return (recurs + often).masked_fill(longest == 0, 0.0)

    def select_batch(self, indices: torch.Tensor) -> None:
        super().select_batch(indices)
        if self._step is not None:
            self._step = self._step.index_select(0, indices)

    def reset(self) -> None:
        super().reset()
        self._step = None

    def nbytes(self) -> int:
        return super().nbytes() + (0 if self._step is None else self._step.nbytes)

    def state_dict(self) -> dict[str, torch.Tensor]:
        state = super().state_dict()
        if self._step is not None:
            state["step"] = self._step
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor], held: Observation) -> None:
        super().load_state_dict(state, held)
        self._step = state.get("step")

    def _steps(self, observation: Observation) -> torch.Tensor:
        """Count the new queries: int32 (B, Q), of each the step it is; padding is none."""
        batch, _, count, _ = observation.query.shape
        device = observation.query.device
        if self._step is None:
            self._step = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        if observation.new_valid is None:
            new = torch.arange(1, count + 1, dtype=torch.int32, device=device)
        else:
            new = observation.new_valid.cumsum(1, dtype=torch.int32)
        steps = self._step + new
        self._step = steps[:, -1:].clone()
        return steps
