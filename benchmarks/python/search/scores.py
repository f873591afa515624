"""What a rule ranks tokens by: features of tokens, and ways to combine them.

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


class Memory:
    """What scores remember of a run: tensors by score and name."""

    def __init__(self, shape: tuple[int, int, int], length: int, decoder: Decoder) -> None:
        self.shape, self.length, self.decoder = shape, length, decoder
        self._held: dict[tuple[Score, str], Any] = {}

    def get(self, score: Score, name: str = "") -> Any:
        """Return what is held, or None."""
        return self._held.get((score, name))

    def set(self, score: Score, name: str, value: Any) -> None:
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

# -- what needs no attention


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
class Softmax(Score):
    """Softmax of another score's z-scores, so that it can be a distribution to restart from."""

    of: Score
    sharpness: float = 1.0

    def parts(self) -> tuple[Score, ...]:
        return (self.of,)

    def rate(self, view: View) -> torch.Tensor:
        return (view.standard(view.rate(self.of)) * self.sharpness).softmax(1)


def novelty(space: Space = "key", sharpness: float = 1.0) -> Softmax:
    """Return the restart distribution of Spectral's novelty population."""
    return Softmax(KeyDiff(space), sharpness)


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
        solved = torch.linalg.solve(gram + self.ridge * size * eye, x.transpose(1, 2))
        return (x * solved.transpose(1, 2)).sum(2)


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


# -- attention received


@dataclass(frozen=True)
class Received(Score):
    """Attention received so far: H2O's sums.

    Attributes
    ----------
    decay : float
        Factor of all sums for each new token. 0.9984 halves them in 430 tokens.
    far : int
        Only queries at least so many tokens later count: those nearer say little of what comes.
    kind : {"sum", "max"}
        Sum over the queries, or their largest attention.
    group : {"mean", "max"}
        Over the query heads of a KV head.
    """

    decay: float = 1.0
    far: int = 0
    kind: Literal["sum", "max"] = "sum"
    group: Kind = "mean"

    def wants(self) -> frozenset[str]:
        return frozenset({"attention" if self.group == "mean" else "attention_max"})

    def watch(self, seen: Pass, memory: Memory) -> None:
        attention = seen.attention if self.group == "mean" else seen.attention_max
        age = torch.arange(seen.count - 1, -1, -1, device=attention.device)
        weight = self.decay ** age.to(attention.dtype)
        position = seen.positions
        if self.far:
            query = seen.begin + torch.arange(seen.count, device=attention.device)
            near = query[:, None] - position[..., None, :] < self.far
            attention = attention.masked_fill(near, 0.0)
        index, held = position.clamp_min(0), memory.by_position(self)
        held *= self.decay**seen.count
        if self.kind == "sum":
            drawn = torch.einsum("lbhqs,q->lbhs", attention, weight)
            held.scatter_add_(3, index, drawn.masked_fill_(position < 0, 0.0))
        else:
            drawn = (attention * weight[:, None]).amax(3).masked_fill_(position < 0, 0.0)
            held.scatter_reduce_(3, index, drawn, "amax")

    def rate(self, view: View) -> torch.Tensor:
        return view.at_slots(view.memory.by_position(self))


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
class Votes(Score):
    """SnapKV: attention of the newest queries, smoothed over neighbours; 0 for their own tokens.

    `values`: times the length of the token's value.
    """

    queries: int = 64
    pool: int = 5
    pooling: Kind = "mean"
    group: Kind = "mean"
    values: bool = False

    def wants(self) -> frozenset[str]:
        return frozenset({"queries"})

    def watch(self, seen: Pass, memory: Memory) -> None:
        hold_queries(self, seen, memory, self.queries)

    def rate(self, view: View) -> torch.Tensor:
        slots = view.positions.shape[1]
        before = max(0, slots - self.queries)
        votes = view.keys.new_zeros(view.positions.shape)
        for rows, logits in newest_logits(self, view):
            attention = logits.softmax(-1)
            drawn = attention.mean(1) if self.group == "mean" else attention.amax(1)
            votes[rows, :before] = drawn.sum(1)[:, :before]
        if self.values:
            votes *= view.values.norm(dim=-1)
        votes[:, :before] = pool(votes[:, :before], self.pool, self.pooling)
        return votes


@dataclass(frozen=True)
class Newest(Score):
    """TOVA: attention of the newest query, mean over all heads of the layer."""

    def wants(self) -> frozenset[str]:
        return frozenset({"queries"})

    def watch(self, seen: Pass, memory: Memory) -> None:
        hold_queries(self, seen, memory, 1)

    def rate(self, view: View) -> torch.Tensor:
        drawn = view.keys.new_zeros(view.positions.shape)
        for rows, logits in newest_logits(self, view):
            drawn[rows] = logits.softmax(-1).mean((1, 2))
        layers, batch, heads = view.memory.shape
        mean = drawn.view(layers, batch, heads, -1).mean(2, keepdim=True)
        return mean.expand(-1, -1, heads, -1).reshape(drawn.shape)


@dataclass(frozen=True)
class Importance(Score):
    """R-KV's I: logits of the newest queries, maximum over the group, softmax, mean, max-pooled."""

    queries: int = 8
    pool: int = 7

    def wants(self) -> frozenset[str]:
        return frozenset({"queries"})

    def watch(self, seen: Pass, memory: Memory) -> None:
        hold_queries(self, seen, memory, self.queries)

    def rate(self, view: View) -> torch.Tensor:
        before = max(1, view.positions.shape[1] - self.queries)
        drawn = view.keys.new_zeros(view.positions.shape)
        for rows, logits in newest_logits(self, view):
            attention = logits.amax(1)[..., :before].softmax(-1)
            drawn[rows, :before] = pool(attention.mean(1), self.pool, "max")
        return drawn


@dataclass(frozen=True)
class RKV(Score):
    r"""R-KV: :math:`\lambda I - (1 - \lambda) R`; 0 for the tokens of its queries."""

    mix: float = 0.07
    queries: int = 8
    space: Space = "key"

    def parts(self) -> tuple[Score, ...]:
        return (Importance(self.queries), Unrepeated(self.space))

    def wants(self) -> frozenset[str]:
        return frozenset({"queries"})

    def rate(self, view: View) -> torch.Tensor:
        importance, unrepeated = map(view.rate, self.parts())
        repeated = (-unrepeated).masked_fill(~view.live, float("-inf")).softmax(1)
        rating = self.mix * importance - (1.0 - self.mix) * repeated
        rating[:, max(0, rating.shape[1] - self.queries) :] = 0.0
        return rating


@dataclass(frozen=True)
class Recurrence(Score):
    """LazyEviction: tokens whose silence is short against their longest one so far."""

    threshold: float = 0.0005

    def wants(self) -> frozenset[str]:
        return frozenset({"attention_max"})

    def watch(self, seen: Pass, memory: Memory) -> None:
        integer = torch.int32
        last_held = memory.by_position(self, "last", dtype=integer)
        longest_held = memory.by_position(self, "longest", dtype=integer)
        step = seen.begin + 1 + torch.arange(seen.count, device=last_held.device, dtype=integer)
        # A new token counts as activated one step before its own.
        last_held[..., seen.begin : seen.begin + seen.count] = step - 1
        index = seen.positions.clamp_min(0)
        last = last_held.gather(3, index)
        active = seen.attention_max >= self.threshold
        activated = torch.where(active, step[:, None], last[..., None, :]).cummax(3).values
        before = torch.cat((last[..., None, :], activated[..., :-1, :]), 3)
        gap = (activated - before).amax(3).masked_fill_(seen.positions < 0, 0)
        longest_held.scatter_reduce_(3, index, gap, "amax")
        newest = activated[..., -1, :].masked_fill(seen.positions < 0, 0)
        last_held.scatter_reduce_(3, index, newest, "amax")

    def rate(self, view: View) -> torch.Tensor:
        last = view.at_slots(view.memory.by_position(self, "last")).to(view.keys.dtype)
        longest = view.at_slots(view.memory.by_position(self, "longest")).to(view.keys.dtype)
        recurs = 2.0 * torch.sigmoid(-(view.seen - last) / longest)
        often = 2.0 * torch.sigmoid(1.0 - longest)
        return (recurs + often).masked_fill(longest == 0, 0.0)


@dataclass(frozen=True)
class Own(Score):
    """Something of the attention that a token paid itself, in this head.

    Attributes
    ----------
    what : {"self", "content", "entropy"}
        What it paid to itself: it brings what was not there. What it paid to others than the
        sinks: its head had something to do. Entropy of what it paid to others, negative: it knew
        whom it wanted.
    sinks : int
        Tokens that are sinks.
    """

    what: Literal["self", "content", "entropy"] = "self"
    sinks: int = 4

    def wants(self) -> frozenset[str]:
        return frozenset({"attention"})

    def watch(self, seen: Pass, memory: Memory) -> None:
        attention, held = seen.attention, memory.by_position(self)
        new = held[..., seen.begin : seen.begin + seen.count]
        if self.what == "self":
            own = attention[..., attention.shape[-1] - seen.count :]
            new.copy_(own.diagonal(dim1=3, dim2=4))
            return
        content = attention.masked_fill((seen.positions < self.sinks)[..., None, :], 0.0)
        total = content.sum(-1, keepdim=True)
        if self.what == "content":
            new.copy_(total[..., 0])
        else:
            new.copy_(torch.special.entr(content / total.clamp_min(_TINY)).sum(-1).neg())

    def rate(self, view: View) -> torch.Tensor:
        return view.at_slots(view.memory.by_position(self))


@dataclass(frozen=True)
class Replayed(Score):
    """Attention received when the newest tokens are read again: who is needed to repeat the text.

    After each pass the newest `tokens` tokens are fed a second time, behind the first, and not
    stored. A token's rating is the most attention that any such query of its group paid to it, so
    it tells what the text's own words need to be found again, without knowing the question (as
    KVzip does after the prompt, arXiv:2505.23416). It costs a second forward pass.
    """

    tokens: int = 32
    decay: float = 1.0

    def wants(self) -> frozenset[str]:
        return frozenset({"replay"})

    def watch_replay(self, seen: Pass, memory: Memory) -> None:
        held = memory.by_position(self)
        slots = seen.positions.shape[-1] - seen.count
        position = seen.positions[..., :slots]
        drawn = seen.attention_max[..., :slots].amax(3).masked_fill_(position < 0, 0.0)
        held *= self.decay
        held.scatter_reduce_(3, position.clamp_min(0), drawn, "amax")

    def rate(self, view: View) -> torch.Tensor:
        return view.at_slots(view.memory.by_position(self))


@dataclass(frozen=True)
class Expected(Score):
    """Attention that queries like those so far will pay, by a normal distribution of them.

    The queries before their rotation have, in each query head, mean and covariance over the text.
    Rotated to positions up to `ahead` tokens from now, the expected exponential of a logit has a
    closed form. Expected attention, arXiv:2510.00636, which has `values` and 512 tokens ahead.

    Attributes
    ----------
    ahead : int
        Tokens to look ahead; four positions stand for all.
    values : bool
        Times the length of the token's value.
    group : {"mean", "max"}
        Over the query heads of a KV head.
    decay : float
        Factor of the queries' sums for each new token.
    """

    ahead: int = 64
    values: bool = True
    group: Kind = "mean"
    decay: float = 1.0

    def wants(self) -> frozenset[str]:
        return frozenset({"plain_queries"})

    def watch(self, seen: Pass, memory: Memory) -> None:
        query = seen.plain_queries
        age = torch.arange(seen.count - 1, -1, -1, device=query.device)
        weight = self.decay ** age.to(query.dtype)
        weighted = query * weight[:, None]
        sums = (weight.sum(), weighted.sum(3), weighted.transpose(3, 4) @ query)
        old = memory.get(self)
        if old is not None:
            fade = self.decay**seen.count
            sums = tuple(fade * before + new for before, new in zip(old, sums, strict=True))
        memory.set(self, "", sums)

    def rate(self, view: View) -> torch.Tensor:
        decoder = view.decoder
        layers, batch, heads = view.memory.shape
        count, total, square = view.memory.get(self)
        mean = total / count  # (L, B, Hq, D)
        covariance = square / count - mean[..., None] * mean[..., None, :]
        ahead = view.seen + torch.linspace(0.0, self.ahead, 4, device=mean.device)
        means = decoder.rotate(mean[..., None, :], decoder.angles(ahead))  # (L, B, Hq, 4, D)
        # One rotation for the covariance, that of the middle: it hardly changes over `ahead`.
        middle = decoder.angles(ahead[2])
        half = decoder.rotate(covariance, middle)
        covariance = decoder.rotate(half.transpose(-1, -2), middle)
        rows, group = layers * batch * heads, decoder.group
        means = means.reshape(rows, group, *means.shape[-2:])
        covariance = covariance.reshape(rows, group, *covariance.shape[-2:])
        keys = view.keys * decoder.scaling
        drawn = keys.new_zeros(view.positions.shape)
        for member in range(group):
            spread = ((keys @ covariance[:, member]) * keys).sum(-1)
            logits = (keys @ means[:, member].transpose(1, 2)).logsumexp(-1) + 0.5 * spread
            attention = logits.masked_fill_(~view.live, float("-inf")).softmax(1)
            if self.group == "mean":
                drawn += attention / group
            else:
                torch.maximum(drawn, attention, out=drawn)
        return drawn * view.values.norm(dim=-1) if self.values else drawn


@dataclass(frozen=True)
class Future(Score):
    """A limit: the attention that the full cache really paid afterwards.

    Attributes
    ----------
    ahead : int or None
        Over so many tokens; None: all that follow, question and answer included.
    """

    ahead: int | None = None

    def wants(self) -> frozenset[str]:
        return frozenset({"future"})

    def rate(self, view: View) -> torch.Tensor:
        return view.at_slots(view.future.coming(view.seen, self.ahead))


# -- PageRank


@dataclass(frozen=True)
class Graph(Score):
    """The attention graph: each token points to those it attended to most.

    Not a rating, but what `PageRank` walks on.

    Attributes
    ----------
    top_k : int
        Edges of a token.
    law : {"weighted", "uniform", "absolute"}
        Edges are followed in proportion to the attention, each alike, or with the attention itself
        as probability, where what is not on an edge goes to a restart: a token that attended to
        nobody in particular passes nothing on.
    group : {"mean", "max"}
        Over the query heads of a KV head.
    values : bool
        Attention times the length of the value that it fetched.
    sinks : int
        Tokens that are no part of the graph.
    """

    top_k: int = 8
    law: Literal["weighted", "uniform", "absolute"] = "weighted"
    group: Kind = "mean"
    values: bool = False
    sinks: int = 4

    def wants(self) -> frozenset[str]:
        needed = {"attention" if self.group == "mean" else "attention_max"}
        return frozenset(needed | ({"value_norms"} if self.values else set()))

    def watch(self, seen: Pass, memory: Memory) -> None:
        attention = seen.attention if self.group == "mean" else seen.attention_max
        position = seen.positions
        if self.values:
            attention = attention * seen.value_norms[..., None, :]
        query = seen.begin + torch.arange(seen.count, device=position.device)
        no_edge = (position < self.sinks)[..., None, :] | (position[..., None, :] == query[:, None])
        attention = attention.masked_fill(no_edge, 0.0)
        best = attention.topk(min(self.top_k, attention.shape[-1]), -1)
        targets = memory.by_position(self, "targets", width=self.top_k, dtype=torch.int32)
        weights = memory.by_position(self, "weights", width=self.top_k)
        width = best.values.shape[-1]
        new = slice(seen.begin, seen.begin + seen.count)
        to = position[..., None, :].expand(*attention.shape).gather(4, best.indices)
        targets[..., new, :width] = to.clamp_min(0).to(torch.int32)
        weight = (best.values > 0).to(best.values) if self.law == "uniform" else best.values
        if self.law != "absolute":
            weight = weight / weight.sum(-1, keepdim=True).clamp_min(_TINY)
        weights[..., new, :width] = weight

    def rate(self, view: View) -> torch.Tensor:  # noqa: ARG002
        raise TypeError("a graph is walked on, it rates nothing")

    def edges(self, view: View) -> tuple[torch.Tensor, torch.Tensor]:
        """Return slots (R, S, K) and probabilities (R, S, K) of the edges; 0 where one is dead."""
        name = ("edges", self)
        if name not in view._rated:
            rows, slots = view.positions.shape
            shape = (rows, view.memory.length, self.top_k)
            integer = torch.int32
            targets = view.memory.by_position(self, "targets", width=self.top_k, dtype=integer)
            weights = view.memory.by_position(self, "weights", width=self.top_k)
            index = view._index[..., None].expand(-1, -1, self.top_k)
            to = targets.view(shape).gather(1, index).long()
            weight = weights.view(shape).gather(1, index)
            slot = torch.arange(1, slots + 1, device=to.device).expand(rows, -1)
            where = torch.zeros(rows, view.memory.length, dtype=torch.long, device=to.device)
            where.scatter_add_(1, view._index, slot.masked_fill(~view.live, 0))
            target = where.gather(1, to.view(rows, -1)).view(rows, slots, self.top_k) - 1
            weight = weight.masked_fill((target < 0) | ~view.live[..., None], 0.0)
            if self.law != "absolute":
                weight = weight / weight.sum(-1, keepdim=True).clamp_min(_TINY)
            view._rated[name] = target.clamp_min_(0)
            view._rated[("weights", self)] = weight
        return view._rated[name], view._rated[("weights", self)]


@dataclass(frozen=True)
class PageRank(Score):
    r"""Personalized PageRank: :math:`y = r + (1 - p) A^T y` with restarts r, over the sum of y.

    Attributes
    ----------
    start : Score
        Where walkers restart, in proportion to this score; never at a sink.
    counts : {"edges", "all"}
        y - r, the arrivals over an edge, or y.
    restart_prob : float
        p.
    steps : int
        Terms of the series that solves the equation; the rest is below (1 - p)^steps.
    direction : {"out", "in", "both"}
        Walkers go to whom a token attended to, to those who attended to it, or with equal chances
        to either.
    graph : Graph
        What they walk on.
    """

    start: Score
    counts: Literal["edges", "all"] = "edges"
    restart_prob: float = 0.5
    steps: int = 8
    direction: Literal["out", "in", "both"] = "out"
    graph: Graph = Graph()

    def parts(self) -> tuple[Score, ...]:
        return (self.start, self.graph)

    def rate(self, view: View) -> torch.Tensor:
        sink = view.positions < self.graph.sinks
        start = view.normal(view.rate(self.start).masked_fill(sink, 0.0))
        target, weight = self.graph.edges(view)
        rows, slots, degree = target.shape
        target = target.view(rows, slots * degree)
        go = 1.0 - self.restart_prob
        inflow = None
        if self.direction != "out":
            into = start.new_zeros(start.shape).scatter_add_(1, target, weight.view(rows, -1))
            inflow = 1.0 / into.clamp_min(1.0 if self.graph.law == "absolute" else _TINY)
        rank, came = start, torch.zeros_like(start)
        share = 0.5 if self.direction == "both" else 1.0
        for _ in range(self.steps):
            came = torch.zeros_like(start)
            if self.direction != "in":
                along = (go * share * rank[..., None] * weight).view(rows, -1)
                came.scatter_add_(1, target, along)
            if inflow is not None:
                back = (rank * inflow).gather(1, target).view(weight.shape)
                came += go * share * (back * weight).sum(-1)
            rank = start + came
        # Not rank - start: few arrivals at many restarts would be lost to rounding.
        total = rank.sum(1, keepdim=True).clamp_min(_TINY)
        return (came if self.counts == "edges" else rank) / total


# -- combinations


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
    follows a good token stays with it.
    """

    of: Score
    width: int = 9
    kind: Kind = "mean"
    after: bool = False

    def parts(self) -> tuple[Score, ...]:
        return (self.of,)

    def rate(self, view: View) -> torch.Tensor:
        rating = view.share(self.of)
        side = self.width - 1 if self.after else self.width // 2
        spread = functional.pad(view.at_positions(rating), (side, self.width - 1 - side))
        if self.kind == "max":
            pooled = functional.max_pool1d(spread[:, None], self.width, stride=1)[:, 0]
        else:
            there = view.at_positions(view.live.to(rating.dtype))
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


def pool(rating: torch.Tensor, width: int, kind: Kind) -> torch.Tensor:
    """Return (R, S) smoothed over `width` slots, as the published codes do."""
    if width == 1 or not rating.shape[1]:
        return rating
    rating = rating.contiguous()
    if kind == "mean":
        return functional.avg_pool1d(rating, width, stride=1, padding=width // 2)
    return functional.max_pool1d(rating, width, stride=1, padding=width // 2)


def hold_queries(score: Score, seen: Pass, memory: Memory, count: int) -> None:
    """Remember the newest `count` rotated queries of a score."""
    old = memory.get(score, "queries")
    new = seen.queries[:, :, :, -count:]
    if old is not None and new.shape[3] < count:
        new = torch.cat((old, new), 3)[:, :, :, -count:]
    memory.set(score, "queries", new)
    memory.set(score, "last", seen.begin + seen.count)


def newest_logits(score: Score, view: View) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, logits (rows, G, q, S)) of a score's newest queries over all that is held."""
    decoder = view.decoder
    query = view.memory.get(score, "queries")
    count = query.shape[3]
    rows, slots = view.positions.shape
    query = query.reshape(rows, decoder.group, count, decoder.head_dim)
    when = view.seen - count + torch.arange(count, device=query.device)
    step = max(1, _BLOCK_ELEMENTS // (decoder.group * count * slots))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        logits = query[part].flatten(1, 2) @ view.keys[part].transpose(1, 2) * decoder.scaling
        position = view.positions[part, None]
        hidden = (position > when[:, None]) | (position < 0)
        logits = logits.view(-1, decoder.group, count, slots)
        yield part, logits.masked_fill_(hidden[:, None], float("-inf"))
