"""Personalized PageRank on the attention graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from search.scores import Kind, Memory, Pass, Score, View

_TINY = 1e-20


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
