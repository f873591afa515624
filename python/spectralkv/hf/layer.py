"""One layer of an evicting cache."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from spectralkv.config import Rotary
from spectralkv.hf import masks, tap
from spectralkv.policies.base import (
    Observation,
    Policy,
    Tracker,
    check_keep,
    host_numbers,
    live_slots,
    move_slots,
)


@dataclass(frozen=True, kw_only=True)
class EvictionEvent:
    """One cut of one layer. Axes: B sequences, Hkv KV heads, S slots before it, M after it."""

    layer: int
    """Index of the layer in the model."""
    tokens_seen: int
    """Tokens the cache has seen, as `get_seq_length` counts them."""
    positions: torch.Tensor
    """int32 (B, Hkv, S): where in its text the token in each slot stands; -1: the slot is empty."""
    scores: torch.Tensor
    """float32 (B, Hkv, S): what the policy ranked by; without meaning in empty slots."""
    keep: torch.Tensor
    """int32 (B, Hkv, M): the slots that stay, ascending, right-aligned behind -1."""


class EvictingLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one attention layer, cut back to the policy's budget.

    They live in a slab that is allocated ahead, so that taking in a token moves nothing. The
    layer's length in tokens (`get_seq_length`) never shrinks by eviction; what it holds
    (`num_slots`) does.

    Parameters
    ----------
    index : int
        Index of the layer in the model.
    policy : Policy
        What to keep.
    tracker : Tracker or None
        State of the policy for this layer. None: nothing is ever evicted.
    reader : MaskReader
        Shared by the layers of a cache.
    rotary : Rotary or None
        How the model turns its keys.
    on_evict : callable or None
        Called with an :class:`EvictionEvent` before each cut.
    """

    is_compileable = False
    is_sliding = False

    def __init__(
        self,
        index: int,
        policy: Policy,
        tracker: Tracker | None,
        reader: masks.MaskReader,
        rotary: Rotary | None = None,
        on_evict: Callable[[EvictionEvent], None] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.evictions = 0
        self._policy = policy
        self._tracker = tracker
        self._reader = reader
        self._rotary = rotary
        self._on_evict = on_evict
        # `crop` restores what was before only where nothing can have been evicted in between.
        self.is_croppable = policy.budget is None
        self._clear()

    def _clear(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.is_initialized = False
        self._key_slab: torch.Tensor | None = None  # (B, Hkv, capacity, D)
        self._value_slab: torch.Tensor | None = None  # (B, Hkv, capacity, Dv)
        self._valid_slab: torch.Tensor | None = None  # bool (B, capacity); None: no empty slots
        self._size = 0  # slots in use
        self._capacity = 0
        self._seen = 0  # tokens seen, padding included
        self._lengths: tuple[int, ...] = ()  # tokens held by each sequence
        self._tokens: tuple[int, ...] = ()  # real tokens seen by each, while a policy watches
        self._new: masks.NewTokens | None = None
        self._awaits_attention = False
        self._compacted = False  # slots no longer follow the text
        # Of the last attention: query heads, factor of the dot products, softcap.
        self._attention: tuple[int, float, float | None] | None = None
        # Positions of the slots that were there at the last compaction, and the tokens each
        # sequence had seen then. Those of later slots follow from them.
        self._base_positions: torch.Tensor | None = None
        self._base_seen: tuple[int, ...] = ()

    # -- what the model calls

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take over shapes, dtype and device of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch = key_states.shape[0]
        self._lengths = self._tokens = self._base_seen = (0,) * batch
        # Normal tensors, so that a cache can be used inside and outside of inference mode.
        with torch.inference_mode(False):
            self._key_slab = key_states.new_empty(_with_size(key_states, 0))
            self._value_slab = value_states.new_empty(_with_size(value_states, 0))
        self._show()
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the new tokens' keys and values.

        Parameters
        ----------
        key_states, value_states : torch.Tensor
            (B, Hkv, Q, D) and (B, Hkv, Q, Dv).

        Returns
        -------
        keys, values : torch.Tensor
            (B, Hkv, S, ·), views of the slab, valid until the next call.

        Raises
        ------
        ValueError
            Shape or dtype differ from what the cache holds.
        RuntimeError
            The model's attention did not pass the tap.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._awaits_attention:
            raise RuntimeError(
                f"[cache] layer {self.index}: expected the keys of the last forward pass to reach "
                "attention through transformers' attention interface, got none. Eviction needs it: "
                "a compiled model, attention code outside of transformers, or an interrupted "
                "forward pass bypass it. After an interruption, reset() the cache."
            )
        start = self._size
        count = key_states.shape[2]
        end = start + count
        self._check_new(key_states, value_states)
        if end > self._capacity:
            self._grow(end)
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        self._key_slab.narrow(2, start, count).copy_(key_states)  # type: ignore[union-attr]
        self._value_slab.narrow(2, start, count).copy_(value_states)  # type: ignore[union-attr]
        self._size = end
        self._seen += count
        keys, values = self._show()
        if self._tracker is not None:
            self._awaits_attention = True
            tap.offer(self)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns of the next mask, and the column its first one stands for."""
        return self._size + query_length, self._seen - self._size

    def get_seq_length(self) -> int:
        """Return the tokens seen; evicted ones count."""
        return self._seen

    def get_max_length(self) -> int:
        """Return -1: there is no bound on the tokens seen."""
        return -1

    # -- what the tap calls

    def before_attention(
        self, query: torch.Tensor, mask: torch.Tensor | None, implementation: str
    ) -> torch.Tensor | None:
        """Learn which new tokens are real, and return the mask for the slots as they are."""
        batch, count = query.shape[0], query.shape[2]
        new = self._new = self._reader.new_tokens(mask, batch, count, self._seen)
        self._lengths = tuple(map(operator.add, self._lengths, new.counts))
        self._tokens = tuple(map(operator.add, self._tokens, new.counts))
        if new.valid is not None and self._valid_slab is None:
            self._valid_slab = self._all_valid()
        valid = None
        if self._valid_slab is not None:
            fresh = self._valid_slab[:, self._size - count : self._size]
            if new.valid is None:
                fresh.fill_(True)
            else:
                fresh.copy_(new.valid)
            valid = self._valid_slab[:, : self._size]
        if not self._compacted:
            return mask
        # Without a mask, transformers' sdpa would take several new tokens for the first ones.
        if mask is None and valid is None and (count == 1 or implementation != "sdpa"):
            return mask
        return masks.rebuild(mask, valid, query, self._size, implementation)

    def after_attention(
        self, query: torch.Tensor, scaling: float | None, softcap: float | None
    ) -> None:
        """Show the queries to the policy, and cut the sequences that are due."""
        if self._tracker is None or self._new is None or self.keys is None or self.values is None:
            raise RuntimeError(f"[cache] layer {self.index}: attention without an update")
        self._awaits_attention = False
        if scaling is None:
            scaling = query.shape[3] ** -0.5
        self._attention = query.shape[1], scaling, softcap
        observation = self._observation(query, self._new.valid, scaling, softcap)
        # Entering the contexts costs as much as the rest of this method; generate() needs neither.
        if torch.is_inference_mode_enabled() or torch.is_grad_enabled():
            with torch.inference_mode(False), torch.no_grad():
                self._observe(self._tracker, observation)
        else:
            self._observe(self._tracker, observation)

    def _observation(
        self,
        query: torch.Tensor,
        new_valid: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Observation:
        return Observation(
            query=query,
            keys=self.keys,  # type: ignore[arg-type] # the caller has looked
            values=self.values,  # type: ignore[arg-type]
            lengths=self._lengths,
            valid=None if self._valid_slab is None else self._valid_slab[:, : self._size],
            new_valid=new_valid,
            scaling=scaling,
            softcap=softcap,
            rotary=self._rotary,
        )

    def _observe(self, tracker: Tracker, observation: Observation) -> None:
        tracker.observe(observation)
        if observation.valid is not None and observation.new_valid is not None:
            self._close_gaps(observation.valid)
        keep = tracker.keep()
        if keep is not None:
            self._cut(keep)

    # -- what generation calls

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest ``-tokens_to_remove`` tokens.

        Raises
        ------
        ValueError
            The number is positive.
        RuntimeError
            More tokens are to go than are surely still there: after a cut, those that came since
            and the policy's window.
        """
        tokens_to_remove = int(tokens_to_remove)  # some versions of transformers pass a tensor
        if tokens_to_remove > 0:
            raise ValueError(
                "[crop] tokens_to_remove must be 0 or minus the number of tokens, "
                f"got {tokens_to_remove}"
            )
        count = -tokens_to_remove
        if count == 0 or not self.is_initialized:
            return
        base = 0 if self._base_positions is None else self._base_positions.shape[2]
        reachable = self._size - base
        if base:
            reachable = min(self._size, reachable + self._policy.protected_window)
        if count > reachable:
            raise RuntimeError(
                f"[crop] layer {self.index}: at most {reachable} tokens can be taken back "
                f"(those since the last cut and the window), got {count}"
            )
        end = self._size - count
        if self._valid_slab is None:
            gone = (count,) * len(self._lengths)
        else:
            gone = tuple(self._valid_slab[:, end : self._size].sum(-1).tolist())
        self._lengths = tuple(map(operator.sub, self._lengths, gone))
        self._tokens = tuple(map(operator.sub, self._tokens, gone))
        if self._base_positions is not None and end < base:
            lost = (self._base_positions[:, 0, end:] >= 0).sum(-1).tolist()
            self._base_positions = self._base_positions[:, :, :end]
            self._base_seen = tuple(map(operator.sub, self._base_seen, lost))
        self._size = end
        self._seen -= count
        self._awaits_attention = False
        self._show()
        if self._tracker is not None:
            self._tracker.truncate(count)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make sequence i a copy of what sequence ``beam_idx[i]`` was."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Make sequence i a copy of what sequence ``indices[i]`` was."""
        if not self.is_initialized or self._key_slab is None or self._value_slab is None:
            return
        with torch.inference_mode(False), torch.no_grad():
            index = torch.as_tensor(indices, device=self.device)
            index = index.nonzero()[:, 0] if index.dtype == torch.bool else index.to(torch.int64)
            self._key_slab = self._key_slab.index_select(0, index)
            self._value_slab = self._value_slab.index_select(0, index)
            if self._valid_slab is not None:
                self._valid_slab = self._valid_slab.index_select(0, index)
            if self._base_positions is not None:
                self._base_positions = self._base_positions.index_select(0, index)
            chosen = index.tolist()
            self._lengths = tuple(self._lengths[row] for row in chosen)
            self._tokens = tuple(self._tokens[row] for row in chosen)
            self._base_seen = tuple(self._base_seen[row] for row in chosen)
            self._show()
            if self._tracker is not None:
                self._tracker.select_batch(index)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times."""
        if self.is_initialized:
            rows = torch.arange(len(self._lengths), device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self._clear()
        self.evictions = 0
        if self._tracker is not None:
            self._tracker.reset()

    # -- saving

    def state_dict(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return all that :meth:`load_state_dict` needs: tensors, and what JSON can hold.

        Raises
        ------
        RuntimeError
            A forward pass is under way, or was interrupted.
        TypeError
            The policy's tracker cannot be saved.
        """
        if self._awaits_attention:
            raise RuntimeError(
                f"[save] layer {self.index}: expected a forward pass that has ended, got one that "
                "is under way or was interrupted"
            )
        if self.keys is None or self.values is None:
            return {}, {}
        tensors = {"keys": self.keys, "values": self.values}
        if self._valid_slab is not None:
            tensors["valid"] = self._valid_slab[:, : self._size]
        if self._base_positions is not None:
            tensors["positions"] = self._base_positions
        if self._tracker is not None:
            own = self._tracker.state_dict()
            tensors.update({f"policy.{name}": tensor for name, tensor in own.items()})
        numbers = {
            "seen": self._seen,
            "lengths": self._lengths,
            "tokens": self._tokens,
            "base_seen": self._base_seen,
            "compacted": self._compacted,
            "evictions": self.evictions,
            "attention": self._attention,
        }
        return tensors, numbers

    def load_state_dict(
        self, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, Any]
    ) -> None:
        """Take over what :meth:`state_dict` of a layer of the same model and policy returned.

        The tensors become this layer's own.
        """
        self.reset()
        if not tensors:
            return
        keys, values = tensors["keys"], tensors["values"]
        self.lazy_initialization(keys, values)
        self._key_slab, self._value_slab = keys, values
        self._valid_slab = tensors.get("valid")
        self._base_positions = tensors.get("positions")
        self._size = self._capacity = keys.shape[2]
        self._seen = numbers["seen"]
        self._lengths = tuple(numbers["lengths"])
        self._tokens = tuple(numbers["tokens"])
        self._base_seen = tuple(numbers["base_seen"])
        self._compacted = numbers["compacted"]
        self.evictions = numbers["evictions"]
        self._show()
        if self._tracker is None or numbers["attention"] is None:
            return
        heads, scaling, softcap = self._attention = tuple(numbers["attention"])
        no_queries = keys.new_empty(keys.shape[0], heads, 0, keys.shape[3])
        own = {
            name.removeprefix("policy."): tensor
            for name, tensor in tensors.items()
            if name.startswith("policy.")
        }
        self._tracker.reserve(self._capacity)
        held = self._observation(no_queries, None, scaling, softcap)
        self._tracker.load_state_dict(own, held)

    # -- inspection

    @property
    def num_slots(self) -> int:
        """Slots in use: what the longest sequence holds, empty slots included."""
        return self._size

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens each sequence holds; without a tracker, padding counts."""
        return (self._size,) * len(self._lengths) if self._tracker is None else self._lengths

    def positions(self) -> torch.Tensor:
        """Return int32 (B, Hkv, S): where in its text each slot's token stands, -1 if empty."""
        if self.keys is None:
            return torch.empty(0, 0, 0, dtype=torch.int32)
        batch, heads = self.keys.shape[:2]
        base = 0 if self._base_positions is None else self._base_positions.shape[2]
        if self._valid_slab is None:
            rank = torch.arange(self._size - base, device=self.device).expand(batch, -1)
            empty = None
        else:
            valid = self._valid_slab[:, base : self._size]
            rank, empty = valid.cumsum(-1) - 1, ~valid
        later = rank + host_numbers(self._base_seen, rank.device)[:, None]
        if empty is not None:
            later = later.masked_fill(empty, -1)
        later = later.to(torch.int32)[:, None].expand(-1, heads, -1)
        if self._base_positions is None:
            return later.contiguous()
        return torch.cat((self._base_positions, later), -1)

    def kv_nbytes(self) -> int:
        """Bytes of the slabs."""
        slabs = (self._key_slab, self._value_slab)
        return sum(slab.untyped_storage().nbytes() for slab in slabs if slab is not None)

    def state_nbytes(self) -> int:
        """Bytes of all that is kept beside keys and values."""
        own = (self._valid_slab, self._base_positions)
        state = 0 if self._tracker is None else self._tracker.nbytes()
        return state + sum(tensor.nbytes for tensor in own if tensor is not None)

    # -- memory

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._key_slab is None or self._value_slab is None:
            raise RuntimeError(f"[cache] layer {self.index} holds nothing yet")
        self.keys = self._key_slab.narrow(2, 0, self._size)
        self.values = self._value_slab.narrow(2, 0, self._size)
        return self.keys, self.values

    def _all_valid(self) -> torch.Tensor:
        with torch.inference_mode(False):
            shape = (len(self._lengths), self._capacity)
            return torch.ones(shape, dtype=torch.bool, device=self.device)

    def _check_new(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        for name, new, slab in (
            ("keys", keys, self._key_slab),
            ("values", values, self._value_slab),
        ):
            shape, held = new.shape, slab.shape  # type: ignore[union-attr]
            if (
                shape[0] != held[0]
                or shape[1] != held[1]
                or shape[3] != held[3]
                or new.dtype != slab.dtype  # type: ignore[union-attr]
            ):
                raise ValueError(
                    f"[cache] layer {self.index}: new {name} must be {self.dtype} "
                    f"({held[0]}, {held[1]}, Q, {held[3]}) as the cache holds them, "
                    f"got {new.dtype} {tuple(shape)}"
                )

    def _grow(self, needed: int) -> None:
        # An eighth more than needed, but no more than the policy lets come together.
        capacity = needed + max(64, needed // 8)
        if self._policy.budget is not None:
            capacity = max(needed, min(capacity, self._policy.budget + self._policy.interval))
        elif self._size == 0:
            capacity = needed
        self._resize(capacity, self._size)

    def _resize(self, capacity: int, used: int) -> None:
        """Move slots [0, used) to slabs of `capacity` slots."""
        with torch.inference_mode(False), torch.no_grad():
            if self._tracker is not None:
                self._tracker.reserve(capacity)
            # The views would keep the former slabs alive.
            self.keys = self.values = None
            self._key_slab = _resized(self._key_slab, capacity, used, 2)
            self._value_slab = _resized(self._value_slab, capacity, used, 2)
            self._valid_slab = _resized(self._valid_slab, capacity, used, 1)
            self._capacity = capacity

    def _close_gaps(self, valid: torch.Tensor) -> None:
        """Drop empty slots, unless they all come before the tokens."""
        if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
            heads = self.keys.shape[1]  # type: ignore[union-attr]
            self._compact(live_slots(valid, self._lengths, heads), self._lengths)

    def _cut(self, keep: torch.Tensor) -> None:
        shape = self.keys.shape  # type: ignore[union-attr]
        look = self._tracker is None or not self._tracker.checks_kept
        kept = check_keep(
            keep, self._lengths, self._policy, (shape[0], shape[1], shape[2]), look=look
        )
        if self._on_evict is not None and self._tracker is not None:
            self._on_evict(
                EvictionEvent(
                    layer=self.index,
                    tokens_seen=self._seen,
                    positions=self.positions(),
                    scores=self._tracker.scores().clone(),
                    keep=keep.clone(),
                )
            )
        self.evictions += 1
        self._compact(keep, kept)
        budget = self._policy.budget
        if budget is not None and self._capacity > budget + self._policy.interval:
            self._resize(budget + self._policy.interval, self._size)
            self._show()

    def _compact(self, keep: torch.Tensor, kept: tuple[int, ...]) -> None:
        positions = self.positions()
        size = keep.shape[2]
        if self._tracker is None or self.keys is None or self.values is None:
            raise RuntimeError(f"[cache] layer {self.index} has nothing to compact")
        self._tracker.compact(keep, self.keys, self.values)
        move_slots(positions, keep)
        self._base_positions = positions[:, :, :size].masked_fill(keep < 0, -1)
        self._base_seen = self._tokens
        self._size, self._lengths, self._compacted = size, kept, True
        if min(kept, default=size) == size:
            self._valid_slab = None
        else:
            if self._valid_slab is None:
                self._valid_slab = self._all_valid()
            self._valid_slab[:, :size] = keep[:, 0] >= 0
        self._show()


def _with_size(tensor: torch.Tensor, size: int) -> tuple[int, ...]:
    return (tensor.shape[0], tensor.shape[1], size, tensor.shape[3])


def _resized(slab: torch.Tensor | None, capacity: int, used: int, dim: int) -> torch.Tensor | None:
    if slab is None:
        return None
    shape = list(slab.shape)
    shape[dim] = capacity
    resized = slab.new_empty(shape)
    resized.narrow(dim, 0, used).copy_(slab.narrow(dim, 0, used))
    return resized
