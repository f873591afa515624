"""One layer of an evicting cache."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.cache_utils import CacheLayerMixin

from spectralkv.config import Rotary
from spectralkv.hf import by_head, masks, tap
from spectralkv.policies.base import (
    AttendingTracker,
    DecodeStep,
    Observation,
    Policy,
    Tracker,
    check_divided_keep,
    check_keep,
    host_numbers,
    live_slots,
    move_slots,
)

#: Who computes the attention of decode steps, see :class:`spectralkv.hf.EvictingCache`.
Attention = Literal["auto", "policy", "model"]

#: Types of devices on which "auto" is the policy outside of a decode loop, too: where its attention
#: takes less time than the model's and an update of the graph behind it.
_ATTENDS_BY_DEFAULT = frozenset({"cuda"})

_layouts = itertools.count()

# Options of attention functions that a decode step may have at any value.
_FREE_OPTIONS = frozenset(
    {
        "scaling",
        "softcap",
        "is_causal",
        "position_ids",
        "cache_position",
        "use_cache",
        "output_hidden_states",
        "output_router_logits",
    }
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
    """int32 (B, Hkv, M): the slots that stay, ascending, right-aligned behind -1; where heads keep
    different numbers, left-aligned before them."""
    is_divided: bool = False
    """Whether heads keep different numbers of tokens."""


class EvictingLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys and values of one attention layer, cut back to the policy's budget.

    They live in a slab that is allocated ahead, so that taking in a token moves nothing. The
    layer's length in tokens (`get_seq_length`) never shrinks by eviction; what it holds
    (`num_slots`) does.

    While the model attends, slots follow the text and a cut moves what stays to the front. Where
    the policy attends at decode steps, a cut frees slots, new tokens take them, and nothing
    moves; what then needs slots in a row (several new tokens, the model's own attention) closes
    the gaps first.

    Where heads keep different numbers of tokens (`AttendingTracker.rooms`) the first cut lays them
    one behind the other in one slab, each with its room; there the policy attends at decode steps.
    For other forward passes, and where they are to get other rooms, heads are put side by side;
    attention is then computed head by head, and the next cut lays them one behind the other again.

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
    attention : {"auto", "policy", "model"}
        Who computes the attention of decode steps.
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
        attention: Attention = "auto",
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index = index
        self.evictions = 0
        self._policy = policy
        self._tracker = tracker
        self._reader = reader
        self._rotary = rotary
        self._on_evict = on_evict
        self._attention = attention
        # Assisted decoding asks, before it takes drafts back: the newest tokens must outlive a cut.
        self.is_croppable = policy.budget is None or policy.protected_window > 0
        self._clear()

    def _clear(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.is_initialized = False
        # (B, Hkv, capacity, D), or (B, 1, pool, D) where heads have rooms of their own
        self._key_slab: torch.Tensor | None = None
        self._value_slab: torch.Tensor | None = None  # (B, Hkv, capacity, Dv)
        self._valid_slab: torch.Tensor | None = None  # bool (B, capacity); None: no empty slots
        self._size = 0  # slots in use
        self._capacity = 0
        self._layout = next(_layouts)
        self._seen = 0  # tokens seen, padding included
        self._lengths: tuple[int, ...] = ()  # tokens held by each sequence
        self._tokens: tuple[int, ...] = ()  # real tokens seen by each, while a policy watches
        self._new: masks.NewTokens | None = None
        self._awaits_attention = False
        self._compacted = False  # slots no longer follow the text
        self._scattered = False  # they have gaps, others for each head; the tracker knows them
        self._heads = 0
        self._rooms: tuple[int, ...] | None = None  # slots of each head; None: `capacity` each
        self._uneven = False  # heads are side by side and hold different numbers of tokens
        self._most = 0  # tokens of the head that held most behind the last cut
        self._ordered = True  # positions ascend with slots
        self._newest = 0  # newest columns that no cut can have taken
        # Key and value of a decode step, which wait to see whether the policy can attend.
        self._pending: tuple[torch.Tensor, torch.Tensor] | None = None
        self._fixed = False  # between `start_steps` and `end_steps`
        # Of the model, as its last attention showed: query heads, factor of the dot products,
        # softcap.
        self._shown: tuple[int, float, float | None] | None = None
        self._obstacle: str | None = None  # what keeps the policy from attending for good
        self._attended_by = "model (no decode step yet)"
        # Positions of the slots that were there at the last compaction, and the tokens each
        # sequence had seen then. Those of later slots follow from them.
        self._base_positions: torch.Tensor | None = None
        self._base_seen: tuple[int, ...] = ()

    # -- what the model calls

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take over shapes, dtype and device of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, self._heads = key_states.shape[:2]
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
            Shape, dtype or device differ from what the cache holds.
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
        count = key_states.shape[2]
        self._check_new(key_states, value_states)
        if key_states.requires_grad or value_states.requires_grad:
            key_states, value_states = key_states.detach(), value_states.detach()
        if self._fixed:
            self._pending = key_states, value_states
            tap.offer(self)
            return self._show(self._capacity)
        if self._may_attend(count):
            self._pending = key_states, value_states
            columns = self._columns(count)
            if self._rooms is None:
                self._make_room(columns)
            shown = self._show(columns)
        else:
            shown = self._append(key_states, value_states)
        self._seen += count
        self._newest += count
        if self._tracker is not None:
            self._awaits_attention = True
            tap.offer(self)
        return shown

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the columns of the next mask, and the column its first one stands for."""
        columns = self._columns(query_length)
        return columns, self._seen + query_length - columns

    def get_seq_length(self) -> int:
        """Return the tokens seen; evicted ones count."""
        return self._seen

    def get_max_length(self) -> int:
        """Return -1: there is no bound on the tokens seen."""
        return -1

    def _columns(self, count: int) -> int:
        """Return the slots in use once `count` more tokens are in, at most."""
        columns = self._size + count
        if not self._scattered or not self._may_attend(count):
            return columns
        return min(columns, max(self._capacity, max(self._lengths) + 1))

    def _may_attend(self, count: int) -> bool:
        """Whether the policy may attend at a forward pass of `count` tokens.

        The first pass of a sequence is the model's: it shows that attention passes the tap.
        """
        return (
            count == 1
            and self._size > 0
            and self._attention != "model"
            and self._obstacle is None
            and isinstance(self._tracker, AttendingTracker)
            and (
                self._attention == "policy"
                or self.device.type in _ATTENDS_BY_DEFAULT
                or self.divides
            )
        )

    def _append(
        self, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens behind all others."""
        count = key_states.shape[2]
        if self._rooms is not None and isinstance(self._tracker, AttendingTracker):
            self._put_side_by_side(self._tracker, self._rooms, count)
        elif self._scattered and not self._uneven:
            self._close_up()
        start = self._size
        end = start + count
        if end > self._capacity:
            self._grow(end)
        self._key_slab.narrow(2, start, count).copy_(key_states)  # type: ignore[union-attr]
        self._value_slab.narrow(2, start, count).copy_(value_states)  # type: ignore[union-attr]
        self._size = end
        return self._show()

    # -- what the tap calls

    def attend(
        self, query: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """Return the attention of a decode step, or None where the model is to compute it.

        Parameters
        ----------
        query : torch.Tensor
            (B, Hq, Q, D).
        mask : torch.Tensor or None
            The model's mask.
        options : mapping
            What else the model handed to its attention function.

        Returns
        -------
        torch.Tensor or None
            (B, 1, Hq, Dv).

        Raises
        ------
        RuntimeError
            The policy was to attend and cannot.
        """
        if self._uneven and self._pending is None:
            return self._attend_by_head(query, mask, options)
        if self._pending is None or not isinstance(self._tracker, AttendingTracker):
            if query.shape[2] == 1 and self._obstacle is None:
                self._attended_by = "model"
            return None
        (new_keys, new_values), self._pending = self._pending, None
        if self._fixed:
            return self._attend(self._tracker, query, new_keys, new_values, options)
        self._obstacle = self._tracker.obstacle(query, new_keys, new_values)
        obstacle = self._obstacle or self._obstacle_of_step(query, mask, options)
        if obstacle is not None:
            if self._attention == "policy":
                raise RuntimeError(
                    f"[cache] layer {self.index}: attention='policy' expected {obstacle}"
                )
            self._append(new_keys, new_values)
            if self._uneven:
                return self._attend_by_head(query, mask, options, why=obstacle)
            self._attended_by = f"model (the policy expected {obstacle})"
            return None
        self._attended_by = "policy"
        self._awaits_attention = False
        # Entering the contexts costs as much as the rest of this method; generate() needs neither.
        if torch.is_inference_mode_enabled() or torch.is_grad_enabled():
            with torch.inference_mode(False), torch.no_grad():
                attended = self._attend(self._tracker, query, new_keys, new_values, options)
                self._take_in(self._tracker)
                return attended
        attended = self._attend(self._tracker, query, new_keys, new_values, options)
        self._take_in(self._tracker)
        return attended

    def _attend(
        self,
        tracker: AttendingTracker,
        query: torch.Tensor,
        new_keys: torch.Tensor,
        new_values: torch.Tensor,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        scaling, softcap = options.get("scaling"), options.get("softcap")
        attended = tracker.attend(
            DecodeStep(
                query=query[:, :, 0],
                new_keys=new_keys[:, :, 0],
                new_values=new_values[:, :, 0],
                keys=self._key_slab,  # type: ignore[arg-type]
                values=self._value_slab,  # type: ignore[arg-type]
                scaling=query.shape[3] ** -0.5 if scaling is None else scaling,
                softcap=softcap,
            )
        )
        return attended[:, None]

    def _attend_by_head(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
        why: str | None = None,
    ) -> torch.Tensor:
        """Return the attention (B, Q, Hq, Dv) over heads that hold different tokens.

        Raises
        ------
        RuntimeError
            The model asks for more than attention.
        """
        wrong = _unusual_option(options)
        if wrong is None and query.requires_grad and torch.is_grad_enabled():
            wrong = "no gradients, got queries that require them"
        if wrong is not None:
            raise RuntimeError(
                f"[cache] layer {self.index}: heads that hold different tokens expected {wrong}"
            )
        if self.keys is None or self.values is None:
            raise RuntimeError(f"[cache] layer {self.index}: attention without an update")
        scaling, softcap = options.get("scaling"), options.get("softcap")
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        count = query.shape[2]
        live = self.positions() >= 0  # of the slots before the new tokens
        new = self._learn_new(query, mask)
        attended = by_head.attend(
            query,
            self.keys,
            self.values,
            live=live[:, :, : self._size - count],
            new=masks.among_new(mask, new.valid, query),
            scaling=scaling,
            softcap=softcap,
        )
        self._attended_by = "cache, head by head" + (f" (the policy expected {why})" if why else "")
        self.after_attention(query, scaling, softcap)
        return attended

    def _take_in(self, tracker: AttendingTracker) -> None:
        """Count a token that the policy attended with, and cut the sequences that are due."""
        self._count_attended()
        self._show()
        if self.divides_anew and any(self.due()):
            self.put_side_by_side()
        keep = tracker.keep()
        if keep is not None:
            self._release(tracker, keep)

    def _count_attended(self) -> None:
        shortest, longest = _span(self._lengths)
        if shortest < self._size:
            self._scatter()  # some token took a slot before the last one
        self._lengths, self._tokens = _one_more(self._lengths), _one_more(self._tokens)
        self._size = max(self._size, longest + 1)

    def _release(self, tracker: AttendingTracker, keep: torch.Tensor) -> None:
        if self.divides and self._rooms is None:
            self._show()
            self._cut(keep)
            return
        kept = self._check_cut(keep)
        tracker.release(keep)
        self._book_release(kept)

    def _book_release(self, kept: tuple[int, ...]) -> None:
        self._lengths, self._newest = kept, min(self._newest, self._policy.protected_window)
        if self._rooms is not None:
            interval = self._policy.cut_interval
            self._most = min(self._most + interval, max(self._rooms) - interval)
        self._scatter()

    def _obstacle_of_step(
        self, query: torch.Tensor, mask: torch.Tensor | None, options: Mapping[str, Any]
    ) -> str | None:
        """Return what this step asks for that a policy does not do, as what was expected."""
        wrong = _unusual_option(options)
        if wrong is not None:
            return wrong
        if query.requires_grad and torch.is_grad_enabled():
            return "no gradients, got queries that require them"
        new = self._reader.new_tokens(mask, query.shape[0], 1, self._seen)
        if new.valid is not None:
            return "a real token in each sequence, got padding"
        visible = tuple(length + 1 for length in self._lengths)
        if not self._compacted and new.visible not in (None, visible):
            return (
                "a mask that shows every cached token as it is, got one that hides or weighs some"
            )
        return None

    def before_attention(
        self, query: torch.Tensor, mask: torch.Tensor | None, implementation: str
    ) -> torch.Tensor | None:
        """Learn which new tokens are real, and return the mask for the slots as they are."""
        count = query.shape[2]
        new = self._learn_new(query, mask)
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

    def _learn_new(self, query: torch.Tensor, mask: torch.Tensor | None) -> masks.NewTokens:
        """Count the new tokens that are real."""
        batch, count = query.shape[0], query.shape[2]
        new = self._new = self._reader.new_tokens(mask, batch, count, self._seen)
        self._lengths = tuple(map(operator.add, self._lengths, new.counts))
        self._tokens = tuple(map(operator.add, self._tokens, new.counts))
        return new

    def after_attention(
        self, query: torch.Tensor, scaling: float | None, softcap: float | None
    ) -> None:
        """Show the queries to the policy, and cut the sequences that are due."""
        if self._tracker is None or self._new is None or self.keys is None or self.values is None:
            raise RuntimeError(f"[cache] layer {self.index}: attention without an update")
        self._awaits_attention = False
        if scaling is None:
            scaling = query.shape[3] ** -0.5
        self._shown = query.shape[1], scaling, softcap
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

    # -- what a decode loop calls

    def check_steps(self) -> None:
        """Check that the policy can attend at the steps of a loop.

        Raises
        ------
        ValueError
            It cannot, or there is no prompt.
        """
        if self._attention == "model" or not isinstance(self._tracker, AttendingTracker):
            raise ValueError(
                "[decode] expected a cache whose policy attends (spectral, and attention='auto' or "
                f"'policy'), got {self._policy.name} with attention={self._attention!r}"
            )
        if self.keys is None or self.values is None or self._awaits_attention or not self._shown:
            raise ValueError(f"[decode] layer {self.index}: expected a prompt before the steps")
        query_heads = self._shown[0]
        batch, _, _, dim = self.keys.shape
        query = self.keys.new_empty(batch, query_heads, 1, dim)
        keys = self.keys.new_empty(batch, self._heads, 0, dim)
        values = self.values.new_empty(batch, self._heads, 0, self.values.shape[3])
        obstacle = self._tracker.obstacle(query, keys, values)
        if obstacle is not None:
            raise ValueError(f"[decode] layer {self.index}: expected {obstacle}")

    def start_steps(self, count: int) -> None:
        """Make ready for `count` decode steps that look the same to the device.

        Until `end_steps` a forward pass of one real token a sequence is attended by the policy and
        changes nothing that the host knows: it may be captured and replayed. The loop counts steps
        with `count_step`, and cuts.
        """
        held = max(self._lengths) if self._scattered else self._size
        if self._rooms is None:
            self._make_room(held + (count if self._policy.budget is None else 1))
        self._fixed = True

    def attend_step(
        self,
        query: torch.Tensor,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Take in a token and attend, where a compiled model has no tap.

        Parameters
        ----------
        query, key_states, value_states : torch.Tensor
            (B, Hq, 1, D), (B, Hkv, 1, D) and (B, Hkv, 1, Dv).
        scaling : float
            Factor of the dot products.
        softcap : float or None
            Bound of their absolute value.

        Returns
        -------
        torch.Tensor
            (B, 1, Hq, Dv).

        Raises
        ------
        RuntimeError
            No steps have been started.
        """
        if not self._fixed or not isinstance(self._tracker, AttendingTracker):
            raise RuntimeError(f"[cache] layer {self.index}: a step outside of a decode loop")
        self._check_new(key_states, value_states)
        options = {"scaling": scaling, "softcap": softcap}
        return self._attend(self._tracker, query, key_states, value_states, options)

    def count_step(self) -> None:
        """Count one step, queued or replayed."""
        self._seen += 1
        self._newest += 1
        self._count_attended()

    def due(self) -> tuple[bool, ...]:
        """Return which sequences are to be cut."""
        budget, interval = self._policy.budget, self._policy.cut_interval
        return tuple(budget is not None and held >= budget + interval for held in self._lengths)

    def cut_by(self, keep: torch.Tensor) -> None:
        """Cut to the slots that :meth:`AttendingTracker.keep_all` chose."""
        if isinstance(self._tracker, AttendingTracker):
            self._release(self._tracker, keep)

    def count_cut(self) -> None:
        """Count the replay of a cut."""
        budget = self._policy.budget
        self.evictions += 1
        self._book_release(
            tuple(
                held if budget is None or not is_due else budget
                for held, is_due in zip(self._lengths, self.due(), strict=True)
            )
        )

    @property
    def divides(self) -> bool:
        """Whether heads keep different numbers of tokens."""
        return self._wanted_rooms is not None

    @property
    def _wanted_rooms(self) -> tuple[int, ...] | None:
        """Slots that each head gets at a cut; None: all heads keep equally many tokens."""
        return self._tracker.rooms if isinstance(self._tracker, AttendingTracker) else None

    @property
    def divides_anew(self) -> bool:
        """Whether the next cut gives heads other rooms, for which they must be side by side."""
        return (
            self._rooms is not None
            and isinstance(self._tracker, AttendingTracker)
            and self._tracker.divides_anew(max(self._tokens))
        )

    def put_side_by_side(self) -> None:
        """Put heads that have rooms of their own side by side, ready for a cut."""
        if self._rooms is None or not isinstance(self._tracker, AttendingTracker):
            raise RuntimeError(f"[cache] layer {self.index} has no heads to put side by side")
        self._put_side_by_side(self._tracker, self._rooms, 0)
        keys, _ = self._show()
        self._tracker.show_keys(keys)

    @property
    def cut_kind(self) -> tuple[int, ...]:
        """Numbers that tell cuts apart which do not look the same to the device."""
        return (*self._lengths, self._most)

    def end_steps(self, *, is_whole: bool) -> None:
        """Go back to forward passes of any kind; if a step broke off, to none before `reset`."""
        self._fixed = False
        self._pending = None
        self._awaits_attention = not is_whole
        self._attended_by = "policy"
        self._show()

    @property
    def tracker(self) -> Tracker | None:
        """State of the policy for this layer."""
        return self._tracker

    @property
    def slabs(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(B, Hkv, capacity, ·): keys and values of all slots, used or not."""
        return self._key_slab, self._value_slab

    @property
    def layout(self) -> int:
        """A number that is never the same again once the slabs lie elsewhere."""
        return self._layout

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
        reachable = min(self._newest, self._size)
        if count > reachable:
            raise RuntimeError(
                f"[crop] layer {self.index}: at most {reachable} tokens can be taken back "
                f"(those since the last cut and the window), got {count}"
            )
        end = self._size - count
        if self._valid_slab is None:  # there is no padding
            gone = (count,) * len(self._lengths)
        else:
            gone = tuple(self._valid_slab[:, end : self._size].sum(-1).tolist())
        if not self._ordered and set(gone) != {count}:
            raise RuntimeError(
                f"[crop] layer {self.index}: padding among the newest tokens cannot be taken back "
                f"once slots were reused, got {count} columns with {gone} tokens"
            )
        self._lengths = tuple(map(operator.sub, self._lengths, gone))
        self._tokens = tuple(map(operator.sub, self._tokens, gone))
        self._seen -= count
        self._newest -= count
        self._awaits_attention, self._pending = False, None
        if isinstance(self._tracker, AttendingTracker) and (
            self._scattered or (not self._ordered and end < base)
        ):  # the newest tokens lie anywhere
            self._tracker.truncate(count)
            self._scatter()
            self._size = self._tracker.num_slots
            self._show()
            return
        if self._base_positions is not None and end < base:
            lost = (self._base_positions[:, 0, end:] >= 0).sum(-1).tolist()
            self._base_positions = self._base_positions[:, :, :end]
            self._base_seen = tuple(map(operator.sub, self._base_seen, lost))
        self._size = end
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
            self._layout = next(_layouts)
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
        if self._scattered and self._rooms is None:
            self._close_up()
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
            "attention": self._shown,
            "newest": self._newest,
            "ordered": self._ordered,
            "rooms": self._rooms,
            "most": self._most,
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
        rooms = numbers["rooms"]
        if rooms is not None:
            self._rooms, self._heads = tuple(rooms), len(rooms)
            self._most, self._scattered = numbers["most"], True
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
        self._newest, self._ordered = numbers["newest"], numbers["ordered"]
        if self._tracker is None or numbers["attention"] is None:
            return
        heads, scaling, softcap = self._shown = tuple(numbers["attention"])
        no_queries = keys.new_empty(keys.shape[0], heads, 0, keys.shape[3])
        own = {
            name.removeprefix("policy."): tensor
            for name, tensor in tensors.items()
            if name.startswith("policy.")
        }
        held = self._observation(no_queries, None, scaling, softcap)
        if self._rooms is None:
            self._tracker.reserve(self._capacity)
        else:  # the policy sees shapes; what heads hold it knows itself
            shape = keys.shape[0], self._heads, 0
            held = held._replace(
                keys=keys.new_empty(*shape, keys.shape[3]),
                values=values.new_empty(*shape, values.shape[3]),
            )
        self._tracker.load_state_dict(own, held)

    # -- inspection

    @property
    def num_slots(self) -> int:
        """Slots in use: what the longest sequence holds, padding that takes slots included.

        Where heads have rooms of their own: what each would hold if all held equally many.
        """
        return max(self._lengths) if self._scattered else self._size

    @property
    def attended_by(self) -> str:
        """Who computed the attention of the last decode step, see :class:`CacheStats`."""
        return self._attended_by

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens each sequence holds; without a tracker, padding counts."""
        return (self._size,) * len(self._lengths) if self._tracker is None else self._lengths

    def positions(self) -> torch.Tensor:
        """Return int32 (B, Hkv, S): where in its text each slot's token stands, -1 if empty."""
        if self.keys is None:
            return torch.empty(0, 0, 0, dtype=torch.int32)
        if self._scattered and isinstance(self._tracker, AttendingTracker):
            return self._tracker.positions()
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

    def _show(self, slots: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if self._key_slab is None or self._value_slab is None:
            raise RuntimeError(f"[cache] layer {self.index} holds nothing yet")
        shown = self._size if slots is None else slots
        if self._rooms is not None:
            shown = self._key_slab.shape[2]
        self.keys = self._key_slab.narrow(2, 0, shown)
        self.values = self._value_slab.narrow(2, 0, shown)
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
                or shape[1] != self._heads
                or shape[3] != held[3]
                or new.dtype != slab.dtype  # type: ignore[union-attr]
                or new.device != slab.device  # type: ignore[union-attr]
            ):
                raise ValueError(
                    f"[cache] layer {self.index}: new {name} must be {self.dtype} "
                    f"({held[0]}, {self._heads}, Q, {held[3]}) on {self.device} as the cache holds "
                    f"them, got {new.dtype} {tuple(shape)} on {new.device}"
                )

    def _make_room(self, needed: int) -> None:
        """Make room for `needed` slots; where there is a budget, for all to come."""
        if self._policy.budget is not None:
            needed = max(needed, self._policy.budget + self._policy.cut_interval)
            if needed > self._capacity:
                self._resize(needed, self._size)
        elif needed > self._capacity:
            self._grow(needed)

    def _scatter(self) -> None:
        """Note that slots have gaps from now on, and where they are the tracker knows."""
        self._scattered = self._compacted = True
        self._ordered = False
        self._valid_slab = None

    def _close_up(self) -> None:
        """Move what is held to the front, so that slots have no gaps."""
        if not isinstance(self._tracker, AttendingTracker):
            raise RuntimeError(f"[cache] layer {self.index} has no gaps to close")
        with torch.inference_mode(False), torch.no_grad():
            self._show()
            self._compact(self._tracker.held(), self._lengths)

    def _lay_in_a_row(self, tracker: AttendingTracker, rooms: tuple[int, ...]) -> None:
        """Lay heads one behind the other, each with its room; they were compacted."""
        if self._key_slab is None or self._value_slab is None:
            raise RuntimeError(f"[cache] layer {self.index} holds nothing yet")
        self.keys = self.values = None
        self._key_slab = by_head.in_a_row(self._key_slab, rooms, self._size)
        self._value_slab = by_head.in_a_row(self._value_slab, rooms, self._size)
        tracker.divide()
        self._rooms, self._most, self._uneven = rooms, self._size, False
        self._capacity = max(rooms)
        self._layout = next(_layouts)
        self._base_positions = None
        self._scatter()
        self._show()

    def _put_side_by_side(
        self, tracker: AttendingTracker, rooms: tuple[int, ...], count: int
    ) -> None:
        """Put heads side by side, with `count` slots in a row behind the longest of them."""
        if self._key_slab is None or self._value_slab is None:
            raise RuntimeError(f"[cache] layer {self.index} holds nothing yet")
        with torch.inference_mode(False), torch.no_grad():
            used = tracker.num_slots
            self.keys = self.values = None
            self._key_slab = by_head.side_by_side(self._key_slab, rooms, used, used + count)
            self._value_slab = by_head.side_by_side(self._value_slab, rooms, used, used + count)
            tracker.reserve(used + count)
            self._rooms, self._uneven = None, True
            self._capacity, self._size = used + count, used
            self._layout = next(_layouts)

    def _grow(self, needed: int) -> None:
        # An eighth more than needed, but no more than the policy lets come together.
        capacity = needed + max(64, needed // 8)
        if self._policy.budget is not None:
            capacity = max(needed, min(capacity, self._policy.budget + self._policy.cut_interval))
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
            self._layout = next(_layouts)

    def _close_gaps(self, valid: torch.Tensor) -> None:
        """Drop empty slots, unless they all come before the tokens."""
        if bool((valid[:, :-1] & ~valid[:, 1:]).any()):
            heads = self.keys.shape[1]  # type: ignore[union-attr]
            self._compact(live_slots(valid, self._lengths, heads), self._lengths)
            self._newest = min(self._newest, self._policy.protected_window)

    def _check_cut(self, keep: torch.Tensor) -> tuple[int, ...]:
        """Check and announce what stays; return how many tokens each sequence keeps."""
        shape = self.keys.shape  # type: ignore[union-attr]
        rooms = self._wanted_rooms
        if rooms is not None:
            kept = check_divided_keep(keep, self._policy, (shape[0], self._heads), rooms)
        else:
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
                    is_divided=rooms is not None,
                )
            )
        self.evictions += 1
        return kept

    def _cut(self, keep: torch.Tensor) -> None:
        self._compact(keep, self._check_cut(keep))
        self._newest = min(self._newest, self._policy.protected_window)
        rooms = self._wanted_rooms
        if rooms is not None and isinstance(self._tracker, AttendingTracker):
            self._lay_in_a_row(self._tracker, rooms)
            return
        budget = self._policy.budget
        if budget is not None and self._capacity > budget + self._policy.cut_interval:
            self._resize(budget + self._policy.cut_interval, self._size)
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
        self._size, self._lengths = size, kept
        self._compacted, self._scattered = True, False
        if min(kept, default=size) == size:
            self._valid_slab = None
        else:
            if self._valid_slab is None:
                self._valid_slab = self._all_valid()
            self._valid_slab[:, :size] = keep[:, 0] >= 0
        self._show()


# The layers of a cache count the same numbers: of a thousand sequences that would take longer than
# the device's step if each layer did it anew.
@functools.lru_cache(maxsize=64)
def _one_more(counts: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(count + 1 for count in counts)


@functools.lru_cache(maxsize=64)
def _span(counts: tuple[int, ...]) -> tuple[int, int]:
    return min(counts), max(counts)


def _unusual_option(options: Mapping[str, Any]) -> str | None:
    """Return what a model asks of its attention that it need not be, as what was expected."""
    for name, value in options.items():
        # Numbers only: to ask a tensor is to wait for the device.
        if name in _FREE_OPTIONS or value is None or value is False:
            continue
        if not (isinstance(value, (int, float)) and value == 0):
            return f"no {name} in the model's attention, got {type(value).__name__}"
    return None


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
