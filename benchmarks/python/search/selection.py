"""Rules: who gets how many places of a budget, and what becomes of the others."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch.nn import functional

from search.scores import Score, View, family
from search.walks import Graph
from spectralkv.evaluation import EvaluationError

# Similarities that one block of rows may fill: 512 MiB in float32.
_BLOCK_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class Quota:
    """A part of the places that sinks and window leave, given by one score.

    Attributes
    ----------
    score : Score
        Who is taken first.
    share : float
        Part of the places; the shares of a rule sum to 1.
    pool : {"layer", "model"} or None
        None: each head has its own places. Otherwise all heads of a layer, or of the model, compete
        for them with their scores, each with sum 1 over a head's tokens.
    floor : float
        Where heads compete: the part of its places that each head has for sure.
    cover : float
        No more places than it takes to cover so much of the score's sum over the head; later
        quotas get the rest. 1: all places. So the parts adapt to the text.
    """

    score: Score
    share: float = 1.0
    pool: Literal["layer", "model"] | None = None
    floor: float = 0.2
    cover: float = 1.0


@dataclass(frozen=True)
class Merge:
    """What becomes of an evicted token: it is averaged into one that stays.

    Attributes
    ----------
    into : {"edges", "keys"}
        The token that it attended to most among those that stay, or the one with the most similar
        key.
    graph : Graph
        Whose edges.
    threshold : float
        Cosine that keys must reach.
    keys : bool
        Whether keys are averaged, too, not only values.
    count : float
        This times the logarithm of how many tokens one stands for is added to its logits.
    """

    into: Literal["edges", "keys"] = "edges"
    graph: Graph = field(default_factory=Graph)
    threshold: float = 0.6
    keys: bool = False
    count: float = 0.0


@dataclass(frozen=True)
class Division:
    """When heads that compete are given their parts of the budget anew.

    Attributes
    ----------
    every : int
        At every so many cuts, the first one included; 0: at the first one only.
    even : bool
        Heads of a layer get the mean of their parts.
    profile : bool
        The parts are those that heads had on average over texts read before, and never change.
    """

    every: int = 1
    even: bool = False
    profile: bool = False


@dataclass(frozen=True)
class Rule:
    """An eviction rule.

    Attributes
    ----------
    name : str
        What tables call it.
    why : str
        The reason to try it.
    quotas : tuple of Quota
        Each takes its places among the tokens that the ones before left.
    window : int or float
        Newest tokens that stay; below 1: as a share of the budget.
    sinks : int
        First tokens that stay.
    merge : Merge or None
        None: what is evicted is gone.
    division : Division
        When heads that compete get other parts.
    limit : bool
        It knows what no policy can know: a reference, not a rule.
    """

    name: str
    why: str
    quotas: tuple[Quota, ...]
    window: int | float = 50
    sinks: int = 4
    merge: Merge | None = None
    division: Division = Division()
    limit: bool = False

    def __post_init__(self) -> None:
        total = sum(quota.share for quota in self.quotas)
        if not math.isclose(total, 1.0, abs_tol=1e-6):
            raise EvaluationError(f"{self.name}: shares must sum to 1, got {total:g}")
        if len({quota.pool for quota in self.quotas if quota.pool}) > 1:
            raise EvaluationError(f"{self.name}: heads must compete in layers or in the model")

    def scores(self) -> tuple[Score, ...]:
        """Return all scores that the rule is made of, each once."""
        found = [score for quota in self.quotas for score in family(quota.score)]
        if self.merge is not None and self.merge.into == "edges":
            found.append(self.merge.graph)
        return tuple(dict.fromkeys(found))

    def wants(self) -> frozenset[str]:
        """Return what the scores need, see `Score.wants`."""
        return frozenset().union(*(score.wants() for score in self.scores()))

    @property
    def pool(self) -> Literal["layer", "model"] | None:
        """Where heads compete."""
        return next((quota.pool for quota in self.quotas if quota.pool), None)

    def window_of(self, budget: int) -> int:
        """Return the newest tokens that stay."""
        return int(self.window * budget) if isinstance(self.window, float) else self.window

    def places(self, budget: int) -> list[int]:
        """Return each quota's places in a head.

        Raises
        ------
        EvaluationError
            Sinks and window leave none.
        """
        free = budget - self.sinks - self.window_of(budget)
        if free < 1:
            raise EvaluationError(
                f"{self.name}: a budget must be more than {budget - free} tokens (sinks and "
                f"window), got {budget}"
            )
        # Rounded down, and the first gets what that leaves, as in spectralkv.policies. The small
        # number keeps 0.3 * 10 at 3.
        rest = [int(quota.share * free + 1e-9) for quota in self.quotas[1:]]
        return [free - sum(rest), *rest]


def choose(view: View, rule: Rule, budget: int) -> torch.Tensor:
    """Return the slots that stay, bool (R, S).

    Every head keeps `budget` tokens; where heads compete, the heads of a layer (or of the model)
    keep as many on average. Of equal scores the newer token stays.
    """
    if not rule.pool or rule.division == Division():
        return _choose(view, rule, budget)
    division, memory = rule.division, view.memory
    cuts, parts = memory.get(rule, "cuts") or 0, memory.get(rule, "parts")
    memory.set(rule, "cuts", cuts + 1)
    if parts is None or (division.every and cuts % division.every == 0 and not division.profile):
        keep = _choose(view, rule, budget)
        parts = keep.sum(1, keepdim=True)
        if division.even:
            mean = parts.view(-1, memory.shape[2]).double().mean(1, keepdim=True)
            parts = mean.floor().long().expand(-1, memory.shape[2]).reshape(-1, 1)
        memory.set(rule, "parts", parts)
        if not division.even:
            return keep
    return _choose(view, rule, budget, parts)


def _choose(view: View, rule: Rule, budget: int, parts: torch.Tensor | None = None) -> torch.Tensor:
    """Let heads compete, or keep `parts` (R, 1) of each."""
    layers, _, heads = view.memory.shape
    live, window = view.live, rule.window_of(budget)
    keep = live & ((view.positions < rule.sinks) | (view.positions >= view.seen - window))
    places = rule.places(budget)
    for order, (quota, count) in enumerate(zip(rule.quotas, places, strict=True)):
        rating = view.rate(quota.score)
        own: int | torch.Tensor = count
        if quota.pool:
            own = (
                int(quota.floor * count) if parts is None else (parts - budget + count).clamp_min(0)
            )
        elif order == len(rule.quotas) - 1 and order and not rule.pool:
            # All that the others left, which may have been more than they got.
            own = (budget - keep.sum(1, keepdim=True)).clamp_min(0)
        elif quota.cover < 1.0:
            own = count - _beyond_cover(view, rating, keep, count, quota.cover)
        keep = _take(rating, keep, live, own)
        if quota.pool and parts is None and count > own:
            keep = _take_together(view, quota, keep, count - own)
    if not rule.pool:
        return keep
    last = next(quota for quota in reversed(rule.quotas) if quota.pool)
    if parts is not None:
        rest = (parts - keep.sum(1, keepdim=True)).clamp_min(0)
        return _take(view.rate(last.score), keep, live, rest)
    # A head may hold less than its places: the others of its pool take them.
    target = budget * heads * (layers if rule.pool == "model" else 1)
    kept = _pooled(keep, view, rule.pool).sum(1, keepdim=True)
    return _take_together(view, last, keep, target - kept, total=True)


def _take(
    rating: torch.Tensor, keep: torch.Tensor, live: torch.Tensor, count: int | torch.Tensor
) -> torch.Tensor:
    """Return `keep` (R, S) with the `count` best free tokens of each row (an int, or (R, 1))."""
    slots = rating.shape[1]
    low = torch.finfo(rating.dtype).min
    ranked = torch.nan_to_num(rating, nan=low, posinf=-low, neginf=low)
    ranked = ranked.masked_fill(keep | ~live, float("-inf"))
    # Stable and ascending: of equal scores the newer token comes later.
    order = ranked.sort(dim=1, stable=True).indices
    chosen = torch.arange(slots, device=rating.device) >= slots - count
    taken = torch.zeros_like(keep).scatter_(1, order, chosen.expand(order.shape))
    return keep | (taken & live)


def _take_together(
    view: View, quota: Quota, keep: torch.Tensor, count: int | torch.Tensor, *, total: bool = False
) -> torch.Tensor:
    """Let the heads of each pool compete for `count` places a head (or, if `total`, a pool)."""
    rating = _pooled(view.share(quota.score), view, quota.pool)
    held, live = _pooled(keep, view, quota.pool), _pooled(view.live, view, quota.pool)
    heads = rating.shape[1] // keep.shape[1]
    taken = _take(rating, held, live, count if total else count * heads)
    return _unpooled(taken, view, quota.pool)


def _pooled(rows: torch.Tensor, view: View, pool: str | None) -> torch.Tensor:
    """Return (pools, heads x S) of (R, S)."""
    layers, batch, _ = view.memory.shape
    if pool == "layer":
        return rows.reshape(layers * batch, -1)
    return rows.view(layers, batch, -1).transpose(0, 1).reshape(batch, -1)


def _unpooled(pooled: torch.Tensor, view: View, pool: str | None) -> torch.Tensor:
    layers, batch, _ = view.memory.shape
    rows = view.positions.shape[0]
    if pool == "layer":
        return pooled.reshape(rows, -1)
    return pooled.view(batch, layers, -1).transpose(0, 1).reshape(rows, -1)


def _beyond_cover(
    view: View, rating: torch.Tensor, keep: torch.Tensor, count: int, cover: float
) -> torch.Tensor:
    """Return how many of the `count` best free tokens are beyond the share to cover, (R, 1)."""
    share = view.normal(rating.masked_fill(keep, 0.0))
    best = share.sort(1, descending=True).values[:, :count]
    return (best.cumsum(1) - best >= cover).sum(1, keepdim=True)


def merge_into(
    view: View, merge: Merge, keep: torch.Tensor, mass: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Average what is evicted into what stays.

    Parameters
    ----------
    view : View
        All slots.
    merge : Merge
        How.
    keep : torch.Tensor
        bool (R, S).
    mass : torch.Tensor
        (R, S): how many tokens each stands for.

    Returns
    -------
    keys, values, mass : torch.Tensor
        New ones, (R, S, D) and (R, S).
    """
    into, is_merged = _targets(view, merge, keep)
    moved = mass * (is_merged & view.live & ~keep)
    after = mass + torch.zeros_like(mass).scatter_add_(1, into, moved)

    def averaged(rows: torch.Tensor) -> torch.Tensor:
        index = into[..., None].expand_as(rows)
        total = (rows * mass[..., None]).scatter_add(1, index, rows * moved[..., None])
        return torch.where(keep[..., None], total / after[..., None], rows)

    keys = averaged(view.keys) if merge.keys else view.keys
    return keys, averaged(view.values), torch.where(keep, after, mass)


def _targets(view: View, merge: Merge, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slot that each token would go to, (R, S), and whether there is one."""
    free = keep & (view.positions >= view.sinks)  # a sink means nothing, nor must it
    if merge.into == "edges":
        target, weight = merge.graph.edges(view)
        rows, slots, degree = target.shape
        stays = free.gather(1, target.view(rows, -1)).view(rows, slots, degree)
        best = weight.masked_fill(~stays, 0.0).max(-1)
        return target.gather(2, best.indices[..., None])[..., 0], best.values > 0
    direction = functional.normalize(view.keys, dim=-1)
    rows, slots, _ = direction.shape
    into = torch.empty_like(view.positions)
    near = torch.empty_like(keep)
    step = max(1, _BLOCK_ELEMENTS // (slots * slots))
    for start in range(0, rows, step):
        part = slice(start, start + step)
        cosine = direction[part] @ direction[part].transpose(1, 2)
        best = cosine.masked_fill_(~free[part, None], -2.0).max(-1)
        into[part], near[part] = best.indices, best.values > merge.threshold
    return into, near
