"""Features of tokens that are read off the attention, or off the queries that pay it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from search.features import Unrepeated
from search.scores import Kind, Memory, Pass, Score, Space, View

# Elements that one block of logits may fill: 512 MiB in float32.
_BLOCK_ELEMENTS = 1 << 27
_TINY = 1e-20


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
