"""What every eviction policy shares: its configuration, what it sees, and the cut itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, NamedTuple, TypeVar

import torch

from spectralkv.config import Rotary


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Which tokens a cache keeps. Holds the configuration only; see :meth:`trackers`.

    Parameters
    ----------
    budget : int or None
        Tokens that each KV head keeps, sinks and window included. None: nothing is ever let go.
    interval : int or None
        A sequence is cut back to `budget` when it holds ``budget + interval`` tokens. None: a 64th
        of the budget, but at least 32 and at most 128; see :attr:`cut_interval`.
    window : int
        Newest tokens of a sequence that always stay.
    sinks : int
        Oldest tokens of a sequence that always stay.

    Raises
    ------
    ValueError
        An option is out of range, or ``budget < sinks + window + 1``.
    """

    name: ClassVar[str]
    #: False: the policy never looks at queries and keys, and never evicts.
    watches: ClassVar[bool] = True

    budget: int | None
    interval: int | None = None
    window: int = 50
    sinks: int = 4

    def __post_init__(self) -> None:
        if self.interval is not None:
            self._require_int("interval", minimum=1)
        if self.window is not None:  # H2O derives its own
            self._require_int("window", minimum=0)
        self._require_int("sinks", minimum=0)
        if self.budget is None:
            return
        self._require_int("budget", minimum=1)
        least = self.sinks + self.protected_window + 1
        self._require(
            self.budget >= least,
            "budget",
            f"at least sinks + window + 1 = {self.sinks} + {self.protected_window} + 1 = {least}",
        )

    @property
    def cut_interval(self) -> int:
        """Tokens that gather above the budget until a sequence is cut.

        A cut looks at all that is held: larger budgets are cut less often.
        """
        if self.interval is not None:
            return self.interval
        return min(max((self.budget or 0) // 64, 32), 128)

    @property
    def protected_window(self) -> int:
        """Newest tokens that a cut never takes."""
        return self.window

    @abstractmethod
    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return fresh state for `num_layers` layers; one policy may serve many caches."""

    def _require(self, holds: bool, option: str, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"[{self.name}] {option} must be {expected}, got {getattr(self, option)!r}"
            )

    def _require_int(self, option: str, *, minimum: int) -> None:
        value = getattr(self, option)
        is_int = isinstance(value, int) and not isinstance(value, bool)
        self._require(is_int and value >= minimum, option, f"an integer of at least {minimum}")

    def _require_number(self, option: str, *, minimum: float, maximum: float) -> None:
        value = getattr(self, option)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        self._require(
            is_number and minimum <= value <= maximum,
            option,
            f"a number from {minimum} to {maximum}",
        )


class Observation(NamedTuple):
    """What a layer shows its policy after each forward pass.

    Axes: B sequences, Hq query heads, Hkv KV heads, Q new tokens, S slots, D head_dim.
    """

    query: torch.Tensor
    """(B, Hq, Q, D), with rotary embedding applied."""
    keys: torch.Tensor
    """(B, Hkv, S, D), a view of the live cache; the last Q slots are the new tokens."""
    values: torch.Tensor
    """(B, Hkv, S, Dv), a view of the live cache."""
    lengths: tuple[int, ...]
    """Tokens each sequence holds, the new ones included."""
    valid: torch.Tensor | None
    """Bool (B, S): False marks an empty slot (padding). None: no slot is empty."""
    new_valid: torch.Tensor | None
    """Bool (B, Q): False marks padding among the new tokens. None: all are tokens."""
    scaling: float
    """Factor of the dot products."""
    softcap: float | None
    """Logits become ``softcap * tanh(logits / softcap)``. None: they stay as they are."""
    rotary: Rotary | None = None
    """How query and keys were turned by their positions. None: they were not, or it is not
    known."""


class Tracker(ABC):
    """The mutable state of a policy for one layer of one cache."""

    #: True: :meth:`compact` refuses kept slots that break the contract of :meth:`keep`, so the
    #: cache does not look at them first, for which it would wait for the device.
    checks_kept: ClassVar[bool] = False

    @abstractmethod
    def observe(self, observation: Observation) -> None:
        """Take in the new tokens."""

    @abstractmethod
    def scores(self) -> torch.Tensor:
        """Return float32 (B, Hkv, S): the higher, the sooner a token stays.

        What stands in empty slots has no meaning. Empty slots come first, as in :meth:`keep`.
        """

    @abstractmethod
    def keep(self) -> torch.Tensor | None:
        """Return the slots that stay, or None when no sequence is due.

        Returns
        -------
        torch.Tensor or None
            int32 (B, Hkv, M): slots, ascending and unique, right-aligned behind -1 (an empty
            slot). All heads of a sequence keep equally many, unless the policy divides the cache
            among heads (:attr:`AttendingTracker.rooms`): then lists stand before their -1. Empty
            slots never stay.
        """

    @abstractmethod
    def compact(self, keep: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Move the kept slots of `keys`, `values` (in place) and of this state to the front.

        Parameters
        ----------
        keep : torch.Tensor
            int32 (B, Hkv, M), as :meth:`keep` returns it.
        keys, values : torch.Tensor
            (B, Hkv, S, ·); slots [0, M) hold the kept tokens afterwards, in order.
        """

    @abstractmethod
    def truncate(self, count: int) -> None:
        """Forget the newest `count` slots."""

    @abstractmethod
    def select_batch(self, indices: torch.Tensor) -> None:
        """Make sequence i a copy of what sequence ``indices[i]`` was; `indices` is int64 (B',)."""

    @abstractmethod
    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots, and give back memory beyond that."""

    @abstractmethod
    def reset(self) -> None:
        """Forget everything."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of this state. A part that layers share is counted by one of them."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return all that :meth:`load_state_dict` needs to go on as this tracker would.

        Raises
        ------
        TypeError
            This kind of tracker cannot be saved.
        """
        raise TypeError(
            f"[{type(self).__name__}] a tracker that is saved must have state_dict and "
            "load_state_dict, got one without"
        )

    def load_state_dict(
        self,
        state: Mapping[str, torch.Tensor],  # noqa: ARG002
        held: Observation,  # noqa: ARG002
    ) -> None:
        """Take over what :meth:`state_dict` returned; this tracker has seen nothing yet.

        Parameters
        ----------
        state : mapping of str to torch.Tensor
            On the device of the keys.
        held : Observation
            What the layer holds, with no new tokens: `query` is (B, Hq, 0, D).
        """
        raise TypeError(
            f"[{type(self).__name__}] a tracker that is loaded must have state_dict and "
            "load_state_dict, got one without"
        )


class DecodeStep(NamedTuple):
    """One new token a sequence, for a policy that attends itself. Axes as in :class:`Observation`.

    Keys and values are all slots of the cache, in use or not; the new token is in none yet.
    """

    query: torch.Tensor
    """(B, Hq, D), with rotary embedding applied."""
    new_keys: torch.Tensor
    """(B, Hkv, D)"""
    new_values: torch.Tensor
    """(B, Hkv, Dv)"""
    keys: torch.Tensor
    """(B, Hkv, S, D), written; (B, 1, pool, D) once heads have rooms of their own."""
    values: torch.Tensor
    """(B, Hkv, S, Dv) or (B, 1, pool, Dv), written."""
    scaling: float
    """Factor of the dot products."""
    softcap: float | None
    """Logits become ``softcap * tanh(logits / softcap)``. None: they stay as they are."""


class AttendingTracker(Tracker):
    """A tracker that can compute the attention of decode steps itself, over slots in any order.

    A cache may then leave tokens where they are: it frees slots by :meth:`release`, and each new
    token takes a free one. And heads may keep different numbers of tokens: where the tracker names
    `rooms`, the cache lays the heads of a layer one behind the other at a cut, each with as many
    slots as it needs.
    """

    @property
    def may_divide(self) -> bool:
        """Whether heads may come to keep different numbers of tokens."""
        return False

    @property
    def rooms(self) -> tuple[int, ...] | None:
        """Slots that each KV head gets at a cut, once :meth:`keep` has chosen.

        None: all heads keep equally many tokens. Otherwise sequences of a batch are cut together.
        """
        return None

    def divides_anew(self, seen: int) -> bool:  # noqa: ARG002
        """Whether a cut after `seen` tokens gives heads other rooms; they must be side by side."""
        return False

    def show_keys(self, keys: torch.Tensor) -> None:  # noqa: ARG002
        """Learn where keys lie, (B, Hkv, S, D), after heads were put side by side.

        Raises
        ------
        RuntimeError
            The tracker names no rooms.
        """
        raise RuntimeError(
            f"[{type(self).__name__}] expected a tracker with rooms, got one without"
        )

    def divide(self) -> None:
        """Lay heads one behind the other, each with its room, once they were compacted.

        Raises
        ------
        RuntimeError
            The tracker names no rooms.
        """
        raise RuntimeError(
            f"[{type(self).__name__}] expected a tracker with rooms, got one without"
        )

    @abstractmethod
    def standing_obstacle(self) -> str | None:
        """Return what of its policy keeps it from attending, whatever the tensors, or None."""

    @abstractmethod
    def obstacle(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> str | None:
        """Return what keeps it from attending with tensors like these, or None.

        Parameters
        ----------
        query : torch.Tensor
            (B, Hq, Q, D).
        keys, values : torch.Tensor
            (B, Hkv, S, D) and (B, Hkv, S, Dv).
        """

    @abstractmethod
    def attend(self, step: DecodeStep) -> torch.Tensor:
        """Write the new tokens into free slots, take them in, and return their attention.

        Returns
        -------
        torch.Tensor
            (B, Hq, Dv), of the query's dtype.
        """

    @abstractmethod
    def release(self, keep: torch.Tensor) -> None:
        """Free the slots that are not in `keep`, as :meth:`keep` returns it; nothing moves."""

    @classmethod
    @abstractmethod
    def keep_all(cls, trackers: Sequence[AttendingTracker]) -> list[torch.Tensor]:
        """Return what `keep` returns for each layer of a cache, of which sequences are due.

        Where heads have rooms of their own, all sequences are.
        """

    @classmethod
    @abstractmethod
    def settle(cls, trackers: Sequence[AttendingTracker]) -> None:
        """Wait for the device, and learn what it holds after replays of captured calls."""

    @abstractmethod
    def capture_obstacle(self) -> str | None:
        """Return what keeps :meth:`attend` from being captured into a CUDA graph, or None."""

    @abstractmethod
    def held(self) -> torch.Tensor:
        """Return int32 (B, Hkv, M): all slots that hold a token, as :meth:`keep` writes them."""

    @abstractmethod
    def positions(self) -> torch.Tensor:
        """Return int32 (B, Hkv, num_slots): the position of each slot's token, -1 if empty."""

    @property
    @abstractmethod
    def num_slots(self) -> int:
        """Slots in use: those behind hold no token."""


PolicyT = TypeVar("PolicyT", bound=Policy)


class ScoreTracker(Tracker, Generic[PolicyT]):
    """A tracker that ranks tokens by :meth:`scores`. A policy adds the scores."""

    def __init__(self, policy: PolicyT) -> None:
        self._policy = policy
        self._last: Observation | None = None
        # What `keep` returned last, and how many of it each sequence keeps.
        self._chosen: tuple[torch.Tensor, tuple[int, ...]] | None = None

    def observe(self, observation: Observation) -> None:
        """Take in the new tokens."""
        self._last = observation

    def keep(self) -> torch.Tensor | None:
        """Return the slots that stay, or None when no sequence is due."""
        policy = self._policy
        if policy.budget is None or self._last is None:
            return None
        cut = [length >= policy.budget + policy.cut_interval for length in self._last.lengths]
        if not any(cut):
            return None
        lengths, budget = self._last.lengths, policy.budget
        keep = select_slots(
            self.scores(),
            lengths,
            cut,
            budget=budget,
            window=policy.protected_window,
            sinks=policy.sinks,
        )
        kept = tuple(budget if due else count for due, count in zip(cut, lengths, strict=True))
        self._chosen = (keep, kept)
        return keep

    def compact(self, keep: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Move the kept slots to the front, in place."""
        move_slots(keys, keep)
        move_slots(values, keep)
        if self._last is not None:
            size = keep.shape[-1]
            kept = keep[:, 0] >= 0
            if self._chosen is not None and keep is self._chosen[0]:
                lengths = self._chosen[1]
            else:  # what is not known is counted, for which the device must be waited for
                lengths = tuple(kept.sum(-1).tolist())
            self._chosen = None
            self._last = self._last._replace(
                keys=keys[:, :, :size],
                values=values[:, :, :size],
                lengths=lengths,
                valid=None if min(lengths, default=size) == size else kept,
            )

    def truncate(self, count: int) -> None:  # noqa: ARG002
        """Forget the newest `count` slots."""
        self._last = None

    def select_batch(self, indices: torch.Tensor) -> None:  # noqa: ARG002
        """Make sequence i a copy of what sequence ``indices[i]`` was."""
        self._last = None

    def reserve(self, capacity: int) -> None:  # noqa: ARG002
        """Drop the views of the former slab, which would keep all of it alive."""
        self._last = None

    def reset(self) -> None:
        """Forget everything."""
        self._last = None

    def nbytes(self) -> int:
        """Bytes of this state."""
        return 0

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return nothing: keys and values say it all. A tracker that gathers more adds that.

        Raises
        ------
        TypeError
            The tracker gathers more (it has an ``observe`` of its own) and does not add it.
        """
        cls = type(self)
        gathers = cls.observe is not ScoreTracker.observe
        if gathers and cls.state_dict is ScoreTracker.state_dict:
            return super().state_dict()
        return {}

    def load_state_dict(self, state: Mapping[str, torch.Tensor], held: Observation) -> None:
        """Take over what :meth:`state_dict` returned; this tracker has seen nothing yet."""
        if state and type(self).load_state_dict is ScoreTracker.load_state_dict:
            super().load_state_dict(state, held)
        self._last = held

    def _observed(self) -> Observation:
        if self._last is None:
            raise RuntimeError(
                f"[{self._policy.name}] scores need an observation since the cache last changed, "
                "got none"
            )
        return self._last


def select_slots(
    scores: torch.Tensor,
    lengths: Sequence[int],
    cut: Sequence[bool],
    *,
    budget: int,
    window: int,
    sinks: int,
) -> torch.Tensor:
    """Choose the slots that stay.

    A sequence that is cut keeps its `sinks` oldest and `window` newest tokens and, for the rest
    of `budget`, those with the highest scores; of equal scores the newer token stays, a NaN counts
    as -inf. Other sequences keep all they have.

    Parameters
    ----------
    scores : torch.Tensor
        float (B, Hkv, S). Sequence b fills the last ``lengths[b]`` slots, the others are empty.
    lengths : sequence of int
        Tokens each sequence holds.
    cut : sequence of bool
        Which sequences are cut; each of them holds `budget` tokens or more.
    budget, window, sinks : int
        See :class:`Policy`.

    Returns
    -------
    torch.Tensor
        int32 (B, Hkv, M), see :meth:`Tracker.keep`.
    """
    size = scores.shape[-1]
    kept = [budget if is_cut else length for is_cut, length in zip(cut, lengths, strict=True)]
    most = max(kept, default=0)
    slot = torch.arange(size, device=scores.device)
    first = host_numbers([size - length for length in lengths], scores.device)[:, None]
    stays = (slot < first + sinks) | (slot >= size - window)
    extreme = torch.finfo(scores.dtype).max
    ranked = torch.nan_to_num(scores, nan=-extreme, posinf=extreme, neginf=-extreme)
    ranked = ranked.masked_fill(stays[:, None], float("inf"))
    ranked = ranked.masked_fill((slot < first)[:, None], float("-inf"))
    # Stable and ascending: of equal scores the higher slot, which is the newer token, comes later.
    best = ranked.sort(dim=-1, stable=True).indices[..., size - most :]
    if min(kept, default=most) < most:
        empty = host_numbers([most - count for count in kept], scores.device)
        best = best.masked_fill(slot[:most] < empty[:, None, None], -1)
    return best.sort(dim=-1).values.to(torch.int32)


def check_divided_keep(
    keep: torch.Tensor, policy: Policy, shape: tuple[int, int], rooms: Sequence[int]
) -> tuple[int, ...]:
    """`check_keep` where heads keep different numbers of tokens, all sequences of a batch at once.

    What stays of each is checked by the tracker that releases the others. Counted is what a head
    would keep if all kept equally many.

    Parameters
    ----------
    keep : torch.Tensor
        What :meth:`Tracker.keep` returned.
    policy : Policy
        The policy.
    shape : tuple of int
        (B, Hkv).
    rooms : sequence of int
        :attr:`AttendingTracker.rooms`.

    Raises
    ------
    RuntimeError
        The policy broke its contract.
    """
    budget, most = policy.budget, max(rooms) - policy.cut_interval
    fits = keep.dtype == torch.int32 and keep.dim() == 3 and keep.shape[:2] == shape
    if budget is None or not fits or keep.shape[2] > most:
        raise RuntimeError(
            f"[{policy.name}] kept slots must be int32 ({shape[0]}, {shape[1]}, M) with M of "
            f"{most} at most, got {keep.dtype} {tuple(keep.shape)}"
        )
    return (budget,) * shape[0]


def check_keep(
    keep: torch.Tensor,
    lengths: Sequence[int],
    policy: Policy,
    shape: tuple[int, int, int],
    *,
    look: bool = True,
) -> tuple[int, ...]:
    """Check what a policy chose, and return how many tokens each sequence keeps.

    Parameters
    ----------
    keep : torch.Tensor
        What :meth:`Tracker.keep` returned.
    lengths : sequence of int
        Tokens each sequence holds, in its last slots.
    policy : Policy
        The policy; a sequence at ``budget + interval`` must come out with `budget` tokens.
    shape : tuple of int
        (B, Hkv, S).
    look : bool
        Check the slots themselves, not only their number.

    Raises
    ------
    RuntimeError
        The policy broke its contract. A cache that keeps more than its budget would look better
        than it is, one that keeps a slot twice or an empty one would be wrong.
    """
    batch, heads, size = shape

    def fail(expected: str, got: object) -> RuntimeError:
        return RuntimeError(f"[{policy.name}] kept slots must be {expected}, got {got}")

    if keep.dtype != torch.int32 or keep.dim() != 3 or keep.shape[:2] != (batch, heads):
        raise fail(f"int32 ({batch}, {heads}, M)", f"{keep.dtype} {tuple(keep.shape)}")
    budget = policy.budget
    expected = tuple(
        budget if budget is not None and length >= budget + policy.cut_interval else length
        for length in lengths
    )
    if keep.shape[-1] != max(expected, default=0):
        raise fail(f"{max(expected, default=0)} a head", keep.shape[-1])
    if not look:
        return expected
    first_kept = host_numbers([keep.shape[-1] - count for count in expected], keep.device)
    first_live = host_numbers([size - length for length in lengths], keep.device)
    is_kept = torch.arange(keep.shape[-1], device=keep.device) >= first_kept[:, None]
    is_kept = is_kept[:, None].expand_as(keep)
    in_range = torch.where(
        is_kept, (keep >= first_live[:, None, None]) & (keep < size), keep == -1
    ).all()
    ascending = ((keep.diff(dim=-1) > 0) | ~is_kept[..., :-1]).all()
    if not bool(in_range & ascending):
        raise fail(f"ascending, unique and live, {expected} of each sequence", keep.tolist())
    return expected


def plain_name(name: str) -> str:
    """Return a name as it is compared: without case, hyphens, underscores and outer white space."""
    return name.strip().lower().replace("-", "").replace("_", "")


def host_numbers(numbers: Sequence[int], device: torch.device) -> torch.Tensor:
    """Return int64 numbers on a device, without waiting for it where all are the same."""
    if len(set(numbers)) == 1:
        return torch.full((len(numbers),), numbers[0], dtype=torch.int64, device=device)
    # The driver stages a copy this small before the call returns.
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)


def move_slots(tensor: torch.Tensor, keep: torch.Tensor) -> None:
    """Move the kept slots of `tensor` (B, Hkv, S) or (B, Hkv, S, D) to the front, in place.

    What lands in an empty slot has no meaning.
    """
    index = keep.clamp_min(0).to(torch.int64)
    if tensor.dim() == 4:
        index = index[..., None].expand(-1, -1, -1, tensor.shape[-1])
    tensor[:, :, : keep.shape[-1]] = tensor.gather(2, index)


def live_slots(valid: torch.Tensor, lengths: Sequence[int], heads: int) -> torch.Tensor:
    """Return int32 (B, heads, M): all that is not empty, as :meth:`Tracker.keep` writes it."""
    most = max(lengths, default=0)
    # A stable sort moves the empty slots to the front and leaves the others in order.
    order = valid.to(torch.uint8).sort(dim=-1, stable=True).indices[:, valid.shape[1] - most :]
    order = order.masked_fill(~valid.gather(1, order), -1)
    return order.to(torch.int32)[:, None].expand(-1, heads, -1).contiguous()
