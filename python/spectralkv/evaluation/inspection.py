"""Feeding a text through a policy to see what it makes of every token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spectralkv.evaluation.caches import CacheSettings, create_cache, create_policy
from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.generation import prefill, token_pieces
from spectralkv.evaluation.heatmap import EvictionRecorder, HeatMap
from spectralkv.evaluation.specs import FULL, PolicySpec

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from spectralkv.evaluation.models import LoadedModel


def inspect_tokens(
    loaded: LoadedModel,
    token_ids: Sequence[int],
    spec: PolicySpec,
    budget: int,
    *,
    chunk: int = 32,
    settings: CacheSettings | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> HeatMap:
    """Feed tokens as decoding would, and record how every token fared.

    Parameters
    ----------
    loaded : LoadedModel
        The model and its tokenizer.
    token_ids : sequence of int
        N token ids.
    spec : PolicySpec
        Any policy that evicts.
    budget : int
        Tokens to keep a layer and KV head; below N.
    chunk : int
        Tokens fed at a time.
    settings : CacheSettings, optional
        Interval, window and sinks.
    on_progress : callable, optional
        Called with (tokens fed, N).

    Returns
    -------
    HeatMap
        Standing, score and fate of every token.

    Raises
    ------
    EvaluationError
        The policy does not evict, refuses its arguments, or had nothing to evict.
    """
    if spec.name == FULL:
        raise EvaluationError("the full cache lets nothing go: inspect another policy")
    settings = settings if settings is not None else CacheSettings()
    policy = create_policy(spec, budget, settings)
    recorder = EvictionRecorder(window=policy.protected_window, sinks=policy.sinks)
    cache = create_cache(loaded.model, policy, on_evict=recorder)
    prefill(loaded.model, token_ids, cache, chunk=chunk, on_progress=on_progress)
    pieces = token_pieces(loaded.tokenizer, token_ids)
    return recorder.heat_map(pieces, policy=spec.label, budget=budget)
