"""The two caches of the oracle: one that shows all attention, one that holds what was chosen.

Apart from `capture` and `oracle` because its classes need torch and transformers when they are
made, which importing `spectralkv.evaluation` must not.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from spectralkv.hf import EvictingCache, EvictingLayer, masks, tap
from spectralkv.policies.attention import attention_blocks
from spectralkv.policies.base import Observation, Policy, ScoreTracker, Tracker
from spectralkv.policies.full import Full

#: Called with the place of a layer among those that can evict, and its new rows of attention:
#: float16 (Hkv, Q, S) on the CPU, averaged over the query heads that share a KV head.
Write = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Watch(Policy):
    """Keep everything, and show all attention.

    Parameters
    ----------
    write : callable
        Where the attention goes.
    """

    name: ClassVar[str] = "watch"

    budget: int | None = None
    write: Write

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return a watcher for each layer."""
        return [_Watcher(self, order) for order in range(num_layers)]


class _Watcher(ScoreTracker[Watch]):
    def __init__(self, policy: Watch, order: int) -> None:
        super().__init__(policy)
        self._order = order

    def observe(self, observation: Observation) -> None:
        count = observation.query.shape[2]
        heads, size = observation.keys.shape[1:3]
        rows = torch.empty(heads, count, size, dtype=torch.float16, device=observation.keys.device)
        for block, attention in attention_blocks(
            observation.query,
            observation.keys,
            scaling=observation.scaling,
            softcap=observation.softcap,
            valid=observation.valid,
        ):
            rows[:, block] = attention[0].mean(1).to(torch.float16)
        self._policy.write(self._order, rows.cpu())

    def scores(self) -> torch.Tensor:
        raise RuntimeError("[watch] a cache that is watched ranks no tokens")


class KeptLayer(CacheLayerMixin):
    """Keys and values of chosen tokens, and whatever comes after them.

    Parameters
    ----------
    keys, values : torch.Tensor
        (B, Hkv, S, D) and (B, Hkv, S, Dv) of the tokens that were kept, each with the rotary
        embedding of its own position.
    seen : int
        Tokens that there were before any was let go: the next one's position.
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, seen: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self._keys, self._values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._seen = seen

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: the layer was made with tokens."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens; return keys and values of all that are held."""
        self._keys = self.keys = torch.cat((self._keys, key_states), 2)
        self._values = self.values = torch.cat((self._values, value_states), 2)
        self._seen += key_states.shape[2]
        tap.offer(self)
        return self._keys, self._values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns of the next mask, and the column its first one stands for."""
        size = self._keys.shape[2]
        return size + query_length, self._seen - size

    def get_seq_length(self) -> int:
        """Return the tokens seen."""
        return self._seen

    def get_max_length(self) -> int:
        """Return -1: there is no bound."""
        return -1

    def attend(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> None:
        """Leave the attention to the model."""

    def before_attention(
        self, query: torch.Tensor, mask: torch.Tensor | None, implementation: str
    ) -> torch.Tensor | None:
        """Return the mask for the tokens that are held.

        The model made its mask for another layer, which may hold more or fewer of them.
        """
        if mask is None and (query.shape[2] == 1 or implementation != "sdpa"):
            return mask
        return masks.rebuild(mask, None, query, self._keys.shape[2], implementation)

    def after_attention(
        self, query: torch.Tensor, scaling: float | None, softcap: float | None
    ) -> None:
        """Do nothing: no more is evicted."""


def full_cache(config: Any, write: Write | None = None) -> EvictingCache:
    """Return an empty cache that keeps all and, if asked to, shows each layer's attention.

    Raises
    ------
    ValueError
        The model's attention cannot be watched; see `spectralkv.hf.EvictingCache`.
    """
    return EvictingCache(config, Full() if write is None else Watch(write=write))


def kept_cache(
    full: EvictingCache,
    others: Mapping[int, Any],
    *,
    tokens: int,
    keep: Mapping[int, torch.Tensor],
    batch: int,
) -> Cache:
    """Return a cache that holds what was kept of a full one.

    Parameters
    ----------
    full : EvictingCache
        It holds one sequence, and at least the first `tokens` of it. Not changed.
    others : mapping of int to object
        Those layers' caches that never evict, as they were after `tokens` tokens. Not changed.
    tokens : int
        N: the tokens that there were before anything was let go.
    keep : mapping of int to torch.Tensor
        int64 (B, Hkv, M) a layer: positions that stay, ascending. A layer that is not named
        keeps all N.
    batch : int
        B: cuts that are tried at once, one a row.

    Returns
    -------
    transformers.Cache
        B rows; the keys and values of all other tokens are not in it.
    """
    layers: list[Any] = []
    for index, layer in enumerate(full.layers):
        if not isinstance(layer, EvictingLayer):
            other = copy.deepcopy(others[index])
            other.batch_repeat_interleave(batch)
            layers.append(other)
            continue
        if layer.keys is None or layer.values is None:
            raise RuntimeError(f"[oracle] layer {layer.index} holds nothing")
        held = (layer.keys[:, :, :tokens], layer.values[:, :, :tokens])
        keys, values = (tensor.expand(batch, -1, -1, -1) for tensor in held)
        if index in keep:
            chosen = keep[index].to(keys.device)[..., None]
            keys = keys.gather(2, chosen.expand(-1, -1, -1, keys.shape[3]))
            values = values.gather(2, chosen.expand(-1, -1, -1, values.shape[3]))
        layers.append(KeptLayer(keys, values, tokens))
    tap.install()
    return Cache(layers=layers)
