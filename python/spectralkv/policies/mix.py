"""Mix: the budget divided among policies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from spectralkv.policies.base import (
    Observation,
    Policy,
    ScoreTracker,
    Tracker,
    host_numbers,
    plain_name,
)

# What the mix decides for all its parts.
_SHARED = ("budget", "interval", "window", "sinks")


@dataclass(frozen=True, kw_only=True)
class Mix(Policy):
    """Give each of several policies a quota of the budget.

    Sinks and window stay. The other places are divided by quota; the first policy takes those
    tokens that it scores highest, the next one those that it scores highest among the tokens still
    free, and so on. Of equal scores the newer token stays. So exactly `budget` tokens stay, and
    the policies' scores need no common scale.

    Parameters
    ----------
    of : str
        Names of the policies, in their order, joined by ``+``.
    share : float
        Share of the places for the first policy, from 0 to 1; the others get equal parts of the
        rest. Quotas are rounded down, and the first policy gets what rounding leaves.
    options : tuple of (str, object)
        Options of the policies, each named ``policy__option``. :func:`spectralkv.policies.create`
        takes them as keywords: ``create("mix", budget=512, of="snapkv+rkv", rkv__mix=0.3)``.

    Notes
    -----
    All parts have the budget, interval, window and sinks of the mix. Where one of them derives its
    window from the budget (H2O, StreamingLLM), that plays no part here: the mix protects its own
    window alone.
    """

    name: ClassVar[str] = "mix"

    of: str = "snapkv+keydiff"
    share: float = 0.5
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_number("share", minimum=0, maximum=1)
        names = self._names()
        self._require(
            len(set(names)) == len(names) > 1, "of", "two or more different policies joined by '+'"
        )
        unknown = sorted({key for key, _ in self.options if self._owner(key) not in names})
        self._require(not unknown, "options", f"options of {' or '.join(names)}, policy__option")
        self._require(
            not any(key.partition("__")[2] in _SHARED for key, _ in self.options),
            "options",
            f"none of {', '.join(_SHARED)}, which the parts share",
        )
        self.parts()  # each refuses its own bad options

    def parts(self) -> list[Policy]:
        """Return the policies that share the budget."""
        from spectralkv import policies

        shared = {name: getattr(self, name) for name in _SHARED}
        shared["interval"] = self.cut_interval
        return [
            policies.create(
                name,
                **shared,
                **{
                    key.partition("__")[2]: value
                    for key, value in self.options
                    if self._owner(key) == name
                },
            )
            for name in self._names()
        ]

    def quotas(self) -> list[int]:
        """Return the places of each part; with sinks and window they make up the budget."""
        if self.budget is None:
            return []
        places = self.budget - self.sinks - self.window
        others = len(self._names()) - 1
        rest = [math.floor((1.0 - self.share) / others * places)] * others
        return [places - sum(rest), *rest]

    def trackers(self, num_layers: int) -> list[Tracker]:
        """Return fresh state for `num_layers` layers."""
        parts = [part.trackers(num_layers) for part in self.parts()]
        return [_MixTracker(self, list(layer)) for layer in zip(*parts, strict=True)]

    def _names(self) -> list[str]:
        from spectralkv import policies

        # Full keeps all there is, and the order of a mix inside a mix would be anyone's guess.
        known = {
            plain_name(name): name
            for name in policies.available()
            if name not in ("full", self.name)
        }
        names = [known.get(plain_name(name)) for name in str(self.of).split("+")]
        self._require(None not in names, "of", f"among {', '.join(known.values())}, joined by '+'")
        return [name for name in names if name is not None]

    def _owner(self, key: str) -> str | None:
        prefix = plain_name(key.partition("__")[0])
        return next((name for name in self._names() if plain_name(name) == prefix), None)


class _MixTracker(ScoreTracker[Mix]):
    def __init__(self, policy: Mix, parts: list[Tracker]) -> None:
        super().__init__(policy)
        self._parts = parts
        # Spectral's, if it is among them: it moves the tensors itself, and scores as of its last
        # walk.
        self._walker = next((part for part in parts if not isinstance(part, ScoreTracker)), None)

    def observe(self, observation: Observation) -> None:
        super().observe(observation)
        for part in self._parts:
            part.observe(observation)

    def scores(self) -> torch.Tensor:
        """Return n for tokens that the first of n parts chose, n - 1 for the next, 0 for the rest.

        What stands at sinks and in the window has no meaning.
        """
        seen, policy = self._observed(), self._policy
        batch, heads, size, _ = seen.keys.shape
        device = seen.keys.device
        slot = torch.arange(size, device=device)
        first = host_numbers([size - length for length in seen.lengths], device)[:, None]
        is_free = (slot >= first + policy.sinks) & (slot < size - policy.window)
        chosen = torch.zeros(batch, heads, size, device=device)
        for rank, (part, quota) in enumerate(zip(self._parts, policy.quotas(), strict=True)):
            scores = part.scores()
            extreme = torch.finfo(scores.dtype).max
            ranked = torch.nan_to_num(scores, nan=-extreme, posinf=extreme, neginf=-extreme)
            ranked = ranked.masked_fill(~is_free[:, None] | (chosen > 0), float("-inf"))
            # Stable and ascending: of equal scores the newer token comes later.
            best = ranked.sort(dim=-1, stable=True).indices[..., max(0, size - quota) :]
            chosen.scatter_(2, best, float(len(self._parts) - rank))
        return chosen

    def keep(self) -> torch.Tensor | None:
        # Renews the scores of the sequences that are due.
        walked = None if self._walker is None else self._walker.keep()
        keep = super().keep()
        if walked is None or keep is None or self._chosen is None:
            return keep
        # Of its own tensor the walker knows how many tokens each sequence keeps; of another it
        # would have to count them, and wait for the device.
        walked.copy_(keep)
        self._chosen = (walked, self._chosen[1])
        return walked

    def compact(self, keep: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        # Keys and values move once. Who is not to move them is shown none of their width.
        no_keys, no_values = keys[..., :0], values[..., :0]
        if self._walker is None:
            super().compact(keep, keys, values)
        else:
            self._walker.compact(keep, keys, values)
            super().compact(keep, no_keys, no_values)
        last, size = self._last, keep.shape[-1]
        if last is not None:
            self._last = last._replace(keys=keys[:, :, :size], values=values[:, :, :size])
        for part in self._parts:
            if isinstance(part, ScoreTracker):
                part._chosen = None if last is None else (keep, last.lengths)
                part.compact(keep, no_keys, no_values)
                part._last = self._last

    def truncate(self, count: int) -> None:
        super().truncate(count)
        for part in self._parts:
            part.truncate(count)

    def select_batch(self, indices: torch.Tensor) -> None:
        super().select_batch(indices)
        for part in self._parts:
            part.select_batch(indices)

    def reserve(self, capacity: int) -> None:
        super().reserve(capacity)
        for part in self._parts:
            part.reserve(capacity)

    def reset(self) -> None:
        super().reset()
        for part in self._parts:
            part.reset()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {
            f"{index}.{name}": tensor
            for index, part in enumerate(self._parts)
            for name, tensor in part.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, torch.Tensor], held: Observation) -> None:
        super().load_state_dict(state, held)
        for index, part in enumerate(self._parts):
            prefix = f"{index}."
            own = {
                name.removeprefix(prefix): tensor
                for name, tensor in state.items()
                if name.startswith(prefix)
            }
            part.load_state_dict(own, held)

    def nbytes(self) -> int:
        return sum(part.nbytes() for part in self._parts)
