"""Policies as presses of NVIDIA's kvpress: ``pip install 'spectralkv[kvpress]'``.

kvpress wants an older transformers than :mod:`spectralkv.hf`, which is not needed here.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import BasePress
from kvpress.utils import get_prerope_query_states
from transformers import PreTrainedModel, QuantizedCache

from spectralkv.policies import Observation, Policy, Spectral, Tracker
from spectralkv.policies.base import AttendingTracker

__all__ = ["PolicyPress", "SpectralPress"]


@dataclass
class PolicyPress(BasePress):  # type: ignore[misc]
    """A press that keeps what a policy chooses, while the prompt is read and while tokens are made.

    Unlike a ``DecodingPress`` it sees each query where it stands, turned by its own position, and
    keeps the slots in the order of the text. A layer is cut to ``policy.budget`` whenever it holds
    ``budget + interval`` tokens.

    Parameters
    ----------
    policy : Policy
        What to keep, see :mod:`spectralkv.policies`.

    Raises
    ------
    ValueError
        The cache is quantized, or holds tokens that the press has not seen; or heads of the policy
        keep different numbers of tokens.

    Notes
    -----
    For prompts without padding: kvpress shows its presses no mask. Novelty compares keys as they
    lie, turned by their positions. In a ``ComposedPress`` it must be the only press that drops
    tokens.

    Examples
    --------
    >>> with PolicyPress(Spectral(budget=512))(model):  # doctest: +SKIP
    ...     model.generate(**inputs, past_key_values=DynamicCache())
    """

    policy: Policy
    _trackers: dict[int, Tracker] = field(default_factory=dict, init=False, repr=False)
    _lengths: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _seen: dict[int, int] = field(default_factory=dict, init=False, repr=False)
    _num_layers: int = field(default=0, init=False, repr=False)

    def post_init_from_model(self, model: PreTrainedModel) -> None:
        """Learn how many layers there are."""
        self._num_layers = model.config.get_text_config(decoder=True).num_hidden_layers

    @property
    def compression_ratio(self) -> float:
        """Part of the present text's tokens that a layer has let go; 0 before the first pass."""
        seen = sum(self._seen.values())
        return 1.0 - sum(self._lengths.values()) / seen if seen else 0.0

    @contextmanager
    def __call__(self, model: PreTrainedModel) -> Generator[None, None, None]:
        """Press the model's caches as long as the context lasts."""
        with super().__call__(model):
            try:
                yield
            finally:
                self._forget()

    def _forget(self) -> None:
        self._trackers, self._lengths, self._seen = {}, {}, {}

    def forward_hook(
        self,
        module: torch.nn.Module,
        input: list[torch.Tensor],  # noqa: A002, ARG002
        kwargs: dict[str, Any],
        output: list[Any],
    ) -> list[Any]:
        """Show a layer's new queries to the policy, and cut the layer where it is due."""
        cache = kwargs["past_key_values"]
        if isinstance(cache, QuantizedCache):
            raise ValueError("[kvpress] cache must not be quantized, got a QuantizedCache")
        layer: int = module.layer_idx  # type: ignore[assignment]
        held = cache.layers[layer]
        query = _query_states(module, kwargs)
        batch, _, count, _ = query.shape
        tracker = self._tracker(layer, held.keys.shape[2] - count)
        with torch.no_grad():
            tracker.observe(
                Observation(
                    query=query,
                    keys=held.keys,
                    values=held.values,
                    lengths=(held.keys.shape[2],) * batch,
                    valid=None,
                    new_valid=None,
                    scaling=float(module.scaling),  # type: ignore[arg-type]
                    softcap=getattr(module, "attn_logit_softcapping", None),
                )
            )
            keep = tracker.keep()
            if keep is not None:
                keys, values = held.keys.clone(), held.values.clone()
                tracker.compact(keep, keys, values)
                size = keep.shape[2]
                held.keys = keys[:, :, :size].contiguous()
                held.values = values[:, :, :size].contiguous()
        self._lengths[layer] = held.keys.shape[2]
        self._seen[layer] = self._seen.get(layer, 0) + count
        return output

    def _tracker(self, layer: int, before: int) -> Tracker:
        """Return the tracker of a layer that held `before` tokens when the pass began."""
        if before == 0 and self._lengths.get(layer, 0) > 0:  # another text
            self._forget()
        if not self._trackers:
            self._trackers = dict(enumerate(_even_trackers(self.policy, self._num_layers)))
        tracker, known = self._trackers[layer], self._lengths.get(layer, 0)
        if before > known:
            raise ValueError(
                f"[kvpress] layer {layer} must hold the {known} tokens that the press has seen, "
                f"got {before}: use the press from the first token on"
            )
        if before < known:  # the pipeline takes an answer back
            tracker.truncate(known - before)
            self._seen[layer] -= known - before
        return tracker


class SpectralPress(PolicyPress):
    """A :class:`PolicyPress` with the :class:`spectralkv.policies.Spectral` policy.

    Parameters
    ----------
    budget : int
        Tokens that each KV head keeps.
    **options
        Options of :class:`spectralkv.policies.Spectral`: interval, window, sinks, top_k, seed ...

    Examples
    --------
    >>> press = SpectralPress(budget=512)  # doctest: +SKIP
    >>> pipe("kv-press-text-generation", context, question=question, press=press)  # doctest: +SKIP
    """

    def __init__(self, budget: int, **options: Any) -> None:
        super().__init__(Spectral(budget=budget, **options))


def _even_trackers(policy: Policy, num_layers: int) -> list[Tracker]:
    trackers = policy.trackers(num_layers)
    if any(isinstance(one, AttendingTracker) and one.may_divide for one in trackers):
        raise ValueError(
            f"[kvpress] policy must keep as many tokens of each head, got {policy.name} with heads "
            "that keep different numbers"
        )
    return trackers


def _query_states(module: torch.nn.Module, kwargs: dict[str, Any]) -> torch.Tensor:
    """Return the queries (B, Hq, Q, D) as attention saw them."""
    query = get_prerope_query_states(module, kwargs["hidden_states"])
    turn = sys.modules[type(module).__module__].apply_rotary_pos_emb
    turned: torch.Tensor = turn(query, query, *kwargs["position_embeddings"])[0]
    return turned
