"""Features of tokens that need no attention: of keys and values, and of the text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn import functional

from search.scores import Memory, Pass, Score, Space, View

# Elements that one block of similarities may fill: 512 MiB in float32.
_BLOCK_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class Position(Score):
    """The newer the better: with sinks, StreamingLLM."""

    def rate(self, view: View) -> torch.Tensor:
        return view.positions.to(view.keys.dtype)


@dataclass(frozen=True)
class Chance(Score):
    """Drawn at random: what a rule must beat."""

    seed: int = 0

    def rate(self, view: View) -> torch.Tensor:
        generator = torch.Generator(device=view.keys.device).manual_seed(self.seed + view.seen)
        return torch.rand(view.positions.shape, generator=generator, device=view.keys.device)


@dataclass(frozen=True)
class Even(Score):
    """All tokens alike."""

    def rate(self, view: View) -> torch.Tensor:
        return view.live.to(view.keys.dtype)


@dataclass(frozen=True)
class Recent(Score):
    """1 for the newest tokens: a share of those seen or, if `tokens` is set, so many."""

    fraction: float = 0.1
    tokens: int = 0

    def rate(self, view: View) -> torch.Tensor:
        count = self.tokens or max(1, int(self.fraction * view.seen))
        first = max(view.sinks, view.seen - count)
        return (view.positions >= first).to(view.keys.dtype)


@dataclass(frozen=True)
class KeyDiff(Score):
    """Minus the cosine with the mean direction of the head's keys, as published."""

    space: Space = "key"

    def rate(self, view: View) -> torch.Tensor:
        direction = view.directions(self.space)
        mean = functional.normalize(direction.sum(1, keepdim=True), dim=-1)
        return -(direction @ mean.transpose(1, 2))[..., 0]


@dataclass(frozen=True)
class Unrepeated(Score):
    """Minus the mean cosine with all other keys; a key's newest near-copy is not counted.

    That is R-KV's redundancy R before its softmax, with the sign turned.
    """

    space: Space = "key"
    threshold: float = 0.5

    def rate(self, view: View) -> torch.Tensor:
        direction = view.directions(self.space)
        rows, slots, _ = direction.shape
        slot = torch.arange(slots, device=direction.device, dtype=torch.int32)
        total = direction.new_empty(rows, slots)
        step = max(1, _BLOCK_ELEMENTS // (slots * slots))
        for start in range(0, rows, step):
            block = direction[start : start + step]
            cosine = block @ block.transpose(1, 2)
            cosine.diagonal(dim1=1, dim2=2).zero_()
            newest = torch.where(cosine > self.threshold, slot, -1).amax(2, keepdim=True)
            total[start : start + step] = cosine.masked_fill_(slot == newest, 0.0).sum(1)
        return -total / view.live.sum(1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class Leverage(Score):
    r"""Statistical leverage :math:`x^T (X^T X + \lambda I)^{-1} x`.

    Who lies alone in a direction of the head's space. Novelty compares with the mean direction
    only; leverage with all directions that the other tokens span.
    """

    space: Space = "key"
    ridge: float = 0.01

    def rate(self, view: View) -> torch.Tensor:
        x = view.vectors(self.space).masked_fill(~view.live[..., None], 0.0)
        gram = x.transpose(1, 2) @ x
        size = gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        eye = torch.eye(x.shape[2], device=x.device, dtype=x.dtype)
        solved = torch.linalg.solve_ex(gram + self.ridge * size * eye, x.transpose(1, 2)).result
        return (x * solved.transpose(1, 2)).sum(2)


@dataclass(frozen=True)
class Unlike(Score):
    r"""Novelty against all tokens seen, evicted ones included.

    Who stays because its key is unlike the others moves the mean of those that are held towards
    itself, so that novelty pales from cut to cut. What was seen does not change.

    Attributes
    ----------
    space : {"key", "plain", "value"}
        Of what.
    law : {"direction", "leverage"}
        Minus the cosine with the mean direction, or :math:`x^T M^{-1} x` with M the mean of
        :math:`x x^T` and a small ridge.
    """

    space: Space = "key"
    law: Literal["direction", "leverage"] = "direction"

    def wants(self) -> frozenset[str]:
        return frozenset({"new_values" if self.space == "value" else "new_keys"})

    def watch(self, seen: Pass, memory: Memory) -> None:
        x = seen.new_values if self.space == "value" else seen.new_keys
        if self.space == "plain":
            where = seen.begin + torch.arange(seen.count, device=x.device)
            x = memory.decoder.rotate(x, memory.decoder.angles(where), back=True)
        new = functional.normalize(x, dim=-1).sum(3)
        if self.law == "leverage":
            new = x.transpose(3, 4) @ x
        old = memory.get(self)
        memory.set(self, "", new if old is None else old + new)

    def rate(self, view: View) -> torch.Tensor:
        held = view.memory.get(self).flatten(0, 2)
        if self.law == "direction":
            mean = functional.normalize(held, dim=-1)
            return -(view.directions(self.space) @ mean[..., None])[..., 0]
        size = held.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        eye = torch.eye(held.shape[1], device=held.device, dtype=held.dtype)
        x = view.vectors(self.space).masked_fill(~view.live[..., None], 0.0)
        solved = torch.linalg.solve_ex(held + 0.01 * size * eye, x.transpose(1, 2)).result
        return view.seen * (x * solved.transpose(1, 2)).sum(2)


@dataclass(frozen=True)
class Apart(Score):
    """Minus the cosine with the mean direction of the `width` slots around: local novelty.

    A sentence that has nothing to do with the text around stands out from it, whatever stands
    elsewhere.
    """

    width: int = 129
    space: Space = "key"

    def rate(self, view: View) -> torch.Tensor:
        direction = view.directions(self.space)
        total = functional.avg_pool1d(
            direction.transpose(1, 2), self.width, stride=1, padding=self.width // 2
        )
        mean = functional.normalize(total.transpose(1, 2), dim=-1)
        return -(direction * mean).sum(2)


@dataclass(frozen=True)
class Norm(Score):
    """Length of the value, or minus that of the key: short keys draw attention (2406.11430)."""

    of: Literal["value", "short_key"] = "value"

    def rate(self, view: View) -> torch.Tensor:
        return view.values.norm(dim=-1) if self.of == "value" else -view.keys.norm(dim=-1)


# -- what the text itself tells


@dataclass(frozen=True)
class Surprise(Score):
    """Nats of a token given those before it: what was foreseen can be foreseen again."""

    def wants(self) -> frozenset[str]:
        return frozenset({"surprise"})

    def rate(self, view: View) -> torch.Tensor:
        return view.of_text(view.surprise)


@dataclass(frozen=True)
class Rarity(Score):
    """1 / how often the token's id was seen in the text so far, to a power."""

    power: float = 1.0

    def rate(self, view: View) -> torch.Tensor:
        ids = view.ids[:, : view.seen]
        counts = torch.zeros(
            ids.shape[0], view.decoder.embedding.shape[0], device=ids.device, dtype=view.keys.dtype
        )
        counts.scatter_add_(1, ids, torch.ones_like(ids, dtype=counts.dtype))
        rare = torch.zeros_like(view.surprise)
        rare[:, : view.seen] = counts.gather(1, ids) ** -self.power
        return view.of_text(rare)


@dataclass(frozen=True)
class Marked(Score):
    """1 for tokens of a set of ids: separators, digits.

    Attributes
    ----------
    name : str
        What the set is called.
    ids : tuple of int
        The set.
    """

    name: str
    ids: tuple[int, ...] = field(repr=False, compare=False)

    def rate(self, view: View) -> torch.Tensor:
        marks = torch.tensor(self.ids, device=view.ids.device)
        return view.of_text(torch.isin(view.ids, marks).to(view.keys.dtype))
