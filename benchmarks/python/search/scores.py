"""What a score is, what it sees of a run, and what it may remember.

A score is a small frozen object. It may watch each forward pass, and keeps what it must remember in
the run's `Memory`, by position; when a cut is due it rates every slot of every head from the
`View`. Scores of equal parameters share memory and are rated once a cut.

Axes: L layers, B sequences, Hkv KV heads, G query heads of a KV head, Q new tokens, S slots, N
positions of the text, D head_dim; R = L x B x Hkv rows, one for each head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.nn import functional

from search.model import Decoder

# Elements that one block of similarities or logits may fill: 512 MiB in float32.
_BLOCK_ELEMENTS = 1 << 27
_TINY = 1e-20

Kind = Literal["mean", "max"]


@dataclass(frozen=True)
class Pass:
    """What a forward pass shows; what no score wants is None."""

    begin: int
    """Position of the first new token; it is the same in all sequences."""
    count: int
    """New tokens."""
    positions: torch.Tensor
    """int64 (L, B, Hkv, S): -1 where a slot is empty. The new tokens are last."""
    attention: torch.Tensor | None = None
    """(L, B, Hkv, Q, S): softmax attention, mean over the query heads of a KV head."""
    attention_max: torch.Tensor | None = None
    """The same, maximum over them."""
    queries: torch.Tensor | None = None
    """(L, B, Hq, Q, D), rotated."""
    plain_queries: torch.Tensor | None = None
    """(L, B, Hq, Q, D) before the rotation."""
    value_norms: torch.Tensor | None = None
    """(L, B, Hkv, S): lengths of the values."""
    new_keys: torch.Tensor | None = None
    """(L, B, Hkv, Q, D), rotated."""
    new_values: torch.Tensor | None = None
    """(L, B, Hkv, Q, D)."""


class Memory:
    """What scores remember of a run: tensors by score and name."""

    def __init__(self, shape: tuple[int, int, int], length: int, decoder: Decoder) -> None:
        self.shape, self.length, self.decoder = shape, length, decoder
        self._held: dict[tuple[Any, str], Any] = {}

    def get(self, score: Any, name: str = "") -> Any:
        """Return what is held, or None."""
        return self._held.get((score, name))

    def set(self, score: Any, name: str, value: Any) -> None:
        """Hold something."""
        self._held[score, name] = value

    def by_position(
        self, score: Score, name: str = "", *, width: int = 0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return (L, B, Hkv, N) or (L, B, Hkv, N, width), of zeros at first."""
        held = self.get(score, name)
        if held is None:
            shape = (*self.shape, self.length, *([width] if width else []))
            held = torch.zeros(shape, dtype=dtype or self.decoder.dtype, device=self.decoder.device)
            self.set(score, name, held)
        return held


class Score(ABC):
    """A rating of tokens. Subclasses are frozen dataclasses."""

    def parts(self) -> tuple[Score, ...]:
        """Return the scores that this one is made of."""
        return ()

    def wants(self) -> frozenset[str]:
        """Return what it needs: fields of `Pass`, ``"surprise"``, ``"replay"``, ``"future"``."""
        return frozenset()

    def watch(self, seen: Pass, memory: Memory) -> None:  # noqa: B027 - most remember nothing
        """Take in a forward pass."""

    def watch_replay(self, seen: Pass, memory: Memory) -> None:  # noqa: B027
        """Take in a pass that read the newest tokens a second time; see `Replayed`."""

    @abstractmethod
    def rate(self, view: View) -> torch.Tensor:
        """Return (R, S): the higher, the sooner a token stays. Empty slots may hold anything."""


def family(score: Score) -> Iterator[Score]:
    """Yield a score and all that it is made of."""
    yield score
    for part in score.parts():
        yield from family(part)


@dataclass
class View:
    """All slots of all heads when a cut is due."""

    decoder: Decoder
    memory: Memory
    seen: int
    """Tokens fed."""
    positions: torch.Tensor
    """int64 (R, S); -1: empty."""
    keys: torch.Tensor
    """(R, S, D)."""
    values: torch.Tensor
    """(R, S, D)."""
    ids: torch.Tensor
    """int64 (B, N)."""
    surprise: torch.Tensor
    """(B, N): nats of each token given those before it."""
    future: Any = None
    """Foresight of the run (`search.simulate`), for limits."""
    sinks: int = 4
    _rated: dict[Any, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.live = self.positions >= 0
        self._index = self.positions.clamp_min(0)

    def rate(self, score: Score) -> torch.Tensor:
        """Return a score's rating (R, S)."""
        if score not in self._rated:
            self._rated[score] = score.rate(self)
        return self._rated[score]

    def share(self, score: Score) -> torch.Tensor:
        """Return the rating, not negative, 0 in empty slots, with sum 1 in each head."""
        return self.normal(self.rate(score))

    def normal(self, rating: torch.Tensor) -> torch.Tensor:
        """Return a rating with sum 1 in each head."""
        rating = rating.clamp_min(0.0).masked_fill(~self.live, 0.0)
        return rating / rating.sum(1, keepdim=True).clamp_min(_TINY)

    def at_slots(self, by_position: torch.Tensor) -> torch.Tensor:
        """Return (R, S) of (L, B, Hkv, N) or (R, N); 0 in empty slots."""
        flat = by_position.reshape(self.positions.shape[0], -1)
        return flat.gather(1, self._index).masked_fill(~self.live, 0)

    def of_text(self, per_token: torch.Tensor) -> torch.Tensor:
        """Return (R, S) of a number for each token of each text (B, N)."""
        layers, batch, heads = self.memory.shape
        rows = per_token[None, :, None].expand(layers, batch, heads, per_token.shape[1])
        return self.at_slots(rows)

    def at_positions(self, rating: torch.Tensor) -> torch.Tensor:
        """Return (R, N) of a rating (R, S); 0 where a position is not held."""
        out = rating.new_zeros(rating.shape[0], self.memory.length)
        return out.scatter_add_(1, self._index, rating.masked_fill(~self.live, 0.0))

    def standard(self, rating: torch.Tensor) -> torch.Tensor:
        """Return z-scores over each head's tokens, -inf in empty slots."""
        live = self.live
        count = live.sum(1, keepdim=True).clamp_min(1)
        mean = rating.masked_fill(~live, 0.0).sum(1, keepdim=True) / count
        away = (rating - mean).masked_fill(~live, 0.0)
        square = away.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)
        deviation = square.sqrt().clamp_min(1e-6)
        return (away / deviation).masked_fill(~live, float("-inf"))

    def vectors(self, space: Space) -> torch.Tensor:
        """Return keys, keys with their rotation undone, or values: (R, S, D)."""
        if space == "value":
            return self.values
        if space == "key":
            return self.keys
        name = ("plain",)
        if name not in self._rated:
            angles = self.decoder.angles(self._index)
            self._rated[name] = self.decoder.rotate(self.keys, angles, back=True)
        return self._rated[name]

    def directions(self, space: Space) -> torch.Tensor:
        """Return `vectors` of length 1, and zeros in empty slots."""
        name = ("direction", space)
        if name not in self._rated:
            unit = functional.normalize(self.vectors(space), dim=-1)
            self._rated[name] = unit.masked_fill(~self.live[..., None], 0.0)
        return self._rated[name]


Space = Literal["key", "plain", "value"]
