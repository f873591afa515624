"""LazyEviction beyond one pass of scores: its cuts, its clock and what becomes of its state."""

from __future__ import annotations

import math

import pytest
import torch
from test_scores import DIM, HEADS, SCALING, observe, tokens

import reference
from spectralkv import policies
from spectralkv.hf import EvictingCache, cache_argument
from tiny_models import make_model

OPTIONS = {"budget": 14, "interval": 6, "window": 4, "threshold": 0.1}


class Stream:
    """One head's cache, token by token, as the paper has it."""

    def __init__(self, queries: torch.Tensor, keys: torch.Tensor, sinks: int) -> None:
        self.queries, self.keys, self.sinks = queries, keys, sinks  # (G, S, D), (S, D)
        self.held: list[int] = []  # positions
        self.last: dict[int, int] = {}
        self.longest: dict[int, int] = {}

    def take_in(self, chunk: range) -> None:
        for t in chunk:
            self.held.append(t)
            self.last[t], self.longest[t] = t, 0
            weights = reference.attention(
                self.queries[:, t : t + 1], self.keys[None, self.held], SCALING
            )
            for position, weight in zip(self.held, weights[:, 0].amax(0).tolist(), strict=True):
                if weight >= OPTIONS["threshold"]:
                    gap = t + 1 - self.last[position]
                    self.longest[position] = max(self.longest[position], gap)
                    self.last[position] = t + 1

    def scores(self) -> list[float]:
        now = self.held[-1] + 1
        scores = []
        for position in self.held:
            longest = self.longest[position]
            if longest == 0:
                scores.append(0.0)
                continue
            recurs = 2 / (1 + math.exp((now - self.last[position]) / longest))
            scores.append(recurs + 2 / (1 + math.exp(longest - 1)))
        return scores

    def cut(self) -> None:
        stay = reference.kept_positions(
            self.scores(), budget=OPTIONS["budget"], window=OPTIONS["window"], sinks=self.sinks
        )
        self.held = [self.held[slot] for slot in stay]


@pytest.mark.parametrize("sizes", [[1] * 60, [20, 7, 7, *[1] * 12, 14], [3] * 20])
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_stream_with_cuts(sizes: list[int], sinks: int, device: str) -> None:
    query, keys = tokens(1, 60, device=device, seed=3)
    group = query.shape[1] // HEADS
    streams = [
        Stream(query[0, h * group : (h + 1) * group].cpu(), keys[0, h].cpu(), sinks)
        for h in range(HEADS)
    ]
    (tracker,) = policies.LazyEviction(**OPTIONS, sinks=sinks).trackers(1)
    slab, start, cuts = keys[:, :, :0], 0, 0
    for size in sizes:
        chunk = range(start, start + size)
        slab = torch.cat((slab, keys[:, :, start : start + size]), 2)
        for stream in streams:
            stream.take_in(chunk)
        held = slab.shape[2]
        observe_chunk(tracker, query[:, :, start : start + size], slab)
        expected = torch.tensor([[stream.scores() for stream in streams]])
        torch.testing.assert_close(tracker.scores().cpu(), expected, rtol=1e-4, atol=1e-5)
        keep = tracker.keep()
        assert (keep is not None) == (held >= OPTIONS["budget"] + OPTIONS["interval"])
        if keep is not None:
            tracker.compact(keep, slab, slab.clone())
            slab = slab[:, :, : keep.shape[2]].clone()
            cuts += 1
            for head, stream in enumerate(streams):
                stream.cut()
                assert torch.equal(slab[0, head].cpu(), stream.keys[stream.held])
        start += size
    assert cuts > 2


def observe_chunk(tracker: policies.Tracker, query: torch.Tensor, keys: torch.Tensor) -> None:
    tracker.observe(
        policies.Observation(
            query=query,
            keys=keys,
            values=keys,
            lengths=(keys.shape[2],) * keys.shape[0],
            valid=None,
            new_valid=None,
            scaling=SCALING,
            softcap=None,
        )
    )


def test_nobody_looks_at_a_token_that_draws_nothing() -> None:
    query = torch.ones(1, 1, 30, DIM)
    keys = torch.ones(1, 1, 30, DIM)
    keys[:, :, 7] = -100.0
    (tracker,) = policies.LazyEviction(budget=29, interval=1, window=2).trackers(1)
    observe(tracker, query, keys, 0, 30)
    scores = tracker.scores()[0, 0]
    assert scores[7] == 0.0
    # All others are active at each step: silent for 0 steps, and never for more than 1.
    assert scores[:7].tolist() + scores[8:].tolist() == [2.0] * 29
    keep = tracker.keep()
    assert keep is not None
    assert 7 not in keep[0, 0].tolist()


def test_time_goes_on_after_a_roll_back() -> None:
    query, keys = tokens(2, 20)
    (tracker,) = policies.LazyEviction(budget=100).trackers(1)
    observe(tracker, query, keys, 0, 12)
    before = tracker._slab[:, :, :8].clone()
    tracker.truncate(4)
    observe(tracker, query, keys, 8, 9)
    # Steps 1 to 12 are over, so this query is step 13.
    assert tracker._step.tolist() == [[13], [13]]
    last, longest = tracker._slab[:, :, :9].unbind(-1)
    assert (last[..., 8] >= 12).all()
    assert (longest[..., :8] >= before[..., 1]).all()
    assert torch.equal(last[..., :8] == 13, last[..., :8] > before[..., 0])


def test_sequences_can_be_chosen_and_forgotten() -> None:
    query, keys = tokens(3, 20)
    (tracker,) = policies.LazyEviction(budget=100, threshold=0.05).trackers(1)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[1, :5] = False
    observe(tracker, query, keys, 0, 19, mask)
    observe(tracker, query, keys, 19, 20, mask)
    assert tracker._step.tolist() == [[20], [15], [20]]
    assert tracker.nbytes() == 3 * HEADS * 20 * 2 * 4 + 3 * 4
    before = tracker.scores()
    chosen = torch.tensor([2, 1, 1])
    tracker.select_batch(chosen)
    extended = torch.cat((keys, keys[:, :, :1]), 2)[chosen]
    observe(tracker, torch.cat((query, query[:, :, :1]), 2)[chosen], extended, 20, 21)
    assert tracker._step.tolist() == [[21], [16], [16]]
    assert torch.equal(tracker.scores()[1], tracker.scores()[2])
    assert tracker.scores().shape == (3, HEADS, 21)
    assert before.shape == (3, HEADS, 20)
    tracker.reset()
    assert tracker.nbytes() == 0
    observe(tracker, query[:1], keys[:1], 0, 20)
    assert torch.equal(tracker.scores()[0], before[0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_in_a_model(implementation: str) -> None:
    model = make_model("llama", implementation)
    ids = torch.randint(1, 97, (2, 70), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    cache = EvictingCache(
        model.config, policies.LazyEviction(budget=24, interval=8, window=6, threshold=0.01)
    )
    with torch.no_grad():
        output = model.generate(
            ids, attention_mask=mask, **cache_argument(cache), max_new_tokens=20, do_sample=False
        )
    assert output.shape == (2, 90)
    assert cache.layers[0].evictions > 1
    assert all(length < 24 + 8 for length in cache.layers[0].lengths)
