"""Scores made of other scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from search.features import KeyDiff
from search.scores import Kind, Score, Space, View


@dataclass(frozen=True)
class Softmax(Score):
    """Softmax of another score's z-scores, so that it can be a distribution to restart from."""

    of: Score
    sharpness: float = 1.0

    def parts(self) -> tuple[Score, ...]:
        return (self.of,)

    def rate(self, view: View) -> torch.Tensor:
        return (view.standard(view.rate(self.of)) * self.sharpness).softmax(1)


def novelty(space: Space = "plain", sharpness: float = 1.0) -> Softmax:
    """Return the restart distribution of Spectral's novelty population."""
    return Softmax(KeyDiff(space), sharpness)


@dataclass(frozen=True)
class PerChance(Score):
    """A sum over queries by how many queries there were, to a power: no favour for the old."""

    of: Score
    power: float = 1.0

    def parts(self) -> tuple[Score, ...]:
        return (self.of,)

    def rate(self, view: View) -> torch.Tensor:
        chances = (view.seen - view.positions).clamp_min(1).to(view.keys.dtype)
        return view.rate(self.of) / chances**self.power


@dataclass(frozen=True)
class Remembered(Score):
    """Another score summed over the cuts, each time times `decay`; or the most it ever was."""

    of: Score
    decay: float = 0.9
    kind: Literal["sum", "max"] = "sum"

    def parts(self) -> tuple[Score, ...]:
        return (self.of,)

    def rate(self, view: View) -> torch.Tensor:
        held = view.memory.by_position(self)
        held *= self.decay
        new = view.at_positions(view.rate(self.of)).view(held.shape)
        if self.kind == "sum":
            held += new
        else:
            torch.maximum(held, new, out=held)
        return view.at_slots(held)


@dataclass(frozen=True)
class Sum(Score):
    """Weighted sum of scores, each with sum 1 in a head."""

    of: tuple[tuple[float, Score], ...]

    def parts(self) -> tuple[Score, ...]:
        return tuple(score for _, score in self.of)

    def rate(self, view: View) -> torch.Tensor:
        return sum(weight * view.share(score) for weight, score in self.of)


@dataclass(frozen=True)
class Product(Score):
    """Weighted geometric mean of scores; `floor` of an even share keeps a zero from deciding."""

    of: tuple[tuple[float, Score], ...]
    floor: float = 1e-4

    def parts(self) -> tuple[Score, ...]:
        return tuple(score for _, score in self.of)

    def rate(self, view: View) -> torch.Tensor:
        floor = self.floor / view.positions.shape[1]
        logs = [weight * (view.share(score) + floor).log() for weight, score in self.of]
        return sum(logs).exp()


@dataclass(frozen=True)
class Ranks(Score):
    """Weighted sum, or maximum, of the ranks in a head, from 0 (worst) to 1.

    The maximum is the union of what each score would keep, in equal parts, whatever they share.
    """

    of: tuple[tuple[float, Score], ...]
    kind: Literal["sum", "max"] = "sum"

    def parts(self) -> tuple[Score, ...]:
        return tuple(score for _, score in self.of)

    def rate(self, view: View) -> torch.Tensor:
        ranks = [weight * rank(view, view.rate(score)) for weight, score in self.of]
        return sum(ranks) if self.kind == "sum" else torch.stack(ranks).amax(0)


@dataclass(frozen=True)
class Times(Score):
    """A score times the length of each token's value."""

    of: Score

    def parts(self) -> tuple[Score, ...]:
        return (self.of,)

    def rate(self, view: View) -> torch.Tensor:
        return view.rate(self.of) * view.values.norm(dim=-1)


@dataclass(frozen=True)
class Nearby(Score):
    """Mean or maximum of a score over the `width` positions around a token that are held.

    A phrase stays or goes as a whole. `after`: over the token and those before it, so that what
    follows a good token stays with it. The first `sinks` tokens take no part.
    """

    of: Score
    width: int = 9
    kind: Kind = "mean"
    after: bool = False
    sinks: int = 4

    def parts(self) -> tuple[Score, ...]:
        return (self.of,)

    def rate(self, view: View) -> torch.Tensor:
        sink = view.positions < self.sinks
        rating = view.share(self.of).masked_fill(sink, 0.0)
        side = self.width - 1 if self.after else self.width // 2
        spread = functional.pad(view.at_positions(rating), (side, self.width - 1 - side))
        if self.kind == "max":
            pooled = functional.max_pool1d(spread[:, None], self.width, stride=1)[:, 0]
        else:
            there = view.at_positions((view.live & ~sink).to(rating.dtype))
            there = functional.pad(there, (side, self.width - 1 - side))
            both = torch.stack((spread, there), 1)
            total, count = functional.avg_pool1d(both, self.width, stride=1).unbind(1)
            pooled = total / count.clamp_min(1e-6)
        return view.at_slots(pooled)


@dataclass(frozen=True)
class Blocks(Score):
    """Mean of a score over fixed blocks of `size` positions (ChunkKV, arXiv:2502.00299)."""

    of: Score
    size: int = 10

    def parts(self) -> tuple[Score, ...]:
        return (self.of,)

    def rate(self, view: View) -> torch.Tensor:
        block = view._index // self.size
        count = -(-view.memory.length // self.size)
        total, held = (view.keys.new_zeros(view.positions.shape[0], count) for _ in range(2))
        total.scatter_add_(1, block, view.share(self.of))
        held.scatter_add_(1, block, view.live.to(total.dtype))
        return (total / held.clamp_min(1.0)).gather(1, block)


@dataclass(frozen=True)
class Across(Score):
    """Mean or maximum of a score over the heads of a layer, or over all heads of the model.

    A token that matters as a whole, to whom several heads agree. A head that let it go counts 0.
    """

    of: Score
    over: Literal["layer", "model"] = "layer"
    kind: Kind = "mean"

    def parts(self) -> tuple[Score, ...]:
        return (self.of,)

    def rate(self, view: View) -> torch.Tensor:
        layers, batch, heads = view.memory.shape
        by_position = view.at_positions(view.share(self.of)).view(layers, batch, heads, -1)
        dims = (2,) if self.over == "layer" else (0, 2)
        pooled = (
            by_position.mean(dims, keepdim=True)
            if self.kind == "mean"
            else by_position.amax(dims, keepdim=True)
        )
        return view.at_slots(pooled.expand_as(by_position))


def rank(view: View, rating: torch.Tensor) -> torch.Tensor:
    """Return ranks (R, S) from 0 to 1 among the tokens of each head."""
    order = rating.masked_fill(~view.live, float("-inf")).argsort(dim=1, stable=True)
    slots = rating.shape[1]
    place = torch.arange(slots, device=rating.device, dtype=view.keys.dtype).expand_as(order)
    # Empty slots come first in the order.
    empty = (slots - view.live.sum(1, keepdim=True)).to(place.dtype)
    ranks = torch.empty_like(place).scatter_(1, order, place) - empty
    return (ranks / (slots - empty).clamp_min(1.0)).clamp_min(0.0)
