"""How many tokens each head of a model needs: measured once, on any text, and kept.

Heads compete for the places that walks from recent tokens give: whoever's tokens are reached most
gets them. Which heads win is mostly the model's, not the text's, so its mean over some texts says
how a budget is best divided, and slots can stay where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from spectralkv.evaluation.errors import EvaluationError
from spectralkv.hf import EvictingCache, cache_argument
from spectralkv.policies import Spectral
from spectralkv.policies.head_shares import HeadShares, places_won, shares_of
from spectralkv.policies.spectral import renew


def calibrate(
    model: Any,
    sequences: Sequence[Sequence[int]],
    policy: Spectral,
    *,
    floor: float = 0.8,
    every: int = 32,
    batch: int = 4,
    on_progress: Callable[[int, int], None] | None = None,
) -> HeadShares:
    """Find which part of a budget each head needs.

    All heads of the model compete for the places of the policy's first population, apart from
    `floor` of them, which each head has for sure. Nothing is evicted meanwhile.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        The model.
    sequences : sequence of sequence of int
        Token ids, of one length, longer than the budget.
    policy : Spectral
        With a budget. Its first population must not be "novelty".
    floor : float
        In [0, 1].
    every : int
        Tokens between two looks at who wins; so many are fed at a time.
    batch : int
        Sequences at a time.
    on_progress : callable, optional
        Called with tokens fed so far and in all.

    Returns
    -------
    HeadShares
        For ``Spectral(head_shares=...)``.

    Raises
    ------
    EvaluationError
        The policy or the texts do not allow it.
    """
    budget = policy.budget
    if budget is None:
        raise EvaluationError("to calibrate, the policy needs a budget")
    lengths = sorted({len(sequence) for sequence in sequences})
    if len(lengths) != 1 or lengths[0] < budget + every:
        raise EvaluationError(
            f"to calibrate, sequences must be of one length, {budget + every} at least (budget and "
            f"step), got lengths {lengths}"
        )
    if not 0.0 <= floor <= 1.0:
        raise EvaluationError(f"floor must be from 0 to 1, got {floor:g}")
    least = policy.sinks + policy.window + 1
    if budget == least:
        raise EvaluationError(
            f"to calibrate, a budget must be above {least} tokens (sinks, window and one), got "
            f"{budget}"
        )
    first = policy.walk_config.populations[0]
    if first.restart == "novelty":
        raise EvaluationError("to calibrate, the first population must restart at recent tokens")
    watching = replace(
        policy, budget=None, populations=(replace(first, share=1.0, decay=None),), head_shares=None
    )
    places = policy.places_to_compete_for
    total = len(sequences) * lengths[0]
    done, looks = 0, 0
    wins: torch.Tensor | float = 0.0
    for start in range(0, len(sequences), batch):
        ids = torch.tensor([list(one) for one in sequences[start : start + batch]])
        ids = ids.to(model.device)
        cache = EvictingCache(model.config, watching, attention="model")
        for begin in range(0, ids.shape[1], every):
            with torch.no_grad():
                model(ids[:, begin : begin + every], **cache_argument(cache), use_cache=True)
            done += ids[:, begin : begin + every].numel()
            if on_progress is not None:
                on_progress(done, total)
            if begin + every < budget + every:
                continue
            scores = _scores(cache)  # slots follow the text
            is_free = torch.zeros_like(scores, dtype=torch.bool)
            is_free[..., policy.sinks : scores.shape[3] - policy.window] = True
            wins = wins + places_won(scores, is_free, places, int(floor * places)).sum(1)
            looks += ids.shape[0]
    if isinstance(wins, float):
        raise EvaluationError("to calibrate, there must be a text")
    kept = (wins / looks + (budget - places)).tolist()
    return shares_of(kept, budget, least)


def _scores(cache: EvictingCache) -> torch.Tensor:
    """Return (L, B, Hkv, S), float32: anew, of all tokens."""
    trackers = [layer.tracker for layer in cache.evicting_layers]
    renew(trackers)
    device = trackers[0].scores().device  # type: ignore[union-attr]
    return torch.stack([one.scores().to(device) for one in trackers])  # type: ignore[union-attr]
